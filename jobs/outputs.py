"""What commands write: new folders, Parquet files row by row, tables of even size."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import JobError

GROUP_ROWS = 1_000


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        JobError: It is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder} is a file; name a new or empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise JobError(f"{folder} is not empty; name a new or empty folder")


class RowWriter:
    """Write rows to a Parquet file in groups of `GROUP_ROWS`; it gets its name only when whole.

    Attributes:
        rows: How many were taken.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Begin the file; use as a context manager.

        Args:
            path: Where it will be.
            schema: Of the rows.
        """
        self.rows = 0
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._schema = schema
        self._buffer: list[Mapping[str, Any]] = []
        self._writer = pq.ParquetWriter(self._partial, schema, compression="zstd")

    def __enter__(self) -> "RowWriter":
        """Begin."""
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one row; names that are not in the schema are left out."""
        self._buffer.append(row)
        self.rows += 1
        if len(self._buffer) == GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._buffer, self._schema))
        self._buffer.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the file its name, or remove it after an error."""
        if kind is None and self._buffer:
            self._flush()
        self._writer.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()


def regroup(tables: Iterable[pa.Table], schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of so many each, the last one of fewer.

    Args:
        tables: Of the schema's columns, whatever their metadata.
        schema: What the tables that are yielded have.
        rows: How many a table has.
    """
    rest = schema.empty_table()
    for table in tables:
        rest = pa.concat_tables([rest, table.replace_schema_metadata(schema.metadata)])
        while len(rest) >= rows:
            yield rest.slice(0, rows)
            rest = rest.slice(rows)
    if len(rest):
        yield rest
