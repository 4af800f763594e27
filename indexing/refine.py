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
from indexing.refine_codes import UInt8Array as UInt8Array
from indexing.refine_codes import decode_refine as decode_refine
from indexing.refine_codes import encode_refine as encode_refine
from indexing.refine_codes import refine_code_bytes as refine_code_bytes
from indexing.refine_codes import score_codes
from indexing.spec import Refine
from indexing.threads import for_each_block
from indexing.topk import PADDING_ID, PADDING_SCORE
from indexing.vectors import Float32Array, Int64Array

Blocks = Iterable[tuple[Int64Array, UInt8Array]]  # ids (N,) and their codes (N, bytes)

ID_BYTES = 8
IDS_AT_ONCE = 2**13  # candidates that one thread scores: some milliseconds
VALUES_AT_ONCE = 2**17  # values decoded at once: 512 KiB, what a core keeps near it
BLOCK_BYTES = 2**24


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

        Many are shared out to as many threads as `faiss.omp_set_num_threads` allows.

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
        scores = np.empty(ids.shape, dtype=np.float32)
        step = max(1, IDS_AT_ONCE // max(1, ids.shape[1]))

        def score(block: slice) -> None:
            self._score(queries[block], ids[block], scores[block])

        for_each_block(score, len(queries), step)
        return scores

    def vectors(self, ids: Int64Array) -> Float32Array:
        """Return (N, D) float32 vectors of (N,) ids, as far as the codes keep them.

        Raises:
            ValueError: An id isn't in the store.
        """
        return decode_refine(self.kind, self.codes[self._rows(ids)])

    def _score(self, queries: Float32Array, ids: Int64Array, scores: Float32Array) -> None:
        """Set (Q, K) scores."""
        rows = self._rows(ids.ravel()).reshape(ids.shape)
        if not len(self.ids):
            scores[:] = PADDING_SCORE
            return
        step = max(1, VALUES_AT_ONCE // max(1, ids.shape[1] * queries.shape[1]))
        for start in range(0, len(queries), step):
            block = slice(start, start + step)
            codes = np.take(self.codes, rows[block].ravel(), axis=0, mode="clip")
            found = score_codes(self.kind, queries[block], codes)
            scores[block] = np.where(ids[block] == PADDING_ID, PADDING_SCORE, found)

    def _rows(self, ids: Int64Array) -> Int64Array:
        """Return which rows hold (N,) ids; 0 for those that are padding."""
        order = np.argsort(ids)  # looked up in order, they need half the time, with sorting
        rising = ids[order]
        there = rising != PADDING_ID
        places = np.searchsorted(self.ids, rising)
        absent = rising[there & ~_at(self.ids, places, rising)]
        if len(absent):
            raise ValueError(f"vector id {int(absent[0])} is not in the refine store")
        rows = np.empty(len(ids), dtype=np.int64)
        rows[order] = np.where(there, places, 0)
        return rows


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
) -> KeptBlocks:
    """Return the rows of a store that an update keeps, for `write_refine`.

    Args:
        store: The older store.
        removed: (N,) int64 ids to leave out; those that aren't there are no error.
        low: Ids under it are left out; None: none are.
        high: Ids from it on are left out; None: none are.

    Returns:
        What can be iterated any number of times, in blocks of some 16 MiB; its length is the
        number of rows.
    """
    return KeptBlocks(store, np.unique(removed), low, high)


@dataclass(frozen=True)
class KeptBlocks:
    """Rows of a store; see `kept_blocks`."""

    store: RefineStore
    removed: Int64Array
    low: int | None
    high: int | None

    def __len__(self) -> int:
        """Return how many rows there are."""
        first, past = self._bounds()
        gone = _is_in(self.removed, self.store.ids[first:past])
        return past - first - int(gone.sum())

    def _bounds(self) -> tuple[int, int]:
        ids = self.store.ids
        first = 0 if self.low is None else _place(ids, self.low)
        return first, len(ids) if self.high is None else _place(ids, self.high)

    def __iter__(self) -> Iterator[tuple[Int64Array, UInt8Array]]:
        """Yield ids and codes, a block at a time."""
        ids, codes = self.store.ids, self.store.codes
        first, past = self._bounds()
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
    return _at(rising, np.searchsorted(rising, ids), ids)


def _at(rising: Int64Array, places: Int64Array, ids: Int64Array) -> npt.NDArray[np.bool_]:
    """Mark those of (N,) ids that are at (N,) places, or the last one, of (M,) rising ones."""
    if not len(rising):
        return np.zeros(len(ids), dtype=np.bool_)
    found: npt.NDArray[np.bool_] = rising[np.minimum(places, len(rising) - 1)] == ids
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
