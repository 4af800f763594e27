"""The plan of a run: rows, time, bytes, memory and cost, before anything is embedded.

One function makes it for `vitrine plan`, for `refresh --dry-run`, and for the report of each run,
which shows it beside what came true. What no run has measured is None, and says why.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.config import JobConfig
from jobs.diff import Diff
from jobs.plan_cluster import Cluster
from jobs.plan_index import (
    FieldPlan,
    IndexRates,
    TaskMemory,
    index_memory,
    index_times,
    judge_memory,
    plan_field,
)
from jobs.plan_rates import (
    EmbedRate,
    Figure,
    PastRun,
    describe_cluster,
    find_embed_rate,
    plan_cost,
    read_past,
    scale_stage,
)
from jobs.run import Run
from jobs.space import VectorSpace
from jobs.store import Release

COMPARE = "compare the catalog with the store"
ROW_BYTES = 200  # what comparing takes a row of a bucket; see `jobs.diff`
PIXEL_BYTES = 3 * (1 + 4)  # as they come, and as float32


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run has to do.

    Attributes:
        command: refresh or reindex.
        to_embed: Rows.
        rows: Of the catalog.
        live: Rows of the release that would be made.
        products: Of it, about.
        changed: Whether rows are embedded or removed.
        idle: Whether there is nothing to do.
        rebuilds: Whether a reindex builds from stored embeddings.
    """

    command: str
    to_embed: int
    rows: int
    live: int
    products: int
    changed: bool = True
    idle: bool = False
    rebuilds: bool = False


def work_of(
    diff: Diff, products: int, parent: Release | None, *, command: str, idle: bool = False
) -> Work:
    """Return what a refresh has to do after a comparison.

    Args:
        diff: What was found.
        products: Of the catalog.
        parent: The newest release.
        command: What would do it.
        idle: See `jobs.pipeline.is_idle`.
    """
    live = diff.counts.live + diff.todo_rows
    share = parent.products / parent.vectors if parent and parent.vectors else 1.0
    return Work(
        command=command,
        to_embed=diff.todo_rows,
        rows=diff.plan.rows,
        live=live,
        products=min(products, round(live * share) if parent else live),
        changed=bool(diff.todo_rows or diff.counts.removed),
        idle=idle,
    )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measures what no earlier run tells; each is called only then.

    Attributes:
        embed: How fast rows are embedded.
        index: Field to rates.
    """

    embed: Callable[[], EmbedRate | None]
    index: Callable[[list[FieldPlan]], dict[str, IndexRates]] | None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The planned time of a stage, or of a step of it: its name is then `stage: step`."""

    stage: str
    seconds: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would take.

    Attributes:
        cluster: Its machines and embedding actors.
        rows: To embed, of the catalog, and live afterwards.
        stages: In their order.
        seconds: Of all stages that are known; None: none is.
        unknown: Stages and steps of which nothing is known.
        bytes: image: fetched; table: written; index: written, per field and in all; peak: of the
            store until `gc`.
        memory: The largest tasks.
        serving_bytes: Memory to serve, by field.
        cost: In the currency of the prices; None without prices.
        notes: What the figures rest on, in whole sentences.
    """

    command: str
    cluster: dict[str, Any]
    rows: dict[str, int]
    stages: tuple[Stage, ...]
    seconds: float | None
    unknown: tuple[str, ...]
    bytes: dict[str, Figure]
    memory: tuple[TaskMemory, ...]
    serving_bytes: dict[str, int]
    indexes: dict[str, str]
    cost: Figure | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a plan is made from.

    Attributes:
        base: The manifest of the newest release of the same encoder.
        past: Earlier runs of the encoder, newest first.
        weights_bytes: Of the checkpoint.
        store_bytes: What the store takes now; None: not asked.
        compared: Seconds of the comparison that was just made on this machine; None: none was.
    """

    config: JobConfig
    space: VectorSpace
    cluster: Cluster
    work: Work
    base: Mapping[str, Any] | None
    past: Iterable[PastRun]
    weights_bytes: int | None = None
    store_bytes: int | None = None
    compared: float | None = None


def read_given(
    run: Run, config: JobConfig, space: VectorSpace, cluster: Cluster, work: Work
) -> Given:
    """Read from the store what a plan is made from.

    Raises:
        StoreError: The releases or the newest one can't be read.
    """
    same = run.parent is not None and run.parent.encoder == space.encoder
    base = None
    if run.parent is not None and same:
        base = run.store.read_json("indexes", run.parent.indexes, "manifest.json")
    compared = next((one["seconds"] for one in run.stages if one["stage"] == COMPARE), None)
    return Given(
        config=config,
        space=space,
        cluster=cluster,
        work=work,
        base=base,
        past=read_past(run.store, space.encoder),
        compared=compared,
    )


def make_plan(given: Given, calibration: Calibration | None = None) -> Plan:
    """Plan a run.

    Args:
        given: What is known.
        calibration: Measures what no earlier run tells; None: that stays unknown.

    Raises:
        JobError: A step of the calibration failed.
    """
    work, config = given.work, given.config
    rate, why = _embed_rate(given, calibration)
    fields = [] if work.idle else _plan_fields(given)
    rates: dict[str, IndexRates] = {}
    if calibration and calibration.index:
        rates = calibration.index([one for one in fields if _lacks_rates(one, given)])
    stages = _time_stages(given, (rate, why), fields, rates)
    parts = {one.stage.rpartition(": ")[0] for one in stages}
    leaves = [one for one in stages if one.stage not in parts]
    known = [one.seconds for one in leaves if one.seconds is not None]
    seconds = sum(known) if known else None
    unknown = tuple(one.stage for one in leaves if one.seconds is None)
    return Plan(
        command=work.command,
        cluster=describe_cluster(given.cluster, config.embed),
        rows={"to_embed": work.to_embed, "catalog": work.rows, "live": work.live},
        stages=stages,
        seconds=seconds,
        unknown=unknown,
        bytes=_plan_bytes(given, (rate, why), fields),
        memory=_plan_memory(given, fields),
        serving_bytes={one.field.name: one.serving_bytes for one in fields if one.spec},
        indexes={one.field.name: _describe_field(one) for one in fields},
        cost=plan_cost(given.cluster, seconds, unknown),
        notes=_notes(given, rate),
    )


def _embed_rate(given: Given, calibration: Calibration | None) -> tuple[EmbedRate | None, str]:
    embedders, rows = given.cluster.embedders(given.config.embed), given.work.to_embed
    if not rows:
        return None, "nothing to embed"
    if not embedders.count:
        return None, "no machine has room for an embedding actor (embed.*_per_actor)"
    rate, why = find_embed_rate(given.past, embedders, rows)
    if rate is None and calibration is not None:
        rate = calibration.embed()
    return rate, why


def _plan_fields(given: Given) -> list[FieldPlan]:
    work, space = given.work, given.space
    return [
        plan_field(
            given.config,
            space.field(name),
            work.products if name == "text" else work.live,
            base=given.base,
            changed=work.changed,
            retrain=work.rebuilds,
        )
        for name in space.fields
        if work.live
    ]


def _lacks_rates(field: FieldPlan, given: Given) -> bool:
    times = index_times(field, given.past, given.cluster, None).values()
    return any(one.value is None or one.too_high for one in times)


def _time_stages(
    given: Given,
    embed: tuple[EmbedRate | None, str],
    fields: Sequence[FieldPlan],
    rates: Mapping[str, IndexRates],
) -> tuple[Stage, ...]:
    work, stages = given.work, list[Stage]()
    if work.rebuilds:
        stages.append(_scaled(given, "read the release's rows", work.live))
    else:
        stages.append(_time_compare(given))
    if work.idle:
        return tuple(stages)
    if not work.rebuilds:
        stages += [_time_embed(given, *embed), _scaled(given, "find the live rows", work.rows)]
    stages.append(_scaled(given, "write ids", work.live))
    if given.config.evaluate.queries is not None:
        stages.append(_scaled(given, "encode labelled queries", 0))
    for field in fields:
        times = index_times(field, given.past, given.cluster, rates.get(field.field.name))
        stages += _join_steps(field.name, times)
    return (*stages, _scaled(given, "measure queries", 0))


def _join_steps(name: str, times: Mapping[str, Figure]) -> list[Stage]:
    values = [one.value for one in times.values()]
    known = [value for value in values if value is not None]
    if "" in times:  # nothing is known, not even the steps
        return [Stage(stage=name, seconds=None, source=times[""].source)]
    total = sum(known) if len(known) == len(values) else None
    steps = [
        Stage(stage=f"{name}: {step}", seconds=one.value, source=one.source)
        for step, one in times.items()
    ]
    return [Stage(stage=name, seconds=total, source="its steps"), *steps]


def _time_compare(given: Given) -> Stage:
    found = _scaled(given, COMPARE, given.work.rows)
    if found.seconds is None and given.compared is not None:
        return Stage(stage=COMPARE, seconds=given.compared, source="just done on this machine")
    return found


def _scaled(given: Given, name: str, rows: int) -> Stage:
    past = ((run, run.stages.get(name, 0.0), float(run.rows.get(name, 0))) for run in given.past)
    found = scale_stage(past, rows, workers="cpus", here=given.cluster.cpus)
    if found is None:
        return Stage(stage=name, seconds=None, source="no earlier run")
    return Stage(stage=name, seconds=found.value, source=found.source)


def _time_embed(given: Given, rate: EmbedRate | None, why: str) -> Stage:
    rows = given.work.to_embed
    if rate is None:
        return Stage(stage="embed", seconds=None if rows else 0.0, source=why)
    embedders = given.cluster.embedders(given.config.embed)
    seconds = rate.seconds(rows, embedders, given.cluster.cpus)
    return Stage(stage="embed", seconds=seconds, source=rate.source)


def _plan_bytes(
    given: Given, embed: tuple[EmbedRate | None, str], fields: Sequence[FieldPlan]
) -> dict[str, Figure]:
    rate, why = embed
    rows = given.work.to_embed
    image = table = Figure(value=None if rows else 0, source=why)
    if rate is not None:
        image = Figure(value=rows * rate.image_bytes, source=rate.source)
        table = Figure(value=rows * rate.written_bytes, source=rate.source)
    impossible = next((one.why for one in fields if one.spec is None), None)
    index = Figure(value=None, source=impossible or "")
    if impossible is None:
        sizes = sum(one.file_bytes for one in fields)
        index = Figure(value=sizes, source="the specs; ids.parquet is not in it")
    return {"image": image, "table": table, "index": index, "peak": _peak(given, table, index)}


def _peak(given: Given, table: Figure, index: Figure) -> Figure:
    if given.store_bytes is None:
        return Figure(value=None, source="the store was not measured")
    if table.value is None or index.value is None:
        return Figure(value=None, source=table.source if table.value is None else index.source)
    peak = given.store_bytes + table.value + 2 * index.value
    words = "the store now, the table, and indexes twice: their parts are spilled before they merge"
    return Figure(value=peak, source=words)


def _plan_memory(given: Given, fields: Sequence[FieldPlan]) -> tuple[TaskMemory, ...]:
    config, work, cluster = given.config, given.work, given.cluster
    bucket = min(work.rows, config.ray.bucket_rows) * ROW_BYTES
    found = [judge_memory("compare", bucket, cluster, "a smaller ray.bucket_rows")]
    if work.to_embed:
        side = given.space.preprocess.size_px
        pixels = config.embed.batch_size * side * side * PIXEL_BYTES
        known = given.weights_bytes
        taken = None if known is None else known + pixels
        advice = "at least: weights and the pixels of a batch; a smaller embed.batch_size"
        found.append(judge_memory("embed", taken, cluster, advice))
    for field in fields:
        found += index_memory(config, field, cluster)
    return tuple(found)


def _describe_field(field: FieldPlan) -> str:
    if field.spec is None:
        return field.why
    return f"{field.action} {field.spec.factory}, {field.ntotal:,} vectors. {field.why}"


def _notes(given: Given, rate: EmbedRate | None) -> tuple[str, ...]:
    cluster = given.cluster
    notes = [
        *cluster.notes,
        "Time grows with rows and shrinks with workers; that ends where the network, the image "
        "servers or the store are the limit, which no plan sees.",
        "Machines count for the whole run; starting them is not in it.",
    ]
    if given.work.command == "reindex" and not given.work.rebuilds:
        notes.append("The store has another encoder's release: this is `vitrine reindex`.")
    embedders = cluster.embedders(given.config.embed)
    if rate is not None and embedders.gpus:
        needs, has = rate.needs_cpus(), cluster.cpus / max(1.0, cluster.gpus)
        notes.append(f"A GPU is fed by about {needs:.3g} CPUs; here are {has:.3g} for each.")
        notes.append("The GPU is taken to be as fast as that of the run: a file names no kind.")
    sizes = [one for one in cluster.machines if one.count and one.cpus]
    unsaid = [one.type for one in sizes if one.memory_bytes is None]
    if unsaid:
        words = f"The file doesn't say the memory of {', '.join(unsaid)}: resources.memory would."
        notes.append(words)
    return tuple(notes)
