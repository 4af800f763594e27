"""Ask FAISS: which lists to visit, which ids may be found, in calls of bounded memory.

Everything goes with the call, nothing is set on the index, so that threads may share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from indexing.anatomy import is_ivf, ivf_of
from indexing.spec import Float32Array, Int64Array
from indexing.topk import PADDING_ID, PADDING_SCORE, padding

MAX_PROBES = 2**22  # lists or candidates of one call to FAISS: some 50 MiB of its memory
# FAISS keeps a rotated query for each list of each query that RaBitQfs visits, and crashes where
# they take over 2 GiB (1.15.1, one thread).
MAX_RABITQ_BYTES = 2**26
_faiss: Any = faiss  # its stubs lack what search parameters take


@dataclass(frozen=True)
class Chosen:
    """Hold the ids that may be found, and which share of all searched vectors they are.

    Attributes:
        ids: (M,) int64, rising.
        selector: FAISS's view of them; threads may share it.
        share: 0 to 1.
    """

    ids: Int64Array
    selector: faiss.IDSelector
    share: float


def choose(only: Int64Array, ntotal: int) -> Chosen:
    """Prepare the ids that may be found.

    Args:
        only: (M,) int64, rising.
        ntotal: How many vectors are searched.

    Raises:
        ValueError: The ids are of another shape or dtype, or don't rise.
    """
    if only.ndim != 1 or only.dtype != np.int64 or (only[1:] <= only[:-1]).any():
        raise ValueError(
            f"only: {only.dtype} of shape {only.shape}, expected rising int64 ids (M,)"
        )
    # A set behind a Bloom filter. Tried on 400k vectors in 512 lists, 5 queries, nprobe 32, 1,000
    # ids: 0.8 ms; IDSelectorArray, which compares them one by one, took 79 ms.
    selector = faiss.IDSelectorBatch(only)
    return Chosen(only, selector, min(1.0, len(only) / max(1, ntotal)))


def lists_of(index: faiss.Index) -> faiss.IndexIVF | None:
    """Return the IVF index inside an index; None where it is flat.

    Raises:
        ValueError: It is neither.
    """
    return ivf_of(index) if is_ivf(index) else None


def has_hnsw(index: faiss.IndexIVF) -> bool:
    """Say whether an HNSW graph finds the lists of an index."""
    return isinstance(faiss.downcast_index(index.quantizer), faiss.IndexHNSW)


def check_probes(index: faiss.Index, nprobe: int, ef_search: int) -> None:
    """Refuse a search that an index can't do.

    Raises:
        ValueError: The index is flat and a number isn't 0, nprobe is outside 1..nlist, or
            ef_search isn't 0 exactly where there is no HNSW over the lists.
    """
    ivf = lists_of(index)
    if ivf is None:
        if nprobe or ef_search:
            raise ValueError(
                f"nprobe is {nprobe} and ef_search {ef_search}, but a flat index has no lists: "
                "use 0"
            )
        return
    if not 1 <= nprobe <= ivf.nlist:
        raise ValueError(f"nprobe is {nprobe}, expected 1 to nlist {ivf.nlist}")
    if has_hnsw(ivf) != bool(ef_search):
        why = "1 or more: HNSW finds the lists" if has_hnsw(ivf) else "0: there is no HNSW"
        raise ValueError(f"ef_search is {ef_search}, expected {why}")


def search_codes(
    index: faiss.Index,
    queries: Float32Array,
    k: int,
    nprobe: int,
    ef_search: int,
    chosen: Chosen | None,
) -> tuple[Float32Array, Int64Array]:
    """Find the k best vectors by their codes; everything is checked already.

    Returns:
        Scores (Q, K) float32, best first, and ids (Q, K) int64, padded.
    """
    scores, ids = padding(len(queries), k)
    found = min(k, index.ntotal, len(chosen.ids) if chosen else k)
    if not found:
        return scores, ids
    if chosen:
        nprobe, ef_search = _widen(index, nprobe, ef_search, chosen.share)
    parameters = _parameters(index, nprobe, ef_search, chosen)
    step = _queries_at_once(index, nprobe, found)
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        scores[rows, :found], ids[rows, :found] = index.search(
            queries[rows], found, params=parameters
        )
    scores[ids == PADDING_ID] = PADDING_SCORE  # FastScan pads with a score of its own
    return scores, ids


def _queries_at_once(index: faiss.Index, nprobe: int, found: int) -> int:
    at_once = MAX_PROBES // max(nprobe, found)
    ivf = lists_of(index)
    if isinstance(ivf, _faiss.IndexIVFRaBitQFastScan):
        at_once = min(at_once, MAX_RABITQ_BYTES // (4 * ivf.d * nprobe))
    return max(1, at_once)


def _widen(index: faiss.Index, nprobe: int, ef_search: int, share: float) -> tuple[int, int]:
    """Return how many lists to visit where only a share of the vectors counts.

    nprobe was chosen for lists whose every vector counts. Where one in f does, it takes f times
    as many lists to hold as many candidates, and the k nearest lie that much further away.
    """
    ivf = lists_of(index)
    if ivf is None:
        return nprobe, ef_search
    wider = min(int(ivf.nlist), math.ceil(nprobe / share))
    return wider, math.ceil(ef_search * wider / nprobe)


def _parameters(index: faiss.Index, nprobe: int, ef_search: int, chosen: Chosen | None) -> Any:  # noqa: ANN401
    selector = chosen.selector if chosen else None
    if not nprobe:
        return _faiss.SearchParameters(sel=selector)
    # The graph stops after ef_search candidates, also where more lists were asked for: of 1,024
    # lists, ef_search 16 found 330 to 420.
    graph = _faiss.SearchParametersHNSW(efSearch=max(ef_search, nprobe)) if ef_search else None
    lists = _faiss.SearchParametersIVF(sel=selector, nprobe=nprobe, quantizer_params=graph)
    if isinstance(index, faiss.IndexPreTransform):
        return _faiss.SearchParametersPreTransform(index_params=lists)
    return lists
