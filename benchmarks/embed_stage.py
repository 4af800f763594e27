"""Runs `vitrine refresh` over the photos, and reads what its embedding stage took.

The stage is timed by the run's own log. It starts with actors that import torch and load the
encoder: that is told apart, up to the moment when the first of them is ready.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from processes import Processes

REPOSITORY = Path(__file__).resolve().parent.parent
WATCH_S = 0.25  # looking costs milliseconds of CPU, which the stage would have had
STARTING = "__init__"
Figures = dict[str, Any]


def run_stage(task: Figures, folder: Path) -> Figures:
    """Refresh a store that doesn't exist yet; return the figures of its embedding stage.

    Args:
        task: What all contenders are told.
        folder: Where the store lies, empty.

    Raises:
        SystemExit: The refresh failed.
    """
    config, processes = folder / "job.yaml", Processes(WATCH_S)
    config.write_text(json.dumps(make_job(task, folder)), encoding="utf-8")
    command = [sys.executable, "-m", "jobs", "refresh", "-c", str(config), "--json", "-q"]
    # Ray would else count all cores of the machine. It needs two slots.
    cores = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": max(2, task["threads"])})}
    with (
        subprocess.Popen(
            command, cwd=REPOSITORY, env=os.environ | cores, stdout=subprocess.PIPE, text=True
        ) as driver,
        processes.watch(driver.pid),
    ):
        summary = driver.stdout.read() if driver.stdout else ""
    if driver.returncode:
        raise SystemExit(f"the refresh failed with status {driver.returncode}")
    return read_figures(Path(json.loads(summary)["report"]).parent, processes)


def make_job(task: Figures, folder: Path) -> Figures:
    """Return the configuration: image vectors alone, and no bar that random weights would miss."""
    return {
        "store": str(folder / "store"),
        "catalog": {"path": task["catalog"]},
        "encoder": {"checkpoint": task["checkpoint"]},
        "embed": {
            "fields": ["image"],
            "batch_size": task["batch"],
            "precision": task["precision"],
        },
        "gate": {"min_intersection_at_10": 0, "min_self_retrieval": 0, "min_overlap_at_10": 0},
    }


def read_figures(run: Path, processes: Processes) -> Figures:
    """Read the report and the log of a run, beside what its processes were seen to take."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    begun, ended = read_times(run / "log.jsonl", "embed")
    ready = first_ready(processes, begun)
    stages = {one["stage"]: one["seconds"] for one in report["stages"]}
    return {
        "images": report["images_embedded"],
        "reused": report["images_reused"],
        "seconds": ended - ready,
        "startup_s": ready - begun,
        "cpu_s": processes.cpu_between(ready, ended),
        "startup_cpu_s": processes.cpu_between(begun, ready),
        "worker_s": {
            name.removeprefix("embed: "): spent
            for name, spent in stages.items()
            if name.startswith("embed: ")
        },
        "stages_s": {name: s for name, s in stages.items() if not name.startswith("embed: ")},
        "object_store_mib": processes.shared_mib,
        **describe(processes),
    }


def read_times(log: Path, stage: str) -> tuple[float, float]:
    """Return when a stage began and ended, in seconds since the epoch."""
    times = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["stage"] == stage:
            times[event["event"]] = datetime.fromisoformat(event["timestamp"]).timestamp()
    return times["stage begins"], times["stage ends"]


def first_ready(processes: Processes, begun: float) -> float:
    """Return when an embedding actor was first seen to be ready, in seconds since the epoch.

    Raises:
        SystemExit: None was seen.
    """
    times = [
        seen
        for name, seen in processes.first_seen.items()
        if "Embedder" in name and STARTING not in name and seen >= begun
    ]
    if not times:
        raise SystemExit(
            f"no embedding actor was seen to be ready, only {sorted(processes.first_seen)}"
        )
    return min(times)


def describe(processes: Processes) -> Figures:
    """Return the peaks of all processes, the largest first."""
    peaks = sorted(processes.peaks.values(), key=lambda one: one.mib, reverse=True)
    return {
        "peaks_mib": [[one.name, round(one.mib, 1)] for one in peaks],
        "together_mib": processes.together_mib,
        "watching_s": processes.watching_s,
    }
