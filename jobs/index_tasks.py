"""The Ray tasks of the index stage: train, add, merge or update, measure; one field at a time.

Letters: N rows, Q queries, D dimension, K neighbours.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
import ray

from indexing.build import (
    add_vectors,
    list_sizes,
    merge_indexes,
    read_index,
    set_nprobe,
    stored_ids,
    train_index,
    write_index,
)
from indexing.metrics import list_imbalance
from indexing.search import search_index
from indexing.spec import IndexSpec
from indexing.tune import OperatingPoint, tune_nprobe
from indexing.update import empty_clone, quantization_error, update_index
from jobs.buckets import Records
from jobs.errors import StoreError
from jobs.space import VectorField
from jobs.store import Store, scratch_folder
from jobs.vectors import Float32Array, Int64Array, concatenate, read_blocks

MEASURED_K = 10
EXACT_K = MEASURED_K + 1  # one more tells whether the ten nearest are defined at all
TIE = 1e-6
EQUAL = 1 - 1e-4
INDEX_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class IndexFile:
    """A written index file.

    Attributes:
        folder: Name of the folder below `indexes/`: of the run that wrote it.
    """

    folder: str
    file: str
    sha256: str
    size_bytes: int
    ntotal: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of an index file.

    Attributes:
        point: The operating point that was chosen.
        curve: All points tried.
        self_retrieval: Share of sampled vectors that found themselves, or an equal vector.
        queries: How many sampled vectors count.
        ambiguous: How many don't: their tenth neighbour and the next are equally near, as where
            many products share a picture, so that the ten nearest aren't defined.
        imbalance: FAISS's imbalance factor of the lists; 1 for a flat index.
        quantization_error: Mean squared distance between the sample and what the index keeps.
        missing: Live ids that are not in the index.
        extra: Ids in the index that are not live, or are there twice.
        overlap_at_10: With the newest release's index, mean share of the same neighbours; None
            where there is none to compare with.
    """

    point: OperatingPoint
    curve: tuple[OperatingPoint, ...]
    self_retrieval: float
    queries: int
    ambiguous: int
    imbalance: float
    quantization_error: float
    missing: int
    extra: int
    overlap_at_10: float | None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What an index is measured against.

    Attributes:
        target_intersection: nprobe is the smallest that reaches it at k = 10.
        base: The newest release's index file of the same vector space and its nprobe, or None.
    """

    target_intersection: float
    base: tuple[IndexFile, int] | None


@ray.remote(num_cpus=1)
def train(
    spec: IndexSpec,
    seed: int,
    draw: tuple[int, str],
    *parts: tuple[Int64Array, Float32Array],
) -> Any:  # noqa: ANN401
    """Train on this task's own cores; the sample is sorted by id, so the order is always one."""
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    _, vectors = concatenate(parts, rows=draw[0], seed=seed, salt=draw[1])
    sample = vectors.reshape(-1, spec.dim)
    return faiss.serialize_index(train_index(spec, sample, seed=seed))


@ray.remote(num_cpus=1)
def empty(store: Store, base: IndexFile) -> Any:  # noqa: ANN401
    """Return the trained template of a published index."""
    faiss.omp_set_num_threads(1)
    return faiss.serialize_index(empty_clone(_open(store, base)))


@ray.remote(num_cpus=1)
def add(
    store: Store,
    field: VectorField,
    files: tuple[int, list[str]],
    template: Any,  # noqa: ANN401
    mark: str | None,
    *parts: Records,
) -> Any:  # noqa: ANN401
    """Fill a clone of the template with a group's live rows, or with those that have a mark."""
    faiss.omp_set_num_threads(1)
    rows = np.concatenate(parts)
    rows = rows if mark is None else rows[rows[mark]]
    index = faiss.deserialize_index(template.copy())
    filled = [index]
    for ids, vectors in read_blocks(store, field, files, rows):
        filled.append(add_vectors(index, ids, vectors))
    return faiss.serialize_index(merge_indexes(filled))


@ray.remote(num_cpus=1)
def merge(store: Store, folder: str, name: str, *parts: Any) -> IndexFile:  # noqa: ANN401
    """Join the filled parts and write them as one file."""
    faiss.omp_set_num_threads(1)
    merged = merge_indexes([faiss.deserialize_index(part.copy()) for part in parts])
    return _write(store, folder, name, merged)


@ray.remote(num_cpus=1)
def update(
    store: Store,
    base: IndexFile,
    folder: str,
    name: str,
    stale: list[Any],
    mark: str,
    *parts: Any,  # noqa: ANN401
) -> IndexFile:
    """Remove a published index's stale ids, add the filled parts, write it as another file."""
    faiss.omp_set_num_threads(1)
    removed = [rows["vector_id"][rows[mark]] for rows in map(ray.get, stale)]
    ids = np.concatenate([np.zeros(0, np.int64), *removed])
    filled = [faiss.deserialize_index(part.copy()) for part in parts]
    index = _open(store, base)
    try:
        updated = update_index(index, ids, filled)
    except ValueError as error:
        raise StoreError(
            f"{store.uri('indexes', base.folder, base.file)} doesn't fit its release ({error}); "
            "`vitrine reindex` builds another from the stored vectors"
        ) from error
    return _write(store, folder, name, updated)


def _write(store: Store, folder: str, name: str, index: faiss.Index) -> IndexFile:
    scratch = scratch_folder("index")
    try:
        path = scratch / name
        sha256 = write_index(index, path)
        store.upload(path, "indexes", folder, name)
        return IndexFile(
            folder=folder,
            file=name,
            sha256=sha256,
            size_bytes=path.stat().st_size,
            ntotal=index.ntotal,
        )
    finally:
        shutil.rmtree(scratch)


def _open(store: Store, file: IndexFile) -> faiss.Index:
    cache = scratch_folder("index")
    try:
        local = store.local_copy(cache, "indexes", file.folder, file.file)
        return read_index(local, sha256=file.sha256)
    except ValueError as error:
        raise StoreError(f"{store.uri('indexes', file.folder)}: {error}") from error
    finally:
        shutil.rmtree(cache)


@ray.remote(num_cpus=1, num_returns=2)
def join_sample(
    draw: tuple[int, int, str], *parts: tuple[Int64Array, Float32Array]
) -> tuple[Int64Array, Float32Array]:
    """Join a sample; return ids and vectors as two objects."""
    rows, seed, salt = draw
    return concatenate(parts, rows=rows, seed=seed, salt=salt)


@ray.remote(num_cpus=1)
def measure(
    store: Store,
    file: IndexFile,
    compared: Compared,
    ids: Int64Array,
    queries: Float32Array,
    exact: tuple[Float32Array, Int64Array],
    live: tuple[list[Any], str | None],
) -> Measurement:
    """Tune nprobe on the written file, and measure and check it there.

    Args:
        store: The store.
        file: The written index.
        compared: What it is measured against.
        ids: (Q,) sampled vector ids.
        queries: (Q, D) their vectors.
        exact: Scores and ids that exact search finds.
        live: References to the live rows, sorted, and the mark of those that are in this index.
    """
    faiss.omp_set_num_threads(INDEX_THREADS)
    index = _open(store, file)
    k = min(MEASURED_K, index.ntotal)
    target = compared.target_intersection
    clear = _find_clear(exact[0])
    ids, asked, exact = ids[clear], queries[clear], (exact[0][clear], exact[1][clear])
    point, curve = tune_nprobe(index, asked, exact[1], k=k, target_intersection=target)
    _, found = search_index(index, asked, k)
    sizes = list_sizes(index)
    missing, extra = _compare_ids(stored_ids(index), *live)
    return Measurement(
        point=point,
        curve=tuple(curve),
        self_retrieval=_self_retrieval(ids, found, exact),
        queries=len(asked),
        ambiguous=len(queries) - len(asked),
        imbalance=list_imbalance(sizes) if len(sizes) else 1.0,
        quantization_error=quantization_error(index, queries),
        missing=missing,
        extra=extra,
        overlap_at_10=_overlap(store, compared.base, asked, found),
    )


def _find_clear(scores: Float32Array) -> Any:  # noqa: ANN401
    """Mark the queries whose ten nearest are defined; all of them if none is.

    Args:
        scores: (Q, EXACT_K) float32 of exact search, best first.
    """
    if scores.shape[1] < EXACT_K:
        return np.ones(len(scores), bool)
    clear = scores[:, MEASURED_K - 1] - scores[:, MEASURED_K] > TIE
    return clear if clear.any() else np.ones(len(scores), bool)


def _compare_ids(stored: Int64Array, live: list[Any], mark: str | None) -> tuple[int, int]:
    """Count live ids that are not stored, and stored ones that are not live or are there twice."""
    stored.sort()
    missing, matched = 0, 0
    for rows in map(ray.get, live):
        wanted = rows["vector_id"] if mark is None else rows["vector_id"][rows[mark]]
        there = np.isin(wanted, stored[slice(*np.searchsorted(stored, _ends(wanted)))])
        missing += int((~there).sum())
        matched += int(there.sum())
    return missing, len(stored) - matched


def _ends(ids: Int64Array) -> Int64Array:
    return np.array([ids[0], ids[-1] + 1] if len(ids) else [0, 0], np.int64)


def _overlap(
    store: Store,
    base: tuple[IndexFile, int] | None,
    queries: Float32Array,
    found: Int64Array,
) -> float | None:
    if base is None or found.shape[1] == 0 or not len(queries):
        return None
    index = _open(store, base[0])
    set_nprobe(index, base[1])
    k = min(found.shape[1], index.ntotal)
    if k == 0:
        return None
    _, before = search_index(index, queries, k)
    same = (found[:, :k, None] == before[:, None, :]) & (found[:, :k, None] >= 0)
    return float(same.any(axis=2).mean())


def _self_retrieval(
    ids: Int64Array, found: Int64Array, exact: tuple[Float32Array, Int64Array]
) -> float:
    """Return the share of queries whose own vector, or an exactly equal one, is in the results."""
    equal = np.where(exact[0] >= EQUAL, exact[1], -2)
    hits = (found == ids[:, None]).any(axis=1)
    hits |= (found[:, :, None] == equal[:, None, :]).any(axis=(1, 2))
    return float(hits.mean())


def describe_curve(points: tuple[OperatingPoint, ...]) -> tuple[dict[str, Any], ...]:
    """Return plain values for JSON."""
    return tuple(asdict(point) for point in points)
