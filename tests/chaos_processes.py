"""Finds the processes of one refresh on this machine, Ray's own among them, and kills them.

Ray detaches some of its processes and renames others, but each of them keeps the name of its Ray
session, which ends with the driver's pid: in its command line, or in the log its output goes to.
"""

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
VICTIMS = ("driver", "actor", "task", "raylet", "head", "all")
ROLES = {"head": ("gcs", "raylet")}  # a victim that is several roles; any other is its own


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process; its start time tells it from a later one of the same pid."""

    pid: int
    started: str
    role: str
    title: str


def find_processes(driver: int) -> list[Process]:
    """List the live processes of a refresh: driver, Ray's head, its workers."""
    session = re.compile(rf"session_[\d_-]+_{driver}(?!\d)")
    found = (_read_process(int(entry.name), driver, session) for entry in _entries())
    return [process for process in found if process is not None]


def _entries() -> list[Path]:
    return [entry for entry in PROC.iterdir() if entry.name.isdigit()]


def _read_process(pid: int, driver: int, session: re.Pattern[str]) -> Process | None:
    """Return the process if it belongs to the session; None if not, or if it has just ended."""
    try:
        stat = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        title = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        state, session_id, started = stat[0], int(stat[3]), stat[19]
        ours = driver in (pid, session_id) or session.search(title)
        if state in "ZX" or not (ours or session.search(_outputs(pid))):
            return None
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # others' are not ours
        return None
    return Process(pid=pid, started=started, role=_role(pid, driver, title), title=title[:120])


def _outputs(pid: int) -> str:
    return " ".join(os.readlink(PROC / str(pid) / "fd" / number) for number in "12")


def _role(pid: int, driver: int, title: str) -> str:
    program = title.partition(" ")[0].rpartition("/")[2]
    if pid == driver:
        return "driver"
    if program in ("gcs_server", "raylet"):
        return {"gcs_server": "gcs"}.get(program, program)
    if title.startswith("ray::"):
        if "Embedder" in title or "MapWorker" in title:
            return "actor"
        if title.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent")):
            return "agent"
        return "idle" if title.startswith("ray::IDLE") else "task"
    return "service"


def pick_victims(processes: list[Process], victim: str) -> list[Process]:
    """Choose whom to kill; empty if no such process lives.

    Args:
        processes: Of one refresh.
        victim: One of `VICTIMS`.
    """
    if victim == "all":
        return processes
    roles = ROLES.get(victim, (victim,))
    found = [process for process in processes if process.role in roles]
    one_is_enough = victim in ("actor", "task")
    return found[:1] if one_is_enough else found


def kill(processes: list[Process]) -> None:
    """Send SIGKILL; a process that ended by itself is no error."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def wait_until_gone(driver: int, deadline_s: float) -> tuple[float, list[Process]]:
    """Wait for the processes of a refresh to end, Ray's two agents apart.

    Without a head these two try to report to it for about a minute, then end by themselves; they
    hold nothing of ours. The caller kills them with the rest.

    Returns:
        The seconds waited, and all who are left.
    """
    started = time.monotonic()
    while True:
        left, waited_s = find_processes(driver), time.monotonic() - started
        if all(process.role == "agent" for process in left) or waited_s > deadline_s:
            return waited_s, left
        time.sleep(0.1)
