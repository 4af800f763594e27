"""The `refresh` command: embed what changed, build the indexes, publish if quality holds."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from encoders.checkpoint import create_checkpoint, read_checkpoint_config
from encoders.spec import PreprocessSpec
from jobs.catalog import Catalog, read_catalog
from jobs.cluster import ray_session
from jobs.config import GateConfig, JobConfig
from jobs.diff import Diff, diff_catalog, locate, read_data_file, read_state, scan_catalog
from jobs.embed import EmbedResult, embed_items
from jobs.embed_steps import EmbedTask, recipe
from jobs.errors import CatalogError, ConfigError, GateError, StoreError
from jobs.evaluate import Measured, measure_queries
from jobs.ids import write_ids
from jobs.index import FieldIndex, LiveRows, build_index, live_rows
from jobs.progress import Progress
from jobs.report import write_report
from jobs.schemas import REJECT
from jobs.search import FORMAT_VERSION
from jobs.store import Release, Store, new_run_id, scratch_folder

EXAMPLES = 3


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
    needs_text = set(config.embed.fields) != {"image"}
    needs_image = set(config.embed.fields) != {"text"}
    catalog = read_catalog(config.catalog, need_images=needs_image, need_text=needs_text)
    encoder, preprocess, dim = add_encoder(config, store)
    with ray_session(config.ray):
        with run.stage("compare the catalog with the store") as counted:
            plan, diff = _diff(store, catalog, encoder, config)
            counted["rows"] = len(plan)
        task = EmbedTask(
            catalog=catalog,
            images=config.images,
            embed=config.embed,
            store=store,
            encoder=encoder,
            preprocess=preprocess,
            generation=diff.generation,
        )
        embedded = _embed(run, task, diff)
        built = _build(run, config, task, plan, dim)
        return _conclude(run, config, task, diff, embedded, built)


@dataclass(frozen=True, kw_only=True)
class Built:
    """An index version that no release names yet, and what was measured of it."""

    embeddings_version: int
    live: LiveRows
    rejects: list[dict[str, Any]]
    indexes: list[FieldIndex]
    measured: Measured


def add_encoder(config: JobConfig, store: Store) -> tuple[str, PreprocessSpec, int]:
    """Make the configured encoder's checkpoint and put it into the store.

    Returns:
        Its fingerprint, its preprocessing, its dimension D.

    Raises:
        ConfigError: The encoder can't be made: an unknown name, weights that don't fit.
    """
    directory = scratch_folder("checkpoint")
    try:
        fingerprint = create_checkpoint(config.encoder, directory)
        model_config, preprocess = read_checkpoint_config(directory)
        store.add_checkpoint(directory, fingerprint)
    except ValueError as error:
        raise ConfigError(f"encoder: {error}") from error
    except OSError as error:
        raise StoreError(f"store {store.root} can't be written: {error}") from error
    finally:
        shutil.rmtree(directory)
    return fingerprint, preprocess, int(model_config["embed_dim"])


def _diff(store: Store, catalog: Catalog, encoder: str, config: JobConfig) -> tuple[Any, Diff]:
    plan = scan_catalog(catalog, recipe(config.embed))
    state = read_state(store, store.embeddings().version(), encoder)
    return plan, diff_catalog(plan, state)


def _embed(run: Run, task: EmbedTask, diff: Diff) -> EmbedResult:
    with run.stage("embed") as counted, run.progress.count(len(diff.todo)) as shown:
        result = embed_items(task, diff, shown.update)
        counted["rows"] = result.embedded + result.rejected
    for name, seconds in result.seconds.items():
        run.add_stage(f"embed: {name.removesuffix('_s')}", seconds, counted["rows"])
    return result


def _build(run: Run, config: JobConfig, task: EmbedTask, plan: Any, dim: int) -> Built:  # noqa: ANN401
    """Index the live rows and measure the result; nothing is published."""
    store = task.store
    version = store.embeddings().version()
    files = store.embedding_files(version)
    live = live_rows(plan, read_state(store, version, task.encoder), files)
    rejects = summarize_rejects(store, files, live, plan)
    indexes: list[FieldIndex] = []
    measured = Measured(queries=0, recall={})
    if len(live.vector_id):
        for name in config.embed.fields:
            with run.stage(f"index {name}") as counted:
                target = (run.run_id, config.evaluate.sample_rows)
                indexes.append(
                    build_index(name, live, dim, config.index, store, target, run.progress.step)
                )
                counted["rows"] = indexes[-1].ntotal
        most_images = int(plan["image_number"].max()) + 1
        _write_manifest(run, config, task, live, indexes, most_images)
        with run.stage("measure queries") as counted:
            measured = measure_queries(
                config.evaluate,
                task.catalog,
                config.images,
                store,
                run.run_id,
                use_images=task.needs_image,
            )
            counted["rows"] = measured.queries
    return Built(
        embeddings_version=version, live=live, rejects=rejects, indexes=indexes, measured=measured
    )


def summarize_rejects(
    store: Store,
    files: list[str],
    live: LiveRows,
    plan: Any,  # noqa: ANN401
) -> list[dict[str, Any]]:
    """Count the catalog's rows that are rejected now, by reason, with a few examples each.

    Returns:
        One dict a reason, most rows first: reason, rows, examples (product_id, detail).
    """
    seen: dict[int, tuple[int, str]] = {}
    examples: dict[str, dict[int, dict[str, str]]] = {}
    columns = ["vector_id", "generation", "operation", "product_id", "reject_reason"]
    wanted = plan["vector_id"][~locate(live.vector_id, plan["vector_id"])[1]]
    for file in files if len(wanted) else ():
        table = read_data_file(store, file, [*columns, "reject_detail"])
        for row in table.filter(pc.equal(table["operation"], REJECT)).to_pylist():
            key, generation = row["vector_id"], row["generation"]
            if generation < seen.get(key, (0, ""))[0] or not locate(wanted, np.array([key]))[1][0]:
                continue
            reason = row["reject_reason"]
            seen[key] = (generation, reason)
            shown = examples.setdefault(reason, {})
            if len(shown) < EXAMPLES:
                shown[key] = {"product_id": row["product_id"], "detail": row["reject_detail"]}
    counts = Counter(reason for _, reason in seen.values())
    return [
        {"reason": reason, "rows": rows, "examples": list(examples[reason].values())}
        for reason, rows in counts.most_common()
    ]


def _write_manifest(
    run: Run,
    config: JobConfig,
    task: EmbedTask,
    live: LiveRows,
    indexes: list[FieldIndex],
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
        "encoder": task.encoder,
        "products": live.products,
        "fields": {index.field: asdict(index) for index in indexes},
        "ids": ids,
        "image_weight": config.embed.image_weight,
        "config": config.model_dump(mode="json"),
        "config_hash": config.hash(),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True)
    task.store.write_text(text, "indexes", run.run_id, "manifest.json")


def check_gate(gate: GateConfig, rows: int, built: Built) -> list[str]:
    """List every bar that was missed, with the figure; empty if all hold."""
    failures = []
    live = len(built.live.vector_id)
    share = built.live.rejected / rows
    if share > gate.max_reject_share:
        failures.append(
            f"{built.live.rejected} of {rows} rows rejected ({share:.1%}), "
            f"gate.max_reject_share is {gate.max_reject_share:.1%}"
        )
    if live + built.live.rejected != rows:
        failures.append(f"{rows} rows in, but {live} live and {built.live.rejected} rejected")
    if not live:
        failures.append("no row is live")
    for index in built.indexes:
        expected = len(built.live.select(index.field).vector_id)
        if index.ntotal != expected:
            failures.append(f"{index.field}: {index.ntotal} vectors indexed, {expected} are live")
        for name, value, bar in (
            ("intersection_at_10", index.intersection_at_10, gate.min_intersection_at_10),
            ("self_retrieval", index.self_retrieval, gate.min_self_retrieval),
        ):
            if value < bar:
                failures.append(f"{index.field}: {name} {value:.3f}, gate.min_{name} is {bar:.3f}")
    found = built.measured.recall.get("recall_at_10", 0.0)
    if found < gate.min_recall_at_10:
        bar = gate.min_recall_at_10
        failures.append(f"recall_at_10 {found:.3f}, gate.min_recall_at_10 is {bar:.3f}")
    return failures


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
        encoder=task.encoder,
        embeddings_version=built.embeddings_version,
        indexes=run.run_id,
        products=live.products,
        vectors=len(live.vector_id),
        rejected=live.rejected,
        rows=rows,
        config_hash=config.hash(),
        quality=_quality(built),
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
        "indexes": [asdict(index) for index in built.indexes],
        "labelled": {
            "queries": built.measured.queries,
            "by": "photo" if task.needs_image else "words",
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


def _quality(built: Built) -> dict[str, Any]:
    quality: dict[str, Any] = {
        index.field: {
            "intersection_at_10": index.intersection_at_10,
            "self_retrieval": index.self_retrieval,
            "nprobe": index.nprobe,
            "factory": index.factory,
        }
        for index in built.indexes
    }
    if built.measured.recall:
        quality["labelled"] = built.measured.recall | {"queries": built.measured.queries}
    return quality
