"""Builds and searches an autofaiss index; benchmarks/index.py runs it in its own environment.

    python benchmarks/autofaiss_run.py build|search '{"data": FOLDER, "folder": FOLDER, ...}'

autofaiss 2.18.0 needs numpy < 2 and crashes on FAISS 1.15.1, so nothing of Vitrine is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from autofaiss import build_index
from index_probe import TUNING_QUERIES, Stopwatch, measure_search, peak_mib


def build(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Build within the task's budgets; autofaiss chooses the index and tunes it by itself.

    Raises:
        SystemExit: autofaiss gave up, which it says with `None, None`.
    """
    watch, imported = Stopwatch(), peak_mib()
    with watch.step("all"):
        index, told = build_index(
            str(Path(task["data"]) / "vectors"),
            index_path=str(folder / "knn.index"),
            index_infos_path=str(folder / "knn.json"),
            max_index_memory_usage=f"{task['index_bytes']}B",
            current_memory_available=f"{task['memory_bytes']}B",
            metric_type="ip",
            nb_cores=task["threads"],
            verbose=30,
        )
    if index is None or told is None:
        raise SystemExit("autofaiss built nothing")
    return {
        "factory": told["index_key"],
        "point": told["index_param"],
        "seconds": watch.seconds,
        "peak_mib": peak_mib(),
        "imported_mib": imported,
        "index_bytes": (folder / "knn.index").stat().st_size,
    }


def search(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Search as autofaiss tuned it: the parameters lie in the index file."""
    faiss.omp_set_num_threads(task["threads"])
    index = faiss.read_index(str(folder / "knn.index"))
    queries = np.load(Path(task["data"]) / "queries.npy")[TUNING_QUERIES:]
    ids, figures = measure_search(lambda asked, k: index.search(asked, k)[1], queries)
    np.save(folder / "found.npy", ids)
    return figures | {"peak_mib": peak_mib()}


def main() -> None:
    """Run one step and write its figures as JSON beside the index: autofaiss prints much."""
    step, task = sys.argv[1], json.loads(sys.argv[2])
    folder = Path(task["folder"])
    found = {"build": build, "search": search}[step](task, folder)
    (folder / f"{step}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
