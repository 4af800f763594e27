"""Keep the best of many candidates, for many queries at once.

Where fewer than K were found, the rest is id -1 and score float32's lowest, as FAISS does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from indexing.spec import Float32Array, Int64Array

PADDING_ID = -1
PADDING_SCORE = np.finfo(np.float32).min
Candidates = tuple[Int64Array, Float32Array, Int64Array]  # query numbers, scores, ids: all (C,)


def padding(n_queries: int, k: int) -> tuple[Float32Array, Int64Array]:
    """Return (Q, K) scores and ids of nothing."""
    scores = np.full((n_queries, k), PADDING_SCORE, dtype=np.float32)
    return scores, np.full((n_queries, k), PADDING_ID, dtype=np.int64)


def bar_of(scores: Float32Array, best_scores: Float32Array) -> Float32Array:
    """Return (Q,) scores under which nothing can be among the best: few pass it."""
    k = best_scores.shape[1]
    bar = best_scores[:, -1]
    unfilled = bar == PADDING_SCORE
    if scores.shape[1] > k and unfilled.any():
        bar = bar.copy()
        bar[unfilled] = np.partition(scores[unfilled], -k, axis=1)[:, -k]
    return bar


def flatten(scores: Float32Array, ids: Int64Array, k: int) -> Candidates:
    """Return what could be among the k best of (Q, K') scores and ids, without the padding."""
    kept = ids != PADDING_ID
    if ids.shape[1] > k:  # sorting them all takes 60 times as long
        kept &= scores >= np.partition(scores, -k, axis=1)[:, -k, None]
    rows, columns = np.nonzero(kept)
    return rows, scores[rows, columns], ids[rows, columns]


def take_best(
    candidates: Sequence[Candidates], n_queries: int, k: int
) -> tuple[Float32Array, Int64Array]:
    """Return each query's k best candidates, equal scores by the smaller id.

    Returns:
        Scores (Q, K) float32 and ids (Q, K) int64, padded.

    Raises:
        ValueError: An id came twice among a query's best.
    """
    rows, scores, ids = (np.concatenate(column) for column in zip(*candidates, strict=True))
    order = np.lexsort((ids, -scores, rows))
    rows = rows[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = rank < k
    best_scores, best_ids = padding(n_queries, k)
    best_scores[rows[kept], rank[kept]] = scores[order][kept]
    best_ids[rows[kept], rank[kept]] = ids[order][kept]
    _refuse_repeats(best_ids)
    return best_scores, best_ids


def _refuse_repeats(ids: Int64Array) -> None:
    ordered = np.sort(ids, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING_ID)
    if repeated.any():
        example = int(ordered[:, 1:][repeated][0])
        raise ValueError(f"vector id {example} came twice for one query: the parts overlap")
