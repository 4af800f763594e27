"""Finds the images that many live rows share: the shop's placeholders, most often."""

import shutil
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray

from jobs.buckets import Records, split_rows, turn
from jobs.cluster import gather
from jobs.live import Live
from jobs.storage import parquet_errors
from jobs.store import Store, scratch_folder

PLACEHOLDERS = 10
PLACEHOLDER_ROWS = 3
Shared = list[tuple[int, int]]
"""How many live rows an image has, and the vector id of one, most rows first."""


def find_placeholders(store: Store, ids: dict[str, Any], live: Live) -> list[dict[str, Any]]:
    """Name the images that most live rows share, with a product of each.

    The rows are divided by the hash of their image's bytes, a task a part: the counts are exact,
    however many buckets of vector ids there are.

    Args:
        store: The store.
        ids: The manifest's entry of `ids.parquet`.
        live: The live rows.

    Returns:
        One dict an image, most rows first: rows, product_id, image_uri.
    """
    parts = len(live.buckets)
    split = [_split.options(num_returns=parts).remote(rows, parts) for rows in live.buckets]
    shared = turn([[one] if parts == 1 else one for one in split], parts)
    counts: list[Shared] = gather([_count.remote(*mine) for mine in shared])
    most = sorted((one for part in counts for one in part), key=lambda one: (-one[0], one[1]))
    most = most[:PLACEHOLDERS]
    if not most:
        return []
    rows = gather([_find_ids.remote(store, ids, [vector_id for _, vector_id in most])])[0]
    return [
        {"rows": count, "product_id": row["product_id"], "image_uri": row["image_uri"]}
        for (count, _), row in zip(most, rows, strict=True)
    ]


@ray.remote(num_cpus=1)
def _split(rows: Records, parts: int) -> Any:  # noqa: ANN401 - one array, or several
    known = rows[rows["content"] != 0][["content", "vector_id"]]
    divided = split_rows(known, known["content"].view(np.uint64) % np.uint64(parts), parts)
    return divided if parts > 1 else divided[0]


@ray.remote(num_cpus=1)
def _count(*parts: Records) -> Shared:
    return count_shared(np.concatenate(parts))


def count_shared(rows: Records) -> Shared:
    """Count the rows of each image.

    Args:
        rows: (N,) records with `content`, the hash of the image's bytes, and `vector_id`.

    Returns:
        The images with most rows, those with fewer than `PLACEHOLDER_ROWS` left out.
    """
    ordered = np.sort(rows, order=["content", "vector_id"])
    _, first, counts = np.unique(ordered["content"], return_index=True, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:PLACEHOLDERS]
    most = most[counts[most] >= PLACEHOLDER_ROWS]
    ids = ordered["vector_id"][first[most]]
    return list(zip(counts[most].tolist(), ids.tolist(), strict=True))


@ray.remote(num_cpus=1)
def _find_ids(store: Store, entry: dict[str, Any], vector_ids: list[int]) -> list[dict[str, Any]]:
    """Read a few rows: sorted by id, most row groups are passed over by their statistics."""
    cache = scratch_folder("ids")
    try:
        path = store.local_copy(cache, "indexes", entry["folder"], entry["file"])
        columns = ["vector_id", "product_id", "image_uri"]
        with parquet_errors(store.uri("indexes", entry["folder"], entry["file"])):
            table = pq.read_table(path, columns=columns, filters=[("vector_id", "in", vector_ids)])
    finally:
        shutil.rmtree(cache)
    rows = {row["vector_id"]: row for row in table.to_pylist()}
    return [rows[one] for one in vector_ids]
