"""Reads the vectors of live rows, and searches them exactly.

A fused field is computed here from what is stored: another weight needs no encoder.

Letters: N rows, D dimension, Q queries, K neighbours.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from encoders.fusion import fuse_products
from indexing.search import merge_topk, search_exact
from jobs.buckets import Records, sort_records
from jobs.errors import StoreError
from jobs.live import LiveRows
from jobs.nodes import cluster_cpus
from jobs.space import VectorField
from jobs.state import read_data_file
from jobs.store import Store
from jobs.tasks import gather_bounded

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
UInt64Array = npt.NDArray[np.uint64]

MAX_KEY = 2**64 - 1


def read_blocks(
    store: Store, field: VectorField, files: tuple[int, list[str]], rows: Records
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Read the vectors of live rows, a data file at a time; fuse them if the field is fused.

    Args:
        store: The store.
        field: The field; `text` takes the first row of each product alone.
        files: Number of the first data file, and their names.
        rows: (N,) `LIVE_DTYPE` rows of these files.

    Yields:
        Of each file with a row: ids (N,) int64 and vectors (N, D) float32 unit rows, by id.

    Raises:
        StoreError: A live row has no such vector: it was stored for other fields, or its image
            and text cancel out at this weight.
    """
    first, names = files
    rows = rows[rows["first"]] if field.name == "text" else rows
    rows = sort_records(rows, "file", "vector_id")
    for number in np.unique(rows["file"]).tolist():
        mine = rows[rows["file"] == number]
        yield mine["vector_id"].copy(), _read_file(store, names[number - first], field, mine)


def _read_file(store: Store, file: str, field: VectorField, rows: Records) -> Float32Array:
    columns = [f"{name}_embedding" for name in field.columns]
    table = read_data_file(store, file, columns)
    try:
        parts = [_unit_rows(table[name], rows["row"]) for name in columns]
    except ValueError as error:
        raise StoreError(f"{store.uri('embeddings', file)} is damaged: {error}") from error
    vectors = _fuse(field, parts)
    missing = np.isnan(vectors).any(axis=1)
    if vectors.shape[1] != field.dim or missing.any():
        raise StoreError(
            f"{store.uri('embeddings', file)}: field {field.name} needs {field.dim} dimensions a "
            f"row, found {vectors.shape[1]}; {int(missing.sum())} of {len(rows)} rows have no "
            f"such vector at image_weight {field.fusion.image_weight}"
        )
    return vectors


def _unit_rows(column: pa.ChunkedArray, rows: npt.NDArray[np.int32]) -> Float32Array:
    """Return some lists of a column as (N, D) float32 unit rows; NaN rows where it is null."""
    lists = column.combine_chunks()
    there = lists.is_valid().to_numpy(zero_copy_only=False)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    dim = len(values) // max(1, int(there.sum()))
    if (np.diff(lists.offsets.to_numpy())[there] != dim).any():
        raise ValueError(f"vectors of different dimensions, {dim} on average")
    if not dim:
        return np.empty((len(rows), 0), np.float32)
    places = np.cumsum(there)[rows] - 1  # a null has no values
    vectors: Float32Array = values.reshape(-1, dim)[places].astype(np.float32, copy=False)
    vectors[~there[rows]] = np.nan
    # Float16 rounding moved them a little. Summed row by row: the same wherever a row lies.
    vectors /= np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    return vectors


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


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A uniform sample of a field's rows: those with the smallest keys, by their ids alone.

    The order of the catalog has no part in it.

    Attributes:
        rows: How many to draw.
        seed: Another seed, another sample.
        salt: What the sample is for.
        below: Of this salt too, keys are at most this; `MAX_KEY`: any.
        held_out: Salt and key limit of rows that may not be drawn; None: all may.
    """

    rows: int
    seed: int
    salt: str
    below: int = MAX_KEY
    held_out: tuple[str, int] | None = None

    def limit(self, count: int) -> int:
        """Return the key under which the sample lies, and hardly more.

        Args:
            count: Rows of the field.
        """
        # Six standard deviations more than asked: fewer than `rows` pass once in a billion times.
        held = 0.0 if self.held_out is None else self.held_out[1] / MAX_KEY
        share = (self.rows + 6 * math.sqrt(self.rows) + 16) / max(1.0, count * (1 - held))
        return min(self.below, MAX_KEY if share >= 1 else int(share * MAX_KEY))

    def mark(self, vector_ids: Int64Array, limit: int) -> npt.NDArray[np.bool_]:
        """Mark the (N,) ids whose keys are at most a limit and that are not held out."""
        marked: npt.NDArray[np.bool_] = mix_ids(vector_ids, self.seed, self.salt) <= np.uint64(
            limit
        )
        if self.held_out is not None:
            salt, held = self.held_out
            marked &= mix_ids(vector_ids, self.seed, salt) > np.uint64(held)
        return marked


def sample_vectors(store: Store, field: VectorField, live: LiveRows, draw: Draw) -> list[Any]:
    """Read a sample of a field's live rows.

    Args:
        store: The store.
        field: The field; it takes its own of the rows.
        live: All live rows.
        draw: Which rows.

    Returns:
        References to (ids, vectors), one a group of files, with some rows too many; `join_sample`
        keeps those with the smallest keys.
    """
    limit = draw.limit(live.count(field.name))
    return [
        _read_sample.remote(store, field, files, draw, limit, *parts)
        for files, parts in zip(live.files, live.parts, strict=True)
        if draw.rows
    ]


@ray.remote(num_cpus=1)
def _read_sample(
    store: Store,
    field: VectorField,
    files: tuple[int, list[str]],
    draw: Draw,
    limit: int,
    *parts: Records,
) -> tuple[Int64Array, Float32Array]:
    rows = np.concatenate(parts)
    rows = rows[draw.mark(rows["vector_id"], limit)]
    return join_blocks(list(read_blocks(store, field, files, rows)), field.dim)


def mix_ids(vector_ids: Int64Array, seed: int, salt: str) -> UInt64Array:
    """Return a key a vector id: (N,) uint64, uniform, the same in every run."""
    mix = np.frombuffer(hashlib.sha256(f"{salt}/{seed}".encode()).digest()[:8], np.uint64)[0]
    keys: UInt64Array = vector_ids.astype(np.uint64) ^ mix
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    keys ^= keys >> np.uint64(31)
    return keys


def join_sample(
    parts: Sequence[tuple[Int64Array, Float32Array]], draw: Draw
) -> tuple[Int64Array, Float32Array]:
    """Join what `sample_vectors` read, and keep the rows with the smallest keys, sorted by id.

    The sample is copied once: memory beside the parts is its own.

    Args:
        parts: Ids (N,) int64 and vectors (N, D) float32 of each group of files.
        draw: What was drawn.

    Returns:
        Ids (N,) int64 and vectors (N, D) float32; N is `draw.rows`, or all there are.
    """
    filled = [part for part in parts if len(part[0])]
    if not filled:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    ids = np.concatenate([part[0] for part in filled])
    kept = np.argsort(mix_ids(ids, draw.seed, draw.salt), kind="stable")[: draw.rows]
    kept = kept[np.argsort(ids[kept], kind="stable")]
    vectors = np.empty((len(kept), filled[0][1].shape[1]), np.float32)
    start = 0
    for block, rows in filled:
        mine = (kept >= start) & (kept < start + len(block))
        vectors[mine] = rows[kept[mine] - start]
        start += len(block)
    return ids[kept], vectors


def join_blocks(
    blocks: tuple[tuple[Int64Array, Float32Array], ...] | list[tuple[Int64Array, Float32Array]],
    dim: int,
) -> tuple[Int64Array, Float32Array]:
    """Join blocks of ids and vectors, sorted by id.

    Args:
        blocks: Ids (N,) int64 and vectors (N, D) float32 of each.
        dim: D, should there be no row.
    """
    filled = [(ids, vectors) for ids, vectors in blocks if len(ids)]
    if not filled:
        return np.zeros(0, np.int64), np.zeros((0, dim), np.float32)
    ids = np.concatenate([block[0] for block in filled])
    order = np.argsort(ids)
    return ids[order], np.concatenate([block[1] for block in filled])[order]


def exact_search(
    store: Store,
    field: VectorField,
    live: LiveRows,
    queries: Any,  # noqa: ANN401 - a reference
    k: int,
    exclude: Int64Array | None = None,
) -> tuple[Float32Array, Int64Array]:
    """Compare queries with every live vector of a field, a Ray task a group of data files.

    Args:
        store: The store.
        field: The field.
        live: All live rows; the field takes its own of them.
        queries: Reference to (Q, D) float32 unit rows.
        k: K >= 1.
        exclude: (Q,) int64, a vector id a query that it may not find, as its own; -1: none.

    Returns:
        Scores (Q, K) float32, best first, and vector ids (Q, K) int64, padded with -1.

    Raises:
        StoreError: A row has no vector, or there is no row to search.
    """

    def submit(group: tuple[tuple[int, list[str]], list[Any]]) -> Any:  # noqa: ANN401
        return _exact_block.remote(store, field, group[0], queries, k, exclude, *group[1])

    best: Any = None
    groups = list(zip(live.files, live.parts, strict=True))
    for part in gather_bounded(submit, groups, in_flight=2 * cluster_cpus()):
        best = part if best is None else merge_topk([best, part], k)
    if best is None:
        raise StoreError(f"store {store.root}: no file holds vectors of field {field.name}")
    found: tuple[Float32Array, Int64Array] = best
    return found


@ray.remote(num_cpus=1)
def _exact_block(
    store: Store,
    field: VectorField,
    files: tuple[int, list[str]],
    queries: Float32Array,
    k: int,
    exclude: Int64Array | None,
    *parts: Records,
) -> tuple[Float32Array, Int64Array]:
    blocks = read_blocks(store, field, files, np.concatenate(parts))
    return search_exact(queries, blocks, k, exclude=exclude)
