"""The machines of the Ray cluster, and the room that they have."""

from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state as ray_state


def live_nodes() -> list[dict[str, Any]]:
    """List the machines that take work, as Ray describes them; none that is drained."""
    drained = ray_state.state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in drained]


def on_workers() -> dict[str, str]:
    """Return Ray's label selector for what asks for no CPU: machines that offer some.

    Else Ray would put it on a head, too, that offers none so that it takes no work. A little CPU
    asked for would keep tasks waiting that take all of a machine.
    """
    others = [node["NodeID"] for node in live_nodes() if not node["Resources"].get("CPU", 0)]
    return {"ray.io/node-id": f"!in({','.join(others)})"} if others else {}


def dead_nodes() -> set[str]:
    """Return the ids of the machines that have left the cluster."""
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


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
