"""Starts Ray the way Vitrine needs it, and passes our errors through it."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from jobs.config import RayConfig
from jobs.errors import JobError

# OpenMP threads that spin while they wait are ruinous when processes outnumber cores.
WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

QUIET_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's core warns in each job of its own actor pool's arguments (ray #53727), on our standard
    # error. What goes wrong reaches us as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connect to the configured cluster, or start a local one; a session that runs is shared."""
    if ray.is_initialized():
        yield
        return
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    local = {
        # Two slots at the least: an actor that held the only one would starve the reading tasks.
        "num_cpus": max(2, os.cpu_count() or 2),
        "object_store_memory": config.object_store_mb * 2**20,
        "include_dashboard": False,
    }
    with _muted_native_stderr():  # there the core would announce the log level it was given
        ray.init(
            address=config.address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
            **({} if config.address else local),
        )
    try:
        yield
    finally:
        ray.shutdown()


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
        JobError: A task raised one; its own type and message, not Ray's wrapping.
    """
    try:
        return list(ray.get(list(refs)))
    except RayTaskError as error:
        raise job_error(error) from error


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


def job_error(error: BaseException) -> BaseException:
    """Return the JobError that a Ray exception wraps, or the exception itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, JobError):
            return seen
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) and cause is not seen else seen.__cause__
    return error


def cluster_cpus() -> int:
    """Return the number of CPUs of the whole cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cluster_gpus() -> int:
    """Return the number of GPUs of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))
