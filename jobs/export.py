"""The `export` command: a release's live embeddings as plain Parquet, for anything that reads it.

TO/part-GGGGG-NNNNN.parquet          rows of one group of data files; below brand=Acme/ where
                                     partitioned; no order among files or rows is promised
TO/_serving/                         with --index: a store of this release, for `Searcher`
TO/_manifest.json                    written last: an export without it did not end

Memory does not grow with the catalog: the driver holds references and one line a written file;
`jobs/export_rows.py` and `jobs/export_files.py` say what the tasks hold.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.cluster import ray_session
from jobs.config import JobConfig
from jobs.contract import read_contract
from jobs.errors import JobError, StoreError
from jobs.export_files import ExportedFile, write_group
from jobs.export_layout import (
    ExportOptions,
    Layout,
    product_column,
    resolve_layout,
    vector_column,
)
from jobs.export_rows import Found, describe_source, find_rows, open_source
from jobs.export_serving import SERVING, copy_serving
from jobs.leases import hold_lease
from jobs.machines import check_shared
from jobs.nodes import cluster_cpus
from jobs.progress import Progress
from jobs.storage import storage_errors
from jobs.store import Release, Store, new_run_id
from jobs.tasks import gather_bounded

MANIFEST = "_manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written.

    Attributes:
        release: The release's version.
        to: The export's root.
        fields: Whose vectors.
        rows: Product images: one row each.
        files: How many Parquet files.
        size_bytes: Of these files.
        manifest: Address of `_manifest.json`.
        serving: Address of the store that `--index` wrote.
    """

    release: int
    to: str
    fields: tuple[str, ...]
    rows: int
    products: int
    files: int
    size_bytes: int
    manifest: str
    serving: str | None


def export(config: JobConfig, options: ExportOptions, progress: Progress) -> Export:
    """Write a release's live embeddings, and what is asked for beside them.

    Args:
        config: The job: which store, and how Ray runs.
        options: What to write, and where to.
        progress: Shows what happens.

    Raises:
        ConfigError: The release has no such field or column, or an option is impossible.
        StoreError: There is no such release, or it is damaged, or the target can't be written.
        JobError: The target holds something.
    """
    store, target = Store(config.store), Store(options.to)
    release = store.release(options.release)
    check_target(store, target)
    with hold_lease(store, new_run_id(), release):
        # Again: what `gc` dropped before it could see the lease is gone.
        release = store.release(release.version)
        manifest = store.read_json("indexes", release.indexes, "manifest.json")
        source = open_source(store, release, manifest)
        with ray_session(config.ray):
            check_shared([store.uri("indexes", release.indexes, "manifest.json")])
            progress.stage(f"find the rows of release {release.version}")
            described = describe_source(source)
            space, product = read_contract(manifest["query"]), product_column(manifest)
            layout = resolve_layout(options, space, described.schema, product)
            found = find_rows(source, described, layout)
            progress.stage(f"write {release.vectors:,} rows to {target.root}")
            _make_folder(target)
            check_shared([target.root])
            files = _write(store, target, layout, found, release, progress)
            copied: list[ExportedFile] = []
            if options.index:
                progress.stage("copy the index files and the query encoder")
                copied = copy_serving(store, target, release, manifest)
    text = json.dumps(_describe(release, manifest, layout, files, copied), indent=2)
    return Export(
        release=release.version,
        to=target.root,
        fields=tuple(field.name for field in layout.fields),
        rows=release.vectors,
        products=release.products,
        files=len(files),
        size_bytes=sum(file.size_bytes for file in files),
        manifest=_write_mark(target, text),
        serving=target.uri(SERVING) if options.index else None,
    )


def check_target(store: Store, target: Store) -> None:
    """Refuse a target that holds something: files of two exports must not mix.

    Raises:
        JobError: It is a file, is not empty, or lies in the store.
        StoreError: It can't be read.
    """
    if f"{target.root}/".startswith(f"{store.root}/"):
        raise JobError(f"{target.root} lies in the store: name a folder outside it")
    filesystem = target.filesystem()
    with storage_errors(target.root, "read"):
        if not filesystem.exists(target.root):
            return
        if filesystem.isfile(target.root):
            raise JobError(f"{target.root} is a file; name a new or empty folder")
        if not filesystem.ls(target.root, detail=False):
            return
        done = filesystem.exists(target.uri(MANIFEST))
    what = "an export" if done else f"no whole export: it has no {MANIFEST}"
    raise JobError(f"{target.root} is not empty ({what}); empty it, or name a new folder")


def _make_folder(target: Store) -> None:
    """Make a local target, so that each machine of a cluster can be asked whether it is there."""
    if target.is_local:
        with storage_errors(target.root, "written"):
            Path(target.root).mkdir(parents=True, exist_ok=True)


def _write(
    store: Store, target: Store, layout: Layout, found: Found, release: Release, progress: Progress
) -> list[ExportedFile]:
    """Write all groups of files; return the written files by path."""

    def groups() -> Iterator[tuple[int, tuple[int, list[str]], list[Any]]]:
        for number, files in enumerate(found.files):
            parts, found.parts[number] = found.parts[number], []  # written rows may be let go of
            yield number, files, parts

    def submit(group: tuple[int, tuple[int, list[str]], list[Any]]) -> Any:  # noqa: ANN401
        number, files, parts = group
        return write_group.remote((store, target), layout, number, files, *parts)

    written: list[ExportedFile] = []
    rows = 0
    with progress.count(release.vectors) as shown:
        for files in gather_bounded(submit, groups(), in_flight=2 * cluster_cpus()):
            written += files
            rows += sum(file.rows for file in files)
            shown.update(rows)
    if rows != release.vectors:
        raise StoreError(
            f"{rows:,} of the {release.vectors:,} rows of release {release.version} were written: "
            "it is damaged"
        )
    return sorted(written, key=lambda file: file.path)


def _describe(
    release: Release,
    manifest: dict[str, Any],
    layout: Layout,
    files: list[ExportedFile],
    copied: list[ExportedFile],
) -> dict[str, Any]:
    """Return what `_manifest.json` says."""
    fields = {
        field.name: {
            "column": vector_column(field.name),
            "dim": field.dim,
            "dtype": "float16" if _is_half(layout, field.name) else "float32",
        }
        for field in layout.fields
    }
    serving = {
        "path": SERVING,
        "release": release.version,
        "indexes": release.indexes,
        "files": [_file_entry(file) for file in copied],
    }
    return {
        "format_version": FORMAT_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "release": release.version,
        "release_created_at": release.created_at,
        "encoder": release.encoder,
        "query_sha256": manifest["query"]["sha256"],
        "rows": release.vectors,
        "products": release.products,
        "fields": fields,
        "columns": {column.name: str(column.type) for column in layout.schema},
        "partition_by": list(layout.partition_by),
        "files": [_file_entry(file) for file in files],
        "serving": serving if copied else None,
    }


def _is_half(layout: Layout, field: str) -> bool:
    return str(layout.schema.field(vector_column(field)).type.value_type) == "halffloat"


def _file_entry(file: ExportedFile) -> dict[str, Any]:
    return {name: value for name, value in asdict(file).items() if value is not None}


def _write_mark(target: Store, text: str) -> str:
    """Write the done mark: whole or not at all; return its address."""
    if not target.is_local:
        return target.write_text(text, MANIFEST)
    written = Path(target.write_text(text, f".{MANIFEST}.partial"))
    with storage_errors(target.uri(MANIFEST), "written"):
        written.replace(target.uri(MANIFEST))
    return target.uri(MANIFEST)
