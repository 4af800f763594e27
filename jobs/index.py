"""The index stage: live rows of the embeddings table in, measured index files out.

A field at a time. A trained index is updated as long as the drift that is measured of it stays
within the limits: stale ids out, fresh vectors in, written beside the old files. Else a uniform
sample trains an empty template, Ray tasks fill clones of it and spill them to the store, and a
task a partition merges them. Exact search over the same rows measures the result.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from indexing.choose import HELD_OUT_SHARE, trainable_rows
from indexing.drift import IndexHealth, find_drift
from indexing.search import SearchPoint
from indexing.spec import IndexSpec
from jobs import index_tasks
from jobs.config import IndexConfig
from jobs.errors import JobError, StoreError
from jobs.files import delete_files, list_files
from jobs.index_choice import HELD_OUT_SHARES, check_trainable, choose_spec
from jobs.index_files import (
    FieldFiles,
    IndexFile,
    count_partitions,
    join_files,
    read_files,
    read_point,
)
from jobs.index_memory import MIB, ask, fill_options, options, train_bytes
from jobs.index_tasks import Changes, Target
from jobs.labelled import Labelled
from jobs.live import Live
from jobs.measure import (
    Measurement,
    measure_index,
    point_name,
    sample_queries,
)
from jobs.partials import Partial
from jobs.probe import Queries
from jobs.space import VectorField
from jobs.storage import StorageError
from jobs.store import Store
from jobs.tasks import gather, watch
from jobs.vectors import MAX_KEY, Draw, sample_vectors

TRAIN_ROWS_A_LIST = 64
MIN_TRAIN_ROWS = 65_536  # what FAISS takes at most for a PQ codebook of 256 centroids
MIN_HELD_OUT = 50  # so that a draw never holds out none


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
    try:
        updated = _update(job, job.base, progress)
    except StorageError:
        raise
    except StoreError as error:  # damaged, or not what its release says: training makes another
        anew = _train(job, (f"The newest release's index can't be updated: {error}.",), progress)
        _delete_replaced(job, anew.index)
        return anew
    before = updated.index.trained
    trained = IndexHealth(**{name: before[name] for name in IndexHealth.__dataclass_fields__})
    drift = find_drift(trained, _health_at(updated.index, before["point"]), job.config.drift)
    if not drift:
        return updated
    anew = _train(job, tuple(drift), progress)
    _delete_replaced(job, anew.index)
    return BuiltIndex(index=anew.index, partials=updated.partials + anew.partials)


def _delete_replaced(job: IndexJob, anew: FieldIndex) -> None:
    """Delete what an update wrote of this field before the index took its place."""
    files = read_files(asdict(anew))
    kept = {file.file for file in (files.template, *files.served)}
    ours = (f"{job.field.name}.", f"{job.field.name}-")
    names = [file.path for file in list_files(job.store, "indexes", job.folder)]
    paths = [path for path in names if path.rpartition("/")[2].startswith(ours)]
    delete_files(job.store, [path for path in paths if path.rpartition("/")[2] not in kept])


def _train(job: IndexJob, reasons: tuple[str, ...], progress: Callable[[str], None]) -> BuiltIndex:
    spec, why = choose_spec(job.config, job.count, job.field.dim)
    check_trainable(job.config, spec, job.count)
    held = _held_out(job, spec)
    queries = _queries(job, held, progress)
    target = Target(
        store=job.store,
        field=job.field,
        spec=spec,
        folder=job.folder,
        partitions=count_partitions(job.count, job.config.max_partition_vectors),
    )
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
    share = min(HELD_OUT_SHARE, max(MIN_HELD_OUT, 2 * job.sample_rows) / job.count)
    for smaller in HELD_OUT_SHARES:
        if trainable_rows(job.count, share) < spec.min_training_rows:
            share = min(share, smaller)
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
    rows = min(draw.rows, job.count)
    parts = sample_vectors(job.store, job.field, job.live.rows, draw)
    if parts:  # awaited to be told: reading is one step, training another
        progress(f"{job.field.name}: sample up to {rows:,} rows to train on")
        ray.wait(parts, num_returns=len(parts), fetch_local=False)
    progress(f"{job.field.name}: train {spec.factory}")
    return _run_training(target, draw, parts, rows, progress)


def _run_training(
    target: Target, draw: Draw, parts: list[Any], rows: int, progress: Callable[[str], None]
) -> tuple[IndexFile, str]:
    spec = target.spec
    gpus = int(index_tasks.TRAINS_ON_GPUS and spec.nlist > 0)
    room = ask(
        f"training {spec.factory}", train_bytes(spec, rows), "a smaller index.train_rows", gpus=gpus
    )
    # All CPUs of the machine; a flat index learns nothing.
    wanted = options(room, most_cpus=None if spec.nlist else 1)
    cpus, mib = wanted["num_cpus"], room.memory // MIB
    trained: tuple[IndexFile, str] = watch(
        lambda: index_tasks.train.options(**wanted).remote(target, draw, cpus, *parts),
        f"{target.field.name}: wait for a machine with {cpus} CPUs and {mib:,} MiB free",
        progress,
    )
    return trained


def _fill(
    job: IndexJob, target: Target, template: IndexFile, changes: Changes | None
) -> tuple[FieldFiles, tuple[str, ...]]:
    """Add the live rows, or those that an update brings, and merge them partition by partition."""
    fresh = None if changes is None else ("fresh_first" if job.mark else "fresh")
    live = job.live.rows
    adding, merging = fill_options(
        target.spec,
        live,
        added=job.count if changes is None else changes.added,
        held=() if changes is None else [part.ntotal for part in changes.base.partitions],
        columns=len(job.field.columns),
        partitions=target.partitions,
    )
    partials: list[Partial] = gather(
        [
            index_tasks.add.options(**adding).remote(target, template, files, fresh, *parts)
            for files, parts in zip(live.files, live.parts, strict=True)
        ]
    )
    numbers, codes = range(target.partitions), index_tasks.merge_codes.options(**merging)
    merged = [codes.remote(target, template, number, changes, *partials) for number in numbers]
    if target.spec.refine != "none":
        refine = index_tasks.merge_refine.options(**merging)
        merged += [refine.remote(target, number, changes, *partials) for number in numbers]
    try:
        written: list[tuple[IndexFile, int]] = gather(merged)
    except JobError:  # the others must not write on beside what takes their place
        ray.wait(merged, num_returns=len(merged), fetch_local=False)
        raise
    files = FieldFiles(
        spec=target.spec, template=template, partitions=join_files(written, target.partitions)
    )
    return files, tuple(partial.key for partial in partials if partial.key)


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
        mark = "first" if job.mark else "all"
        changes = Changes(base=files, stale=job.live.stale, mark=mark, added=added)
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
    if measured.not_compared:
        reasons = (*reasons, f"Not compared with the newest release: {measured.not_compared}.")
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

    Where the index was not searched so deep tonight, the next cheaper point stands for it.
    """
    found, point = index.measured.intersections, SearchPoint(**trained)
    while point_name(point) not in found and point.nprobe > 1:
        point = replace(point, nprobe=point.nprobe // 2)
    deepest = max(found.values())
    return IndexHealth(
        ntotal=index.ntotal,
        imbalance=index.measured.imbalance,
        quantization_error=index.measured.quantization_error,
        intersection_at_10=found.get(point_name(point), deepest),
    )
