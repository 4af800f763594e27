"""Finds the rows of a release for an export, divided by groups of data files.

`ids.parquet` and `rows.parquet` are read by row groups, a Ray task a range of them. Each task
divides its rows by the data file that holds their vectors; the parts lie in Ray's object store,
which spills to disk, and the driver holds references alone: row-group ranges times file groups of
them, 256 x 256 at most. A reading task holds the metadata of 65,536 rows, or of a 256th of the
release if that is more.

Letters: N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.buckets import MAX_GROUPS, Parts, Records, make_groups, scatter, turn
from jobs.errors import ConfigError, StoreError
from jobs.export_layout import KEY_COLUMNS, Layout, hive_folders
from jobs.live import LIVE_DTYPE
from jobs.release_files import read_file_names
from jobs.state import ROW_GROUP_ROWS, read_row_groups
from jobs.storage import parquet_errors
from jobs.store import Release, Store
from jobs.tasks import gather

Int64Array = npt.NDArray[np.int64]
Part = tuple[Records, pa.Table]
"""Rows of one reading task and one group of files, sorted by data file: where their vectors are
(`LIVE_DTYPE`), and their columns."""

MAX_FOLDERS = 500  # a task has a file open a folder; systems allow a process 1,024


@dataclass(frozen=True, kw_only=True)
class Source:
    """A release's tables.

    Attributes:
        ids: Address of `ids.parquet`.
        rows: Address of `rows.parquet`.
    """

    store: Store
    release: Release
    ids: str
    rows: str


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a release's tables say of themselves.

    Attributes:
        schema: Of `ids.parquet`.
        files: All data files that `rows.parquet` counts in.
        row_groups: Of each of the two.
    """

    schema: pa.Schema
    files: list[str]
    row_groups: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rows of a release.

    Attributes:
        files: Of each group of data files: the number of the first one, and their names.
        parts: [group][reading task] references to `Part`.
    """

    files: list[tuple[int, list[str]]]
    parts: Parts


def open_source(store: Store, release: Release, manifest: dict[str, Any]) -> Source:
    """Find a release's tables; they may lie in an earlier run's folder.

    Raises:
        StoreError: The manifest names none.
    """
    addresses = {}
    for name in ("ids", "rows"):
        entry = manifest.get(name)
        if not isinstance(entry, dict):
            raise StoreError(
                f"{store.uri('indexes', release.indexes)}: release {release.version} has no "
                f"{name}.parquet, it is of an earlier version of Vitrine: run the refresh again"
            )
        addresses[name] = store.uri("indexes", entry["folder"], entry["file"])
    return Source(store=store, release=release, **addresses)


def describe_source(source: Source) -> Described:
    """Read the schemas of a release's tables.

    Raises:
        StoreError: A table is missing or damaged, or they are not of one release.
    """
    described: Described = gather([_describe.remote(source)])[0]
    return described


@ray.remote(num_cpus=1)
def _describe(source: Source) -> Described:
    ids, rows = (_read_footer(source.store, a) for a in (source.ids, source.rows))
    groups = [_group_rows(footer) for footer in (ids, rows)]
    if groups[0] != groups[1] or sum(groups[0]) != source.release.vectors:
        raise StoreError(
            f"{source.ids} has {sum(groups[0]):,} rows, {source.rows} {sum(groups[1]):,}, release "
            f"{source.release.version} {source.release.vectors:,}: they are not of one release"
        )
    return Described(
        schema=ids.schema.to_arrow_schema(),
        files=read_file_names(source.store, source.rows),
        row_groups=len(groups[0]),
    )


def _group_rows(footer: pq.FileMetaData) -> list[int]:
    return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]


def _read_footer(store: Store, address: str) -> pq.FileMetaData:
    with parquet_errors(address), store.filesystem().open(address, "rb") as handle:
        return pq.read_metadata(handle)


def find_rows(source: Source, described: Described, layout: Layout) -> Found:
    """Divide a release's rows by groups of data files.

    Args:
        source: The release.
        described: Of the same release.
        layout: Which columns are taken along; the size of a group is that of an exported file.

    Raises:
        StoreError: The tables are damaged, or have not the rows that the release has.
        ConfigError: The partition columns make more than `MAX_FOLDERS` folders.
    """
    rows = source.release.vectors
    units = make_groups(described.row_groups, rows, ROW_GROUP_ROWS)
    counts = _count_rows(source, units, len(described.files), layout)
    size = max(layout.rows_per_file, -(-rows // MAX_GROUPS))
    groups = group_files(counts, size)
    starts = np.array([group.start for group in groups], np.int64)
    heads, parts = scatter(_split, units, len(groups), source, starts, layout)
    turned = turn(parts, len(groups))
    gather(heads)
    return Found(
        files=[(group.start, described.files[group.start : group.stop]) for group in groups],
        parts=turned,
    )


def group_files(counts: Int64Array, size: int) -> list[range]:
    """Divide data files into consecutive groups of about as many live rows.

    Args:
        counts: (F,) live rows of each file.
        size: A group has fewer than this and one file's together.

    Returns:
        The files' numbers; files without a live row at a group's ends are in none.
    """
    live = np.flatnonzero(counts)
    if not len(live):
        return []
    before = np.cumsum(counts[live]) - counts[live]
    edges = np.flatnonzero(np.diff(before // size, prepend=-1)).tolist()
    return [
        range(int(live[low]), int(live[high - 1]) + 1)
        for low, high in pairwise([*edges, len(live)])
    ]


def _count_rows(source: Source, units: list[range], files: int, layout: Layout) -> Int64Array:
    """Count the live rows of each data file: (F,) int64."""
    counts, products, folders = np.zeros(files, np.int64), 0, set[str]()
    for found in gather([_count.remote(source, unit, files, layout) for unit in units]):
        counts, products, folders = counts + found[0], products + found[1], folders | found[2]
    if len(folders) > MAX_FOLDERS:
        raise ConfigError(
            f"{', '.join(layout.partition_by)} would make more than {MAX_FOLDERS} folders: "
            "partition by columns with fewer values"
        )
    release = source.release
    if (int(counts.sum()), products) != (release.vectors, release.products):
        raise StoreError(
            f"{source.rows} has {int(counts.sum()):,} rows of {products:,} products, release "
            f"{release.version} has {release.vectors:,} of {release.products:,}: it is damaged"
        )
    return counts


@ray.remote(num_cpus=1)
def _count(
    source: Source, units: range, files: int, layout: Layout
) -> tuple[Int64Array, int, set[str]]:
    """Return a range's rows by data file, its products, and the folders it needs."""
    rows = read_row_groups(source.store, source.rows, units, ["file", "first"])
    counts = np.bincount(rows["file"].to_numpy(), minlength=files).astype(np.int64)
    folders: set[str] = set()
    for unit in units if layout.partition_by else []:
        partitioned = [one for one in layout.metadata if one[1] in layout.partition_by]
        found = hive_folders(_read_ids(source, [unit], partitioned), layout.partition_by)[0]
        folders |= set(found)
        if len(folders) > MAX_FOLDERS:  # what lies beyond makes no better an error
            break
    return counts, int(rows["first"].to_numpy().sum()), folders


@ray.remote(num_cpus=1)
def _split(
    source: Source, starts: Int64Array, layout: Layout, units: range, parts: int
) -> tuple[Any, ...]:
    """Return how many rows a range has, and one `Part` a group of files."""
    names = ("vector_id", "generation", "file", "row")
    rows = read_row_groups(source.store, source.rows, units, list(names))
    table = _read_ids(source, units, layout.metadata)
    if not rows["vector_id"].equals(table["vector_id"]):
        raise StoreError(f"{source.ids} and {source.rows} are not of one release")
    records = np.zeros(len(rows), LIVE_DTYPE)
    for name in names:
        records[name] = rows[name].to_numpy()
    records["first"] = True  # each row has a text vector of its own, and all are exported
    order = np.argsort(records["file"], kind="stable")
    records, table = records[order], table.take(pa.array(order))
    bounds = np.searchsorted(records["file"], starts[:parts]).tolist()
    divided = [
        (records[low:high], table.slice(low, high - low))
        for low, high in pairwise([*bounds, len(records)])
    ]
    return len(records), *divided


def _read_ids(
    source: Source, units: Sequence[int], metadata: Sequence[tuple[str, str]]
) -> pa.Table:
    """Read keys and metadata columns, the latter under their names in the files."""
    wanted = [*KEY_COLUMNS, *(f"metadata.{name}" for name, _ in metadata)]
    table = read_row_groups(source.store, source.ids, units, wanted)
    columns = {name: table[name] for name in KEY_COLUMNS}
    for name, shown in metadata:
        chunks = [_struct_field(chunk, name) for chunk in table["metadata"].chunks]
        columns[shown] = pa.chunked_array(chunks, table.schema.field("metadata").type[name].type)
    return pa.table(columns)


def _struct_field(rows: pa.StructArray, name: str) -> pa.Array:
    place = rows.type.get_field_index(name)
    return rows.flatten()[place]
