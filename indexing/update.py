"""Update a trained index in place of building it anew.

Removing and merging keep the quantizers: the index answers like one built afresh from the live
rows with the same quantizers. What ages is their fit to the catalog: see `indexing.drift`.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
import numpy.typing as npt

from indexing.build import (
    check_ids,
    check_same_template,
    check_unique,
    empty_flat,
    is_ivf,
    move_vectors,
    stored_ids,
    without_vectors,
)
from indexing.spec import Float32Array, Int64Array, check_unit_rows

# FAISS keeps the ids to remove in a hash set of some 50 bytes an id: 200 MiB at once.
REMOVED_AT_ONCE = 2**22
COMPARED_AT_ONCE = 2**20  # stored ids looked up at once: 8 MiB, and as much again
VALUES_AT_ONCE = 2**22  # values decoded at once: 16 MiB, a few times over


def empty_clone(index: faiss.Index) -> faiss.Index:
    """Return the template that an index was filled from: its quantizers and no vectors.

    No vector is copied, and the index is left as it was; no other thread may use it meanwhile.

    Args:
        index: An index of `indexing.build`, empty or filled.

    Returns:
        An index with ntotal == 0, nprobe 1 and the same `template_hash`, for `add_vectors`.

    Raises:
        ValueError: The index is neither an IVF index nor a flat one with ids.
    """
    if not is_ivf(index):
        return empty_flat(index.d)
    with without_vectors(index):
        return faiss.clone_index(index)


def remove_vectors(index: faiss.Index, vector_ids: Int64Array) -> None:
    """Remove exactly these vectors, **in place**; a refused removal changes nothing.

    Every stored id is read, however few are removed. Beside the index, memory holds its ids
    (8 bytes a vector) and a few hundred MiB.

    Args:
        index: An index of `indexing.build`, in memory.
        vector_ids: (N,) int64, unique, each in the index; N may be 0.

    Raises:
        ValueError: An id is repeated, negative or not in the index, or the array is of another
            shape or dtype.
    """
    check_ids(vector_ids, vector_ids.size)
    _mark_removed(stored_ids(index), vector_ids)
    _remove(index, vector_ids)


def update_index(
    base: faiss.Index, removed: Int64Array, parts: Sequence[faiss.Index]
) -> faiss.Index:
    """Remove vectors from an index and move new ones into it, **in place**.

    **This changes base and empties the parts**; everything is checked before anything moves,
    and a refused update leaves all of them whole. The result answers like an index filled
    afresh with the live rows; only the order of equal scores may differ. Memory beside the
    indexes: 24 bytes a vector for a while, to compare the ids.

    Args:
        base: The index to update; its nprobe stays.
        removed: (N,) int64, unique, each in base. The id of a changed vector is here, and in a
            part with its new vector.
        parts: Clones of base's template (`empty_clone`), filled by `add_vectors`; may be none.

    Returns:
        base, holding its own vectors without the removed ones, and those of all parts.

    Raises:
        ValueError: A removed id is repeated or not in base, a part is given twice or stems
            from another template, or an id would be in the index twice.
    """
    check_same_template([base, *parts])
    check_ids(removed, removed.size)
    stored = stored_ids(base)
    kept = stored[~_mark_removed(stored, removed)]
    check_unique(np.concatenate([kept, *(stored_ids(part) for part in parts)]))
    _remove(base, removed)
    return move_vectors([base, *parts])


def quantization_error(index: faiss.Index, sample: Float32Array) -> float:
    """Measure how far vectors lie from what an index's quantizers make of them.

    With PQ that is the decoded vector; without it, an IVF index keeps vectors whole, and it is
    the centroid of the list that a vector goes to. Vectors need not be in the index.

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
        block = sample[start : start + step]
        lost = (block - _quantize(index, block)).ravel()
        total += float(np.square(lost, out=lost).sum(dtype=np.float64))
    return total / len(sample)


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
        index.remove_ids(faiss.IDSelectorBatch(batch))


def _quantize(index: faiss.IndexIVF, vectors: Float32Array) -> Float32Array:
    if isinstance(index, faiss.IndexIVFPQ):
        decoded: Float32Array = index.sa_decode(index.sa_encode(vectors))
        return decoded
    numbers = index.quantizer.assign(vectors, 1)[:, 0]
    centroids: Float32Array = index.quantizer.reconstruct_batch(numbers)
    return centroids
