"""Rewrites data files of the embeddings table of which little is needed.

Needed are rows of the encoders that are kept, as `jobs.compact_rows` says. They are carried over as
they are; what a release reads is its own list of files, which stay until the release is dropped.

Which rows are needed is joined by buckets of ids (see `jobs.buckets`); a task that rewrites holds
one data file, and the rows of the one that it writes.

Letters: F files.
"""

from dataclasses import dataclass, field

import numpy as np
import ray

from jobs.buckets import Parts, count_buckets, make_groups, turn
from jobs.compact_rows import (
    FILE_ROWS,
    BoolArray,
    Int64Array,
    count_needed,
    find_generation,
    find_places,
    rewrite,
)
from jobs.delta import read_actions, table_errors
from jobs.files import replace_files
from jobs.schemas import EMBEDDINGS
from jobs.state import read_data_file, read_state
from jobs.store import DataFile, Store, add_action
from jobs.tasks import gather

SMALL_ROWS = FILE_ROWS // 4
MANY_SMALL = 8  # fewer small files are left alone
MIN_NEEDED = 0.7  # share of a file's rows
TASK_ROWS = 8 * FILE_ROWS


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """The data files of one version of the embeddings table, sorted by name.

    Attributes:
        rows: (F,) int64.
        size_bytes: (F,) int64.
    """

    version: int
    names: list[str] = field(repr=False)
    rows: Int64Array = field(repr=False)
    size_bytes: Int64Array = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """The rows of one encoder.

    Attributes:
        state: [bucket][group] references to `STATE_DTYPE` rows.
        generation: The newest.
        needed: (F,) int64: how many rows of each file are needed.
    """

    state: Parts = field(repr=False)
    generation: int
    needed: Int64Array = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class CompactionPlan:
    """What a compaction would rewrite.

    Attributes:
        rewritten: (F,) bool: which files.
        dropped_rows: Rows of them that nothing needs.
        kept_rows: Rows of them that are carried over.
    """

    files: TableFiles
    encoders: list[_Encoder] = field(repr=False)
    rewritten: BoolArray = field(repr=False)
    dropped_rows: int
    kept_rows: int


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What a compaction did, or would do.

    Attributes:
        done: Whether it is committed.
        files: Data files that the newest version of the table names no more.
        written: Data files in their place; 0 before it is done.
        dropped_rows: Rows that nothing needs.
        note: Why it was not done; else empty.
    """

    done: bool
    files: int = 0
    bytes: int = 0
    written: int = 0
    written_bytes: int = 0
    dropped_rows: int = 0
    note: str = ""


def list_table(store: Store) -> TableFiles:
    """List the data files of the newest version of the embeddings table.

    Raises:
        StoreError: The table can't be read.
    """
    table, address = store.embeddings(), store.uri("embeddings")
    with table_errors(address, "read"):
        actions = read_actions(table, address).sort_by("path")
    return TableFiles(
        version=table.version(),
        names=actions["path"].to_pylist(),
        rows=np.array(actions["num_records"].to_pylist(), np.int64),
        size_bytes=np.array(actions["size_bytes"].to_pylist(), np.int64),
    )


def find_encoders(store: Store, files: TableFiles, bucket_rows: int) -> dict[str, float]:
    """Find the encoders that have rows in the table.

    Returns:
        Fingerprint to when its newest row was written, in seconds since 1970.

    Raises:
        StoreError: A data file is missing or damaged.
    """
    groups = make_groups(len(files.names), int(files.rows.sum()), bucket_rows)
    calls = [_find_encoders.remote(store, files.names[g.start : g.stop]) for g in groups]
    newest: dict[str, float] = {}
    for found in gather(calls):
        for encoder, written in found.items():
            newest[encoder] = max(written, newest.get(encoder, 0.0))
    return newest


@ray.remote(num_cpus=1)
def _find_encoders(store: Store, names: list[str]) -> dict[str, float]:
    newest: dict[str, float] = {}
    for name in names:
        table = read_data_file(store, name, ["encoder", "written_at"])
        found = table.group_by("encoder").aggregate([("written_at", "max")]).to_pylist()
        for row in found:
            written = row["written_at_max"].timestamp()
            newest[row["encoder"]] = max(written, newest.get(row["encoder"], 0.0))
    return newest


def plan_compaction(
    store: Store, files: TableFiles, encoders: list[str], bucket_rows: int
) -> CompactionPlan:
    """Find which data files to rewrite.

    Args:
        store: The store.
        files: The table.
        encoders: Fingerprints; rows of others are not needed.
        bucket_rows: About how many rows one task reads or joins.

    Raises:
        StoreError: A data file is missing or damaged.
    """
    buckets = count_buckets(int(files.rows.sum()), bucket_rows)
    states = [
        read_state(store, files.version, encoder, buckets, bucket_rows) for encoder in encoders
    ]
    newest = [find_generation(state) for state in states]
    everything = np.ones(len(files.names), bool)
    counted = [count_needed(s, g, everything) for s, g in zip(states, newest, strict=True)]
    tied = np.any([everything & False, *(ties for _, ties in counted)], axis=0)
    rewritten = _choose_files(files, [needed for needed, _ in counted], everything)
    # Deletes whose older rows lie in files that stay are needed after all.
    counted = [count_needed(s, g, rewritten) for s, g in zip(states, newest, strict=True)]
    rewritten = _choose_files(files, [needed for needed, _ in counted], rewritten)
    if (rewritten & tied).any():
        # Which of two rows of one id and generation is newer, the names of their files decide.
        rewritten |= tied
    counted = [count_needed(s, g, rewritten) for s, g in zip(states, newest, strict=True)]
    kept = sum(int(needed[rewritten].sum()) for needed, _ in counted)
    return CompactionPlan(
        files=files,
        encoders=[
            _Encoder(state=state, generation=generation, needed=needed)
            for state, generation, (needed, _) in zip(states, newest, counted, strict=True)
        ],
        rewritten=rewritten,
        dropped_rows=int(files.rows[rewritten].sum()) - kept,
        kept_rows=kept,
    )


def _choose_files(files: TableFiles, needed: list[Int64Array], candidates: BoolArray) -> BoolArray:
    """Choose the files of which little is needed, and the small ones if they are many."""
    rows = sum(needed, np.zeros(len(files.names), np.int64))
    small = candidates & (rows < SMALL_ROWS)
    if small.sum() < MANY_SMALL:
        small[:] = False
    return candidates & ((rows < MIN_NEEDED * files.rows) | small)


def compact(store: Store, plan: CompactionPlan) -> Compaction:
    """Rewrite the planned files and commit them at once; rows appended meanwhile stay.

    Raises:
        StoreError: A file can't be read or written; nothing is committed.
    """
    files = plan.files
    chosen = np.flatnonzero(plan.rewritten).tolist()
    if not chosen:
        return Compaction(done=False, note="no data file is worth it")
    written: list[DataFile] = []
    for encoder in plan.encoders:
        written += _rewrite_encoder(store, plan, encoder)
    removed = {files.names[number]: int(files.size_bytes[number]) for number in chosen}
    # Nothing that a reader sees changes; `data_change` stays true for Delta's conflict checks.
    actions = [add_action(file) for file in written]
    if not replace_files(store.uri("embeddings"), actions, removed, EMBEDDINGS):
        return Compaction(done=False, note="another job rewrote the same data files")
    return Compaction(
        done=True,
        files=len(chosen),
        bytes=sum(removed.values()),
        written=len(written),
        written_bytes=sum(file.size_bytes for file in written),
        dropped_rows=plan.dropped_rows,
    )


def _rewrite_encoder(store: Store, plan: CompactionPlan, encoder: _Encoder) -> list[DataFile]:
    counts = np.where(plan.rewritten, encoder.needed, 0)
    groups = np.full(len(counts), -1)
    filled = counts > 0
    before = np.cumsum(counts) - counts
    _, groups[filled] = np.unique(before[filled] // TASK_ROWS, return_inverse=True)
    total = int(groups.max(initial=-1)) + 1
    if not total:
        return []
    calls = [
        find_places.options(num_returns=1 + total).remote(
            encoder.generation, plan.rewritten, groups, total, *parts
        )
        for parts in encoder.state
    ]
    gather([call[0] for call in calls])
    places = turn([list(call[1:]) for call in calls], total)
    written = [rewrite.remote(store, plan.files.names, *parts) for parts in places]
    return [file for files in gather(written) for file in files]
