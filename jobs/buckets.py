"""Divides rows among tasks, so that tables larger than any memory are joined part by part.

A *group* is what one task reads: units of the catalog, or files of the table. A *bucket* is what
one task joins: a range of vector ids, with all images of a product in it. Each group's task gives
one array a bucket; they lie in Ray's object store, which spills to disk, and this process holds
their references alone: some 2 kB each, groups times buckets of them. Groups are 256 at most, and
buckets grow with the rows: 250 for a billion rows and the default `ray.bucket_rows`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.nodes import cluster_cpus
from jobs.schemas import IMAGE_BITS

MAX_GROUPS = 256
MAX_BUCKETS = 2 ** (63 - IMAGE_BITS)

Int64Array = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]
Parts = list[list[Any]]
"""References to arrays: [group][bucket], or [bucket][group]."""


def count_buckets(rows: int, bucket_rows: int) -> int:
    """Return the smallest power of two of buckets that holds at most so many rows each.

    Args:
        rows: How many rows there are, about.
        bucket_rows: The most rows of a bucket, on average.
    """
    buckets = 1
    while buckets * bucket_rows < rows and buckets < MAX_BUCKETS:
        buckets *= 2
    return buckets


def number_buckets(vector_ids: Int64Array, buckets: int) -> Int64Array:
    """Return the bucket of each vector id: (N,) int64 in [0, buckets), rising with the id."""
    return vector_ids >> (63 - (buckets.bit_length() - 1))


def sort_records(rows: Records, *fields: str) -> Records:
    """Return (N,) records sorted by integer fields, the first one first.

    Column by column: numpy's own sort compares whole records, in six times as long.
    """
    return rows[np.lexsort([rows[name] for name in reversed(fields)])]


def split_rows(rows: Records, keys: npt.NDArray[np.integer[Any]], parts: int) -> list[Records]:
    """Divide records by a key in [0, parts).

    Args:
        rows: (N,) records.
        keys: (N,) integers: which part each belongs to.
        parts: How many there are.

    Returns:
        One array a part, in the order of the rows.
    """
    order = np.argsort(keys, kind="stable")
    ends = np.searchsorted(keys[order], np.arange(parts + 1))
    ordered = rows[order]
    return [ordered[low:high] for low, high in pairwise(ends)]


def split_by_bucket(rows: Records, buckets: int) -> list[Records]:
    """Divide records that have a `vector_id` by their bucket."""
    return split_rows(rows, number_buckets(rows["vector_id"], buckets), buckets)


def make_groups(count: int, weight: int, bucket_rows: int) -> list[range]:
    """Divide the numbers [0, count) into consecutive groups, one a task.

    Args:
        count: Units or files.
        weight: Rows in all of them.
        bucket_rows: The most rows of a group, as long as there are no more than 256 groups.
    """
    groups = min(count, MAX_GROUPS, max(4 * cluster_cpus(), -(-weight // bucket_rows)))
    edges = [count * number // groups for number in range(groups + 1)] if groups else [0]
    return [range(low, high) for low, high in pairwise(edges)]


def scatter(task: Any, groups: Sequence[Any], buckets: int, *args: Any) -> tuple[list[Any], Parts]:  # noqa: ANN401
    """Start a task a group that gives a head and one array a bucket.

    Args:
        task: A Ray task of (*args, group, buckets) that returns (head, *arrays).
        groups: One value a task.
        buckets: How many arrays each gives.
        *args: What all tasks are given.

    Returns:
        References to the heads, and to the arrays [group][bucket].
    """
    calls = [
        task.options(num_returns=1 + buckets).remote(*args, group, buckets) for group in groups
    ]
    return [call[0] for call in calls], [list(call[1:]) for call in calls]


def turn(parts: Parts, width: int) -> Parts:
    """Turn [group][bucket] into [bucket][group].

    Args:
        parts: References.
        width: How many buckets there are, should there be no group.
    """
    return [[row[place] for row in parts] for place in range(width)]
