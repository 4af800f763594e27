"""What a serving process does with a release's files: opens them, and answers under load.

    python benchmarks/search.py [--rows 200000] [--dim 256] [--factory PCAR128,IVF1024,...]
        [--partitions 1] [--nprobe 32] [--rerank 100] [--threads 1 2 4] [--seconds 5] [--json FILE]

Draws clustered vectors of low rank, builds an index of them and an ids.parquet with generated
rows, then opens both in a fresh process, with the pages of its files dropped from the system's
cache, and asks for products as `Searcher` does: search, re-rank, group, look up; no query is
encoded. FAISS has one thread a query.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
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
from index_data import make_synthetic, vectors_path
from index_probe import Float32Array, Int64Array, K
from index_tables import print_table

from indexing import search as searching
from indexing.build import add_vectors, train_index, write_index
from indexing.metrics import intersection_at_k
from indexing.refine import encode_refine, write_refine
from indexing.spec import IndexSpec
from jobs import index_files
from jobs.ids import KEYS
from jobs.ids_table import Ids
from jobs.schemas import vector_id
from jobs.state import ROW_GROUP_ROWS
from jobs.storage import file_sha256
from jobs.store import Store

TRAIN_ROWS = 65_536
DEPTH = 4 * K  # vectors that `Searcher` looks at for K products of one image each
BATCH, SHARES, ASKED, RUN = 32, (1.0, 0.1, 0.01, 0.001), 1000, "run"
DEFAULTS = {
    "rows": 200_000, "dim": 256, "factory": "PCAR128,IVF1024,SQ8,Refine(SQ8)", "partitions": 1,
    "nprobe": 32, "rerank": 100, "seconds": 5.0,
}  # fmt: skip
Figures = dict[str, Any]
Block = tuple[Int64Array, Float32Array]
Only = Int64Array | None  # the vector ids that may be found


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
        rows = np.flatnonzero(index_files.in_partition(names, number, task.partitions))
        block = names[rows], vectors[rows]
        parts.append(_write_partition(folder, f"{number}", spec, template, block))
    entry = _write_ids(folder, names)
    files = index_files.FieldFiles(spec=spec, template=parts[0].codes, partitions=tuple(parts))
    (folder / "release.json").write_text(json.dumps({"files": asdict(files), "ids": entry}))


def _write_partition(
    folder: Path, name: str, spec: IndexSpec, template: faiss.Index, block: Block
) -> index_files.PartitionFiles:
    def upload(kind: str, sha256: str) -> index_files.IndexFile:
        return index_files.upload_file(Store(str(folder)), path, sha256, RUN, f"{name}.{kind}")

    path, ids, refine = folder / "written", block[0], None
    codes = upload("faiss", write_index(add_vectors(template, *block), path))
    if spec.refine != "none":
        parts = [[(ids, encode_refine(spec.refine, block[1]))]]
        refine = upload("refine", write_refine(path, spec.refine, spec.dim, parts, len(ids)))
    return index_files.PartitionFiles(ntotal=len(ids), codes=codes, refine=refine)


def _write_ids(folder: Path, names: Int64Array) -> Figures:
    """Write an ids.parquet; its column `share` is evenly spread over 0 to 1."""
    order = np.argsort(names)
    titles = [f"a product of the synthetic catalog, number {number}" for number in order]
    shares = np.random.default_rng(2).permutation(len(names)) / len(names)
    struct = pa.StructArray.from_arrays([pa.array(titles), pa.array(shares)], ["title", "share"])
    keys = [names[order], [f"p{n}" for n in order], np.zeros(len(names), np.int32), titles]
    arrays = [pa.array(key, field.type) for key, field in zip(keys, KEYS, strict=True)]
    path = folder / "indexes" / RUN / "ids.parquet"
    table = pa.table([*arrays, struct], schema=KEYS.append(pa.field("metadata", struct.type)))
    pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS)
    return {"folder": RUN, "file": path.name, "sha256": file_sha256(path), "rows": len(names)}


class Opened:
    """What `Searcher` opens of a release, without its encoder."""

    def __init__(self, folder: Path, point: searching.SearchPoint) -> None:
        store, told = Store(str(folder)), json.loads((folder / "release.json").read_text())
        self.partitions = index_files.open_partitions(store, index_files.read_files(told["files"]))
        self.ids = Ids.open(store, told["ids"], folder / "cache")
        self.point = point
        threads = min(len(self.partitions), os.cpu_count() or 1)
        self.pool = searching.search_pool(threads) if threads > 1 else None

    def answer(self, queries: Float32Array, only: Only) -> list[Int64Array]:
        """Return the vector ids of each query's products, once their rows are looked up."""
        found = searching.search_partitions(
            self.partitions, queries, DEPTH, self.point, only=only, pool=self.pool
        )
        answers = []
        for scores, ids in zip(*found, strict=True):
            there = ids >= 0
            products = self.ids.products(ids[there])
            best = searching.group_by_product(scores[there], ids[there], products, K)
            answers.append(np.array([one for _, _, one in best], np.int64))
            self.ids.find(answers[-1])
        return answers


def serve(folder: Path, task: argparse.Namespace) -> Figures:
    """Open the release and put it under load; nothing of it was in this process before."""
    queries = np.load(folder / "queries.npy")
    point, opening = searching.SearchPoint(nprobe=task.nprobe, rerank=task.rerank), []
    for kind in ("cold, ids.parquet rewritten", "cold"):
        drop_pages(folder)
        opening.append(open_timed(folder, point, kind)[1])
    opened, warm = open_timed(folder, point, "warm")
    pairs = [(batch, threads) for batch in (1, BATCH) for threads in task.threads]
    loads = [load(opened, queries, (*pair, task.seconds), None) for pair in pairs]
    return {
        "opening": [*opening, warm],
        "resident_after_load": resident(),
        "loads": loads,
        "filters": [filtered(opened, folder, queries, share) for share in (None, *SHARES)],
    }


def open_timed(folder: Path, point: searching.SearchPoint, kind: str) -> tuple[Opened, Figures]:
    """Open the release; say how long it took, and what this process grew by."""
    before, started = resident(), time.perf_counter()
    opened = Opened(folder, point)
    figures: Figures = {"open": kind, "seconds": time.perf_counter() - started}
    return opened, figures | {name: mib - before[name] for name, mib in resident().items()}


def drop_pages(folder: Path) -> None:
    """Ask the system to forget the files' pages; those that are mapped stay."""
    for path in (one for one in folder.rglob("*") if one.is_file()):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident() -> dict[str, float]:
    """Return this process's resident MiB: its own, and mapped pages that others may share."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"own_mib": int(kib["RssAnon"]) / 1024, "mapped_mib": int(kib["RssFile"]) / 1024}


def load(
    opened: Opened, queries: Float32Array, asked: tuple[int, int, float], only: Only
) -> Figures:
    """Ask batches from so many threads for so long; each goes its own way through the queries."""
    batch, threads, seconds = asked
    began = time.perf_counter()
    stop = began + seconds

    def ask(thread: int) -> list[float]:
        faiss.omp_set_num_threads(1)  # a new thread doesn't inherit it
        random, spent = np.random.default_rng(thread), []
        while (started := time.perf_counter()) < stop:
            opened.answer(queries[random.integers(len(queries), size=batch)], only)
            spent.append(time.perf_counter() - started)
        return spent

    with ThreadPoolExecutor(threads) as pool:
        spent = [one for found in pool.map(ask, range(threads)) for one in found]
    elapsed = time.perf_counter() - began
    p50, p99 = np.percentile(np.array(spent) * 1e3, [50, 99]).tolist()
    rate = batch * len(spent) / elapsed
    return {"batch": batch, "threads": threads, "per_s": rate, "p50_ms": p50, "p99_ms": p99}


def filtered(opened: Opened, folder: Path, queries: Float32Array, share: float | None) -> Figures:
    """Ask among a share of the rows, chosen by a predicate; compare with exact search."""
    started = time.perf_counter()
    only = None if share is None else opened.ids.select(pc.field("share") < share)
    select_ms = 1e3 * (time.perf_counter() - started)
    names = np.array([vector_id(f"p{n}", 0) for n in range(len(opened.ids))], np.int64)
    vectors = np.load(vectors_path(folder), mmap_mode="r")
    rows = np.arange(len(names)) if only is None else np.flatnonzero(np.isin(names, only))
    exact = searching.search_exact(queries[:ASKED], [(names[rows], vectors[rows])], K)[1]
    found = np.stack(opened.answer(queries[:ASKED], only))
    figures = load(opened, queries, (1, 1, 3.0), only) | {"passing": len(rows)}
    figures |= {"select_ms": select_ms, "intersection": intersection_at_k(found, exact, K)}
    return figures | {"share": "no filter" if share is None else share}


def print_figures(task: argparse.Namespace, figures: Figures) -> None:
    """Print the tables."""
    print(
        f"\n{task.rows:,} x {task.dim}, {task.factory}, partitions {task.partitions}, nprobe "
        f"{task.nprobe}, rerank {task.rerank}; {os.cpu_count()} CPUs\n"
    )
    _print("open | seconds | own_mib | mapped_mib", figures["opening"])
    own, mapped = figures["resident_after_load"].values()
    print(f"\nresident after the load: {own:.0f} MiB of its own, {mapped:.0f} MiB mapped\n")
    _print("batch | threads | per_s | p50_ms | p99_ms", figures["loads"])
    _print("share | passing | select_ms | p50_ms | p99_ms | intersection", figures["filters"])


def _print(head: str, rows: list[Figures]) -> None:
    shown = [[one[name] for name in head.split(" | ")] for one in rows]
    print_table(head, [[v if isinstance(v, str) else f"{v:,.4g}" for v in row] for row in shown])
    print()


def main() -> None:
    """Build in one process, serve in another, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    task = parser.parse_args()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # A process for each: what building leaves in memory is not serving's.
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process:
            process.submit(build, folder, task).result()
            figures = process.submit(serve, folder, task).result()
    print_figures(task, figures)
    if task.json:
        task.json.write_text(json.dumps({"task": vars(task) | {"json": None}} | figures, indent=2))


if __name__ == "__main__":
    main()
