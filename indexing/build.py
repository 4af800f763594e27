"""Train, fill, merge, write and read FAISS indexes.

An index is trained once, empty: the *template*. Every shard is a clone of it, so that shards
merge. Exact indexes are IndexIDMap2 over IndexFlatIP; the others are IndexIVF.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import faiss
import numpy as np

from indexing.spec import Float32Array, IndexSpec, Int64Array, check_unit_rows


def train_index(spec: IndexSpec, sample: Float32Array, *, seed: int) -> faiss.Index:
    """Train an empty index; `add_vectors` fills a clone of it per shard.

    Args:
        spec: What to build.
        sample: (N, D) float32 unit rows, drawn at random from the whole catalog;
            N >= spec.min_training_rows. A flat index learns nothing from it; N may be 0.
        seed: Seeds k-means and the PQ: the same sample then gives the same bytes.

    Returns:
        A trained index with ntotal == 0.

    Raises:
        ValueError: The sample is too small, of another D, not finite or not of unit length.
    """
    check_unit_rows(sample, dim=spec.dim, name="training sample")
    if len(sample) < spec.min_training_rows:
        raise ValueError(
            f"training sample: {len(sample)} rows, {spec.factory} needs at least "
            f"{spec.min_training_rows}: take a larger sample, or a smaller nlist or pq_nbits"
        )
    if not spec.nlist:
        return empty_flat(spec.dim)
    index = faiss.index_factory(spec.dim, spec.factory, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexIVF):
        index.cp.seed = seed
    if isinstance(index, faiss.IndexIVFPQ):
        index.pq.cp.seed = seed
    index.train(sample)
    return index


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
    check_unit_rows(vectors, dim=template.d, name="vectors")
    check_ids(vector_ids, len(vectors))
    index = faiss.clone_index(template)
    index.add_with_ids(vectors, vector_ids)
    return index


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
        ValueError: There are no parts, one is given twice, they stem from different
            templates, or a vector id is in two of them.
    """
    check_same_template(parts)
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
    for other in others:
        merged.merge_from(other, 0)
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
        index: Any index of this module.
        path: Where to write; an existing file is replaced. Its folder must exist.

    Returns:
        The sha256 (hex) of the file: FAISS files carry none, keep it for `read_index`.

    Raises:
        OSError: The folder is missing or the file can't be written or renamed.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        faiss.write_index(index, str(partial))
        _fsync(partial)
        digest = _sha256(partial)
        partial.replace(path)
        _fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def read_index(path: Path, *, sha256: str) -> faiss.Index:
    """Read an index into memory once its bytes are proved unchanged.

    Args:
        path: A file from `write_index`.
        sha256: What `write_index` returned.

    Raises:
        ValueError: The file's checksum is another one.
        OSError: The file is missing or unreadable.
    """
    found = _sha256(path)
    if found != sha256:
        raise ValueError(f"index file {path} is corrupted: sha256 {found} expected {sha256}")
    return faiss.read_index(str(path))


def set_nprobe(index: faiss.Index, nprobe: int) -> None:
    """Set how many lists a search visits; a flat index has none and takes only 0.

    Raises:
        ValueError: nprobe is outside 1..nlist, or isn't 0 on a flat index.
    """
    if not is_ivf(index):
        if nprobe:
            raise ValueError(f"nprobe is {nprobe}, but a flat index has no lists: use 0")
        return
    if not 1 <= nprobe <= index.nlist:
        raise ValueError(f"nprobe is {nprobe}, expected 1 to nlist {index.nlist}")
    index.nprobe = nprobe


def list_sizes(index: faiss.Index) -> Int64Array:
    """Return how many vectors each list holds: (nlist,) int64, (0,) for a flat index."""
    if not is_ivf(index):
        return np.empty(0, dtype=np.int64)
    lists = _lists(index)
    return np.fromiter((lists.list_size(number) for number in range(index.nlist)), dtype=np.int64)


def stored_ids(index: faiss.Index) -> Int64Array:
    """Return the ids of all vectors, (ntotal,) int64, in the order they are stored."""
    if isinstance(index, faiss.IndexIDMap2):
        ids: Int64Array = faiss.vector_to_array(index.id_map)
        return ids
    lists = _lists(index)
    stored = np.empty(index.ntotal, dtype=np.int64)
    start = 0
    for number, size in enumerate(list_sizes(index).tolist()):
        if size:
            stored[start : start + size] = faiss.rev_swig_ptr(lists.get_ids(number), size)
            start += size
    return stored


def is_ivf(index: faiss.Index) -> TypeGuard[faiss.IndexIVF]:
    """Say whether an index has inverted lists.

    Raises:
        ValueError: It is neither an IVF index nor a flat one with ids.
    """
    if isinstance(index, faiss.IndexIVF):
        return True
    if isinstance(index, faiss.IndexIDMap2):
        return False
    raise ValueError(f"{type(index).__name__} is not an index made by train_index")


def empty_flat(dim: int) -> faiss.Index:
    """Return an exact index of (0, dim) float32 vectors."""
    # The factory's IndexFlat comes back from a file as IndexFlatIP, and the two don't merge.
    inner = faiss.IndexFlatIP(dim)
    return faiss.IndexIDMap2(inner)  # its Python wrapper keeps inner alive


@contextmanager
def without_vectors(index: Any) -> Iterator[None]:  # noqa: ANN401 - faiss's stubs lack methods
    """Set aside an IVF index's lists, ntotal and nprobe; cloning would copy every vector.

    No other thread may use the index meanwhile.
    """
    lists, owned = index.invlists, index.own_invlists
    ntotal, nprobe = index.ntotal, index.nprobe
    empty = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    index.own_invlists = False  # or replace_invlists would free the lists
    index.replace_invlists(empty, False)
    index.ntotal, index.nprobe = 0, 1
    try:
        yield
    finally:
        index.replace_invlists(lists, owned)
        index.ntotal, index.nprobe = ntotal, nprobe


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


def _lists(index: faiss.Index) -> faiss.InvertedLists:
    if not is_ivf(index) or index.invlists is None:
        raise ValueError("the index has no inverted lists")
    return index.invlists


def _serialized_sha256(index: faiss.Index) -> str:
    return hashlib.sha256(faiss.serialize_index(index).data).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
