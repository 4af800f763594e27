"""One run of a command that writes: its name, its stages, and its log.

The log is `runs/<run>/log.jsonl`, one JSON object an event with the run, the release it follows
and the stage; `VITRINE_LOG=json` prints the same lines on standard error as they come.
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import structlog

from jobs import metrics
from jobs.errors import StoreError
from jobs.progress import Progress
from jobs.storage import StorageError
from jobs.store import Release, Store, new_run_id


class _Sink(io.StringIO):
    """Keeps the log's lines, and prints them where the environment asks for it."""

    def write(self, text: str) -> int:
        """Take a line."""
        if os.environ.get("VITRINE_LOG") == "json":
            print(text, end="", file=sys.stderr, flush=True)
        return super().write(text)


class Run:
    """One run on its way.

    Attributes:
        run_id: Its name.
        store: What it writes to.
        parent: The newest release when it began.
        began_at: When it began, in seconds since 1970.
        stages: Of each stage: its name, when it began in seconds after the run did, its seconds,
            and rows a second. Of a step inside a stage, `began_s` is None.
        begun_again: Why its work was begun again, each time.
    """

    def __init__(
        self, command: str, store: Store, progress: Progress, *, writes: bool = True
    ) -> None:
        """Name the run and begin its log.

        Args:
            command: What runs: refresh, reindex, train, evaluate.
            store: What it writes to.
            progress: Shows what happens.
            writes: Whether it may write its log.
        """
        self.run_id, self._writes, self._shown = new_run_id(), writes, False
        self.began_at, self._began = time.time(), time.monotonic()
        self.command, self.store, self.progress = command, store, progress
        self.parent: Release | None = store.current_release()
        self.stages: list[dict[str, Any]] = []
        self.begun_again: list[str] = []
        self._is_counted = False
        self._sink = _Sink()
        self._log = structlog.wrap_logger(
            structlog.WriteLogger(self._sink),
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(sort_keys=True),
            ],
            wrapper_class=structlog.BoundLogger,
            run=self.run_id,
            command=command,
            parent=self.parent.version if self.parent else None,
            stage=None,
        )

    def log(self, event: str, **values: object) -> None:
        """Log one event; values are plain."""
        self._log.info(event, **values)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, int]]:
        """Time a stage, log it and show that it runs; the block may set its number of rows."""
        self.progress.stage(name)
        self._log = self._log.bind(stage=name)
        self.log("stage begins")
        self._show_stage(name)
        began_s, counted = self.elapsed_s(), {"rows": 0}
        try:
            with metrics.gauges_kept() if self._writes else contextlib.nullcontext():
                yield counted
        except BaseException as error:
            self.log("stage failed", error=f"{type(error).__name__}: {error}")
            self._log = self._log.bind(stage=None)
            seconds = self.elapsed_s() - began_s
            self.add_stage(f"{name} (failed)", seconds, counted["rows"], began_s)
            self._count_stage(name, seconds, counted["rows"])
            if not isinstance(error, StorageError):  # each write would wait for it again
                with contextlib.suppress(StoreError, OSError):  # the first error is what is told
                    self.write_log()
            raise
        seconds = self.elapsed_s() - began_s
        self.add_stage(name, seconds, counted["rows"], began_s)
        self._count_stage(name, seconds, counted["rows"])
        self.log("stage ends", seconds=round(seconds, 3), **counted)
        self._log = self._log.bind(stage=None)
        self.write_log()

    def add_stage(self, name: str, seconds: float, rows: int, began_s: float | None = None) -> None:
        """Record the seconds of a stage, which has a beginning, or of a step inside it."""
        rate = rows / seconds if rows and seconds > 0 else None
        stage = {"stage": name, "began_s": began_s, "seconds": seconds, "rows_per_s": rate}
        self.stages.append(stage)

    def elapsed_s(self) -> float:
        """Return the seconds since the run began."""
        return time.monotonic() - self._began

    def begin_again(self, reason: str) -> None:
        """Record that the run's work is begun again, and why."""
        self.begun_again.append(reason)
        self.log("begin again", reason=reason)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the run as failed if the block raises and did not count it itself."""
        try:
            yield
        except BaseException:
            self.count("failed")
            raise

    def count(self, outcome: metrics.Outcome) -> None:
        """Count the run as ended; once, whatever follows."""
        if self._writes and not self._is_counted:
            self._is_counted = True
            metrics.count_run(self.command, outcome)

    def _show_stage(self, name: str) -> None:
        """Show that a stage runs; once, what the run follows, and tell where to scrape."""
        if not self._writes:
            return
        if not self._shown and ray.is_initialized():
            self._shown = True
            metrics.begin_run()
            self.log("metrics", addresses=metrics.scrape_addresses())
            if self.parent is not None:  # its age shows in each run, those that fail, too
                metrics.show_release(self.parent)
        metrics.begin_stage(self.command, name)

    def _count_stage(self, name: str, seconds: float, rows: int) -> None:
        if self._writes:
            metrics.end_stage(self.command, name, seconds, rows)

    def new_generation(self, newest: int) -> int:
        """Return the number of the rows that this run will append.

        It is the time in microseconds, so that two jobs at once don't share it; but never less
        than another clock made of it.

        Args:
            newest: The newest in the table.
        """
        return max(newest + 1, time.time_ns() // 1000)

    def write_log(self) -> None:
        """Write what was logged so far to `runs/<run>/log.jsonl`."""
        if not self._writes:
            return
        self.store.write_text(self._sink.getvalue(), "runs", self.run_id, "log.jsonl")
