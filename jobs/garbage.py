"""Finds the files of a store that nothing needs, by kind. It names files; it deletes none.

Only what has a name that Vitrine gives is ever named: runs as `20260131T120000-1a2b3c`, checkpoints
by their fingerprint. What else lies in a store stays.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from jobs.files import StoredFile, files_since, list_files
from jobs.leases import FILE as LEASE
from jobs.partials import PARTIALS, RECORD
from jobs.release_files import MANIFEST, MARK
from jobs.store import Store

RECENT_RUNS: Final = 30
RUN_NAME: Final = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")
FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
Garbage = dict[str, list[StoredFile]]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is needed. Times are seconds since 1970.

    Attributes:
        runs: Whose reports stay; so do those of the newest 30.
        folders: Below `indexes/`, of which every file stays.
        index_files: Single files below `indexes/` that stay, relative to the store.
        data: Data files of the embeddings table, relative to the store.
        encoders: Whose checkpoints stay; None: all.
        dropped: Folders below `indexes/` whose release is gone: they go whatever their age.
        before: What was written later, or was part of a table's version then or later, stays.
        unfinished_before: A training or an index that nothing was written of since is no longer
            gone on with.
    """

    runs: set[str]
    folders: set[str]
    index_files: set[str]
    data: set[str]
    encoders: set[str] | None
    dropped: set[str]
    before: float
    unfinished_before: float


def find_garbage(store: Store, kept: Kept) -> Garbage:
    """Find the files to delete, by kind; marks that a folder is whole come first in it.

    Raises:
        StoreError: The store can't be read.
    """
    return {
        "index files": _find_indexes(store, kept),
        "data files": _find_table_files(store, "embeddings", kept.data, kept.before),
        "release rows": _find_table_files(store, "releases", set(), kept.before),
        "checkpoints": _find_checkpoints(store, kept),
        "reports of runs": _find_runs(store, kept),
        "unfinished trainings": _find_unfinished(store, "training", kept),
        "parts of unfinished indexes": _find_unfinished(store, PARTIALS, kept),
    }


def _by_folder(files: Iterable[StoredFile]) -> dict[str, list[StoredFile]]:
    """Group files by the second part of their path; those that lie higher up are left out."""
    folders: dict[str, list[StoredFile]] = defaultdict(list)
    for file in files:
        parts = file.path.split("/")
        if len(parts) > 2:
            folders[parts[1]].append(file)
    return folders


def _is_older(files: list[StoredFile], moment: float) -> bool:
    return all(file.modified_at < moment for file in files)


def _marks_first(files: Iterable[StoredFile]) -> list[StoredFile]:
    marks = (MANIFEST, MARK, RECORD)
    return sorted(files, key=lambda file: file.path.rpartition("/")[2] not in marks)


def _find_indexes(store: Store, kept: Kept) -> list[StoredFile]:
    found: list[StoredFile] = []
    for folder, files in _by_folder(list_files(store, "indexes")).items():
        loose = folder in kept.dropped or _is_older(files, kept.before)
        if loose and folder not in kept.folders and RUN_NAME.fullmatch(folder):
            found += [file for file in files if file.path not in kept.index_files]
    return _marks_first(found)


def _find_table_files(
    store: Store, table: str, needed: set[str], before: float
) -> list[StoredFile]:
    """Find the files that no version of a table since `before` has, and nothing else needs."""
    current = {f"{table}/{name}" for name in files_since(store.uri(table), before)}
    return [
        file
        for file in list_files(store, table)
        if file.path.endswith(".parquet")
        and file.path.count("/") == 1
        and file.path not in current
        and file.path not in needed
        and file.modified_at < before
    ]


def _find_checkpoints(store: Store, kept: Kept) -> list[StoredFile]:
    if kept.encoders is None:
        return []
    found: list[StoredFile] = []
    for name, files in _by_folder(list_files(store, "checkpoints")).items():
        unused = name not in kept.encoders and FINGERPRINT.fullmatch(name)
        if unused and _is_older(files, kept.before):
            found += files
    return _marks_first(found)


def _find_runs(store: Store, kept: Kept) -> list[StoredFile]:
    folders = _by_folder(list_files(store, "runs"))
    recent = sorted(folders, reverse=True)[:RECENT_RUNS]
    found: list[StoredFile] = []
    for run, files in folders.items():
        if run in kept.runs or not RUN_NAME.fullmatch(run) or not _is_older(files, kept.before):
            continue
        found += [f for f in files if run not in recent or f.path.endswith(f"/{LEASE}")]
    return found


def _find_unfinished(store: Store, kind: str, kept: Kept) -> list[StoredFile]:
    folders = _by_folder(list_files(store, kind))
    old = [files for files in folders.values() if _is_older(files, kept.unfinished_before)]
    return _marks_first(file for files in old for file in files)
