"""Builds an index version from live rows: indexes, ids, manifest, and what is measured of them."""

from dataclasses import asdict, dataclass
from typing import Any

from jobs.catalog import Catalog
from jobs.config import JobConfig
from jobs.contract import read_contract
from jobs.diff import Plan
from jobs.gate import Built, read_placeholders, summarize_rows
from jobs.ids import write_ids
from jobs.index import FieldIndex, IndexJob, build_index, reasons_to_retrain
from jobs.live import Live
from jobs.queries import Measured, measure_queries
from jobs.run import Run
from jobs.search import FORMAT_VERSION
from jobs.space import VectorSpace


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
        base = _base_manifest(run, task.space)
        for name in task.space.fields:
            with run.stage(f"index {name}") as counted:
                indexes.append(build_index(_index_job(run, task, name, base), run.progress.step))
                counted["rows"] = indexes[-1].ntotal
            run.log("index", field=name, action=indexes[-1].action, reasons=indexes[-1].reasons)
        with run.stage("write ids and manifest") as counted:
            entry = _write_manifest(run, task, indexes)
            counted["rows"] = live.rows.vectors
        placeholders = read_placeholders(run.store, entry, live)
        with run.stage("measure queries") as counted:
            measured = measure_queries(
                task.config.evaluate,
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


def _base_manifest(run: Run, space: VectorSpace) -> dict[str, Any] | None:
    """Return the parent's manifest if its vectors were made by the same encoder."""
    if run.parent is None or run.parent.encoder != space.encoder:
        return None
    return run.store.read_json("indexes", run.parent.indexes, "manifest.json")


def _index_job(run: Run, task: BuildTask, name: str, base: dict[str, Any] | None) -> IndexJob:
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
    )


def _write_manifest(run: Run, task: BuildTask, indexes: list[FieldIndex]) -> dict[str, Any]:
    """Write ids.parquet and, last of all, the manifest that makes the index version whole."""
    if task.plan is not None:
        entries = write_ids(task.catalog, task.plan, task.live, run.store, run.run_id)
    elif run.parent is not None:
        kept = run.store.read_json("indexes", run.parent.indexes, "manifest.json")
        entries = {name: kept[name] for name in ("ids", "rows")}
    else:
        raise ValueError("there is neither a scanned catalog nor a release")
    manifest = {
        "format_version": FORMAT_VERSION,
        "run": run.run_id,
        "encoder": task.space.encoder,
        "products": task.live.rows.products,
        "most_images": task.live.rows.most_images,
        "fields": {index.field: asdict(index) for index in indexes},
        **entries,
        "query": task.contract,
        "config": task.config.model_dump(mode="json"),
        "config_hash": task.config.hash(),
    }
    run.store.write_json(manifest, "indexes", run.run_id, "manifest.json")
    return entries["ids"]
