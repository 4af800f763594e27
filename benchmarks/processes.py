"""What processes take while they run, read from the operating system: memory and CPU time.

Read from outside, so that Ray's processes, which nobody waits for, are seen like any other. A
process that lives for less than the time between two looks may be missed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

WATCH_S = 0.1
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most memory of one process.

    Attributes:
        name: What it called itself last; of a Ray worker the task that it ran.
        mib: Its most resident MiB, with shared pages (VmHWM).
    """

    name: str
    mib: float


class Processes:
    """All processes below one.

    Attributes:
        own_mib: The most MiB of a process's own pages (RssAnon) under each name that it had.
        shared_mib: The most MiB more in `/dev/shm` than before: what Ray's object store has had
            pages for. It gives none back, so that all is seen that was ever written at once.
        peaks: The most MiB of each process, by its number.
        together_mib: The most MiB of all processes' own pages at once; pages that a forked
            process shares with its parent count twice.
        first_seen: When a process first had a name, in seconds since the epoch.
        watching_s: CPU seconds that looking took.
    """

    def __init__(self, interval_s: float = WATCH_S) -> None:
        """Look so often, in seconds."""
        self.own_mib: dict[str, float] = {}
        self.shared_mib = 0.0
        self.peaks: dict[int, Peak] = {}
        self.together_mib = 0.0
        self.first_seen: dict[str, float] = {}
        self.watching_s = 0.0
        self._cpu_s: dict[int, float] = {}
        self._times: list[tuple[float, float]] = []
        self._interval_s = interval_s
        self._over = threading.Event()

    @contextmanager
    def watch(self, root: int | None = None) -> Iterator[None]:
        """Look while the block runs.

        Args:
            root: The number of a process that is looked at with all below it; None: this one's
                children and all below them.
        """
        watcher = threading.Thread(target=self._watch, args=(root,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._over.set()
            watcher.join()

    def cpu_between(self, start: float, stop: float) -> float:
        """Return the CPU seconds of all processes between two times, in seconds since the epoch."""
        if not self._times:
            return 0.0
        times, spent = zip(*self._times, strict=True)
        return float(np.diff(np.interp([start, stop], times, spent))[0])

    def _watch(self, root: int | None) -> None:
        before_mib = _read_shared_mib()
        while not self._over.wait(self._interval_s):
            found = _descendants(root or os.getpid())
            if root is not None:
                found[root] = _read_cpu(root)
            now, together = time.time(), 0.0
            for number, cpu_s in found.items():
                self._cpu_s[number] = max(cpu_s, self._cpu_s.get(number, 0.0))
                together += self._look(number, now)
            self.together_mib = max(self.together_mib, together)
            self.shared_mib = max(self.shared_mib, _read_shared_mib() - before_mib)
            self._times.append((now, sum(self._cpu_s.values())))
            self.watching_s = time.thread_time()

    def _look(self, number: int, now: float) -> float:
        """Note one process; return the MiB of its own pages."""
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            status = Path(f"/proc/{number}/status").read_text(encoding="ascii", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return 0.0  # it ended between two looks
        name = _name(words)
        kib = {
            line.split()[0]: int(line.split()[1]) for line in status.splitlines() if "kB" in line
        }
        own_mib, highest_mib = (kib.get(key, 0) / 1024 for key in ("RssAnon:", "VmHWM:"))
        self.first_seen.setdefault(name, now)
        self.own_mib[name] = max(self.own_mib.get(name, 0.0), own_mib)
        before = self.peaks.get(number)
        kept = before.name if before and name in ("", "ray::IDLE") else name
        self.peaks[number] = Peak(name=kept, mib=max(highest_mib, before.mib if before else 0.0))
        return own_mib


def _name(words: list[bytes]) -> str:
    """Name a process by its title, or by its program and the module or script that it runs."""
    texts = [word.decode(errors="replace") for word in words if word]
    if not texts or texts[0].startswith("ray::"):
        return texts[0] if texts else ""
    program = Path(texts[0]).name
    scripts = [Path(text).name for text in texts[1:] if text.endswith(".py")]
    modules = [after for flag, after in pairwise(texts) if flag == "-m"]
    return " ".join([program, *(scripts or modules)[:1]])


def _read_shared_mib() -> float:
    shared = os.statvfs("/dev/shm")
    return (shared.f_blocks - shared.f_bfree) * shared.f_frsize / 2**20


def _read_cpu(number: int) -> float:
    try:
        stat = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0  # it ended between two looks
    return _parse(stat)[1]


def _parse(stat: str) -> tuple[int, float]:
    """Return the parent's number and the CPU seconds that a line of /proc tells."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[1]), TICK_S * (int(fields[11]) + int(fields[12]))


def _descendants(root: int) -> dict[int, float]:
    """Return the CPU seconds of every process below one, by its number."""
    found: dict[int, tuple[int, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended between two looks
            found[int(entry.name)] = _parse(stat)
    below: dict[int, float] = {}
    waiting = [root]
    while waiting:
        parent = waiting.pop()
        children = {number: cpu_s for number, (own, cpu_s) in found.items() if own == parent}
        below |= children
        waiting += children
    return below
