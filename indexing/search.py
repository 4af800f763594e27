"""Search an index, search exactly over blocks, and join and group what was found.

Scores are inner products, best first. Where fewer than K neighbours exist, the rest is padded
as FAISS does it: id -1, score float32's lowest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import faiss
import numpy as np

from indexing.spec import Float32Array, Int64Array, check_unit_rows

PADDING_ID = -1
PADDING_SCORE = np.finfo(np.float32).min
MAX_SCORES = 2**24  # scores in memory at once while searching exactly: 64 MiB


def search_index(
    index: faiss.Index, queries: Float32Array, k: int
) -> tuple[Float32Array, Int64Array]:
    """Find the k best vectors of an index for every query.

    Args:
        index: A trained index; see `indexing.build.set_nprobe`.
        queries: (Q, D) float32 unit rows.
        k: K >= 1.

    Returns:
        Scores (Q, K) float32, best first, and ids (Q, K) int64; -1 pads the ids.

    Raises:
        ValueError: k < 1, or a query is of another D, not finite or not of unit length.
    """
    _check_k(k)
    check_unit_rows(queries, dim=index.d, name="queries")
    scores, ids = index.search(queries, k)
    return scores, ids


def search_exact(
    queries: Float32Array, blocks: Iterable[tuple[Int64Array, Float32Array]], k: int
) -> tuple[Float32Array, Int64Array]:
    """Find the k best vectors for every query by comparing with all of them.

    Equal scores are ordered by the smaller id. The memory used beside one block is bounded:
    a few arrays of 2**24 scores (64 MiB each) and the (Q, K) best so far.

    Args:
        queries: (Q, D) float32 unit rows.
        blocks: Pairs of ids (N,) int64 and vectors (N, D) float32 unit rows; read once, one
            at a time. No id may come twice.
        k: K >= 1.

    Returns:
        Scores (Q, K) float32, best first, and ids (Q, K) int64, padded with -1.

    Raises:
        ValueError: k < 1, an array is of the wrong shape or dtype, not finite or not of unit
            length, or an id came twice among a query's best.
    """
    _check_k(k)
    if queries.ndim != 2:
        raise ValueError(f"queries: shape is {queries.shape}, expected (Q, D)")
    dim = queries.shape[1]
    check_unit_rows(queries, dim=dim, name="queries")
    best_scores, best_ids = _padding(len(queries), k)
    slice_rows = max(1, MAX_SCORES // max(1, len(queries)))
    for ids, vectors in blocks:
        check_unit_rows(vectors, dim=dim, name="block")
        if ids.shape != (len(vectors),):
            raise ValueError(f"block: {len(vectors)} vectors but ids of shape {ids.shape}")
        for start in range(0, len(vectors), slice_rows):
            scores = queries @ vectors[start : start + slice_rows].T
            rows, columns = np.nonzero(scores >= _bar(scores, best_scores)[:, None])
            found = (rows, scores[rows, columns], ids[start:][columns])
            best_scores, best_ids = _take_best(
                [_flatten(best_scores, best_ids), found], len(queries), k
            )
    return best_scores, best_ids


def merge_topk(
    parts: Sequence[tuple[Float32Array, Int64Array]], k: int
) -> tuple[Float32Array, Int64Array]:
    """Join the results of the same queries over separate sets of vectors.

    Args:
        parts: Pairs of scores (Q, K') float32 and ids (Q, K') int64, padded with -1; K' may
            differ between parts. The sets they come from share no id.
        k: K >= 1.

    Returns:
        Scores (Q, K) float32, best first, equal ones by the smaller id; ids (Q, K) int64.

    Raises:
        ValueError: There are no parts, shapes disagree, k < 1, or an id came twice.
    """
    _check_k(k)
    if not parts:
        raise ValueError("no results to merge")
    n_queries = len(parts[0][1])
    for scores, ids in parts:
        if scores.shape != ids.shape or ids.ndim != 2 or len(ids) != n_queries:
            raise ValueError(
                f"results of shapes {scores.shape} and {ids.shape}, expected ({n_queries}, K)"
            )
    return _take_best([_flatten(scores, ids) for scores, ids in parts], n_queries, k)


def group_by_product(
    scores: Float32Array, ids: Int64Array, products: Sequence[str], k: int
) -> list[tuple[str, float, int]]:
    """Keep the best vector of every product for one query.

    Args:
        scores: (K,) float32.
        ids: (K,) int64; entries of -1 are skipped.
        products: K product ids, the i-th owning the vector ids[i]; ignored where that is -1.
        k: The most products to return, >= 1.

    Returns:
        At most k tuples (product, score, vector id), best first; equal scores by smaller id.

    Raises:
        ValueError: The three differ in length, or k < 1.
    """
    _check_k(k)
    if not len(scores) == len(ids) == len(products):
        raise ValueError(
            f"{len(scores)} scores, {len(ids)} ids and {len(products)} products: expected as many"
        )
    best: dict[str, tuple[str, float, int]] = {}
    for place in np.lexsort((ids, -scores)).tolist():
        if ids[place] == PADDING_ID:
            continue
        product = products[place]
        best.setdefault(product, (product, float(scores[place]), int(ids[place])))
        if len(best) == k:
            break
    return list(best.values())


_Candidates = tuple[Int64Array, Float32Array, Int64Array]  # query numbers, scores, ids: all (C,)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}: at least 1 is needed")


def _padding(n_queries: int, k: int) -> tuple[Float32Array, Int64Array]:
    scores = np.full((n_queries, k), PADDING_SCORE, dtype=np.float32)
    return scores, np.full((n_queries, k), PADDING_ID, dtype=np.int64)


def _bar(scores: Float32Array, best_scores: Float32Array) -> Float32Array:
    """Return (Q,) scores under which nothing can be among the best: few pass it."""
    k = best_scores.shape[1]
    bar = best_scores[:, -1]
    unfilled = bar == PADDING_SCORE
    if scores.shape[1] > k and unfilled.any():
        bar = bar.copy()
        bar[unfilled] = np.partition(scores[unfilled], -k, axis=1)[:, -k]
    return bar


def _flatten(scores: Float32Array, ids: Int64Array) -> _Candidates:
    rows, columns = np.nonzero(ids != PADDING_ID)
    return rows, scores[rows, columns], ids[rows, columns]


def _take_best(
    candidates: Sequence[_Candidates], n_queries: int, k: int
) -> tuple[Float32Array, Int64Array]:
    rows, scores, ids = (np.concatenate(column) for column in zip(*candidates, strict=True))
    order = np.lexsort((ids, -scores, rows))
    rows = rows[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = rank < k
    best_scores, best_ids = _padding(n_queries, k)
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
