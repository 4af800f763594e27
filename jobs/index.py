"""The index stage: live rows of the embeddings table in, measured index files out.

A field at a time. A trained index is updated as long as the drift that is measured of it stays
within the limits: stale ids out, fresh vectors in, written beside the old file. Else a uniform
sample trains an empty template, Ray tasks fill clones of it, and one task merges them. Exact
search over the same rows measures the result.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import ray

from indexing.drift import IndexHealth, find_drift
from indexing.spec import IndexSpec
from jobs import index_tasks
from jobs.cluster import gather
from jobs.config import IndexConfig
from jobs.errors import ConfigError
from jobs.index_tasks import EXACT_K, Compared, IndexFile, Measurement, describe_curve
from jobs.live import Live
from jobs.space import VectorField
from jobs.store import Store
from jobs.vectors import exact_search, sample_vectors


@dataclass(frozen=True, kw_only=True)
class FieldIndex:
    """One published index file and what was measured of it.

    Attributes:
        folder: Below `indexes/`: of the run that wrote the file, which an earlier one may be.
        action: trained, updated, or kept where no vector of it changed.
        reasons: Whole sentences: why it was trained anew, or what the update did.
        why: One sentence for each choice made from the catalog's size.
        trained: Health when its quantizers were trained, and the nprobe of then.
        curve: nprobe, intersection at 10 and latency of each point tried.
        ambiguous_queries: Sampled vectors that don't count; see `Measurement.ambiguous`.
        missing: Live ids that the file lacks.
        extra: Ids in the file that are not live.
    """

    field: str
    folder: str
    file: str
    sha256: str
    size_bytes: int
    spec: dict[str, Any]
    factory: str
    action: str
    reasons: tuple[str, ...]
    why: tuple[str, ...]
    trained: dict[str, Any]
    ntotal: int
    nprobe: int
    intersection_at_10: float
    self_retrieval: float
    overlap_at_10: float | None
    measured_queries: int
    ambiguous_queries: int
    imbalance: float
    quantization_error: float
    missing: int
    extra: int
    curve: tuple[dict[str, Any], ...]

    @property
    def health(self) -> IndexHealth:
        """What drift is measured by."""
        return IndexHealth(
            ntotal=self.ntotal,
            imbalance=self.imbalance,
            quantization_error=self.quantization_error,
            intersection_at_10=self.intersection_at_10,
        )


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """What building the index of one field takes.

    Attributes:
        folder: Below `indexes/`: where files are written.
        sample_rows: Most vectors that are used as queries.
        base: The manifest's entry of the newest release's index in the same vector space.
        retrain: Why it can't be updated; empty if it can.
    """

    store: Store
    field: VectorField
    live: Live
    config: IndexConfig
    folder: str
    sample_rows: int
    base: dict[str, Any] | None
    retrain: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many vectors the index will hold."""
        return self.live.rows.count(self.field.name)

    @property
    def file(self) -> str:
        """Name of the index file."""
        return f"{self.field.name}.faiss"

    @property
    def mark(self) -> str | None:
        """The flag of the live rows that this index holds; None: all."""
        return "first" if self.field.name == "text" else None

    @property
    def base_file(self) -> IndexFile | None:
        """The base's file."""
        if self.base is None:
            return None
        names = ("folder", "file", "sha256", "size_bytes", "ntotal")
        return IndexFile(**{name: self.base[name] for name in names})


def choose_spec(config: IndexConfig, ntotal: int, dim: int) -> tuple[IndexSpec, list[str]]:
    """Choose the index from the catalog's size, or take what the configuration says.

    Raises:
        ConfigError: The configured index is impossible for this dimension or number of rows.
    """
    if config.nlist is None and config.pq_m is None:
        return IndexSpec.for_catalog(ntotal, dim)
    chosen, _ = IndexSpec.for_catalog(ntotal, dim)
    nlist = chosen.nlist if config.nlist is None else config.nlist
    pq_m = (chosen.pq_m if nlist else 0) if config.pq_m is None else config.pq_m
    try:
        spec = IndexSpec(dim=dim, nlist=nlist, pq_m=pq_m)
    except ValueError as error:
        raise ConfigError(f"index: {error}") from error
    available = min(ntotal, config.train_rows)
    if spec.min_training_rows > available:
        raise ConfigError(
            f"index: {spec.factory} needs {spec.min_training_rows} training rows, there are "
            f"{available}: a smaller index.nlist or index.pq_m, a larger index.train_rows, "
            "or leave them out to have them chosen"
        )
    return spec, [f"{spec.factory} is what the configuration says."]


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
    reasons = [
        f"index.{name} was {trained_with.get(name)}, the configuration says {value}."
        for name, value in (("seed", config.seed), ("train_rows", config.train_rows))
        if trained_with.get(name) != value
    ]
    named = config.nlist is not None or config.pq_m is not None
    if named and new != old:
        reasons.append(f"The configuration asks for {new.factory}, the index is {old.factory}.")
    elif bool(new.nlist) != bool(old.nlist):
        reasons.append(f"{ntotal:,} vectors are better held by {new.factory} than {old.factory}.")
    return reasons


def build_index(job: IndexJob, progress: Callable[[str], None]) -> FieldIndex:
    """Update or train one field's index, write it, tune and measure it.

    Args:
        job: What to build.
        progress: Called with the name of the step that begins.

    Raises:
        ConfigError: The configured index can't be built from so many rows.
        StoreError: A live row has no vector of this field, or the base is damaged.
    """
    progress(f"{job.field.name}: exact search of a sample")
    sample = _Sample(job)
    if job.base is None or job.retrain:
        return _train(job, sample, job.retrain or ("There is no index to update.",), progress)
    updated = _update(job, sample, progress)
    trained = IndexHealth(**{n: updated.trained[n] for n in IndexHealth.__dataclass_fields__})
    now = _at_nprobe(updated, updated.trained["nprobe"])
    drift = find_drift(trained, now, job.config.drift)
    return _train(job, sample, tuple(drift), progress) if drift else updated


class _Sample:
    """The sampled queries of a field and their exact neighbours, as references."""

    def __init__(self, job: IndexJob) -> None:
        seed, salt = job.config.seed, f"measure/{job.field.name}"
        store, field, live = job.store, job.field, job.live.rows
        parts = sample_vectors(store, field, live, rows=job.sample_rows, seed=seed, salt=salt)
        draw = (job.sample_rows, seed, salt)
        self.ids, self.queries = index_tasks.join_sample.remote(draw, *parts)
        self.exact = ray.put(exact_search(store, field, live, self.queries, EXACT_K))
        nprobe = 0 if job.base is None else job.base["nprobe"]
        self.compared = Compared(
            target_intersection=job.config.target_intersection,
            base=None if job.base_file is None else (job.base_file, nprobe),
        )

    def measure(self, job: IndexJob, file: IndexFile) -> Measurement:
        """Tune and measure a written index in a task."""
        live = (job.live.buckets, job.mark)
        found = index_tasks.measure.remote(
            job.store, file, self.compared, self.ids, self.queries, self.exact, live
        )
        measured: Measurement = gather([found])[0]
        return measured


def _train(
    job: IndexJob, sample: _Sample, reasons: tuple[str, ...], progress: Callable[[str], None]
) -> FieldIndex:
    spec, why = choose_spec(job.config, job.count, job.field.dim)
    progress(f"{job.field.name}: train {spec.factory}")
    rows, salt = job.config.train_rows if spec.nlist else 0, f"train/{job.field.name}"
    seed, live = job.config.seed, job.live.rows
    parts = sample_vectors(job.store, job.field, live, rows=rows, seed=seed, salt=salt)
    template = index_tasks.train.remote(spec, seed, (rows, salt), *parts)
    progress(f"{job.field.name}: add and merge")
    filled = [
        index_tasks.add.remote(job.store, job.field, files, template, None, *parts)
        for files, parts in zip(live.files, live.parts, strict=True)
    ]
    file = gather([index_tasks.merge.remote(job.store, job.folder, job.file, *filled)])[0]
    measured = sample.measure(job, file)
    trained = {
        "run": job.folder,
        "ntotal": file.ntotal,
        "imbalance": measured.imbalance,
        "quantization_error": measured.quantization_error,
        "intersection_at_10": measured.point.intersection,
        "nprobe": measured.point.nprobe,
    }
    return _describe(job, file, measured, spec, ("trained", reasons, tuple(why)), trained)


def _update(job: IndexJob, sample: _Sample, progress: Callable[[str], None]) -> FieldIndex:
    base, file = job.base or {}, job.base_file
    if file is None:
        raise ValueError("there is no index to update")
    fresh, stale = ("fresh_first", "first") if job.mark else ("fresh", "all")
    added, removed = _count_changes(job.live, fresh, stale)
    action, reasons = "kept", ("No vector of it changed.",)
    if added or removed:
        progress(f"{job.field.name}: update {base['factory']}")
        template = index_tasks.empty.remote(job.store, file)
        live = job.live.rows
        parts = [
            index_tasks.add.remote(job.store, job.field, files, template, fresh, *rows)
            for files, rows in zip(live.files, live.parts, strict=True)
        ]
        args = (job.store, file, job.folder, job.file, job.live.stale, stale)
        file = gather([index_tasks.update.remote(*args, *parts)])[0]
        action = "updated"
        reasons = (f"{added:,} vectors added, {removed:,} removed; no drift passed its limit.",)
    progress(f"{job.field.name}: measure")
    measured = sample.measure(job, file)
    spec = IndexSpec(**base["spec"])
    return _describe(
        job, file, measured, spec, (action, reasons, tuple(base["why"])), base["trained"]
    )


@ray.remote(num_cpus=1)
def _count_marked(mark: str, *parts: Any) -> int:  # noqa: ANN401
    return sum(int(rows[mark].sum()) for rows in parts)


def _count_changes(live: Live, fresh: str, stale: str) -> tuple[int, int]:
    """Count the vectors that an update adds and removes."""
    added = [_count_marked.remote(fresh, rows) for rows in live.buckets]
    removed = [_count_marked.remote(stale, rows) for rows in live.stale]
    return sum(gather(added)), sum(gather(removed))


def _describe(
    job: IndexJob,
    file: IndexFile,
    measured: Measurement,
    spec: IndexSpec,
    told: tuple[str, tuple[str, ...], tuple[str, ...]],
    trained: dict[str, Any],
) -> FieldIndex:
    action, reasons, why = told
    return FieldIndex(
        field=job.field.name,
        **asdict(file),
        spec=asdict(spec),
        factory=spec.factory,
        action=action,
        reasons=reasons,
        why=why,
        trained=trained,
        nprobe=measured.point.nprobe,
        intersection_at_10=measured.point.intersection,
        self_retrieval=measured.self_retrieval,
        overlap_at_10=measured.overlap_at_10,
        measured_queries=measured.queries,
        ambiguous_queries=measured.ambiguous,
        imbalance=measured.imbalance,
        quantization_error=measured.quantization_error,
        missing=measured.missing,
        extra=measured.extra,
        curve=describe_curve(measured.curve),
    )


def _at_nprobe(index: FieldIndex, nprobe: int) -> IndexHealth:
    """Return an index's health at the nprobe of its training: drift must not hide in a larger one.

    The sweep ends where the intersection is 1: what lies beyond is 1 too.
    """
    points = {point["nprobe"]: point["intersection"] for point in index.curve}
    found = points.get(nprobe, index.curve[-1]["intersection"])
    return IndexHealth(
        ntotal=index.ntotal,
        imbalance=index.imbalance,
        quantization_error=index.quantization_error,
        intersection_at_10=found,
    )
