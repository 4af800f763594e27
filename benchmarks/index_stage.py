"""Runs the index stage itself, on a local Ray, over a store that is made from plain vectors.

    python benchmarks/index_stage.py build|search '{"data": FOLDER, ...}'

The embeddings table gets one row a vector, with no catalog and no encoder behind it. What is timed
is `jobs.index.build_index`; making the store, starting Ray and joining the live rows are told
apart. Memory is that of every process of Ray's, read from the operating system while it runs.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from index_contenders import Task, read_task, run_step
from index_probe import (
    Float32Array,
    Int64Array,
    Stopwatch,
    draw_rows,
    measure_search,
    peak_mib,
)
from processes import Processes

from encoders.fusion import FusionSpec
from indexing.search import search_partitions
from jobs.buckets import count_buckets, split_by_bucket
from jobs.cluster import ray_session
from jobs.config import IndexConfig, RayConfig
from jobs.diff import Plan
from jobs.embed_write import write_data_file
from jobs.files import list_files
from jobs.index import IndexJob, build_index
from jobs.index_files import open_partitions, read_files, read_point
from jobs.index_memory import add_bytes, merge_bytes, search_bytes, train_bytes
from jobs.items import PLAN_DTYPE
from jobs.live import Live, join_live
from jobs.schemas import EMBEDDINGS, UPSERT
from jobs.space import VectorField
from jobs.store import Store

ENCODER = "e" * 64
FOLDER = "bench"
RAY = "ray::"  # how the names of its workers begin
SAMPLE_ROWS = 1_000
SPREAD = 0x9E3779B97F4A7C15  # odd, so that multiplying by it is one to one modulo 2**63
# What plain FAISS does too, waiting included; the other steps search and measure.
BUILDING = ("sample", "wait", "train", "add")


def id_rows(rows: Int64Array) -> Int64Array:
    """Return vector ids of row numbers, spread over all 63 bits as hashes are."""
    return _multiply(rows, SPREAD)


def row_ids(ids: Int64Array) -> Int64Array:
    """Return the row numbers of vector ids; -1 stays."""
    return np.where(ids < 0, ids, _multiply(ids, pow(SPREAD, -1, 2**63)))


def _multiply(numbers: Int64Array, factor: int) -> Int64Array:
    product = numbers.astype(np.uint64) * np.uint64(factor) & np.uint64(2**63 - 1)
    return product.astype(np.int64)


def make_store(task: Task) -> Store:
    """Write the vectors as rows of an embeddings table, a data file a block."""
    store, files = Store(str(task.folder / "store")), []
    store.embeddings()
    for rows, vectors in task.blocks():
        files.append(write_data_file(store, _make_table(id_rows(rows), vectors), 1))
    store.commit_embeddings(files)
    return store


def _make_table(ids: Int64Array, vectors: Float32Array) -> pa.Table:
    count, dim = vectors.shape
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * dim)
    columns = {
        "product_id": pa.array([f"p{number}" for number in ids.tolist()]),
        "image_number": pa.array(np.zeros(count, np.int32)),
        "vector_id": pa.array(ids),
        "generation": pa.array(np.ones(count, np.int64)),
        "operation": pa.array([UPSERT] * count),
        "image_hash": pa.array(ids),
        "text_hash": pa.array(ids),
        "etag_hash": pa.array(np.zeros(count, np.int64)),
        "encoder": pa.array([ENCODER] * count),
        "image_embedding": pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1))),
    }
    return pa.table([columns.get(f.name, pa.nulls(count, f.type)) for f in EMBEDDINGS], EMBEDDINGS)


def find_live(store: Store, count: int) -> Live:
    """Join the table with a catalog that has every row of it."""
    rows, bucket_rows = np.zeros(count, PLAN_DTYPE), RayConfig().bucket_rows
    ids = np.sort(id_rows(np.arange(count, dtype=np.int64)))
    for name in ("vector_id", "image_hash", "text_hash", "product"):
        rows[name] = ids
    parts = split_by_bucket(rows, count_buckets(count, bucket_rows))
    plan = Plan(groups=[range(1)], parts=[[ray.put(part)] for part in parts], rows=count)
    version = store.embeddings().version()
    return join_live(plan, store, version, ENCODER, bucket_rows=bucket_rows, parent=None)


class Steps:
    """Seconds by the step that the index stage says it is at."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", time.perf_counter()

    def __call__(self, words: str) -> None:
        """Begin a step: 'image: add and merge' is 'add'."""
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = words.partition(": ")[2].partition(" ")[0], now


def build(task: Task) -> dict[str, Any]:
    """Build one field's index with the task's factory string; return the figures."""
    apart, processes, steps = Stopwatch(), Processes(), Steps()
    with apart.step("store"):
        store = make_store(task)
    before = time.perf_counter()
    with processes.watch(), ray_session(RayConfig()):
        apart.seconds["ray"] = time.perf_counter() - before
        with apart.step("join"):
            live = find_live(store, task.rows)
        built = build_index(_make_job(task, store, live), steps)
        steps("")
        asked = _asked_mib(task, live)
    (task.folder / "entry.json").write_text(json.dumps(asdict(built.index)), encoding="utf-8")
    return {
        "seconds": {name: steps.seconds[name] for name in BUILDING if name in steps.seconds},
        "tune_s": sum(s for name, s in steps.seconds.items() if name not in BUILDING),
        "apart_s": apart.seconds,
        "steps_s": steps.seconds,
        "table_bytes": sum(file.size_bytes for file in list_files(store, "embeddings")),
        "index_bytes": built.index.size_bytes,
        "driver_peak_mib": peak_mib(),
        "worker_peaks_mib": {n: mib for n, mib in processes.own_mib.items() if n.startswith(RAY)},
        "asked_mib": asked,
        "peak_mib": max(one.mib for one in processes.peaks.values() if one.name.startswith(RAY)),
        "told": {"intersection": built.index.measured.intersection_at_10},
    }


def _train_rows(task: Task) -> int:
    return min(task.train_rows, task.rows * 4 // 5)


def _make_job(task: Task, store: Store, live: Live) -> IndexJob:
    dim = draw_rows(task.vectors, 1, 1, 0).shape[1]
    return IndexJob(
        store=store,
        field=VectorField(name="image", dim=dim, fusion=FusionSpec()),
        live=live,
        config=IndexConfig(
            factory=task.factory,
            train_rows=_train_rows(task),
            target_intersection=task.target,
            seed=task.seed,
        ),
        folder=FOLDER,
        sample_rows=SAMPLE_ROWS,
        base=None,
        retrain=(),
        ids={},
        labelled=None,
    )


def _asked_mib(task: Task, live: Live) -> dict[str, float]:
    """Return what the tasks that build ask Ray for, by the names of their processes."""
    spec, rows = task.spec, live.rows
    asked = {
        "ray::train": train_bytes(spec, _train_rows(task)),
        "ray::add": add_bytes(spec, max(rows.group_rows), rows.file_rows, 1, 1),
        "ray::merge_codes": merge_bytes(spec, task.rows),
        "ray::_sweep": search_bytes(spec, task.rows),
    }
    return {name: taken / 2**20 for name, taken in asked.items()}


def search(task: Task) -> dict[str, Any]:
    """Search as a reader of the manifest does, at the operating point that it gives."""
    entry = json.loads((task.folder / "entry.json").read_text(encoding="utf-8"))
    partitions = open_partitions(Store(str(task.folder / "store")), read_files(entry))
    point = read_point(entry)
    _, measured = task.queries
    ids, figures = measure_search(
        lambda asked, k: search_partitions(partitions, asked, k, point)[1], measured
    )
    np.save(task.folder / "found.npy", row_ids(ids))
    told = {name: value for name, value in entry["point"].items() if value}
    return figures | {"point": ",".join(f"{name}={value}" for name, value in told.items())}


def main() -> None:
    """Run one step."""
    step, text = sys.argv[1:]
    run_step(step, read_task(text), {"build": build, "search": search}[step])


if __name__ == "__main__":
    main()
