"""Shows on standard error what a job does: a bar on a terminal, plain lines in a pipe."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_INTERVAL_S = 10.0


class Progress:
    """Stages and counted rows; standard output stays free for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Choose the form.

        Args:
            quiet: Show nothing.
        """
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._bar: Bar | None = None
        self._last_line = time.monotonic()
        self._total = 0
        self._noun = "rows"
        self._first: tuple[float, int] | None = None

    def stage(self, name: str) -> None:
        """Say that a stage begins."""
        if not self._quiet:
            self._console.print(f"[dim]vitrine:[/dim] {name}")

    def step(self, name: str) -> None:
        """Say that a step inside a stage begins."""
        if not self._quiet:
            self._console.print(f"  {name}")

    def count(self, total: int, noun: str = "rows") -> "Progress":
        """Begin to count up to a total; use as a context manager."""
        self._total, self._noun = total, noun
        self._last_line, self._first = time.monotonic(), None
        if not self._quiet and sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task(noun, total=total)
        return self

    def __enter__(self) -> "Progress":
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, done: int, rejected: int = 0, *, note: str = "") -> None:
        """Show how far the count is.

        Args:
            done: Of the total, rejected ones included.
            rejected: Of them.
            note: What else to show.
        """
        now = time.monotonic()
        if self._first is None:  # what came before was start-up, and says nothing of the rate
            self._first = (now, done)
        began, before = self._first
        rate = (done - before) / max(now - began, 1e-9)
        words = f"{self._noun}, {rate:,.{0 if rate >= 10 else 1}f}/s" if rate else self._noun
        words += f", {rejected:,} rejected" if rejected else ""
        words += f", {note}" if note else ""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=words)
        elif not self._quiet and (done >= self._total or now - self._last_line > LINE_INTERVAL_S):
            self._last_line = now
            left_s = (self._total - done) / rate if rate else 0.0
            left = f", {left_s:,.0f} s left" if rate and done < self._total else ""
            self._console.print(f"  {done:,} of {self._total:,} {words}{left}")
