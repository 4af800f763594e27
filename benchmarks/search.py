"""What a serving process does with a release's files: opens them, and answers under load.

    python benchmarks/search.py [--rows 200000] [--dim 256] [--factory PCAR128,IVF1024,...]
                                [--partitions 1] [--threads 1 2 4] [--seconds 5] [--json FILE]

Draws clustered vectors of low rank, builds an index of them and an ids.parquet with generated
rows, then opens both in a fresh process, with the pages of its files dropped from the system's
cache, and asks for products as `Searcher` does: search, re-rank, group, look up; no query is
encoded. The point is the cheapest that finds 95 % of the 10 nearest. FAISS has one thread a query.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from index_data import find_exact, make_synthetic, vectors_path
from index_probe import Float32Array, Int64Array, K
from index_tables import print_table

from indexing.build import add_vectors, train_index, write_index
from indexing.metrics import intersection_at_k
from indexing.refine import encode_refine, write_refine
from indexing.search import (
    SearchPoint,
    group_by_product,
    merge_topk,
    search_exact,
    search_partitions,
    search_pool,
)
from indexing.spec import IndexSpec
from indexing.tune import MeasuredPoint, choose_point, model_costs, rerank_depths, sweep_partition
from jobs.ids import KEYS
from jobs.ids_table import Ids
from jobs.index_files import (
    FieldFiles,
    IndexFile,
    PartitionFiles,
    in_partition,
    open_partitions,
    read_files,
)
from jobs.schemas import vector_id
from jobs.state import ROW_GROUP_ROWS
from jobs.storage import file_sha256
from jobs.store import Store

TRAIN_ROWS, TUNING_QUERIES, MAX_NPROBE, TARGET = 65_536, 500, 256, 0.95
DEPTH = 4 * K  # vectors that `Searcher` looks at for K products of one image each
BATCH, SHARES = 32, (1.0, 0.1, 0.01, 0.001)
RUN = "run"
Figures = dict[str, Any]


def build(folder: Path, task: argparse.Namespace) -> None:
    """Write vectors, index files and ids.parquet, and what serving has to know of them."""
    make_synthetic(folder, rows=task.rows, dim=task.dim, seed=0)
    vectors = np.load(vectors_path(folder), mmap_mode="r")
    names = np.array([vector_id(f"p{number}", 0) for number in range(task.rows)], np.int64)
    spec = IndexSpec.parse(task.factory, task.dim)
    chosen = np.random.default_rng(0).permutation(task.rows)[:TRAIN_ROWS]
    template = train_index(spec, np.array(vectors[np.sort(chosen)]), seed=0)
    (folder / "indexes" / RUN).mkdir(parents=True)
    parts = []
    for number in range(task.partitions):
        rows = np.flatnonzero(in_partition(names, number, task.partitions))
        parts.append(_write_partition(folder, number, spec, template, (names[rows], vectors[rows])))
    entry = _write_ids(folder, names)
    files = FieldFiles(spec=spec, template=parts[0].codes, partitions=tuple(parts))
    exact = names[find_exact(folder, task.rows)]
    np.save(folder / "exact.npy", exact)
    point = _choose(folder, files, exact)
    described = {"files": asdict(files), "ids": entry, "point": asdict(point.point)}
    (folder / "release.json").write_text(json.dumps(described | {"reached": point.intersection}))


def _write_partition(
    folder: Path,
    number: int,
    spec: IndexSpec,
    template: Any,
    block: tuple[Int64Array, Float32Array],
) -> PartitionFiles:
    def describe(name: str, write: Callable[[Path], str]) -> IndexFile:
        path = folder / "indexes" / RUN / name
        digest = write(path)
        return IndexFile(folder=RUN, file=name, sha256=digest, size_bytes=path.stat().st_size)

    ids, refine = block[0], None
    index = add_vectors(template, *block)
    if spec.refine != "none":
        parts = [[(ids, encode_refine(spec.refine, block[1]))]]
        refine = describe(
            f"{number}.refine",
            lambda path: write_refine(path, spec.refine, spec.dim, parts, len(ids)),
        )
    codes = describe(f"{number}.faiss", lambda path: write_index(index, path))
    return PartitionFiles(ntotal=len(ids), codes=codes, refine=refine)


def _write_ids(folder: Path, names: Int64Array) -> Figures:
    """Write an ids.parquet: `share` is evenly spread over 0 to 1, for filters of any share."""
    order, count = np.argsort(names), len(names)
    metadata = {
        "title": [f"a product of the synthetic catalog, number {n}" for n in order],
        "price": np.random.default_rng(1).random(count).round(2) * 100,
        "share": np.random.default_rng(2).permutation(count) / count,
    }
    struct = pa.StructArray.from_arrays([pa.array(c) for c in metadata.values()], list(metadata))
    keys = [names[order], [f"p{n}" for n in order], np.zeros(count, np.int32)]
    uris = [f"images/{n}.jpg" for n in order]
    arrays = [pa.array(k, f.type) for k, f in zip([*keys, uris], KEYS, strict=True)]
    path = folder / "indexes" / RUN / "ids.parquet"
    table = pa.table([*arrays, struct], schema=KEYS.append(pa.field("metadata", struct.type)))
    pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS)
    return {"folder": RUN, "file": path.name, "sha256": file_sha256(path), "rows": count}


def _choose(folder: Path, files: FieldFiles, exact: Int64Array) -> MeasuredPoint:
    """Sweep every partition, join, and take the cheapest point that meets the target."""
    partitions = open_partitions(Store(str(folder)), files)
    queries = np.load(folder / "queries.npy")[:TUNING_QUERIES]
    depths = rerank_depths(K, min(part.ntotal for part in files.partitions))
    swept = [
        sweep_partition(one, queries, K, depths=depths, max_nprobe=MAX_NPROBE) for one in partitions
    ]
    costs = [model_costs(one, swept[0], K) for one in partitions]
    points = []
    for point in swept[0]:
        ids = merge_topk([found[point] for found in swept], K)[1]
        reached = intersection_at_k(ids, exact[: len(queries)], K)
        cost = sum(of_part[point] for of_part in costs)
        points.append(MeasuredPoint(point=point, cost=cost, intersection=reached))
    return choose_point(points, TARGET)


class Opened:
    """What `Searcher` opens of a release, without its encoder."""

    def __init__(self, folder: Path) -> None:
        store, told = Store(str(folder)), json.loads((folder / "release.json").read_text())
        self.partitions = open_partitions(store, read_files(told["files"]))
        self.ids = Ids.open(store, told["ids"], folder / "cache")
        self.point = SearchPoint(**told["point"])
        several = len(self.partitions) > 1
        cpus = os.cpu_count() or 1
        self.pool = search_pool(min(len(self.partitions), cpus)) if several else None

    def answer(self, queries: Float32Array, only: Int64Array | None = None) -> list[Int64Array]:
        """Return the vector ids of each query's products, once their rows are looked up."""
        found = search_partitions(
            self.partitions, queries, DEPTH, self.point, only=only, pool=self.pool
        )
        answers = []
        for scores, ids in zip(*found, strict=True):
            there = ids >= 0
            products = self.ids.products(ids[there])
            best = group_by_product(scores[there], ids[there], products, K)
            answers.append(np.array([one for _, _, one in best], np.int64))
            self.ids.find(answers[-1])
        return answers


def serve(folder: Path, task: argparse.Namespace) -> Figures:
    """Open the release and put it under load; nothing of it was in this process before."""
    queries = np.load(folder / "queries.npy")[TUNING_QUERIES:]
    exact = np.load(folder / "exact.npy")[TUNING_QUERIES:]
    opening = []
    for kind in ("first: ids.parquet rewritten", "again, cold", "again, warm"):
        if kind != "again, warm":
            drop_pages(folder)
        before, started = resident(), time.perf_counter()
        opened = Opened(folder)
        seconds = time.perf_counter() - started
        after = resident()
        opening.append(
            {"open": kind, "seconds": seconds} | {n: after[n] - before[n] for n in after}
        )
        if kind != "again, warm":
            del opened
    ids = np.concatenate([opened.answer(queries[n : n + BATCH]) for n in range(0, 1000, BATCH)])
    loads = [
        load(opened, queries, batch, threads, task.seconds)
        for batch in (1, BATCH)
        for threads in task.threads
    ]
    return {
        "opening": opening,
        "resident_after_load": resident(),
        "intersection": intersection_at_k(ids, exact[: len(ids)], K),
        "loads": loads,
        "filters": [filtered(opened, folder, queries, share) for share in SHARES],
    }


def drop_pages(folder: Path) -> None:
    """Ask the system to forget the files' pages."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident() -> dict[str, float]:
    """Return this process's resident MiB: its own, and mapped pages that others may share."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"own_mib": int(kib["RssAnon"]) / 1024, "mapped_mib": int(kib["RssFile"]) / 1024}


def load(
    opened: Opened,
    queries: Float32Array,
    batch: int,
    threads: int,
    seconds: float,
    only: Int64Array | None = None,
) -> Figures:
    """Ask from so many threads for so long; each goes its own way through the queries."""
    stop = time.perf_counter() + seconds

    def ask(thread: int) -> list[float]:
        faiss.omp_set_num_threads(1)  # a new thread doesn't inherit it
        random, spent = np.random.default_rng(thread), []
        while (started := time.perf_counter()) < stop:
            opened.answer(queries[random.integers(len(queries), size=batch)], only)
            spent.append(time.perf_counter() - started)
        return spent

    with ThreadPoolExecutor(threads) as pool:
        spent = [one for found in pool.map(ask, range(threads)) for one in found]
    p50, p99 = np.percentile(np.array(spent) * 1e3, [50, 99]).tolist()
    rate = batch * len(spent) / seconds
    return {"batch": batch, "threads": threads, "per_s": rate, "p50_ms": p50, "p99_ms": p99}


def filtered(opened: Opened, folder: Path, queries: Float32Array, share: float) -> Figures:
    """Ask among a share of the rows, chosen by a predicate; compare with exact search."""
    started = time.perf_counter()
    only = opened.ids.select(pc.field("share") < share)
    select_ms = 1e3 * (time.perf_counter() - started)
    names = np.array([vector_id(f"p{n}", 0) for n in range(len(opened.ids))], np.int64)
    vectors = np.load(vectors_path(folder), mmap_mode="r")
    rows = np.flatnonzero(np.isin(names, only))
    exact = search_exact(queries[:200], [(names[rows], vectors[rows])], K)[1]
    found = opened.answer(queries[:200], only)
    reached = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, exact, strict=True)])
    figures = {"share": share, "select_ms": select_ms, "intersection": float(reached)}
    return figures | load(opened, queries, 1, 1, 2.0, only)


def print_figures(task: argparse.Namespace, figures: Figures) -> None:
    """Print the tables."""
    point, served = figures["release"]["point"], figures["release"]["files"]["partitions"]
    sizes = [
        sum(f["size_bytes"] for p in served if (f := p[k])) / 2**20 for k in ("codes", "refine")
    ]
    print(
        f"\n{task.rows:,} x {task.dim}, {task.factory}, {task.partitions} partition(s), {point}, "
        f"intersection@10 {figures['intersection']:.3f}; codes {sizes[0]:.0f} MiB, refine "
        f"{sizes[1]:.0f} MiB; {os.cpu_count()} CPUs\n"
    )
    print_table("open | seconds | own MiB | mapped MiB", [
        [one["open"], f"{one['seconds']:.2f}", f"{one['own_mib']:.0f}", f"{one['mapped_mib']:.0f}"]
        for one in figures["opening"]
    ])  # fmt: skip
    after = figures["resident_after_load"]
    print(
        f"\nresident after the load: {after['own_mib']:.0f} own, {after['mapped_mib']:.0f} mapped\n"
    )
    print_table("queries a call | threads | queries/s | p50 ms a call | p99 ms a call", [
        [str(one["batch"]), str(one["threads"]), f"{one['per_s']:.0f}", f"{one['p50_ms']:.2f}",
         f"{one['p99_ms']:.2f}"] for one in figures["loads"]
    ])  # fmt: skip
    print()
    print_table("filter passes | select ms | p50 ms | p99 ms | intersection@10", [
        [f"{one['share']:.1%}", f"{one['select_ms']:.1f}", f"{one['p50_ms']:.2f}",
         f"{one['p99_ms']:.2f}", f"{one['intersection']:.3f}"] for one in figures["filters"]
    ])  # fmt: skip


def main() -> None:
    """Build in one process, serve in another, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--factory", default="PCAR128,IVF1024,SQ8,Refine(SQ8)")
    parser.add_argument("--partitions", type=int, default=1, help="A power of two.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=5.0, help="Of each load.")
    parser.add_argument("--json", type=Path)
    task = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for step in (build, serve):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                figures = process.submit(step, folder, task).result()
        figures["release"] = json.loads((folder / "release.json").read_text())
    print_figures(task, figures)
    if task.json:
        task.json.write_text(json.dumps({"task": vars(task) | {"json": None}} | figures, indent=2))


if __name__ == "__main__":
    main()
