"""Takes rows of old releases out of the releases table."""

from collections.abc import Collection

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.delta import open_table, read_actions, table_errors
from jobs.errors import StoreError
from jobs.files import replace_files
from jobs.schemas import RELEASES
from jobs.storage import parquet_errors
from jobs.store import Store


def drop_releases(store: Store, versions: Collection[int]) -> bool:
    """Remove releases from the table in one commit: nothing can load them from then on.

    Args:
        store: The store.
        versions: At least one; never the newest.

    Returns:
        False if another job published or dropped at this moment; then nothing was committed.

    Raises:
        StoreError: The table can't be read or written.
    """
    address = store.uri("releases")
    with table_errors(address, "read"):
        table = open_table(address)
        actions = read_actions(table, address).to_pylist()
    sizes = {row["path"]: int(row["size_bytes"]) for row in actions}
    removed = {path: size for path, size in sizes.items() if _read_version(store, path) in versions}
    only_after = table.version()
    return replace_files(address, [], removed, RELEASES, only_after=only_after)


def _read_version(store: Store, path: str) -> int:
    """Return the release that a file of the table holds: one a file, as `publish` writes them."""
    address = store.uri("releases", path)
    with parquet_errors(address):
        content = pa.BufferReader(store.filesystem().cat_file(address))
        table = pq.ParquetFile(content).read(["version"], use_threads=False)
    versions = table["version"].to_pylist()
    if len(versions) != 1:
        raise StoreError(f"{address} is corrupted: {len(versions)} releases, expected 1")
    version: int = versions[0]
    return version
