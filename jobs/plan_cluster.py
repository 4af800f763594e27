"""The machines that a run is planned for: those of Ray now, or those that a cluster file names.

Nothing here knows a cloud's machine types: what a type offers is what the file says of it.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from jobs.config import EmbedConfig
from jobs.config_file import YAML_FAULTS
from jobs.embed_actors import one_actor
from jobs.errors import ConfigError
from jobs.nodes import live_nodes

HEAD = "head_node_type"
TYPES = "available_node_types"
GROUP_LABEL = "ray.io/node-group"
LOCAL = "local"
ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Machines of one type.

    Attributes:
        type: Its name in the cluster file, or in Ray.
        count: How many there are.
        cpus: Of each, as Ray counts them; 0: no task runs there.
        gpus: Of each.
        memory_bytes: Of each, for tasks; None: the file doesn't say.
        accelerators: Kinds of GPU by Ray's names; empty: none, or not known.
        price_per_hour: Of each, in any currency; None: not given.
    """

    type: str
    count: int
    cpus: int
    gpus: int
    memory_bytes: int | None
    accelerators: tuple[str, ...] = ()
    price_per_hour: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """All machines of a run.

    Attributes:
        name: What they are, in words.
        notes: What of the file is to be known, in whole sentences.
    """

    name: str
    machines: tuple[Machines, ...]
    notes: tuple[str, ...] = ()

    @property
    def cpus(self) -> int:
        """CPUs of all, at least 1."""
        return max(1, sum(one.count * one.cpus for one in self.machines))

    @property
    def gpus(self) -> int:
        """GPUs of all."""
        return sum(one.count * one.gpus for one in self.machines)

    @property
    def most_cpus(self) -> int:
        """CPUs of the largest machine, at least 1: where an index is trained."""
        return max(1, *(one.cpus for one in self.machines if one.count), 1)

    @property
    def accelerators(self) -> tuple[str, ...]:
        """Kinds of GPU, sorted; empty: none, or not known."""
        return tuple(sorted({kind for one in self.machines for kind in one.accelerators}))

    @property
    def most_memory(self) -> int | None:
        """Memory of the largest machine that runs tasks, in bytes; None: one doesn't say."""
        sizes = [one.memory_bytes for one in self.machines if one.count and one.cpus]
        known = [size for size in sizes if size is not None]
        return max(known) if known and len(known) == len(sizes) else None

    def embedders(self, embed: EmbedConfig) -> "Embedders":
        """Return how many actors these machines have room for, as `plan_actors` does."""
        actor = one_actor(embed, has_gpus=self.gpus > 0)
        room = sum(one.count * actor.count_on(_offers(one)) for one in self.machines)
        count = min(embed.actors, room) if embed.actors else room
        threads = 1 if actor.gpus else embed.cpus_per_actor or max(1, self.cpus // max(1, count))
        return Embedders(count=count, gpus=actor.gpus, threads=threads, precision=embed.precision)


@dataclass(frozen=True, kw_only=True)
class Embedders:
    """The embedding actors of a run.

    Attributes:
        count: How many; 0: no machine has room for one.
        gpus: Of each; 0: they embed on CPUs.
        threads: CPU threads of the forward pass.
        precision: What was asked for; auto: the contract and each actor's machine decide.
    """

    count: int
    gpus: float
    threads: int
    precision: str


def _offers(machine: Machines) -> dict[str, float]:
    memory = sys.maxsize if machine.memory_bytes is None else machine.memory_bytes
    return {"GPU": machine.gpus, "CPU": machine.cpus, "memory": memory}


def live_cluster(address: str | None) -> Cluster:
    """Describe the machines of the Ray that this process is connected to.

    Args:
        address: The configured one; None: Ray runs on this machine alone.
    """
    found: Counter[Machines] = Counter()
    for node in live_nodes():
        offered = node["Resources"]
        memory = offered.get("memory")
        found[
            Machines(
                type=LOCAL if address is None else _node_type(node),
                count=1,
                cpus=int(offered.get("CPU", 0)),
                gpus=int(offered.get("GPU", 0)),
                memory_bytes=None if memory is None else int(memory),
                accelerators=_accelerators(offered),
            )
        ] += 1
    return Cluster(
        name="this machine" if address is None else f"the Ray cluster at {address}, as it is now",
        machines=tuple(replace(one, count=count) for one, count in found.items()),
    )


def _accelerators(offered: dict[str, float]) -> tuple[str, ...]:
    """Return the kinds of GPU; Ray names a CPU's kind the same way on some machines."""
    if not offered.get("GPU"):
        return ()
    return tuple(sorted(n.removeprefix(ACCELERATOR) for n in offered if n.startswith(ACCELERATOR)))


def _node_type(node: dict[str, Any]) -> str:
    labels = node.get("Labels") or {}
    offered = node["Resources"]
    size = f"cpu{offered.get('CPU', 0):.0f}-gpu{offered.get('GPU', 0):.0f}"
    return str(labels.get(GROUP_LABEL) or size)


def read_cluster(path: Path, workers: Sequence[str]) -> Cluster:
    """Read the machines of a Ray cluster file (`ray up`).

    Args:
        path: The file.
        workers: Texts `TYPE=N`: how many machines of a type run; else its max_workers.

    Raises:
        ConfigError: The file is missing or is no such file, a type doesn't say its CPUs, or a
            worker type is unknown.
    """
    values = _read_yaml(path)
    types = values.get(TYPES)
    if not isinstance(types, dict) or not types:
        raise ConfigError(f"cluster file {path} has no {TYPES}: it is no Ray cluster file")
    head = values.get(HEAD)
    if head not in types:
        raise ConfigError(f"cluster file {path}: {HEAD} is {head!r}, not one of {_names(types)}")
    asked = {name: int(count) for name, count in _pairs("--workers", workers, "N", types, int)}
    limit = values.get("max_workers", 2)  # Ray's own default
    machines = [
        _read_type(path, name, entry, asked.get(name), head=name == head, limit=limit)
        for name, entry in types.items()
    ]
    cluster = Cluster(name=f"cluster file {path}", machines=tuple(machines))
    started = sum(one.count for one in machines) - 1
    if isinstance(limit, int) and started > limit:
        note = f"The types allow {started} workers, the file's max_workers {limit}: name --workers."
        return replace(cluster, notes=(note,))
    return cluster


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"cluster file {path} does not exist") from error
    except (OSError, *YAML_FAULTS) as error:
        raise ConfigError(f"cluster file {path} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"cluster file {path} must be a YAML mapping")
    return values


def _read_type(
    path: Path, name: str, entry: object, asked: int | None, *, head: bool, limit: object
) -> Machines:
    said: dict[str, Any] = entry if isinstance(entry, dict) else {}
    resources = said.get("resources")
    offered = resources if isinstance(resources, dict) else {}
    if "CPU" not in offered:
        raise ConfigError(
            f"cluster file {path}: {TYPES}.{name}.resources has no CPU: name it, and GPU and "
            "memory; what a machine type offers is not guessed"
        )
    most = said.get("max_workers", 0 if head else limit)
    count = asked if asked is not None else most
    numbers = {"CPU": offered["CPU"], "GPU": offered.get("GPU", 0), "max_workers": count}
    numbers |= {"memory": offered["memory"]} if "memory" in offered else {}
    for key, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"cluster file {path}: {key} of {name} is {value!r}, no number")
    memory = numbers.get("memory")
    return Machines(
        type=name,
        count=int(count) + head,
        cpus=int(numbers["CPU"]),
        gpus=int(numbers["GPU"]),
        memory_bytes=None if memory is None else int(memory),
    )


def add_prices(cluster: Cluster, prices: Sequence[str]) -> Cluster:
    """Set the prices of machines.

    Args:
        cluster: The machines.
        prices: Texts `TYPE=PER_HOUR`.

    Raises:
        ConfigError: A type is unknown, or a price is no number of 0 or more.
    """
    types = {one.type: one for one in cluster.machines}
    found = dict(_pairs("--price", prices, "PER_HOUR", types, float))
    priced = (replace(one, price_per_hour=found.get(one.type)) for one in cluster.machines)
    return replace(cluster, machines=tuple(priced))


def _pairs(
    option: str, texts: Sequence[str], what: str, known: dict[str, Any], kind: type[int | float]
) -> list[tuple[str, float]]:
    """Read texts `TYPE=NUMBER`; the number is finite and not negative."""
    pairs = []
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in known:
            why = "no known type" if separator else f"expected TYPE={what}"
            raise ConfigError(f"{option} {text!r}: {why}; the types are {_names(known)}")
        try:
            number = kind(value)
        except ValueError as error:
            raise ConfigError(f"{option} {text!r}: {value!r} is no number") from error
        if not 0 <= number < float("inf"):
            raise ConfigError(f"{option} {text!r}: 0 or more is needed")
        pairs.append((name, number))
    return pairs


def _names(types: dict[str, Any]) -> str:
    return ", ".join(map(str, types))
