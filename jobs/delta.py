"""Opens Delta tables and commits files to them, on storages that fail now and then.

A commit whose answer was lost may have gone through: it is looked for before it is tried again,
so that it is neither made twice nor taken for another job's.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa
import tenacity
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from jobs.errors import StoreError
from jobs.storage import (
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    gone,
    one_line,
    patience_s,
    retrying,
    storage_errors,
)

Result = TypeVar("Result")

# As object_store words it. 408, 409 and 429 pass; every other 4xx would fail for ever.
_REFUSED: Final = re.compile(r"\b4(?!08|09|29)\d\d [A-Z]|NoSuchBucket|AccessDenied")


@contextlib.contextmanager
def table_errors(address: str, doing: str) -> Iterator[None]:
    """Turn what a Delta table raises into one line.

    Args:
        address: Of the table.
        doing: As in "opened": `ADDRESS can't be opened: …`.

    Raises:
        StoreError: The block raised a DeltaError, or what `storage_errors` turns.
    """
    try:
        with storage_errors(address, doing):
            yield
    except DeltaError as error:
        raise StoreError(f"{address} can't be {doing}: {one_line(error)}") from error


def open_table(address: str, version: int | None = None) -> DeltaTable:
    """Open a table.

    Args:
        address: A local path or `s3://bucket/key`.
        version: A version; the newest if None.

    Raises:
        TableNotFoundError: There is none.
        StorageError: The storage does not answer.
        DeltaError: It is damaged or has no such version.
        OSError: It can't be read.
    """
    return patiently(address, lambda: _open(address, version))


def create_table(address: str, schema: pa.Schema) -> None:
    """Create an empty table, if there is none.

    Raises:
        StorageError: The storage does not answer.
        OSError: It can't be written.
    """
    if "://" not in address:
        Path(address).mkdir(parents=True, exist_ok=True)
    options = delta_options(address)

    def create() -> None:
        with contextlib.suppress(CommitFailedError):  # another job created it at this moment
            DeltaTable.create(address, schema=schema, mode="ignore", storage_options=options)

    patiently(address, create)


def read_actions(table: DeltaTable, address: str) -> pa.Table:
    """List the data files of an opened table: `path`, `size_bytes`, `num_records` of each.

    Raises:
        StorageError: The storage does not answer.
    """
    return patiently(address, lambda: pa.table(table.get_add_actions(flatten=True)))


def append_files(
    address: str,
    actions: Sequence[AddAction],
    schema: pa.Schema,
    *,
    only_after: int | None = None,
) -> bool:
    """Add written files to a table in one commit.

    Args:
        address: Of the table.
        actions: At least one file; no other commit has the same path.
        schema: Of the files.
        only_after: The version that the commit must follow at once; any if None.

    Returns:
        False if another job's commit follows `only_after`; then nothing was committed.

    Raises:
        StorageError: The storage does not answer; whether the commit was made is not known.
        DeltaError: The table is wrong.
        OSError: It can't be written.
    """
    tries = 0

    def commit() -> bool:
        nonlocal tries
        tries += 1
        table = _open(address, None)
        if tries > 1 and _has_file(table, actions[0].path):
            return True
        if only_after is not None and table.version() != only_after:
            return False
        table.create_write_transaction(
            list(actions),
            mode="append",
            schema=Schema.from_arrow(schema),
            # Delta's own retry takes a commit whose answer was lost for another job's, and
            # commits again.
            commit_properties=CommitProperties(max_commit_retries=0),
        )
        return True

    return patiently(address, commit, conflicts=True)


def patiently(address: str, call: Callable[[], Result], *, conflicts: bool = False) -> Result:
    """Do something with a Delta table that may be done twice; try again while S3 fails.

    Args:
        address: Of the table.
        call: What to do.
        conflicts: Whether another job's commit at the same moment is tried again too.

    Raises:
        StorageError: The storage still fails after `patience_s()` seconds.
        DeltaError: The table itself is wrong.
        OSError: It is refused, or a local file can't be read or written.
    """
    remote = delta_options(address) is not None

    def may_pass(error: BaseException) -> bool:
        conflict = conflicts and isinstance(error, CommitFailedError)
        return conflict or (remote and is_transient(error))

    try:
        return tenacity.Retrying(**retrying(address, may_pass))(call)
    except (DeltaError, OSError) as error:
        if may_pass(error):
            raise gone(address, error) from error
        raise


def delta_options(address: str) -> dict[str, str] | None:
    """Return the `storage_options` of a table; None where it is local.

    Only how long to wait: who we are comes from the environment.
    """
    if "://" not in address or address.startswith("file://"):
        return None
    return {
        "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
        "timeout": f"{READ_TIMEOUT_S}s",
        "max_retries": "4",
        "retry_timeout": f"{max(1, round(patience_s() / 6))}s",  # `patiently` goes on after it
        "backoff_config.init_backoff": "100ms",
        "backoff_config.max_backoff": "2s",
    }


def is_transient(error: BaseException) -> bool:
    """Whether a Delta operation on S3 may succeed if it is tried again."""
    if isinstance(error, CommitFailedError | TableNotFoundError | FileNotFoundError):
        return False
    text = str(error)
    of_storage = isinstance(error, OSError) or (
        isinstance(error, DeltaError) and ("Generic S3" in text or "object store" in text)
    )
    return of_storage and not _REFUSED.search(text)


def _open(address: str, version: int | None) -> DeltaTable:
    return DeltaTable(address, version=version, storage_options=delta_options(address))


def _has_file(table: DeltaTable, path: str) -> bool:
    paths: Any = pa.table(table.get_add_actions(flatten=True))["path"]
    return path in paths.to_pylist()
