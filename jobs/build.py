"""Builds an index version from live rows: indexes, ids, manifest, and what is measured of them."""

from dataclasses import asdict, dataclass
from typing import Any

from jobs.catalog import Catalog
from jobs.config import JobConfig
from jobs.contract import read_contract
from jobs.diff import Plan
from jobs.errors import StoreError
from jobs.gate import Built, summarize_rows
from jobs.ids import write_ids
from jobs.index import FieldIndex, IndexJob, build_index
from jobs.index_choice import reasons_to_retrain
from jobs.labelled import Labelled, encode_labelled
from jobs.leases import live_leases
from jobs.live import Live
from jobs.partials import delete_partials
from jobs.placeholders import find_placeholders
from jobs.queries import Measured, measure_queries
from jobs.run import Run
from jobs.schemas import MANIFEST_FORMAT
from jobs.space import VectorSpace
from jobs.steps import StepClock


@dataclass(frozen=True, kw_only=True)
class BuildTask:
    """What an index version is built from.

    Attributes:
        plan: The scanned catalog, for `ids.parquet`; None: the parent's is kept.
        version: Of the embeddings table.
        contract: The query contract of the release.
        retrain: Why indexes are trained anew; empty: they are updated where that is possible.
    """

    config: JobConfig
    catalog: Catalog
    space: VectorSpace
    contract: dict[str, Any]
    live: Live
    plan: Plan | None
    version: int
    retrain: tuple[str, ...] = ()

    @property
    def asks_with_photos(self) -> bool:
        """Say what labelled queries are: an MSR encoder is made for words."""
        loads = "image" in self.space.takes and "image" in self.catalog.columns
        return loads and self.space.fusion.kind == "sum"


def build_version(run: Run, task: BuildTask) -> Built:
    """Index the live rows, write the manifest last, and measure; nothing is published.

    Args:
        run: The run; its id names the index version.
        task: What to build from.

    Raises:
        JobError: See `jobs.index.build_index` and `jobs.ids.write_ids`.
    """
    live = task.live
    rejects, masked = summarize_rows(run.store, live)
    indexes: list[FieldIndex] = []
    measured = Measured(queries=0, recall={})
    placeholders: list[dict[str, Any]] = []
    if live.rows.vectors:
        with run.stage("write ids") as counted:
            entries = _write_ids(run, task)
            counted["rows"] = live.rows.vectors
        labelled = _encode_labelled(run, task)
        indexes = _build_indexes(run, task, entries, labelled)
        placeholders = find_placeholders(run.store, entries["ids"], live)
        with run.stage("measure queries") as counted:
            measured = measure_queries(
                labelled,
                task.catalog,
                task.config.images,
                run.store,
                run.run_id,
                use_images=task.asks_with_photos,
            )
            counted["rows"] = measured.queries
    return Built(
        embeddings_version=task.version,
        live=live,
        rejects=rejects,
        masked=masked,
        placeholders=placeholders,
        indexes=indexes,
        measured=measured,
    )


def describe_index(index: FieldIndex) -> dict[str, Any]:
    """Return an index as plain values; which neighbours changed is for the report, with names."""
    values = asdict(index)
    del values["measured"]["changed"]
    return values


def _base_manifest(run: Run, space: VectorSpace) -> dict[str, Any] | None:
    """Return the parent's manifest if its vectors were made by the same encoder."""
    if run.parent is None or run.parent.encoder != space.encoder:
        return None
    manifest = run.store.read_json("indexes", run.parent.indexes, "manifest.json")
    if manifest.get("format_version") != MANIFEST_FORMAT:
        raise StoreError(
            f"{run.store.uri('indexes', run.parent.indexes)}: a manifest of format "
            f"{manifest.get('format_version')!r}, expected {MANIFEST_FORMAT}: it is of another "
            "version of Vitrine; make the store anew"
        )
    return manifest


def _index_job(
    run: Run,
    task: BuildTask,
    name: str,
    base: dict[str, Any] | None,
    *,
    ids: dict[str, Any],
    labelled: Labelled | None,
) -> IndexJob:
    field, config = task.space.field(name), task.config.index
    entry, retrain = None, list(task.retrain)
    if base is not None and name in base["fields"]:
        if read_contract(base["query"]).field(name) == field:
            entry = base["fields"][name]
        else:
            retrain.append("The newest release's vectors have other weights.")
    if entry is not None and not retrain:
        count = task.live.rows.count(name)
        retrain = reasons_to_retrain(config, base["config"]["index"], entry, count) if base else []
    return IndexJob(
        store=run.store,
        field=field,
        live=task.live,
        config=config,
        folder=run.run_id,
        sample_rows=task.config.evaluate.sample_rows,
        base=entry,
        retrain=tuple(retrain),
        ids=ids,
        labelled=labelled,
    )


def _encode_labelled(run: Run, task: BuildTask) -> Labelled | None:
    if task.config.evaluate.queries is None:
        return None
    with run.stage("encode labelled queries") as counted:
        labelled = encode_labelled(
            task.config.evaluate,
            task.config.images,
            run.store,
            task.contract,
            use_images=task.asks_with_photos,
        )
        counted["rows"] = len(labelled.queries) if labelled else 0
    return labelled


def _build_indexes(
    run: Run, task: BuildTask, entries: dict[str, Any], labelled: Labelled | None
) -> list[FieldIndex]:
    """Build every field's index; write the manifest, which makes the index version whole."""
    base = _base_manifest(run, task.space)
    indexes: list[FieldIndex] = []
    partials: list[str] = []
    for name in task.space.fields:
        with run.stage(f"index {name}") as counted:
            job = _index_job(run, task, name, base, ids=entries["ids"], labelled=labelled)
            clock = StepClock(name, run.progress)
            built = build_index(job, clock.begin)
            clock.end()
            counted["rows"] = built.index.ntotal
        for step, seconds in clock.seconds.items():
            run.add_stage(f"index {name}: {step}", seconds, counted["rows"])
        indexes.append(built.index)
        partials += built.partials
        run.log("index", field=name, action=built.index.action, reasons=built.index.reasons)
    # A reindex from stored vectors changes none, and does not count them.
    precisions = dict(task.live.precisions) or (base["precisions"] if base else {})
    _write_manifest(run, task, indexes, entries | {"precisions": precisions})
    _drop_partials(run, partials)
    return indexes


def _drop_partials(run: Run, partials: list[str]) -> None:
    """Delete the spilled parts, unless another job may be building from the same; gc would then."""
    if all(lease.run == run.run_id for lease in live_leases(run.store)):
        delete_partials(run.store, partials)


def _write_ids(run: Run, task: BuildTask) -> dict[str, Any]:
    """Write `ids.parquet` and `rows.parquet`, or keep those of the newest release."""
    if task.plan is not None:
        return write_ids(task.catalog, task.plan, task.live, run.store, run.run_id)
    if run.parent is None:
        raise ValueError("there is neither a scanned catalog nor a release")
    kept = run.store.read_json("indexes", run.parent.indexes, "manifest.json")
    return {name: kept[name] for name in ("ids", "rows")}


def _write_manifest(
    run: Run, task: BuildTask, indexes: list[FieldIndex], entries: dict[str, Any]
) -> None:
    manifest = {
        "format_version": MANIFEST_FORMAT,
        "run": run.run_id,
        "encoder": task.space.encoder,
        "products": task.live.rows.products,
        "most_images": task.live.rows.most_images,
        "fields": {index.field: describe_index(index) for index in indexes},
        **entries,
        "query": task.contract,
        "config": task.config.model_dump(mode="json"),
        "config_hash": task.config.hash(),
    }
    run.store.write_json(manifest, "indexes", run.run_id, "manifest.json")
