"""Refreshes on S3 through a proxy that injects faults, beside a server that dies now and then."""

import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fault_proxy import FaultProxy, Faults
from s3_server import BUCKET, S3Server, environment

from jobs.progress import open_progress
from jobs.sample import write_sample

REPOSITORY = Path(__file__).resolve().parent.parent
MOST_ATTEMPTS = 6
DOWN_S = 4.0
DEATH_AT_S = (8.0, 25.0)  # after the start of a refresh: importing and scanning take the first


def run_faults(folder: Path, *, rounds: int, seed: int, products: int) -> dict[str, Any]:
    """Refresh a store a round under faults, until it shows what one without faults does.

    Args:
        folder: A new one.
        rounds: How many stores; in every second one the server is killed once.
        seed: Of the catalog, the faults and the moments.
        products: In the catalog.
    """
    started, chance = time.monotonic(), random.Random(seed)
    write_sample(folder / "catalog", products=products, seed=seed, street_per_product=1)
    figures: Counter[str] = Counter()
    injected: Counter[str] = Counter()
    faults: list[str] = []
    (folder / "server").mkdir()
    with S3Server(folder / "server") as server, FaultProxy(server.port, seed=seed) as proxy:
        server.files.put(str(folder / "catalog") + os.sep, f"{BUCKET}/catalog/", recursive=True)
        _refresh(folder, proxy, "calm")
        expected = read_published(server, "calm")
        for number in range(rounds):
            store = f"rough-{number}"
            proxy.injected.clear()
            proxy.faults = Faults(
                slow_down=chance.uniform(0, 0.12),
                lost=chance.uniform(0, 0.04),
                cut=chance.uniform(0, 0.04),
                delay_s=chance.uniform(0, 0.04),
            )
            death = chance.uniform(*DEATH_AT_S) if number % 2 else None
            attempts, said = _refresh_until_done(folder, server, proxy, store, death, expected)
            proxy.faults = Faults()
            injected.update({n: c for n, c in proxy.injected.items() if n != "passed"})
            faults += said
            found = read_published(server, store)
            figures.update(attempts=attempts, server_deaths=death is not None, refreshes=1)
            figures["rows_lost"] += len(set(expected["ids"]) - set(found["ids"]))
            figures["duplicates"] += len(found["ids"]) - len(set(found["ids"]))
            figures["differences"] += found != expected
            open_progress().far("refreshed under faults", number + 1, rounds)
    names = ("refreshes", "attempts", "server_deaths", "rows_lost", "duplicates", "differences")
    return {
        **{name: figures[name] for name in names},
        "faults_injected": dict(sorted(injected.items())),
        "half_visible_releases": sum("half-visible" in fault for fault in faults),
        "faults": faults,
        "seconds": round(time.monotonic() - started, 1),
    }


def _refresh(folder: Path, proxy: FaultProxy, store: str) -> subprocess.CompletedProcess[str]:
    job = {
        "store": f"s3://{BUCKET}/{store}",
        "catalog": {"path": f"s3://{BUCKET}/catalog/catalog.parquet"},
        "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
        "embed": {"commit_interval_s": 1, "batch_size": 16, "rows_per_file": 16},
        "ray": {"object_store_mb": 128},
    }
    config = folder / f"{store}.yaml"
    config.write_text(json.dumps(job))
    return subprocess.run(
        [sys.executable, "-m", "jobs", "refresh", "-c", str(config), "--json", "-q"],
        cwd=REPOSITORY,
        env=os.environ | environment(proxy.endpoint),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def _refresh_until_done(
    folder: Path,
    server: S3Server,
    proxy: FaultProxy,
    store: str,
    death_at_s: float | None,
    expected: dict[str, Any],
) -> tuple[int, list[str]]:
    """Refresh again after each error, and while a fault has rejected rows; return what was odd."""
    odd: list[str] = []
    if death_at_s is not None:
        threading.Timer(death_at_s, _die, (server,)).start()
    for attempt in range(1, MOST_ATTEMPTS + 1):
        done = _refresh(folder, proxy, store)
        errors = [line for line in done.stderr.splitlines() if line.startswith("vitrine: error:")]
        if done.returncode and (len(errors) != 1 or "Traceback" in done.stderr):
            odd.append(f"{store}: {done.stderr[-400:]}")
        visible = done.returncode and _tables(server, f"{store}/releases")
        if visible and read_published(server, store) != expected:
            odd.append(f"{store}: half-visible after attempt {attempt}")
        if not done.returncode and json.loads(done.stdout)["rejected"] == 0:
            return attempt, odd
    return MOST_ATTEMPTS, [*odd, f"{store}: not done after {MOST_ATTEMPTS} attempts"]


def _die(server: S3Server) -> None:
    server.kill()
    time.sleep(DOWN_S)
    server.start()


def read_published(server: S3Server, store: str) -> dict[str, Any]:
    """Return what the newest release of a store serves: its counts and its ids."""
    releases = [row for table in _tables(server, f"{store}/releases") for row in table.to_pylist()]
    release = max(releases, key=lambda row: row["version"])
    address = f"{BUCKET}/{store}/indexes/{release['indexes']}"
    ids = pq.read_table(io.BytesIO(server.files.cat_file(f"{address}/ids.parquet")))
    counts = {name: release[name] for name in ("products", "rows", "vectors", "rejected")}
    return counts | {"ids": ids["vector_id"].to_pylist()}


def _tables(server: S3Server, folder: str) -> list[Any]:
    paths = [p for p in server.files.find(f"{BUCKET}/{folder}") if p.endswith(".parquet")]
    return [pq.read_table(io.BytesIO(server.files.cat_file(path))) for path in paths]
