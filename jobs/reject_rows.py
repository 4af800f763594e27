"""Finds the rows of the embeddings table that are rejected, or live without image or text.

The newest row of each vector id decides. It is found by buckets, as the diff does it; the buckets
are merged in the order they are listed in, and only what is listed is read whole: this process
holds a block of each bucket and some pages.

Letters: N rows.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from jobs.buckets import Records, count_buckets, sort_records
from jobs.diff import Retry
from jobs.images import RejectReason
from jobs.nodes import cluster_cpus
from jobs.schemas import REJECT, UPSERT
from jobs.state import (
    OPERATIONS,
    REASONS,
    STATE_DTYPE,
    newest_rows,
    read_data_file,
    read_state,
)
from jobs.store import Store
from jobs.tasks import gather, gather_bounded

BLOCK_ROWS = 4_096
PAGE_ROWS = 1_000
FILES_AT_ONCE = 8
LISTED_DTYPE = np.dtype(
    [
        ("newer", "<i8"),
        ("vector_id", "<i8"),
        ("first_seen", "<i8"),
        ("written_at", "<i8"),
        ("attempts", "<i4"),
        ("file", "<i4"),
        ("row", "<i4"),
        ("reason", "i1"),
        ("retry", "?"),
    ]
)
"""A row to list. Rows are sorted by `newer`, which is smaller for what was seen first later, and
by `vector_id`, which keeps the images of a product together; the rest is as in `STATE_DTYPE`."""

Kind = Literal["transient", "permanent"]
Counts = dict[str, Counter[tuple[int, bool]]]
"""Operation to rows of each (reason's number, whether it is tried again)."""


@dataclass(frozen=True, kw_only=True)
class RejectQuery:
    """Which rows are asked for.

    Attributes:
        reasons: Only these; all if empty.
        kinds: Only these.
        masked: List rows that are live without their image or text, in place of the rejects.
        limit: The most rows that are listed; 0: all. What is counted does not depend on it.
    """

    reasons: tuple[RejectReason, ...] = ()
    kinds: tuple[str, ...] = ("transient", "permanent")
    masked: bool = False
    limit: int = 50

    def takes(self, reason: RejectReason) -> bool:
        """Say whether rows of a reason are asked for."""
        named = not self.reasons or reason in self.reasons
        return named and reason.kind in self.kinds


@dataclass(frozen=True, kw_only=True)
class Reject:
    """One row, as it is listed. Times are ISO 8601, in UTC.

    Attributes:
        first_seen: When the same content was first refused; None for a row that is live.
        last_seen: When a refresh last tried it.
        attempts: How many refreshes have tried it; 0 for a row that is live.
        retry: Whether the next refresh tries it again, if the catalog's row stays as it is.
    """

    product_id: str
    image_number: int
    reason: RejectReason
    kind: Kind
    detail: str
    first_seen: str | None
    last_seen: str
    attempts: int
    retry: bool


def find_rows(
    store: Store,
    version: int,
    encoder: str,
    query: RejectQuery,
    *,
    retry: Retry,
    bucket_rows: int,
) -> tuple[Counts, Iterator[list[Reject]]]:
    """Count the rows that are asked for, and begin to list them.

    Args:
        store: The store.
        version: Of the embeddings table.
        encoder: Fingerprint; rows of others don't count.
        query: What is asked for.
        retry: Which rejects the next refresh tries again.
        bucket_rows: About how many rows one task reads.

    Returns:
        The counts, and pages of at most `PAGE_ROWS` rows; Ray must run until the last is read.

    Raises:
        StoreError: A data file is missing or damaged; the pages raise it too.
    """
    buckets = count_buckets(sum(store.embedding_counts(version)), bucket_rows)
    parts = read_state(store, version, encoder, buckets, bucket_rows)
    calls = [_select.remote(query, retry, *part) for part in parts]
    counts: Counts = {UPSERT: Counter(), REJECT: Counter()}
    for found in gather([call[0] for call in calls]):
        for operation, counted in found.items():
            counts[operation].update(counted)
    limit = query.limit or None
    merged = islice(heapq.merge(*(_read_blocks(call[1]) for call in calls)), limit)
    return counts, _read_pages(store, store.embedding_files(version), merged)


@ray.remote(num_cpus=1, num_returns=2)
def _select(query: RejectQuery, retry: Retry, *parts: Records) -> tuple[Counts, Records]:
    """Count a bucket's rows, and return those of them that may be listed."""
    return select_rows(np.concatenate([np.zeros(0, STATE_DTYPE), *parts]), query, retry)


def select_rows(rows: Records, query: RejectQuery, retry: Retry) -> tuple[Counts, Records]:
    """Find what is asked for among the rows of one bucket.

    Args:
        rows: (N,) `STATE_DTYPE`: all rows of the bucket's ids, in any order.
        query: What is asked for.
        retry: Which rejects the next refresh tries again.

    Returns:
        Counts of all that is asked for, and `LISTED_DTYPE` rows, sorted, at most `query.limit`.
    """
    wanted = np.array([False, *(query.takes(reason) for reason in REASONS)])
    newest = newest_rows(rows)
    newest = newest[wanted[newest["reason"]]]
    counts: Counts = {}
    for operation in (UPSERT, REJECT):
        mine = newest[newest["operation"] == OPERATIONS[operation]]
        again = retry.applies(mine) & (operation == REJECT)
        pairs = zip(mine["reason"].tolist(), again.tolist(), strict=True)
        counts[operation] = Counter(pairs)
        if (operation == UPSERT) is query.masked:
            listed = _pack(mine, again)
    return counts, listed[: query.limit or None]


def _pack(rows: Records, again: npt.NDArray[np.bool_]) -> Records:
    packed = np.zeros(len(rows), LISTED_DTYPE)
    for name in ("vector_id", "first_seen", "written_at", "attempts", "file", "row", "reason"):
        packed[name] = rows[name]
    packed["newer"] = -np.where(rows["first_seen"] > 0, rows["first_seen"], rows["written_at"])
    packed["retry"] = again
    return sort_records(packed, "newer", "vector_id")


def _read_blocks(rows: Any) -> Iterator[tuple[Any, ...]]:  # noqa: ANN401
    """Yield the rows behind a reference, a block of them in this process at a time."""
    start, whole = 0, True
    while whole:
        block = gather([_slice.remote(rows, start, start + BLOCK_ROWS)])[0].tolist()
        yield from block
        start, whole = start + BLOCK_ROWS, len(block) == BLOCK_ROWS


@ray.remote(num_cpus=1)
def _slice(rows: Records, start: int, stop: int) -> Records:
    return rows[start:stop].copy()


def _read_pages(
    store: Store, names: list[str], rows: Iterator[tuple[Any, ...]]
) -> Iterator[list[Reject]]:
    def submit(page: list[tuple[Any, ...]]) -> Any:  # noqa: ANN401
        packed = np.array(page, LISTED_DTYPE)
        files = {number: names[number] for number in np.unique(packed["file"]).tolist()}
        return _read_page.remote(store, files, packed)

    pages = iter(lambda: list(islice(rows, PAGE_ROWS)), [])
    return gather_bounded(submit, pages, in_flight=cluster_cpus())


@ray.remote(num_cpus=1)
def _read_page(store: Store, files: dict[int, str], rows: Records) -> list[Reject]:
    """Read what the driver can't tell from the numbers: product, image, detail."""
    columns = ["product_id", "image_number", "reject_detail"]

    def read(number: int) -> list[tuple[int, Reject]]:
        places = np.flatnonzero(rows["file"] == number)
        table = read_data_file(store, files[number], columns).take(pa.array(rows["row"][places]))
        told = zip(places.tolist(), table.to_pylist(), strict=True)
        return [(place, _make_reject(rows[place], told)) for place, told in told]

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        found = dict(pair for pairs in pool.map(read, files) for pair in pairs)
    return [found[place] for place in range(len(rows))]


def _make_reject(row: Any, told: dict[str, Any]) -> Reject:  # noqa: ANN401
    reason = REASONS[int(row["reason"]) - 1]
    return Reject(
        product_id=told["product_id"],
        image_number=told["image_number"],
        reason=reason,
        kind=reason.kind,
        detail=told["reject_detail"] or "",
        first_seen=_iso(int(row["first_seen"])) if row["first_seen"] else None,
        last_seen=_iso(int(row["written_at"])),
        attempts=int(row["attempts"]),
        retry=bool(row["retry"]),
    )


def _iso(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat(timespec="seconds")
