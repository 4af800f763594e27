"""The store: one root, local or s3://, that holds all that Vitrine writes.

embeddings/                  Delta table, append-only rows
checkpoints/<fingerprint>/   weights; encoder.json is written last, immutable
indexes/<version>/           index files, ids.parquet; manifest.json is written last
releases/                    Delta table, a row a release
runs/<run>/                  report.json, report.html
"""

import contextlib
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
from deltalake import CommitProperties, DeltaTable, Schema, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from jobs.errors import PublishConflictError, StoreError
from jobs.schemas import EMBEDDINGS, RELEASES


@dataclass(frozen=True, kw_only=True)
class Release:
    """What serving loads: a checkpoint, a table version and an index version that belong together.

    Attributes:
        rows: Catalog rows (product images) in; always `vectors + rejected`.
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
        return fsspec.core.url_to_fs(self.root)[0]

    def write_text(self, text: str, *parts: str) -> str:
        """Write a small text file whole; return its address."""
        target = self.uri(*parts)
        filesystem = self.filesystem()
        filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        with filesystem.open(target, "wb") as file:
            file.write(text.encode("utf-8", "replace"))
        return target

    def read_json(self, *parts: str) -> dict[str, Any]:
        """Read a JSON object.

        Raises:
            StoreError: The file is missing or holds no JSON object.
        """
        target = self.uri(*parts)
        try:
            with self.filesystem().open(target, "rb") as file:
                value = json.loads(file.read())
        except FileNotFoundError as error:
            raise StoreError(f"{target} is missing") from error
        except ValueError as error:
            raise StoreError(f"{target} is corrupted: {error}") from error
        if not isinstance(value, dict):
            raise StoreError(f"{target} is corrupted: no JSON object")
        return value

    def upload(self, source: Path, *parts: str) -> str:
        """Copy a local file into the store; return its address."""
        target = self.uri(*parts)
        filesystem = self.filesystem()
        filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        filesystem.put_file(str(source), target)
        return target

    def local_copy(self, cache: Path, *parts: str) -> Path:
        """Return a local path of a file or flat folder of the store, fetched if it is remote.

        Args:
            cache: Where remote files are put, under their own relative path.
            *parts: Path below the root.

        Raises:
            StoreError: There is no such file.
        """
        filesystem, target = self.filesystem(), self.uri(*parts)
        if not filesystem.exists(target):
            raise StoreError(f"{target} is missing")
        if self.is_local:
            return Path(target)
        local = cache.joinpath(*parts)
        local.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get(target, str(local), recursive=filesystem.isdir(target))
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
        from encoders.checkpoint import checkpoint_files  # torch; only the driver needs it

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
        """Add written files to the embeddings table in one Delta commit."""
        now_ms = int(datetime.now(UTC).timestamp() * 1000)
        actions = [
            AddAction(f.path, f.size_bytes, {}, now_ms, True, json.dumps({"numRecords": f.rows}))
            for f in files
        ]
        self.embeddings().create_write_transaction(
            actions, mode="append", schema=Schema.from_arrow(EMBEDDINGS)
        )

    def embedding_files(self, version: int) -> list[str]:
        """List the data files of a version of the embeddings table, relative to the table."""
        actions = pa.table(self.embeddings(version).get_add_actions(flatten=True))
        return sorted(actions["path"].to_pylist())

    def releases(self) -> list[Release]:
        """List all releases, newest first; empty if nothing was published."""
        if not self._has_table("releases"):
            return []
        try:
            rows = self._read_rows(self._table("releases", RELEASES, None))
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(f"{self.uri('releases')} can't be read: {error}") from error
        releases = [Release(**(row | {"quality": json.loads(row["quality"])})) for row in rows]
        return sorted(releases, key=lambda release: -release.version)

    def _read_rows(self, table: DeltaTable) -> list[dict[str, Any]]:
        """Return all rows of a small table.

        pyarrow sees bytes, and no file of Python's: its threads would let go of one after the
        read, and where the process ends just then, they abort it (5 of 70 runs of `status`).
        """
        actions = pa.table(table.get_add_actions(flatten=True))
        rows: list[dict[str, Any]] = []
        for path in sorted(actions["path"].to_pylist()):
            with self.filesystem().open(self.uri("releases", path), "rb") as file:
                content = pa.BufferReader(file.read())
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
        for release in self.releases():
            if version in (None, release.version):
                return release
        wanted = "no release" if version is None else f"no release {version}"
        raise StoreError(f"store {self.root} has {wanted}; run `vitrine refresh` first")

    def publish(self, release: Release) -> None:
        """Make a release the newest, in one commit.

        Delta lets two blind appends both through, so the commit is made against the table version
        in which `release.parent` was seen to be the newest, and is not retried.

        Raises:
            PublishConflictError: Another job published since `release.parent`.
        """
        table = self._table("releases", RELEASES, None)
        current = self.current_release()
        if (current.version if current else None) != release.parent:
            raise self._conflict(release)
        row = asdict(release) | {"quality": json.dumps(release.quality, sort_keys=True)}
        try:
            write_deltalake(
                table,
                pa.Table.from_pylist([row], schema=RELEASES),
                mode="append",
                commit_properties=CommitProperties(max_commit_retries=0),
            )
        except CommitFailedError as error:
            raise self._conflict(release) from error

    def _conflict(self, release: Release) -> PublishConflictError:
        return PublishConflictError(
            f"another job published to {self.root} since this one began from release "
            f"{release.parent}; nothing of this run is visible: run it again"
        )

    def _has_table(self, name: str) -> bool:
        try:
            return bool(DeltaTable.is_deltatable(self.uri(name)))
        except (DeltaError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise StoreError(f"{self.uri(name)} can't be opened: {first}") from error

    def _table(self, name: str, schema: pa.Schema, version: int | None) -> DeltaTable:
        address = self.uri(name)
        try:
            table = _open_table(address, schema, version)
        except (DeltaError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise StoreError(f"{address} can't be opened: {first}") from error
        found = pa.schema(table.schema().to_arrow())
        if set(found.names) != set(schema.names):
            raise StoreError(
                f"{address} has columns {sorted(found.names)}, expected {sorted(schema.names)}: "
                "it is no table of this version of Vitrine"
            )
        return table


def _open_table(address: str, schema: pa.Schema, version: int | None) -> DeltaTable:
    """Open a table; create it empty if there is none."""
    try:
        return DeltaTable(address, version=version)
    except TableNotFoundError:
        if "://" not in address:
            Path(address).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(CommitFailedError):  # another job created it at this moment
            DeltaTable.create(address, schema=schema, mode="ignore")
        return DeltaTable(address, version=version)


def scratch_folder(name: str) -> Path:
    """Return a new temporary folder of this machine for files on their way to the store."""
    return Path(tempfile.mkdtemp(prefix=f"vitrine-{name}-"))
