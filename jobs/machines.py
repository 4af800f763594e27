"""Looks after the machines of a Ray cluster: what each can reach, and who gets no more work.

A machine that the store does not answer fails every task that it is given. Where the store answers
others, the machine is drained, as an autoscaler drains one: what runs there ends, nothing new
begins, and the machine leaves the cluster, where an autoscaler may put another in its place.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import ray
from ray._private import worker as ray_worker
from ray.core.generated import autoscaler_pb2
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.embed_actors import is_local
from jobs.errors import JobError, StoreError
from jobs.nodes import dead_nodes, live_nodes
from jobs.storage import RAY_NODE, REFUSED, one_line, open_filesystem, storage_errors
from jobs.tasks import LostError, gather, job_error

NOTICE_S: Final = 20.0  # in which Ray notices that a machine is gone
TRIES: Final = 8  # a night on spot machines; a fault that follows the work ends yet
ASK_S: Final = 60.0  # in which a machine must have started a process that answers
PREEMPTION: Final = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def check_shared(addresses: Iterable[str | None]) -> None:
    """Refuse a cluster of several machines that don't all see what the driver sees.

    Args:
        addresses: Of files or folders that are there; those on S3 or the web are not looked for.

    Raises:
        JobError: A machine does not see one of them; which, and where.
    """
    local = [one for one in addresses if one and ("://" not in one or one.startswith("file://"))]
    nodes = [node for node in live_nodes() if node["NodeID"] != _own_node()]
    if not local or not nodes:
        return
    wanted = [str(Path(one.removeprefix("file://")).resolve()) for one in local]
    for node, asked in [(node, _ask(node, wanted)) for node in nodes]:
        if missing := _answer(node, asked):
            raise JobError(
                f"{missing[0]} is not there on machine {_name(node)} of the Ray cluster: a local "
                "folder must be one that all machines share, at the same path; or use s3://"
            )


def _answer(node: dict[str, Any], asked: Any) -> list[str]:  # noqa: ANN401
    """Return what a machine does not see: nothing, if it is lost while it is asked."""
    try:
        missing: list[str] = gather([asked])[0]
    except (LostError, TaskUnschedulableError) as error:
        _log.warning(
            "vitrine: machine %s was lost, the run goes on: %s", _name(node), one_line(error)
        )
        return []
    return missing


def without_cut_off(
    work: Callable[[], Result], addresses: Sequence[str], begin_again: Callable[[str], None]
) -> Result:
    """Do some work; do it again where a machine died, or without one that a storage leaves out.

    Ray itself gives what a lost machine did to others; but not always all that it needs for that.

    Args:
        work: Goes on from what is committed, however often it is begun.
        addresses: What each machine must be able to read: in the store, of the catalog.
        begin_again: Called with the reason before the work is begun again, which is at most
            `TRIES` times in all; never where Ray is this process's own.

    Raises:
        JobError: The work's own; or the storage does not answer this process either, or no other
            machine is left to do it.
    """
    for _ in range(0 if is_local() else TRIES - 1):
        before = dead_nodes()
        try:
            return work()
        except LostError as error:
            if not _has_died(before):
                raise
            _log.warning("vitrine: a machine was lost, the run goes on: %s", one_line(error))
            begin_again(f"a machine was lost: {one_line(error)}")
        except JobError as error:
            if not _may_go_on(error, addresses):
                raise
            begin_again(one_line(error))
    return work()


def _has_died(before: set[str]) -> bool:
    """Whether a machine died beside those dead before; Ray may take a while to notice."""
    deadline = time.monotonic() + NOTICE_S
    while dead_nodes() <= before:
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def _may_go_on(error: JobError, addresses: Sequence[str]) -> bool:
    """Whether one machine alone had the fault; it gets no more work if it still has it."""
    found = RAY_NODE.search(str(error))
    nodes = {node["NodeID"]: node for node in live_nodes()}
    node = nodes.get(found.group(1)) if found else None
    if found is None or not _reaches(addresses):
        return False
    if node is None:  # it has gone meanwhile
        return True
    try:
        ray.get(_ask(node, addresses), timeout=ASK_S)
    except (NodeDiedError, TaskUnschedulableError):
        return True
    except (StoreError, RayError) as still:
        return _drain(node, list(nodes.values()), one_line(job_error(still)))
    return REFUSED not in str(error)  # a right that it lacks it will lack again


def _reaches(addresses: Sequence[str]) -> bool:
    with suppress(StoreError):
        look_for(addresses)
        return True
    return False


def _drain(node: dict[str, Any], nodes: list[dict[str, Any]], reason: str) -> bool:
    """Let a machine have no more work, unless it is the driver's or the last that takes any."""
    others = [one for one in nodes if one is not node and one["Resources"].get("CPU", 0) >= 1]
    if node["NodeID"] == _own_node() or not others:
        return False
    client = ray_worker.global_worker.gcs_client
    try:
        accepted, why = client.drain_node(node["NodeID"], PREEMPTION, "no storage answers", 0)
    except RayError as error:  # what the storage said is what the run ends with
        accepted, why = False, one_line(error)
    told = "gets no more work, the run goes on without it" if accepted else "can't be drained"
    _log.warning("vitrine: machine %s %s: %s", _name(node), told, reason if accepted else why)
    return bool(accepted)


def look_for(addresses: Sequence[str]) -> list[str]:
    """Return those of some addresses where nothing is.

    Raises:
        StoreError: A storage does not answer, or refuses to.
    """
    missing = []
    for one in addresses:
        with storage_errors(one, "read"):
            missing += [] if open_filesystem(one)[0].exists(one) else [one]
    return missing


@ray.remote(num_cpus=0, max_retries=0)
def _look_for(addresses: Sequence[str]) -> list[str]:
    return look_for(addresses)


def _ask(node: dict[str, Any], addresses: Sequence[str]) -> Any:  # noqa: ANN401
    """Look for addresses on a machine, and on no other; return a reference to what is missing."""
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return _look_for.options(scheduling_strategy=there).remote(addresses)


def _own_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
