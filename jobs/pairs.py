"""Reads labelled Parquet tables: training pairs and evaluation queries."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError

from jobs.errors import CatalogError
from jobs.storage import open_filesystem


def read_pairs(
    path: str, columns: Sequence[str], *, key: str, optional: Sequence[str] = ()
) -> tuple[pa.Table, str]:
    """Read the columns of a Parquet file, and name the folder its image URIs start from.

    Args:
        path: A file, local or `s3://`.
        columns: Those that must be there.
        key: The configuration's key that names the file, for the errors.
        optional: Columns that are read too where the file has them.

    Returns:
        The table, at least one row, and the folder: absolute, or with its protocol.

    Raises:
        CatalogError: The file can't be read, lacks columns or is empty.
    """
    try:
        filesystem, local = open_filesystem(path)
        with filesystem.open(local, "rb") as handle:
            table = pq.read_table(handle)
    except (OSError, ValueError, BotoCoreError) as error:
        raise CatalogError(f"{key} {path} can't be read: {error}") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise CatalogError(f"{key} {path} has no column {', '.join(missing)}")
    if not table.num_rows:
        raise CatalogError(f"{key} {path} is empty")
    root = path.rpartition("/")[0] or "."
    present = [name for name in optional if name in table.column_names]
    return table.select([*columns, *present]), root if "://" in root else str(Path(root).absolute())
