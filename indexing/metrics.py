"""Measure an index against exact search, and search results against labels.

`intersection_at_k` compares vector ids with exact search; `recall_at_k` and
`mean_reciprocal_rank` compare ranked product ids with labels. Queries Q, neighbours K.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from indexing.spec import Int64Array

PADDING_ID = -1

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
    shared = [
        np.count_nonzero(np.intersect1d(found[:k], exact[:k]) != PADDING_ID)
        for found, exact in zip(ids, exact_ids, strict=True)
    ]
    return float(np.mean(np.asarray(shared) / exact_counts))


def recall_at_k(found: Sequence[Sequence[str]], relevant: Sequence[Relevant], k: int) -> float:
    """Measure which share of the relevant products is among the k best.

    With one relevant product a query, this is the share of queries that find it. With more
    than k of them, the share is of k, so that a perfect ranking scores 1.

    Args:
        found: Ranked product ids of every query, best first; may be shorter than k.
        relevant: The relevant product, or the set of them, of every query.
        k: How many results count.

    Returns:
        The mean over the queries, 0 to 1.

    Raises:
        ValueError: k < 1, lengths differ, there is no query, or one has no relevant product.
    """
    _check_k(k)
    labels = _check_labels(found, relevant)
    shares = [
        len(wanted.intersection(ranked[:k])) / min(k, len(wanted))
        for ranked, wanted in zip(found, labels, strict=True)
    ]
    return float(np.mean(shares))


def mean_reciprocal_rank(found: Sequence[Sequence[str]], relevant: Sequence[Relevant]) -> float:
    """Average 1 / (rank of the first relevant product), 0 where none was found.

    Args:
        found: Ranked product ids of every query, best first, without repeats.
        relevant: The relevant product, or the set of them, of every query.

    Returns:
        The mean over the queries, 0 to 1.

    Raises:
        ValueError: Lengths differ, there is no query, or one has no relevant product.
    """
    labels = _check_labels(found, relevant)
    ranks = [
        next((1.0 / rank for rank, product in enumerate(ranked, 1) if product in wanted), 0.0)
        for ranked, wanted in zip(found, labels, strict=True)
    ]
    return float(np.mean(ranks))


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


def _check_labels(found: Sequence[Sequence[str]], relevant: Sequence[Relevant]) -> list[set[str]]:
    if len(found) != len(relevant):
        raise ValueError(f"{len(found)} rankings but {len(relevant)} labels")
    labels = [{wanted} if isinstance(wanted, str) else set(wanted) for wanted in relevant]
    if not labels or not all(labels):
        raise ValueError("no query, or a query without a relevant product: nothing to compare")
    return labels
