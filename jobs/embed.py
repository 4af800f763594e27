"""The embedding stage: catalog rows in, committed Parquet files of the embeddings table out.

One streaming Ray Data execution: read units -> fetch, decode, tokenise (CPU tasks) -> embed
(actors) -> write a data file (tasks); the driver commits the files as they come.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from jobs.cluster import cluster_cpus, cluster_gpus, job_error
from jobs.diff import Diff
from jobs.embed_steps import Embedder, EmbedTask, prepare_rows
from jobs.embed_write import write_data_file, write_rows
from jobs.errors import JobError
from jobs.schemas import DELETE, EMBEDDINGS
from jobs.store import DataFile

CPU_ACTOR_SLOTS = 0.75


@dataclass
class EmbedResult:
    """What an embedding run did. Counts are rows, times are seconds."""

    embedded: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0
    image_bytes: int = 0


def embed_items(task: EmbedTask, diff: Diff, progress: Callable[[int, int], None]) -> EmbedResult:
    """Embed what the diff names and commit it to the embeddings table as it comes.

    Args:
        task: What to embed with.
        diff: Which items; removed ones get a delete row.
        progress: Called with (rows done, of them rejected) whenever files are committed.

    Returns:
        Counts and times. The vectors never pass through this process.

    Raises:
        JobError: A step failed; what was committed before stays, and the next run goes on.
    """
    started, result = time.monotonic(), EmbedResult()
    pending: list[DataFile] = []
    last_commit = started
    try:
        for row in _written_files(task, diff) if len(diff.todo) else ():
            pending.append(DataFile(row["path"], row["size_bytes"], row["rows"]))
            _count(result, row)
            if time.monotonic() - last_commit >= task.embed.commit_interval_s:
                task.store.commit_embeddings(pending)
                pending, last_commit = [], time.monotonic()
            progress(result.embedded + result.rejected, result.rejected)
    except ray.exceptions.RayError as error:
        cause = job_error(error)
        if isinstance(cause, JobError):
            raise cause from error
        raise
    if len(diff.removed):
        pending.append(_write_deletes(task, diff))
    if pending:
        task.store.commit_embeddings(pending)
    result.wall_s = time.monotonic() - started
    return result


def _count(result: EmbedResult, row: dict[str, Any]) -> None:
    result.embedded += row["rows"] - row["rejected"]
    result.rejected += row["rejected"]
    result.image_bytes += row["image_bytes"]
    result.reasons.update(dict(zip(row["reason_names"], row["reason_counts"], strict=True)))
    for name in ("fetch_s", "decode_s", "tokenize_s", "embed_s", "write_s"):
        result.seconds[name] += row[name]


def _written_files(task: EmbedTask, diff: Diff) -> Iterator[dict[str, Any]]:
    """Run the pipeline; yield one small row a written data file."""
    _set_data_context()
    gpus = cluster_gpus()
    units = len(task.catalog.units)
    actors = min(task.embed.actors or gpus or cluster_cpus(), units)
    # On CPUs the same slots everywhere, so that Ray fuses decoding into the actors and no pixel
    # crosses the object store; 0.75 leaves the writing tasks room. A GPU is fed by its own tasks.
    reading = {"num_cpus": 1.0 if gpus else CPU_ACTOR_SLOTS}
    embedding = {"num_gpus": 1} if gpus else reading
    threads = 1 if gpus else max(1, cluster_cpus() // actors)
    todo = ray.put(diff.todo)
    numbers = [{"unit": number} for number in range(units)]
    dataset: Dataset = (
        ray.data.from_items(numbers, override_num_blocks=units)
        .map_batches(
            prepare_rows,
            batch_size=1,
            fn_kwargs={"task": task, "todo": todo},
            **reading,
        )
        .map_batches(
            Embedder,
            batch_size=task.embed.batch_size,
            compute=ActorPoolStrategy(size=actors),
            fn_constructor_args=(task, threads),
            **embedding,
        )
        .map_batches(
            write_rows, batch_size=task.embed.rows_per_file, fn_kwargs={"task": task}, num_cpus=0.25
        )
    )
    yield from dataset.iter_rows()


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


def _write_deletes(task: EmbedTask, diff: Diff) -> DataFile:
    rows = len(diff.removed)
    columns = {
        "vector_id": pa.array(diff.removed),
        "generation": pa.array(np.full(rows, task.generation, np.int64)),
        "operation": pa.array([DELETE] * rows),
        "encoder": pa.array([task.space.encoder] * rows),
        "content_hash": pa.array(np.zeros(rows, np.int64)),
    }
    table = pa.table(
        {f.name: columns.get(f.name, pa.nulls(rows, f.type)) for f in EMBEDDINGS}, EMBEDDINGS
    )
    return write_data_file(task.store, table, task.generation)
