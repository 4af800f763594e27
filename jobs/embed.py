"""The embedding stage: catalog rows in, committed Parquet files of the embeddings table out.

One streaming Ray Data execution: read units -> fetch, decode, tokenise (CPU tasks) -> embed
(actors) -> write a data file (tasks); on CPUs actors do it all, and neither pixels nor vectors
leave them. The driver commits the files as they come. What an actor asks Ray for is configured;
Ray's autoscaler, where there is one, starts machines for it.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from jobs.buckets import Records, sort_records
from jobs.diff import Diff
from jobs.duplicates import image_vectors
from jobs.embed_actors import SIDE_SLOTS, Actors, piece_rows, plan_actors, watched
from jobs.embed_steps import Embedder, EmbedTask, prepare_rows
from jobs.embed_write import COUNTS, PieceEmbedder, write_deletes, write_rows
from jobs.errors import JobError, StoreError
from jobs.metrics import count_file, show_backlog
from jobs.nodes import cluster_cpus, find_room
from jobs.store import DataFile
from jobs.tasks import gather, ray_errors
from jobs.trace import MOST_SPANS, Write, merge_writes, read_write

MAX_PIECES = 20_000
BLOCK_BYTES = 32 * 2**20

WrittenFiles = Generator[dict[str, Any], None, None]


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
    rows_fp32: int = 0
    rows_bf16: int = 0
    written_bytes: int = 0
    writes: list[Write] = field(default_factory=list)


def embed_rows(task: EmbedTask, diff: Diff, progress: Callable[[int, int], None]) -> EmbedResult:
    """Embed what the diff names and commit it to the embeddings table as it comes.

    Args:
        task: What to embed with.
        diff: Which rows; removed ones get a delete row.
        progress: Called with (rows done, of them rejected) whenever files are committed.

    Returns:
        Counts and times. The vectors never pass through this process.

    Raises:
        ConfigError: See `plan_actors`.
        JobError: A step failed; what was committed before stays, and the next run goes on.
    """
    started, result = time.monotonic(), EmbedResult()
    show_backlog(diff.todo_rows)
    pending: list[DataFile] = []
    last_commit = started
    try:
        with ray_errors(), closing(_embed(task, diff)) as rows:
            for row in rows:
                pending.append(DataFile(row["path"], row["size_bytes"], row["rows"]))
                _count(result, row)
                count_file(row)
                show_backlog(diff.todo_rows - result.embedded - result.rejected)
                if time.monotonic() - last_commit >= task.embed.commit_interval_s:
                    written, pending = pending, []  # a commit that fails is not made again
                    _commit(task, written)
                    last_commit = time.monotonic()
                progress(result.embedded + result.rejected, result.rejected)
    except JobError:  # of one step; what others wrote is whole
        _commit(task, pending)
        raise
    if diff.counts.removed:
        pending += gather([_write_deletes.remote(task, ids) for ids in diff.removed])
    _commit(task, pending)
    result.wall_s = time.monotonic() - started
    return result


def _commit(task: EmbedTask, files: list[DataFile]) -> None:
    files = [file for file in files if file.rows]
    if task.store.is_local:  # a machine that joined meanwhile may not share the folder
        for file in files:
            if not Path(task.store.uri("embeddings", file.path)).exists():
                raise StoreError(
                    f"{task.store.uri('embeddings', file.path)} is not there: a machine of the Ray "
                    "cluster wrote it to a folder of its own; use one that all share, or s3://"
                )
    if files:
        task.store.commit_embeddings(files)


def _count(result: EmbedResult, row: dict[str, Any]) -> None:
    result.embedded += row["rows"] - row["rejected"]
    result.rejected += row["rejected"]
    result.written_bytes += row["size_bytes"]
    for name in ("image_bytes", *COUNTS):
        setattr(result, name, getattr(result, name) + row[name])
    result.reasons.update(dict(zip(row["reason_names"], row["reason_counts"], strict=True)))
    for name in ("fetch_s", "decode_s", "tokenize_s", "embed_s", "write_s"):
        result.seconds[name] += row[name]
    result.writes.append(read_write(row))
    if len(result.writes) > 2 * MOST_SPANS:  # so that the driver's memory does not grow with them
        result.writes = merge_writes(result.writes, MOST_SPANS)


def _embed(task: EmbedTask, diff: Diff) -> WrittenFiles:
    if diff.todo_rows == 0:
        return
    actors = plan_actors(task.embed)
    work = plan_work(diff, partial(piece_rows, task.embed, actors))
    yield from _written_files(task, actors, *work)


def probe_rows(task: EmbedTask, diff: Diff, rows: int, pieces: int) -> Iterator[EmbedResult]:
    """Embed some of what the diff names and commit nothing.

    Args:
        task: What to embed with; its store gets data files.
        diff: Which rows.
        rows: How many a piece of work has, at most.
        pieces: How many, at most.

    Yields:
        Counts and times of one written data file after another.

    Raises:
        ConfigError: See `plan_actors`.
        JobError: A step failed.
    """
    actors = plan_actors(task.embed)
    todo, work = plan_work(diff, lambda left: rows)
    with ray_errors(), closing(_written_files(task, actors, todo, work[:pieces])) as files:
        for row in files:
            result = EmbedResult()
            _count(result, row)
            yield result


def _written_files(
    task: EmbedTask, actors: Actors, todo: list[Any], work: list[dict[str, int]]
) -> WrittenFiles:
    """Run the pipeline over pieces of work; yield one small row a written data file."""
    task.store.embeddings()  # made if there is none: data files lie in its folder
    rows = task.embed.duplicate_cache_rows if task.shares_images else 0
    with (
        image_vectors(rows, task.space.dim) as handle,
        watched(actors, Embedder.__name__) as get_on,
        # On CPUs a block is a file's name, and goes to the driver as soon as it is there.
        DataContext.current(_data_context(BLOCK_BYTES if actors.gpus else 1)),
    ):
        for row in _run_steps(replace(task, image_vectors=handle), actors, todo, work):
            get_on()
            yield row


def _run_steps(
    task: EmbedTask, actors: Actors, todo: list[Any], work: list[dict[str, int]]
) -> WrittenFiles:
    pool, size = _pool(task, actors, work)
    pieces: Dataset = ray.data.from_items(work, override_num_blocks=len(work))
    if actors.gpus:
        dataset = (
            pieces.map_batches(
                prepare_rows, batch_size=1, fn_kwargs={"task": task, "todo": todo}, num_cpus=1.0
            )
            .map_batches(
                Embedder,
                batch_size=task.embed.batch_size,
                compute=pool,
                fn_constructor_args=(task, 1),
                fn_constructor_kwargs={"on_gpu": True},
                **actors.options,
            )
            .map_batches(
                write_rows,
                batch_size=task.embed.rows_per_file,
                fn_kwargs={"task": task},
                num_cpus=SIDE_SLOTS,
            )
        )
    else:
        shared = min(find_room(0).cpus, max(1, cluster_cpus() // size))
        dataset = pieces.map_batches(
            PieceEmbedder,
            batch_size=1,
            compute=pool,
            fn_constructor_args=(task, task.embed.cpus_per_actor or shared, todo),
            **actors.options,
        )
    yield from dataset.iter_rows()


def _pool(
    task: EmbedTask, actors: Actors, work: list[dict[str, int]]
) -> tuple[ActorPoolStrategy, int]:
    """Return the pool and the actors that it begins with: no more than there is work for."""
    most = len(work)
    if actors.gpus:  # a GPU may have to be started: not for less than a file of rows
        rows = sum(piece["stop"] - piece["start"] for piece in work)
        most = -(-rows // task.embed.rows_per_file)
    size = min(actors.count, most)
    return ActorPoolStrategy(min_size=size, max_size=size if actors.fixed else most), size


def plan_work(diff: Diff, piece: Callable[[int], int]) -> tuple[list[Any], list[dict[str, int]]]:
    """Divide what is to be embedded into pieces, each the work of one task.

    Args:
        diff: What is to be embedded.
        piece: Rows that are in no piece yet to the most of the next one, as long as there are no
            more than about `MAX_PIECES`.

    Returns:
        One reference a group to its rows, sorted by unit and vector id; and the pieces: group,
        start, stop.
    """
    left, least = diff.todo_rows, -(-diff.todo_rows // MAX_PIECES)
    groups = [number for number, count in enumerate(diff.counts.todo.tolist()) if count]
    todo = [_sort_todo.remote(*diff.todo[number]) for number in groups]
    pieces = []
    for place, number in enumerate(groups):
        stop, count = 0, int(diff.counts.todo[number])
        while stop < count:
            start, stop = stop, min(count, stop + max(least, piece(left)))
            pieces.append({"group": place, "start": start, "stop": stop})
            left -= stop - start
    return todo, pieces


@ray.remote(num_cpus=SIDE_SLOTS)
def _sort_todo(*parts: Records) -> Records:
    return sort_records(np.concatenate(parts), "unit", "vector_id")


@ray.remote(num_cpus=1)
def _write_deletes(task: EmbedTask, vector_ids: npt.NDArray[np.int64]) -> DataFile:
    return write_deletes(task.store, vector_ids, task) if len(vector_ids) else DataFile("", 0, 0)


def _data_context(block_bytes: int) -> DataContext:
    """Return Ray Data's settings for the stage alone: this process may have uses of its own."""
    # Here: its import sets the level anew. What goes wrong reaches us as exceptions.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current().copy()
    for name, value in (
        ("target_max_block_size", block_bytes),
        ("max_errored_blocks", 0),  # bad rows are ours to keep, Ray would drop whole blocks
        ("raise_original_map_exception", True),  # the wrapped one does not outlive its pickling
        ("enable_progress_bars", False),
        ("execution_no_progress_timeout_s", -1),
        ("print_on_execution_start", False),
    ):
        if not hasattr(context, name):
            raise JobError(f"this version of Ray ({ray.__version__}) has no DataContext.{name}")
        setattr(context, name, value)
    return context
