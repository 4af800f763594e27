"""Builds and searches one index in a process of its own; benchmarks/index.py runs it.

    python benchmarks/index_contenders.py plain|cores build|search '{"data": FOLDER, ...}'

plain  FAISS and nothing else: index_factory, train, add, write.
cores  `indexing` in one process: what the index stage does, without Ray and the store.

Both take the same rows, training sample, threads and factory string; their points are swept on
the first held-out queries and measured on the others.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from index_data import BLOCK_ROWS, find_exact, vectors_path
from index_probe import (
    TUNING_QUERIES,
    Float32Array,
    Int64Array,
    K,
    Stopwatch,
    draw_rows,
    measure_batch,
    measure_search,
    peak_mib,
    read_rows,
)

from indexing.build import append_vectors, read_index, train_index, write_index
from indexing.metrics import intersection_at_k
from indexing.refine import UInt8Array, encode_refine, open_refine, write_refine
from indexing.search import Partition, SearchPoint, search_partition
from indexing.spec import IndexSpec
from indexing.tune import (
    MeasuredPoint,
    choose_point,
    model_costs,
    prune_curve,
    rerank_depths,
    sweep_partition,
)

DEPTHS = (20, 50, 100, 200)  # candidates that a refine store ranks again
SATURATED = 0.002  # twice the lists for less than this: more lists don't help


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a contender builds.

    Attributes:
        data: The data set's folder.
        folder: Where it writes.
        rows: How many of the vectors, from the first.
        factory: The FAISS factory string, with its refine store.
        train_rows: Size of the training sample.
        target: The least intersection at 10 that the swept point must reach.
    """

    data: Path
    folder: Path
    rows: int
    factory: str
    train_rows: int
    target: float
    seed: int
    threads: int

    @property
    def spec(self) -> IndexSpec:
        """What the factory string means to Vitrine."""
        return IndexSpec.parse(self.factory, np.load(self.vectors, mmap_mode="r").shape[1])

    @property
    def vectors(self) -> Path:
        """The vectors' file."""
        return vectors_path(self.data)

    @property
    def queries(self) -> tuple[Float32Array, Float32Array]:
        """The queries that choose the point, and those that measure it."""
        every = np.load(self.data / "queries.npy")
        return every[:TUNING_QUERIES], every[TUNING_QUERIES:]

    @property
    def exact(self) -> Int64Array:
        """What exact search finds for all queries."""
        return find_exact(self.data, self.rows)

    def blocks(self) -> Iterator[tuple[Int64Array, Float32Array]]:
        """Ids and vectors, a block at a time."""
        for start in range(0, self.rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.rows)
            yield np.arange(start, stop, dtype=np.int64), read_rows(self.vectors, start, stop)


def build_plain(task: Task) -> dict[str, Any]:
    """Train, add and write as FAISS's own examples do."""
    watch = Stopwatch()
    with watch.step("read"):
        sample = draw_rows(task.vectors, task.rows, task.train_rows, task.seed)
    with watch.step("train"):
        index = faiss.index_factory(sample.shape[1], task.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(sample)
    for _, vectors in _timed_blocks(task, watch):
        with watch.step("add"):
            index.add(vectors)
    with watch.step("write"):
        faiss.write_index(index, str(task.folder / "plain.faiss"))
    return {"seconds": watch.seconds, "index_bytes": _count_bytes(task)}


def _timed_blocks(task: Task, watch: Stopwatch) -> Iterator[tuple[Int64Array, Float32Array]]:
    blocks = task.blocks()
    while True:
        with watch.step("read"):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def _count_bytes(task: Task) -> int:
    kept = (".faiss", ".refine")
    return sum(path.stat().st_size for path in task.folder.iterdir() if path.suffix in kept)


def search_plain(task: Task) -> dict[str, Any]:
    """Sweep nprobe and depth through FAISS's ParameterSpace, and measure the chosen point.

    With a refine store the codes alone are measured too, as `codes_alone`.
    """
    index = faiss.read_index(str(task.folder / "plain.faiss"))
    if not isinstance(index, faiss.IndexRefine):
        return _sweep_plain(index, (0,), task)
    base = faiss.downcast_index(index.base_index)
    alone = _sweep_plain(base, (0,), task)
    return _sweep_plain(index, DEPTHS, task) | {"codes_alone": alone}


def _sweep_plain(
    index: Any,  # noqa: ANN401 - any index of FAISS
    depths: tuple[int, ...],
    task: Task,
) -> dict[str, Any]:
    space: Any = faiss.ParameterSpace()  # whose stubs know numbers alone
    (tuning, measured), exact = task.queries, task.exact

    def search(asked: Float32Array, k: int) -> Int64Array:
        ids: Int64Array = index.search(asked, k)[1]
        return ids

    curve: list[dict[str, Any]] = []
    started = time.perf_counter()
    for depth in depths:
        last = 0.0
        for nprobe in _nprobes(index):
            point = f"nprobe={nprobe}" + (f",k_factor_rf={depth // K}" if depth else "")
            space.set_index_parameters(index, point)
            ids, batch_ms = measure_batch(search, tuning)
            found = intersection_at_k(ids, exact[:TUNING_QUERIES], K)
            curve.append({"point": point, "intersection": found, "ms_per_query": batch_ms})
            if found >= task.target or 0 < found - last < SATURATED:
                break
            last = found
    chosen, tune_s = choose(curve, task.target), time.perf_counter() - started
    space.set_index_parameters(index, chosen["point"])
    ids, figures = measure_search(search, measured)
    np.save(task.folder / "found.npy", ids)
    reached = intersection_at_k(ids, exact[TUNING_QUERIES:], K)
    told = {"point": chosen["point"], "intersection": reached, "tune_s": tune_s, "curve": curve}
    return figures | told


def choose(curve: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Return the fastest point that meets the target, else the one nearest to it."""
    meeting = [point for point in curve if point["intersection"] >= target]
    if meeting:
        return min(meeting, key=lambda point: float(point["ms_per_query"]))
    return max(curve, key=lambda point: float(point["intersection"]))


def _nprobes(index: Any) -> list[int]:  # noqa: ANN401 - any index of FAISS
    base = index.base_index if isinstance(index, faiss.IndexRefine) else index
    lists = faiss.try_extract_index_ivf(base)
    if lists is None:
        raise SystemExit("only an index with lists has an nprobe to sweep")
    steps = {round(2 ** (step / 2)) for step in range(2 * lists.nlist.bit_length())}
    return sorted(step for step in steps if step <= lists.nlist)


def build_cores(task: Task) -> dict[str, Any]:
    """Train, add and write as the index stage's tasks do, with nothing to merge."""
    watch, spec = Stopwatch(), task.spec
    with watch.step("read"):
        sample = draw_rows(task.vectors, task.rows, task.train_rows, task.seed)
    with watch.step("train"):
        index = train_index(spec, sample, seed=task.seed)
    del sample
    spilled = []
    for block in _timed_blocks(task, watch):
        with watch.step("add"):
            append_vectors(index, *block)
        if spec.refine != "none":
            with watch.step("refine"):
                spilled.append([_spill(task, *block)])
    with watch.step("write"):
        hashes = {"index": write_index(index, task.folder / "cores.faiss")}
    if spec.refine != "none":
        path = task.folder / "cores.refine"
        with watch.step("refine"):
            hashes["refine"] = write_refine(path, spec.refine, spec.dim, spilled, task.rows)
    (task.folder / "hashes.json").write_text(json.dumps(hashes), encoding="utf-8")
    return {"seconds": watch.seconds, "index_bytes": _count_bytes(task)}


def _spill(task: Task, ids: Int64Array, vectors: Float32Array) -> tuple[Int64Array, UInt8Array]:
    """Keep a block's refine codes in a file until all are known."""
    path = task.folder / f"{ids[0]}.npy"
    np.save(path, encode_refine(task.spec.refine, vectors))
    codes: UInt8Array = np.load(path, mmap_mode="r")
    return ids, codes


def search_cores(task: Task) -> dict[str, Any]:
    """Sweep and choose as the index stage does, and measure the chosen point."""
    spec = task.spec
    hashes = json.loads((task.folder / "hashes.json").read_text(encoding="utf-8"))
    index = read_index(task.folder / "cores.faiss", sha256=hashes["index"], mapped=spec.is_mappable)
    refine = None
    if spec.refine != "none":
        path, sha256 = task.folder / "cores.refine", hashes["refine"]
        refine = open_refine(path, kind=spec.refine, dim=spec.dim, sha256=sha256)
    partition = Partition(index, refine)
    (tuning, measured), exact = task.queries, task.exact
    started = time.perf_counter()
    found = sweep_partition(partition, tuning, K, depths=rerank_depths(K, index.ntotal))
    costs = model_costs(partition, found, K)
    curve = [
        MeasuredPoint(
            point=point,
            cost=costs[point],
            intersection=intersection_at_k(ids, exact[:TUNING_QUERIES], K),
        )
        for point, (_, ids) in found.items()
    ]
    tune_s = time.perf_counter() - started

    def measure(points: list[MeasuredPoint]) -> dict[str, Any]:
        chosen = choose_point(points, task.target).point
        ids, figures = measure_search(
            lambda asked, k: search_partition(partition, asked, k, chosen)[1], measured
        )
        np.save(task.folder / "found.npy", ids)
        reached = intersection_at_k(ids, exact[TUNING_QUERIES:], K)
        return figures | {"point": _describe(chosen), "intersection": reached}

    alone = measure([one for one in curve if not one.point.rerank])
    told = {"tune_s": tune_s, "curve": [asdict(one) for one in prune_curve(curve)]}
    return measure(curve) | told | ({"codes_alone": alone} if refine else {})


def _describe(point: SearchPoint) -> str:
    return ",".join(f"{name}={value}" for name, value in asdict(point).items() if value)


def read_task(text: str) -> Task:
    """Read a task from JSON, and set its threads."""
    given = json.loads(text)
    task = Task(**given | {name: Path(given[name]) for name in ("data", "folder")})
    faiss.omp_set_num_threads(task.threads)
    return task


def run_step(step: str, task: Task, found: Callable[[Task], dict[str, Any]]) -> None:
    """Run one step and write its figures as JSON beside the index."""
    imported = peak_mib()
    figures = {"imported_mib": imported, "factory": task.factory} | found(task)
    text = json.dumps({"peak_mib": peak_mib()} | figures)
    (task.folder / f"{step}.json").write_text(text, encoding="utf-8")


BUILDERS = {"plain": build_plain, "cores": build_cores}
SEARCHERS = {"plain": search_plain, "cores": search_cores}


def main() -> None:
    """Run one step of one contender."""
    contender, step, text = sys.argv[1:]
    steps = {"build": BUILDERS, "search": SEARCHERS}[step]
    run_step(step, read_task(text), steps[contender])


if __name__ == "__main__":
    main()
