"""ids.parquet and rows.parquet: many images a product as bytes, and several buckets."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from table_rows import make_live

from jobs.buckets import split_by_bucket
from jobs.catalog import read_catalog
from jobs.cluster import ray_session
from jobs.config import CatalogConfig, RayConfig
from jobs.diff import Plan
from jobs.errors import CatalogError
from jobs.ids import Ids, write_ids
from jobs.live import Live, LiveRows
from jobs.schemas import vector_id
from jobs.store import Store

IMAGES = 100


@pytest.fixture(scope="module")
def session():
    with ray_session(RayConfig(object_store_mb=100)):
        yield


def write_live(catalog, ids, store, buckets):
    rows = make_live(*({"vector_id": v, "row": n} for n, v in enumerate(ids)))
    parts = split_by_bucket(rows, buckets)
    live = Live(
        rows=LiveRows(
            files=[], parts=[], vectors=len(ids), products=2, rejected=0, most_images=IMAGES
        ),
        buckets=[ray.put(part) for part in parts],
        stale=[], names=["a.parquet"], reasons={}, examples={}, contents={},
    )  # fmt: skip
    plan = Plan(groups=[range(len(catalog.units))], parts=[[]] * buckets, rows=len(ids))
    return write_ids(catalog, plan, live, store, "run")


@pytest.mark.parametrize("buckets", [1, 8])
def test_every_live_image_of_a_product_is_listed(session, tmp_path, buckets):
    table = {"product_id": ["a", "b"], "title": ["x", "y"], "image": [[b"1"] * IMAGES, [b"2"]]}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    config = CatalogConfig(path=str(tmp_path / "c.parquet"))
    catalog = read_catalog(config, need_images=True, need_text=True)
    live = sorted([*(vector_id("a", n) for n in range(1, IMAGES)), vector_id("b", 0)])
    store = Store(str(tmp_path / "store"))
    entries = write_live(catalog, live, store, buckets)
    folder = tmp_path / "store" / "indexes" / "run"
    assert entries["ids"]["rows"] == entries["rows"]["rows"] == IMAGES
    assert entries["ids"]["folder"] == "run"
    ids = Ids(folder / "ids.parquet", sha256=entries["ids"]["sha256"])
    assert ids.vector_id.tolist() == live
    (row,) = ids.find(np.array([vector_id("a", 99)]))
    assert (row["product_id"], row["image_number"], row["metadata"]["title"]) == ("a", 99, "x")
    with pytest.raises(ValueError, match="not in ids"):
        ids.find(np.array([vector_id("a", 0)]))
    rows = pq.read_table(folder / "rows.parquet")
    assert rows["vector_id"].to_pylist() == live
    assert rows["row"].to_pylist() == list(range(IMAGES))
    assert json.loads(rows.schema.metadata[b"files"]) == ["a.parquet"]


def test_a_row_that_left_the_catalog_meanwhile_is_an_error(session, tmp_path):
    pq.write_table(pa.table({"product_id": ["a"], "title": ["x"]}), tmp_path / "c.parquet")
    config = CatalogConfig(path=str(tmp_path / "c.parquet"))
    catalog = read_catalog(config, need_images=False, need_text=True)
    live = sorted([vector_id("a", 0), vector_id("gone", 0)])
    with pytest.raises(CatalogError, match="changed while it was read"):
        write_live(catalog, live, Store(str(tmp_path / "store")), 1)
