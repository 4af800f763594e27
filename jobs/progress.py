"""Shows on standard error what a job does: live on a terminal, plain lines in a pipe.

On a terminal one live line below the printed ones says what runs, for how long, and where it is
counted, how much is done, the rate, and the time left. In a pipe, in a notebook, and where TERM
is `dumb`, there are whole lines alone, without a control character.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

LINE_INTERVAL_S = 10.0
REFRESH_PER_S = 5
TOLD_S = 1.0  # a step that was quicker is printed without its seconds


class Counter:
    """A count on its way: how much is done, how quick, and how long it still takes."""

    def __init__(self, total: int, noun: str) -> None:
        """Begin at nothing.

        Args:
            total: What is counted up to.
            noun: Of what.
        """
        self.total, self._noun = total, noun
        self._first: tuple[float, int] | None = None

    def describe(self, done: int, *details: str) -> str:
        """Say how far it is.

        Args:
            done: Of the total.
            *details: What else there is to say.
        """
        now = time.monotonic()
        if self._first is None:  # what came before was start-up, and says nothing of the rate
            self._first = (now, done)
        began, before = self._first
        rate = (done - before) / max(now - began, 1e-9)
        parts = [f"{done:,} of {self.total:,} {self._noun}"]
        parts += [f"{rate:,.{0 if rate >= 10 else 1}f}/s"] if rate > 0 else []
        parts += details
        if rate > 0 and done < self.total:
            parts.append(f"{timedelta(seconds=round((self.total - done) / rate))} left")
        return ", ".join(parts)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True  # Rich would end the process, and take its standard output


class Progress:
    """What a command does, in stages, steps and counts; standard output stays free for results.

    A command holds it open as a context manager: the live line, and what `jobs.tasks.gather`
    shows of Ray's tasks, last until it is closed. Without that there are lines alone.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Choose the form.

        Args:
            quiet: Show nothing.
        """
        self._quiet = quiet
        # Rich would draw in a notebook what it can't redraw there; lines are the same everywhere.
        self._console = _Console(stderr=True, highlight=False, force_jupyter=False)
        self._bar: Bar | None = None
        self._step: tuple[str, float] | None = None
        self._words, self._began = "", time.monotonic()
        self._is_counting = False
        self._last_line = time.monotonic()
        self._token: Token[Progress | None] | None = None

    def __enter__(self) -> "Progress":
        """Let the live line begin with the next stage."""
        self._token = _active.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the live line away."""
        self._end_step()
        if self._bar is not None:
            with self._unless_gone():
                self._bar.stop()
            self._bar = None
        if self._token is not None:
            _active.reset(self._token)
            self._token = None

    @property
    def draws(self) -> bool:
        """Whether there is a live line: in a terminal, while it is open."""
        terminal = (
            sys.stderr.isatty() and self._console.is_interactive
        )  # FORCE_COLOR is no terminal
        return self._token is not None and terminal and not self._quiet

    def stage(self, name: str) -> None:
        """Say that a stage begins."""
        self._end_step()
        self._print(Text.assemble(("vitrine:", "dim"), f" {name}"))
        self.wait("")

    def wait(self, words: str) -> None:
        """Name on the live line what else takes a while; a pipe is told nothing."""
        self._words, self._began = words, time.monotonic()
        self._draw()

    def step(self, name: str) -> None:
        """Say that a step inside a stage begins; on a terminal it is printed when it ends."""
        self._end_step()
        if self.draws:
            self._words, self._began = name, time.monotonic()
            self._step = name, self._began
            self._draw()
        else:
            self._print(Text(f"  {name}"))

    def far(self, words: str, done: int, total: int) -> None:
        """Say how far the step under way is; in a pipe, now and then.

        Args:
            words: What is done now.
            done: How much of it.
            total: How much there is.
        """
        self._tell(words, f"{done:,} of {total:,}", done, total)

    @contextmanager
    def count(self, total: int, noun: str = "rows") -> Iterator["Count"]:
        """Count up to a total; the block calls `Count.update`."""
        self._last_line, self._is_counting = time.monotonic(), True
        self._draw("", 0, total)
        try:
            yield Count(self, Counter(total, noun))
        finally:
            self._is_counting = False
            self._draw()

    def show_count(self, told: str, done: int, total: int) -> None:
        """Show how far a count is; see `Count.update`."""
        self._tell(self._words, told, done, total, last=done >= total)

    @contextmanager
    def tasks(self, total: int) -> Iterator[Callable[[int], None]]:
        """Show on the live line how many of some tasks are done, unless rows are counted there.

        Args:
            total: How many there are; one, and as few as none, are not counted.
        """
        counter = Counter(total, "tasks")
        shown = self.draws and not self._is_counting and total > 1
        try:
            yield lambda done: self._draw(counter.describe(done), done, total) if shown else None
        finally:
            if shown:
                self._draw()

    def _tell(self, words: str, far: str, done: int, total: int, *, last: bool = False) -> None:
        if self.draws:
            self._words = words
            self._draw(far, done, total)
            return
        now = time.monotonic()
        if last or now - self._last_line > LINE_INTERVAL_S:
            self._last_line = now
            self._print(Text("  " + ", ".join(part for part in (words, far) if part)))

    def _end_step(self) -> None:
        if self._step is not None:
            name, began = self._step
            seconds = time.monotonic() - began
            took = f" {timedelta(seconds=round(seconds))}" if seconds >= TOLD_S else ""
            self._step, self._words = None, ""
            self._print(Text.assemble(f"  {name}", (took, "dim")))

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """Be quiet from now on where standard error can't be written: the job goes on."""
        try:
            yield
        except OSError:
            self._quiet = True

    def _print(self, line: Text) -> None:
        if not self._quiet:
            with self._unless_gone():
                self._console.print(line, soft_wrap=True)

    def _draw(self, far: str = "", done: int = 0, total: int | None = None) -> None:
        """Show the live line, if there is one; without a total its bar only says that it lives."""
        if self.draws:
            with self._unless_gone():
                self._draw_bar(far, done, total)

    def _draw_bar(self, far: str, done: int, total: int | None) -> None:
        if self._bar is None:
            self._bar = _make_bar(self._console)
            self._bar.start()
        bar, words, began = self._bar, self._words, self._began
        task = next(iter(bar.tasks), None)
        if task is not None and total is not None and task.total is not None:
            bar.update(
                task.id, description=words, total=total, completed=done, far=far, began=began
            )
            return
        if task is not None:  # Rich takes a total from no task that has one
            bar.remove_task(task.id)
        bar.add_task(words, total=total, completed=done, far=far, began=began)


class Count:
    """What `Progress.count` counts."""

    def __init__(self, progress: Progress, counter: Counter) -> None:
        """Begin at nothing.

        Args:
            progress: Shows it.
            counter: Knows its rate.
        """
        self._progress, self._counter = progress, counter

    def update(self, done: int, rejected: int = 0, *, note: str = "") -> None:
        """Show how far the count is.

        Args:
            done: Of the total, rejected ones included.
            rejected: Of them.
            note: What else to show.
        """
        details = ([f"{rejected:,} rejected"] if rejected else []) + ([note] if note else [])
        told = self._counter.describe(done, *details)
        self._progress.show_count(told, done, self._counter.total)


class _Elapsed(ProgressColumn):
    """How long a stage or step lasts, whatever was counted in it."""

    def render(self, task: Task) -> Text:
        """Return hours, minutes, seconds."""
        seconds = int(time.monotonic() - task.fields["began"])
        return Text(str(timedelta(seconds=seconds)), style="progress.elapsed")


_active: ContextVar[Progress | None] = ContextVar("progress", default=None)


def _make_bar(console: Console) -> Bar:
    return Bar(
        TextColumn(" {task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[far]}", markup=False, table_column=Column(no_wrap=True)),
        _Elapsed(),
        console=console,
        refresh_per_second=REFRESH_PER_S,
        transient=True,
        redirect_stdout=False,  # where results go, perhaps into a pipe
    )


def open_progress() -> Progress:
    """Return the progress of the command under way; one that shows nothing outside of a command."""
    return _active.get() or _NOBODY


_NOBODY = Progress(quiet=True)
