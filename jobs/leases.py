"""Says which jobs use a store at the moment: `runs/<run>/lease.json`, renewed while one runs.

A lease is no lock: two jobs may run at once. It tells `gc` what is being written. A job that was
killed leaves its lease behind, which expires.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from jobs.errors import StoreError
from jobs.files import StoredFile, list_files
from jobs.storage import StorageError, storage_errors
from jobs.store import Release, Store

FILE = "lease.json"
RENEW_S = 30.0
EXPIRE_S = 600.0
SILENT_S = 180.0  # renewals that fail for longer are told
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """One job on its way.

    Attributes:
        started_at: Seconds since 1970, UTC; so is `renewed_at`.
        parent: The version of the release that it started from, or goes back to.
    """

    run: str
    host: str
    pid: int
    started_at: float
    renewed_at: float
    parent: int | None


@contextmanager
def hold_lease(store: Store, run_id: str, parent: Release | None) -> Iterator[Lease]:
    """Keep a lease while the block runs; it is gone afterwards, however the block ends.

    Args:
        store: What the job writes to.
        run_id: The run's name.
        parent: The release that the job needs until it ends.

    Raises:
        StoreError: The lease can't be written.
    """
    now = time.time()
    lease = Lease(
        run=run_id,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=now,
        renewed_at=now,
        parent=parent.version if parent else None,
    )
    _write(store, lease)
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, lease, done), daemon=True)
    renewing.start()
    gone = False
    try:
        yield lease
    except StorageError:
        gone = True  # removing it would wait once more; it expires by itself
        raise
    finally:
        done.set()
        if not gone:
            renewing.join()  # a renewal under way would bring the lease back
            _remove(store, run_id)


def live_leases(store: Store) -> list[Lease]:
    """List the leases that have not expired, oldest first.

    Raises:
        StoreError: The store can't be read.
    """
    found = [_read(store, file) for file in lease_files(store)]
    now = time.time()
    live = [lease for lease in found if lease and now - lease.renewed_at < EXPIRE_S]
    return sorted(live, key=lambda lease: lease.started_at)


def lease_files(store: Store) -> list[StoredFile]:
    """List the files of all leases, expired ones too."""
    files = list_files(store, "runs")
    return [file for file in files if file.path.endswith(f"/{FILE}")]


def _write(store: Store, lease: Lease) -> None:
    store.write_text(json.dumps(asdict(lease), indent=2), "runs", lease.run, FILE)


def _read(store: Store, file: StoredFile) -> Lease | None:
    """Return a lease; None if it was removed meanwhile."""
    run = file.path.split("/")[1]
    try:
        return Lease(**store.read_json(*file.path.split("/")))
    except StorageError:
        raise
    except (StoreError, TypeError):
        # Half of one that is being written, or of another version of Vitrine: alive if it is young.
        if not store.filesystem().exists(store.uri(file.path)):
            return None
    began = min(file.modified_at, run_time(run) or file.modified_at)
    return Lease(
        run=run,
        host="",
        pid=0,
        started_at=began,
        renewed_at=file.modified_at,
        parent=None,
    )


def run_time(run: str) -> float | None:
    """Return when a run began, in seconds since 1970; None if it is no run's name."""
    with suppress(ValueError):
        begun = datetime.strptime(run.partition("-")[0], "%Y%m%dT%H%M%S")
        return begun.replace(tzinfo=UTC).timestamp()
    return None


def _renew(store: Store, lease: Lease, done: threading.Event) -> None:
    renewed, told = time.monotonic(), False
    while not done.wait(RENEW_S):
        try:
            _write(store, Lease(**(asdict(lease) | {"renewed_at": time.time()})))
            renewed, told = time.monotonic(), False
        except StoreError as error:
            silent_s = time.monotonic() - renewed
            if silent_s > SILENT_S and not told:
                told = True
                _log.warning("vitrine: lease not renewed for %.0f s: %s", silent_s, error)


def _remove(store: Store, run_id: str) -> None:
    target = store.uri("runs", run_id, FILE)
    try:
        with storage_errors(target, "removed"), suppress(FileNotFoundError):
            store.filesystem().rm_file(target)
    except StoreError as error:  # it expires by itself; what the job did must stand
        _log.warning("vitrine: %s", error)
