"""Choose nprobe: the fewest lists to visit that still find what exact search finds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import faiss

from indexing.build import is_ivf, set_nprobe
from indexing.metrics import intersection_at_k
from indexing.search import search_index
from indexing.spec import Float32Array, Int64Array


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Hold what one nprobe gave.

    Attributes:
        nprobe: How many lists were visited; 0 on a flat index.
        intersection: Mean intersection_at_k with exact search, 0 to 1.
        latency_ms: Mean milliseconds a query, all queries searched as one batch.
    """

    nprobe: int
    intersection: float
    latency_ms: float


def tune_nprobe(
    index: faiss.Index,
    queries: Float32Array,
    exact_ids: Int64Array,
    *,
    k: int,
    target_intersection: float,
) -> tuple[OperatingPoint, list[OperatingPoint]]:
    """Find the smallest nprobe that meets a target, and leave the index set to it.

    The sweep visits the powers of two and nlist; it ends early where the intersection is 1.
    The choice never depends on the clock, so that a second run makes the same one.

    Args:
        index: A filled index; its nprobe is changed.
        queries: (Q, D) float32 unit rows that were held out of the index.
        exact_ids: (Q, >= k) int64 from `search_exact` over what the index holds.
        k: How many neighbours count.
        target_intersection: The least intersection_at_k that is good enough, in (0, 1].

    Returns:
        The chosen point, and all points by nprobe. Where none meets the target, the chosen
        one has the highest intersection: it is for the caller's gate to refuse it.

    Raises:
        ValueError: The target is outside (0, 1], or arrays are refused by `search_index` or
            `intersection_at_k`.
    """
    if not 0 < target_intersection <= 1:
        raise ValueError(f"target_intersection is {target_intersection}, expected (0, 1]")
    curve: list[OperatingPoint] = []
    for nprobe in _nprobes(index):
        point = measure_point(index, queries, exact_ids, k=k, nprobe=nprobe)
        curve.append(point)
        if point.intersection >= 1.0:
            break
    meeting = [point for point in curve if point.intersection >= target_intersection]
    chosen = meeting[0] if meeting else max(curve, key=lambda point: point.intersection)
    set_nprobe(index, chosen.nprobe)
    return chosen, curve


def measure_point(
    index: faiss.Index, queries: Float32Array, exact_ids: Int64Array, *, k: int, nprobe: int
) -> OperatingPoint:
    """Measure one nprobe, after one query to warm up; leaves the index set to it.

    Args:
        index: A filled index.
        queries: (Q, D) float32 unit rows.
        exact_ids: (Q, >= k) int64.
        k: How many neighbours count.
        nprobe: 1 to nlist; 0 on a flat index.

    Raises:
        ValueError: nprobe doesn't fit the index, or the arrays are refused.
    """
    set_nprobe(index, nprobe)
    search_index(index, queries[:1], k)
    started = time.perf_counter()
    _, ids = search_index(index, queries, k)
    elapsed_s = time.perf_counter() - started
    return OperatingPoint(
        nprobe=nprobe,
        intersection=intersection_at_k(ids, exact_ids, k),
        latency_ms=1e3 * elapsed_s / len(queries),
    )


def _nprobes(index: faiss.Index) -> list[int]:
    if not is_ivf(index):
        return [0]
    powers = [2**exponent for exponent in range((index.nlist - 1).bit_length())]
    return [*powers, index.nlist]
