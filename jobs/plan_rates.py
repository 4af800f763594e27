"""What earlier runs of a store measured, and how it scales to another run.

Time is taken to grow with the work and to shrink with the workers. A rate is never taken from
another kind of machine: that of a GPU comes from a run on GPUs alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from indexing.spec import IndexSpec
from jobs.config import EmbedConfig, IndexConfig, JobConfig
from jobs.embed_actors import LEAST_ROWS
from jobs.errors import StoreError
from jobs.index import MIN_TRAIN_ROWS, TRAIN_ROWS_A_LIST
from jobs.plan_cluster import Cluster, Embedders
from jobs.storage import StorageError
from jobs.store import Store

PAST_RELEASES = 20
HOUR_S = 3600.0
ENOUGH_ROWS = 1_000  # embedded by a run whose rate says something
ENOUGH_SHARE = 0.1  # of the planned work: a smaller run is mostly start-up
PREPARING = ("fetch", "decode", "tokenize", "write")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """A finished run with the same encoder, by its report.

    Attributes:
        machines: What it ran on, in words.
        cpus: Of all its machines.
        most_cpus: Of the largest.
        embedders: Its embedding actors.
        stages: Seconds of each stage and step, by name.
        rows: Rows of each.
        embedded: Rows that it embedded or rejected.
        precisions: In which it embedded rows: fp32, bf16, both or none.
        embed_s: Of the whole embedding stage.
        image_bytes: Fetched.
        written_bytes: Of the embeddings table.
        indexes: Field to its spec and how many vectors it holds.
    """

    run: str
    config: JobConfig = field(repr=False)
    machines: str
    cpus: int
    most_cpus: int
    embedders: Embedders
    stages: Mapping[str, float]
    rows: Mapping[str, int]
    embedded: int
    precisions: frozenset[str]
    embed_s: float
    image_bytes: int
    written_bytes: int
    indexes: Mapping[str, tuple[IndexSpec, int]]


@dataclass(frozen=True, kw_only=True)
class PastRuns:
    """Earlier runs of one encoder, newest first; a report is read when it is come to, once.

    Iterating raises StoreError where the store doesn't answer.
    """

    store: Store
    runs: tuple[str, ...]
    _found: dict[str, PastRun | None] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[PastRun]:
        """Yield those whose report is there and says all that a plan needs."""
        for run in self.runs:
            if run not in self._found:
                self._found[run] = _read_run(self.store, run)
            if (found := self._found[run]) is not None:
                yield found


def read_past(store: Store, encoder: str) -> PastRuns:
    """Find the runs of the newest releases of one encoder.

    Raises:
        StoreError: The releases can't be read.
    """
    releases = [one for one in store.releases() if one.encoder == encoder][:PAST_RELEASES]
    return PastRuns(store=store, runs=tuple(dict.fromkeys(one.run for one in releases)))


def _read_run(store: Store, run: str) -> PastRun | None:
    try:
        return _parse_report(run, store.read_json("runs", run, "report.json"))
    except StorageError:
        raise
    except StoreError:  # gc removes old reports
        return None
    except (KeyError, TypeError, ValueError):  # a rollback's, or of another version
        return None


def _parse_report(run: str, report: Mapping[str, Any]) -> PastRun:
    stages = {one["stage"]: float(one["seconds"]) for one in report["stages"]}
    rates = {one["stage"]: one["rows_per_s"] or 0.0 for one in report["stages"]}
    cluster = report["cluster"]
    done = {"fp32": report["rows_fp32"], "bf16": report["rows_bf16"]}
    return PastRun(
        run=run,
        machines=str(cluster["name"]),
        cpus=int(cluster["cpus"]),
        most_cpus=int(cluster["most_cpus"]),
        embedders=Embedders(**cluster["embedders"]),
        embedded=int(report["embedded"] + report["rejected_in_run"]),
        precisions=frozenset(name for name, rows in done.items() if rows),
        embed_s=float(report["embed_s"]),
        image_bytes=int(report["image_bytes"]),
        written_bytes=int(report["written_bytes"]),
        config=JobConfig.model_validate(report["config"]),
        stages=stages,
        rows={name: round(rates[name] * seconds) for name, seconds in stages.items()},
        indexes={
            one["field"]: (IndexSpec(**one["spec"]), one["ntotal"]) for one in report["indexes"]
        },
    )


def describe_cluster(cluster: Cluster, embed: EmbedConfig) -> dict[str, Any]:
    """Return what a report says of the machines that a run had: rates are scaled by it."""
    return {
        "name": cluster.name,
        "machines": [asdict(one) for one in cluster.machines],
        "cpus": cluster.cpus,
        "most_cpus": cluster.most_cpus,
        "gpus": cluster.gpus,
        "accelerators": list(cluster.accelerators),
        "embedders": asdict(cluster.embedders(embed)),
    }


@dataclass(frozen=True, kw_only=True)
class EmbedRate:
    """How fast some actors embedded.

    Attributes:
        source: Where it was measured, in words.
        rows: How many rows it was measured on.
        start_s: Seconds that no worker spent on a row: starting actors, loading weights.
        steps: Seconds of one worker a row, by step: fetch, decode, tokenize, embed, write.
        image_bytes: Fetched, a row.
        written_bytes: Of the embeddings table, a row.
    """

    source: str
    rows: int
    embedders: Embedders
    start_s: float
    steps: Mapping[str, float]
    image_bytes: float
    written_bytes: float

    def seconds(self, rows: int, embedders: Embedders, cpus: int) -> float:
        """Return the seconds of a stage: start-up, and the rows divided among the workers.

        On GPUs decoding runs beside them, on all CPUs: the slower of the two sets the pace.

        Args:
            rows: To embed.
            embedders: Of the planned run, of the same kind.
            cpus: Of all its machines.
        """
        if not rows:
            return 0.0
        busy = max(1, min(embedders.count, -(-rows // LEAST_ROWS)))
        prepare = sum(self.steps.get(name, 0.0) for name in PREPARING)
        embed = self.steps.get("embed", 0.0)
        if embedders.gpus:
            gpu_s = rows * embed * self.embedders.gpus / (busy * embedders.gpus)
            return self.start_s + max(gpu_s, rows * prepare / cpus)
        forward = embed * self.embedders.threads / embedders.threads
        return self.start_s + rows * (prepare + forward) / busy

    def needs_cpus(self) -> float:
        """Return how many CPUs fetch and decode what one GPU embeds."""
        embed = self.steps.get("embed", 0.0) * max(self.embedders.gpus, 1e-9)
        return sum(self.steps.get(name, 0.0) for name in PREPARING) / max(embed, 1e-9)


def find_embed_rate(
    past: Iterable[PastRun], embedders: Embedders, rows: int
) -> tuple[EmbedRate | None, str]:
    """Return the rate of the newest run that embedded enough, else of the largest.

    Args:
        past: Runs of the encoder, newest first.
        embedders: Of the planned run: on GPUs or not, and how precisely; auto fits any precision.
        rows: To embed.

    Returns:
        The rate; or None, and why there is none.
    """
    kind = "a GPU" if embedders.gpus else "CPUs"
    same = ((one, one.embedded) for one in past if _is_same_kind(one, embedders))
    found, _ = _choose(same, min(ENOUGH_ROWS, ENOUGH_SHARE * rows))
    if found is None:
        precisely = "" if embedders.precision == "auto" else f" in {embedders.precision}"
        return None, f"no earlier run on {kind}{precisely}"
    return _rate_of(found[0]), ""


def _is_same_kind(run: PastRun, embedders: Embedders) -> bool:
    had = run.embedders
    precise = embedders.precision == "auto" or run.precisions == {embedders.precision}
    same = bool(had.gpus) == bool(embedders.gpus) and precise
    return same and had.count > 0 and run.embedded > 0


def name_precisions(names: Iterable[str]) -> str:
    """Return words such as " in fp32", to follow a number of rows; empty for none."""
    words = " and ".join(sorted(names))
    return f" in {words}" if words else ""


def _rate_of(run: PastRun) -> EmbedRate:
    rows = run.embedded
    steps = {
        name.removeprefix("embed: "): seconds / rows
        for name, seconds in run.stages.items()
        if name.startswith("embed: ")
    }
    rate = EmbedRate(
        source=f"run {run.run}, {rows:,} rows{name_precisions(run.precisions)} on {run.machines}",
        rows=rows,
        embedders=run.embedders,
        start_s=0.0,
        steps=steps,
        image_bytes=run.image_bytes / rows,
        written_bytes=run.written_bytes / rows,
    )
    working = rate.seconds(rows, rate.embedders, run.cpus)
    return replace(rate, start_s=max(0.0, run.embed_s - working))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One planned number; None where nothing is known.

    Attributes:
        value: Seconds or bytes.
        source: What it is taken from, or why it is unknown.
        too_high: Whether it is scaled from a run of far less work, which was mostly start-up.
    """

    value: float | None
    source: str
    too_high: bool = False


def scale_stage(
    past: Iterable[tuple[PastRun, float, float]],
    work: float,
    *,
    workers: str,
    here: int,
    power: float = 1.0,
) -> Figure | None:
    """Scale the seconds of the newest run of enough work, else of the one with most.

    Args:
        past: Runs with the stage, newest first; its seconds, and its work.
        work: Of the planned stage, in the same unit; 0: it takes as long as it took.
        workers: What of a run it shrinks with: cpus, or most_cpus.
        here: That of the planned run.
        power: How time grows with work.

    Returns:
        None if no run has the stage.
    """
    timed = (((run, seconds), done) for run, seconds, done in past if seconds > 0)
    found, enough = _choose(timed, ENOUGH_SHARE * work)
    if found is None:
        return None
    (run, seconds), done = found
    ratio = work / done if work and done else 1.0
    value = seconds * float(ratio**power) * getattr(run, workers) / max(1, here)
    far = "" if enough else f", of {1 / ratio:.1%} of this work: start-up makes it too high"
    return Figure(value=value, source=f"run {run.run}{far}", too_high=not enough)


def _choose(past: Iterable[tuple[T, float]], enough: float) -> tuple[tuple[T, float] | None, bool]:
    """Return the first that did enough work, else the one with most; and whether it was enough.

    What comes after the first is not asked for: each run is a report to read.
    """
    small = []
    for one in past:
        if one[1] >= enough:
            return one, True
        small.append(one)
    return max(small, key=lambda one: one[1], default=None), False


def train_rows(config: IndexConfig, spec: IndexSpec, count: int) -> int:
    """Return how many rows train an index; see `jobs.index`."""
    wanted = config.train_rows or max(MIN_TRAIN_ROWS, TRAIN_ROWS_A_LIST * spec.nlist)
    return min(wanted, count) if spec.nlist else 0


def plan_cost(cluster: Cluster, seconds: float | None, unknown: Sequence[str]) -> Figure | None:
    """Return hours times the prices that are given; None without any.

    Args:
        cluster: The machines, all of which run to the end.
        seconds: Of the stages that are known.
        unknown: The others.
    """
    running = [one for one in cluster.machines if one.count]
    priced = [one for one in running if one.price_per_hour is not None]
    if not priced:
        return None
    if seconds is None:
        return Figure(value=None, source="no time is known")
    an_hour = sum(one.count * (one.price_per_hour or 0.0) for one in priced)
    missing = ", ".join(one.type for one in running if one.price_per_hour is None)
    source = f"{seconds / HOUR_S:.3g} hours at {an_hour:g} an hour"
    source += f"; without {missing}, whose price is not given" if missing else ""
    source += f"; at least: the time of {', '.join(unknown)} is unknown" if unknown else ""
    return Figure(value=seconds / HOUR_S * an_hour, source=source)
