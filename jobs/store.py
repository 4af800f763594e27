"""The store: one root, local or s3://, that holds all that Vitrine writes.

embeddings/                  Delta table, append-only rows
checkpoints/<fingerprint>/   weights; encoder.json is written last, immutable
indexes/<version>/           index files, ids.parquet; manifest.json is written last
releases/                    Delta table, a row a release
runs/<run>/                  report.json, report.html
"""

import json
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from deltalake.transaction import AddAction

from encoders.checkpoint_files import checkpoint_files
from jobs.delta import append_files, create_table, open_table, read_actions, table_errors
from jobs.errors import PublishConflictError, StoreError
from jobs.schemas import EMBEDDINGS, RELEASES
from jobs.storage import (
    StorageError,
    fetch_file,
    fetch_folder,
    one_line,
    open_filesystem,
    parquet_errors,
    put_whole,
    storage_errors,
)


@dataclass(frozen=True, kw_only=True)
class Release:
    """What serving loads: a checkpoint, a table version and an index version that belong together.

    Attributes:
        rows: Catalog rows (product images) in; always `vectors + rejected`.
        command: What made it: refresh, reindex, or `rollback to N`.
    """

    version: int
    parent: int | None
    created_at: str
    run: str
    encoder: str
    embeddings_version: int
    indexes: str
    products: int
    vectors: int
    rejected: int
    rows: int
    config_hash: str
    command: str
    quality: dict[str, Any]


@dataclass(frozen=True)
class DataFile:
    """A written Parquet file that no commit names yet.

    Attributes:
        path: Relative to the table's root.
    """

    path: str
    size_bytes: int
    rows: int


def new_run_id() -> str:
    """Return a name for a run that sorts by time: `20260131T120000-1a2b3c`."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


class Store:
    """Paths, tables and commits under one root; picklable, holds no open handle."""

    def __init__(self, root: str) -> None:
        """Name the root; nothing is touched.

        Args:
            root: A folder or `s3://bucket/prefix`.
        """
        self.root = root.rstrip("/") if "://" in root else str(Path(root).resolve())

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine's file system."""
        return "://" not in self.root

    def uri(self, *parts: str) -> str:
        """Join parts onto the root."""
        return "/".join((self.root, *parts))

    def filesystem(self) -> fsspec.AbstractFileSystem:
        """Return the file system the root lies on."""
        return open_filesystem(self.root)[0]

    def write_text(self, text: str, *parts: str) -> str:
        """Write a small text file whole; return its address.

        Raises:
            StoreError: It can't be written.
        """
        target = self.uri(*parts)
        with storage_errors(target, "written"):
            put_whole(self.filesystem(), text.encode("utf-8", "replace"), target)
        return target

    def write_json(self, value: dict[str, Any], *parts: str) -> str:
        """Write a JSON object whole; return its address.

        Raises:
            StoreError: It can't be written.
        """
        return self.write_text(json.dumps(value, indent=2, sort_keys=True), *parts)

    def read_json(self, *parts: str) -> dict[str, Any]:
        """Read a JSON object.

        Raises:
            StoreError: The file is missing or holds no JSON object.
        """
        target = self.uri(*parts)
        try:
            with storage_errors(target, "read"):
                value = json.loads(self.filesystem().cat_file(target))
        except ValueError as error:
            raise StoreError(f"{target} is corrupted: {error}") from error
        if not isinstance(value, dict):
            raise StoreError(f"{target} is corrupted: no JSON object")
        return value

    def upload(self, source: Path, *parts: str) -> str:
        """Copy a local file into the store whole; return its address.

        Raises:
            StoreError: It can't be written.
        """
        target = self.uri(*parts)
        with storage_errors(target, "written"):
            put_whole(self.filesystem(), source, target)
        return target

    def local_copy(self, cache: Path, *parts: str) -> Path:
        """Return a local path of a file or folder of the store, fetched if it is remote.

        A file is fetched at every call. A folder must hold what never changes, as checkpoints do:
        it is fetched once, also where many processes share the cache.

        Args:
            cache: Where remote files are put, under their own relative path.
            *parts: Path below the root.

        Raises:
            StoreError: There is no such file, or it can't be read.
        """
        filesystem, target = self.filesystem(), self.uri(*parts)
        with storage_errors(target, "read"):
            if self.is_local:
                filesystem.info(target)
                return Path(target)
            local = cache.joinpath(*parts)
            local.parent.mkdir(parents=True, exist_ok=True)
            is_folder = filesystem.info(target)["type"] == "directory"
            (fetch_folder if is_folder else fetch_file)(filesystem, target, local)
        return local

    def add_checkpoint(
        self, directory: Path, fingerprint: str, folder: str = "checkpoints"
    ) -> None:
        """Copy a checkpoint directory into the store, if it isn't there.

        Args:
            directory: A local directory that `encoders.checkpoint` wrote.
            fingerprint: Its fingerprint, which becomes its name.
            folder: Below the root.
        """
        *files, mark = checkpoint_files(directory)  # the mark that it is whole is written last
        if not self.filesystem().exists(self.uri(folder, fingerprint, mark)):
            for name in (*files, mark):
                self.upload(directory / name, folder, fingerprint, *name.split("/"))

    def embeddings(self, version: int | None = None) -> DeltaTable:
        """Open the embeddings table, created empty if there is none.

        Args:
            version: A table version; the newest if None.

        Raises:
            StoreError: The table has no such version or isn't ours.
        """
        return self._table("embeddings", EMBEDDINGS, version)

    def commit_embeddings(self, files: Sequence[DataFile]) -> None:
        """Add written files to the embeddings table in one Delta commit.

        Raises:
            StoreError: The table can't be opened or committed to.
        """
        address = self.uri("embeddings")
        self.embeddings()  # made if there is none
        with table_errors(address, "committed to"):
            append_files(address, [add_action(file) for file in files], EMBEDDINGS)

    def embeddings_version(self) -> int | None:
        """Return the newest version of the embeddings table; None if there is no table.

        Raises:
            StoreError: The table can't be opened.
        """
        address = self.uri("embeddings")
        with table_errors(address, "opened"):
            try:
                version: int = open_table(address).version()
            except TableNotFoundError:
                return None
            return version

    def embedding_files(self, version: int | None) -> list[str]:
        """List the data files of a version of the embeddings table, relative to the table.

        Raises:
            StoreError: The table can't be read.
        """
        return sorted(self._embedding_actions(version, "path"))

    def embedding_counts(self, version: int | None) -> list[int]:
        """Count the rows of each data file of a version of the embeddings table.

        Raises:
            StoreError: The table can't be read.
        """
        return self._embedding_actions(version, "num_records")

    def _embedding_actions(self, version: int | None, column: str) -> list[Any]:
        if version is None:
            return []
        table, address = self.embeddings(version), self.uri("embeddings")
        with table_errors(address, "read"):
            values: list[Any] = read_actions(table, address)[column].to_pylist()
        return values

    def releases(self) -> list[Release]:
        """List all releases, newest first; empty if nothing was published.

        Raises:
            StoreError: The table can't be read, or is of another version of Vitrine.
        """
        address = self.uri("releases")
        with table_errors(address, "read"):
            try:
                rows = self._read_rows(open_table(address))
            except TableNotFoundError:
                return []
        try:
            releases = [Release(**(row | {"quality": json.loads(row["quality"])})) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{address} is no table of this version of Vitrine: {one_line(error)}"
            ) from error
        return sorted(releases, key=lambda release: -release.version)

    def _read_rows(self, table: DeltaTable) -> list[dict[str, Any]]:
        """Return all rows of a small table.

        pyarrow sees bytes, and no file of Python's: its threads would let go of one after the
        read, and where the process ends just then, they abort it (5 of 70 runs of `status`).
        """
        actions = read_actions(table, self.uri("releases"))
        rows: list[dict[str, Any]] = []
        for path in sorted(actions["path"].to_pylist()):
            address = self.uri("releases", path)
            with parquet_errors(address):
                content = pa.BufferReader(self.filesystem().cat_file(address))
                rows += pq.ParquetFile(content).read(use_threads=False).to_pylist()
        return rows

    def current_release(self) -> Release | None:
        """Return the newest release, or None in a store without one."""
        return next(iter(self.releases()), None)

    def release(self, version: int | None = None) -> Release:
        """Return a release by its version, or the newest.

        Raises:
            StoreError: There is none.
        """
        releases = self.releases()
        for release in releases:
            if version in (None, release.version):
                return release
        wanted = "no release" if version is None else f"no release {version}"
        if not releases:
            raise StoreError(f"store {self.root} has {wanted}; run `vitrine refresh` first")
        there = ", ".join(str(release.version) for release in releases)
        raise StoreError(
            f"store {self.root} has {wanted}, but {there}; `vitrine gc` drops old ones"
        )

    def candidate(self, run: str) -> Release:
        """Return a release that a run built and did not publish.

        Raises:
            StoreError: There is none of that run, it is damaged, or the storage does not answer.
        """
        try:
            return Release(**self.read_json("indexes", run, "release.json"))
        except StorageError:
            raise
        except (TypeError, StoreError) as error:
            raise StoreError(
                f"store {self.root} has no candidate {run!r}: `vitrine refresh` or `reindex` "
                "with --no-publish makes one and prints its name"
            ) from error

    def publish(self, release: Release) -> None:
        """Make a release the newest, in one commit.

        Delta lets two blind appends both through, so the commit is made against the table version
        in which `release.parent` was seen to be the newest, and is not retried.

        Raises:
            PublishConflictError: Another job published since `release.parent`.
            StoreError: The table can't be read or committed to.
        """
        table = self._table("releases", RELEASES, None)
        current = self.current_release()
        if (current.version if current else None) != release.parent:
            raise self._conflict(release)
        row = asdict(release) | {"quality": json.dumps(release.quality, sort_keys=True)}
        file = self._write_row(row)
        address = self.uri("releases")
        with table_errors(address, "committed to"):
            if not append_files(address, [add_action(file)], RELEASES, only_after=table.version()):
                raise self._conflict(release)

    def _write_row(self, row: dict[str, Any]) -> DataFile:
        """Write one release as a file that no commit names yet."""
        name = f"release-{row['version']:06d}-{uuid.uuid4().hex}.parquet"
        target, content = self.uri("releases", name), pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([row], schema=RELEASES), content)
        with storage_errors(target, "written"):
            self.filesystem().pipe_file(target, content.getvalue().to_pybytes())
        return DataFile(name, content.getvalue().size, 1)

    def _conflict(self, release: Release) -> PublishConflictError:
        return PublishConflictError(
            f"another job published to {self.root} since this one began from release "
            f"{release.parent}; nothing of this run is visible: run it again"
        )

    def _table(self, name: str, schema: pa.Schema, version: int | None) -> DeltaTable:
        address = self.uri(name)
        with table_errors(address, "opened"):
            table = _open_or_create(address, schema, version)
        found = pa.schema(table.schema().to_arrow())
        if set(found.names) != set(schema.names):
            raise StoreError(
                f"{address} has columns {sorted(found.names)}, expected {sorted(schema.names)}: "
                "it is no table of this version of Vitrine"
            )
        return table


def _open_or_create(address: str, schema: pa.Schema, version: int | None) -> DeltaTable:
    try:
        return open_table(address, version)
    except TableNotFoundError:
        create_table(address, schema)
        return open_table(address, version)


def add_action(file: DataFile) -> AddAction:
    """Return what names a written file in a commit."""
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    rows = json.dumps({"numRecords": file.rows})
    return AddAction(file.path, file.size_bytes, {}, now_ms, True, rows)


def scratch_folder(name: str) -> Path:
    """Return a new temporary folder of this machine for files on their way to the store."""
    return Path(tempfile.mkdtemp(prefix=f"vitrine-{name}-"))
