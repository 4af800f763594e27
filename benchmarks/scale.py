"""What the index stage costs for 100 million and a billion products, from measured growth.

    python benchmarks/scale.py [benchmarks/results/index/growth.json] [--core-hour-usd 0.05]

Reads what `benchmarks/index.py growth --contenders stage --json FILE` kept. Adding, exact search,
sampling and joining are taken per vector, from the fit's slope; training by its count of
operations (`IndexSpec.training_gflops`) at the speed that the largest run had. What finding a
vector's list costs among so many is timed here, over random centroids, and takes the place of
what it cost in the growth runs. Each index is what `IndexSpec.for_catalog` chooses at that size,
at the same bytes a vector. Prints Markdown; takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from index_tables import fit, print_table

from indexing.spec import HNSW_LINKS, IndexSpec
from indexing.train import HNSW_EF_CONSTRUCTION, HNSW_EF_SEARCH
from jobs.config import IndexConfig
from jobs.index import MIN_TRAIN_ROWS, TRAIN_ROWS_A_LIST
from jobs.index_files import count_partitions

GROWTH = Path(__file__).resolve().parent / "results" / "index" / "growth.json"
SIZES = (1_000_000, 100_000_000, 1_000_000_000)
DIM, BYTES = 256, 72  # as the growth runs had them
CORES = 64  # of one machine
TIMED_ROWS = 20_000
PER_VECTOR = {
    "join": "join the live rows",
    "exact": "exact search",
    "sample": "read the sample",
    "add": "add and merge",
}
Figures = dict[str, Any]


def read_rates(growth: Figures, cores: int) -> dict[str, float]:
    """Return core-seconds a million vectors of each step, and training's GFLOP/s a core."""
    runs, rows = growth["results"]["stage"], growth["rows"]
    steps = [run["steps_s"] | {"join": run["apart_s"]["join"]} for run in runs]
    rates = {
        name: fit(rows, [one[name] for one in steps])["per_million"] * cores for name in PER_VECTOR
    }
    spec = IndexSpec.parse(runs[-1]["factory"], DIM)
    train_rows = max(MIN_TRAIN_ROWS, TRAIN_ROWS_A_LIST * spec.nlist)
    rates["lists"] = time_lists(spec)
    rates["gflops"] = spec.training_gflops(train_rows) / steps[-1]["train"] / cores
    return rates


def time_lists(spec: IndexSpec) -> float:
    """Return the seconds that one core takes to find the lists of a million vectors."""
    faiss.omp_set_num_threads(1)
    random = np.random.default_rng(0)
    centroids = random.normal(size=(spec.nlist, spec.inner_dim)).astype(np.float32)
    vectors = random.normal(size=(TIMED_ROWS, spec.inner_dim)).astype(np.float32)
    template = faiss.index_factory(spec.inner_dim, _lists(spec), faiss.METRIC_INNER_PRODUCT)
    quantizer = faiss.downcast_index(faiss.extract_index_ivf(template).quantizer)
    if isinstance(quantizer, faiss.IndexHNSW):
        quantizer.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
        quantizer.hnsw.efSearch = HNSW_EF_SEARCH
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    quantizer.add(centroids)
    faiss.omp_set_num_threads(1)
    started = time.perf_counter()
    quantizer.search(vectors, 1)
    return (time.perf_counter() - started) / TIMED_ROWS * 1e6


def _lists(spec: IndexSpec) -> str:
    return f"IVF{spec.nlist}" + (f"_HNSW{HNSW_LINKS}" if spec.coarse == "hnsw" else "") + ",Flat"


def scale(rows: int, rates: dict[str, float], table_bytes: float) -> Figures:
    """Return the index, core-hours by stage, and bytes, of so many vectors."""
    partitions = count_partitions(rows, IndexConfig().max_partition_vectors)
    spec, _ = IndexSpec.for_catalog(
        rows, DIM, memory_budget_bytes=rows * BYTES, partitions=partitions
    )
    train_rows = max(MIN_TRAIN_ROWS, TRAIN_ROWS_A_LIST * spec.nlist)
    hours = {name: rates[name] * rows / 1e6 / 3600 for name in PER_VECTOR}
    hours["add"] += (time_lists(spec) - rates["lists"]) * rows / 1e6 / 3600
    hours["train"] = spec.training_gflops(train_rows) / rates["gflops"] / 3600
    return {
        "factory": spec.factory,
        "partitions": partitions,
        "hours": hours,
        "table_gib": table_bytes * rows / 2**30,
        "codes_gib": spec.memory_bytes(rows, partitions=partitions) / 2**30,
        "refine_gib": rows * spec.refine_bytes_per_vector / 2**30,
        "train_gib": spec.training_bytes(train_rows) / 2**30,
    }


def print_scale(sizes: tuple[int, ...], found: list[Figures], usd: float) -> None:
    """Print a row a stage, a column a size."""
    head = " | ".join(f"{size:,}" for size in sizes)
    names = PER_VECTOR | {"train": "train, on one machine"}
    rows = [["index", *(f"`{one['factory']}`" for one in found)]]
    rows += [["files", *(str(one["partitions"]) for one in found)]]
    rows += [
        [f"{words}, core-hours", *(f"{one['hours'][name]:,.2f}" for one in found)]
        for name, words in names.items()
    ]
    every = [sum(one["hours"].values()) for one in found]
    alone = [one["hours"]["train"] for one in found]
    rows += [
        ["all of it, core-hours", *(f"{hours:,.1f}" for hours in every)],
        [f"dollars at {usd} a core-hour", *(f"{hours * usd:,.2f}" for hours in every)],
        [
            f"hours on 4 machines of {CORES} cores",
            *(
                f"{one / CORES + (hours - one) / (4 * CORES):,.2f}"
                for one, hours in zip(alone, every, strict=True)
            ),
        ],
    ]
    for key, words in (
        ("train_gib", "memory of the training task"),
        ("table_gib", "embeddings table"),
        ("codes_gib", "codes, in serving's memory"),
        ("refine_gib", "refine store, on disk"),
    ):
        rows.append([f"{words}, GiB", *(f"{one[key]:,.1f}" for one in found)])
    print_table(f"a field | {head}", rows)


def main() -> None:
    """Print rates and what follows from them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("growth", type=Path, nargs="?", default=GROWTH)
    parser.add_argument("--core-hour-usd", type=float, default=0.05)
    arguments = parser.parse_args()
    growth = json.loads(arguments.growth.read_text(encoding="utf-8"))
    rates = read_rates(growth, growth["cores"])
    for name, rate in rates.items():
        told = "GFLOP/s a core while training" if name == "gflops" else "core-seconds a million"
        print(f"{name}: {rate:.3g} {told}")
    print()
    runs = growth["results"]["stage"]
    table_bytes = float(
        np.mean([run["table_bytes"] / n for run, n in zip(runs, growth["rows"], strict=True)])
    )
    found = [scale(size, rates, table_bytes) for size in SIZES]
    print_scale(SIZES, found, arguments.core_hour_usd)


if __name__ == "__main__":
    main()
