"""Reads the vectors of live rows, and searches them exactly.

A fused field is computed here from what is stored: another weight needs no encoder.

Letters: N rows, D dimension, Q queries, K neighbours.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from encoders.fusion import fuse_products
from indexing.search import merge_topk, search_exact
from jobs.cluster import cluster_cpus, gather_bounded
from jobs.diff import locate, read_data_file
from jobs.errors import StoreError
from jobs.schemas import UPSERT
from jobs.space import VectorField
from jobs.store import Store

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LiveRows:
    """The rows a release is made of.

    Attributes:
        vector_id: (N,) int64, sorted.
        generation: (N,) int64: which of the rows of that id is live.
        product: (N,) int64 hash of the product id.
        first: (N,) bool: the product's first live image. A text field is indexed once a product.
        files: Data files that hold a live row.
        rejected: Catalog rows that are not live.
    """

    vector_id: Int64Array
    generation: Int64Array
    product: Int64Array
    first: npt.NDArray[np.bool_]
    files: tuple[str, ...]
    rejected: int

    @property
    def products(self) -> int:
        """How many products have a live row."""
        return int(self.first.sum())

    def select(self, field: str) -> "LiveRows":
        """Return the rows that a field's index holds."""
        if field != "text":
            return self
        names = ("vector_id", "generation", "product", "first")
        return replace(self, **{name: getattr(self, name)[self.first] for name in names})

    def draw(self, rows: int, *, seed: int, salt: str) -> Int64Array:
        """Draw rows uniformly, by their ids alone: the order of the catalog has no part in it.

        Returns:
            (min(rows, N),) int64 vector ids, sorted.
        """
        mix = np.frombuffer(hashlib.sha256(f"{salt}/{seed}".encode()).digest()[:8], np.uint64)[0]
        keys = self.vector_id.astype(np.uint64) ^ mix
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
        keys ^= keys >> np.uint64(31)
        rows = min(rows, len(keys))
        return np.sort(self.vector_id[np.argsort(keys, kind="stable")[:rows]])


def mark_first(product: Int64Array, image_number: npt.NDArray[np.integer[Any]]) -> BoolArray:
    """Mark each product's first image among some rows.

    Args:
        product: (N,) int64, one number a product.
        image_number: (N,) integers.

    Returns:
        (N,) bool.
    """
    order = np.lexsort((image_number, product))
    first = np.zeros(len(product), bool)
    first[order] = np.append(True, product[order][1:] != product[order][:-1])[: len(product)]
    return first


def read_vectors(
    store: Store, file: str, field: VectorField, rows: LiveRows, wanted: Int64Array | None = None
) -> tuple[Int64Array, Float32Array]:
    """Read a data file's live vectors of one field; fuse them if the field is fused.

    Args:
        store: The store.
        file: The data file.
        field: The field.
        rows: The field's live rows.
        wanted: (M,) sorted vector ids to keep; all live ones if None.

    Returns:
        Ids (N,) int64 and vectors (N, D) float32 unit rows, sorted by id.

    Raises:
        StoreError: A live row has no such vector: it was stored for other fields, or its image
            and text cancel out at this weight.
    """
    columns = [f"{name}_embedding" for name in field.columns]
    table = read_data_file(store, file, ["vector_id", "generation", "operation", *columns])
    ids = table["vector_id"].to_numpy()
    places, known = locate(rows.vector_id, ids)
    keep = known & (table["operation"].to_numpy() == UPSERT)
    if len(rows.vector_id):
        keep &= rows.generation[places] == table["generation"].to_numpy()
    if wanted is not None:
        keep &= locate(wanted, ids)[1]
    kept = table.filter(pa.array(keep)).sort_by("vector_id")
    if len(kept) == 0:
        return np.zeros(0, np.int64), np.zeros((0, field.dim), np.float32)
    vectors = _fuse(field, [_unit_rows(kept[name]) for name in columns])
    missing = np.isnan(vectors).any(axis=1)
    if vectors.shape[1] != field.dim or missing.any():
        raise StoreError(
            f"{store.uri('embeddings', file)}: field {field.name} needs {field.dim} dimensions a "
            f"row, found {vectors.shape[1]}; {int(missing.sum())} of {len(kept)} rows have no "
            f"such vector at image_weight {field.fusion.image_weight}"
        )
    return kept["vector_id"].to_numpy(), vectors


def _unit_rows(column: pa.ChunkedArray) -> Float32Array:
    """Return the lists of a column as (N, D) float32 unit rows; NaN rows where it is null."""
    lists = column.combine_chunks()
    there = lists.is_valid().to_numpy(zero_copy_only=False)
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    dim = len(values) // max(1, int(there.sum()))
    vectors = np.full((len(lists), dim), np.nan, np.float32)
    vectors[there] = values.reshape(-1, dim) if dim else 0
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)  # float16 rounding moved them a little
    unit: Float32Array = vectors / norms
    return unit


def _fuse(field: VectorField, parts: list[Float32Array]) -> Float32Array:
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0])
    widest = max(part.shape[1] for part in parts)
    # A file in which no row has an image has nothing that says how wide its vectors would be.
    image, text = (
        part if part.shape[1] else np.full((len(part), widest), np.nan, np.float32)
        for part in parts
    )
    fused = fuse_products(field.fusion, image, text, field.fusion.image_weight)
    return np.ascontiguousarray(fused)


def gather_vectors(
    store: Store,
    field: VectorField,
    rows: Any,  # noqa: ANN401 - a reference
    files: tuple[str, ...],
    wanted: Int64Array,
) -> list[Any]:
    """Start a task a file that reads the wanted vectors; return their references.

    Args:
        store: The store.
        field: The field.
        rows: Reference to the field's `LiveRows`.
        files: Data files.
        wanted: (M,) sorted vector ids.

    Returns:
        References to (ids, vectors) as `read_vectors` returns them; see `concatenate`.
    """
    return [_read_wanted.remote(store, file, field, rows, wanted) for file in files]


@ray.remote(num_cpus=1)
def _read_wanted(
    store: Store, file: str, field: VectorField, rows: LiveRows, wanted: Int64Array
) -> tuple[Int64Array, Float32Array]:
    return read_vectors(store, file, field, rows, wanted)


def concatenate(
    parts: tuple[tuple[Int64Array, Float32Array], ...],
) -> tuple[Int64Array, Float32Array]:
    """Join what was read of several files, sorted by id.

    Args:
        parts: Ids (N,) int64 and vectors (N, D) float32 of each file.
    """
    filled = [(ids, vectors) for ids, vectors in parts if len(ids)]
    if not filled:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    ids = np.concatenate([part[0] for part in filled])
    order = np.argsort(ids)
    return ids[order], np.concatenate([part[1] for part in filled])[order]


def exact_search(
    store: Store,
    field: VectorField,
    rows: Any,  # noqa: ANN401 - a reference
    files: tuple[str, ...],
    queries: Any,  # noqa: ANN401 - a reference
    k: int,
) -> tuple[Float32Array, Int64Array]:
    """Compare queries with every live vector of a field, a Ray task a data file.

    Args:
        store: The store.
        field: The field.
        rows: Reference to the field's `LiveRows`.
        files: Data files.
        queries: Reference to (Q, D) float32 unit rows.
        k: K >= 1.

    Returns:
        Scores (Q, K) float32, best first, and vector ids (Q, K) int64, padded with -1.

    Raises:
        StoreError: As `read_vectors`, or there is no file to search.
    """

    def submit(file: str) -> Any:  # noqa: ANN401
        return _exact_block.remote(store, file, field, rows, queries, k)

    best: Any = None
    for part in gather_bounded(submit, files, in_flight=2 * cluster_cpus()):
        best = part if best is None else merge_topk([best, part], k)
    if best is None:
        raise StoreError(f"store {store.root}: no file holds vectors of field {field.name}")
    found: tuple[Float32Array, Int64Array] = best
    return found


@ray.remote(num_cpus=1)
def _exact_block(
    store: Store, file: str, field: VectorField, rows: LiveRows, queries: Float32Array, k: int
) -> tuple[Float32Array, Int64Array]:
    return search_exact(queries, [read_vectors(store, file, field, rows)], k)
