"""What every contender of benchmarks/index.py measures of itself, in a process of its own.

autofaiss's environment imports this too: nothing of Vitrine, nothing that numpy 1.26 lacks.
Letters in shapes: N rows, Q queries, K neighbours, D dimension.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Search = Callable[[Float32Array, int], Int64Array]
"""From (Q, D) queries and K to (Q, K) ids."""

K = 10
SINGLE_QUERIES = 200  # asked one by one for p50 and p99
TUNING_QUERIES = 1_000  # the first held-out queries choose the point, the others measure it


def peak_mib(process: str = "self") -> float:
    """Return the peak resident memory of a process in MiB, since its program began.

    VmHWM, not getrusage's ru_maxrss: the latter of a child starts at what its parent held.
    """
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kib / 1024


class Stopwatch:
    """Seconds by step; a step that comes again adds to its own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


def read_rows(path: Path, start: int, stop: int) -> Float32Array:
    """Read rows of a .npy file of (N, D) float32.

    Not memory-mapped: mapped pages count as resident, and would hide what a builder itself needs.
    """
    mapped = np.load(path, mmap_mode="r")
    dim, offset = mapped.shape[1], mapped.offset
    rows = min(stop, len(mapped)) - start
    flat = np.fromfile(path, np.float32, rows * dim, offset=offset + 4 * start * dim)
    return flat.reshape(rows, dim)


def draw_rows(path: Path, total: int, wanted: int, seed: int) -> Float32Array:
    """Return a uniform sample of the first `total` rows of a .npy file, in the file's order."""
    picked = np.random.default_rng(seed).choice(total, min(total, wanted), replace=False)
    picked.sort()
    block, parts = 50_000, []
    for start in range(0, total, block):
        inside = picked[(picked >= start) & (picked < start + block)]
        parts.append(read_rows(path, start, min(start + block, total))[inside - start])
    return np.concatenate(parts)


def measure_batch(search: Search, queries: Float32Array) -> tuple[Int64Array, float]:
    """Ask all queries as one batch: (Q, K) int64 ids, and milliseconds a query."""
    search(queries[:1], K)
    started = time.perf_counter()
    ids = search(queries, K)
    return ids, 1e3 * (time.perf_counter() - started) / len(queries)


def measure_search(search: Search, queries: Float32Array) -> tuple[Int64Array, dict[str, Any]]:
    """Ask all queries as one batch, then some of them one by one.

    Args:
        search: What is measured.
        queries: (Q, D) float32 unit rows.

    Returns:
        (Q, K) int64 ids of the batch; ms_per_query of the batch, and p50_ms, p99_ms of one.
    """
    ids, batch_ms = measure_batch(search, queries)
    singles = []
    for number in range(min(SINGLE_QUERIES, len(queries))):
        started = time.perf_counter()
        search(queries[number : number + 1], K)
        singles.append(1e3 * (time.perf_counter() - started))
    p50, p99 = np.percentile(singles, [50, 99])
    return ids, {"ms_per_query": batch_ms, "p50_ms": float(p50), "p99_ms": float(p99)}
