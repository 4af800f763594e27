"""The last step of a run: gate, publish in one commit, report either way."""

import contextlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from jobs import metrics
from jobs.build import BuildTask, describe_index
from jobs.diff import Counts
from jobs.embed import EmbedResult
from jobs.errors import GateError, JobError, StoreError
from jobs.gate import Built, release_quality
from jobs.gate_bars import check_gate, list_bars
from jobs.plain import title_columns
from jobs.plan import Work as PlannedWork
from jobs.plan_cluster import live_cluster
from jobs.plan_rates import describe_cluster
from jobs.plan_truth import compare_plan, plan_of_run
from jobs.report import write_report
from jobs.report_examples import collect_examples, describe_neighbours
from jobs.report_pictures import STORED, Pictures
from jobs.report_sheets import show_queries, show_shared
from jobs.run import Run
from jobs.storage import StorageError
from jobs.store import Release
from jobs.trace import Actor, read_actors, write_trace


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a refresh or a reindex did. Counts are rows (product images), but for `products`.

    Attributes:
        release: The newest release after the run; 0: none was published yet.
        published: Whether this run published it.
        candidate: Name of the index version that was built and not published; else empty.
    """

    release: int
    published: bool
    candidate: str
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
    metadata_changed: int
    embedded: int


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a run changed in the table before it built; all zero for a reindex.

    Attributes:
        plan: See `jobs.plan_truth.plan_of_run`; None: of a reindex, whose plan is made at its end
            of what was known before.
    """

    counts: Counts
    embedded: EmbedResult
    plan: dict[str, Any] | None = None


def conclude(
    run: Run, task: BuildTask, built: Built, changes: Changes, *, publish: bool
) -> RunResult:
    """Publish if the gate holds; write the report either way.

    Args:
        run: The run.
        task: What was built from.
        built: What was built.
        changes: What the run changed before.
        publish: Whether to publish; else the release is left as a candidate.

    Raises:
        GateError: Measured quality is under the bar; nothing was published.
        PublishConflictError: Another job published meanwhile.
    """
    rows = built.live.rows.vectors + built.live.rows.rejected
    failures = check_gate(task.config.gate, rows, built, run.parent)
    release = _make_release(run, task, built, rows, _work(run, task, changes.embedded))
    # Before the commit: a published run must not fail for what its report lacks.
    report = _describe(run, task, built, changes, release) | {"gate_failures": failures}
    actors = read_actors(run) if changes.embedded.writes else []
    published = publish and not failures
    if published:
        run.store.publish(release)
    elif built.indexes:
        run.store.write_json(asdict(release), "indexes", run.run_id, "release.json")
    _tell_metrics(run, built, release, failures, published=published)
    number = release.version if published else None
    run.log("gate", failures=failures, published=published, release=number)
    report |= {"published": published, "release": number or release.version - 1}
    address = _write_report(run, task, built, changes, actors, report)
    if failures:
        raise GateError(failures, address)
    return RunResult(
        release=report["release"],
        published=published,
        candidate="" if published else run.run_id,
        report=address,
        run=run.run_id,
        rows=rows,
        products=release.products,
        live=release.vectors,
        rejected=release.rejected,
        new=changes.counts.new,
        changed=changes.counts.changed,
        removed=changes.counts.removed,
        unchanged=changes.counts.unchanged,
        metadata_changed=changes.counts.metadata_changed,
        embedded=changes.embedded.embedded,
    )


def _describe(
    run: Run, task: BuildTask, built: Built, changes: Changes, release: Release
) -> dict[str, Any]:
    """Return the report, but for what came of the run and where its time went."""
    work = release.quality["work"]
    plan = changes.plan or plan_of_run(run, task.config, task.space, _work_of_reindex(built))
    bars = list_bars(task.config.gate, release.rows, built, run.parent)
    report = asdict(release) | {
        **describe_changes(changes),
        "worker_s": work["worker_s"],
        "share_of_first_build": _share_of_first_build(work, "worker_s"),
        "wall_share_of_first_build": _share_of_first_build(work, "embed_s"),
        "rejects": built.rejects,
        "masked": built.masked,
        "placeholders": built.placeholders,
        "gate": [bar.describe() for bar in bars],
        "indexes": [describe_index(index) for index in built.indexes],
        "neighbours": describe_neighbours(built, run.parent, task.space.encoder),
        "labelled": {
            "queries": built.measured.queries,
            "by": "photo" if task.asks_with_photos else "words",
            "recall": built.measured.recall,
            "failed": built.measured.failed,
        },
        "stages": run.stages,
        "config": task.config.model_dump(mode="json"),
    }
    report["cluster"] = describe_cluster(live_cluster(task.config.ray.address), task.config.embed)
    return report | {"plan": compare_plan(plan, report)}


def _work_of_reindex(built: Built) -> PlannedWork:
    rows = built.live.rows
    return PlannedWork(
        command="reindex",
        to_embed=0,
        rows=rows.vectors + rows.rejected,
        live=rows.vectors,
        products=rows.products,
        rebuilds=True,
    )


def _tell_metrics(
    run: Run, built: Built, release: Release, failures: list[str], *, published: bool
) -> None:
    found = {index.field: index.measured.intersection_at_10 for index in built.indexes}
    metrics.show_gate(len(failures), found)
    if published:
        metrics.show_release(release)
    run.count("published" if published else "gate" if failures else "candidate")


def _write_report(
    run: Run,
    task: BuildTask,
    built: Built,
    changes: Changes,
    actors: list[Actor],
    report: dict[str, Any],
) -> str:
    """Write trace, report, log; after the commit a fault there must not look like a failed run."""
    root, pictures = task.catalog.root, Pictures(images=task.config.images)
    if task.catalog.has_bytes:
        pictures.nowhere = STORED
    titles = title_columns(task.config.catalog.columns)
    writes, seconds = changes.embedded.writes, changes.embedded.seconds
    try:
        with run.stage("collect examples for the report"):
            examples = collect_examples(run, task, built, changes.counts, pictures)
            sheet = show_queries(built.measured.sheet, root, pictures, titles)
            shared = show_shared(built.placeholders, root, pictures)
        report["time"] = write_trace(run, writes, seconds, actors)
        address = write_report(run.store, run.run_id, report, examples, sheet=sheet, shared=shared)
        run.write_log()
    # Any fault: the release is committed, and the exit status must say so.
    except Exception as error:
        if not report["published"]:
            raise
        return _tell_unwritten(run, error)
    return address


def _tell_unwritten(run: Run, error: Exception) -> str:
    """Log why a published run has no report; return what stands in its address's place."""
    reason = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
    run.log("report not written", error=f"{type(error).__name__}: {error}")
    if not isinstance(error, StorageError):  # each write would wait for it again
        with contextlib.suppress(StoreError, OSError):  # the first error is what is told
            run.write_log()
    return f"not written: {reason}"


def _work(run: Run, task: BuildTask, embedded: EmbedResult) -> dict[str, Any]:
    """Return what embedding took, beside what it took in the first build with this encoder."""
    worker_s = sum(embedded.seconds.values())
    own = {"embedded": embedded.embedded, "embed_s": embedded.wall_s, "worker_s": worker_s}
    if run.parent is not None and run.parent.encoder == task.space.encoder:
        return own | {"first_build": run.parent.quality["work"]["first_build"]}
    # After a run that was killed or stopped by a gate, the rest says nothing of the whole.
    whole = embedded.embedded >= task.live.rows.vectors > 0
    return own | {"first_build": own if whole else None}


def _make_release(
    run: Run, task: BuildTask, built: Built, rows: int, work: dict[str, Any]
) -> Release:
    before = run.parent.version if run.parent else 0
    return Release(
        version=before + 1,
        parent=before or None,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run.run_id,
        encoder=task.space.encoder,
        embeddings_version=built.embeddings_version,
        indexes=run.run_id,
        products=built.live.rows.products,
        vectors=built.live.rows.vectors,
        rejected=built.live.rows.rejected,
        rows=rows,
        config_hash=task.config.hash(),
        command=run.command,
        quality=release_quality(built) | {"work": work},
    )


def describe_changes(changes: Changes) -> dict[str, Any]:
    """Return the report's figures on the diff and on embedding."""
    counts, embedded = changes.counts, changes.embedded
    return {
        "new": counts.new,
        "changed": counts.changed,
        "changed_text": counts.changed_text,
        "changed_image": counts.changed_image,
        "removed": counts.removed,
        "unchanged": counts.unchanged,
        "metadata_changed": counts.metadata_changed,
        "retried": counts.retried,
        "formerly_rejected": counts.formerly_rejected,
        "embedded": embedded.embedded,
        "embed_s": embedded.wall_s,
        "rejected_in_run": embedded.rejected,
        "images_embedded": embedded.images_embedded,
        "images_reused": embedded.images_reused,
        "rows_fp32": embedded.rows_fp32,
        "rows_bf16": embedded.rows_bf16,
        "image_bytes": embedded.image_bytes,
        "written_bytes": embedded.written_bytes,
    }


def _share_of_first_build(work: dict[str, Any], seconds: str) -> float | None:
    """Return the seconds of embedding over those of the first build.

    None for that one itself, and where it was done in several runs.
    """
    first = work["first_build"]
    if first is None or first["embed_s"] == work["embed_s"]:
        return None
    return float(work[seconds] / first[seconds])
