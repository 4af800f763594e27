"""ids.parquet of a catalog that holds many images a product as bytes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.catalog import read_catalog
from jobs.cluster import ray_session
from jobs.config import CatalogConfig, RayConfig
from jobs.ids import Ids, write_ids
from jobs.schemas import vector_id
from jobs.store import Store

IMAGES = 100


def test_every_live_image_of_a_product_is_listed(tmp_path):
    table = {"product_id": ["a", "b"], "title": ["x", "y"], "image": [[b"1"] * IMAGES, [b"2"]]}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    config = CatalogConfig(path=str(tmp_path / "c.parquet"))
    catalog = read_catalog(config, need_images=True, need_text=True)
    live = np.array([vector_id("a", n) for n in range(1, IMAGES)] + [vector_id("b", 0)])
    live.sort()
    store = Store(str(tmp_path / "store"))
    with ray_session(RayConfig(object_store_mb=100)):
        entry = write_ids(catalog, live, IMAGES, store, "run")
    assert entry["rows"] == IMAGES
    path = tmp_path / "store" / "indexes" / "run" / "ids.parquet"
    ids = Ids(path, sha256=entry["sha256"])
    assert ids.vector_id.tolist() == live.tolist()
    (row,) = ids.find(np.array([vector_id("a", 99)]))
    assert (row["product_id"], row["image_number"], row["metadata"]["title"]) == ("a", 99, "x")
    with pytest.raises(ValueError, match="not in ids"):
        ids.find(np.array([vector_id("a", 0)]))
