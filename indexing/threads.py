"""Share work of numpy and FAISS out to threads, each of which does its part on one core."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import faiss
from threadpoolctl import ThreadpoolController


def for_each_block(work: Callable[[slice], None], count: int, step: int) -> None:
    """Do some work on all blocks of rows, on as many threads as FAISS is allowed.

    Args:
        work: Takes a block of rows; what it raises is raised here.
        count: How many rows there are.
        step: How many rows a block has, > 0; the last may have fewer.
    """
    blocks = [slice(start, start + step) for start in range(0, count, step)]
    threads = min(len(blocks), faiss.omp_get_max_threads())
    if threads < 2:
        deque(map(work, blocks), maxlen=0)
        return
    # A new thread doesn't inherit FAISS's number of threads.
    with ThreadPoolExecutor(threads, "block", faiss.omp_set_num_threads, (1,)) as pool:
        deque(pool.map(work, blocks), maxlen=0)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep numpy's BLAS to the thread that calls it, in the whole process.

    Its own threads spin while they wait: on two busy cores rotating took 2 to 10 times as long.
    """
    with _numpy_blas().limit(limits=1):
        yield


@cache
def _numpy_blas() -> ThreadpoolController:
    """Find numpy's BLAS; FAISS's runs on OpenMP's threads."""
    return ThreadpoolController().select(threading_layer="pthreads")
