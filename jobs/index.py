"""The index stage: live rows of the embeddings table in, measured index files out.

A field at a time: a uniform sample trains an empty template, Ray tasks add one data file each to
clones of it, one task merges and writes, exact search over the same files measures the result.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import ray

from indexing.build import (
    add_vectors,
    list_sizes,
    merge_indexes,
    read_index,
    train_index,
    write_index,
)
from indexing.metrics import list_imbalance
from indexing.search import search_index
from indexing.spec import IndexSpec
from indexing.tune import tune_nprobe
from jobs.cluster import gather
from jobs.config import IndexConfig
from jobs.diff import OPERATIONS, locate
from jobs.errors import ConfigError
from jobs.schemas import UPSERT
from jobs.space import VectorField
from jobs.store import Store, scratch_folder
from jobs.vectors import (
    Float32Array,
    Int64Array,
    LiveRows,
    concatenate,
    exact_search,
    gather_vectors,
    mark_first,
    read_vectors,
)

EXACT_K = 10
INDEX_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class FieldIndex:
    """One published index file and what was measured of it.

    Attributes:
        why: One sentence for each choice made from the catalog's size.
        curve: nprobe, intersection at 10 and latency of each point tried.
        self_retrieval: Share of sampled vectors that found themselves, or an equal vector.
    """

    field: str
    file: str
    sha256: str
    size_bytes: int
    spec: dict[str, Any]
    factory: str
    why: tuple[str, ...]
    ntotal: int
    nprobe: int
    intersection_at_10: float
    self_retrieval: float
    measured_queries: int
    imbalance: float
    curve: tuple[dict[str, Any], ...]


def live_rows(
    plan: npt.NDArray[np.void], state: npt.NDArray[np.void], files: list[str]
) -> LiveRows:
    """Join the catalog with the table: live are the catalog's rows whose newest row is an upsert.

    Args:
        plan: (N,) from `jobs.diff.scan_catalog`.
        state: (M,) from `jobs.diff.read_state`, after embedding.
        files: What `state["file"]` counts in.
    """
    place, known = locate(state["vector_id"], plan["vector_id"])
    if len(state) == 0:
        place, live = place[:0], np.zeros(len(plan), bool)
    else:
        upsert = state["operation"][place] == OPERATIONS[UPSERT]
        live = known & upsert & (state["content_hash"][place] == plan["content_hash"])
        place = place[live]
    rows = plan[live]
    return LiveRows(
        vector_id=rows["vector_id"].copy(),
        generation=state["generation"][place].copy(),
        product=rows["product"].copy(),
        first=mark_first(rows["product"], rows["image_number"]),
        files=tuple(files[n] for n in np.unique(state["file"][place])),
        rejected=int(len(plan) - live.sum()),
    )


def choose_spec(config: IndexConfig, ntotal: int, dim: int) -> tuple[IndexSpec, list[str]]:
    """Choose the index from the catalog's size, or take what the configuration says.

    Raises:
        ConfigError: The configured index is impossible for this dimension or number of rows.
    """
    if config.nlist is None and config.pq_m is None:
        return IndexSpec.for_catalog(ntotal, dim)
    chosen, _ = IndexSpec.for_catalog(ntotal, dim)
    nlist = chosen.nlist if config.nlist is None else config.nlist
    pq_m = (chosen.pq_m if nlist else 0) if config.pq_m is None else config.pq_m
    try:
        spec = IndexSpec(dim=dim, nlist=nlist, pq_m=pq_m)
    except ValueError as error:
        raise ConfigError(f"index: {error}") from error
    available = min(ntotal, config.train_rows)
    if spec.min_training_rows > available:
        raise ConfigError(
            f"index: {spec.factory} needs {spec.min_training_rows} training rows, there are "
            f"{available}: a smaller index.nlist or index.pq_m, a larger index.train_rows, "
            "or leave them out to have them chosen"
        )
    return spec, [f"{spec.factory} is what the configuration says."]


def build_index(
    field: VectorField,
    live: LiveRows,
    config: IndexConfig,
    store: Store,
    target: tuple[str, int],
    progress: Callable[[str], None],
) -> FieldIndex:
    """Train, fill, merge, write, tune and measure one field's index.

    Args:
        field: The field.
        live: All live rows; the field takes its own of them.
        config: The index section.
        store: Where the vectors are and the index goes.
        target: (name of the folder below `indexes/`, number of sampled queries).
        progress: Called with the name of the step that begins.

    Raises:
        ConfigError: The configured index can't be built from so many rows.
        StoreError: A live row has no vector of this field.
    """
    rows = live.select(field.name)
    spec, why = choose_spec(config, len(rows.vector_id), field.dim)
    reference = ray.put(rows)
    folder, sample_rows = target

    progress(f"train {spec.factory}")
    train_ids = rows.draw(
        config.train_rows if spec.nlist else 0, seed=config.seed, salt=f"train/{field.name}"
    )
    sample = gather_vectors(store, field, reference, live.files, train_ids)
    template = _train.remote(spec, config.seed, *sample)

    progress("add and merge")
    parts = [_add.remote(store, file, field, reference, template) for file in live.files]
    name = f"{field.name}.faiss"
    sha256, size_bytes, ntotal, imbalance = gather([_merge.remote(store, folder, name, *parts)])[0]

    progress("measure against exact search")
    query_ids = rows.draw(sample_rows, seed=config.seed, salt=f"measure/{field.name}")
    ids, queries = _join.remote(*gather_vectors(store, field, reference, live.files, query_ids))
    exact = ray.put(exact_search(store, field, reference, live.files, queries, EXACT_K))
    address = (folder, name, sha256)
    point, curve, found_self = gather(
        [_measure.remote(store, address, ids, queries, exact, config.target_intersection)]
    )[0]
    return FieldIndex(
        field=field.name,
        file=name,
        sha256=sha256,
        size_bytes=size_bytes,
        spec=asdict(spec),
        factory=spec.factory,
        why=tuple(why),
        ntotal=ntotal,
        nprobe=point["nprobe"],
        intersection_at_10=point["intersection"],
        self_retrieval=found_self,
        measured_queries=len(query_ids),
        imbalance=imbalance,
        curve=tuple(curve),
    )


@ray.remote(num_cpus=1, num_returns=2)
def _join(*parts: tuple[Int64Array, Float32Array]) -> tuple[Int64Array, Float32Array]:
    return concatenate(parts)


@ray.remote(num_cpus=1)
def _train(spec: IndexSpec, seed: int, *parts: tuple[Int64Array, Float32Array]) -> Any:  # noqa: ANN401
    """Train on this task's own cores; the sample is sorted by id, so the order is always one."""
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    _, vectors = concatenate(parts)
    sample = vectors.reshape(-1, spec.dim)
    return faiss.serialize_index(train_index(spec, sample, seed=seed))


@ray.remote(num_cpus=1)
def _add(
    store: Store,
    file: str,
    field: VectorField,
    rows: LiveRows,
    template: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    faiss.omp_set_num_threads(1)
    index = faiss.deserialize_index(template.copy())
    ids, vectors = read_vectors(store, file, field, rows)
    return faiss.serialize_index(add_vectors(index, ids, vectors))


@ray.remote(num_cpus=1)
def _merge(store: Store, folder: str, name: str, *parts: Any) -> tuple[str, int, int, float]:  # noqa: ANN401
    faiss.omp_set_num_threads(1)
    merged = merge_indexes([faiss.deserialize_index(part.copy()) for part in parts])
    path = scratch_folder("index") / name
    sha256 = write_index(merged, path)
    size_bytes = path.stat().st_size
    store.upload(path, "indexes", folder, name)
    path.unlink()
    path.parent.rmdir()
    sizes = list_sizes(merged)
    return sha256, size_bytes, merged.ntotal, list_imbalance(sizes) if len(sizes) else 1.0


@ray.remote(num_cpus=1)
def _measure(
    store: Store,
    address: tuple[str, str, str],
    ids: Int64Array,
    queries: Float32Array,
    exact: tuple[Float32Array, Int64Array],
    target: float,
) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """Tune nprobe on the written file and measure it there."""
    faiss.omp_set_num_threads(INDEX_THREADS)
    folder, name, sha256 = address
    cache = scratch_folder("measure")
    index = read_index(store.local_copy(cache, "indexes", folder, name), sha256=sha256)
    k = min(EXACT_K, index.ntotal)
    point, curve = tune_nprobe(index, queries, exact[1], k=k, target_intersection=target)
    _, found = search_index(index, queries, k)
    return asdict(point), [asdict(p) for p in curve], _self_retrieval(ids, found, exact)


def _self_retrieval(
    ids: Int64Array, found: Int64Array, exact: tuple[Float32Array, Int64Array]
) -> float:
    """Return the share of queries whose own vector, or an exactly equal one, is in the results."""
    equal = np.where(exact[0] >= 1 - 1e-4, exact[1], -2)
    hits = (found == ids[:, None]).any(axis=1)
    hits |= (found[:, :, None] == equal[:, None, :]).any(axis=(1, 2))
    return float(hits.mean())
