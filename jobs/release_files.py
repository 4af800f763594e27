"""Says which files of the store a release needs, and checks that they are there and whole."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.parquet as pq

from jobs.errors import StoreError
from jobs.files import list_files
from jobs.index_files import read_files
from jobs.storage import parquet_errors, storage_errors
from jobs.store import Release, Store

MANIFEST = "manifest.json"
CANDIDATE = "release.json"
MARK = "encoder.json"
WEIGHTS = "model.safetensors"
HASHED_BYTES = 64 * 2**20  # a larger file is checked by its size alone


@dataclass(frozen=True, kw_only=True)
class NeededFile:
    """A file below `indexes/`, and what the manifest says of it."""

    path: str
    sha256: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseFiles:
    """What a release needs.

    Attributes:
        indexes: The manifest, index files, ids and rows; they may lie in folders of earlier runs.
        checkpoint: Folder of its encoder, relative to the store's root.
        data: Data files of the embeddings table, relative to the table.
    """

    indexes: tuple[NeededFile, ...]
    checkpoint: str
    data: frozenset[str] = field(repr=False)


def find_files(store: Store, release: Release) -> ReleaseFiles:
    """Find which files a release needs.

    Raises:
        StoreError: Its manifest or its list of data files is missing or damaged.
    """
    folder = release.indexes
    manifest = store.read_json("indexes", folder, MANIFEST)
    try:
        named = [_needed(manifest[name]) for name in ("ids", "rows")]
        for entry in manifest["fields"].values():
            files = read_files(entry)
            named += [_needed(asdict(file)) for file in (files.template, *files.served)]
        rows = _needed(manifest["rows"]).path
    except (KeyError, TypeError, AttributeError) as error:
        address = store.uri("indexes", folder, MANIFEST)
        raise StoreError(f"{address} is corrupted: no {error}") from error
    return ReleaseFiles(
        indexes=(NeededFile(path=f"indexes/{folder}/{MANIFEST}"), *named),
        checkpoint=f"checkpoints/{release.encoder}",
        data=frozenset(read_file_names(store, store.uri(rows))),
    )


def _needed(entry: dict[str, Any]) -> NeededFile:
    return NeededFile(
        path=f"indexes/{entry['folder']}/{entry['file']}",
        sha256=entry["sha256"],
        size_bytes=entry.get("size_bytes"),
    )


def read_file_names(store: Store, address: str) -> list[str]:
    """Read the names of the data files that a release's `rows.parquet` counts in.

    Raises:
        StoreError: The file is missing or damaged.
    """
    with parquet_errors(address), store.filesystem().open(address, "rb") as handle:
        metadata = pq.read_schema(handle).metadata or {}
    try:
        names: list[str] = json.loads(metadata[b"files"])
    except (KeyError, ValueError) as error:
        raise StoreError(f"{address} is corrupted: it doesn't list its data files") from error
    return names


def check_files(store: Store, release: Release) -> None:
    """Check that everything a release needs is there: by size, small files by sha256 too.

    Raises:
        StoreError: Something is missing or damaged; it is named.
    """
    needed = find_files(store, release)
    present = {file.path: file.size_bytes for file in list_files(store, "indexes")}
    for file in needed.indexes:
        _check_file(store, file, present.get(file.path))
    checkpoint = {file.path for file in list_files(store, needed.checkpoint)}
    data = {file.path for file in list_files(store, "embeddings")}
    wanted = [f"{needed.checkpoint}/{name}" for name in (MARK, WEIGHTS)]
    missing = [path for path in wanted if path not in checkpoint]
    missing += sorted(
        f"embeddings/{name}" for name in needed.data if f"embeddings/{name}" not in data
    )
    if missing:
        more = f" and {len(missing) - 1} more are missing" if missing[1:] else " is missing"
        raise StoreError(f"release {release.version}: {store.uri(missing[0])}{more}")


def _check_file(store: Store, file: NeededFile, size_bytes: int | None) -> None:
    address = store.uri(file.path)
    if size_bytes is None:
        raise StoreError(f"{address} is missing")
    if file.size_bytes not in (None, size_bytes):
        raise StoreError(f"{address} is corrupted: {size_bytes} bytes, expected {file.size_bytes}")
    if file.sha256 is None or size_bytes > HASHED_BYTES:
        return
    with storage_errors(address, "read"):
        found = hashlib.sha256(store.filesystem().cat_file(address)).hexdigest()
    if found != file.sha256:
        raise StoreError(f"{address} is corrupted: sha256 {found}, expected {file.sha256}")


def read_candidates(store: Store, *, since: float, published: Sequence[Release]) -> list[Release]:
    """Read the releases that runs built and did not publish.

    Args:
        store: The store.
        since: Seconds since 1970: older ones don't count.
        published: All published releases.

    Raises:
        StoreError: One can't be read.
    """
    known = {release.indexes for release in published}
    found = []
    for file in list_files(store, "indexes"):
        _, folder, *rest = file.path.split("/")
        if rest == [CANDIDATE] and folder not in known and file.modified_at >= since:
            found.append(store.candidate(folder))
    return found
