"""Keep whole vectors beside an index's codes, to score its candidates again with.

A refine file belongs to one partition: first its ids, rising, as 8-byte little-endian integers,
then as many codes in the same order. It needs no training, so rows of any night lie side by side,
and it is memory-mapped: a search reads the few rows that it scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from indexing.build import check_unique
from indexing.files import check_file, write_file
from indexing.spec import Refine
from indexing.topk import PADDING_ID, PADDING_SCORE
from indexing.vectors import Float32Array, Int64Array, check_unit_rows

UInt8Array = npt.NDArray[np.uint8]
Blocks = Iterable[tuple[Int64Array, UInt8Array]]  # ids (N,) and their codes (N, bytes)

ID_BYTES = 8
SCALE_BYTES = 4
MAX_LEVEL = 127  # of an int8, as far below 0 as above
VALUES_AT_ONCE = 2**22  # values decoded at once: 16 MiB, a few times over
BLOCK_BYTES = 2**24


def refine_code_bytes(kind: Refine, dim: int) -> int:
    """Return the bytes of one code: float16 values, or a float32 scale and int8 values."""
    return {"none": 0, "fp16": 2 * dim, "sq8": SCALE_BYTES + dim}[kind]


def encode_refine(kind: Refine, vectors: Float32Array) -> UInt8Array:
    """Encode vectors, each by itself: the same vector always gives the same code.

    Args:
        kind: 'fp16': values rounded to float16. 'sq8': each row's values in 255 even steps from
            minus its largest to its largest.
        vectors: (N, D) float32 unit rows.

    Returns:
        (N, refine_code_bytes) uint8.

    Raises:
        ValueError: A vector isn't finite or not of unit length, or the kind is 'none'.
    """
    if vectors.ndim != 2:
        raise ValueError(f"vectors: shape is {vectors.shape}, expected (N, D)")
    check_unit_rows(vectors, dim=vectors.shape[1], name="vectors")
    if kind == "none":
        raise ValueError("refine is none: there is nothing to encode vectors for")
    if kind == "fp16":
        return vectors.astype("<f2").view(np.uint8)
    scales = np.abs(vectors).max(axis=1, keepdims=True).astype("<f4") / np.float32(MAX_LEVEL)
    levels = np.rint(vectors / scales).astype(np.int8)
    return np.concatenate([scales.view(np.uint8), levels.view(np.uint8)], axis=1)


def decode_refine(kind: Refine, codes: UInt8Array) -> Float32Array:
    """Turn (..., bytes) codes into (..., D) float32 vectors: of unit length, but for rounding."""
    if kind == "fp16":
        return codes.view("<f2").astype(np.float32)
    scales = np.ascontiguousarray(codes[..., :SCALE_BYTES]).view("<f4").astype(np.float32)
    decoded: Float32Array = codes[..., SCALE_BYTES:].view(np.int8) * scales
    return decoded


@dataclass(frozen=True)
class RefineStore:
    """Hold one partition's refine file, memory-mapped; threads may share it.

    Attributes:
        kind: How vectors are encoded, not 'none'.
        ids: (N,) int64, rising.
        codes: (N, refine_code_bytes) uint8, those of the ids.
    """

    kind: Refine
    ids: Int64Array
    codes: UInt8Array

    def scores(self, queries: Float32Array, ids: Int64Array) -> Float32Array:
        """Compute the inner products of queries with stored vectors.

        Args:
            queries: (Q, D) float32 unit rows.
            ids: (Q, K) int64: for each query, the vectors to compare with; -1 pads.

        Returns:
            (Q, K) float32; float32's lowest where an id is -1.

        Raises:
            ValueError: The shapes disagree, or an id isn't in the store.
        """
        if queries.ndim != 2 or ids.ndim != 2 or len(ids) != len(queries):
            raise ValueError(
                f"queries of shape {queries.shape} and ids of shape {ids.shape}, "
                "expected (Q, D) and (Q, K)"
            )
        if refine_code_bytes(self.kind, queries.shape[1]) != self.codes.shape[1]:
            raise ValueError(
                f"queries have {queries.shape[1]} dimensions, the refine store has others"
            )
        scores = np.full(ids.shape, PADDING_SCORE, dtype=np.float32)
        step = max(1, VALUES_AT_ONCE // max(1, ids.shape[1] * queries.shape[1]))
        for start in range(0, len(queries), step):
            block = slice(start, start + step)
            self._score(queries[block], ids[block], scores[block])
        return scores

    def _score(self, queries: Float32Array, ids: Int64Array, scores: Float32Array) -> None:
        """Set those of (Q, K) scores whose id isn't padding."""
        there = ids != PADDING_ID
        rows = np.zeros(ids.shape, dtype=np.int64)
        rows[there] = self._rows(ids[there])
        if not there.any():
            return
        vectors = decode_refine(self.kind, self.codes[rows])
        scores[there] = np.matmul(vectors, queries[:, :, None])[:, :, 0][there]

    def _rows(self, ids: Int64Array) -> Int64Array:
        """Return which rows hold (N,) ids."""
        absent = ids[~_is_in(ids, self.ids)]
        if len(absent):
            raise ValueError(f"vector id {int(absent[0])} is not in the refine store")
        return np.searchsorted(self.ids, ids)


def write_refine(path: Path, kind: Refine, dim: int, parts: Sequence[Blocks], count: int) -> str:
    """Write one partition's refine file, its rows in the order of their ids.

    Memory holds the ids (8 bytes a vector) and a block at a time; the file appears whole.

    Args:
        path: Where to write; an existing file is replaced. Its folder must exist.
        kind: How the vectors are encoded, not 'none'.
        dim: D.
        parts: Each yields blocks of ids (N,) int64 >= 0 and codes (N, refine_code_bytes) uint8,
            in any order, and the same again when it is iterated a second time.
        count: How many ids there are in all.

    Returns:
        The sha256 (hex) of the file, for `open_refine`.

    Raises:
        ValueError: An id is repeated or negative, there are not count of them, a block's shapes
            or dtypes are wrong, or a part yields other ids the second time.
        OSError: The folder is missing or the file can't be written or renamed.
    """
    width = refine_code_bytes(kind, dim)
    if not width:
        raise ValueError("refine is none: there is no file to write")
    ids = _sorted_ids(parts, count)

    def write(partial: Path) -> None:
        with partial.open("wb") as stream:
            ids.astype("<i8", copy=False).tofile(stream)
            stream.truncate(count * (ID_BYTES + width))
        if count:
            offset = count * ID_BYTES
            codes = np.memmap(partial, np.uint8, "r+", offset=offset, shape=(count, width))
            _scatter(parts, ids, codes)
            codes.flush()

    return write_file(path, write)


def open_refine(path: Path, *, kind: Refine, dim: int, sha256: str) -> RefineStore:
    """Map a refine file into memory once its bytes are proved unchanged.

    Args:
        path: A file from `write_refine`; it may have been moved.
        kind: How its vectors are encoded.
        dim: D.
        sha256: What `write_refine` returned.

    Raises:
        ValueError: The file's checksum is another one, or it holds rows of another size.
        OSError: The file is missing or unreadable.
    """
    check_file(path, sha256=sha256)
    width = refine_code_bytes(kind, dim)
    size = path.stat().st_size
    count, rest = divmod(size, ID_BYTES + width)
    if rest or not width:
        raise ValueError(
            f"refine file {path} has {size} bytes, not a multiple of {ID_BYTES + width}: "
            f"it isn't made of {kind} rows of {dim} dimensions"
        )
    if not count:
        return RefineStore(kind, np.empty(0, np.int64), np.empty((0, width), np.uint8))
    ids = np.memmap(path, "<i8", "r", shape=(count,))
    codes = np.memmap(path, np.uint8, "r", offset=count * ID_BYTES, shape=(count, width))
    return RefineStore(kind, ids, codes)


def stored_blocks(store: RefineStore) -> Blocks:
    """Return all rows of a store, for `write_refine`."""
    return kept_blocks(store, np.empty(0, np.int64))


def kept_blocks(
    store: RefineStore, removed: Int64Array, low: int | None = None, high: int | None = None
) -> Blocks:
    """Return the rows of a store that an update keeps, for `write_refine`.

    Args:
        store: The older store.
        removed: (N,) int64 ids to leave out; those that aren't there are no error.
        low: Ids under it are left out; None: none are.
        high: Ids from it on are left out; None: none are.

    Returns:
        What can be iterated any number of times, in blocks of some 16 MiB.
    """
    return _KeptBlocks(store, np.sort(removed), low, high)


@dataclass(frozen=True)
class _KeptBlocks:
    store: RefineStore
    removed: Int64Array
    low: int | None
    high: int | None

    def __iter__(self) -> Iterator[tuple[Int64Array, UInt8Array]]:
        ids, codes = self.store.ids, self.store.codes
        first = 0 if self.low is None else _place(ids, self.low)
        past = len(ids) if self.high is None else _place(ids, self.high)
        step = max(1, BLOCK_BYTES // codes.shape[1])
        for start in range(first, past, step):
            block = np.array(ids[start : min(past, start + step)])
            kept = ~_is_in(block, self.removed)
            yield block[kept], codes[start : start + len(block)][kept]


def _place(ids: Int64Array, bound: int) -> int:
    """Return how many of (N,) rising ids are under a bound, which may exceed an int64."""
    if bound > np.iinfo(np.int64).max:
        return len(ids)
    return int(np.searchsorted(ids, np.int64(bound)))


def _is_in(ids: Int64Array, rising: Int64Array) -> npt.NDArray[np.bool_]:
    """Mark those of (N,) ids that are among (M,) rising ones."""
    if not len(rising):
        return np.zeros(len(ids), dtype=np.bool_)
    places = np.minimum(np.searchsorted(rising, ids), len(rising) - 1)
    found: npt.NDArray[np.bool_] = rising[places] == ids
    return found


def _sorted_ids(parts: Sequence[Blocks], count: int) -> Int64Array:
    ids = np.empty(count, dtype=np.int64)
    done = 0
    for part in parts:
        for block, _ in part:
            if block.dtype != np.int64 or block.ndim != 1:
                raise ValueError(
                    f"vector ids: {block.dtype} of shape {block.shape}, expected int64 (N,)"
                )
            if done + len(block) <= count:
                ids[done : done + len(block)] = block
            done += len(block)
    if done != count:
        raise ValueError(f"the parts hold {done} vectors, expected {count}")
    check_unique(ids)
    ids.sort()
    if count and ids[0] < 0:
        raise ValueError(f"vector ids: {int(ids[0])} is negative")
    return ids


def _scatter(parts: Sequence[Blocks], ids: Int64Array, codes: UInt8Array) -> None:
    """Set (N, bytes) codes, in the order of the (N,) rising ids, from blocks in any order."""
    done = 0
    for part in parts:
        for block, rows in part:
            if rows.dtype != np.uint8 or rows.shape != (len(block), codes.shape[1]):
                raise ValueError(
                    f"codes: {rows.dtype} of shape {rows.shape}, expected uint8 "
                    f"({len(block)}, {codes.shape[1]})"
                )
            if not _is_in(block, ids).all():
                raise ValueError("a part yields other ids the second time it is read")
            codes[np.searchsorted(ids, block)] = rows
            done += len(block)
    if done != len(ids):
        raise ValueError(f"the parts hold {done} vectors the second time, expected {len(ids)}")
