"""Searches a release exactly: every live vector of a field, by Ray tasks over the data files.

Letters: N rows, Q queries, D dimension, K neighbours.
"""

import shutil
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from indexing.search import group_by_product
from jobs.cluster import gather
from jobs.diff import locate, read_state
from jobs.ids import Ids
from jobs.space import VectorField
from jobs.store import Release, Store, scratch_folder
from jobs.vectors import LiveRows, exact_search, mark_first

MAX_DEPTH = 2048  # neighbours a query: bounds memory where a product has hundreds of images

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


def release_rows(store: Store, release: Release) -> LiveRows:
    """Find the rows of the embeddings table that a release was made of.

    Args:
        store: The store.
        release: The release; its version of the table is read, whatever came later.

    Raises:
        StoreError: The release or that version of the table is missing or damaged.
    """
    state = read_state(store, release.embeddings_version, release.encoder)
    files = store.embedding_files(release.embeddings_version)
    live: LiveRows = gather([_live_rows.remote(store, release, state, files)])[0]
    return live


@ray.remote(num_cpus=1)
def _live_rows(
    store: Store, release: Release, state: npt.NDArray[np.void], files: list[str]
) -> LiveRows:
    ids = _open_ids(store, release)
    places, _ = locate(state["vector_id"], ids.vector_id)
    encoded = ids.table["product_id"].combine_chunks().dictionary_encode()
    product = encoded.indices.to_numpy().astype(np.int64)
    return LiveRows(
        vector_id=np.array(ids.vector_id),
        generation=state["generation"][places],
        product=product,
        first=mark_first(product, ids.table["image_number"].to_numpy()),
        files=tuple(files[number] for number in np.unique(state["file"][places])),
        rejected=release.rejected,
    )


def search_release(
    store: Store,
    release: Release,
    live: LiveRows,
    field: VectorField,
    queries: Float32Array,
    k: int,
) -> list[list[str]]:
    """Find the k best products of each query by comparing with all of a field's vectors.

    Args:
        store: The store.
        release: The release.
        live: Its rows, from `release_rows`.
        field: One of its fields.
        queries: (Q, D) float32 unit rows.
        k: Most products a query.

    Returns:
        Product ids, best first, at most k a query.

    Raises:
        StoreError: Vectors are missing.
    """
    rows = live.select(field.name)
    # Images of one product can take no more than their own number of places before the k-th.
    most_images = int(np.unique(rows.product, return_counts=True)[1].max())
    depth = min(len(rows.vector_id), max(k, min(MAX_DEPTH, k * most_images)))
    found = exact_search(store, field, ray.put(rows), live.files, ray.put(queries), depth)
    products: list[list[str]] = gather([_products.remote(store, release, ray.put(found), k)])[0]
    return products


@ray.remote(num_cpus=1)
def _products(
    store: Store, release: Release, found: tuple[Float32Array, Int64Array], k: int
) -> list[list[str]]:
    ids = _open_ids(store, release)
    table = ids.table["product_id"]
    ranked = []
    for scores, vector_ids in zip(*found, strict=True):
        kept = vector_ids >= 0
        places, _ = locate(ids.vector_id, vector_ids[kept])
        owners = table.take(places).to_pylist()
        best = group_by_product(scores[kept], vector_ids[kept], owners, k)
        ranked.append([product for product, _, _ in best])
    return ranked


def _open_ids(store: Store, release: Release) -> Ids:
    entry: dict[str, Any] = store.read_json("indexes", release.indexes, "manifest.json")["ids"]
    cache = scratch_folder("ids")
    try:
        path = store.local_copy(cache, "indexes", release.indexes, entry["file"])
        return Ids(path, sha256=entry["sha256"])
    finally:
        shutil.rmtree(cache)
