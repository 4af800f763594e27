"""Search partitions of an index, search exactly over blocks, and join and group what was found.

Scores are inner products, best first. Where fewer than K neighbours exist, the rest is padded
as FAISS does it: id -1, score float32's lowest.

How deep a search goes comes with each call and is never set on an index: one opened index
serves any number of threads, each with its own `SearchPoint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import faiss
import numpy as np

from indexing.probe import Chosen as Chosen
from indexing.probe import (
    check_probes,
    search_codes,
)
from indexing.probe import choose as choose
from indexing.refine import RefineStore
from indexing.spec import Float32Array, Int64Array, check_unit_rows
from indexing.topk import PADDING_ID, bar_of, flatten, padding, take_best

MAX_SCORES = 2**24  # scores in memory at once while searching exactly: 64 MiB
MAX_COMPARED = 4096  # ids to search among that are compared one by one, where refine allows it


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """Say how deep a search goes.

    Attributes:
        nprobe: How many lists of a partition are visited; 0 on a flat index.
        ef_search: How many candidates the HNSW graph over the lists keeps; 0 where the lists
            are compared one by one.
        rerank: How many candidates a partition scores again with its refine store; 0: none.
    """

    nprobe: int
    ef_search: int = 0
    rerank: int = 0

    def __post_init__(self) -> None:
        """Refuse a negative number.

        Raises:
            ValueError: As the first line says.
        """
        if min(self.nprobe, self.ef_search, self.rerank) < 0:
            raise ValueError(f"{self}: none of its numbers may be negative")


@dataclass(frozen=True)
class Partition:
    """Hold a range of the vector ids: their codes and, where there is one, their refine store."""

    index: faiss.Index
    refine: RefineStore | None = None


def search_index(
    index: faiss.Index,
    queries: Float32Array,
    k: int,
    point: SearchPoint,
    *,
    only: Int64Array | None = None,
) -> tuple[Float32Array, Int64Array]:
    """Find the k best vectors of an index for every query, by their codes alone.

    Scores are what FAISS makes of the codes: exact on a flat index and where lists hold whole
    vectors, approximate elsewhere.

    Args:
        index: A trained index.
        queries: (Q, D) float32 unit rows.
        k: K >= 1.
        point: Where to look; without rerank.
        only: As in `search_partitions`.

    Returns:
        Scores (Q, K) float32, best first, and ids (Q, K) int64, padded with -1.

    Raises:
        ValueError: As `search_partitions`.
    """
    return search_partition(Partition(index), queries, k, point, only=only)


def search_partition(
    partition: Partition,
    queries: Float32Array,
    k: int,
    point: SearchPoint,
    *,
    only: Int64Array | None = None,
) -> tuple[Float32Array, Int64Array]:
    """Find the k best vectors of one partition for every query; see `search_partitions`."""
    return search_partitions([partition], queries, k, point, only=only)


def search_partitions(
    partitions: Sequence[Partition],
    queries: Float32Array,
    k: int,
    point: SearchPoint,
    *,
    only: Int64Array | Chosen | None = None,
    pool: ThreadPoolExecutor | None = None,
) -> tuple[Float32Array, Int64Array]:
    """Find the k best vectors of all partitions for every query.

    With point.rerank each partition takes its max(k, rerank) best by their codes and scores them
    again with its refine store.

    With `only`, probing goes on in more lists, since a list holds fewer vectors that count; up to
    4,096 ids are compared one by one with the refine store, where there is one: exact, and
    cheaper than any list.

    Args:
        partitions: At least one; no id is in two of them.
        queries: (Q, D) float32 unit rows.
        k: K >= 1.
        point: How deep each partition is searched.
        only: (M,) int64, rising: the ids that may be found. Those that no partition has are no
            error; None: all ids. What `choose` made of them serves many calls: half a
            microsecond an id is saved in each.
        pool: Threads that search a partition each (`search_pool`); None: one after the other.

    Returns:
        Scores (Q, K) float32, best first, and ids (Q, K) int64, padded with -1.

    Raises:
        ValueError: There is no partition, partitions differ in D, k < 1, a query is of another
            D, not finite or not of unit length, the point doesn't fit the indexes, it re-ranks
            where there is no refine store, or `only` isn't int64 and rising.
    """
    _check_k(k)
    dims = {partition.index.d for partition in partitions}
    if len(dims) != 1:
        raise ValueError(f"{len(partitions)} partitions of dimensions {sorted(dims)}: expected one")
    check_unit_rows(queries, dim=dims.pop(), name="queries")
    total = sum(partition.index.ntotal for partition in partitions)
    chosen = choose(only, total) if isinstance(only, np.ndarray) else only
    search = partial(_search_one, queries=queries, k=k, point=point, chosen=chosen)
    parts = list(map(search, partitions) if pool is None else pool.map(search, partitions))
    return parts[0] if len(parts) == 1 else merge_topk(parts, k)


def search_pool(threads: int) -> ThreadPoolExecutor:
    """Return threads to search partitions with; each searches on one core.

    A new thread doesn't inherit what `faiss.omp_set_num_threads` set elsewhere: left alone, each
    would start as many OpenMP threads as there are cores.
    """
    return ThreadPoolExecutor(threads, "search", faiss.omp_set_num_threads, (1,))


def search_exact(
    queries: Float32Array,
    blocks: Iterable[tuple[Int64Array, Float32Array]],
    k: int,
    *,
    exclude: Int64Array | None = None,
) -> tuple[Float32Array, Int64Array]:
    """Find the k best vectors for every query by comparing with all of them.

    Equal scores are ordered by the smaller id. The memory used beside one block is bounded:
    a few arrays of 2**24 scores (64 MiB each) and the (Q, K) best so far.

    Args:
        queries: (Q, D) float32 unit rows.
        blocks: Pairs of ids (N,) int64 and vectors (N, D) float32 unit rows; read once, one
            at a time. No id may come twice.
        k: K >= 1.
        exclude: (Q,) int64, for each query the id that it must not find: its own, where it
            comes from the blocks itself; -1 excludes nothing.

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
    if exclude is not None:
        check_excluded(exclude, len(queries))
    best_scores, best_ids = padding(len(queries), k)
    slice_rows = max(1, MAX_SCORES // max(1, len(queries)))
    for ids, vectors in blocks:
        check_unit_rows(vectors, dim=dim, name="block")
        if ids.shape != (len(vectors),):
            raise ValueError(f"block: {len(vectors)} vectors but ids of shape {ids.shape}")
        for start in range(0, len(vectors), slice_rows):
            scores = queries @ vectors[start : start + slice_rows].T
            if exclude is not None:
                _exclude(scores, ids[start : start + slice_rows], exclude)
            rows, columns = np.nonzero(scores >= bar_of(scores, best_scores)[:, None])
            found = (rows, scores[rows, columns], ids[start:][columns])
            best_scores, best_ids = take_best(
                [flatten(best_scores, best_ids, k), found], len(queries), k
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
        ValueError: There are no parts, shapes disagree, k < 1, or an id came twice among a
            query's best.
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
    return take_best([flatten(scores, ids, k) for scores, ids in parts], n_queries, k)


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


def check_excluded(exclude: Int64Array, n_queries: int) -> None:
    """Refuse excluded ids that aren't one int64 a query.

    Raises:
        ValueError: As the first line says.
    """
    if exclude.shape != (n_queries,) or exclude.dtype != np.int64:
        raise ValueError(
            f"exclude: {exclude.dtype} of shape {exclude.shape}, expected int64 ({n_queries},)"
        )


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}: at least 1 is needed")


def _search_one(
    partition: Partition,
    queries: Float32Array,
    k: int,
    point: SearchPoint,
    chosen: Chosen | None,
) -> tuple[Float32Array, Int64Array]:
    index, refine = partition.index, partition.refine
    check_probes(index, point.nprobe, point.ef_search)
    if point.rerank and refine is None:
        raise ValueError(f"rerank is {point.rerank}, but there is no refine store: use 0")
    if refine is not None and chosen and len(chosen.ids) <= MAX_COMPARED:
        return _compare(refine, queries, k, chosen.ids)
    depth = max(k, point.rerank)
    scores, ids = search_codes(index, queries, depth, point.nprobe, point.ef_search, chosen)
    if refine is None or not point.rerank:
        return scores, ids
    return merge_topk([(refine.scores(queries, ids), ids)], k)


def _compare(
    refine: RefineStore, queries: Float32Array, k: int, only: Int64Array
) -> tuple[Float32Array, Int64Array]:
    """Find the k best among a few ids by comparing with every one that the store has."""
    first, past = (np.searchsorted(refine.ids, only, side) for side in ("left", "right"))
    there = only[first < past]
    vectors = refine.vectors(there)
    step = max(1, MAX_SCORES // max(1, len(there)))
    found = []
    for start in range(0, max(1, len(queries)), step):
        scores = queries[start : start + step] @ vectors.T
        found.append(merge_topk([(scores, np.broadcast_to(there, scores.shape))], k))
    scores, ids = (np.concatenate(column) for column in zip(*found, strict=True))
    return scores, ids


def _exclude(scores: Float32Array, ids: Int64Array, exclude: Int64Array) -> None:
    """Set scores (Q, N) of each query's excluded id to -inf, under any bar, in place."""
    columns = np.flatnonzero(np.isin(ids, exclude))
    if len(columns):
        rows, places = np.nonzero(ids[columns] == exclude[:, None])
        scores[rows, columns[places]] = -np.inf
