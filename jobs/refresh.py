"""The `refresh` command: embed what changed, build the indexes, publish if quality holds."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from jobs.catalog import Catalog
from jobs.cluster import ray_session
from jobs.config import JobConfig
from jobs.diff import Diff, diff_catalog, read_state, scan_catalog
from jobs.embed import EmbedResult, embed_items
from jobs.embed_steps import EmbedTask
from jobs.errors import CatalogError, GateError
from jobs.gate import Built, check_gate, release_quality, summarize_rows
from jobs.ids import write_ids
from jobs.index import FieldIndex, build_index, live_rows
from jobs.inputs import add_encoder, open_catalog, read_fusion
from jobs.progress import Progress
from jobs.queries import Measured, measure_queries
from jobs.report import write_report
from jobs.search import FORMAT_VERSION
from jobs.space import VectorSpace, resolve_fields
from jobs.store import Release, Store, new_run_id
from jobs.vectors import LiveRows


@dataclass(frozen=True, kw_only=True)
class RefreshResult:
    """What a refresh did. Counts are rows (product images), but for `products`."""

    release: int
    published: bool
    report: str
    run: str
    rows: int
    products: int
    live: int
    rejected: int
    new: int
    changed: int
    removed: int
    unchanged: int
    embedded: int


@dataclass
class Run:
    """One run on its way: its name, its parent release, and the seconds of each stage."""

    run_id: str
    parent: Release | None
    progress: Progress
    stages: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, int]]:
        """Time a stage and show that it runs; the block may set its number of rows."""
        self.progress.stage(name)
        started, rows = time.monotonic(), {"rows": 0}
        yield rows
        seconds = time.monotonic() - started
        self.add_stage(name, seconds, rows["rows"])

    def add_stage(self, name: str, seconds: float, rows: int) -> None:
        """Record the seconds of a stage or of a step inside it."""
        rate = rows / seconds if rows and seconds > 0 else None
        self.stages.append({"stage": name, "seconds": seconds, "rows_per_s": rate})


def refresh(config: JobConfig, progress: Progress) -> RefreshResult:
    """Embed what changed in the catalog, build every index, publish if quality holds.

    Args:
        config: The job.
        progress: Shows what happens.

    Raises:
        JobError: See `jobs.errors`; what was embedded stays for the next run.
        GateError: Measured quality is under the bar; nothing was published.
    """
    store = Store(config.store)
    run = Run(new_run_id(), store.current_release(), progress)
    fields = resolve_fields(config.embed, read_fusion(config.encoder))
    catalog = open_catalog(config.catalog, fields)
    space, contract = add_encoder(config, store)
    with ray_session(config.ray):
        with run.stage("compare the catalog with the store") as counted:
            plan, diff = _diff(store, catalog, space)
            counted["rows"] = len(plan)
        task = EmbedTask(
            catalog=catalog,
            images=config.images,
            embed=config.embed,
            store=store,
            space=space,
            generation=diff.generation,
        )
        embedded = _embed(run, task, diff)
        built = _build(run, config, task, plan, contract)
        return _conclude(run, config, task, diff, embedded, built)


def _diff(store: Store, catalog: Catalog, space: VectorSpace) -> tuple[Any, Diff]:
    plan = scan_catalog(catalog, space.recipe)
    state = read_state(store, store.embeddings().version(), space.encoder)
    return plan, diff_catalog(plan, state)


def _embed(run: Run, task: EmbedTask, diff: Diff) -> EmbedResult:
    with run.stage("embed") as counted, run.progress.count(len(diff.todo)) as shown:
        result = embed_items(task, diff, shown.update)
        counted["rows"] = result.embedded + result.rejected
    for name, seconds in result.seconds.items():
        run.add_stage(f"embed: {name.removesuffix('_s')}", seconds, counted["rows"])
    return result


def _build(
    run: Run,
    config: JobConfig,
    task: EmbedTask,
    plan: Any,  # noqa: ANN401
    contract: dict[str, Any],
) -> Built:
    """Index the live rows and measure the result; nothing is published."""
    store, space = task.store, task.space
    version = store.embeddings().version()
    files = store.embedding_files(version)
    state = read_state(store, version, space.encoder)
    live = live_rows(plan, state, files)
    # Reads all files: not where every row is whole.
    whole = live.rejected == 0 and space.requires == space.takes
    rejects, masked = ([], []) if whole else summarize_rows(store, files, state, plan)
    indexes: list[FieldIndex] = []
    measured = Measured(queries=0, recall={})
    if len(live.vector_id):
        for name in space.fields:
            with run.stage(f"index {name}") as counted:
                target = (run.run_id, config.evaluate.sample_rows)
                one = space.field(name)
                indexes.append(
                    build_index(one, live, config.index, store, target, run.progress.step)
                )
                counted["rows"] = indexes[-1].ntotal
        most_images = int(plan["image_number"].max()) + 1
        _write_manifest(run, config, task, live, indexes, contract, most_images)
        with run.stage("measure queries") as counted:
            measured = measure_queries(
                config.evaluate,
                task.catalog,
                config.images,
                store,
                run.run_id,
                use_images=_asks_with_photos(task),
            )
            counted["rows"] = measured.queries
    return Built(
        embeddings_version=version,
        live=live,
        rejects=rejects,
        masked=masked,
        indexes=indexes,
        measured=measured,
    )


def _asks_with_photos(task: EmbedTask) -> bool:
    """Say what labelled queries are: an MSR encoder is made for words."""
    return task.loads_images and task.space.fusion.kind == "sum"


def _write_manifest(
    run: Run,
    config: JobConfig,
    task: EmbedTask,
    live: LiveRows,
    indexes: list[FieldIndex],
    contract: dict[str, Any],
    most_images: int,
) -> None:
    """Write ids.parquet and, last of all, the manifest that makes the index version whole."""
    ids = write_ids(task.catalog, live.vector_id, most_images, task.store, run.run_id)
    if ids["rows"] != len(live.vector_id):
        raise CatalogError(
            f"the catalog changed while it was read: {len(live.vector_id)} live rows, "
            f"{ids['rows']} of them found again; run the refresh again"
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        "run": run.run_id,
        "encoder": task.space.encoder,
        "products": live.products,
        "fields": {index.field: asdict(index) for index in indexes},
        "ids": ids,
        "query": contract,
        "config": config.model_dump(mode="json"),
        "config_hash": config.hash(),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True)
    task.store.write_text(text, "indexes", run.run_id, "manifest.json")


def _conclude(
    run: Run,
    config: JobConfig,
    task: EmbedTask,
    diff: Diff,
    embedded: EmbedResult,
    built: Built,
) -> RefreshResult:
    """Publish if the gate holds; write the report either way."""
    rows, live = len(diff.plan), built.live
    failures = check_gate(config.gate, rows, built)
    version = run.parent.version if run.parent else 0
    release = Release(
        version=version + 1,
        parent=run.parent.version if run.parent else None,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run.run_id,
        encoder=task.space.encoder,
        embeddings_version=built.embeddings_version,
        indexes=run.run_id,
        products=live.products,
        vectors=len(live.vector_id),
        rejected=live.rejected,
        rows=rows,
        config_hash=config.hash(),
        quality=release_quality(built),
    )
    if not failures:
        task.store.publish(release)
    report = asdict(release) | {
        "published": not failures,
        "release": version if failures else release.version,
        "gate_failures": failures,
        "new": diff.new,
        "changed": diff.changed,
        "removed": len(diff.removed),
        "unchanged": diff.unchanged,
        "retried": diff.retried,
        "embedded": embedded.embedded,
        "rejected_in_run": embedded.rejected,
        "image_bytes": embedded.image_bytes,
        "rejects": built.rejects,
        "masked": built.masked,
        "indexes": [asdict(index) for index in built.indexes],
        "labelled": {
            "queries": built.measured.queries,
            "by": "photo" if _asks_with_photos(task) else "words",
            "recall": built.measured.recall,
            "failed": built.measured.failed,
        },
        "stages": run.stages,
        "config": config.model_dump(mode="json"),
    }
    address = write_report(
        task.store, run.run_id, report, built.measured.sheet, task.catalog.root, config.images
    )
    if failures:
        raise GateError(failures, address)
    return RefreshResult(
        release=release.version,
        published=True,
        report=address,
        run=run.run_id,
        rows=rows,
        products=live.products,
        live=release.vectors,
        rejected=live.rejected,
        new=diff.new,
        changed=diff.changed,
        removed=len(diff.removed),
        unchanged=diff.unchanged,
        embedded=embedded.embedded,
    )
