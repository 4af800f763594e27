"""Finds the images that many live rows share: the shop's placeholders, most often."""

import shutil
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray

from jobs.buckets import Records, split_rows, turn
from jobs.live import Live
from jobs.storage import parquet_errors
from jobs.store import Store, scratch_folder
from jobs.tasks import gather

PLACEHOLDERS = 10
PLACEHOLDER_ROWS = 3
Shared = list[tuple[int, int]]
"""How many live rows an image has, and the vector id of one, most rows first."""
TALLY = np.dtype([("content", np.int64), ("rows", np.int64), ("vector_id", np.int64)])


def find_placeholders(store: Store, ids: dict[str, Any], live: Live) -> list[dict[str, Any]]:
    """Name the images that most live rows share, with a product of each.

    Each bucket counts its images, and its counts are divided by the hash of the image's bytes, a
    task a part: the sums are exact, however many buckets of vector ids there are, and no task
    holds all rows of an image that much of the catalog shares.

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
    tallies = tally_images(rows)
    keys = tallies["content"].view(np.uint64) % np.uint64(parts)
    divided = split_rows(tallies, keys, parts)
    return divided if parts > 1 else divided[0]


@ray.remote(num_cpus=1)
def _count(*parts: Records) -> Shared:
    """Return the images with most rows, those with fewer than `PLACEHOLDER_ROWS` left out."""
    tallies = _add_up(np.concatenate(parts))
    most = tallies[np.argsort(-tallies["rows"], kind="stable")[:PLACEHOLDERS]]
    most = most[most["rows"] >= PLACEHOLDER_ROWS]
    return list(zip(most["rows"].tolist(), most["vector_id"].tolist(), strict=True))


def tally_images(rows: Records) -> Records:
    """Count the rows of each image.

    Args:
        rows: (N,) records with `content`, the hash of the image's bytes, 0 where there is none,
            and `vector_id`.

    Returns:
        (M,) `TALLY`, one an image, by content; `vector_id` is the smallest of its rows.
    """
    known = rows[rows["content"] != 0]
    tallies = np.ones(len(known), TALLY)
    tallies["content"], tallies["vector_id"] = known["content"], known["vector_id"]
    return _add_up(tallies)


def _add_up(tallies: Records) -> Records:
    """Join the tallies of each image: (N,) to (M,) `TALLY`, by content."""
    ordered = tallies[np.argsort(tallies["content"], kind="stable")]
    contents, first = np.unique(ordered["content"], return_index=True)
    sums = np.zeros(len(contents), TALLY)
    sums["content"] = contents
    sums["rows"] = np.add.reduceat(ordered["rows"], first)
    sums["vector_id"] = np.minimum.reduceat(ordered["vector_id"], first)
    return sums


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
