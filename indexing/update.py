"""Update a trained index in place of building it anew.

Removing and merging keep the quantizers: the index answers like one built afresh from the live
rows with the same quantizers. What ages is their fit to the catalog: see `indexing.drift`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from indexing.anatomy import (
    bounds,
    check_writable,
    is_ivf,
    ivf_of,
    keep_range,
    remove_selected,
    rotate,
    stored_ids,
)
from indexing.anatomy import empty_clone as empty_clone
from indexing.build import check_ids, check_same_template, check_unique, move_vectors
from indexing.vectors import Float32Array, Int64Array, check_unit_rows

# FAISS keeps the ids to remove in a hash set of some 50 bytes an id: 200 MiB at once.
REMOVED_AT_ONCE = 2**22
COMPARED_AT_ONCE = 2**20  # stored ids looked up at once: 8 MiB, and as much again
VALUES_AT_ONCE = 2**22  # values decoded at once: 16 MiB, a few times over


def remove_vectors(index: faiss.Index, vector_ids: Int64Array) -> None:
    """Remove exactly these vectors, **in place**; a refused removal changes nothing.

    Every stored id is read, however few are removed. Beside the index, memory holds its ids
    (8 bytes a vector) and a few hundred MiB.

    Args:
        index: An index of `indexing.build`, in memory.
        vector_ids: (N,) int64, unique, each in the index; N may be 0.

    Raises:
        ValueError: An id is repeated, negative or not in the index, the array is of another
            shape or dtype, or the index is mapped from its file.
    """
    check_writable(index)
    check_ids(vector_ids, vector_ids.size)
    _mark_removed(stored_ids(index), vector_ids)
    _remove(index, vector_ids)


def update_index(
    base: faiss.Index,
    removed: Int64Array,
    parts: Sequence[faiss.Index],
    *,
    low: int | None = None,
    high: int | None = None,
) -> faiss.Index:
    """Remove vectors from an index and move new ones into it, **in place**.

    **This changes base and empties the parts**; everything is checked before anything moves,
    and a refused update leaves all of them whole. The result answers like an index filled
    afresh with the live rows; only the order of equal scores may differ. Memory beside the
    indexes: 24 bytes a vector for a while, to compare the ids.

    Args:
        base: The index to update, in memory; its nprobe stays.
        removed: (N,) int64, unique, each in base. The id of a changed vector is here, and in a
            part with its new vector.
        parts: Clones of base's template (`empty_clone`), filled by `add_vectors`; may be none.
        low: Ids under it are dropped, from base and from the parts; None: none are.
        high: Ids from it on are dropped likewise.

    Returns:
        base, holding its own vectors without the removed ones, and those of all parts.

    Raises:
        ValueError: A removed id is repeated or not in base, a part is given twice, stems from
            another template or is mapped from its file, or an id would be in the index twice.
    """
    check_same_template([base, *parts])
    for index in (base, *parts):
        check_writable(index)
    check_ids(removed, removed.size)
    stored = stored_ids(base)
    kept = stored[~_mark_removed(stored, removed)]
    held = [in_range(ids, low, high) for ids in (kept, *(stored_ids(part) for part in parts))]
    check_unique(np.concatenate(held))
    _remove(base, removed)
    for index in (base, *parts):
        keep_range(index, low, high)
    return move_vectors([base, *parts])


def quantization_error(index: faiss.Index, sample: Float32Array) -> float:
    """Measure how far vectors lie from what an index's quantizers make of them.

    Where codes are lossy that is the decoded vector, turned back by the rotation. Where they
    keep vectors whole or as float16, and with RaBitQ, whose codes estimate distances and not
    vectors, it is the centroid of the list that a vector goes to, after the rotation. Figures of
    different codecs can't be compared. Vectors need not be in the index.

    Args:
        index: A trained index of `indexing.build`, empty or filled.
        sample: (N, D) float32 unit rows, N >= 1, drawn at random from what the index holds.

    Returns:
        The mean squared L2 distance, 0 to about 4; 0 on a flat index.

    Raises:
        ValueError: The sample is empty, of another D or dtype, not finite or not of unit length.
    """
    check_unit_rows(sample, dim=index.d, name="sample")
    if not len(sample):
        raise ValueError("sample: 0 rows, at least 1 is needed")
    if not is_ivf(index):
        return 0.0
    step = max(1, VALUES_AT_ONCE // index.d)
    total = 0.0
    for start in range(0, len(sample), step):
        lost = _lost(index, sample[start : start + step]).ravel()
        total += float(np.square(lost, out=lost).sum(dtype=np.float64))
    return total / len(sample)


def in_range(ids: Int64Array, low: int | None, high: int | None) -> Int64Array:
    """Return those of (N,) ids with low <= id < high; None: no bound."""
    first, past = bounds(low, high)
    return ids[(ids >= first) & (ids < past)]


def _mark_removed(stored: Int64Array, removed: Int64Array) -> npt.NDArray[np.bool_]:
    """Return (ntotal,) which stored ids are to be removed; refuse an id that isn't stored."""
    wanted = np.sort(removed)
    marks = np.zeros(len(stored), dtype=np.bool_)
    found = np.zeros(len(wanted), dtype=np.bool_)
    for start in range(0, len(stored) if len(wanted) else 0, COMPARED_AT_ONCE):
        block = stored[start : start + COMPARED_AT_ONCE]
        places = np.minimum(np.searchsorted(wanted, block), len(wanted) - 1)
        hits = wanted[places] == block
        marks[start : start + COMPARED_AT_ONCE] = hits
        found[places[hits]] = True
    if not found.all():
        absent = wanted[~found]
        raise ValueError(
            f"{len(absent)} of {len(removed)} vector ids to remove are not in the index, "
            f"first {int(absent[0])}"
        )
    return marks


def _remove(index: faiss.Index, vector_ids: Int64Array) -> None:
    for start in range(0, len(vector_ids), REMOVED_AT_ONCE):
        batch = vector_ids[start : start + REMOVED_AT_ONCE]
        remove_selected(index, faiss.IDSelectorBatch(batch))


def _lost(index: faiss.Index, vectors: Float32Array) -> Float32Array:
    """Return (N, D) what quantizing takes from vectors; after the rotation, (N, rotated D)."""
    ivf = ivf_of(index)
    lost: Float32Array
    if _decodes_closely(ivf):
        lost = vectors - index.sa_decode(index.sa_encode(vectors))
        return lost
    rotated = rotate(index, vectors)
    if isinstance(ivf, faiss.IndexIVFPQFastScan):
        # Its own sa_decode crashes on an index that was read from a file (FAISS 1.15.1 leaves
        # fine_quantizer null); without residuals its codes are those of the PQ itself.
        quantizer: Any = ivf.pq  # faiss's stubs describe the C++ calls
        kept = quantizer.decode(quantizer.compute_codes(rotated))
        return _unrotated(index, vectors, rotated, kept)
    numbers = ivf.quantizer.assign(rotated, 1)[:, 0]
    centroids: Float32Array = ivf.quantizer.reconstruct_batch(numbers)
    return rotated - centroids


def _unrotated(
    index: faiss.Index, vectors: Float32Array, rotated: Float32Array, kept: Float32Array
) -> Float32Array:
    """Return (N, D) what is lost of vectors, where (N, rotated D) is kept of the rotated ones."""
    if not isinstance(index, faiss.IndexPreTransform):
        return rotated - kept
    chain: Any = index.chain  # faiss's stubs say it is a list
    lost: Float32Array = vectors - chain.at(0).reverse_transform(kept)
    return lost


def _decodes_closely(ivf: Any) -> bool:  # noqa: ANN401 - faiss's stubs lack methods
    if isinstance(ivf, faiss.IndexIVFScalarQuantizer):
        whole: bool = ivf.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        return not whole
    return isinstance(ivf, faiss.IndexIVFPQ)
