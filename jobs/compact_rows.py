"""Which rows of the embeddings table are needed, and the tasks that count and carry them over.

Needed is the newest row of every vector id. A delete row is needed as long as an older row of its
id stays anywhere in the table, and where its generation is the newest of its encoder: generations
are counted on from it.

Letters: N rows, F files.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from jobs.buckets import Parts, Records, sort_records, split_rows
from jobs.embed_write import write_data_file
from jobs.outputs import regroup
from jobs.schemas import DELETE, EMBEDDINGS
from jobs.state import OPERATIONS, STATE_DTYPE, read_data_file
from jobs.store import DataFile, Store
from jobs.tasks import gather

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

FILE_ROWS = 8192
PLACE_DTYPE = np.dtype([("file", "<i4"), ("row", "<i4")])


def find_generation(state: Parts) -> int:
    """Return the newest generation of an encoder's rows; 0: it has none.

    Args:
        state: [bucket][group] references to `STATE_DTYPE` rows.
    """
    return max(gather([_newest_generation.remote(*parts) for parts in state]), default=0)


@ray.remote(num_cpus=1)
def _newest_generation(*parts: Records) -> int:
    return max((int(rows["generation"].max()) for rows in parts if len(rows)), default=0)


def count_needed(
    state: Parts, generation: int, rewritten: BoolArray
) -> tuple[Int64Array, BoolArray]:
    """Count the needed rows of each file, and mark the files with rows of equal age.

    Args:
        state: [bucket][group] references to `STATE_DTYPE` rows of one encoder.
        generation: Its newest.
        rewritten: (F,) bool: files of which only needed rows would stay.

    Returns:
        (F,) int64 and (F,) bool.
    """
    found = gather([_count_needed.remote(generation, rewritten, *parts) for parts in state])
    empty = np.zeros(len(rewritten), np.int64)
    needed = sum((one for one, _ in found), empty)
    return needed, np.any([empty > 0, *(ties for _, ties in found)], axis=0)


@ray.remote(num_cpus=1)
def _count_needed(
    generation: int, rewritten: BoolArray, *parts: Records
) -> tuple[Int64Array, BoolArray]:
    rows = _order(parts)
    needed = rows[mark_needed(rows, generation, rewritten)]
    tied = np.zeros(len(rewritten), bool)
    tied[rows["file"][mark_ties(rows)]] = True
    return np.bincount(needed["file"], minlength=len(rewritten)).astype(np.int64), tied


def _order(parts: tuple[Records, ...]) -> Records:
    rows = np.concatenate([np.zeros(0, STATE_DTYPE), *parts])
    return sort_records(rows, "vector_id", "generation", "file", "row")


def mark_needed(rows: Records, generation: int, rewritten: BoolArray) -> BoolArray:
    """Mark the rows that must stay in the table.

    Args:
        rows: (N,) `STATE_DTYPE` of one encoder: all of the ids among them, sorted by vector id,
            generation, file, row.
        generation: The encoder's newest.
        rewritten: (F,) bool: files of which only needed rows stay.

    Returns:
        (N,) bool; of files that stay, unneeded rows are not marked either.
    """
    if not len(rows):
        return np.zeros(0, bool)
    changes = rows["vector_id"][1:] != rows["vector_id"][:-1]
    newest, first = np.append(changes, True), np.append(True, changes)
    older_stays = np.add.reduceat(
        (~newest & ~rewritten[rows["file"]]).astype(np.int64), np.flatnonzero(first)
    )
    last = rows[newest]
    needed = np.zeros(len(rows), bool)
    needed[newest] = (
        (last["operation"] != OPERATIONS[DELETE])
        | (last["generation"] == generation)
        | (older_stays > 0)
    )
    return needed


def mark_ties(rows: Records) -> BoolArray:
    """Mark rows of the same vector id and generation, of sorted ones: (N,) bool."""
    same = np.ones(max(len(rows) - 1, 0), bool)
    for name in ("vector_id", "generation"):
        same &= rows[name][1:] == rows[name][:-1]
    tied = np.zeros(len(rows), bool)
    tied[1:] |= same
    tied[:-1] |= same
    return tied


@ray.remote(num_cpus=1)
def find_places(
    generation: int, rewritten: BoolArray, groups: Int64Array, total: int, *parts: Records
) -> tuple[Any, ...]:
    """Return how many rows of a bucket are carried over, and where they lie, by group."""
    rows = _order(parts)
    rows = rows[mark_needed(rows, generation, rewritten) & rewritten[rows["file"]]]
    places = np.zeros(len(rows), PLACE_DTYPE)
    for name in PLACE_DTYPE.names or ():
        places[name] = rows[name]
    return len(places), *split_rows(places, groups[places["file"]], total)


@ray.remote(num_cpus=1)
def rewrite(store: Store, names: list[str], *parts: Records) -> list[DataFile]:
    """Carry rows over into new data files; no commit names them yet."""
    places = sort_records(np.concatenate(parts), "file", "row")
    # Parts of one size: a small one at each end would soon be rewritten again.
    limit = -(-len(places) // -(-len(places) // FILE_ROWS))
    return [
        write_data_file(store, table, pc.max(table["generation"]).as_py())
        for table in regroup(_read_places(store, names, places), EMBEDDINGS, limit)
    ]


def _read_places(store: Store, names: list[str], places: Records) -> Iterator[pa.Table]:
    for number in np.unique(places["file"]).tolist():
        rows = pa.array(places["row"][places["file"] == number])
        table = read_data_file(store, names[number], EMBEDDINGS.names)
        yield table.select(EMBEDDINGS.names).cast(EMBEDDINGS).take(rows)
