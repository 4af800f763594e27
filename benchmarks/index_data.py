"""The data sets of benchmarks/index.py: their layout, the synthetic one, and the exact answers.

A data set is a folder: vectors/vectors.npy (N, D), queries.npy (Q, D), both float32 unit rows that
are rounded to float16 as the embeddings table rounds them, and exact-R.npy (Q, 10) int64: which of
the first R rows exact search finds for the queries, which were held out of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from index_probe import Float32Array, Int64Array, K, read_rows
from numpy.lib.format import open_memmap

from indexing.search import search_exact

BLOCK_ROWS = 50_000
CENTRES, LATENT_DIM, QUERIES = 2_000, 48, 3_000
CLUSTER_SPREAD, NOISE = 0.6, 0.3  # standard deviations; between the centres it is 1


def vectors_path(folder: Path) -> Path:
    """Return the vectors' file; a folder of its own, since autofaiss takes all that is there."""
    return folder / "vectors" / "vectors.npy"


def count_vectors(folder: Path) -> tuple[int, int]:
    """Return N and D of a data set."""
    rows, dim = np.load(vectors_path(folder), mmap_mode="r").shape
    return rows, dim


def write_rows(folder: Path, vectors: Float32Array, queries: Float32Array) -> None:
    """Write a data set of rows of any length."""
    (folder / "vectors").mkdir(parents=True, exist_ok=True)
    np.save(vectors_path(folder), round_rows(vectors))
    np.save(folder / "queries.npy", round_rows(queries))


def make_synthetic(folder: Path, *, rows: int, dim: int, seed: int) -> None:
    """Write clustered vectors of low rank, drawn in blocks: fewer rows are a prefix of more.

    2,000 centres in 48 latent dimensions, points spread around them, one random linear map to
    `dim`, and noise in all dimensions.
    """
    (folder / "vectors").mkdir(parents=True, exist_ok=True)
    vectors = open_memmap(vectors_path(folder), "w+", np.dtype(np.float32), (rows, dim))
    for start in range(0, rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, rows)
        vectors[start:stop] = _draw_synthetic(BLOCK_ROWS, dim, (seed, 1, start))[: stop - start]
    vectors.flush()
    np.save(folder / "queries.npy", _draw_synthetic(QUERIES, dim, (seed, 2)))


def _draw_synthetic(rows: int, dim: int, seed: tuple[int, ...]) -> Float32Array:
    shape = np.random.default_rng([seed[0], 0])
    centres = shape.normal(size=(CENTRES, LATENT_DIM))
    turn = shape.normal(size=(LATENT_DIM, dim)) / np.sqrt(LATENT_DIM)
    random = np.random.default_rng(seed)
    latent = centres[random.integers(CENTRES, size=rows)]
    latent += CLUSTER_SPREAD * random.normal(size=latent.shape)
    return round_rows(latent @ turn + NOISE * random.normal(size=(rows, dim)))


def round_rows(rows: npt.NDArray[Any]) -> Float32Array:
    """Return unit rows as the embeddings table keeps them: rounded to float16."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rounded: Float32Array = unit.astype(np.float16).astype(np.float32)
    return rounded


def find_exact(folder: Path, rows: int) -> Int64Array:
    """Search the first rows exactly: (Q, K) int64, kept beside the queries."""
    kept = folder / f"exact-{rows}.npy"
    if not kept.exists():
        blocks = _blocks(vectors_path(folder), rows)
        np.save(kept, search_exact(np.load(folder / "queries.npy"), blocks, K)[1])
    found: Int64Array = np.load(kept)
    return found


def _blocks(path: Path, total: int) -> Iterator[tuple[Int64Array, Float32Array]]:
    for start in range(0, total, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, total)
        yield np.arange(start, stop, dtype=np.int64), read_rows(path, start, stop)
