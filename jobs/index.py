"""The index stage: live rows of the embeddings table in, measured index files out.

A field at a time: a uniform sample trains an empty template, Ray tasks add one data file each to
clones of it, one task merges and writes, exact search over the same files measures the result.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
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
from indexing.search import merge_topk, search_exact, search_index
from indexing.spec import IndexSpec
from indexing.tune import tune_nprobe
from jobs.cluster import cluster_cpus, gather, gather_bounded
from jobs.config import IndexConfig
from jobs.diff import OPERATIONS, locate, read_data_file
from jobs.errors import ConfigError
from jobs.schemas import UPSERT
from jobs.store import Store, scratch_folder

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
EXACT_K = 10
INDEX_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class LiveRows:
    """The rows a release is made of.

    Attributes:
        vector_id: (N,) int64, sorted.
        generation: (N,) int64: which of the rows of that id is live.
        product: (N,) int64 hash of the product id.
        first: (N,) bool: the product's first live image. A text field is indexed once a product.
        files: Data files that hold a live row.
        rejected: Catalog rows that are not live.
    """

    vector_id: Int64Array
    generation: Int64Array
    product: Int64Array
    first: npt.NDArray[np.bool_]
    files: tuple[str, ...]
    rejected: int

    @property
    def products(self) -> int:
        """How many products have a live row."""
        return int(self.first.sum())

    def select(self, field: str) -> "LiveRows":
        """Return the rows that a field's index holds."""
        if field != "text":
            return self
        keep = self.first
        return LiveRows(
            vector_id=self.vector_id[keep],
            generation=self.generation[keep],
            product=self.product[keep],
            first=self.first[keep],
            files=self.files,
            rejected=self.rejected,
        )

    def draw(self, rows: int, *, seed: int, salt: str) -> Int64Array:
        """Draw rows uniformly, by their ids alone: the order of the catalog has no part in it.

        Returns:
            (min(rows, N),) int64 vector ids, sorted.
        """
        mix = np.frombuffer(hashlib.sha256(f"{salt}/{seed}".encode()).digest()[:8], np.uint64)[0]
        keys = self.vector_id.astype(np.uint64) ^ mix
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
        keys ^= keys >> np.uint64(31)
        rows = min(rows, len(keys))
        return np.sort(self.vector_id[np.argsort(keys, kind="stable")[:rows]])


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
    order = np.lexsort((rows["image_number"], rows["product"]))
    products = rows["product"][order]
    first = np.zeros(len(rows), bool)
    first[order] = np.append(True, products[1:] != products[:-1])[: len(rows)]
    return LiveRows(
        vector_id=rows["vector_id"].copy(),
        generation=state["generation"][place].copy(),
        product=rows["product"].copy(),
        first=first,
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
    field: str,
    live: LiveRows,
    dim: int,
    config: IndexConfig,
    store: Store,
    target: tuple[str, int],
    progress: Callable[[str], None],
) -> FieldIndex:
    """Train, fill, merge, write, tune and measure one field's index.

    Args:
        field: The field.
        live: All live rows; the field takes its own of them.
        dim: D.
        config: The index section.
        store: Where the vectors are and the index goes.
        target: (name of the folder below `indexes/`, number of sampled queries).
        progress: Called with the name of the step that begins.

    Raises:
        ConfigError: The configured index can't be built from so many rows.
    """
    rows = live.select(field)
    spec, why = choose_spec(config, len(rows.vector_id), dim)
    reference = ray.put(rows)
    folder, sample_rows = target

    progress(f"train {spec.factory}")
    train_ids = rows.draw(
        config.train_rows if spec.nlist else 0, seed=config.seed, salt=f"train/{field}"
    )
    sample = _gather_vectors(store, field, reference, live.files, train_ids)
    template = _train.remote(spec, config.seed, *sample)

    progress("add and merge")
    parts = [_add.remote(store, file, field, reference, template) for file in live.files]
    name = f"{field}.faiss"
    sha256, size_bytes, ntotal, imbalance = gather([_merge.remote(store, folder, name, *parts)])[0]

    progress("measure against exact search")
    query_ids = rows.draw(sample_rows, seed=config.seed, salt=f"measure/{field}")
    queries = _gather_vectors(store, field, reference, live.files, query_ids)
    joined = _join.remote(*queries)
    exact = _exact_search(store, field, reference, live.files, joined)
    point, curve, found_self = gather(
        [_measure.remote(store, (folder, name, sha256), joined, exact, config.target_intersection)]
    )[0]
    return FieldIndex(
        field=field,
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


def read_vectors(
    store: Store, file: str, field: str, rows: LiveRows, wanted: Int64Array | None = None
) -> tuple[Int64Array, Float32Array]:
    """Read a data file's live vectors of one field.

    Args:
        store: The store.
        file: The data file.
        field: The field.
        rows: The field's live rows.
        wanted: (M,) sorted vector ids to keep; all live ones if None.

    Returns:
        Ids (N,) int64 and vectors (N, D) float32 unit rows, sorted by id.
    """
    column = f"{field}_embedding"
    table = read_data_file(store, file, ["vector_id", "generation", "operation", column])
    ids = table["vector_id"].to_numpy()
    places, known = locate(rows.vector_id, ids)
    keep = known & (table["operation"].to_numpy() == UPSERT)
    if len(rows.vector_id):
        keep &= rows.generation[places] == table["generation"].to_numpy()
    if wanted is not None:
        keep &= locate(wanted, ids)[1]
    kept = table.filter(pa.array(keep)).sort_by("vector_id")
    lists = kept[column].combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors = values.reshape(len(kept), -1) if len(kept) else np.zeros((0, 0), np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)  # float16 rounding moved them a little
    return kept["vector_id"].to_numpy(), np.ascontiguousarray(vectors / norms)


def _gather_vectors(
    store: Store,
    field: str,
    rows: Any,  # noqa: ANN401 - a reference
    files: tuple[str, ...],
    wanted: Int64Array,
) -> list[Any]:
    """Start a task a file that reads the wanted vectors; return their references."""
    return [_read_wanted.remote(store, file, field, rows, wanted) for file in files]


@ray.remote(num_cpus=1)
def _read_wanted(
    store: Store, file: str, field: str, rows: LiveRows, wanted: Int64Array
) -> tuple[Int64Array, Float32Array]:
    return read_vectors(store, file, field, rows, wanted)


def _concatenate(parts: tuple[tuple[Int64Array, Float32Array], ...]) -> tuple[Int64Array, Any]:
    filled = [(ids, vectors) for ids, vectors in parts if len(ids)]
    if not filled:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    ids = np.concatenate([part[0] for part in filled])
    order = np.argsort(ids)
    return ids[order], np.concatenate([part[1] for part in filled])[order]


@ray.remote(num_cpus=1)
def _join(*parts: tuple[Int64Array, Float32Array]) -> tuple[Int64Array, Float32Array]:
    return _concatenate(parts)


@ray.remote(num_cpus=1)
def _train(spec: IndexSpec, seed: int, *parts: tuple[Int64Array, Float32Array]) -> Any:  # noqa: ANN401
    """Train on this task's own cores; the sample is sorted by id, so the order is always one."""
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    _, vectors = _concatenate(parts)
    sample = vectors.reshape(-1, spec.dim)
    return faiss.serialize_index(train_index(spec, sample, seed=seed))


@ray.remote(num_cpus=1)
def _add(store: Store, file: str, field: str, rows: LiveRows, template: Any) -> Any:  # noqa: ANN401
    faiss.omp_set_num_threads(1)
    index = faiss.deserialize_index(template.copy())
    ids, vectors = read_vectors(store, file, field, rows)
    return faiss.serialize_index(add_vectors(index, ids, vectors.reshape(-1, index.d)))


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


def _exact_search(
    store: Store,
    field: str,
    rows: Any,  # noqa: ANN401 - a reference
    files: tuple[str, ...],
    queries: Any,  # noqa: ANN401 - a reference
) -> Any:  # noqa: ANN401
    """Return a reference to exact (scores, ids) of the queries over all files."""

    def submit(file: str) -> Any:  # noqa: ANN401
        return _exact_block.remote(store, file, field, rows, queries)

    best: Any = None
    for part in gather_bounded(submit, files, in_flight=2 * cluster_cpus()):
        best = part if best is None else merge_topk([best, part], EXACT_K)
    return ray.put(best)


@ray.remote(num_cpus=1)
def _exact_block(
    store: Store, file: str, field: str, rows: LiveRows, queries: tuple[Int64Array, Float32Array]
) -> tuple[Float32Array, Int64Array]:
    ids, vectors = read_vectors(store, file, field, rows)
    vectors = vectors.reshape(-1, queries[1].shape[1])
    return search_exact(queries[1], [(ids, vectors)], EXACT_K)


@ray.remote(num_cpus=1)
def _measure(
    store: Store,
    address: tuple[str, str, str],
    queries: tuple[Int64Array, Float32Array],
    exact: tuple[Float32Array, Int64Array],
    target: float,
) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """Tune nprobe on the written file and measure it there."""
    faiss.omp_set_num_threads(INDEX_THREADS)
    folder, name, sha256 = address
    cache = scratch_folder("measure")
    index = read_index(store.local_copy(cache, "indexes", folder, name), sha256=sha256)
    k = min(EXACT_K, index.ntotal)
    point, curve = tune_nprobe(index, queries[1], exact[1], k=k, target_intersection=target)
    _, found = search_index(index, queries[1], k)
    return asdict(point), [asdict(p) for p in curve], _self_retrieval(queries[0], found, exact)


def _self_retrieval(
    ids: Int64Array, found: Int64Array, exact: tuple[Float32Array, Int64Array]
) -> float:
    """Return the share of queries whose own vector, or an exactly equal one, is in the results."""
    equal = np.where(exact[0] >= 1 - 1e-4, exact[1], -2)
    hits = (found == ids[:, None]).any(axis=1)
    hits |= (found[:, :, None] == equal[:, None, :]).any(axis=(1, 2))
    return float(hits.mean())
