"""Reach into an index: its rotation, its lists, its coarse quantizer, and who owns them.

An index is an IndexIDMap2 over IndexFlatIP (exact), an IndexIVF, or an IndexPreTransform (the
rotation) over an IndexIVF. FAISS's Python objects are views: what one of them looks at has to be
kept alive by whoever holds it, which is what this module is careful about.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from indexing.threads import for_each_block, one_blas_thread
from indexing.vectors import Float32Array, Int64Array

ROTATED_AT_ONCE = 2**19  # values a thread rotates at once: 4 MiB in float64
COPIED_AT_ONCE = 2**22  # values of a flat index copied at once: 16 MiB
SUBSET_BY_ID_RANGE = 0  # InvertedLists::SUBSET_TYPE_ID_RANGE, which FAISS's stubs lack
NO_BOUND = 2**63 - 1  # FAISS takes no larger bound: the id 2**63 - 1 itself lies in no range
_MAPPED, _LENT = "mapped", "lent"  # marks among the objects that an index keeps alive


def is_ivf(index: faiss.Index) -> bool:
    """Say whether an index has inverted lists.

    Raises:
        ValueError: It is neither an IVF index, rotated or not, nor a flat one with ids.
    """
    if isinstance(index, faiss.IndexIDMap2):
        return False
    if isinstance(_unwrapped(index), faiss.IndexIVF):
        return True
    raise ValueError(f"{type(index).__name__} is not an index made by train_index")


def ivf_of(index: faiss.Index) -> faiss.IndexIVF:
    """Return the IVF index itself, which lies under the rotation where there is one.

    Adding to it or removing from it leaves the wrapper's ntotal behind: see `set_ntotal`.

    Raises:
        ValueError: It has no inverted lists.
    """
    ivf = _unwrapped(index)
    if not isinstance(ivf, faiss.IndexIVF):
        raise ValueError(f"{type(index).__name__} has no inverted lists")
    if ivf is not index:
        _keep_alive(ivf, index)  # which owns what ivf is a view of
    return ivf


def empty_flat(dim: int) -> faiss.Index:
    """Return an exact index of (0, dim) float32 vectors."""
    # The factory's IndexFlat comes back from a file as IndexFlatIP, and the two don't merge.
    inner = faiss.IndexFlatIP(dim)
    return faiss.IndexIDMap2(inner)  # its Python wrapper keeps inner alive


def list_sizes(index: faiss.Index) -> Int64Array:
    """Return how many vectors each list holds: (nlist,) int64, (0,) for a flat index."""
    if not is_ivf(index):
        return np.empty(0, dtype=np.int64)
    ivf = ivf_of(index)
    lists = _lists(ivf)
    return np.fromiter((lists.list_size(number) for number in range(ivf.nlist)), dtype=np.int64)


def stored_ids(index: faiss.Index) -> Int64Array:
    """Return the ids of all vectors, (ntotal,) int64, in the order they are stored."""
    if not is_ivf(index):
        flat: Any = index
        ids: Int64Array = faiss.vector_to_array(flat.id_map)
        return ids
    lists = _lists(ivf_of(index))
    stored = np.empty(index.ntotal, dtype=np.int64)
    start = 0
    for number, size in enumerate(list_sizes(index).tolist()):
        if size:
            ids_of_list = lists.get_ids(number)
            stored[start : start + size] = faiss.rev_swig_ptr(ids_of_list, size)
            lists.release_ids(number, ids_of_list)
            start += size
    return stored


def set_ntotal(index: faiss.Index) -> None:
    """Tell an index how many vectors its inner index holds by now."""
    if isinstance(index, faiss.IndexPreTransform):
        index.ntotal = ivf_of(index).ntotal


def mark_mapped(index: faiss.Index) -> None:
    """Note that an index is mapped from its file, and turn off FAISS's read-ahead.

    It starts 32 threads a search. Tried on 82k x 256 in 2,048 lists, one query, nprobe 32, pages
    in memory: 2.8 ms with them, 0.3 ms without, as of an index in memory.
    """
    _keep_alive(index, _MAPPED)
    if is_ivf(index):
        lists: Any = faiss.downcast_InvertedLists(_lists(ivf_of(index)))
        if isinstance(lists, faiss.OnDiskInvertedLists):
            lists.prefetch_nthread = 0


def check_writable(index: faiss.Index) -> None:
    """Refuse an index that is mapped from its file.

    FAISS ends the process that changes a flat one, and writes the path of the file in place of
    the vectors of another.

    Raises:
        ValueError: As the first line says.
    """
    if _MAPPED in getattr(index, "referenced_objects", ()):
        raise ValueError("the index is mapped from its file: read it whole to change or write it")


def rotate(index: faiss.Index, vectors: Float32Array) -> Float32Array:
    """Apply an index's rotation as its own `add` would, but to the same bits every time.

    FAISS multiplies in float32, where a row's last bits depend on the rows beside it and on the
    number of threads: a vector's SQ8 code then differs between one build and a merged one. Summed
    in float64 and rounded once, it doesn't. Blocks of one fixed shape aren't enough: in OpenBLAS's
    AVX2 kernels a row's bits depend on its place in the block (its AVX-512 kernels have no such
    fault). It costs 6.6 microseconds a vector and core from 512 to 256 dimensions, float32 3.0.

    Args:
        index: An index with or without rotation.
        vectors: (N, D) float32.

    Returns:
        (N, rotated D) float32; vectors themselves without a rotation.
    """
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        for number in range(chain.size()):
            vectors = apply_linear(faiss.downcast_VectorTransform(chain.at(number)), vectors)
    return vectors


def apply_linear(
    transform: Any,  # noqa: ANN401 - faiss's stubs lack methods
    vectors: Float32Array,
) -> Float32Array:
    """Apply a trained linear transform to (N, D) float32 vectors; see `rotate`."""
    shape = transform.d_out, transform.d_in
    matrix = faiss.vector_to_array(transform.A).reshape(shape).astype(np.float64).T
    bias = faiss.vector_to_array(transform.b) if transform.have_bias else np.zeros(1)
    applied = np.empty((len(vectors), transform.d_out), dtype=np.float32)

    def apply(block: slice) -> None:
        product = vectors[block].astype(np.float64) @ matrix
        if bias.any():
            product += bias
        applied[block] = product

    with one_blas_thread():
        for_each_block(apply, len(vectors), max(1, ROTATED_AT_ONCE // transform.d_in))
    return applied


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


def take_range(index: faiss.Index, low: int | None, high: int | None) -> faiss.Index:
    """Copy the vectors of a range of ids, codes as they are; the index stays as it was.

    Memory beside the index: what is copied; with FastScan codes the whole index once more, for
    FAISS can only copy all of their blocks and then remove.

    Args:
        index: An index of `indexing.build`, in memory or mapped; no other thread may use it.
        low: The smallest id to take; None: from the first on.
        high: The id before which to stop; None: up to the last.

    Returns:
        A clone of the index's template with the vectors of low <= id < high.
    """
    if is_ivf(index) and isinstance(ivf_of(index), faiss.IndexIVFFastScan):
        taken = faiss.clone_index(index)
        keep_range(taken, low, high)
        return taken
    taken = empty_clone(index)
    if is_ivf(index):
        ivf: Any = ivf_of(index)
        ivf.copy_subset_to(ivf_of(taken), SUBSET_BY_ID_RANGE, *bounds(low, high))
        set_ntotal(taken)
    elif index.ntotal:
        _copy_rows(index, taken, *bounds(low, high))
    return taken


def keep_range(index: faiss.Index, low: int | None, high: int | None) -> None:
    """Remove, **in place**, what isn't of low <= id < high; None: no bound."""
    if low is None and high is None:
        return
    kept = faiss.IDSelectorRange(*bounds(low, high))
    remove_selected(index, faiss.IDSelectorNot(kept))


def remove_selected(index: faiss.Index, selector: faiss.IDSelector) -> None:
    """Remove the selected vectors, **in place**."""
    inner = ivf_of(index) if is_ivf(index) else index
    inner.remove_ids(selector)
    set_ntotal(index)


def bounds(low: int | None, high: int | None) -> tuple[int, int]:
    """Return a range of ids that FAISS takes; None: no bound."""
    return 0 if low is None else low, NO_BOUND if high is None else min(high, NO_BOUND)


@contextmanager
def without_vectors(index: Any) -> Iterator[None]:  # noqa: ANN401 - faiss's stubs lack methods
    """Set aside an IVF index's lists, ntotal and nprobe; cloning would copy every vector.

    No other thread may use the index meanwhile.
    """
    ivf: Any = ivf_of(index)
    lists, owned = ivf.invlists, ivf.own_invlists
    ntotal, nprobe = ivf.ntotal, ivf.nprobe
    empty = _empty_lists(ivf)
    ivf.own_invlists = False  # or replace_invlists would free the lists
    ivf.replace_invlists(empty, False)
    ivf.ntotal, ivf.nprobe = 0, 1
    set_ntotal(index)
    try:
        yield
    finally:
        ivf.replace_invlists(lists, owned)
        ivf.ntotal, ivf.nprobe = ntotal, nprobe
        set_ntotal(index)


@contextmanager
def without_quantizer(index: faiss.Index) -> Iterator[None]:
    """Set aside an IVF index's coarse quantizer, which may be larger than its lists.

    No other thread may use the index meanwhile.
    """
    ivf = ivf_of(index)
    quantizer, owned = ivf.quantizer, ivf.own_fields
    empty = faiss.IndexFlatIP(ivf.d)
    ivf.own_fields = False
    ivf.quantizer = empty
    try:
        yield
    finally:
        ivf.quantizer, ivf.own_fields = quantizer, owned


def borrow_quantizer(index: faiss.Index, owner: faiss.Index) -> None:
    """Free an index's coarse quantizer and let it use the owner's, which it keeps alive.

    Nobody may hold the index's own quantizer any more. Clones and files of the index are whole.

    Raises:
        ValueError: Others borrowed the index's own quantizer.
    """
    if _LENT in getattr(index, "referenced_objects", ()):
        raise ValueError("other indexes use this one's coarse quantizer: it can't be freed")
    ivf = ivf_of(index)
    if ivf.own_fields:
        freed: Any = ivf.quantizer
        ivf.own_fields = False
        # To give it to Python (thisown) breaks the types of FAISS's SWIG runtime (4.4) in time.
        freed.__swig_destroy__(freed)
    ivf.quantizer = ivf_of(owner).quantizer
    _keep_alive(index, owner)
    _keep_alive(owner, _LENT)


def _copy_rows(
    index: Any,  # noqa: ANN401 - faiss's stubs lack methods
    taken: faiss.Index,
    first: int,
    past: int,
) -> None:
    """Copy the vectors of first <= id < past from one flat index to another."""
    ids = stored_ids(index)
    rows = np.flatnonzero((ids >= first) & (ids < past))
    flat: Any = faiss.downcast_index(index.index)
    vectors = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(-1, flat.d)
    step = max(1, COPIED_AT_ONCE // index.d)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        taken.add_with_ids(vectors[block], ids[block])


def _keep_alive(index: Any, kept: object) -> None:  # noqa: ANN401 - faiss's stubs lack methods
    """Keep an object as long as an index's Python object, which takes no other attribute."""
    held = getattr(index, "referenced_objects", ())
    if kept not in held:
        index.referenced_objects = [*held, kept]


def clear_padding(index: faiss.Index) -> None:
    """Clear what lies beyond the last code of FastScan's lists, whose blocks hold 32.

    FAISS leaves there what the memory held before: the same index would be another file each time.
    """
    if not is_ivf(index):
        return
    lists: Any = faiss.downcast_InvertedLists(_lists(ivf_of(index)))
    blocks: Any = faiss
    if not isinstance(lists, blocks.BlockInvertedLists):
        return
    rows, size = lists.n_per_block, lists.block_size
    masks = _block_masks(lists.packer, rows, size)
    for number in range(lists.nlist):
        count = lists.list_size(number)
        if count % rows:
            held = -(-count // rows) * size
            last = faiss.rev_swig_ptr(lists.get_codes(number), held)[held - size :]
            last &= masks[count % rows]


def _block_masks(packer: Any, rows: int, size: int) -> npt.NDArray[np.uint8]:  # noqa: ANN401
    """Return (rows, size) uint8: for each number of codes in a block, the bits they take in it."""
    every_bit = np.full(packer.code_size, 255, np.uint8)
    masks = np.zeros((rows, size), np.uint8)
    for row in range(1, rows):
        masks[row] = masks[row - 1]
        packer.pack_1(every_bit, row - 1, masks[row : row + 1])
    return masks


def _unwrapped(index: faiss.Index) -> Any:  # noqa: ANN401 - faiss's stubs lack methods
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.downcast_index(index.index)
    return index


def _empty_lists(ivf: Any) -> Any:  # noqa: ANN401 - faiss's stubs lack methods
    if not isinstance(ivf, faiss.IndexIVFFastScan):
        return faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    packer = ivf.get_CodePacker()
    packer.this.disown()  # the lists free it
    blocks: Any = faiss
    return blocks.BlockInvertedLists(ivf.nlist, packer)


def _lists(ivf: faiss.IndexIVF) -> Any:  # noqa: ANN401 - faiss's stubs lack methods
    if ivf.invlists is None:
        raise ValueError("the index has no inverted lists")
    return ivf.invlists
