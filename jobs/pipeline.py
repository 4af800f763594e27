"""From a catalog to a release: compare, embed, build, gate, publish.

What `refresh` runs, and `reindex` where the encoder is another one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from jobs.build import BuildTask, build_version
from jobs.catalog import Catalog
from jobs.config import EmbedConfig, JobConfig
from jobs.contract import allowed_precision
from jobs.diff import Counts, Diff, compare_with_store, read_retry
from jobs.embed import EmbedResult, embed_rows
from jobs.embed_steps import EmbedTask
from jobs.errors import FingerprintError
from jobs.gate import Built
from jobs.index_choice import check_factory
from jobs.inputs import add_encoder, open_catalog, read_fusion
from jobs.leases import FILE as LEASE
from jobs.live import join_live
from jobs.machines import check_shared, without_cut_off
from jobs.plan import work_of
from jobs.plan_truth import plan_of_run
from jobs.publish import Changes, RunResult, conclude
from jobs.report import write_idle_report
from jobs.run import Run
from jobs.space import VectorSpace, resolve_fields
from jobs.storage import open_filesystem
from jobs.store import Release

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run starts from.

    Attributes:
        contract: The query contract of the release it would make.
    """

    config: JobConfig
    catalog: Catalog
    space: VectorSpace
    contract: dict[str, Any]


def open_inputs(config: JobConfig, run: Run) -> Inputs:
    """Open the catalog for the configured fields, and put the encoder into the store.

    Raises:
        CatalogError: See `jobs.inputs.open_catalog`.
        ConfigError: See `jobs.inputs.add_encoder`; or the index doesn't go with the vectors.
    """
    fields = resolve_fields(config.embed, read_fusion(config.encoder))
    catalog = open_catalog(config.catalog, fields)
    space, contract = add_encoder(config, run.store)
    check_factory(config.index, [space.field(name).dim for name in space.fields])
    return Inputs(config=config, catalog=catalog, space=space, contract=contract)


def on_machines(run: Run, inputs: Inputs, work: Callable[[], Result]) -> Result:
    """Do a run's work on machines that all reach the store and the catalog.

    Args:
        run: The run; it holds its lease.
        inputs: What it starts from.
        work: Goes on from what is committed, however often it is begun.

    Raises:
        JobError: The work's own; or a machine does not see a local folder that the driver sees.
    """
    needed = [run.store.uri("runs", run.run_id, LEASE), _first_file(inputs.catalog)]
    check_shared([*needed, inputs.config.evaluate.queries])
    return without_cut_off(work, needed, run.begin_again)


def _first_file(catalog: Catalog) -> str:
    return str(open_filesystem(catalog.root)[0].unstrip_protocol(catalog.files[0]))


def check_same_encoder(run: Run, space: VectorSpace) -> None:
    """Refuse an encoder that isn't the newest release's.

    Raises:
        FingerprintError: It is another one.
    """
    if run.parent is not None and run.parent.encoder != space.encoder:
        theirs = run.store.uri("checkpoints", run.parent.encoder)
        copy = "" if run.store.is_local else "a local copy of "
        raise FingerprintError(
            f"store {run.store.root} serves embeddings of encoder {run.parent.encoder[:12]}, the "
            f"config names {space.encoder[:12]}: `vitrine reindex` embeds everything with it and "
            f"switches in one commit; or keep that encoder (encoder.checkpoint: {copy}{theirs})"
        )


def compare(run: Run, config: JobConfig, catalog: Catalog, space: VectorSpace) -> Diff:
    """Compare the catalog with the store.

    Raises:
        CatalogError: A product id is null, empty or occurs twice, or a file is damaged.
        JobError: A machine of the cluster does not see the catalog that the driver sees.
        StoreError: The table or the newest release can't be read.
    """
    check_shared([_first_file(catalog)])
    with run.stage("compare the catalog with the store") as counted:
        diff = compare_with_store(
            catalog,
            run.store,
            space.encoder,
            space.recipe,
            images=config.images,
            bucket_rows=config.ray.bucket_rows,
            parent=_parent_of(run, space),
            retry=read_retry(config, _parent_of(run, space)),
        )
        counted["rows"] = diff.plan.rows
    run.log("diff", up_to_date=diff.up_to_date, **describe_counts(diff.counts))
    return diff


def describe_counts(counts: Counts) -> dict[str, int]:
    """Return the counts of a diff as plain values."""
    names = ("new", "changed", "changed_text", "changed_image", "removed", "unchanged")
    more = ("metadata_changed", "retried", "formerly_rejected")
    return {name: getattr(counts, name) for name in (*names, *more)}


def _parent_of(run: Run, space: VectorSpace) -> Release | None:
    """Return the newest release if its rows are of the same encoder."""
    same = run.parent is not None and run.parent.encoder == space.encoder
    return run.parent if same else None


def refresh_catalog(run: Run, inputs: Inputs, *, publish: bool = True) -> RunResult:
    """Embed what changed, build every index, publish if quality holds.

    Args:
        run: The run.
        inputs: What it starts from.
        publish: Whether to publish; else the release is left as a candidate.

    Raises:
        JobError: See `jobs.errors`; what was embedded stays for the next run.
    """
    config = inputs.config
    diff = compare(run, config, inputs.catalog, inputs.space)
    if run.parent and is_idle(run, diff, config):
        return _nothing_to_do(run, run.parent, diff)
    work = work_of(diff, inputs.catalog.rows, _parent_of(run, inputs.space), command=run.command)
    plan = plan_of_run(run, config, inputs.space, work)
    task = EmbedTask(
        catalog=inputs.catalog,
        images=config.images,
        embed=choose_precision(config.embed, inputs.contract),
        store=run.store,
        space=inputs.space,
        generation=run.new_generation(diff.counts.generation),
    )
    embedded = _embed(run, task, diff)
    build, built = _build(run, inputs, diff)
    changes = Changes(counts=diff.counts, embedded=embedded, plan=plan)
    return conclude(run, build, built, changes, publish=publish)


def choose_precision(embed: EmbedConfig, contract: dict[str, Any]) -> EmbedConfig:
    """Leave "auto" to the actors' machines only where bf16 keeps the vectors' directions."""
    allowed = allowed_precision(contract) if embed.precision == "auto" else embed.precision
    return embed.model_copy(update={"precision": allowed})


def is_idle(run: Run, diff: Diff, config: JobConfig) -> bool:
    """Say whether a refresh has nothing to do: neither the catalog nor the configuration changed.

    Raises:
        StoreError: The newest release can't be read.
    """
    if run.parent is None or not diff.up_to_date:
        return False
    return _builds_the_same(run, run.parent, config)


def _builds_the_same(run: Run, parent: Release, config: JobConfig) -> bool:
    """Say whether the newest release was built and measured as the configuration says."""
    before = run.store.read_json("indexes", parent.indexes, "manifest.json")["config"]
    now = config.model_dump(mode="json")
    return all(before[name] == now[name] for name in ("embed", "index", "evaluate"))


def _embed(run: Run, task: EmbedTask, diff: Diff) -> EmbedResult:
    with run.stage("embed") as counted, run.progress.count(diff.todo_rows) as shown:
        result = embed_rows(task, diff, shown.update)
        counted["rows"] = result.embedded + result.rejected
    for name, seconds in result.seconds.items():
        run.add_stage(f"embed: {name.removesuffix('_s')}", seconds, counted["rows"])
    return result


def _build(run: Run, inputs: Inputs, diff: Diff) -> tuple[BuildTask, Built]:
    with run.stage("find the live rows") as counted:
        version = run.store.embeddings().version()
        live = join_live(
            diff.plan,
            run.store,
            version,
            inputs.space.encoder,
            bucket_rows=inputs.config.ray.bucket_rows,
            parent=_parent_of(run, inputs.space),
        )
        counted["rows"] = diff.plan.rows
    task = BuildTask(
        config=inputs.config,
        catalog=inputs.catalog,
        space=inputs.space,
        contract=inputs.contract,
        live=live,
        plan=diff.plan,
        version=version,
    )
    return task, build_version(run, task)


def _nothing_to_do(run: Run, parent: Release, diff: Diff) -> RunResult:
    """Report that the newest release already shows the catalog as it is."""
    run.log("nothing to do", release=parent.version)
    run.count("idle")
    address = write_idle_report(run, parent)
    run.write_log()
    return RunResult(
        release=parent.version,
        published=False,
        candidate="",
        report=address,
        run=run.run_id,
        rows=parent.rows,
        products=parent.products,
        live=parent.vectors,
        rejected=parent.rejected,
        new=0,
        changed=0,
        removed=0,
        unchanged=diff.counts.unchanged,
        metadata_changed=0,
        embedded=0,
    )
