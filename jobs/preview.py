"""`plan` and `refresh --dry-run`: what a run would do and take; no row and no release is changed.

`plan` keeps what it made as `runs/<run>/plan.json`; a dry run keeps nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from encoders.checkpoint_files import checkpoint_files
from jobs.catalog import Catalog
from jobs.cluster import ray_session
from jobs.config import JobConfig
from jobs.diff import Diff
from jobs.errors import ConfigError
from jobs.files import list_files
from jobs.inputs import find_contract, made_encoder, open_catalog, read_fusion
from jobs.items import read_unit
from jobs.pipeline import choose_precision, compare, describe_counts, is_idle
from jobs.plan import Calibration, make_plan, read_given, work_of
from jobs.plan_cluster import Cluster, add_prices, live_cluster, read_cluster
from jobs.plan_index import FieldPlan, IndexRates
from jobs.plan_probe import probe_embedding, probe_indexes
from jobs.plan_rates import EmbedRate
from jobs.plan_truth import write_plan
from jobs.progress import Progress
from jobs.run import Run
from jobs.schemas import vector_id
from jobs.space import VectorSpace, resolve_fields
from jobs.state import read_data_file
from jobs.store import Store
from jobs.tasks import gather

KEPT = ("embeddings", "indexes", "checkpoints")


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a refresh would do, in rows (product images).

    Attributes:
        counts: By kind: new, changed (changed_text, changed_image: by that alone), removed,
            unchanged, metadata_changed, retried, formerly_rejected.
        examples: Kind to product ids.
        to_embed: Rows that would be embedded.
        up_to_date: Whether a refresh would do nothing; see `jobs.pipeline.is_idle`.
        plan: See `jobs.plan.Plan`.
        address: Of the plan that was written; empty: none was.
    """

    rows: int
    release: int | None
    counts: dict[str, int]
    examples: dict[str, list[str]]
    to_embed: int
    up_to_date: bool
    plan: dict[str, Any]
    address: str = ""


def plan_run(
    config: JobConfig,
    progress: Progress,
    *,
    cluster: Path | None = None,
    workers: Sequence[str] = (),
    prices: Sequence[str] = (),
) -> Preview:
    """Plan the next refresh, or the reindex that another encoder asks for, and keep the plan.

    Args:
        config: The job.
        progress: Shows what happens.
        cluster: A Ray cluster file, for whose machines it is planned; None: those of Ray.
        workers: See `jobs.plan_cluster.read_cluster`.
        prices: See `jobs.plan_cluster.add_prices`.

    Raises:
        ConfigError: Cluster file, workers or prices can't be used.
        JobError: As a refresh, before anything is embedded; or a step of a calibration failed.
    """
    if workers and cluster is None:
        raise ConfigError("--workers counts the machines of a cluster file: name it by --cluster")
    planned = None if cluster is None else add_prices(read_cluster(cluster, workers), prices)
    run = Run("plan", Store(config.store), progress, writes=False)
    fields = resolve_fields(config.embed, read_fusion(config.encoder))
    catalog = open_catalog(config.catalog, fields)
    with made_encoder(config, run.store) as (directory, space), ray_session(config.ray):
        planned = planned or add_prices(live_cluster(config.ray.address), prices)
        diff = compare(run, config, catalog, space)
        preview = make_preview(run, config, catalog, diff, (directory, space), planned)
        with run.stage("write the plan"):
            address = write_plan(run, config, space, preview.plan, of_ray=cluster is None)
    return replace(preview, address=address)


def make_preview(
    run: Run,
    config: JobConfig,
    catalog: Catalog,
    diff: Diff,
    encoder: tuple[Path, VectorSpace],
    cluster: Cluster | None = None,
) -> Preview:
    """Describe a diff and plan what it takes.

    Args:
        run: The run.
        config: The job.
        catalog: The checked catalog.
        diff: What was found.
        encoder: Folder of the checkpoint, and what the job makes of it.
        cluster: The machines of a whole plan; None: those of Ray, and a short plan, for which no
            index is calibrated and nothing is written.

    Raises:
        JobError: A step of the calibration failed.
    """
    short, live = cluster is None, live_cluster(config.ray.address)
    planned = cluster or live
    other = run.parent is not None and run.parent.encoder != encoder[1].encoder
    parent = None if other else run.parent
    command = "reindex" if other else "refresh"
    idle = is_idle(run, diff, config)
    work = work_of(diff, catalog.rows, parent, command=command, idle=idle)
    given = read_given(run, config, encoder[1], planned, work)
    given = replace(
        given,
        weights_bytes=sum((encoder[0] / n).stat().st_size for n in checkpoint_files(encoder[0])),
        store_bytes=None if short else _store_bytes(run.store),
    )
    embeds = partial(_calibrate, run, config, catalog, diff, encoder, live, planned)
    indexes = None if short else partial(_calibrate_indexes, run, seed=config.index.seed)
    # A dry run writes nothing, and machines of a cluster share nothing but the store.
    dry = short and config.ray.address is not None
    plan = make_plan(given, None if dry else Calibration(embed=embeds, index=indexes))
    return Preview(
        rows=diff.plan.rows,
        release=run.parent.version if run.parent else None,
        counts=describe_counts(diff.counts),
        examples=_name_examples(catalog, run.store, diff),
        to_embed=diff.todo_rows,
        up_to_date=idle,
        plan=asdict(plan),
    )


def _calibrate(
    run: Run,
    config: JobConfig,
    catalog: Catalog,
    diff: Diff,
    encoder: tuple[Path, VectorSpace],
    live: Cluster,
    planned: Cluster,
) -> EmbedRate | None:
    """Embed some rows, unless the planned machines embed on another kind than those of now."""
    embed = config.embed
    if bool(live.embedders(embed).gpus) != bool(planned.embedders(embed).gpus):
        return None
    with run.stage("calibrate embedding"):
        if embed.precision == "auto":
            chosen = choose_precision(embed, find_contract(run.store, *encoder))
            config = config.model_copy(update={"embed": chosen})
        return probe_embedding(run, config, catalog, diff, encoder, live)


def _calibrate_indexes(run: Run, plans: list[FieldPlan], *, seed: int) -> dict[str, IndexRates]:
    if not plans:
        return {}
    with run.stage("calibrate indexes"):
        return probe_indexes(plans, seed)


def _store_bytes(store: Store) -> int:
    return sum(file.size_bytes for folder in KEPT for file in list_files(store, folder))


def _name_examples(catalog: Catalog, store: Store, diff: Diff) -> dict[str, list[str]]:
    files = store.embedding_files(diff.version)
    names: dict[str, list[str]] = {}
    for kind, found in diff.counts.examples.items():
        if kind == "removed":
            names[kind] = gather([_read_removed.remote(store, files[f], r) for _, f, r in found])
        else:
            names[kind] = gather([_read_name.remote(catalog, v, unit) for v, unit in found])
    return {kind: found for kind, found in names.items() if found}


@ray.remote(num_cpus=1)
def _read_removed(store: Store, file: str, row: int) -> str:
    table = read_data_file(store, file, ["product_id"])
    return str(table["product_id"][row].as_py())


@ray.remote(num_cpus=1)
def _read_name(catalog: Catalog, wanted: int, unit: int) -> str:
    """Return the product that a vector id of a unit belongs to, with its image's number."""
    physical = catalog.columns["product_id"]
    for _, table in read_unit(catalog, catalog.units[unit], [physical]):
        for name in table[physical].to_pylist():
            first = vector_id(name, 0)
            if first == wanted:
                return str(name)
            if first >> 47 == wanted >> 47:
                number = next((n for n in range(1, 1000) if vector_id(name, n) == wanted), None)
                if number is not None:
                    return f"{name} (image {number})"
    return f"vector id {wanted}"
