"""Joins the catalog with the embeddings table after embedding: which rows a release is made of.

Live are the catalog's rows whose newest row in the table is an upsert of the same content. The
join is by buckets, as the diff is; what leaves a bucket's task is divided by data file, since
vectors are read a file at a time.

Letters: N rows.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from jobs.buckets import Parts, Records, make_groups, split_rows, turn
from jobs.diff import Plan, join_parts, same_content
from jobs.errors import PublishConflictError
from jobs.schemas import PRECISIONS, REJECT, UPSERT
from jobs.state import OPERATIONS, REASONS, read_released, read_state, take_rows
from jobs.store import Release, Store
from jobs.tasks import gather

BoolArray = npt.NDArray[np.bool_]
Reason = tuple[str, str]
"""Operation and reject reason: what is wrong with a reject, or what a live row lacks."""

EXAMPLES = 3
LIVE_DTYPE = np.dtype(
    [
        ("vector_id", "<i8"),
        ("generation", "<i8"),
        ("metadata_hash", "<i8"),
        ("content", "<i8"),
        ("file", "<i4"),
        ("row", "<i4"),
        ("first", "?"),
        ("fresh", "?"),
        ("fresh_first", "?"),
    ]
)
"""A live row: where its vectors are, the hash of its image's bytes (0: none), and whether it is its
product's first live image (a text field is indexed once a product). `fresh`: not in the newest
release as it is; `fresh_first`: nor as the first of its product."""

STALE_DTYPE = np.dtype([("vector_id", "<i8"), ("all", "?"), ("first", "?")])
"""A row of the newest release that is live no more as it was: `all`: in any field, `first`: in a
field that is indexed once a product."""


@dataclass(frozen=True, kw_only=True)
class LiveRows:
    """The rows a release is made of, in Ray's object store.

    Attributes:
        files: Of each group of data files: the number of the first one, and their names.
        group_rows: How many live rows each group has.
        file_rows: How many rows, live or not, the largest data file of the table has.
        parts: [group of files][bucket] references to `LIVE_DTYPE` rows.
        vectors: How many rows are live.
        products: How many products have a live row.
        rejected: Catalog rows that are not live.
        most_images: The most images of any product in the catalog.
    """

    files: list[tuple[int, list[str]]] = field(repr=False)
    group_rows: list[int] = field(repr=False)
    file_rows: int
    parts: Parts = field(repr=False)
    vectors: int
    products: int
    rejected: int
    most_images: int

    def count(self, name: str) -> int:
        """Return how many vectors the index of a field holds."""
        return self.products if name == "text" else self.vectors


@dataclass(frozen=True, kw_only=True)
class Live:
    """What the join after embedding found.

    Attributes:
        rows: The live rows, by data file.
        buckets: One reference a bucket to its `LIVE_DTYPE` rows, sorted by vector id.
        stale: One reference a bucket to `STALE_DTYPE` rows, sorted.
        names: All data files of the table's version.
        reasons: Rows of each (operation, reason).
        examples: (file, row) of some of them.
        precisions: How many live rows were embedded in each; of a reindex: not counted.
    """

    rows: LiveRows
    buckets: list[Any] = field(repr=False)
    stale: list[Any] = field(repr=False)
    names: list[str] = field(repr=False)
    reasons: Counter[Reason]
    examples: dict[Reason, list[tuple[int, int]]]
    precisions: Counter[str] = field(default_factory=Counter)


@dataclass(kw_only=True)
class _Found:
    """One bucket's share of `Live`, and how many rows neither are live nor have a reason."""

    live: int
    products: int
    most_images: int
    lost: int
    reasons: Counter[Reason]
    examples: dict[Reason, list[tuple[int, int]]]
    by_group: npt.NDArray[np.int64]
    precisions: Counter[str]


def join_live(
    plan: Plan,
    store: Store,
    version: int,
    encoder: str,
    *,
    bucket_rows: int,
    parent: Release | None,
) -> Live:
    """Find the live rows of the catalog in a version of the table.

    Args:
        plan: The scanned catalog.
        store: The store.
        version: Of the embeddings table, after embedding.
        encoder: Fingerprint; rows of others don't count.
        bucket_rows: About how many rows one task joins.
        parent: The release that the new one follows: rows that it has as they are aren't fresh.

    Raises:
        PublishConflictError: Rows were overwritten by another job meanwhile, or the catalog
            lost them before they were embedded.
        StoreError: The table or the release can't be read.
    """
    names, counts = store.embedding_files(version), store.embedding_counts(version)
    groups = make_groups(len(names), sum(counts), bucket_rows)
    starts = np.array([group.start for group in groups], np.int64)
    state = read_state(store, version, encoder, plan.buckets, bucket_rows)
    released = read_released(store, parent, plan.buckets, bucket_rows)
    calls = [
        _join.options(num_returns=3 + len(groups)).remote(
            starts, [len(p) for p in parts], *parts[0], *parts[1], *parts[2]
        )
        for parts in zip(plan.parts, state, released, strict=True)
    ]
    found: list[_Found] = gather([call[0] for call in calls])
    lost = sum(one.lost for one in found)
    if lost:
        raise PublishConflictError(
            f"{lost} rows of the catalog are neither live nor rejected: another job wrote to "
            f"{store.root}, or the catalog was written to, while this one ran; nothing of this run "
            "is visible: run it again"
        )
    by_group = sum((one.by_group for one in found), np.zeros(len(groups), np.int64))
    parts = turn([list(call[3:]) for call in calls], len(groups))
    kept = [number for number in range(len(groups)) if by_group[number]]
    live = sum(one.live for one in found)
    rows = LiveRows(
        files=[(groups[n].start, names[groups[n].start : groups[n].stop]) for n in kept],
        group_rows=[int(by_group[n]) for n in kept],
        file_rows=max(counts, default=0),
        parts=[parts[n] for n in kept],
        vectors=live,
        products=sum(one.products for one in found),
        rejected=plan.rows - live,
        most_images=max((one.most_images for one in found), default=0),
    )
    return Live(
        rows=rows,
        buckets=[call[1] for call in calls],
        stale=[call[2] for call in calls],
        names=names,
        reasons=sum((one.reasons for one in found), Counter()),
        examples=_merge_examples(found),
        precisions=sum((one.precisions for one in found), Counter()),
    )


def _merge_examples(found: list[_Found]) -> dict[Reason, list[tuple[int, int]]]:
    merged: dict[Reason, list[tuple[int, int]]] = {}
    for one in found:
        for reason, places in one.examples.items():
            merged[reason] = (merged.get(reason, []) + places)[:EXAMPLES]
    return merged


@ray.remote(num_cpus=1)
def _join(starts: npt.NDArray[np.int64], counts: list[int], *parts: Records) -> tuple[Any, ...]:
    """Join one bucket; return what was found, its live rows, its stale ones, live by group."""
    plan, state, released = join_parts(counts, parts)
    live, stale, found = join_rows(plan, state, released)
    groups = np.searchsorted(starts, live["file"], side="right") - 1
    found.by_group = np.bincount(groups, minlength=len(starts)).astype(np.int64)
    return found, live, stale, *split_rows(live, groups, len(starts))


def join_rows(plan: Records, state: Records, released: Records) -> tuple[Records, Records, _Found]:
    """Join the rows of one bucket, all sorted by vector id.

    Args:
        plan: (N,) `PLAN_DTYPE`: the catalog.
        state: (M,) `STATE_DTYPE`: the newest row of each id.
        released: (R,) `RELEASED_DTYPE`: the newest release.

    Returns:
        Live rows (`LIVE_DTYPE`), stale ones (`STALE_DTYPE`), and the counts.
    """
    stored, known = take_rows(state, plan["vector_id"])
    current = known & same_content(plan, stored)
    upsert = current & (stored["operation"] == OPERATIONS[UPSERT])
    reject = current & (stored["operation"] == OPERATIONS[REJECT])
    live = np.zeros(int(upsert.sum()), LIVE_DTYPE)
    for name in ("vector_id", "metadata_hash"):
        live[name] = plan[name][upsert]
    for name in ("generation", "content", "file", "row"):
        live[name] = stored[name][upsert]
    live["first"] = mark_first(plan["product"][upsert], plan["image_number"][upsert])
    shown, known = take_rows(released, live["vector_id"])
    kept = known & (shown["generation"] == live["generation"])
    live["fresh"], live["fresh_first"] = ~kept, live["first"] & ~(kept & shown["first"])
    found = _Found(
        live=len(live),
        products=int(live["first"].sum()),
        most_images=int(plan["image_number"].max()) + 1 if len(plan) else 0,
        lost=int((~upsert & ~reject).sum()),
        reasons=Counter(),
        examples={},
        by_group=np.zeros(0, np.int64),
        precisions=Counter(
            {
                name: int((stored["precision"][upsert] == number).sum())
                for number, name in enumerate(PRECISIONS, 1)
            }
        ),
    )
    _count_reasons(found, REJECT, stored[reject])
    _count_reasons(found, UPSERT, stored[upsert])
    return live, _find_stale(released, live), found


def _find_stale(released: Records, live: Records) -> Records:
    now, there = take_rows(live, released["vector_id"])
    gone = ~there | now["fresh"]
    gone_first = released["first"] & (gone | ~now["first"])
    any_of = gone | gone_first
    stale = np.zeros(int(any_of.sum()), STALE_DTYPE)
    stale["vector_id"] = released["vector_id"][any_of]
    stale["all"], stale["first"] = gone[any_of], gone_first[any_of]
    return stale


def _count_reasons(found: _Found, operation: str, rows: Records) -> None:
    for number in np.unique(rows["reason"][rows["reason"] > 0]).tolist():
        told = rows[rows["reason"] == number]
        key = (operation, str(REASONS[number - 1]))
        found.reasons[key] = len(told)
        found.examples[key] = [(int(r["file"]), int(r["row"])) for r in told[:EXAMPLES]]


def mark_first(
    product: npt.NDArray[np.int64], image_number: npt.NDArray[np.integer[Any]]
) -> BoolArray:
    """Mark each product's first image among some rows.

    Args:
        product: (N,) int64, one number a product.
        image_number: (N,) integers.

    Returns:
        (N,) bool.
    """
    order = np.lexsort((image_number, product))
    first = np.zeros(len(product), bool)
    first[order] = np.append(True, product[order][1:] != product[order][:-1])[: len(product)]
    return first
