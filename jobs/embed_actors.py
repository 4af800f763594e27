"""What the embedding stage asks the cluster for: its actors, and how work is divided among them.

GPUs, CPUs and memory by number, never a kind of machine. Where an autoscaler runs, waiting actors
are what it starts machines for.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray
from ray._private import worker as ray_worker
from ray._private.state import actors as actor_table
from ray.exceptions import RayError

from jobs.config import EmbedConfig
from jobs.errors import ConfigError
from jobs.nodes import cluster_cpus, cluster_gpus, dead_nodes, live_nodes

SIDE_SLOTS = 0.25  # CPUs of a task that must find room beside the actors of a machine
RAY_UNITS = 10_000  # of a CPU: Ray counts no finer
CPU_ROWS = 256  # some seconds: what a killed job loses beside the commit interval
LEAST_ROWS = 16  # of a piece of work: fewer would cost more in files than in waiting
GUIDE = 2  # Ray hands each actor two pieces ahead
ROOM_PATIENCE_S = 10.0
STALL_S = 120.0  # longer than it takes to embed a file of rows, or an autoscaler's next machine
MIB = 2**20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Actors:
    """What each embedding actor asks Ray for, and how many there are to begin with.

    Attributes:
        gpus: 0: it decodes, embeds and writes on CPUs; else tasks of their own decode and write.
        cpus: 0: none beside the GPU.
        memory_mb: 0: none is asked for.
        share: Without a GPU, the part of `cpus` that is asked for.
        count: How many.
        fixed: Whether there are never more; else as many as find room while the stage runs.
    """

    gpus: float
    cpus: int
    memory_mb: int
    share: float = 1.0
    count: int = 1
    fixed: bool = True

    @property
    def options(self) -> dict[str, float]:
        """Ray's options of one actor."""
        cpus = self.cpus if self.gpus else self.share * self.cpus
        asked = {"num_gpus": self.gpus, "num_cpus": cpus, "memory": self.memory_mb * MIB}
        return {name: value for name, value in asked.items() if value}

    def __str__(self) -> str:
        """Say what one actor asks for."""
        asked = (f"{self.gpus:g} GPU", f"{self.cpus} CPU", f"{self.memory_mb:,} MiB of memory")
        return ", ".join(words for words in asked if not words.startswith("0 "))

    def count_room(self) -> int:
        """Return how many of them the machines that are there can hold."""
        return sum(self.count_on(node["Resources"]) for node in live_nodes())

    def count_on(self, offered: Mapping[str, float]) -> int:
        """Return how many of them a machine can hold.

        Args:
            offered: By Ray's names, memory in bytes; what is not named it has not.
        """
        asked = {"GPU": self.gpus, "CPU": self.cpus, "memory": self.memory_mb * MIB}
        return min(int(offered.get(name, 0) / value) for name, value in asked.items() if value)


def one_actor(embed: EmbedConfig, *, has_gpus: bool) -> Actors:
    """Decide what an embedding actor asks for, where nothing is configured by what there is."""
    gpus = float(has_gpus) if embed.gpus_per_actor is None else embed.gpus_per_actor
    cpus = embed.cpus_per_actor or int(not gpus)
    return Actors(gpus=gpus, cpus=cpus, memory_mb=embed.memory_mb_per_actor or 0)


def plan_actors(embed: EmbedConfig) -> Actors:
    """Decide what embedding actors ask for, and how many a run begins with.

    Args:
        embed: How many are wanted, and what each asks for.

    Raises:
        ConfigError: This machine has no room for one; a cluster may yet get a machine that has.
    """
    one = one_actor(embed, has_gpus=cluster_gpus() > 0)
    room, local = one.count_room(), is_local()
    if local and not room:
        raise ConfigError(f"an embedding actor asks for {one} (embed.*_per_actor); {_machines()}")
    count = min(embed.actors, room) if local and embed.actors else embed.actors or max(1, room)
    most = max((node["Resources"].get("CPU", 0) for node in live_nodes()), default=0)
    return replace(one, share=actor_share(most), count=count, fixed=local or embed.actors > 0)


def actor_share(cpus: float) -> float:
    """Return the part of its CPUs that an actor asks for, so that one more doesn't find room.

    What is left on the largest machine is for the tasks of `SIDE_SLOTS`: rows to embed that were
    lost with another machine are made anew while actors wait for them.

    Args:
        cpus: Of the largest machine; 0: none is there yet.
    """
    return math.floor(RAY_UNITS * (1 - SIDE_SLOTS / max(1.0, cpus))) / RAY_UNITS


def is_local() -> bool:
    """Say whether Ray is this process's own: no machine will ever join it."""
    node = ray_worker._global_node
    return node is not None and node.is_head()


def _machines() -> str:
    nodes = [node["Resources"] for node in live_nodes()]
    most = {
        name: max((node.get(name, 0) for node in nodes), default=0)
        for name in ("GPU", "CPU", "memory")
    }
    return (
        f"the largest machines of the Ray cluster have {most['GPU']:g} GPU, {most['CPU']:g} CPU, "
        f"{most['memory'] / MIB:,.0f} MiB"
    )


@contextmanager
def watched(actors: Actors, actor_class: str) -> Iterator[Callable[[], None]]:
    """Look after the actors of a stage while the block runs.

    It is said in one line that no machine has room for an actor, each time that it comes to that.
    Ray keeps what a lost actor was given for its next start. With little object store that can be
    all the room there is, and the actors that are left get nothing. Those that wait for a machine
    while the stage stands still are given up: the block then fails with what Ray makes of that,
    and the work can be begun anew without them.

    Args:
        actors: Of the stage.
        actor_class: A part of the name of their class.

    Yields:
        What is to be called whenever the stage has got on.
    """
    watch = _Watch(actors, actor_class)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch.get_on
    finally:
        watch.over.set()


class _Watch:
    def __init__(self, actors: Actors, actor_class: str) -> None:
        self.over = threading.Event()
        self._actors, self._class = actors, actor_class
        self._moved, self._dead = time.monotonic(), dead_nodes()

    def get_on(self) -> None:
        self._moved = time.monotonic()

    def run(self) -> None:
        waits = False
        while not self.over.wait(ROOM_PATIENCE_S):
            try:
                waited, waits, machines = waits, self._actors.count_room() == 0, _machines()
                if time.monotonic() - self._moved > STALL_S and not dead_nodes() <= self._dead:
                    self._give_up_lost()
            except RayError:  # the head is gone: who waits for rows is told so
                return
            if waits and not waited:
                asked = "vitrine: embedding waits for a machine with %s (embed.*_per_actor); %s"
                _log.warning(asked, self._actors, machines)

    def _give_up_lost(self) -> None:
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        waiting = actor_table(job_id=job, actor_state_name="RESTARTING")
        lost = [name for name, one in waiting.items() if self._class in one["ActorClassName"]]
        if lost and self._actors.count_room():  # else there is nobody to go on
            words = "vitrine: %d embedding actors were lost and find no room, and nothing moves"
            _log.warning(words, len(lost))
            for name in lost:
                ray_worker.global_worker.core_worker.kill_actor(ray.ActorID.from_hex(name), True)


def piece_rows(embed: EmbedConfig, actors: Actors, left: int) -> int:
    """Return the rows of the next piece of work: fewer towards the end, so that all end together.

    Guided self-scheduling: a part of everybody's even share of what is left (Polychronopoulos and
    Kuck, 1987).

    Args:
        embed: Bounds them by its `rows_per_file`.
        actors: Who embeds; with GPUs, CPU tasks prepare the pieces.
        left: Rows that are in no piece yet.
    """
    if actors.gpus:
        workers, most = cluster_cpus(), embed.rows_per_file
    else:
        workers, most = actors.count, min(embed.rows_per_file, CPU_ROWS)
    return min(most, max(LEAST_ROWS, -(-left // (GUIDE * workers))))
