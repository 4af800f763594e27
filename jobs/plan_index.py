"""What building the indexes of a run takes: per field its spec, time, bytes and memory."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from indexing.spec import IndexSpec
from jobs.config import JobConfig
from jobs.errors import JobError
from jobs.index_choice import check_trainable, choose_spec, reasons_to_retrain
from jobs.index_files import count_partitions
from jobs.index_memory import add_bytes, merge_bytes, search_bytes, train_bytes
from jobs.plan_cluster import Cluster
from jobs.plan_rates import Figure, PastRun, scale_stage, train_rows
from jobs.space import VectorField

Action = Literal["train", "update", "keep", "unknown"]
STEPS: Mapping[Action, tuple[str, ...]] = {
    "train": ("exact search", "sample", "train", "add and merge", "measure"),
    "update": ("exact search", "update", "measure"),
    "keep": ("exact search", "measure"),
    "unknown": (),
}
SWEEP_POWER = 0.5  # docs/scale.md: 5.7 s for 60,000 vectors, 19.9 s for a million
CALIBRATED = "a short calibration, arithmetic alone: at least"


@dataclass(frozen=True, kw_only=True)
class IndexRates:
    """What a short calibration measured on one core with one field's index.

    Attributes:
        train_gflops: 10**9 operations of training a second.
        add_s: Seconds a vector; None where it can't be told from a small index.
        exact_s: Seconds a pair of query and vector.
    """

    train_gflops: float
    add_s: float | None
    exact_s: float


@dataclass(frozen=True, kw_only=True)
class FieldPlan:
    """What a run would do to one field's index.

    Attributes:
        spec: The index; None where the configuration asks for an impossible one.
        ntotal: Vectors that it would hold.
        why: Why nothing is known, or why it is trained.
        queries: Catalog vectors that are searched for.
    """

    field: VectorField = field(repr=False)
    action: Action
    spec: IndexSpec | None
    ntotal: int
    partitions: int
    train_rows: int
    queries: int
    why: str

    @property
    def name(self) -> str:
        """The stage's name."""
        return f"index {self.field.name}"

    @property
    def file_bytes(self) -> int:
        """About the bytes of the files that the run writes; 0 where they are kept."""
        if self.spec is None or self.action == "keep":
            return 0
        vector = self.spec.bytes_per_vector + self.spec.refine_bytes_per_vector
        return self.ntotal * vector + (1 + self.partitions) * self.spec.fixed_bytes

    @property
    def serving_bytes(self) -> int:
        """Most memory where it is served."""
        return self.spec.memory_bytes(self.ntotal, partitions=self.partitions) if self.spec else 0


def plan_field(
    config: JobConfig,
    vectors: VectorField,
    count: int,
    *,
    base: Mapping[str, Any] | None,
    changed: bool,
    retrain: bool,
) -> FieldPlan:
    """Decide what a run does to a field's index, as far as the configuration tells.

    Args:
        config: The job.
        vectors: The field.
        count: How many vectors the index will hold.
        base: The manifest of the newest release of the same encoder.
        changed: Whether rows are embedded or removed.
        retrain: Whether the command trains anew in any case.
    """
    entry = base["fields"].get(vectors.name) if base else None
    reasons = ["The command trains anew."] if retrain else ["There is no index to update."]
    action: Action = "train"
    try:
        if base and entry and not retrain:
            reasons = reasons_to_retrain(config.index, base["config"]["index"], entry, count)
            if not reasons:
                action = "update" if changed else "keep"
                reasons = ["Unless drift passes a limit, which is measured in the run."]
        spec, _ = choose_spec(config.index, count, vectors.dim)
        check_trainable(config.index, spec, count)
        if action != "train" and entry:
            spec = IndexSpec(**entry["spec"])
    except JobError as error:
        return _impossible(vectors, count, str(error))
    return FieldPlan(
        field=vectors,
        action=action,
        spec=spec,
        ntotal=count,
        partitions=count_partitions(count, config.index.max_partition_vectors),
        train_rows=train_rows(config.index, spec, count) if action == "train" else 0,
        queries=min(config.evaluate.sample_rows, count),
        why=" ".join(reasons),
    )


def _impossible(vectors: VectorField, count: int, why: str) -> FieldPlan:
    return FieldPlan(
        field=vectors,
        action="unknown",
        spec=None,
        ntotal=count,
        partitions=1,
        train_rows=0,
        queries=0,
        why=why,
    )


def index_times(
    plan: FieldPlan, past: Iterable[PastRun], cluster: Cluster, rates: IndexRates | None
) -> dict[str, Figure]:
    """Return the seconds of each step of a field's index.

    Args:
        plan: What is done.
        past: Earlier runs of the encoder, newest first.
        cluster: The machines.
        rates: Of a calibration; None: there was none.
    """
    if plan.action == "unknown":
        return {"": Figure(value=None, source=plan.why)}
    return {step: _time_step(plan, step, past, cluster, rates) for step in STEPS[plan.action]}


def _time_step(
    plan: FieldPlan,
    step: str,
    past: Iterable[PastRun],
    cluster: Cluster,
    rates: IndexRates | None,
) -> Figure:
    trains = step == "train"
    here = cluster.most_cpus if trains else cluster.cpus
    found = scale_stage(
        _past_steps(plan, step, past),
        _work(plan.spec, plan.ntotal, plan.train_rows, plan.queries, step),
        workers="most_cpus" if trains else "cpus",
        here=here,
        power=SWEEP_POWER if step == "measure" else 1.0,
    )
    if found is None and step == "update":  # adds no more than all vectors, and merges as many
        found = _time_step(plan, "add and merge", past, cluster, None)
        words = f"filling a new index took that long, {found.source}: at most"
        return found if found.value is None else replace(found, source=words)
    if (found is None or found.too_high) and rates is not None:
        calibrated = _calibrated(plan, step, rates, here)
        found = calibrated or found
    return found or Figure(value=None, source=f"no earlier run with this step of {plan.name}")


def _past_steps(
    plan: FieldPlan, step: str, past: Iterable[PastRun]
) -> Iterator[tuple[PastRun, float, float]]:
    """Yield the runs with a step over a like index: its seconds and its work."""
    for run in past:
        if plan.field.name not in run.indexes:
            continue
        spec, ntotal = run.indexes[plan.field.name]
        if step in ("train", "add and merge", "update") and not _is_alike(spec, plan.spec):
            continue
        rows = train_rows(run.config.index, spec, ntotal)
        queries = min(run.config.evaluate.sample_rows, ntotal)
        seconds = run.stages.get(f"{plan.name}: {step}", 0.0)
        yield run, seconds, _work(spec, ntotal, rows, queries, step)


def _is_alike(spec: IndexSpec, other: IndexSpec | None) -> bool:
    """Say whether two indexes do the same per vector, their number of lists apart."""
    if other is None or bool(spec.nlist) != bool(other.nlist):
        return False
    names = ("dim", "coarse", "rotation", "codec", "refine")
    return all(getattr(spec, name) == getattr(other, name) for name in names)


def _work(spec: IndexSpec | None, ntotal: int, rows: int, queries: int, step: str) -> float:
    if step == "train":
        return spec.training_gflops(rows) if spec else 0.0
    return float(ntotal * queries if step == "exact search" else ntotal)


def _calibrated(plan: FieldPlan, step: str, rates: IndexRates, cpus: int) -> Figure | None:
    if plan.spec is None:
        return None
    if step == "train":
        seconds = plan.spec.training_gflops(plan.train_rows) / rates.train_gflops / cpus
    elif step == "exact search":
        seconds = plan.ntotal * plan.queries * rates.exact_s / cpus
    elif step == "add and merge" and rates.add_s is not None:
        seconds = plan.ntotal * rates.add_s / cpus
    else:
        return None
    return Figure(value=seconds, source=CALIBRATED)


@dataclass(frozen=True, kw_only=True)
class TaskMemory:
    """The largest task of a stage.

    Attributes:
        bytes: About; an upper bound but for embedding; None: not known.
        fits: Whether the largest machine has it; None: one of the two isn't known.
        advice: What to do if not; else what the figure is.
    """

    task: str
    bytes: int | None
    fits: bool | None
    advice: str


def judge_memory(task: str, taken: int | None, cluster: Cluster, advice: str) -> TaskMemory:
    """Compare what a task takes with what the largest machine offers for tasks."""
    most = cluster.most_memory
    fits = None if taken is None or most is None else taken <= most
    return TaskMemory(task=task, bytes=taken, fits=fits, advice=advice)


def index_memory(config: JobConfig, plan: FieldPlan, cluster: Cluster) -> list[TaskMemory]:
    """Return the memory of the largest tasks of a field's index; see `jobs.index_memory`."""
    spec = plan.spec
    if spec is None:
        return []
    each = math.ceil(plan.ntotal / plan.partitions)
    rows = min(plan.ntotal, config.ray.bucket_rows)
    file_rows, columns = config.embed.rows_per_file, len(plan.field.columns)
    taken = {
        "search": (search_bytes(spec, each), "a smaller index.max_partition_vectors"),
    }
    if plan.action != "keep":
        taken["merge"] = (merge_bytes(spec, each), "a smaller index.max_partition_vectors")
        adding = add_bytes(spec, rows, file_rows, columns, plan.partitions)
        taken["add"] = (adding, "a smaller ray.bucket_rows")
    if plan.action == "train":
        taken["train"] = (train_bytes(spec, plan.train_rows), "a smaller index.train_rows")
    return [
        judge_memory(f"{plan.name}: {task}", size, cluster, f"{advice}, or a larger machine")
        for task, (size, advice) in reversed(taken.items())
    ]
