"""Turns rankings of labelled queries into figures with their 95 % intervals. Queries Q."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from indexing.metrics import (
    bootstrap_interval,
    intersection_at_k,
    ndcgs_at_k,
    recalls_at_k,
    reciprocal_ranks,
)
from jobs.queries import RECALL_KS, Query

RESAMPLES = 1000
RANKS = max(RECALL_KS)
DEFINITIONS = (
    "A product is right for a query if its gain is above 0, or if the file has no gains.",
    "recall@k: share of the queries whose right product is among the first k. Of a query with "
    "several right products, the share of them that is there (of k, if there are more than k).",
    "MRR@10: mean of 1 / rank of the first right product, 0 where none is among the first 10.",
    "nDCG@10: gains as they are in the file (not 2^gain - 1), discounted by log2(rank + 1), over "
    "the best ordering of the judged products; a product without a judgment gains 0.",
)

Scores = dict[str, npt.NDArray[np.float64]]
"""By metric: (Q,) float64, one figure a query."""
Figures = dict[str, Any]


def score_queries(found: Sequence[Sequence[str]], queries: Sequence[Query]) -> Scores:
    """Score each query's ranking.

    Args:
        found: At most `RANKS` product ids of each query, best first, without repeats.
        queries: As many; each has a right product.

    Returns:
        Metrics by name; (Q,) each.

    Raises:
        ValueError: There is no query, or one has no right product.
    """
    relevant = [set(query.relevant) for query in queries]
    scores = {f"recall_at_{k}": recalls_at_k(found, relevant, k) for k in RECALL_KS}
    scores["mrr"] = reciprocal_ranks(found, relevant)
    scores[f"ndcg_at_{RANKS}"] = ndcgs_at_k(found, [query.gains for query in queries], RANKS)
    return scores


def summarize(scores: Scores) -> Figures:
    """Return each metric's mean and its interval: `value`, `low`, `high`."""
    figures: Figures = {}
    for name, values in scores.items():
        low, high = bootstrap_interval(values, resamples=RESAMPLES)
        figures[name] = {"value": float(values.mean()), "low": low, "high": high}
    return figures


def subtract(one: Scores, other: Scores) -> Scores:
    """Return the difference of the same queries' figures, to be summarized as a paired one."""
    return {name: values - other[name] for name, values in one.items()}


def pick(scores: Scores, places: Sequence[int] | npt.NDArray[np.int64]) -> Scores:
    """Return the figures of some of the queries."""
    return {name: values[np.asarray(places, np.int64)] for name, values in scores.items()}


def by_category(scores: Scores, categories: Sequence[str]) -> dict[str, Figures]:
    """Summarize the queries of each category, the one with most queries first."""
    names, codes = np.unique(np.array(categories, object).astype(str), return_inverse=True)
    counts = np.bincount(codes, minlength=len(names))
    order = np.lexsort((np.arange(len(names)), -counts)).tolist()
    return {
        str(names[code]): {"queries": int(counts[code])}
        | summarize(pick(scores, np.flatnonzero(codes == code)))
        for code in order
    }


def overlap(found: Sequence[Sequence[str]], exact: Sequence[Sequence[str]]) -> float:
    """Measure intersection@10 of ranked products with those of exact search, 0 to 1."""
    codes: dict[str, int] = {}
    tables = []
    for ranked in (found, exact):
        table = np.full((len(ranked), RANKS), -1, np.int64)
        for row, products in enumerate(ranked):
            numbers = [codes.setdefault(product, len(codes)) for product in products[:RANKS]]
            table[row, : len(numbers)] = numbers
        tables.append(table)
    return intersection_at_k(tables[0], tables[1], RANKS)
