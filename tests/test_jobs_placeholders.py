"""Images that many rows share are counted over all buckets of vector ids."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs.buckets import split_by_bucket
from jobs.live import LIVE_DTYPE, Live, LiveRows
from jobs.placeholders import PLACEHOLDERS, TALLY, find_placeholders, tally_images
from jobs.store import Store


def make_rows(shares):
    """Rows of images by hash, with ids all over the range."""
    contents = np.repeat(list(shares), list(shares.values()))
    rows = np.zeros(len(contents), LIVE_DTYPE)
    rows["content"] = np.random.default_rng(0).permutation(contents)
    rows["vector_id"] = np.sort(np.random.default_rng(1).choice(2**62, len(rows))) * 2
    return rows


@pytest.mark.parametrize("buckets", [1, 8])
def test_counts_are_exact_over_any_buckets(local_ray, tmp_path, buckets):
    shares = {-7: 40, 5: 30, 2**62: 3, 9: 2, 0: 50} | {100 + n: 1 for n in range(60)}
    rows = make_rows(shares)
    names = [f"p{n}" for n in range(len(rows))]
    table = {"vector_id": rows["vector_id"], "product_id": names, "image_uri": names}
    store = Store(str(tmp_path))
    pq.write_table(pa.table(table), tmp_path / "ids.parquet")
    store.upload(tmp_path / "ids.parquet", "indexes", "run", "ids.parquet")
    live = Live(
        rows=LiveRows(
            files=[],
            group_rows=[],
            file_rows=0,
            parts=[],
            vectors=len(rows),
            products=1,
            rejected=0,
            most_images=1,
        ),
        buckets=[ray.put(part) for part in split_by_bucket(rows, buckets)],
        stale=[],
        names=[],
        reasons={},
        examples={},
    )
    found = find_placeholders(store, {"folder": "run", "file": "ids.parquet"}, live)
    assert [one["rows"] for one in found] == [40, 30, 3]  # not what has no image, nor pairs
    first = names[int(np.flatnonzero(rows["content"] == -7)[0])]
    assert found[0] == {"rows": 40, "product_id": first, "image_uri": first}
    assert len(found) <= PLACEHOLDERS


def test_an_image_that_most_rows_share_is_one_record_a_bucket():
    rows = make_rows({-7: 1_000, 5: 2, 0: 100})[::-1]
    tallies = tally_images(rows)
    ids = [rows["vector_id"][rows["content"] == content].min() for content in (-7, 5)]
    assert tallies.tolist() == [(-7, 1_000, ids[0]), (5, 2, ids[1])]
    assert tallies.dtype == TALLY
    assert tallies.nbytes == 2 * 3 * 8  # packed: nothing else of a live row goes along
    assert len(tally_images(rows[:0])) == 0
