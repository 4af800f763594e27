"""Starts Ray the way Vitrine needs it, watches its head, and passes our errors through it."""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions
from ray._private import state as ray_state
from ray._private import worker as ray_worker

from jobs.config import RayConfig
from jobs.errors import JobError
from jobs.storage import one_line

# OpenMP threads that spin while they wait are ruinous when processes outnumber cores.
WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

HEAD_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's core warns in each job of its own actor pool's arguments (ray #53727), on our standard
    # error. What goes wrong reaches us as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # While a task has all CPUs, Ray ends idle workers after a second; the next stage would wait
    # for others to start and import, longer than some stages take.
    "RAY_idle_worker_killing_time_threshold_ms": "30000",
}

# Ray's own patience with a head that is gone is 60 s; then it ends this process with status 1 and
# not a word. A cluster's head may be restarted within that time; a local one never comes back.
HEAD_AWAY_S = 50.0
HEAD_POLL_S = 1.0
SHUTDOWN_GRACE_S = 10.0
HEAD_PROCESSES = {"gcs_server", "raylet"}
WATCH_S = 5.0
CONNECT_S = 10.0  # Ray itself tries for minutes, and says so only where we drop it
HOST_AND_PORT = re.compile(r"[^/:]+:\d+|\[[^/]+\]:\d+")

GOES_ON = "what was committed stays, and the next run goes on from there"
LESS = "if it happens again, try fewer embed.actors, a smaller embed.batch_size or ray.bucket_rows"


class LostError(JobError):
    """A process or machine of the cluster died, and what it held or did is lost."""


# What Ray says when a process or machine ends that no error of our code has ended.
CRASHES: tuple[tuple[type[BaseException], str], ...] = (
    (exceptions.OutOfMemoryError, f"Ray killed a worker as memory ran out; {GOES_ON}; {LESS}"),
    (exceptions.WorkerCrashedError, f"a Ray worker process died; {GOES_ON}; {LESS}"),
    (exceptions.RayActorError, f"a Ray actor process died; {GOES_ON}; {LESS}"),
    (exceptions.NodeDiedError, f"a machine of the Ray cluster died; {GOES_ON}"),
    (exceptions.LocalRayletDiedError, f"Ray died on this machine; {GOES_ON}"),
    (exceptions.ObjectLostError, f"Ray lost data with the process that held them; {GOES_ON}"),
    (exceptions.OutOfDiskError, f"Ray's disk for spilled data is full; {GOES_ON}: free some space"),
    (
        exceptions.ObjectStoreFullError,
        f"Ray's object store is full; {GOES_ON}; try a larger ray.object_store_mb",
    ),
)
# What says that a task was lost with its process or machine.
LOST = (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.ObjectLostError)
TRIES = 4  # as Ray's own tasks have
CANNOT_START = (OSError, OverflowError, RuntimeError, ValueError, exceptions.RayError)
# How Ray quotes our error where an actor's own start raised it: it keeps the words alone.
QUOTED_RAY = re.compile(r"^ray\.exceptions\.(\w+): ", re.MULTILINE)
QUOTED_ERROR = re.compile(r"^jobs\.(?:errors|storage)\.\w+: (.+)$", re.MULTILINE)


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
    for name, value in HEAD_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _connect(config)
    with _watched_head():
        yield


def _connect(config: RayConfig) -> None:
    address = config.address or "local"
    failed = f"the Ray cluster at {address} can't be used" if config.address else "Ray can't start"
    local = {
        # Two slots at the least: an actor that held the only one would starve the reading tasks.
        "num_cpus": max(2, os.cpu_count() or 2),
        "object_store_memory": config.object_store_mb * 2**20,
        "include_dashboard": False,
    }
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


def gather(refs: Sequence[Any]) -> list[Any]:
    """Wait for task results, in order.

    Raises:
        JobError: See `ray_errors`.
    """
    with ray_errors():
        return list(ray.get(list(refs)))


@contextmanager
def ray_errors() -> Iterator[None]:
    """Turn what Ray raises into our own error; any other error of a task is a bug, and passes.

    Raises:
        JobError: A task raised one: its own type and message, not Ray's wrapping. Or a process or
            machine of the cluster died.
    """
    try:
        yield
    except exceptions.RayError as error:
        found = job_error(error)
        if isinstance(found, JobError):
            raise found from error
        raise


def gather_bounded(
    submit: Callable[[Any], Any], inputs: Iterable[Any], *, in_flight: int
) -> Iterator[Any]:
    """Yield task results in order, with a bounded number of tasks under way.

    Args:
        submit: Starts a task for one input and returns its reference.
        inputs: One value a task.
        in_flight: Most tasks that are started and not yet yielded.
    """
    pending: list[Any] = []
    for value in inputs:
        pending.append(submit(value))
        if len(pending) >= in_flight:
            yield gather([pending.pop(0)])[0]
    yield from (gather([ref])[0] for ref in pending)


def run_telling(work: Callable[[Callable[[str], None]], Any]) -> Iterator[Any]:
    """Do a task's work in a thread, and yield what it tells meanwhile; at last, its result.

    A streaming task that returns this needs no actor beside it, whose start would cost seconds.

    Args:
        work: Takes what it may tell words with, of which the newest are yielded every `WATCH_S`;
            its result is no text.
    """
    newest: deque[str] = deque(maxlen=1)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work, newest.append)
        while not wait([result], timeout=WATCH_S).done:
            with suppress(IndexError):
                yield newest.pop()
    yield result.result()


def watch(start: Callable[[], Any], waiting: str, progress: Callable[[str], None]) -> Any:  # noqa: ANN401
    """Run a task that `run_telling` runs: pass on its words, and return its result.

    A lost task is started again here, `TRIES` times in all. Ray, which counts what a stream
    yields, would drop the result of a second try that tells fewer words.

    Args:
        start: Starts the task, with `max_retries=0`, and returns its references.
        waiting: What to say while no machine has room for the task.
        progress: Called with words.

    Raises:
        JobError: See `ray_errors`.
    """
    with ray_errors():
        for _ in range(TRIES - 1):
            try:
                return _follow(start(), waiting, progress)
            except (exceptions.OutOfMemoryError, *LOST) as error:
                progress(f"try again: {one_line(_crash(error) or error)}")
        return _follow(start(), waiting, progress)


def _follow(steps: Any, waiting: str, progress: Callable[[str], None]) -> Any:  # noqa: ANN401
    if not ray.wait([steps], timeout=2 * WATCH_S)[0]:
        progress(waiting)
    value = None
    for reference in steps:
        value = ray.get(reference)
        if isinstance(value, str):
            progress(value)
    return value


def job_error(error: BaseException) -> BaseException:
    """Return the JobError that a Ray exception wraps or comes to, or the exception itself."""
    causes = list(_causes(error))
    # Ray's own exception is an instance of what it wraps, too, and its words are a traceback.
    ours = (e for e in causes if isinstance(e, JobError) and not isinstance(e, exceptions.RayError))
    crashes = (told for told in map(_crash, causes) if told is not None)
    return next(ours, None) or next(crashes, error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what Ray wrapped in it, from the outside in."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) and cause is not seen else seen.__cause__


def _crash(error: BaseException) -> JobError | None:
    """Say what died, if that is what Ray tells; or what an actor's start raised, if it is ours."""
    if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
        if quoted := QUOTED_ERROR.findall(str(error)):
            return JobError(quoted[-1])
        kinds = [getattr(exceptions, name, None) for name in QUOTED_RAY.findall(str(error))]
        lost = any(kind and issubclass(kind, exceptions.ObjectLostError) for kind in kinds)
        return LostError(f"an actor could not start again; {GOES_ON}") if lost else None
    made = LostError if isinstance(error, (exceptions.RayActorError, *LOST)) else JobError
    return next((made(words) for kind, words in CRASHES if isinstance(error, kind)), None)


def live_nodes() -> list[dict[str, Any]]:
    """List the machines that take work, as Ray describes them; none that is drained."""
    drained = ray_state.state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in drained]


def _count_resource(name: str) -> int:
    return int(sum(node["Resources"].get(name, 0) for node in live_nodes()))


def cluster_cpus() -> int:
    """Return the number of CPUs of the whole cluster, at least 1."""
    return max(1, _count_resource("CPU"))


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a task may ask one machine for.

    Attributes:
        memory: In bytes, as Ray counts it.
    """

    cpus: int
    memory: int
    gpus: int


def find_room(memory: int, *, gpus: int = 0) -> Room:
    """Return the room of the machine with most CPUs among those that offer some memory.

    Args:
        memory: Bytes. Where no machine with a CPU offers so much, that with most is taken, and
            its memory returned: a task that asks for more would wait for ever.
        gpus: How many the machine must have, if any has.
    """
    nodes = [node["Resources"] for node in live_nodes()]
    nodes = [node for node in nodes if node.get("CPU", 0) >= 1] or [{"CPU": 1}]
    nodes = [node for node in nodes if node.get("GPU", 0) >= gpus] or nodes
    offered = [int(node.get("memory", memory)) for node in nodes]  # a node need not say
    least = min(memory, max(offered))
    fit = [node for node, bytes_ in zip(nodes, offered, strict=True) if bytes_ >= least]
    best = max(fit, key=lambda node: float(node["CPU"]))
    return Room(cpus=int(best["CPU"]), memory=least, gpus=min(gpus, int(best.get("GPU", 0))))


def cluster_gpus() -> int:
    """Return the number of GPUs of the whole cluster."""
    return _count_resource("GPU")
