"""Copies what serving needs beside an export: a store of one release, without the embeddings.

`TO/_serving` is a store: `open_release(Store(f"{to}/_serving"))` and `store: TO/_serving` in a
configuration open it. Readers of Parquet folders pass over names that begin with `_`.
"""

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import ray

from jobs.errors import StoreError
from jobs.export_files import ExportedFile
from jobs.index_files import read_files
from jobs.nodes import cluster_cpus
from jobs.storage import storage_errors
from jobs.store import Release, Store
from jobs.tasks import gather_bounded

SERVING = "_serving"
CHECKPOINT_MARK = "encoder.json"  # without it there is no checkpoint
CHUNK_BYTES = 8 << 20

Copy = tuple[tuple[str, ...], tuple[str, ...], str | None]
"""Path in the store, path in the copy, and the sha256 that it must have, where it is known."""


def copy_serving(
    store: Store, target: Store, release: Release, manifest: dict[str, Any]
) -> list[ExportedFile]:
    """Copy a release's index files, ids and query encoder, and publish it in the copy.

    Args:
        store: The store.
        target: The export's root.
        release: The release; it keeps its version.
        manifest: Of its index version.

    Returns:
        The copied files, paths relative to the export's root.

    Raises:
        StoreError: A file is missing, damaged, or not what was written when it is read again.
    """
    copy, folder = Store(target.uri(SERVING)), release.indexes
    entries = [manifest["ids"]]
    for entry in manifest["fields"].values():
        index = read_files(entry)
        entries += [asdict(file) for file in (index.template, *index.served)]
    copies: list[Copy] = [
        (("indexes", one["folder"], one["file"]), ("indexes", folder, one["file"]), one["sha256"])
        for one in entries
    ]
    *files, mark = _checkpoint_files(store, release.encoder)
    copies += [(path, path, None) for path in files]
    written = _copy_all(store, copy, copies) + _copy_all(store, copy, [(mark, mark, None)])
    own = {name: value for name, value in manifest.items() if name != "rows"} | {
        "fields": {n: _moved(one, folder) for n, one in manifest["fields"].items()},
        "ids": manifest["ids"] | {"folder": folder},
    }
    text = json.dumps(own, indent=2, sort_keys=True)
    copy.write_text(text, "indexes", folder, "manifest.json")
    copy.publish(replace(release, parent=None))
    described = ExportedFile(
        path=f"{SERVING}/indexes/{folder}/manifest.json",
        rows=None,
        size_bytes=len(text.encode()),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
    return [*written, described]


def _moved(entry: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return a field's entry with all its files in one folder."""
    files = read_files(entry)
    partitions = [
        replace(
            part,
            codes=replace(part.codes, folder=folder),
            refine=part.refine and replace(part.refine, folder=folder),
        )
        for part in files.partitions
    ]
    template = asdict(replace(files.template, folder=folder))
    return entry | {"template": template, "partitions": [asdict(part) for part in partitions]}


def _checkpoint_files(store: Store, encoder: str) -> list[tuple[str, ...]]:
    """List a checkpoint's files, relative to the store; its mark last."""
    root = store.uri("checkpoints", encoder)
    filesystem = store.filesystem()
    with storage_errors(root, "read"):
        base = filesystem._strip_protocol(root)
        found = sorted(path.removeprefix(f"{base}/") for path in filesystem.find(root))
    if CHECKPOINT_MARK not in found:
        raise StoreError(f"{root} is missing or not whole: it has no {CHECKPOINT_MARK}")
    names = [*(name for name in found if name != CHECKPOINT_MARK), CHECKPOINT_MARK]
    return [("checkpoints", encoder, *name.split("/")) for name in names]


def _copy_all(store: Store, copy: Store, copies: list[Copy]) -> list[ExportedFile]:
    submitted = (lambda one: _copy.remote(store, copy, *one), copies)
    return list(gather_bounded(*submitted, in_flight=2 * cluster_cpus()))


@ray.remote(num_cpus=1)
def _copy(
    store: Store, copy: Store, source: tuple[str, ...], target: tuple[str, ...], sha256: str | None
) -> ExportedFile:
    """Copy a file in chunks, and read what was written again."""
    from_address, to_address = store.uri(*source), copy.uri(*target)
    digest = hashlib.sha256()
    with storage_errors(from_address, f"copied to {to_address}"):
        filesystem = copy.filesystem()
        filesystem.makedirs(to_address.rpartition("/")[0], exist_ok=True)
        with (
            store.filesystem().open(from_address, "rb") as reader,
            filesystem.open(to_address, "wb") as writer,
        ):
            while chunk := reader.read(CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
    if sha256 not in (None, digest.hexdigest()):
        raise StoreError(
            f"{from_address} is corrupted: sha256 {digest.hexdigest()}, expected {sha256}"
        )
    found, size = _measure(copy, to_address)
    if found != digest.hexdigest():
        raise StoreError(f"{to_address} is not what was written: sha256 {found}")
    path = "/".join((SERVING, *target))
    return ExportedFile(path=path, rows=None, size_bytes=size, sha256=found)


def _measure(copy: Store, address: str) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with storage_errors(address, "read"), copy.filesystem().open(address, "rb") as reader:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size
