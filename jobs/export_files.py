"""Writes an export's Parquet files, a Ray task a group of data files.

A task holds its rows' metadata (`rows_per_file` rows, or a 256th of the release if that is more),
the vectors of one data file, and the row groups that are not full yet: one without partitions,
`PENDING_BYTES` in all folders with them. So memory grows with the catalog only beyond 256
times `rows_per_file` rows, and then by metadata alone. A file lies on the task's disk until it
is full, then goes to the target whole.

Letters: N rows, D dimension.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.errors import StoreError
from jobs.export_layout import Layout, hive_folders, vector_column
from jobs.export_rows import Part
from jobs.space import VectorField
from jobs.storage import file_sha256, storage_errors
from jobs.store import Store, scratch_folder
from jobs.vectors import Float32Array, read_blocks

PENDING_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A written file; `rows` is None where it is no table."""

    path: str
    rows: int | None
    size_bytes: int
    sha256: str


@ray.remote(num_cpus=1)
def write_group(
    stores: tuple[Store, Store],
    layout: Layout,
    number: int,
    files: tuple[int, list[str]],
    *parts: Part,
) -> list[ExportedFile]:
    """Write the rows of a group of data files.

    Args:
        stores: Read from, and written to.
        layout: What to write.
        number: The group's: part of the files' names.
        files: Number of the first data file, and their names.
        *parts: The rows.

    Raises:
        StoreError: A row has no such vector, or a file can't be read or written.
    """
    source, target = stores
    scratch = scratch_folder("export")
    try:
        writer = FileWriter(target, layout, number, scratch)
        for table in _read_tables(source, layout, files, parts):
            with storage_errors(str(scratch), "written"):
                writer.add(table)
        with storage_errors(str(scratch), "written"):
            return writer.close()
    finally:
        shutil.rmtree(scratch)


def _read_tables(
    store: Store, layout: Layout, files: tuple[int, list[str]], parts: tuple[Part, ...]
) -> Iterator[pa.Table]:
    """Yield the rows of each data file, with their vectors, sorted by vector id."""
    first, names = files
    for number in range(first, first + len(names)):
        mine = []
        for records, table in parts:
            low, high = np.searchsorted(records["file"], [number, number + 1]).tolist()
            mine.append((records[low:high], table.slice(low, high - low)))
        rows = np.concatenate([records for records, _ in mine])
        if not len(rows):
            continue
        table = pa.concat_tables([table for _, table in mine])
        for field in layout.fields:
            ((ids, vectors),) = read_blocks(store, field, files, rows)
            if not np.array_equal(ids, rows["vector_id"]):
                raise StoreError(f"{store.uri('embeddings', names[number - first])}: lost rows")
            table = table.append_column(vector_column(field.name), _pack(vectors, field, layout))
        yield table


def _pack(vectors: Float32Array, field: VectorField, layout: Layout) -> pa.Array:
    """Turn (N, D) float32 vectors into fixed-size lists."""
    kind = layout.schema.field(vector_column(field.name)).type
    numbers = vectors.astype(kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers), type=kind)


class FileWriter:
    """Divides tables among folders, and each folder's rows among row groups and files."""

    def __init__(self, target: Store, layout: Layout, number: int, scratch: Path) -> None:
        """Begin; nothing is written yet.

        Args:
            target: Where the files go.
            layout: What they hold.
            number: Of the task: no other writes files of these names.
            scratch: A folder of this machine for files on their way.
        """
        self._target, self._layout = target, layout
        self._number, self._scratch = number, scratch
        self._folders: dict[str, _Folder] = {}
        self._written: list[ExportedFile] = []

    def add(self, table: pa.Table) -> None:
        """Take rows: the layout's columns and its partition columns."""
        folders, places = hive_folders(table, self._layout.partition_by)
        rows = table.select(self._layout.schema.names)
        for place, name in enumerate(folders):
            mine = rows
            if len(folders) > 1:
                mine = rows.take(pa.array(np.flatnonzero(places == place)))
            self._folder(name).add(mine)
        self._spill()

    def _folder(self, name: str) -> "_Folder":
        if name not in self._folders:
            local = self._scratch / f"{len(self._folders)}.parquet"
            self._folders[name] = _Folder(self, name, local)
        return self._folders[name]

    @property
    def pending_bytes(self) -> int:
        """Bytes of the rows that are not written yet."""
        return sum(folder.pending_bytes for folder in self._folders.values())

    def _spill(self) -> None:
        """Write row groups that aren't full where too many folders wait for more rows."""
        waiting = sorted(self._folders.values(), key=lambda one: -one.pending_bytes)
        for folder in waiting if len(waiting) > 1 else []:
            if self.pending_bytes <= PENDING_BYTES:
                return
            folder.flush()

    def close(self) -> list[ExportedFile]:
        """Write what is left; return all files."""
        for folder in self._folders.values():
            folder.close()
        return self._written

    def begin(self, local: Path) -> pq.ParquetWriter:
        """Open a file."""
        plain = [f.name for f in self._layout.schema if not pa.types.is_fixed_size_list(f.type)]
        return pq.ParquetWriter(
            local,
            self._layout.schema,
            compression="zstd",
            # Vectors have no value twice and no order: a dictionary and bounds are waste.
            use_dictionary=plain,
            write_statistics=plain,
        )

    def finish(self, local: Path, folder: str, count: int, rows: int) -> None:
        """Send a closed file to the target."""
        name = f"part-{self._number:05d}-{count:05d}.parquet"
        parts = (*folder.split("/"), name) if folder else (name,)
        digest = file_sha256(local)
        self._target.upload(local, *parts)
        self._written.append(
            ExportedFile(
                path="/".join(parts), rows=rows, size_bytes=local.stat().st_size, sha256=digest
            )
        )
        local.unlink()

    @property
    def layout(self) -> Layout:
        """What the files hold."""
        return self._layout


class _Folder:
    """The rows of one folder, in the order they come."""

    def __init__(self, writer: FileWriter, name: str, local: Path) -> None:
        self._writer, self._name, self._local = writer, name, local
        self._layout = writer.layout
        self._pending = self._layout.schema.empty_table()
        self._file: pq.ParquetWriter | None = None
        self._rows = 0
        self._count = 0

    @property
    def pending_bytes(self) -> int:
        """Bytes of the rows that are not written yet."""
        size: int = self._pending.nbytes
        return size

    def add(self, table: pa.Table) -> None:
        """Take rows; write the row groups that are full."""
        self._pending = pa.concat_tables([self._pending, table.cast(self._layout.schema)])
        while len(self._pending) >= self._room():
            self._write(self._room())

    def _room(self) -> int:
        """Rows that the next row group may have: none lies in two files."""
        return min(self._layout.row_group_rows, self._layout.rows_per_file - self._rows)

    def _write(self, rows: int) -> None:
        if self._file is None:
            self._file = self._writer.begin(self._local)
        self._file.write_table(self._pending.slice(0, rows), row_group_size=rows)
        self._pending = self._pending.slice(rows)
        self._rows += rows
        if self._rows == self._layout.rows_per_file:
            self._finish()

    def flush(self) -> None:
        """Write what is pending."""
        if len(self._pending):
            self._write(len(self._pending))

    def _finish(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self._writer.finish(self._local, self._name, self._count, self._rows)
        self._rows, self._count = 0, self._count + 1

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._finish()
