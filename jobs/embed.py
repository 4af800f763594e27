"""The embedding stage: catalog rows in, committed Parquet files of the embeddings table out.

One streaming Ray Data execution: read units -> fetch, decode, tokenise (CPU tasks) -> embed
(actors) -> write a data file (tasks); the driver commits the files as they come.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from jobs.buckets import Records, sort_records
from jobs.cluster import cluster_cpus, cluster_gpus, gather, ray_errors
from jobs.diff import Diff
from jobs.duplicates import image_vectors
from jobs.embed_steps import Embedder, EmbedTask, prepare_rows
from jobs.embed_write import write_deletes, write_rows
from jobs.errors import JobError
from jobs.store import DataFile

CPU_ACTOR_SLOTS = 0.75
CPU_ROWS = 256  # some seconds: what a killed job loses beside the commit interval
MAX_PIECES = 20_000


@dataclass
class EmbedResult:
    """What an embedding run did. Counts are rows, times are seconds."""

    embedded: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0
    image_bytes: int = 0
    images_embedded: int = 0
    images_reused: int = 0
    written_bytes: int = 0


def embed_rows(task: EmbedTask, diff: Diff, progress: Callable[[int, int], None]) -> EmbedResult:
    """Embed what the diff names and commit it to the embeddings table as it comes.

    Args:
        task: What to embed with.
        diff: Which rows; removed ones get a delete row.
        progress: Called with (rows done, of them rejected) whenever files are committed.

    Returns:
        Counts and times. The vectors never pass through this process.

    Raises:
        JobError: A step failed; what was committed before stays, and the next run goes on.
    """
    started, result = time.monotonic(), EmbedResult()
    pending: list[DataFile] = []
    last_commit = started
    with ray_errors():
        for row in _embed(task, diff) if diff.todo_rows else ():
            pending.append(DataFile(row["path"], row["size_bytes"], row["rows"]))
            _count(result, row)
            if time.monotonic() - last_commit >= task.embed.commit_interval_s:
                task.store.commit_embeddings(pending)
                pending, last_commit = [], time.monotonic()
            progress(result.embedded + result.rejected, result.rejected)
    if diff.counts.removed:
        pending += gather([_write_deletes.remote(task, ids) for ids in diff.removed])
    pending = [file for file in pending if file.rows]
    if pending:
        task.store.commit_embeddings(pending)
    result.wall_s = time.monotonic() - started
    return result


def _count(result: EmbedResult, row: dict[str, Any]) -> None:
    result.embedded += row["rows"] - row["rejected"]
    result.rejected += row["rejected"]
    result.written_bytes += row["size_bytes"]
    for name in ("image_bytes", "images_embedded", "images_reused"):
        setattr(result, name, getattr(result, name) + row[name])
    result.reasons.update(dict(zip(row["reason_names"], row["reason_counts"], strict=True)))
    for name in ("fetch_s", "decode_s", "tokenize_s", "embed_s", "write_s"):
        result.seconds[name] += row[name]


def _embed(task: EmbedTask, diff: Diff) -> Iterator[dict[str, Any]]:
    most = task.embed.rows_per_file
    return _written_files(task, *plan_work(diff, most if cluster_gpus() else min(most, CPU_ROWS)))


def probe_rows(task: EmbedTask, diff: Diff, rows: int) -> tuple[EmbedResult, int]:
    """Embed some of what the diff names and commit nothing.

    Args:
        task: What to embed with; its store gets data files.
        diff: Which rows.
        rows: How many, at most.

    Returns:
        Counts and times, and how many actors a whole run would have.

    Raises:
        JobError: A step failed.
    """
    todo, work = plan_work(diff, rows)
    result = EmbedResult()
    with ray_errors():
        for row in _written_files(task, todo, work[:1]):
            _count(result, row)
    return result, task.embed.actors or cluster_gpus() or cluster_cpus()


def _written_files(
    task: EmbedTask, todo: list[Any], work: list[dict[str, int]]
) -> Iterator[dict[str, Any]]:
    """Run the pipeline over pieces of work; yield one small row a written data file."""
    _set_data_context()
    task.store.embeddings()  # made if there is none: data files lie in its folder
    rows = task.embed.duplicate_cache_rows if task.shares_images else 0
    with image_vectors(rows, task.space.dim) as handle:
        yield from _run_steps(replace(task, image_vectors=handle), todo, work)


def _run_steps(
    task: EmbedTask, todo: list[Any], work: list[dict[str, int]]
) -> Iterator[dict[str, Any]]:
    gpus = cluster_gpus()
    actors = min(task.embed.actors or gpus or cluster_cpus(), len(work))
    # On CPUs the same slots everywhere, so that Ray fuses decoding into the actors and no pixel
    # crosses the object store; 0.75 leaves the writing tasks room. A GPU is fed by its own tasks.
    reading = {"num_cpus": 1.0 if gpus else CPU_ACTOR_SLOTS}
    embedding = {"num_gpus": 1} if gpus else reading
    threads = 1 if gpus else max(1, cluster_cpus() // actors)
    dataset: Dataset = (
        ray.data.from_items(work, override_num_blocks=len(work))
        .map_batches(
            prepare_rows,
            batch_size=1,
            fn_kwargs={"task": task, "todo": todo},
            **reading,
        )
        .map_batches(
            Embedder,
            # On CPUs fused with preparing: what is counted then are pieces of work, not rows.
            batch_size=task.embed.batch_size if gpus else None,
            compute=ActorPoolStrategy(size=actors),
            fn_constructor_args=(task, threads),
            **embedding,
        )
        .map_batches(
            write_rows,
            # On CPUs a block is a piece of work, and is written as soon as it is embedded.
            batch_size=task.embed.rows_per_file if gpus else None,
            fn_kwargs={"task": task},
            num_cpus=0.25,
        )
    )
    yield from dataset.iter_rows()


def plan_work(diff: Diff, most: int) -> tuple[list[Any], list[dict[str, int]]]:
    """Divide what is to be embedded into pieces, each the work of one task.

    Args:
        diff: What is to be embedded.
        most: The most rows of a piece, as long as there are no more than `MAX_PIECES`.

    Returns:
        One reference a group to its rows, sorted by unit and vector id; and the pieces: group,
        start, stop.
    """
    rows = max(most, -(-diff.todo_rows // MAX_PIECES))
    groups = [number for number, count in enumerate(diff.counts.todo.tolist()) if count]
    todo = [_sort_todo.remote(*diff.todo[number]) for number in groups]
    pieces = []
    for place, number in enumerate(groups):
        count = int(diff.counts.todo[number])
        pieces += [
            {"group": place, "start": start, "stop": min(count, start + rows)}
            for start in range(0, count, rows)
        ]
    return todo, pieces


@ray.remote(num_cpus=1)
def _sort_todo(*parts: Records) -> Records:
    return sort_records(np.concatenate(parts), "unit", "vector_id")


@ray.remote(num_cpus=1)
def _write_deletes(task: EmbedTask, vector_ids: npt.NDArray[np.int64]) -> DataFile:
    return write_deletes(task.store, vector_ids, task) if len(vector_ids) else DataFile("", 0, 0)


def _set_data_context() -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # here: its import sets the level anew
    context = DataContext.get_current()
    for name, value in (
        ("target_max_block_size", 32 * 2**20),
        ("max_errored_blocks", 0),  # bad rows are ours to keep, Ray would drop whole blocks
        ("enable_progress_bars", False),
        ("execution_no_progress_timeout_s", -1),
        ("print_on_execution_start", False),
    ):
        if not hasattr(context, name):
            raise JobError(f"this version of Ray ({ray.__version__}) has no DataContext.{name}")
        setattr(context, name, value)
