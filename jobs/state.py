"""Reads which rows the store holds: of the embeddings table, and of a release; never a vector.

Letters: N rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from jobs.buckets import Parts, Records, make_groups, scatter, sort_records, split_by_bucket, turn
from jobs.errors import StoreError
from jobs.images import RejectReason
from jobs.schemas import DELETE, PRECISIONS, REJECT, UPSERT
from jobs.storage import parquet_errors
from jobs.store import Release, Store
from jobs.tasks import gather

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

OPERATIONS = {UPSERT: 0, DELETE: 1, REJECT: 2}
REASONS = list(RejectReason)
ROW_GROUP_ROWS = 65_536
STATE_DTYPE = np.dtype(
    [
        ("vector_id", "<i8"),
        ("generation", "<i8"),
        ("image_hash", "<i8"),
        ("text_hash", "<i8"),
        ("etag_hash", "<i8"),
        ("content", "<i8"),
        ("first_seen", "<i8"),
        ("written_at", "<i8"),
        ("limits_hash", "<i8"),
        ("attempts", "<i4"),
        ("file", "<i4"),
        ("row", "<i4"),
        ("operation", "i1"),
        ("reason", "i1"),
        ("precision", "i1"),
    ]
)
"""A row of the table but for its vectors. Times are microseconds since 1970; `file` counts in
`store.embedding_files(version)`, `row` in the file; `reason` in `REASONS` and `precision` in
`PRECISIONS` from 1, 0: none."""

RELEASED_DTYPE = np.dtype(
    [("vector_id", "<i8"), ("generation", "<i8"), ("metadata_hash", "<i8"), ("first", "?")]
)
"""A row of a release, as its `rows.parquet` has it."""


def read_state(
    store: Store, version: int | None, encoder: str, buckets: int, bucket_rows: int
) -> Parts:
    """Read all rows of one encoder in the embeddings table, but for their vectors.

    Args:
        store: The store.
        version: Version of the embeddings table; None: there is no table.
        encoder: Fingerprint.
        buckets: How many ranges of ids there are.
        bucket_rows: About how many rows one task reads.

    Returns:
        [bucket][group of files] references to `STATE_DTYPE` rows; see `newest_rows`.
    """
    files = store.embedding_files(version)
    groups = make_groups(len(files), sum(store.embedding_counts(version)), bucket_rows)
    named = [(group.start, files[group.start : group.stop]) for group in groups]
    heads, parts = scatter(_read_state, named, buckets, store, encoder)
    gather(heads)
    return turn(parts, buckets)


@ray.remote(num_cpus=1)
def _read_state(
    store: Store, encoder: str, files: tuple[int, list[str]], buckets: int
) -> tuple[Any, ...]:
    first, names = files
    parts = [_read_rows(store, encoder, first + n, file) for n, file in enumerate(names)]
    rows = np.concatenate(parts)
    return len(rows), *split_by_bucket(rows, buckets)


def _read_rows(store: Store, encoder: str, number: int, file: str) -> Records:
    renamed = {"content": "image_content", "reason": "reject_reason"}
    names = [n for n in STATE_DTYPE.names or () if n not in ("file", "row")]
    table = read_data_file(store, file, [*(renamed.get(n, n) for n in names), "encoder"])
    rows = np.zeros(table.num_rows, STATE_DTYPE)
    for name in names:
        column = table[renamed.get(name, name)]
        if name == "reason":
            column = pc.add(pc.index_in(column, pa.array([str(r) for r in REASONS])), 1)
        elif name == "precision":
            column = pc.add(pc.index_in(column, pa.array(PRECISIONS)), 1)
        elif name == "operation":
            column = pc.index_in(column, pa.array(list(OPERATIONS)))
        elif name in ("first_seen", "written_at"):
            column = column.cast(pa.int64())
        rows[name] = pc.fill_null(column, 0).to_numpy()
    rows["file"], rows["row"] = number, np.arange(len(rows))
    kept: Records = rows[pc.equal(table["encoder"], encoder).to_numpy()]
    return kept


def newest_rows(rows: Records) -> Records:
    """Return the newest row of every vector id, sorted by vector id.

    Args:
        rows: (N,) records of `STATE_DTYPE`, all rows of the ids among them.
    """
    ordered = sort_records(rows, "vector_id", "generation", "file", "row")
    newest = np.ones(len(ordered), bool)
    newest[:-1] = ordered["vector_id"][1:] != ordered["vector_id"][:-1]
    return ordered[newest]


def read_released(store: Store, release: Release | None, buckets: int, bucket_rows: int) -> Parts:
    """Read which rows a release is made of.

    Returns:
        [bucket][group] references to `RELEASED_DTYPE` rows.

    Raises:
        StoreError: The release's `rows.parquet` is missing or damaged.
    """
    if release is None:
        return [[] for _ in range(buckets)]
    groups = make_groups(-(-release.vectors // ROW_GROUP_ROWS), release.vectors, bucket_rows)
    address = rows_address(store, release)
    heads, parts = scatter(_read_released, groups, buckets, store, address)
    gather(heads)
    return turn(parts, buckets)


@ray.remote(num_cpus=1)
def _read_released(store: Store, address: str, groups: range, buckets: int) -> tuple[Any, ...]:
    table = read_row_groups(store, address, groups, list(RELEASED_DTYPE.names or ()))
    rows = np.zeros(table.num_rows, RELEASED_DTYPE)
    for name in RELEASED_DTYPE.names or ():
        rows[name] = table[name].to_numpy()
    return len(rows), *split_by_bucket(rows, buckets)


def rows_address(store: Store, release: Release) -> str:
    """Return the address of a release's `rows.parquet`, which an earlier run may have written.

    Raises:
        StoreError: The release's manifest is missing or damaged.
    """
    manifest = store.read_json("indexes", release.indexes, "manifest.json")
    try:
        return store.uri("indexes", manifest["rows"]["folder"], manifest["rows"]["file"])
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{store.uri('indexes', release.indexes)}: a manifest without rows: it is of another "
            "version of Vitrine"
        ) from error


def read_row_groups(
    store: Store, address: str, groups: Sequence[int], columns: list[str]
) -> pa.Table:
    """Read row groups of a `rows.parquet` or `ids.parquet`; those that it doesn't have are none.

    Raises:
        StoreError: The file is missing or damaged.
    """
    with parquet_errors(address), store.filesystem().open(address, "rb") as handle:
        parquet = pq.ParquetFile(handle)
        wanted = [number for number in groups if number < parquet.num_row_groups]
        return parquet.read_row_groups(wanted, columns=columns)


def read_data_file(store: Store, file: str, columns: list[str]) -> pa.Table:
    """Read columns of one data file of the embeddings table.

    Args:
        store: The store.
        file: As `store.embedding_files` lists it.
        columns: Names of `EMBEDDINGS`.

    Raises:
        StoreError: The file is missing or damaged.
    """
    address = store.uri("embeddings", file)
    with parquet_errors(address), store.filesystem().open(address, "rb") as handle:
        return pq.ParquetFile(handle).read(columns=columns)


def take_rows(rows: Records, wanted: Int64Array) -> tuple[Records, BoolArray]:
    """Find the records of vector ids.

    Args:
        rows: (N,) records, sorted by `vector_id`.
        wanted: (M,) int64.

    Returns:
        (M,) records, zero where there is none, and whether there is one.
    """
    places, known = locate(rows["vector_id"], wanted)
    taken = np.zeros(len(wanted), rows.dtype)
    taken[known] = rows[places[known]]
    return taken, known


def locate(sorted_ids: Int64Array, wanted: Int64Array) -> tuple[Int64Array, BoolArray]:
    """Find ids in a sorted array.

    Args:
        sorted_ids: (N,) int64, sorted, unique.
        wanted: (M,) int64.

    Returns:
        Places (M,) int64 in [0, max(N - 1, 0)], and whether each id is there (M,) bool.
    """
    if len(sorted_ids) == 0:
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    places = np.minimum(np.searchsorted(sorted_ids, wanted), len(sorted_ids) - 1)
    return places, sorted_ids[places] == wanted
