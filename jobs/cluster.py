"""Starts Ray the way Vitrine needs it, watches its head, and passes our errors through it."""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import exceptions
from ray._private import worker as ray_worker

from jobs.config import RayConfig
from jobs.errors import JobError
from jobs.progress import open_progress
from jobs.storage import one_line
from jobs.tasks import GOES_ON

# OpenMP threads that spin while they wait are ruinous when processes outnumber cores.
WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # torch's own option. Activations are allocated anew in each forward pass: in pages of 4 kB,
    # the kernel took 6 to 12 % of an embedding actor's time.
    "THP_MEM_ALLOC_ENABLE": "1",
}

HEAD_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's core warns in each job of its own actor pool's arguments (ray #53727), on our standard
    # error. What goes wrong reaches us as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # While a task has all CPUs, Ray ends idle workers after a second; the next stage would wait
    # for others to start and import, longer than some stages take. Five minutes outlast a night's
    # embedding, but not a catalog's, whose actors may want the memory.
    "RAY_idle_worker_killing_time_threshold_ms": "300000",
}

# Ray's own patience with a head that is gone is 60 s; then it ends this process with status 1 and
# not a word. A cluster's head may be restarted within that time; a local one never comes back.
HEAD_AWAY_S = 50.0
HEAD_POLL_S = 1.0
SHUTDOWN_GRACE_S = 10.0
HEAD_PROCESSES = {"gcs_server", "raylet"}
CONNECT_S = 10.0  # Ray itself tries for minutes, and says so only where we drop it
HOST_AND_PORT = re.compile(r"[^/:]+:\d+|\[[^/]+\]:\d+")


CANNOT_START = (OSError, OverflowError, RuntimeError, ValueError, exceptions.RayError)


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connect to the configured cluster, or start a local one; a session that runs is shared.

    Raises:
        JobError: The cluster isn't there, or Ray can't be started; or Ray's head died meanwhile,
            noticed within seconds if it is a local one.
    """
    if ray.is_initialized():
        yield
        return
    connect(config)
    with _watched_head():
        yield


def connect(config: RayConfig) -> None:
    """Connect to the configured cluster, or start a local one, that nothing watches.

    Raises:
        JobError: The cluster isn't there, or Ray can't be started.
    """
    for name, value in HEAD_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = config.address or "local"
    failed = f"the Ray cluster at {address} can't be used" if config.address else "Ray can't start"
    local = {
        # Two slots at the least: an actor that held the only one would starve the reading tasks.
        "num_cpus": max(2, os.cpu_count() or 2),
        "object_store_memory": config.object_store_mb * 2**20,
        "include_dashboard": False,
    }
    open_progress().wait("start Ray" if config.address is None else f"connect to {address}")
    # Ray tells of dead processes on standard output, where `--json` prints one object and no more.
    ray_worker._worker_logs_enabled = False
    try:
        if HOST_AND_PORT.fullmatch(address) and _is_away(address, CONNECT_S):
            raise JobError(f"{failed}: nothing answers there")
        with _muted_native_stderr():  # there the core would announce the log level it was given
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": WORKER_ENVIRONMENT},
                **({} if config.address else local),
            )
    except Exception as error:
        # Ray raises a bare Exception, no class of its own, where a raylet dies at its start.
        if type(error) is not Exception and not isinstance(error, CANNOT_START):
            raise
        raise JobError(f"{failed}: {one_line(error)}; {GOES_ON}") from error
    if config.address is None:  # its monitor is an autoscaler's, and a second's wait at the end
        ray_worker._global_node.kill_monitor(check_alive=False)


@contextmanager
def _watched_head() -> Iterator[None]:
    """Shut Ray down after the block; end the block with one error when Ray's head dies in it."""
    over, closed = threading.Event(), threading.Event()
    if threading.current_thread() is threading.main_thread():  # no other can be interrupted
        threading.Thread(target=_watch, args=(over, closed), daemon=True).start()
    try:
        yield
    except BaseException as error:
        over.set()
        fault = _head_fault(patience_s=0)
        if fault is None:
            raise
        raise JobError(fault) from error
    finally:
        over.set()
        ray.shutdown()
        closed.set()


def _watch(over: threading.Event, closed: threading.Event) -> None:
    """Interrupt the main thread when the head is gone; end the process if that hangs too.

    Args:
        over: The main thread needs no interruption any more.
        closed: Ray is shut down.
    """
    while not closed.wait(HEAD_POLL_S):
        fault = _head_fault(patience_s=HEAD_AWAY_S)
        if fault is None:
            continue
        if not over.is_set():  # a real signal: it alone ends a wait in native code
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not closed.wait(SHUTDOWN_GRACE_S):
            os.write(2, f"vitrine: error: {fault}\n".encode())
            os._exit(1)


def _head_fault(*, patience_s: float) -> str | None:
    """Say what is wrong with Ray's head, if it is gone.

    Args:
        patience_s: How long a cluster's head may be away before that is a fault.
    """
    node = ray_worker._global_node
    if node is None:
        return None
    advice = "what was committed stays: run the command again"
    dead = sorted({name for name, _ in node.dead_processes()} & HEAD_PROCESSES)
    if dead:
        return f"the local Ray head died ({' and '.join(dead)} ended); {advice}"
    if not node.is_head() and _is_away(node.gcs_address, patience_s):
        return f"the Ray cluster at {node.gcs_address} does not answer any more; {advice}"
    return None


def _is_away(address: str, patience_s: float) -> bool:
    """Whether nothing accepts a connection at `host:port`, for so many seconds."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_POLL_S).close()
        except OSError:
            if time.monotonic() >= deadline:
                return True
            time.sleep(HEAD_POLL_S)
        else:
            return False


@contextmanager
def _muted_native_stderr() -> Iterator[None]:
    """Drop what native code writes to file descriptor 2; Python's exceptions pass."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
