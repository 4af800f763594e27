"""Searches a release exactly: every live vector of a field, by Ray tasks over the data files.

Letters: N rows, Q queries, D dimension, K neighbours.
"""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from indexing.search import group_by_product
from jobs.buckets import make_groups, scatter, split_rows, turn
from jobs.ids_table import Ids
from jobs.live import LIVE_DTYPE, Live, LiveRows
from jobs.release_files import read_file_names
from jobs.space import VectorField
from jobs.state import ROW_GROUP_ROWS, read_row_groups, rows_address
from jobs.storage import machine_cache
from jobs.store import Release, Store
from jobs.tasks import gather
from jobs.vectors import exact_search

MAX_DEPTH = 2048  # neighbours a query: bounds memory where a product has hundreds of images

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


def release_rows(store: Store, release: Release, bucket_rows: int) -> LiveRows:
    """Find the rows of the embeddings table that a release was made of.

    Args:
        store: The store.
        release: The release; what came to the table later has no part in it.
        bucket_rows: About how many rows one task reads.

    Raises:
        StoreError: The release is missing or damaged.
    """
    manifest = store.read_json("indexes", release.indexes, "manifest.json")
    address = rows_address(store, release)
    names = read_file_names(store, address)
    files = make_groups(len(names), release.vectors, bucket_rows)
    starts = np.array([group.start for group in files], np.int64)
    row_groups = make_groups(-(-release.vectors // ROW_GROUP_ROWS), release.vectors, bucket_rows)
    heads, parts = scatter(_split_released, row_groups, len(files), store, address, starts)
    live = sum(gather(heads))
    filled = turn(parts, len(files))
    kept = [number for number in range(len(files)) if live[number]]
    return LiveRows(
        files=[(files[n].start, names[files[n].start : files[n].stop]) for n in kept],
        group_rows=[int(live[n]) for n in kept],
        file_rows=max(store.embedding_counts(release.embeddings_version), default=0),
        parts=[filled[n] for n in kept],
        vectors=release.vectors,
        products=release.products,
        rejected=release.rejected,
        most_images=int(manifest["most_images"]),
    )


def release_live(store: Store, release: Release, bucket_rows: int) -> Live:
    """Return a release's rows as a join gives them, for indexes that are built of them anew.

    Args:
        store: The store.
        release: The release.
        bucket_rows: About how many rows one task reads.

    Raises:
        StoreError: The release is missing or damaged.
    """
    address = rows_address(store, release)
    groups = make_groups(-(-release.vectors // ROW_GROUP_ROWS), release.vectors, bucket_rows)
    heads, parts = scatter(_split_released, groups, 1, store, address, np.zeros(1, np.int64))
    gather(heads)
    return Live(
        rows=release_rows(store, release, bucket_rows),
        buckets=[part for (part,) in parts],
        stale=[],
        names=read_file_names(store, address),
        reasons=Counter(),
        examples={},
    )


@ray.remote(num_cpus=1)
def _split_released(
    store: Store, address: str, starts: Int64Array, groups: range, parts: int
) -> tuple[Any, ...]:
    """Return how many live rows each group of files has, and the rows of each."""
    names = ("vector_id", "generation", "metadata_hash", "file", "row", "first")
    table = read_row_groups(store, address, groups, list(names))
    rows = np.zeros(table.num_rows, LIVE_DTYPE)
    for name in names:
        rows[name] = table[name].to_numpy()
    number = np.searchsorted(starts, rows["file"], side="right") - 1
    counts = np.bincount(number, minlength=parts).astype(np.int64)
    return counts, *split_rows(rows, number, parts)


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
    # Images of one product can take no more than their own number of places before the k-th.
    most_images = 1 if field.name == "text" else live.most_images
    depth = min(live.count(field.name), max(k, min(MAX_DEPTH, k * most_images)))
    found = exact_search(store, field, live, ray.put(queries), depth)
    products: list[list[str]] = gather([_products.remote(store, release, ray.put(found), k)])[0]
    return products


@ray.remote(num_cpus=1)
def _products(
    store: Store, release: Release, found: tuple[Float32Array, Int64Array], k: int
) -> list[list[str]]:
    ids = _open_ids(store, release)
    ranked = []
    for scores, vector_ids in zip(*found, strict=True):
        kept = vector_ids >= 0
        owners = ids.products(vector_ids[kept])
        best = group_by_product(scores[kept], vector_ids[kept], owners, k)
        ranked.append([product for product, _, _ in best])
    return ranked


def _open_ids(store: Store, release: Release) -> Ids:
    entry = store.read_json("indexes", release.indexes, "manifest.json")["ids"]
    return Ids.open(store, entry, machine_cache() / "ids")
