"""Parts of an index that is being built, spilled to the store under the hash of what they hold.

A build that is killed finds them again: the same rows, filled into the same trained template, have
the same name. A part counts once its record is there, which is written last.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.errors import StoreError
from jobs.files import delete_files, list_files
from jobs.storage import StorageError, one_line, storage_errors
from jobs.store import Store, scratch_folder

PARTIALS = "partials"
RECORD = "record.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PartialFile:
    """One file of a part, and the sha256 (hex) of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Partial:
    """A part that is whole.

    Attributes:
        key: Its name: the hash of what it holds.
        counts: How many vectors each of its partitions holds.
    """

    key: str
    files: tuple[PartialFile, ...]
    counts: tuple[int, ...] = ()

    def file(self, name: str) -> PartialFile:
        """Return a file's record.

        Raises:
            KeyError: It has no such file.
        """
        return {one.name: one for one in self.files}[name]


def make_key(*parts: str | bytes | memoryview) -> str:
    """Return the sha256 (hex) of some texts and bytes, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        data = memoryview(part.encode() if isinstance(part, str) else part)
        digest.update(data.nbytes.to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def find_partial(store: Store, key: str) -> Partial | None:
    """Return a part that an earlier try wrote, or None: also where its record is damaged.

    Raises:
        StoreError: The storage does not answer.
    """
    address = store.uri(PARTIALS, key, RECORD)
    with storage_errors(address, "read"):
        if not store.filesystem().exists(address):
            return None
    try:
        values: dict[str, Any] = store.read_json(PARTIALS, key, RECORD)
        files = tuple(PartialFile(**one) for one in values["files"])
        return Partial(key=key, files=files, counts=tuple(values["counts"]))
    except StorageError:
        raise
    except (StoreError, KeyError, TypeError) as error:
        _log.warning("vitrine: the part of %s is made anew: %s", address, one_line(error))
        return None


def put_partial(
    store: Store, key: str, paths: Sequence[tuple[Path, str]], counts: Sequence[int]
) -> Partial:
    """Upload the files of a part, then its record.

    Args:
        store: The store.
        key: From `make_key`.
        paths: Local files and their sha256 (hex).
        counts: How many vectors each partition holds.

    Raises:
        StoreError: The storage does not answer.
    """
    for path, _ in paths:
        store.upload(path, PARTIALS, key, path.name)
    files = tuple(PartialFile(name=path.name, sha256=sha256) for path, sha256 in paths)
    partial = Partial(key=key, files=files, counts=tuple(counts))
    store.write_text(json.dumps(asdict(partial)), PARTIALS, key, RECORD)
    return partial


@contextmanager
def fetched_partial(store: Store, partial: Partial, name: str) -> Iterator[tuple[Path, str]]:
    """Give a local path of one file of a part, and the sha256 (hex) that the block must check.

    What is fetched is deleted after the block; a file that is mapped there stays readable.

    Raises:
        StoreError: The file is missing or, by the block's own checks (ValueError), damaged; its
            record is deleted then, so that the next run makes the part anew.
    """
    address = store.uri(PARTIALS, partial.key, name)
    scratch = scratch_folder("part")
    try:
        sha256 = partial.file(name).sha256
        path = store.local_copy(scratch, PARTIALS, partial.key, name)
        with storage_errors(address, "read"):
            yield path, sha256
    except KeyError as error:
        raise _leave_out(store, partial, f"{address} is not in its record") from error
    except StoreError as error:
        if not isinstance(error.__cause__, FileNotFoundError):  # a full disk harms no part
            raise
        raise _leave_out(store, partial, str(error)) from error
    except ValueError as error:
        raise _leave_out(store, partial, f"{address}: {error}") from error
    finally:
        shutil.rmtree(scratch)


def _leave_out(store: Store, partial: Partial, reason: str) -> StoreError:
    """Delete a part's record; return the error that says so."""
    delete_files(store, [f"{PARTIALS}/{partial.key}/{RECORD}"])
    return StoreError(f"{reason}; it is left out now: run the command again, and it is made anew")


def delete_partials(store: Store, keys: Sequence[str]) -> None:
    """Delete parts: their records first, so that none is half there.

    Raises:
        StoreError: A file can't be deleted.
    """
    files = [file.path for key in keys for file in list_files(store, PARTIALS, key)]
    delete_files(store, sorted(files, key=lambda path: not path.endswith(RECORD)))
