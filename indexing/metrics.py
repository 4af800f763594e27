"""Measure an index against exact search, and search results against labels.

`intersection_at_k` compares ids with exact search; `recall_at_k`, `mean_reciprocal_rank` and
`ndcgs_at_k` compare ranked product ids with labels. A figure in the plural has a value a query:
`bootstrap_interval` says how far their mean could be off. Queries Q, neighbours K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import numpy.typing as npt

from indexing.spec import Int64Array
from indexing.topk import PADDING_ID

Float64Array = npt.NDArray[np.float64]
MAX_COMPARED = 2**24  # pairs of ids compared at once: 16 MiB
MAX_DRAWN = 2**22  # queries drawn at once while resampling: 64 MiB with their values

Relevant = str | AbstractSet[str]


def intersection_at_k(ids: Int64Array, exact_ids: Int64Array, k: int) -> float:
    """Measure which share of the exact k best an index finds, order ignored.

    A database smaller than k has fewer exact neighbours: the share is of those that exist.

    Args:
        ids: (Q, >= k) int64, what the index found, best first, padded with -1.
        exact_ids: (Q, >= k) int64, what exact search found, padded likewise.
        k: How many neighbours count.

    Returns:
        The mean over the queries, 0 to 1.

    Raises:
        ValueError: k < 1, shapes don't fit, there is no query, or one has no exact neighbour.
    """
    _check_k(k)
    if ids.ndim != 2 or exact_ids.ndim != 2 or len(ids) != len(exact_ids):
        raise ValueError(f"ids of shapes {ids.shape} and {exact_ids.shape}, expected (Q, K) twice")
    if min(ids.shape[1], exact_ids.shape[1]) < k:
        raise ValueError(f"{ids.shape[1]} and {exact_ids.shape[1]} neighbours a query, k is {k}")
    exact_counts = np.count_nonzero(exact_ids[:, :k] != PADDING_ID, axis=1)
    if not len(exact_counts) or not exact_counts.all():
        raise ValueError("no query, or a query without an exact neighbour: nothing to compare")
    step = max(1, MAX_COMPARED // k**2)
    shared = np.empty(len(ids))
    for start in range(0, len(ids), step):
        found, exact = (table[start : start + step, :k] for table in (ids, exact_ids))
        hits = (exact[:, :, None] == found[:, None, :]).any(axis=2) & (exact != PADDING_ID)
        shared[start : start + step] = np.count_nonzero(hits, axis=1)
    return float(np.mean(shared / exact_counts))


def recalls_at_k(
    found: Sequence[Sequence[str]], relevant: Sequence[Relevant], k: int
) -> Float64Array:
    """Measure for each query which share of its relevant products is among the k best.

    With one relevant product a query, the mean is the share of queries that find it. With more
    than k of them, the share is of k, so that a perfect ranking scores 1.

    Args:
        found: Ranked product ids of every query, best first; may be shorter than k.
        relevant: The relevant product, or the set of them, of every query.
        k: How many results count.

    Returns:
        (Q,) float64, 0 to 1.

    Raises:
        ValueError: k < 1, lengths differ, there is no query, or one has no relevant product.
    """
    _check_k(k)
    labels = _check_labels(found, relevant)
    shares = [
        len(wanted.intersection(ranked[:k])) / min(k, len(wanted))
        for ranked, wanted in zip(found, labels, strict=True)
    ]
    return np.array(shares, np.float64)


def recall_at_k(found: Sequence[Sequence[str]], relevant: Sequence[Relevant], k: int) -> float:
    """Average `recalls_at_k` over the queries."""
    return float(recalls_at_k(found, relevant, k).mean())


def reciprocal_ranks(found: Sequence[Sequence[str]], relevant: Sequence[Relevant]) -> Float64Array:
    """Compute for each query 1 / (rank of its first relevant product), 0 where none was found.

    Args:
        found: Ranked product ids of every query, best first, without repeats.
        relevant: The relevant product, or the set of them, of every query.

    Returns:
        (Q,) float64, 0 to 1.

    Raises:
        ValueError: Lengths differ, there is no query, or one has no relevant product.
    """
    labels = _check_labels(found, relevant)
    ranks = [
        next((1.0 / rank for rank, product in enumerate(ranked, 1) if product in wanted), 0.0)
        for ranked, wanted in zip(found, labels, strict=True)
    ]
    return np.array(ranks, np.float64)


def mean_reciprocal_rank(found: Sequence[Sequence[str]], relevant: Sequence[Relevant]) -> float:
    """Average `reciprocal_ranks` over the queries."""
    return float(reciprocal_ranks(found, relevant).mean())


def ndcgs_at_k(
    found: Sequence[Sequence[str]], gains: Sequence[Mapping[str, float]], k: int
) -> Float64Array:
    """Compute each query's normalised discounted cumulative gain over its k best.

    The gain enters as it was judged (linear), not as 2 ** gain - 1: graded judgments such as
    ESCI's 100, 10, 1, 0 are gains already. Discount: 1 / log2(rank + 1). A product without a
    judgment gains 0. The ideal ranking is the best ordering of the judged products.
    (Jarvelin and Kekalainen, TOIS 2002, with the discount in use since.)

    Args:
        found: Ranked product ids of every query, best first, without repeats.
        gains: Gain of every judged product of every query, finite, >= 0, one of them > 0.
        k: How many results count.

    Returns:
        (Q,) float64, 0 to 1.

    Raises:
        ValueError: k < 1, lengths differ, there is no query, a gain is negative or not finite,
            or a query has no gain above 0.
    """
    _check_k(k)
    if len(found) != len(gains) or not gains:
        raise ValueError(f"{len(found)} rankings and {len(gains)} judged queries")
    for judged in gains:
        values = list(judged.values())
        if not np.isfinite(values).all() or min(values, default=0) < 0 or not any(values):
            raise ValueError("gains must be finite and >= 0, at least one a query above 0")
    scores = [
        _discounted([judged.get(product, 0.0) for product in ranked[:k]])
        / _discounted(sorted(judged.values(), reverse=True)[:k])
        for ranked, judged in zip(found, gains, strict=True)
    ]
    return np.array(scores, np.float64)


def bootstrap_interval(
    values: Float64Array, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Estimate how far a mean over queries could be off, by the percentile bootstrap.

    Queries are drawn anew, with replacement, as many as there are. Where all values are equal,
    the interval has no width, however few they are: show their number beside it.

    Args:
        values: (Q,) float64, one figure a query.
        resamples: How often queries are drawn.
        level: Share of resampled means inside the interval.
        seed: Seeds the draw.

    Returns:
        Lowest and highest plausible mean; the mean itself lies between them.

    Raises:
        ValueError: There is no query, a value is not finite, resamples < 1, or level is not
            between 0 and 1.
    """
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape}: expected at least one, all finite")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"{resamples} resamples at level {level}: expected >= 1 and in (0, 1)")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, MAX_DRAWN // len(values))
    for start in range(0, resamples, step):
        part = means[start : start + step]
        drawn = generator.integers(len(values), size=(len(part), len(values)))
        part[:] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = float(values.mean())
    return min(float(low), mean), max(float(high), mean)


def list_imbalance(list_sizes: Int64Array) -> float:
    """Compute FAISS's imbalance factor: nlist * sum(size ** 2) / sum(size) ** 2.

    1 when all lists are as long; f means that a search compares f times as many vectors.

    Args:
        list_sizes: (nlist,) int64; empty or all zero (a flat or an empty index) gives 1.

    Returns:
        The factor, 1 to nlist.
    """
    sizes = list_sizes.astype(np.float64)
    total = sizes.sum()
    return float(len(sizes) * (sizes**2).sum() / total**2) if total else 1.0


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}: at least 1 is needed")


def _discounted(gains: Sequence[float]) -> float:
    """Sum gains at ranks 1, 2, ... with the discount 1 / log2(rank + 1)."""
    return float(np.sum(np.asarray(gains) / np.log2(np.arange(2, len(gains) + 2))))


def _check_labels(found: Sequence[Sequence[str]], relevant: Sequence[Relevant]) -> list[set[str]]:
    if len(found) != len(relevant):
        raise ValueError(f"{len(found)} rankings but {len(relevant)} labels")
    labels = [{wanted} if isinstance(wanted, str) else set(wanted) for wanted in relevant]
    if not labels or not all(labels):
        raise ValueError("no query, or a query without a relevant product: nothing to compare")
    return labels
