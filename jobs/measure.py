"""Measures a written index: tunes it on queries that it was not trained on, times and checks it.

A task a partition searches at every point of a grid; what the partitions found is joined here and
compared with exact search. Queries are vectors of the catalog that were held out of the training,
each without itself among its neighbours, and the labelled queries where there are any.

Letters: Q queries, D dimension, K neighbours.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import ray

from indexing.build import list_sizes, stored_ids
from indexing.metrics import intersection_at_k, list_imbalance, recall_at_k
from indexing.search import SearchPoint, group_by_product, merge_topk, search_partition
from indexing.spec import IndexSpec
from indexing.tune import (
    MeasuredPoint,
    choose_point,
    model_costs,
    prune_curve,
    rerank_depths,
    sweep_partition,
    time_point,
)
from indexing.update import quantization_error
from jobs.buckets import Records
from jobs.cluster import gather, largest_node_cpus
from jobs.ids_cache import machine_cache
from jobs.ids_table import Ids
from jobs.index_files import FieldFiles, in_partition, open_partition, partition_range
from jobs.labelled import Labelled
from jobs.live import Live
from jobs.space import VectorField
from jobs.store import Store
from jobs.vectors import Draw, Float32Array, Int64Array, exact_search, join_sample, sample_vectors

MEASURED_K = 10
EXACT_K = MEASURED_K + 1  # one more tells whether the ten nearest are defined at all
TIE = 1e-6
EQUAL = 1 - 1e-4
MAX_THREADS = 4
SWEPT_CODES = 10**9  # most codes that the widest point of a sweep compares, over all queries
NO_ID = -1

BoolArray = npt.NDArray[np.bool_]
Found = tuple[Float32Array, Int64Array]
"""Scores (Q, K) float32, best first, and vector ids (Q, K) int64, padded with -1."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of an index at its operating point.

    Attributes:
        intersection_at_10: Mean share of the ten exact neighbours of a held-out catalog vector
            that the index finds, itself left out.
        labelled_intersection_at_10: The same of the labelled queries; None without any.
        recall_at_10: Of the labelled queries, their right products; None without any.
        self_retrieval: Share of sampled vectors that found themselves, or an equal vector.
        queries: How many sampled vectors count.
        labelled_queries: How many labelled queries count.
        ambiguous: How many of both don't: their tenth neighbour and the next are equally near, as
            where many products share a picture, so that the ten nearest aren't defined.
        intersections: Of every point tried, by its name.
        imbalance: FAISS's imbalance factor of the lists; 1 for a flat index.
        quantization_error: Mean squared distance between the sample and what the index keeps.
        missing: Live ids that are not in the index.
        extra: Ids in the index that are not live, or are there twice.
        overlap_at_10: With the newest release's index, mean share of the same neighbours; None
            where there is none to compare with.
    """

    point: SearchPoint
    intersection_at_10: float
    labelled_intersection_at_10: float | None
    recall_at_10: float | None
    self_retrieval: float
    queries: int
    labelled_queries: int
    ambiguous: int
    intersections: dict[str, float]
    imbalance: float
    quantization_error: float
    missing: int
    extra: int
    overlap_at_10: float | None


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What an index is measured with.

    Attributes:
        ids: (S,) int64, the sampled vectors' ids, then -1 for each labelled query.
        vectors: (Q, D) float32 unit rows of both.
        exact: What exact search finds for all of them, `EXACT_K` neighbours.
        sampled: S.
        base: The newest release's files of the same vector space and its point, or None.
    """

    live: Live
    mark: str | None
    ids: Int64Array
    vectors: Float32Array
    exact: Found
    sampled: int
    labelled: Labelled | None
    target_intersection: float
    base: tuple[FieldFiles, SearchPoint] | None

    @property
    def clear(self) -> BoolArray:
        """Mark the queries whose ten nearest are defined; all of a kind if none of it is."""
        scores = self.exact[0]
        gaps = scores[:, MEASURED_K - 1] - scores[:, MEASURED_K] > TIE
        for kind in (slice(self.sampled), slice(self.sampled, None)):
            gaps[kind] |= not gaps[kind].any()
        return gaps


@dataclass(frozen=True, kw_only=True)
class _Swept:
    """What one partition gave.

    Attributes:
        found: By the sampled queries, at each point.
        labelled: By the labelled ones.
        costs: Bytes that a query touches at each point.
    """

    found: dict[SearchPoint, Found]
    labelled: dict[SearchPoint, Found]
    costs: dict[SearchPoint, float]
    list_sizes: Int64Array
    quantization_error: float
    missing: int
    extra: int


def point_name(point: SearchPoint) -> str:
    """Name a point in a manifest."""
    return f"nprobe={point.nprobe},ef_search={point.ef_search},rerank={point.rerank}"


def sample_queries(
    store: Store,
    field: VectorField,
    live: Live,
    draw: Draw,
    *,
    labelled: Labelled | None,
    target_intersection: float,
    base: tuple[FieldFiles, SearchPoint] | None,
) -> Queries:
    """Draw catalog vectors as queries, add the labelled ones, and search all exactly.

    Args:
        store: The store.
        field: The field.
        live: The live rows.
        draw: Which rows: those that no training saw.
        labelled: The labelled queries.
        target_intersection: What the operating point must reach.
        base: The newest release's index, to compare with.

    Raises:
        StoreError: A row has no vector.
    """
    parts = sample_vectors(store, field, live.rows, draw)
    ids, vectors = gather([_join.remote(draw, *parts)])[0]
    asked = [vectors.reshape(-1, field.dim)]
    asked += [labelled.vectors.reshape(-1, field.dim)] if labelled is not None else []
    together = np.concatenate(asked)
    own = np.append(ids, np.full(len(together) - len(ids), NO_ID, np.int64))
    exact = exact_search(store, field, live.rows, ray.put(together), EXACT_K, own)
    return Queries(
        live=live,
        mark="first" if field.name == "text" else None,
        ids=own,
        vectors=together,
        exact=exact,
        sampled=len(ids),
        labelled=labelled,
        target_intersection=target_intersection,
        base=base,
    )


@ray.remote(num_cpus=1)
def _join(draw: Draw, *parts: tuple[Int64Array, Float32Array]) -> tuple[Int64Array, Float32Array]:
    return join_sample(parts, draw)


def measure_index(
    store: Store, files: FieldFiles, queries: Queries, ids: dict[str, Any]
) -> tuple[Measurement, tuple[dict[str, Any], ...]]:
    """Tune an index, time its curve, and check its ids.

    Args:
        store: The store.
        files: The written index.
        queries: What to measure it with.
        ids: The manifest's entry of `ids.parquet`: which products labelled queries found.

    Returns:
        What was measured, and the curve: points that no other one beats, as plain values.

    Raises:
        StoreError: A file is missing or damaged.
    """
    probe = _Probe(store=store, queries=queries, asked=ray.put(queries.vectors))
    swept = probe.sweep(files)
    points = _compare(probe, swept, ids)
    best = choose_point(points, queries.target_intersection)
    curve = probe.time(files, prune_curve(points))
    found = probe.search(files, best.point)
    clear = queries.clear
    measured = Measurement(
        point=best.point,
        intersection_at_10=best.intersection,
        labelled_intersection_at_10=best.labelled_intersection,
        recall_at_10=best.recall,
        self_retrieval=_self_retrieval(queries, found),
        queries=int(clear[: queries.sampled].sum()),
        labelled_queries=int(clear[queries.sampled :].sum()),
        ambiguous=int((~clear).sum()),
        intersections={point_name(one.point): one.intersection for one in points},
        imbalance=list_imbalance(np.sum([one.list_sizes for one in swept], axis=0)),
        quantization_error=swept[0].quantization_error,
        missing=sum(one.missing for one in swept),
        extra=sum(one.extra for one in swept),
        overlap_at_10=_overlap(probe, found),
    )
    return measured, tuple(asdict(one) for one in curve)


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """Starts the tasks that search an index's partitions.

    Attributes:
        asked: Reference to the queries' vectors.
    """

    store: Store
    queries: Queries
    asked: Any

    @property
    def depth(self) -> int:
        """How many vectors are looked at for ten products: images of one share a place."""
        rows = self.queries.live.rows
        images = 1 if self.queries.mark else round(rows.vectors / max(1, rows.products))
        return 4 * MEASURED_K * max(1, images)

    def sweep(self, files: FieldFiles) -> list[_Swept]:
        """Search every partition at every point."""
        spans = gather([_span.remote(rows) for rows in self.queries.live.buckets])
        count = len(files.partitions)
        calls = []
        for number in range(count):
            first, last = partition_range(number, count)
            inside = [
                rows
                for rows, span in zip(self.queries.live.buckets, spans, strict=True)
                if span is not None and span[0] < last and span[1] >= first
            ]
            own = self.queries.ids[: self.queries.sampled]
            task = (self.store, files, number, own, self.asked, self.depth)
            calls.append(_on_cpus(_sweep, *task, (inside, self.queries.mark)))
        swept: list[_Swept] = gather(calls)
        return swept

    def time(self, files: FieldFiles, curve: Sequence[MeasuredPoint]) -> list[MeasuredPoint]:
        """Time each point of a curve; of several partitions the slowest counts."""
        points, numbers = [one.point for one in curve], range(len(files.partitions))
        args = (self.asked, self.queries.sampled, points)
        times = gather([_on_cpus(_time, self.store, files, number, *args) for number in numbers])
        slowest = [
            (max(p50), max(p99), min(rate))
            for p50, p99, rate in (zip(*one, strict=True) for one in zip(*times, strict=True))
        ]
        return [
            replace(one, latency_p50_ms=p50, latency_p99_ms=p99, queries_per_s=rate)
            for one, (p50, p99, rate) in zip(curve, slowest, strict=True)
        ]

    def search(self, files: FieldFiles, point: SearchPoint) -> Found:
        """Search all partitions at one point with the sampled queries, themselves included."""
        numbers, args = range(len(files.partitions)), (self.asked, self.queries.sampled, point)
        parts = [_on_cpus(_search, self.store, files, number, *args) for number in numbers]
        return merge_topk(gather(parts), MEASURED_K)


def _on_cpus(task: Any, *args: Any) -> Any:  # noqa: ANN401
    cpus = min(MAX_THREADS, largest_node_cpus())
    return task.options(num_cpus=cpus).remote(cpus, *args)


@ray.remote(num_cpus=1)
def _span(rows: Records) -> tuple[int, int] | None:
    """Return the first and the last id of sorted rows."""
    ids = rows["vector_id"]
    return (int(ids[0]), int(ids[-1])) if len(ids) else None


@ray.remote
def _sweep(
    threads: int,
    store: Store,
    files: FieldFiles,
    number: int,
    own: Int64Array,
    asked: Float32Array,
    depth: int,
    live: tuple[list[Any], str | None],
) -> _Swept:
    """Search one partition at every point, and compare its ids with the live ones."""
    faiss.omp_set_num_threads(threads)
    partition = open_partition(store, files.spec, files.partitions[number])
    largest = max(part.ntotal for part in files.partitions)
    sampled, labelled = asked[: len(own)], asked[len(own) :]
    sweep = partial(
        sweep_partition,
        partition,
        depths=rerank_depths(MEASURED_K, largest),
        max_nprobe=_widest(files.spec, largest, len(asked)),
    )
    found = sweep(sampled, MEASURED_K, exclude=own)
    more = sweep(labelled, depth) if len(labelled) else {}
    ids = stored_ids(partition.index)
    missing, extra = _compare_ids(ids, *live, (number, len(files.partitions)))
    return _Swept(
        found=found,
        labelled=more,
        costs=model_costs(partition, found, MEASURED_K),
        list_sizes=list_sizes(partition.index),
        quantization_error=quantization_error(partition.index, sampled),
        missing=missing,
        extra=extra,
    )


def _widest(spec: IndexSpec, ntotal: int, queries: int) -> int | None:
    """Return where a sweep ends: its last point visits a bounded number of codes in all."""
    compared = ntotal * queries
    return None if compared <= SWEPT_CODES else max(1, spec.nlist * SWEPT_CODES // compared)


def _compare_ids(
    stored: Int64Array, live: list[Any], mark: str | None, partition: tuple[int, int]
) -> tuple[int, int]:
    """Count live ids that are not stored, and stored ones that are not live or are there twice."""
    stored.sort()
    missing, matched = 0, 0
    for rows in map(ray.get, live):
        wanted = rows["vector_id"] if mark is None else rows["vector_id"][rows[mark]]
        wanted = wanted[in_partition(wanted, *partition)]
        there = np.isin(wanted, stored[slice(*np.searchsorted(stored, _ends(wanted)))])
        missing += int((~there).sum())
        matched += int(there.sum())
    return missing, len(stored) - matched


def _ends(ids: Int64Array) -> Int64Array:
    return np.array([ids[0], ids[-1] + 1] if len(ids) else [0, 0], np.int64)


@ray.remote
def _time(
    threads: int,
    store: Store,
    files: FieldFiles,
    number: int,
    asked: Float32Array,
    sampled: int,
    points: list[SearchPoint],
) -> list[tuple[float, float, float]]:
    faiss.omp_set_num_threads(threads)
    partition = open_partition(store, files.spec, files.partitions[number])
    return [time_point(partition, asked[:sampled], MEASURED_K, point) for point in points]


@ray.remote
def _search(
    threads: int,
    store: Store,
    files: FieldFiles,
    number: int,
    asked: Float32Array,
    sampled: int,
    point: SearchPoint,
) -> Found:
    faiss.omp_set_num_threads(threads)
    partition = open_partition(store, files.spec, files.partitions[number])
    return search_partition(partition, asked[:sampled], MEASURED_K, point)


def _compare(probe: _Probe, swept: list[_Swept], ids: dict[str, Any]) -> list[MeasuredPoint]:
    """Join what the partitions found at each point, and compare it with exact search."""
    queries = probe.queries
    clear, exact = queries.clear, queries.exact[1]
    sampled, labelled = slice(queries.sampled), slice(queries.sampled, None)
    joined = _joined([one.labelled for one in swept], probe.depth)
    recalls = _recalls(probe, joined, ids) if joined else {}
    points = []
    for point, (_, found) in _joined([one.found for one in swept], MEASURED_K).items():
        street = joined.get(point)
        points.append(
            MeasuredPoint(
                point=point,
                cost=sum(one.costs[point] for one in swept),
                intersection=_intersect(found, exact[sampled], clear[sampled]),
                labelled_intersection=None
                if street is None
                else _intersect(street[1], exact[labelled], clear[labelled]),
                recall=recalls.get(point),
            )
        )
    return points


def _joined(parts: list[dict[SearchPoint, Found]], k: int) -> dict[SearchPoint, Found]:
    return {point: merge_topk([part[point] for part in parts], k) for point in parts[0]}


def _intersect(found: Int64Array, exact: Int64Array, clear: BoolArray) -> float:
    counted = clear & (exact[:, 0] != NO_ID)  # the only vector of a catalog has no neighbour
    if not counted.any():
        return 1.0
    return intersection_at_k(found[counted], exact[counted], MEASURED_K)


def _recalls(
    probe: _Probe, joined: dict[SearchPoint, Found], ids: dict[str, Any]
) -> dict[SearchPoint, float]:
    labelled = probe.queries.labelled
    if labelled is None:
        return {}
    relevant = [query.relevant for query in labelled.queries]
    recalls: dict[SearchPoint, float] = gather(
        [_recall.remote(probe.store, ids, joined, relevant)]
    )[0]
    return recalls


@ray.remote(num_cpus=1)
def _recall(
    store: Store,
    ids: dict[str, Any],
    joined: dict[SearchPoint, Found],
    relevant: list[tuple[str, ...]],
) -> dict[SearchPoint, float]:
    """Return recall at ten products of the labelled queries, at each point."""
    table = Ids.open(store, ids, machine_cache())
    seen = np.unique(np.concatenate([found.ravel() for _, found in joined.values()]))
    seen = seen[seen != NO_ID]
    owners = dict(zip(seen.tolist(), table.products(seen), strict=True)) | {NO_ID: ""}
    wanted = [set(products) for products in relevant]
    recalls = {}
    for point, (scores, found) in joined.items():
        ranked = [
            [
                product
                for product, _, _ in group_by_product(
                    row, mine, [owners[one] for one in mine.tolist()], MEASURED_K
                )
            ]
            for row, mine in zip(scores, found, strict=True)
        ]
        recalls[point] = recall_at_k(ranked, wanted, MEASURED_K)
    return recalls


def _overlap(probe: _Probe, found: Found) -> float | None:
    base = probe.queries.base
    if base is None or not base[0].ntotal or not len(found[1]):
        return None
    k = min(MEASURED_K, base[0].ntotal, int((found[1] >= 0).sum(axis=1).max()))
    if k == 0:
        return None
    before = probe.search(*base)[1][:, :k]
    clear = probe.queries.clear[: probe.queries.sampled]
    now, then = found[1][clear, :k], before[clear]
    same = (now[:, :, None] == then[:, None, :]) & (now[:, :, None] >= 0)
    return float(same.any(axis=2).mean())


def _self_retrieval(queries: Queries, found: Found) -> float:
    """Return the share of queries whose own vector, or an exactly equal one, is in the results."""
    own, sampled = queries.ids[: queries.sampled], slice(queries.sampled)
    scores, ids = queries.exact[0][sampled], queries.exact[1][sampled]
    equal = np.where(scores >= EQUAL, ids, -2)
    hits = (found[1] == own[:, None]).any(axis=1)
    hits |= (found[1][:, :, None] == equal[:, None, :]).any(axis=(1, 2))
    return float(hits.mean())
