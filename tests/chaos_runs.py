"""Runs one refresh as a real process, kills a part of it, and looks what the store shows since."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from chaos_processes import find_processes, kill, pick_victims, wait_until_gone
from deltalake import DeltaTable
from typer.testing import CliRunner

from jobs.cli import app
from jobs.search import Searcher
from jobs.store import Store

REPOSITORY = Path(__file__).resolve().parent.parent
HANG_S = 45.0  # a driver that has not ended so long after a kill hangs
ORPHAN_S = 20.0
POLL_S = 0.1
SERVE_S = 1.0
TOP_K = 10

Answers = list[list[tuple[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Query:
    """What a shopper asks: a photo or words."""

    photo: bytes | None
    words: str | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a release serves.

    Attributes:
        vector_ids: Of ids.parquet, sorted; one twice is a duplicate.
        answers: (product, score) of the best products, a list a query.
    """

    version: int
    rows: int
    rejected: int
    products: frozenset[str]
    vector_ids: tuple[int, ...]
    answers: Answers


@dataclass(kw_only=True)
class Attempt:
    """One refresh and what came of it. Times are seconds since its start.

    Attributes:
        victim: What was killed; None if nothing was.
        stage: What the refresh last said that it does when the kill came.
        ended_s: From the kill to the driver's end.
        orphans_s: From the driver's end to the end of the last process of the run.
        orphans: Processes that had to be killed, so many seconds after the driver's end.
        agents: Ray's own agents that outlived their head.
        lost_rows: Rows in data files that no commit names: they are embedded again.
        oldest_lost_s: Age of the oldest such file when the driver was gone.
        faults: What should not have happened.
        spans: First and last time that a role of process was seen.
        stages: When each stage began; the start is the first.
    """

    victim: str | None
    exit_code: int = 0
    killed_at_s: float = 0.0
    stage: str = ""
    ended_s: float = 0.0
    orphans_s: float = 0.0
    orphans: list[str] = field(default_factory=list)
    agents: int = 0
    lost_rows: int = 0
    oldest_lost_s: float = 0.0
    seconds: float = 0.0
    last_words: str = ""
    faults: list[str] = field(default_factory=list)
    spans: dict[str, list[float]] = field(default_factory=dict)
    stages: list[float] = field(default_factory=lambda: [0.0])

    @property
    def survived(self) -> bool:
        """Whether the refresh published, killed or not."""
        return self.exit_code == 0


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: so many seconds into a stage, or as soon as a later one begins.

    Attributes:
        stage: How many stages have begun: a busy machine stretches time, not their order.
    """

    victim: str
    stage: int
    offset_s: float


def run_refresh(config: Path, store: Store, moment: Moment | None = None) -> Attempt:
    """Run `vitrine refresh`; kill -9 a part of it at a moment, and wait for the rest to end.

    Args:
        config: The job.
        store: Its store.
        moment: When to kill what, later if the victim does not live yet; None kills nothing.
    """
    attempt, started = Attempt(victim=None), time.monotonic()
    log = config.parent / "refresh.log"
    known = uncommitted_files(store)
    with log.open("w") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs", "refresh", "--config", str(config)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with serving(store, attempt):
            killed_s = _follow(driver, attempt, moment, log)
            _wait(driver, attempt)
    except BaseException:  # a test's time is up: nobody else would end what was started here
        kill(find_processes(driver.pid))
        raise
    attempt.ended_s = time.monotonic() - started - killed_s if attempt.victim else 0.0
    attempt.orphans_s, left = wait_until_gone(driver.pid, ORPHAN_S)
    attempt.agents = sum(process.role == "agent" for process in left)
    attempt.orphans = [f"{one.role}: {one.title}" for one in left if one.role != "agent"]
    kill(left)
    attempt.seconds = time.monotonic() - started
    _read_log(attempt, log)
    _count_lost(attempt, store, known)
    return attempt


def _follow(
    driver: subprocess.Popen[bytes], attempt: Attempt, moment: Moment | None, log: Path
) -> float:
    """Watch the processes until the kill or the end; return when the kill came."""
    started, begun = time.monotonic(), attempt.stages
    while driver.poll() is None:
        now, stages = time.monotonic() - started, _stages(log)
        begun += [now] * (len(stages) + 1 - len(begun))
        processes = find_processes(driver.pid)
        for role in {process.role for process in processes}:
            attempt.spans.setdefault(role, [now, now])[1] = now
        if moment is not None and _is_due(moment, begun, now):
            chosen = pick_victims(processes, moment.victim)
            if chosen:
                kill(chosen)
                attempt.victim, attempt.killed_at_s = moment.victim, now
                attempt.stage = stages[-1] if stages else "start"
                return now
        time.sleep(POLL_S)
    return 0.0


def _is_due(moment: Moment, begun: list[float], now: float) -> bool:
    stage = len(begun) - 1
    return stage > moment.stage or (stage == moment.stage and now - begun[stage] >= moment.offset_s)


def _stages(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line.removeprefix("vitrine: ") for line in lines if line.startswith("vitrine: ")]


def _wait(driver: subprocess.Popen[bytes], attempt: Attempt) -> None:
    try:
        attempt.exit_code = driver.wait(HANG_S)
    except subprocess.TimeoutExpired:
        attempt.faults.append(f"the driver hung for {HANG_S:.0f} s")
        driver.kill()
        attempt.exit_code = driver.wait()


def _read_log(attempt: Attempt, log: Path) -> None:
    """Hold the driver to its promise: done, killed, or one line and exit 1."""
    text = log.read_text(errors="replace")
    attempt.last_words = "\n".join(text.splitlines()[-3:])
    was_killed = attempt.victim in ("driver", "all")
    if "Traceback" in text:
        attempt.faults.append(f"a traceback: {text[-2000:]}")
    elif attempt.exit_code == 1 and "vitrine: error: " not in text.splitlines()[-1]:
        attempt.faults.append(f"exit 1 without a word: {attempt.last_words}")
    elif attempt.exit_code not in ((-9,) if was_killed else (0, 1)):
        attempt.faults.append(f"exit {attempt.exit_code}: {attempt.last_words}")
    if attempt.orphans:
        attempt.faults.append(f"left over after {ORPHAN_S:.0f} s: {attempt.orphans}")


def uncommitted_files(store: Store) -> set[str]:
    """List the data files of the embeddings table that its newest version doesn't name."""
    root = Path(store.uri("embeddings"))
    files = {str(path.relative_to(root)) for path in root.rglob("*.parquet")}
    return files - set(_actions(store)["path"].to_pylist()) if files else files


def _actions(store: Store) -> pa.Table:
    root = store.uri("embeddings")
    if not DeltaTable.is_deltatable(root):
        return pa.table(
            {"path": pa.array([], pa.string()), "num_records": pa.array([], pa.int64())}
        )
    return pa.table(DeltaTable(root).get_add_actions(flatten=True))


def appended_rows(store: Store) -> int:
    """Count the rows of the embeddings table, superseded ones too."""
    return int(sum(_actions(store)["num_records"].to_pylist()))


def _count_lost(attempt: Attempt, store: Store, known: set[str]) -> None:
    root, now = Path(store.uri("embeddings")), time.time()
    for name in uncommitted_files(store) - known:
        path = root / name
        age_s = now - path.stat().st_mtime - attempt.orphans_s - attempt.ended_s
        attempt.oldest_lost_s = max(attempt.oldest_lost_s, age_s)
        try:
            attempt.lost_rows += pq.ParquetFile(path).metadata.num_rows
        except pa.ArrowInvalid:  # killed while it was written: no footer, no row to count
            continue


@contextmanager
def serving(store: Store, attempt: Attempt) -> Iterator[None]:
    """Open the newest release again and again meanwhile; what can't be served is a fault."""
    stop, first = threading.Event(), store.current_release()

    def serve() -> None:
        last = first.version if first else 0
        while not stop.wait(SERVE_S):
            newest = store.current_release()
            version = newest.version if newest else 0
            if version < last:
                attempt.faults.append(f"release {last} was served, then {version}")
            if newest and version > last:
                Searcher(store, newest.indexes, encoder=newest.encoder)
            last = max(last, version)

    with ThreadPoolExecutor(max_workers=1) as pool:
        served = pool.submit(serve)
        try:
            yield
        finally:
            stop.set()
            if (error := served.exception()) is not None:
                attempt.faults.append(f"half-visible: {error!r}")


def read_outcome(config: Path, store: Store, queries: list[Query]) -> Outcome | None:
    """Open the newest release as serving does, and ask it; None where there is none.

    Raises:
        JobError: A release is named that is not whole.
    """
    shown = CliRunner().invoke(app, ["status", "--config", str(config), "--json"])
    releases: list[dict[str, Any]] = json.loads(shown.stdout)["releases"]
    if not releases:
        return None
    release = store.release(releases[0]["version"])
    searcher = Searcher(store, release.indexes, encoder=release.encoder)
    path = Path(store.uri("indexes", release.indexes, "ids.parquet"))
    ids = pq.read_table(path, columns=["vector_id", "product_id"])
    return Outcome(
        version=release.version,
        rows=release.rows,
        rejected=release.rejected,
        products=frozenset(ids["product_id"].to_pylist()),
        vector_ids=tuple(sorted(ids["vector_id"].to_pylist())),
        answers=[
            [(one.product_id, one.score) for one in _ask(searcher, query, name)]
            for query in queries
            for name in searcher.fields
        ],
    )


def _ask(searcher: Searcher, query: Query, name: str) -> list[Any]:
    return searcher.search(image=query.photo, text=query.words, k=TOP_K, field=name)
