"""The index stage: live rows of the embeddings table in, measured index files out.

A field at a time. A trained index is updated as long as the drift that is measured of it stays
within the limits: stale ids out, fresh vectors in, written beside the old files. Else a uniform
sample trains an empty template, Ray tasks fill clones of it and spill them to the store, and a
task a partition merges them. Exact search over the same rows measures the result.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import ray

from indexing.choose import HELD_OUT_SHARE
from indexing.drift import IndexHealth, find_drift
from indexing.search import SearchPoint
from indexing.spec import IndexSpec
from jobs import index_tasks
from jobs.cluster import gather, largest_node_cpus, watch
from jobs.config import IndexConfig
from jobs.errors import ConfigError
from jobs.index_files import FieldFiles, IndexFile, count_partitions, read_files, read_point
from jobs.index_tasks import Changes, Target
from jobs.labelled import Labelled
from jobs.live import Live
from jobs.measure import (
    Measurement,
    Queries,
    measure_index,
    point_name,
    sample_queries,
)
from jobs.partials import Partial
from jobs.space import VectorField
from jobs.store import Store
from jobs.vectors import MAX_KEY, Draw, sample_vectors

TRAIN_ROWS_A_LIST = 64
MIN_TRAIN_ROWS = 65_536  # what FAISS takes at most for a PQ codebook of 256 centroids
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class FieldIndex:
    """One published index and what was measured of it.

    Attributes:
        template: The trained index without a vector.
        partitions: Its files, by range of vector ids.
        size_bytes: Of all files that serving opens.
        memory_bytes: What they take in memory, by the spec's estimate.
        action: trained, updated, or kept where no vector of it changed.
        reasons: Whole sentences: why it was trained anew, or what the update did.
        why: One sentence for each choice made from the catalog's size.
        trained: Health when its quantizers were trained, the operating point of then, and the
            key limit of the rows that were held out of the training.
        point: The operating point: what a search uses that is given nothing else.
        curve: All points that no other one beats; see `indexing.tune.MeasuredPoint`.
        measured: What was measured at the operating point.
    """

    field: str
    template: IndexFile
    partitions: tuple[Any, ...]
    size_bytes: int
    memory_bytes: int
    spec: dict[str, Any]
    factory: str
    action: str
    reasons: tuple[str, ...]
    why: tuple[str, ...]
    trained: dict[str, Any]
    ntotal: int
    point: dict[str, Any]
    curve: tuple[dict[str, Any], ...]
    measured: Measurement


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """What building the index of one field takes.

    Attributes:
        folder: Below `indexes/`: where files are written.
        sample_rows: Most vectors that are used as queries.
        base: The manifest's entry of the newest release's index in the same vector space.
        retrain: Why it can't be updated; empty if it can.
        ids: The manifest's entry of `ids.parquet`.
        labelled: Labelled queries with their vectors; None without any.
    """

    store: Store
    field: VectorField
    live: Live
    config: IndexConfig
    folder: str
    sample_rows: int
    base: dict[str, Any] | None
    retrain: tuple[str, ...]
    ids: dict[str, Any]
    labelled: Labelled | None

    @property
    def count(self) -> int:
        """How many vectors the index will hold."""
        return self.live.rows.count(self.field.name)

    @property
    def mark(self) -> str | None:
        """The flag of the live rows that this index holds; None: all."""
        return "first" if self.field.name == "text" else None


@dataclass(frozen=True, kw_only=True)
class BuiltIndex:
    """An index that was written, and the names of the parts that were spilled for it."""

    index: FieldIndex
    partials: tuple[str, ...]


def choose_spec(config: IndexConfig, ntotal: int, dim: int) -> tuple[IndexSpec, list[str]]:
    """Choose the index from the catalog's size, or take what the configuration says.

    Raises:
        ConfigError: The configured index is impossible for this dimension or number of rows, or
            takes more memory than its budget.
    """
    budget = None if config.memory_budget_mb is None else _budget(config)
    partitions = count_partitions(ntotal, config.max_partition_vectors)
    try:
        if config.factory is None:
            spec, why = IndexSpec.for_catalog(
                ntotal,
                dim,
                memory_budget_bytes=budget,
                target_intersection=config.target_intersection,
                partitions=partitions,
            )
        else:
            spec = IndexSpec.parse(config.factory, dim)
            why = [f"{spec.factory} is what the configuration says."]
    except ValueError as error:
        raise ConfigError(f"index: {error}") from error
    taken = _memory_bytes(config, spec, ntotal)
    if budget is not None and taken > budget:
        raise ConfigError(
            f"index: {spec.factory} with {ntotal:,} vectors takes {taken / MIB:,.0f} MiB, "
            f"index.memory_budget_mb is {config.memory_budget_mb}: a smaller code, or leave "
            "index.factory out"
        )
    available = min(_trainable(ntotal), config.train_rows or ntotal)
    if spec.min_training_rows > available:
        raise ConfigError(
            f"index: {spec.factory} needs {spec.min_training_rows} training rows, there are "
            f"{available}: fewer lists, a larger index.train_rows, or leave index.factory out to "
            "have it chosen"
        )
    return spec, why


def _budget(config: IndexConfig) -> int:
    return (config.memory_budget_mb or 0) * MIB


def _memory_bytes(config: IndexConfig, spec: IndexSpec, ntotal: int) -> int:
    partitions = count_partitions(ntotal, config.max_partition_vectors)
    return spec.memory_bytes(ntotal, partitions=partitions)


def _trainable(ntotal: int) -> int:
    """Return how many rows can be drawn to train with: some are held out as queries."""
    return ntotal - int(ntotal * HELD_OUT_SHARE)


def reasons_to_retrain(
    config: IndexConfig, trained_with: dict[str, Any], base: dict[str, Any], ntotal: int
) -> list[str]:
    """List what forbids an update before anything is measured; empty: nothing does.

    Args:
        config: The index section.
        trained_with: The index section of the release that the base belongs to.
        base: The manifest's entry of the base.
        ntotal: How many vectors the index will hold.
    """
    old = IndexSpec(**base["spec"])
    new, _ = choose_spec(config, ntotal, old.dim)
    names = ("seed", "train_rows", "memory_budget_mb")
    reasons = [
        f"index.{name} was {trained_with.get(name)}, the configuration says {value}."
        for name in names
        if trained_with.get(name) != (value := getattr(config, name))
    ]
    if config.factory is not None and new != old:
        reasons.append(f"The configuration asks for {new.factory}, the index is {old.factory}.")
    elif bool(new.nlist) != bool(old.nlist):
        reasons.append(f"{ntotal:,} vectors are better held by {new.factory} than {old.factory}.")
    elif config.memory_budget_mb and _memory_bytes(config, old, ntotal) > _budget(config):
        reasons.append(f"{ntotal:,} vectors in {old.factory} take more than the memory budget.")
    return reasons


def build_index(job: IndexJob, progress: Callable[[str], None]) -> BuiltIndex:
    """Update or train one field's index, write it, tune and measure it.

    Args:
        job: What to build.
        progress: Called with the name of the step that begins.

    Raises:
        ConfigError: The configured index can't be built from so many rows.
        StoreError: A live row has no vector of this field, or the base is damaged.
    """
    if job.base is None or job.retrain:
        return _train(job, job.retrain or ("There is no index to update.",), progress)
    updated = _update(job, job.base, progress)
    before = updated.index.trained
    trained = IndexHealth(**{name: before[name] for name in IndexHealth.__dataclass_fields__})
    drift = find_drift(trained, _health_at(updated.index, before["point"]), job.config.drift)
    if not drift:
        return updated
    anew = _train(job, tuple(drift), progress)
    return BuiltIndex(index=anew.index, partials=updated.partials + anew.partials)


def _train(job: IndexJob, reasons: tuple[str, ...], progress: Callable[[str], None]) -> BuiltIndex:
    spec, why = choose_spec(job.config, job.count, job.field.dim)
    held = _held_out(job, spec)
    queries = _queries(job, held, progress)
    target = Target(
        store=job.store,
        field=job.field,
        spec=spec,
        folder=job.folder,
        partitions=count_partitions(job.count, job.config.max_partition_vectors),
    )
    progress(f"{job.field.name}: train {spec.factory}")
    template, key = _train_template(job, target, held, progress)
    progress(f"{job.field.name}: add and merge")
    files, keys = _fill(job, target, template, None)
    progress(f"{job.field.name}: measure")
    measured, curve = measure_index(job.store, files, queries, job.ids)
    trained = {
        "run": job.folder,
        "ntotal": files.ntotal,
        "imbalance": measured.imbalance,
        "quantization_error": measured.quantization_error,
        "intersection_at_10": measured.intersection_at_10,
        "point": asdict(measured.point),
        "held_out": str(held),  # many readers of JSON end at 2**53
    }
    told = ("trained", reasons, tuple(why))
    index = _describe(job, files, measured, curve, told, trained)
    return BuiltIndex(index=index, partials=(key, *keys))


def _held_out(job: IndexJob, spec: IndexSpec) -> int:
    """Return the largest key of the rows that don't train the index, but measure it.

    Two rows a measured query: of those that are removed meanwhile, others take the place.
    """
    if not spec.nlist:
        return MAX_KEY  # a flat index learns nothing
    share = min(HELD_OUT_SHARE, 2 * job.sample_rows / job.count)
    return int(share * MAX_KEY)


def _measure_salt(job: IndexJob) -> str:
    return f"measure/{job.field.name}"


def _queries(job: IndexJob, held: int, progress: Callable[[str], None]) -> Queries:
    progress(f"{job.field.name}: exact search of held-out queries")
    salt = _measure_salt(job)
    return sample_queries(
        job.store,
        job.field,
        job.live,
        Draw(rows=job.sample_rows, seed=job.config.seed, salt=salt, below=held),
        labelled=job.labelled,
        target_intersection=job.config.target_intersection,
        base=None if job.base is None else (read_files(job.base), read_point(job.base)),
    )


def _train_template(
    job: IndexJob, target: Target, held: int, progress: Callable[[str], None]
) -> tuple[IndexFile, str]:
    """Train, or find what an earlier try trained; return the name of the spilled part too."""
    spec = target.spec
    wanted = job.config.train_rows or max(MIN_TRAIN_ROWS, TRAIN_ROWS_A_LIST * spec.nlist)
    draw = Draw(
        rows=wanted if spec.nlist else 0,
        seed=job.config.seed,
        salt=f"train/{job.field.name}",
        held_out=(_measure_salt(job), held) if spec.nlist else None,
    )
    parts = sample_vectors(job.store, job.field, job.live.rows, draw)
    board, cpus = index_tasks.make_board(), largest_node_cpus()
    trained = index_tasks.train.options(num_cpus=cpus).remote(target, draw, board, cpus, *parts)
    template: tuple[IndexFile, str] = watch(trained, board, progress)
    return template


def _fill(
    job: IndexJob, target: Target, template: IndexFile, changes: Changes | None
) -> tuple[FieldFiles, tuple[str, ...]]:
    """Add the live rows, or those that an update brings, and merge them partition by partition."""
    fresh = None if changes is None else ("fresh_first" if job.mark else "fresh")
    live = job.live.rows
    partials: list[Partial] = gather(
        [
            index_tasks.add.remote(target, template, files, fresh, *parts)
            for files, parts in zip(live.files, live.parts, strict=True)
        ]
    )
    merged = gather(
        [
            index_tasks.merge.remote(target, template, number, changes, *partials)
            for number in range(target.partitions)
        ]
    )
    files = FieldFiles(spec=target.spec, template=template, partitions=tuple(merged))
    return files, tuple(partial.key for partial in partials)


def _update(job: IndexJob, entry: dict[str, Any], progress: Callable[[str], None]) -> BuiltIndex:
    files, keys = read_files(entry), tuple[str, ...]()
    queries = _queries(job, int(entry["trained"]["held_out"]), progress)
    added, removed = _count_changes(job)
    action, reasons = "kept", ("No vector of it changed.",)
    if added or removed:
        progress(f"{job.field.name}: update {entry['factory']}")
        wanted = count_partitions(job.count, job.config.max_partition_vectors)
        target = Target(
            store=job.store,
            field=job.field,
            spec=files.spec,
            folder=job.folder,
            partitions=max(wanted, len(files.partitions)),
        )
        changes = Changes(base=files, stale=job.live.stale, mark="first" if job.mark else "all")
        files, keys = _fill(job, target, files.template, changes)
        action = "updated"
        reasons = (f"{added:,} vectors added, {removed:,} removed; no drift passed its limit.",)
    progress(f"{job.field.name}: measure")
    measured, curve = measure_index(job.store, files, queries, job.ids)
    told = (action, reasons, tuple(entry["why"]))
    index = _describe(job, files, measured, curve, told, entry["trained"])
    return BuiltIndex(index=index, partials=keys)


@ray.remote(num_cpus=1)
def _count_marked(mark: str, *parts: Any) -> int:  # noqa: ANN401
    return sum(int(rows[mark].sum()) for rows in parts)


def _count_changes(job: IndexJob) -> tuple[int, int]:
    """Count the vectors that an update adds and removes."""
    fresh, stale = ("fresh_first", "first") if job.mark else ("fresh", "all")
    added = [_count_marked.remote(fresh, rows) for rows in job.live.buckets]
    removed = [_count_marked.remote(stale, rows) for rows in job.live.stale]
    return sum(gather(added)), sum(gather(removed))


def _describe(
    job: IndexJob,
    files: FieldFiles,
    measured: Measurement,
    curve: tuple[dict[str, Any], ...],
    told: tuple[str, tuple[str, ...], tuple[str, ...]],
    trained: dict[str, Any],
) -> FieldIndex:
    action, reasons, why = told
    return FieldIndex(
        field=job.field.name,
        template=files.template,
        partitions=files.partitions,
        size_bytes=files.size_bytes,
        memory_bytes=files.spec.memory_bytes(files.ntotal, partitions=len(files.partitions)),
        spec=asdict(files.spec),
        factory=files.spec.factory,
        action=action,
        reasons=reasons,
        why=why,
        trained=trained,
        ntotal=files.ntotal,
        point=asdict(measured.point),
        curve=curve,
        measured=measured,
    )


def _health_at(index: FieldIndex, trained: dict[str, Any]) -> IndexHealth:
    """Return an index's health at the point of its training: drift must not hide in a dearer one.

    Where an index has shrunk so far that it was not searched so deep, the deepest is as good.
    """
    found = index.measured.intersections
    point = SearchPoint(**trained)
    deepest = max(found.values())
    return IndexHealth(
        ntotal=index.ntotal,
        imbalance=index.measured.imbalance,
        quantization_error=index.measured.quantization_error,
        intersection_at_10=found.get(point_name(point), deepest),
    )
