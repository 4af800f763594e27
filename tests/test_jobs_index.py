"""The index stage over a real table and real Ray, without an encoder: IVF-PQ needs 10,000 rows."""

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pytest

from encoders.fusion import FusionSpec
from indexing.build import read_index
from indexing.search import search_index
from jobs.cluster import ray_session
from jobs.config import IndexConfig, RayConfig
from jobs.diff import read_state
from jobs.embed_write import write_data_file
from jobs.errors import ConfigError
from jobs.index import build_index, live_rows
from jobs.items import PLAN_DTYPE
from jobs.schemas import EMBEDDINGS
from jobs.space import VectorField
from jobs.store import Store

ROWS, DIM, FILES = 12_000, 32, 3
IMAGE = VectorField(name="image", dim=DIM, fusion=FusionSpec())


def make_table(store):
    """Commit clustered unit vectors as image embeddings in three files; return ids and vectors."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((200, DIM))
    vectors = centers[random.integers(0, 200, ROWS)] + 0.5 * random.standard_normal((ROWS, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = np.sort(random.choice(2**40, ROWS, replace=False))
    files = []
    store.embeddings()
    for part in np.array_split(random.permutation(ROWS), FILES):
        columns = {
            "product_id": [f"p{n}" for n in part],
            "image_number": np.zeros(len(part), np.int32),
            "vector_id": ids[part],
            "generation": np.ones(len(part), np.int64),
            "operation": ["upsert"] * len(part),
            "content_hash": ids[part],
            "encoder": ["e"] * len(part),
            "image_embedding": list(vectors[part]),
        }
        arrays = {
            f.name: pa.array(columns[f.name], f.type)
            if f.name in columns
            else pa.nulls(len(part), f.type)
            for f in EMBEDDINGS
        }
        files.append(write_data_file(store, pa.table(arrays, EMBEDDINGS), 1))
    store.commit_embeddings(files)
    return ids, vectors


@pytest.fixture(scope="module")
def session():
    with ray_session(RayConfig(object_store_mb=200)):
        yield


def make_live(store, ids):
    plan = np.zeros(len(ids), PLAN_DTYPE)
    plan["vector_id"] = plan["content_hash"] = plan["product"] = ids
    version = store.embeddings().version()
    return live_rows(plan, read_state(store, version, "e"), store.embedding_files(version))


def test_ivf_pq_is_trained_filled_merged_and_measured(session, tmp_path):
    store = Store(str(tmp_path))
    ids, vectors = make_table(store)
    live = make_live(store, ids)
    built = [
        build_index(IMAGE, live, IndexConfig(), store, (run, 300), lambda step: None)
        for run in ("one", "two")
    ]
    assert built[0].factory.startswith("IVF")
    assert "PQ" in built[0].factory
    assert built[0].ntotal == ROWS
    assert built[0].intersection_at_10 > 0.6
    assert built[0].self_retrieval > 0.9
    assert len(built[0].curve) > 1
    assert built[0].sha256 == built[1].sha256  # the same table gives the same file
    faiss.omp_set_num_threads(1)
    path = tmp_path / "indexes" / "one" / "image.faiss"
    index = read_index(path, sha256=built[0].sha256)
    found = search_index(index, vectors[:20], 1)[1][:, 0]
    assert (found == ids[:20]).mean() > 0.5


def test_removed_and_older_rows_are_not_indexed(session, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    kept = ids[::2]
    index = build_index(
        IMAGE, make_live(store, kept), IndexConfig(), store, ("run", 50), lambda step: None
    )
    assert index.ntotal == len(kept)


def test_impossible_index_is_a_config_error(session, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    config = IndexConfig(nlist=4096, pq_m=8)
    with pytest.raises(ConfigError, match="training rows"):
        build_index(IMAGE, make_live(store, ids), config, store, ("r", 50), print)


def test_other_engines_read_the_table(tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    files = [store.uri("embeddings", name) for name in store.embedding_files(1)]
    ((count, low, width),) = duckdb.sql(
        "select count(*), min(vector_id), max(len(image_embedding)) "
        f"from read_parquet({files!r}) where operation = 'upsert'"
    ).fetchall()
    assert (count, low, width) == (ROWS, ids[0], DIM)
