"""Lists and deletes the store's files, and replaces files of its Delta tables."""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from jobs.delta import delta_options, patiently, read_actions, table_errors
from jobs.storage import storage_errors
from jobs.store import Store

DELETE_BATCH = 1000  # what one request of S3 takes


@dataclass(frozen=True)
class StoredFile:
    """One file of the store.

    Attributes:
        path: Relative to the store's root.
        modified_at: Seconds since 1970.
    """

    path: str
    size_bytes: int
    modified_at: float


def list_files(store: Store, *parts: str) -> list[StoredFile]:
    """List all files below a folder of the store, sorted by path; none if there is no folder.

    Raises:
        StoreError: The folder can't be read.
    """
    target = store.uri(*parts)
    filesystem = store.filesystem()
    root = filesystem._strip_protocol(store.root).rstrip("/")
    with storage_errors(target, "listed"):
        found: dict[str, dict[str, Any]] = filesystem.find(target, detail=True)
    files = [
        StoredFile(path[len(root) + 1 :], int(entry["size"] or 0), _modified_at(entry))
        for path, entry in found.items()
        if entry["type"] == "file"
    ]
    return sorted(files, key=lambda file: file.path)


def _modified_at(entry: dict[str, Any]) -> float:
    if "mtime" in entry:
        return float(entry["mtime"])
    modified: datetime = entry["LastModified"]
    return modified.timestamp()


def delete_files(store: Store, paths: Sequence[str]) -> None:
    """Delete files, in their order, and local folders that are empty then.

    Args:
        store: The store.
        paths: Relative to the store's root; what is missing is no error.

    Raises:
        StoreError: A file can't be deleted.
    """
    filesystem = store.filesystem()
    for start in range(0, len(paths), DELETE_BATCH):
        batch = [store.uri(path) for path in paths[start : start + DELETE_BATCH]]
        with storage_errors(batch[0], "deleted"):
            if not store.is_local:
                _delete_remote(filesystem, batch)
                continue
            for target in batch:
                Path(target).unlink(missing_ok=True)
    if store.is_local:
        _remove_empty(Path(store.root), paths)


def _delete_remote(filesystem: Any, targets: list[str]) -> None:  # noqa: ANN401
    """Delete one batch.

    Raises:
        OSError: The storage says yes to the request, and keeps some of the files: s3fs is silent.
    """
    keys = [filesystem._strip_protocol(target) for target in targets]
    deleted = set(filesystem.rm(keys) or keys)
    left = [key for key in keys if key not in deleted and filesystem.exists(key)]
    if left:
        raise OSError(f"{len(left)} of {len(keys)} files are still there, as {left[0]}")


def _remove_empty(root: Path, paths: Iterable[str]) -> None:
    folders = {parent for path in paths for parent in Path(path).parents if len(parent.parts) > 1}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):  # it is not empty
            (root / folder).rmdir()


def replace_files(
    address: str,
    added: Sequence[AddAction],
    removed: dict[str, int],
    schema: pa.Schema,
    *,
    only_after: int | None = None,
) -> bool:
    """Take files out of a table and add others, in one commit; commits of others may come between.

    Args:
        address: Of the table.
        added: Written files that no commit names yet.
        removed: Path to size in bytes: at least one file of the table.
        schema: Of the files.
        only_after: The version that the commit must follow at once; any if None.

    Returns:
        False if another job removed one of the files first, or committed after `only_after`; then
        nothing was committed.

    Raises:
        StoreError: The storage does not answer, or the table is wrong.
    """
    tries = 0

    def commit() -> bool:
        nonlocal tries
        tries += 1
        table = DeltaTable(address, storage_options=delta_options(address))
        present = set(pa.table(table.get_add_actions(flatten=True))["path"].to_pylist())
        # An earlier try went through, and its answer was lost.
        if tries > 1 and not present & removed.keys() and {a.path for a in added} <= present:
            return True
        if removed.keys() - present or only_after not in (None, table.version()):
            return False
        now_ms = int(time.time() * 1000)
        removals = [RemoveAction(path, True, now_ms, size) for path, size in removed.items()]
        table.create_write_transaction(
            [*added, *removals],
            mode="append",
            schema=Schema.from_arrow(schema),
            commit_properties=CommitProperties(max_commit_retries=0),  # as `append_files` does
        )
        return True

    with table_errors(address, "committed to"):
        return patiently(address, commit, conflicts=True)


def files_since(address: str, moment: float) -> set[str]:
    """List the data files of a table's newest version and of the version of a moment.

    What was added and removed again between the two is younger than the moment.

    Args:
        address: Of the table.
        moment: Seconds since 1970; before the first commit it means the first version.

    Returns:
        Paths relative to the table; empty if there is no table.

    Raises:
        StoreError: The table can't be read.
    """

    def read() -> set[str]:
        table = DeltaTable(address, storage_options=delta_options(address))
        files = set(read_actions(table, address)["path"].to_pylist())
        table.load_as_version(datetime.fromtimestamp(moment, UTC))
        return files | set(read_actions(table, address)["path"].to_pylist())

    with table_errors(address, "read"):
        try:
            return patiently(address, read)
        except TableNotFoundError:
            return set()
