"""Fill, merge, write and read indexes.

An index is trained once, empty: the *template*. Every shard is a clone of it, so that shards
merge. `indexing.train` makes templates, `indexing.anatomy` knows what lies inside an index.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from indexing.anatomy import (
    borrow_quantizer,
    check_writable,
    clear_padding,
    mark_mapped,
    rotate,
    set_ntotal,
    without_quantizer,
    without_vectors,
)
from indexing.anatomy import empty_flat as empty_flat
from indexing.anatomy import is_ivf as is_ivf
from indexing.anatomy import ivf_of as ivf_of
from indexing.anatomy import list_sizes as list_sizes
from indexing.anatomy import stored_ids as stored_ids
from indexing.anatomy import take_range as take_range
from indexing.files import check_file, write_file
from indexing.train import train_index as train_index
from indexing.vectors import Float32Array, Int64Array, check_unit_rows

ADDED_AT_ONCE = 2**24  # values rotated and added at once: 64 MiB
FLAT_FILE = b"IxM2"  # the first bytes of an IndexIDMap2


def add_vectors(
    template: faiss.Index, vector_ids: Int64Array, vectors: Float32Array
) -> faiss.Index:
    """Fill a clone of an empty template; the template stays empty.

    Args:
        template: What `train_index` returned.
        vector_ids: (N,) int64, >= 0 (FAISS pads results with -1) and unique.
        vectors: (N, D) float32 unit rows.

    Returns:
        An index with ntotal == N.

    Raises:
        ValueError: The template isn't empty, ids and vectors differ in number, an id is
            repeated or negative, or a vector is of another D, not finite or not of unit length.
    """
    if template.ntotal:
        raise ValueError(f"the template holds {template.ntotal} vectors, expected none")
    index = faiss.clone_index(template)
    append_vectors(index, vector_ids, vectors)
    return index


def append_vectors(index: faiss.Index, vector_ids: Int64Array, vectors: Float32Array) -> None:
    """Add vectors to an index, **in place**; that their ids aren't in it is the caller's care.

    Args:
        index: A clone of a template, in memory.
        vector_ids: (N,) int64, >= 0 (FAISS pads results with -1) and unique.
        vectors: (N, D) float32 unit rows.

    Raises:
        ValueError: As `add_vectors`, or the index is mapped from its file.
    """
    check_writable(index)
    check_unit_rows(vectors, dim=index.d, name="vectors")
    check_ids(vector_ids, len(vectors))
    inner = ivf_of(index) if is_ivf(index) else index
    step = max(1, ADDED_AT_ONCE // index.d)
    for start in range(0, len(vectors), step):
        block = rotate(index, vectors[start : start + step])
        inner.add_with_ids(block, vector_ids[start : start + step])
    set_ntotal(index)


def merge_indexes(parts: Sequence[faiss.Index]) -> faiss.Index:
    """Move all vectors into the first part, and return it.

    **This empties every other part**, as FAISS's merge_from does: nothing is copied, memory
    stays that of the parts (and 16 bytes a vector for a while, to compare the ids). Parts are
    checked before anything moves: a refused merge leaves them whole.

    Args:
        parts: Indexes filled from the same template, with no vector id in common.

    Returns:
        parts[0], holding all vectors.

    Raises:
        ValueError: There are no parts, one is given twice or is mapped from its file, they
            stem from different templates, or a vector id is in two of them.
    """
    check_same_template(parts)
    for part in parts:
        check_writable(part)
    check_unique(np.concatenate([stored_ids(part) for part in parts]))
    return move_vectors(parts)


def check_same_template(parts: Sequence[faiss.Index]) -> None:
    """Refuse indexes that can't be merged; their ids are the caller's to compare.

    Raises:
        ValueError: There are no parts, one is given twice, or they stem from different
            templates.
    """
    if not parts:
        raise ValueError("no parts to merge")
    hashes = [template_hash(part) for part in parts]
    for position, found in enumerate(hashes):
        if found != hashes[0]:
            raise ValueError(
                f"part {position} stems from template {found[:12]}, part 0 from "
                f"{hashes[0][:12]}: fill every part from one trained template"
            )
    if len({id(part) for part in parts}) < len(parts):
        raise ValueError("a part is given twice")


def move_vectors(parts: Sequence[faiss.Index]) -> faiss.Index:
    """Move all vectors into the first of some checked parts, and return it."""
    merged, *others = parts
    into = ivf_of(merged) if is_ivf(merged) else merged
    for other in others:
        into.merge_from(ivf_of(other) if is_ivf(other) else other, 0)
        set_ntotal(other)
    set_ntotal(merged)
    return merged


def template_hash(index: faiss.Index) -> str:
    """Return the sha256 (hex) of the index serialized without its vectors.

    Equal for a template and everything filled from it, whatever nprobe is set to. The lists
    are set aside meanwhile: no other thread may use the index.
    """
    if not is_ivf(index):
        return _serialized_sha256(empty_flat(index.d))
    with without_vectors(index):
        return _serialized_sha256(index)


def write_index(index: faiss.Index, path: Path) -> str:
    """Write an index so that the path never shows a half-written file.

    Args:
        index: Any index of this module, in memory.
        path: Where to write; an existing file is replaced. Its folder must exist.

    Returns:
        The sha256 (hex) of the file: FAISS files carry none, keep it for `read_index`.

    Raises:
        ValueError: The index is mapped from its file.
        OSError: The folder is missing or the file can't be written or renamed.
    """
    return _write(index, path, seal=b"")


def read_index(path: Path, *, sha256: str, mapped: bool = False) -> faiss.Index:
    """Read an index, or map it into memory, once its bytes are proved unchanged.

    Args:
        path: A file from `write_index`; it may have been moved.
        sha256: What `write_index` returned.
        mapped: Whether to leave the vectors in the file, which the index then can't do without
            and which it never changes: pages are read when a search touches them, and the
            system may drop them again. FastScan codes are read into memory all the same; the
            coarse quantizer and the rotation are, too.

    Raises:
        ValueError: The file's checksum is another one.
        OSError: The file is missing or unreadable.
    """
    check_file(path, sha256=sha256)
    if not mapped:
        return faiss.read_index(str(path))
    with path.open("rb") as stream:
        is_flat = stream.read(len(FLAT_FILE)) == FLAT_FILE
    flags = faiss.IO_FLAG_MMAP_IFC if is_flat else faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
    index = faiss.read_index(str(path), flags)
    mark_mapped(index)
    return index


def write_partial(index: faiss.Index, path: Path, *, template_sha256: str) -> str:
    """Write an index without its coarse quantizer, as `write_index` writes a whole one.

    A part of a big index is mostly quantizer otherwise. The file ends with the template's hash.
    No other thread may use the index meanwhile.

    Args:
        index: Filled from the template.
        path: Where to write; an existing file is replaced. Its folder must exist.
        template_sha256: The `template_hash`; of a big quantizer it is computed once for all parts.

    Returns:
        The sha256 (hex) of the file, for `read_partial`.

    Raises:
        ValueError: The index is mapped from its file.
        OSError: The folder is missing or the file can't be written or renamed.
    """
    seal = bytes.fromhex(template_sha256)
    if not is_ivf(index):
        return _write(index, path, seal=seal)
    with without_quantizer(index):
        return _write(index, path, seal=seal)


def read_partial(
    path: Path, template: faiss.Index, *, sha256: str, template_sha256: str
) -> faiss.Index:
    """Read a part into memory; it uses the template's coarse quantizer, and keeps it alive.

    Args:
        path: A file from `write_partial`.
        template: What the part was filled from.
        sha256: What `write_partial` returned.
        template_sha256: The template's `template_hash`.

    Raises:
        ValueError: The file's checksum is another one, or it stems from another template.
        OSError: The file is missing or unreadable.
    """
    check_file(path, sha256=sha256)
    with path.open("rb") as stream:
        stream.seek(-hashlib.sha256().digest_size, os.SEEK_END)
        found = stream.read().hex()
    if found != template_sha256:
        raise ValueError(
            f"part {path} stems from template {found[:12]}, expected {template_sha256[:12]}: "
            "fill every part from one trained template"
        )
    index = faiss.read_index(str(path))
    if is_ivf(index):
        borrow_quantizer(index, template)
    return index


def share_quantizer(first: faiss.Index, others: Sequence[faiss.Index]) -> None:
    """Let indexes use the coarse quantizer of the first, which stays alive, and free theirs.

    Partitions of one template then cost one quantizer. Their rotations stay: a matrix is small.

    Args:
        first: An index filled from the same template as the others.
        others: No other thread uses them meanwhile, and nobody holds their quantizers.

    Raises:
        ValueError: They stem from different templates, or one is given twice.
    """
    check_same_template([first, *others])
    for other in others if is_ivf(first) else ():
        borrow_quantizer(other, first)


def check_ids(vector_ids: Int64Array, count: int) -> None:
    """Refuse ids that aren't (count,) int64, >= 0 and unique.

    Raises:
        ValueError: As the first line says; the message names an example.
    """
    if vector_ids.shape != (count,):
        raise ValueError(f"vector ids: shape is {vector_ids.shape}, expected ({count},)")
    if vector_ids.dtype != np.int64:
        raise ValueError(f"vector ids: dtype is {vector_ids.dtype}, expected int64")
    if count and vector_ids.min() < 0:
        raise ValueError(f"vector ids: {int(vector_ids.min())} is negative")
    check_unique(vector_ids)


def check_unique(vector_ids: Int64Array) -> None:
    """Refuse (N,) ids of which one comes twice.

    Raises:
        ValueError: An id is repeated; the message names the smallest.
    """
    ordered = np.sort(vector_ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise ValueError(f"vector ids: {int(repeated[0])} is repeated ({len(repeated)} repeats)")


def _write(index: faiss.Index, path: Path, *, seal: bytes) -> str:
    check_writable(index)
    clear_padding(index)

    def write(partial: Path) -> None:
        faiss.write_index(index, str(partial))
        with partial.open("ab") as stream:
            stream.write(seal)  # FAISS reads no further than its own end

    return write_file(path, write)


def _serialized_sha256(index: faiss.Index) -> str:
    return hashlib.sha256(faiss.serialize_index(index).data).hexdigest()
