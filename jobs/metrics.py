"""What a run tells Prometheus while it goes, through Ray.

The run's own process records everything: a worker's counts and seconds come back with each data
file that it wrote. So nothing is counted twice where Ray does a task again, and no task pays for
it. Ray's agent on that process's machine exports the values, and keeps counters after the process
has ended; docs/metrics.md is the page for who reads them.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Literal

import ray
from ray.util.metrics import Counter, Gauge

from jobs.nodes import live_nodes
from jobs.store import Release

_log = logging.getLogger(__name__)

KEEP_S = 1.0  # the shortest interval at which Ray's processes report
STEPS = ("fetch", "decode", "tokenize", "embed", "write")
Outcome = Literal["published", "candidate", "gate", "idle", "failed"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What one metric is.

    Attributes:
        name: Without Ray's prefix; its last word is the unit where it isn't what is counted.
        help: What it counts or shows, for who meets it in Prometheus.
        labels: Of few values each, whatever the catalog's size.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


def _counter(name: str, help_: str, *labels: str) -> Metric:
    return Metric(name=f"vitrine_{name}", kind="counter", help=help_, labels=labels)


def _gauge(name: str, help_: str, *labels: str) -> Metric:
    return Metric(name=f"vitrine_{name}", kind="gauge", help=help_, labels=labels)


EMBEDDED = _counter("rows_embedded", "Rows that were embedded and written")
REJECTED = _counter("rows_rejected", "Rows that were written as rejects", "reason")
IMAGES_EMBEDDED = _counter("images_embedded", "Images that went through the encoder")
IMAGES_REUSED = _counter("images_reused", "Rows that took the vector of a byte-identical image")
FETCHED_BYTES = _counter("images_fetched_bytes", "Bytes of images that were fetched")
WRITTEN_BYTES = _counter("written_bytes", "Bytes of written data files of the embeddings table")
WRITTEN_FILES = _counter("written_files", "Data files that were written")
STEP_SECONDS = _counter("embed_step_seconds", "Seconds of the workers in a step", "step")
BACKLOG = _gauge("backlog_rows", "Rows that this run has yet to embed or reject")
STAGE_RUNNING = _gauge("stage_running", "1 while the stage runs", "command", "stage")
STAGE_SECONDS = _counter("stage_seconds", "Seconds of ended stages", "command", "stage")
STAGE_ROWS = _counter("stage_rows", "Rows of ended stages", "command", "stage")
RUNS = _counter("runs", "Runs that ended", "command", "outcome")
GATE_FAILURES = _gauge("gate_failures", "Bars of the gate that this run missed")
INTERSECTION = _gauge("index_intersection_at_10", "Share of exact search's ten found", "field")
RELEASE = _gauge("release_version", "Version of the newest release")
RELEASE_TIME = _gauge("release_created_timestamp_seconds", "When the newest release was made")
RELEASE_ROWS = _gauge("release_rows", "Catalog rows of the newest release", "state")

METRICS = tuple(value for value in tuple(globals().values()) if isinstance(value, Metric))
"""Every metric of ours."""


_kept: dict[tuple[Metric, frozenset[tuple[str, str]]], float] = {}
_lock = threading.Lock()  # else an old value could be told after a newer one


def begin_run() -> None:
    """Forget what an earlier run of this process showed."""
    with _lock:
        _kept.clear()


@contextmanager
def gauges_kept() -> Iterator[None]:
    """Tell Ray every gauge again while the block runs.

    A gauge that was not set since the last report isn't in the next one, and the agent drops it
    two reports later: a stage of half an hour would be seen for seconds.
    """
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _keep(over: threading.Event) -> None:
    while not over.wait(KEEP_S):
        with _lock:
            for (metric, labels), value in _kept.items():
                _tell(metric, value, dict(labels))


def scrape_addresses() -> list[str]:
    """Return where Prometheus finds the metrics: `host:port` of each machine that exports them."""
    nodes = (node for node in live_nodes() if node["MetricsExportPort"] > 0)
    return sorted(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes)


def count_file(row: Mapping[str, Any]) -> None:
    """Count what a worker told of a data file that it wrote.

    Args:
        row: See `jobs.embed_write.write_rows`.
    """
    _record(EMBEDDED, row["rows"] - row["rejected"])
    for reason, rows in zip(row["reason_names"], row["reason_counts"], strict=True):
        _record(REJECTED, rows, reason=reason)
    _record(IMAGES_EMBEDDED, row["images_embedded"])
    _record(IMAGES_REUSED, row["images_reused"])
    _record(FETCHED_BYTES, row["image_bytes"])
    _record(WRITTEN_BYTES, row["size_bytes"])
    _record(WRITTEN_FILES, 1)
    for step in STEPS:
        _record(STEP_SECONDS, row[f"{step}_s"], step=step)


def show_backlog(rows: int) -> None:
    """Show how many rows are yet to be embedded or rejected."""
    _record(BACKLOG, rows)


def begin_stage(command: str, stage: str) -> None:
    """Show that a stage runs."""
    _record(STAGE_RUNNING, 1, command=command, stage=stage)


def end_stage(command: str, stage: str, seconds: float, rows: int) -> None:
    """Show that a stage is over, and count its seconds and rows; a failed one has them, too."""
    _record(STAGE_RUNNING, 0, command=command, stage=stage)
    _record(STAGE_SECONDS, seconds, command=command, stage=stage)
    _record(STAGE_ROWS, rows, command=command, stage=stage)


def show_release(release: Release) -> None:
    """Show the newest release."""
    _record(RELEASE, release.version)
    _record(RELEASE_TIME, datetime.fromisoformat(release.created_at).timestamp())
    _record(RELEASE_ROWS, release.vectors, state="live")
    _record(RELEASE_ROWS, release.rejected, state="rejected")


def show_gate(failures: int, intersections: Mapping[str, float]) -> None:
    """Show what was measured of what a run built.

    Args:
        failures: Bars of the gate that were missed.
        intersections: Intersection@10 with exact search, by field.
    """
    _record(GATE_FAILURES, failures)
    for field, value in intersections.items():
        _record(INTERSECTION, value, field=field)


def count_run(command: str, outcome: Outcome) -> None:
    """Count a run that ended."""
    _record(RUNS, 1, command=command, outcome=outcome)


def _record(metric: Metric, value: float, **labels: str) -> None:
    """Add to a counter, or set a gauge and keep it."""
    with _lock:
        _tell(metric, value, labels)
        if metric.kind == "gauge":
            _kept[metric, frozenset(labels.items())] = value


def _tell(metric: Metric, value: float, labels: dict[str, str]) -> None:
    """Tell Ray, if it runs; what goes wrong never fails the run."""
    if not ray.is_initialized():
        return
    try:
        if metric.kind == "gauge":
            _instrument(metric).set(value, labels)
        elif value > 0:
            _instrument(metric).inc(value, labels)
    except (ValueError, TypeError, RuntimeError) as error:
        _warn(f"{metric.exported}: {error}")


@cache
def _instrument(metric: Metric) -> Any:  # noqa: ANN401
    kind = Gauge if metric.kind == "gauge" else Counter
    return kind(metric.name, metric.help, metric.labels)


@cache
def _warn(words: str) -> None:
    """Say it once in a process."""
    _log.warning("vitrine: metrics are incomplete: %s", words)
