"""Keeps the `ids.parquet` of releases on this machine as Arrow files that can be mapped.

A Parquet row group is decoded as a whole, for one row of it too. So the first process that opens
a release rewrites the file, a row group at a time, uncompressed; all processes of the machine map
that and share its pages. A file is named by the SHA-256 of the Parquet that it was made of.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc

from jobs.errors import StoreError
from jobs.storage import file_sha256, parquet_errors, storage_errors
from jobs.store import Store

UNUSED_S: Final = 2 * 86_400.0  # an Arrow file that nobody opened for so long makes room
_log = logging.getLogger(__name__)


def cache_ids(store: Store, entry: dict[str, Any], cache: Path, batch_rows: int) -> Path:
    """Return the Arrow file of an `ids.parquet`; it is made if the cache lacks it.

    Args:
        store: The store.
        entry: The manifest's entry `ids`.
        cache: A local folder that processes may share; what nobody opened for `UNUSED_S` leaves
            it when a new file comes.
        batch_rows: Most rows of a batch in the Arrow file.

    Raises:
        StoreError: `ids.parquet` is missing or corrupted, or the cache can't be written.
    """
    path = cache / f"{entry['sha256']}.arrow"
    _check_source(store, entry)
    with storage_errors(str(path), "written"):
        if not _is_whole(path):
            with _lock(cache):
                if not _is_whole(path):  # nobody was quicker
                    _fill(store, entry, path, batch_rows)
    return path


def _check_source(store: Store, entry: dict[str, Any]) -> None:
    """Refuse a release whose file is gone, or in a local store damaged, cached or not.

    Raises:
        StoreError: As the first line says.
    """
    parts = ("indexes", entry["folder"], entry["file"])
    address = store.uri(*parts)
    with storage_errors(address, "read"):
        store.filesystem().info(address)
    if store.is_local:
        _check_sha256(store, entry, store.local_copy(Path(), *parts))


def _check_sha256(store: Store, entry: dict[str, Any], path: Path) -> None:
    found = file_sha256(path)
    if found != entry["sha256"]:
        address = f"{store.uri('indexes', entry['folder'])}: {entry['file']}"
        raise StoreError(f"{address} is corrupted: sha256 {found}, expected {entry['sha256']}")


def _is_whole(path: Path) -> bool:
    """Whether an Arrow file is there, up to its footer; it counts as used now."""
    try:
        ipc.open_file(pa.memory_map(str(path)))
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    with suppress(OSError):  # a cache that can only be read serves too
        os.utime(path)
    return True


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Let one process of this machine fill a cache; the lock of a killed one is gone with it."""
    for folder in (*reversed(cache.parents), cache):  # `parents=True` gives them another mode
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    with (cache / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process fills %s: waiting for it", cache)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(store: Store, entry: dict[str, Any], path: Path, batch_rows: int) -> None:
    """Write a release's Arrow file; it appears whole or not at all.

    Raises:
        StoreError: `ids.parquet` is missing or corrupted.
    """
    work = path.parent / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    work.mkdir()
    try:
        parquet = store.local_copy(work, "indexes", entry["folder"], entry["file"])
        address = f"{store.uri('indexes', entry['folder'])}: {entry['file']}"
        if not store.is_local:
            _check_sha256(store, entry, parquet)
        _convert(parquet, work / path.name, address, batch_rows)
        _drop_unused(path.parent)
        (work / path.name).replace(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _drop_unused(cache: Path) -> None:
    """Delete what nobody opened for long; who has it mapped keeps it."""
    for other in cache.glob("*.arrow"):
        if time.time() - other.stat().st_mtime > UNUSED_S:
            other.unlink()


def _convert(parquet: Path, arrow: Path, address: str, batch_rows: int) -> None:
    """Rewrite `ids.parquet`, a row group at a time.

    Raises:
        StoreError: It can't be read, or its ids don't rise.
    """
    with parquet_errors(address):
        source = pq.ParquetFile(parquet)
    schema = pa.schema([field.with_type(_decoded(field.type)) for field in source.schema_arrow])
    last = np.array([-1])
    with arrow.open("wb") as file:
        with ipc.new_file(file, schema) as writer:
            for number in range(source.num_row_groups):
                with parquet_errors(address):
                    table = source.read_row_group(number).cast(schema)
                ids = np.append(last, table["vector_id"].to_numpy())
                if (ids[1:] <= ids[:-1]).any():
                    raise StoreError(f"{address} is corrupted: its vector ids don't rise")
                last = ids[-1:]
                writer.write_table(table.combine_chunks(), max_chunksize=batch_rows)
        file.flush()
        os.fsync(file.fileno())  # before its name says that it is whole
    pa.default_memory_pool().release_unused()


def _decoded(kind: pa.DataType) -> pa.DataType:
    """Return a type without dictionaries: an Arrow file has room for one dictionary a column."""
    types = pa.types
    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_struct(kind):
        return pa.struct([field.with_type(_decoded(field.type)) for field in kind])
    if types.is_list(kind) or types.is_large_list(kind):
        make = pa.list_ if types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_decoded(kind.value_type)))
    return kind
