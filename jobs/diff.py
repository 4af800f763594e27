"""Compares the catalog with the embeddings table: what is new, changed, removed, to be retried.

Resuming is this diff: rows are committed while a job runs, so a job that starts again finds them
unchanged. It is a join by buckets of vector ids (see `jobs.buckets`): a task holds some 200 bytes
a row of one bucket or group, `ray.bucket_rows` of them, and this process no row at all.
"""

from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from jobs.buckets import (
    Parts,
    Records,
    count_buckets,
    make_groups,
    scatter,
    sort_records,
    split_by_bucket,
    split_rows,
    turn,
)
from jobs.catalog import Catalog
from jobs.config import JobConfig
from jobs.images import ImagesConfig, hash_limits
from jobs.items import PLAN_DTYPE, explain_duplicates, scan_unit
from jobs.schemas import DELETE, REJECT
from jobs.state import (
    OPERATIONS,
    REASONS,
    RELEASED_DTYPE,
    STATE_DTYPE,
    newest_rows,
    read_released,
    read_state,
    take_rows,
)
from jobs.store import Release, Store
from jobs.tasks import gather

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

EXAMPLES = 3
MAX_TWICE = 10_000
EMBED_DTYPE = np.dtype(
    [
        ("vector_id", "<i8"),
        ("image_hash", "<i8"),
        ("text_hash", "<i8"),
        ("etag_hash", "<i8"),
        ("first_seen", "<i8"),
        ("attempts", "<i4"),
        ("unit", "<i4"),
    ]
)
"""A row to embed; `attempts` and `first_seen` are those of a reject that is tried again, else 0."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The scanned catalog; the rows are `PLAN_DTYPE` in Ray's object store.

    Attributes:
        groups: Units of each group.
        parts: [bucket][group].
        rows: Rows (product images) in the catalog.
    """

    groups: list[range]
    parts: Parts = field(repr=False)
    rows: int

    @property
    def buckets(self) -> int:
        """How many ranges of ids there are."""
        return len(self.parts)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Which rows of unchanged content are tried again.

    Attributes:
        max_attempts: How often a passing fault is tried in all.
        limits_hash: Of the configured limits: rows that others refused, or masked, are.
        published_us: When the newest release was made, microseconds since 1970; what lacked its
            picture in a run that published nothing is: it may have been the mount or the key.
    """

    max_attempts: int
    limits_hash: int
    published_us: int

    def applies(self, rows: Records) -> BoolArray:
        """Say for each of (N,) `STATE_DTYPE` rows whether it is tried again."""
        transient, configured, surrounding = (
            np.array([False, *(getattr(reason, kind) for reason in REASONS)])[rows["reason"]]
            for kind in ("transient", "configured", "surrounding")
        )
        rejected = rows["operation"] == OPERATIONS[REJECT]
        passing = rejected & transient & (rows["attempts"] < self.max_attempts)
        limited = configured & (rows["limits_hash"] != self.limits_hash)
        unpublished = surrounding & (rows["written_at"] > self.published_us)
        return np.asarray(passing | limited | unpublished)


def read_retry(config: JobConfig, release: Release | None) -> Retry:
    """Return what the next refresh tries again.

    Args:
        config: The job.
        release: The newest release of the encoder.
    """
    # Release times are whole seconds, rounded down.
    published = datetime.fromisoformat(release.created_at).timestamp() + 1 if release else 0.0
    return Retry(
        max_attempts=config.images.max_attempts,
        limits_hash=hash_limits(config.images, config.catalog.max_text_chars),
        published_us=int(published * 1_000_000),
    )


@dataclass(kw_only=True)
class Counts:
    """What the comparison found, in rows (product images); of a bucket, or of all.

    Attributes:
        changed_text: Of the changed ones, those whose text alone differs (the template too).
        changed_image: Those whose image alone differs: its reference, version or ETag.
        retried: Unchanged rows that are tried again: rejects, and some that lack a modality.
        formerly_rejected: Of all that is to be embedded, what was a reject before.
        metadata_changed: Of the unchanged ones, those whose other columns differ.
        released: Unchanged and live in the newest release as they are.
        generation: The newest in the table; 0: none.
        todo: To be embedded, a number a group of units.
        twice: Some vector ids that are in the catalog more than once.
        examples: Kind to (vector id, unit), and for `removed` (vector id, file, row).
    """

    new: int = 0
    changed: int = 0
    changed_text: int = 0
    changed_image: int = 0
    retried: int = 0
    formerly_rejected: int = 0
    removed: int = 0
    unchanged: int = 0
    metadata_changed: int = 0
    released: int = 0
    live: int = 0
    generation: int = 0
    todo: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    twice: set[int] = field(default_factory=set)
    examples: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)

    def add(self, other: "Counts") -> None:
        """Add another bucket's counts."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if name == "generation":
                self.generation = max(mine, value)
            elif name == "todo":
                self.todo = value + mine if len(mine) else value
            elif name == "twice":
                self.twice |= value if len(mine) < MAX_TWICE else set()
            elif name == "examples":
                for kind, found in value.items():
                    mine[kind] = (mine.get(kind, []) + found)[:EXAMPLES]
            else:
                setattr(self, name, mine + value)


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What a refresh has to do.

    Attributes:
        plan: The whole catalog.
        counts: In rows.
        todo: [group of units][bucket] references to `EMBED_DTYPE` rows.
        removed: One reference a bucket to sorted (R,) int64 vector ids that are in the table and
            no longer in the catalog.
        version: Of the embeddings table that was compared with; None: there was no table.
        up_to_date: Nothing to embed or remove, and the newest release shows just these rows.
    """

    plan: Plan
    counts: Counts
    todo: Parts = field(repr=False)
    removed: list[Any] = field(repr=False)
    version: int | None
    up_to_date: bool

    @property
    def todo_rows(self) -> int:
        """How many rows are to be embedded."""
        return self.counts.new + self.counts.changed + self.counts.retried


def compare_with_store(
    catalog: Catalog,
    store: Store,
    encoder: str,
    recipe: str,
    *,
    images: ImagesConfig,
    bucket_rows: int,
    parent: Release | None,
    retry: Retry,
) -> Diff:
    """Compare the catalog with the rows of one encoder in the embeddings table.

    Args:
        catalog: The checked catalog.
        store: The store.
        encoder: Fingerprint; rows of others don't count.
        recipe: See `VectorSpace.recipe`.
        images: Says whether ETags are asked for.
        bucket_rows: About how many rows one task compares.
        parent: The newest release.
        retry: Which rejects are tried again.

    Raises:
        CatalogError: A product id is null, empty or occurs twice, or a file is damaged.
        StoreError: The table or the release can't be read.
    """
    version = store.embeddings_version()
    rows = max(catalog.images, sum(store.embedding_counts(version)))
    plan = scan_catalog(catalog, recipe, images, count_buckets(rows, bucket_rows), bucket_rows)
    state = read_state(store, version, encoder, plan.buckets, bucket_rows)
    released = read_released(store, parent, plan.buckets, bucket_rows)
    starts = np.array([group.start for group in plan.groups], np.int64)
    calls = [
        _compare.options(num_returns=2 + len(plan.groups)).remote(
            starts, retry, [len(p) for p in parts], *parts[0], *parts[1], *parts[2]
        )
        for parts in zip(plan.parts, state, released, strict=True)
    ]
    counts = Counts()
    for found in gather([call[0] for call in calls]):
        counts.add(found)
    if counts.twice:
        raise explain_duplicates(catalog, counts.twice)
    todo = turn([list(call[2:]) for call in calls], len(plan.groups))
    return Diff(
        plan=plan,
        counts=counts,
        todo=todo,
        removed=[call[1] for call in calls],
        version=version,
        up_to_date=parent is not None and _is_up_to_date(counts, plan.rows, parent),
    )


def _is_up_to_date(counts: Counts, rows: int, parent: Release) -> bool:
    waiting = counts.new + counts.changed + counts.retried + counts.removed
    # Rows too: those that a run rejected and did not publish must come before the gate again.
    same = counts.live == counts.released == parent.vectors and rows == parent.rows
    return same and not waiting and not counts.metadata_changed


def scan_catalog(
    catalog: Catalog, recipe: str, images: ImagesConfig, buckets: int, bucket_rows: int
) -> Plan:
    """Find every item's identity and hashes, by Ray tasks.

    Raises:
        CatalogError: A product id is null or empty, or a file is damaged.
    """
    groups = make_groups(len(catalog.units), catalog.images, bucket_rows)
    heads, parts = scatter(_scan_group, groups, buckets, ray.put(catalog), recipe, images)
    return Plan(groups=groups, parts=turn(parts, buckets), rows=sum(gather(heads)))


@ray.remote(num_cpus=1)
def _scan_group(
    catalog: Catalog, recipe: str, images: ImagesConfig, units: range, buckets: int
) -> tuple[Any, ...]:
    rows = np.concatenate([scan_unit(catalog, number, recipe, images) for number in units])
    return len(rows), *split_by_bucket(rows, buckets)


@ray.remote(num_cpus=1)
def _compare(
    starts: Int64Array, retry: Retry, counts: list[int], *parts: Records
) -> tuple[Any, ...]:
    """Compare one bucket; return its counts, the ids to remove, and what to embed by group."""
    plan, state, released = join_parts(counts, parts)
    found, todo, removed = compare_rows(plan, state, released, retry)
    groups = np.searchsorted(starts, todo["unit"], side="right") - 1
    found.todo = np.bincount(groups, minlength=len(starts)).astype(np.int64)
    return found, removed, *split_rows(todo, groups, len(starts))


def join_parts(counts: list[int], parts: tuple[Records, ...]) -> tuple[Records, Records, Records]:
    """Join a bucket's parts of plan, table and release; sorted by vector id, newest rows alone.

    Args:
        counts: How many of the parts belong to plan, table and release.
        parts: `PLAN_DTYPE`, `STATE_DTYPE` and `RELEASED_DTYPE` rows.
    """
    edges = np.cumsum([0, *counts])
    kinds = [list(parts[low:high]) for low, high in pairwise(edges)]
    plan = sort_records(np.concatenate([np.zeros(0, PLAN_DTYPE), *kinds[0]]), "vector_id")
    state = newest_rows(np.concatenate([np.zeros(0, STATE_DTYPE), *kinds[1]]))
    released = np.concatenate([np.zeros(0, RELEASED_DTYPE), *kinds[2]])
    return plan, state, sort_records(released, "vector_id")


def compare_rows(
    plan: Records, state: Records, released: Records, retry: Retry
) -> tuple[Counts, Records, Int64Array]:
    """Compare the rows of one bucket.

    Args:
        plan: (N,) `PLAN_DTYPE`, sorted by vector id: the catalog.
        state: (M,) `STATE_DTYPE`, the newest row of each id, sorted.
        released: (R,) `RELEASED_DTYPE`, sorted: the newest release.
        retry: Which rejects are tried again.

    Returns:
        Counts; (T,) `EMBED_DTYPE` rows to embed; and sorted vector ids to remove.
    """
    twice = plan["vector_id"][1:][plan["vector_id"][1:] == plan["vector_id"][:-1]]
    stored, known = take_rows(state, plan["vector_id"])
    known &= stored["operation"] != OPERATIONS[DELETE]
    text, image = known & ~_same_text(plan, stored), known & ~_same_image(plan, stored)
    rejected = known & (stored["operation"] == OPERATIONS[REJECT])
    same = known & ~text & ~image
    retried = same & retry.applies(stored)
    shown, in_release = take_rows(released, plan["vector_id"])
    unchanged = same & ~retried
    live = unchanged & ~rejected
    kept = live & in_release & (shown["generation"] == stored["generation"])
    priced = kept & (shown["metadata_hash"] != plan["metadata_hash"])
    gone = ~take_rows(plan, state["vector_id"])[1] & (state["operation"] != OPERATIONS[DELETE])
    todo = make_todo(plan, stored, ~unchanged, retried)
    kinds = {"new": ~known, "changed": text | image, "retried": retried, "metadata": priced}
    examples: dict[str, list[tuple[int, ...]]] = {
        kind: [(int(r["vector_id"]), int(r["unit"])) for r in plan[mask][:EXAMPLES]]
        for kind, mask in kinds.items()
    }
    examples["removed"] = [
        (int(r["vector_id"]), int(r["file"]), int(r["row"])) for r in state[gone][:EXAMPLES]
    ]
    counts = Counts(
        new=int((~known).sum()),
        changed=int((text | image).sum()),
        changed_text=int((text & ~image).sum()),
        changed_image=int((image & ~text).sum()),
        retried=int(retried.sum()),
        formerly_rejected=int((rejected & ~unchanged).sum()),
        removed=int(gone.sum()),
        unchanged=int(unchanged.sum()),
        metadata_changed=int(priced.sum()),
        released=int(kept.sum()),
        live=int(live.sum()),
        generation=int(state["generation"].max()) if len(state) else 0,
        twice=set(twice[:MAX_TWICE].tolist()),
        examples=examples,
    )
    return counts, todo, state["vector_id"][gone]


def _same_text(plan: Records, stored: Records) -> BoolArray:
    return np.asarray(plan["text_hash"] == stored["text_hash"])


def _same_image(plan: Records, stored: Records) -> BoolArray:
    """Compare images; an ETag that could not be had says nothing."""
    etag = (plan["etag_hash"] == 0) | (plan["etag_hash"] == stored["etag_hash"])
    return np.asarray((plan["image_hash"] == stored["image_hash"]) & etag)


def same_content(plan: Records, stored: Records) -> BoolArray:
    """Say which stored rows were made of what the catalog holds: (N,) bool of (N,) pairs."""
    return _same_text(plan, stored) & _same_image(plan, stored)


def make_todo(plan: Records, stored: Records, wanted: BoolArray, retried: BoolArray) -> Records:
    """Return `EMBED_DTYPE` rows of the wanted ones among the (N,) rows of a plan."""
    todo = np.zeros(int(wanted.sum()), EMBED_DTYPE)
    for name in ("vector_id", "image_hash", "text_hash", "etag_hash", "unit"):
        todo[name] = plan[name][wanted]
    for name in ("attempts", "first_seen"):
        todo[name] = np.where(retried, stored[name], 0)[wanted]
    return todo
