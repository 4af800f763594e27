"""What the tasks of the index stage ask Ray for, so that a machine runs no more than it holds.

`benchmarks/index.py compare` prints each beside what the process took.
"""

import logging
from collections.abc import Sequence
from typing import Any

from indexing.spec import IndexSpec
from jobs.live import LiveRows
from jobs.nodes import Room, find_room

MIB = 2**20
# Python with Ray, pyarrow and FAISS, and what the heap keeps of a process's earlier tasks.
PROCESS_BYTES = 512 * MIB
DOUBLED = 2  # FAISS's lists double when they are full
COPIES = 3  # of a data file's vectors: as Parquet gives them, those that are live, their squares
BLOCK_BYTES = 192 * MIB  # of `indexing.build.append_vectors`: rotated in float64, and as float32
SEARCH_BYTES = 192 * MIB  # lookup tables, candidates, and what a sweep's points found
ID_BYTES = 24  # a vector: ids that are copied and sorted to be compared
_log = logging.getLogger(__name__)


def train_bytes(spec: IndexSpec, rows: int) -> int:
    """Return what training on so many rows takes."""
    return PROCESS_BYTES + spec.training_bytes(rows)


def add_bytes(spec: IndexSpec, rows: int, file_rows: int, columns: int, partitions: int) -> int:
    """Return what adding so many rows takes.

    Args:
        spec: The index.
        rows: Of the task.
        file_rows: Of the largest data file: one at a time is read, all its rows.
        columns: How many stored vectors make one: 2 of a fused field.
        partitions: Of more than one, each is copied out.
    """
    vectors = (COPIES * columns + (columns > 1)) * file_rows * 4 * spec.dim
    copies = DOUBLED + (partitions > 1)
    return PROCESS_BYTES + BLOCK_BYTES + vectors + copies * spec.memory_bytes(rows)


def merge_bytes(spec: IndexSpec, rows: int) -> int:
    """Return what merging so many vectors takes, those of the base that leave included."""
    return PROCESS_BYTES + DOUBLED * spec.memory_bytes(rows) + ID_BYTES * rows


def search_bytes(spec: IndexSpec, rows: int) -> int:
    """Return what searching a partition of so many vectors takes, mapped where it can be."""
    held = spec.memory_bytes(rows if spec.is_fastscan else 0)
    return PROCESS_BYTES + SEARCH_BYTES + held + ID_BYTES * rows


def fill_options(
    spec: IndexSpec,
    live: LiveRows,
    *,
    added: int,
    held: Sequence[int],
    columns: int,
    partitions: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the Ray options of the tasks that add, and of those that merge.

    Args:
        spec: The index.
        live: All live rows.
        added: How many of them are added.
        held: Vectors in each partition of the base: one is read whole, also where it is split.
        columns: As in `add_bytes`.
        partitions: How many the index will have.
    """
    rows = min(added, max(live.group_rows, default=0))
    taken = add_bytes(spec, rows, live.file_rows, columns, partitions)
    adding = ask("adding vectors", taken, "a smaller ray.bucket_rows")
    taken = merge_bytes(spec, max(held, default=0) + -(-added // partitions))
    merging = ask("merging a partition", taken, "a smaller index.max_partition_vectors")
    return options(adding, most_cpus=1), options(merging, most_cpus=1)


def ask(task: str, taken: int, advice: str, *, gpus: int = 0) -> Room:
    """Return the machine that a task asks for: one that has the memory, with the most CPUs.

    Where none has it, the task asks for all that the largest offers, and a warning says so:
    estimates are upper bounds, and what Ray calls free depends on the moment of its start.

    Args:
        task: As in "training IVF1024,SQ8".
        taken: Bytes.
        advice: What makes it smaller.
        gpus: How many it needs.
    """
    room = find_room(taken, gpus=gpus)
    if room.memory < taken:
        _log.warning(
            "vitrine: %s takes up to %s MiB, the largest machine of the Ray cluster offers %s: "
            "it may run out of memory; %s, or a larger machine",
            task,
            f"{taken / MIB:,.0f}",
            f"{room.memory / MIB:,.0f}",
            advice,
        )
    return room


def options(room: Room, *, most_cpus: int | None = None) -> dict[str, Any]:
    """Return a task's Ray options.

    Args:
        room: From `ask`.
        most_cpus: Of those that the machine has; None: all.
    """
    cpus = room.cpus if most_cpus is None else min(room.cpus, most_cpus)
    return {"num_cpus": cpus, "memory": room.memory, "num_gpus": room.gpus}
