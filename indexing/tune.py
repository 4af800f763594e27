"""Choose how deep to search: the cheapest point that still finds what exact search finds.

A partition is searched at every point of a grid (`sweep_partition`); what the partitions found
is joined a point at a time by `merge_topk`, compared with exact search, and the cheapest point
that is good enough is chosen by the bytes that it touches (`model_costs`). Clocks only report:
a second run makes the same choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import faiss
import numpy as np

from indexing.anatomy import list_sizes
from indexing.metrics import list_imbalance
from indexing.probe import has_hnsw, lists_of
from indexing.search import (
    Partition,
    SearchPoint,
    check_excluded,
    merge_topk,
    search_index,
    search_partition,
)
from indexing.spec import Float32Array, Int64Array
from indexing.topk import PADDING_ID, PADDING_SCORE

DEPTHS_PER_K = (2, 5, 10, 20, 40)
MIN_EF_SEARCH = 16  # HNSW's own default; under it the graph misses the nearest lists
PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """Hold what one point gave over all partitions.

    Attributes:
        point: How deep each partition was searched.
        cost: Bytes a query touches: the sum of `model_costs` over the partitions.
        intersection: Mean intersection_at_k with exact search of catalog queries, 0 to 1.
        labelled_intersection: The same of labelled street queries; None: there are none.
        recall: Mean recall_at_k of the labelled queries; None: there are none.
        latency_p50_ms: Median milliseconds of a query by itself; None: not timed.
        latency_p99_ms: Its 99th percentile; None: not timed.
        queries_per_s: Queries a second, all in one batch; None: not timed.
    """

    point: SearchPoint
    cost: float
    intersection: float
    labelled_intersection: float | None = None
    recall: float | None = None
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None
    queries_per_s: float | None = None

    @property
    def reached(self) -> float:
        """Return the lesser intersection: catalog queries by themselves flatter an index."""
        if self.labelled_intersection is None:
            return self.intersection
        return min(self.intersection, self.labelled_intersection)


def rerank_depths(k: int, ntotal: int) -> tuple[int, ...]:
    """Return the depths worth trying: 0 and 2 to 40 times k, none beyond ntotal.

    Args:
        k: How many neighbours count.
        ntotal: How many vectors the largest partition holds.
    """
    return (0, *(times * k for times in DEPTHS_PER_K if times * k <= ntotal))


def sweep_partition(
    partition: Partition,
    queries: Float32Array,
    k: int,
    *,
    depths: Sequence[int],
    exclude: Int64Array | None = None,
    max_nprobe: int | None = None,
) -> dict[SearchPoint, tuple[Float32Array, Int64Array]]:
    """Search one partition at every point of the grid.

    nprobe goes over the powers of two and nlist (0 on a flat index); with HNSW over the lists,
    ef_search is 1 and 4 times nprobe, at least 16. The codes are searched once for each of
    these, to the greatest depth, and scored again once: a lesser depth is the start of that
    list. Partitions of one template have the same points.

    Args:
        partition: A filled index and its refine store.
        queries: (Q, D) float32 unit rows.
        k: How many neighbours count.
        depths: How many candidates to re-rank (`rerank_depths`), 0: none. Without a refine store
            all but 0 are left out.
        exclude: (Q,) int64, for each query the id that it must not find, its own; -1: none.
        max_nprobe: Where to end, instead of at nlist: the last steps visit every vector.

    Returns:
        For each point, cheaper ones first, scores (Q, K) and ids (Q, K), padded with -1.

    Raises:
        ValueError: There is no depth to try, or as `search_partition`.
    """
    tried = sorted({depth for depth in depths if not depth or partition.refine})
    if not tried or min(depths) < 0:
        raise ValueError(f"depths are {tuple(depths)}: expected 0, or more with a refine store")
    if exclude is not None:
        check_excluded(exclude, len(queries))
    found = {}
    for probes in _probes(partition.index, max_nprobe):
        scores, ids = _find_candidates(partition.index, queries, max(k, tried[-1]), probes, exclude)
        exact = partition.refine.scores(queries, ids) if partition.refine and tried[-1] else scores
        for depth in tried:
            ranked, taken = (exact, max(k, depth)) if depth else (scores, k)
            best = merge_topk([(ranked[:, :taken], ids[:, :taken])], k)
            found[replace(probes, rerank=depth)] = best
    return found


def model_costs(
    partition: Partition, points: Iterable[SearchPoint], k: int
) -> dict[SearchPoint, float]:
    """Estimate the bytes a query touches in a partition at each point.

    Bytes, because a search is bound by memory, not by arithmetic, and because they are the same
    on every machine and in every run. A query touches

    - the codes of the vectors in its lists: ntotal * nprobe / nlist, times the lists' imbalance
      (a long list is visited more often), at most ntotal;
    - the centroids that it is compared with, 4 bytes a dimension: all nlist of them, or some
      ef_search * log2(nlist) with HNSW, at most nlist;
    - max(k, rerank) rows of the refine store, in whole pages of 4 KiB: they lie at random in a
      mapped file.

    What every point pays alike (rotation, look-up tables, ids) is left out.

    Args:
        partition: A filled index and its refine store.
        points: Which to estimate.
        k: How many neighbours are asked for.

    Returns:
        Bytes by point.
    """
    imbalance = list_imbalance(list_sizes(partition.index))
    return {point: _model_cost(partition, point, k, imbalance) for point in points}


def time_point(
    partition: Partition,
    queries: Float32Array,
    k: int,
    point: SearchPoint,
    *,
    singles: int = 100,
) -> tuple[float, float, float]:
    """Time a point, after one query to warm up.

    Args:
        partition: A filled index and its refine store.
        queries: (Q, D) float32 unit rows, Q >= 1.
        k: How many neighbours are asked for.
        point: How deep to search.
        singles: How many of the queries are also searched one at a time, >= 1.

    Returns:
        Median and 99th percentile of the milliseconds of a query by itself, and the queries a
        second of one batch of all of them.

    Raises:
        ValueError: There is no query, singles < 1, or as `search_partition`.
    """
    if not len(queries) or singles < 1:
        raise ValueError(f"{len(queries)} queries, {singles} of them single: nothing to time")
    search_partition(partition, queries[:1], k, point)
    single_s = [
        _time_search(partition, queries[row : row + 1], k, point)
        for row in range(min(singles, len(queries)))
    ]
    p50_s, p99_s = np.percentile(single_s, [50, 99])
    batch_s = _time_search(partition, queries, k, point)
    return 1e3 * float(p50_s), 1e3 * float(p99_s), len(queries) / batch_s


def choose_point(points: Sequence[MeasuredPoint], target_intersection: float) -> MeasuredPoint:
    """Return the cheapest point that meets a target.

    Where none meets it, that is the point that comes nearest: it is for the caller's gate to
    refuse it. Of equally cheap points the better one is chosen, then the one with the least
    nprobe, ef_search and rerank.

    Args:
        points: At least one.
        target_intersection: The least intersection that is good enough, in (0, 1]; where the
            labelled queries were measured too, both must reach it.

    Raises:
        ValueError: There are no points, or the target is outside (0, 1].
    """
    if not 0 < target_intersection <= 1:
        raise ValueError(f"target_intersection is {target_intersection}, expected (0, 1]")
    if not points:
        raise ValueError("no points to choose from")
    good = [point for point in points if point.reached >= target_intersection]
    best = max(point.reached for point in points)
    return min(good or [point for point in points if point.reached == best], key=_rank)


def prune_curve(points: Sequence[MeasuredPoint]) -> list[MeasuredPoint]:
    """Drop the points to which another is preferred at no more cost.

    What `choose_point` chooses, for any target, stays.

    Returns:
        Points by rising cost and rising intersection (`MeasuredPoint.reached`).
    """
    kept: list[MeasuredPoint] = []
    for point in sorted(points, key=_rank):
        if not kept or point.reached > kept[-1].reached:
            kept.append(point)
    return kept


def _rank(point: MeasuredPoint) -> tuple[float, float, tuple[int, ...]]:
    return point.cost, -point.reached, astuple(point.point)


def _probes(index: faiss.Index, max_nprobe: int | None) -> list[SearchPoint]:
    ivf = lists_of(index)
    if ivf is None:
        return [SearchPoint(nprobe=0)]
    nlist = int(ivf.nlist)
    last = nlist if max_nprobe is None else min(nlist, max(1, max_nprobe))
    powers = [2**exponent for exponent in range((last - 1).bit_length())]
    return [
        SearchPoint(nprobe=nprobe, ef_search=ef_search)
        for nprobe in [*powers, last]
        for ef_search in (_ef_searches(nprobe, nlist) if has_hnsw(ivf) else [0])
    ]


def _ef_searches(nprobe: int, nlist: int) -> list[int]:
    """Return what to try, within nlist: beyond it the graph has nothing more to keep."""
    return sorted({min(nlist, max(MIN_EF_SEARCH, times * nprobe)) for times in (1, 4)})


def _find_candidates(
    index: faiss.Index,
    queries: Float32Array,
    depth: int,
    probes: SearchPoint,
    exclude: Int64Array | None,
) -> tuple[Float32Array, Int64Array]:
    """Return each query's depth best by the codes without the excluded id, best first."""
    if exclude is None:
        return search_index(index, queries, depth, probes)
    scores, ids = search_index(index, queries, depth + 1, probes)
    own = ids == exclude[:, None]
    scores, ids = np.where(own, PADDING_SCORE, scores), np.where(own, PADDING_ID, ids)
    order = np.argsort(own, axis=1, kind="stable")[:, :depth]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _model_cost(partition: Partition, point: SearchPoint, k: int, imbalance: float) -> float:
    index, refine = partition.index, partition.refine
    reranked = 0.0
    if point.rerank and refine is not None:
        pages = math.ceil(refine.codes.shape[1] / PAGE_BYTES)
        reranked = float(max(k, point.rerank) * pages * PAGE_BYTES)
    ivf = lists_of(index)
    if ivf is None:
        return 4.0 * index.d * index.ntotal + reranked
    nlist = int(ivf.nlist)
    scanned: float = index.ntotal * min(1.0, imbalance * point.nprobe / nlist)
    centroids: float = nlist
    if point.ef_search:
        centroids = min(centroids, point.ef_search * math.log2(nlist))
    cost: float = scanned * ivf.code_size + centroids * 4 * ivf.d + reranked
    return cost


def _time_search(partition: Partition, queries: Float32Array, k: int, point: SearchPoint) -> float:
    started_s = time.perf_counter()
    search_partition(partition, queries, k, point)
    return time.perf_counter() - started_s
