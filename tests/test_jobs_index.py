"""The index stage over a real table and real Ray, without an encoder: IVF-PQ needs 10,000 rows."""

import dataclasses

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pytest
import ray

from encoders.fusion import FusionSpec
from indexing.build import add_vectors, read_index, set_nprobe
from indexing.drift import DriftLimits
from indexing.search import search_index
from indexing.update import empty_clone
from jobs.buckets import split_by_bucket
from jobs.cluster import ray_session
from jobs.config import IndexConfig, RayConfig
from jobs.diff import Plan
from jobs.embed_write import write_data_file
from jobs.errors import ConfigError
from jobs.index import IndexJob, build_index, choose_spec, reasons_to_retrain
from jobs.items import PLAN_DTYPE
from jobs.live import STALE_DTYPE, join_live
from jobs.schemas import EMBEDDINGS
from jobs.space import VectorField
from jobs.store import Store
from jobs.vectors import concatenate, mix_ids, sample_vectors

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
            "image_hash": ids[part],
            "text_hash": ids[part],
            "etag_hash": np.zeros(len(part), np.int64),
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


def make_live(store, ids, buckets=1):
    rows = np.zeros(len(ids), PLAN_DTYPE)
    for name in ("vector_id", "image_hash", "text_hash", "product"):
        rows[name] = ids
    parts = [[ray.put(part)] for part in split_by_bucket(rows, buckets)]
    plan = Plan(groups=[range(1)], parts=parts, rows=len(ids))
    version = store.embeddings().version()
    return join_live(plan, store, version, "e", bucket_rows=5000, parent=None)


def make_job(store, live, folder, config=None, **values):
    values = {"sample_rows": 300, "base": None, "retrain": ()} | values
    config = config or IndexConfig()
    return IndexJob(store=store, field=IMAGE, live=live, config=config, folder=folder, **values)


def quiet(step):
    pass


def test_ivf_pq_is_trained_filled_merged_and_measured(session, tmp_path):
    store = Store(str(tmp_path))
    ids, vectors = make_table(store)
    built = [
        build_index(make_job(store, make_live(store, ids, buckets), run), quiet)
        for run, buckets in (("one", 1), ("two", 4))
    ]
    assert built[0].factory.startswith("IVF")
    assert "PQ" in built[0].factory
    assert built[0].action == "trained"
    assert (built[0].ntotal, built[0].missing, built[0].extra) == (ROWS, 0, 0)
    assert built[0].intersection_at_10 > 0.6
    assert built[0].self_retrieval > 0.9
    assert built[0].measured_queries == 300
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
    index = build_index(make_job(store, make_live(store, kept), "run"), quiet)
    assert (index.ntotal, index.missing, index.extra) == (len(kept), 0, 0)


def with_release(live, ids):
    """The same live rows, against a release of some ids: the others are fresh."""
    rows = [ray.get(ref).copy() for ref in live.buckets]
    for part in rows:
        part["fresh"] = part["fresh_first"] = ~np.isin(part["vector_id"], ids)
    gone = np.setdiff1d(ids, np.concatenate([part["vector_id"] for part in rows]))
    stale = np.zeros(len(gone), STALE_DTYPE)
    stale["vector_id"], stale["all"], stale["first"] = gone, True, True
    groups = []
    for first, names in live.rows.files:
        inside = [part[(part["file"] >= first) & (part["file"] < first + len(names))]
                  for part in rows]  # fmt: skip
        groups.append([ray.put(part) for part in inside])
    return dataclasses.replace(
        live,
        rows=dataclasses.replace(live.rows, parts=groups),
        buckets=[ray.put(part) for part in rows],
        stale=[ray.put(stale)],
    )


def test_a_trained_index_is_updated_beside_the_old_one(session, tmp_path):
    store = Store(str(tmp_path))
    ids, vectors = make_table(store)
    before, after = ids[:-200], ids[100:]
    old = build_index(make_job(store, make_live(store, before), "old"), quiet)
    live = with_release(make_live(store, after), before)
    job = make_job(store, live, "new", base=dataclasses.asdict(old))
    new = build_index(job, quiet)
    assert (new.action, new.folder, new.trained) == ("updated", "new", old.trained)
    assert "200 vectors added, 100 removed" in new.reasons[0]
    assert (new.ntotal, new.missing, new.extra) == (len(after), 0, 0)
    assert new.overlap_at_10 > 0.8
    opened = [
        read_index(tmp_path / "indexes" / one.folder / one.file, sha256=one.sha256)
        for one in (old, new)
    ]
    fresh = add_vectors(empty_clone(opened[0]), after, unit(vectors[100:]))
    for index in (fresh, opened[1]):
        set_nprobe(index, 8)
    expected, found = (search_index(i, vectors[:50], 10) for i in (fresh, opened[1]))
    np.testing.assert_allclose(expected[0], found[0], atol=1e-6)
    above = expected[0] > expected[0][:, -1:] + 1e-6  # equal scores may end the list either way
    for one, other, kept in zip(expected[1], found[1], above, strict=True):
        assert set(one[kept].tolist()) <= set(other.tolist())
    same = with_release(make_live(store, after), after)
    kept = build_index(make_job(store, same, "third", base=dataclasses.asdict(new)), quiet)
    assert (kept.action, kept.folder, kept.sha256) == ("kept", "new", new.sha256)


def unit(vectors):
    """What the table gives back of vectors."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_drift_trains_anew_and_says_why(session, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    old = build_index(make_job(store, make_live(store, ids[:10_000]), "old"), quiet)
    live = with_release(make_live(store, ids), ids[:10_000])
    config = IndexConfig(drift=DriftLimits(max_size_growth=1.1))
    job = make_job(store, live, "new", config, base=dataclasses.asdict(old))
    new = build_index(job, quiet)
    assert (new.action, new.ntotal, new.trained["run"]) == ("trained", ROWS, "new")
    assert any("12,000 vectors" in reason and "1.1" in reason for reason in new.reasons)


@pytest.mark.parametrize(
    ("config", "ntotal", "words"),
    [
        ({}, 12_000, []),
        ({"seed": 1}, 12_000, ["index.seed was 0"]),
        ({"nlist": 64}, 12_000, ["asks for IVF64"]),
        ({}, 500, ["better held by Flat"]),
    ],
)
def test_what_forbids_an_update(config, ntotal, words):
    spec, _ = choose_spec(IndexConfig(), 12_000, DIM)
    base = {"spec": dataclasses.asdict(spec)}
    trained_with = IndexConfig().model_dump(mode="json")
    found = reasons_to_retrain(IndexConfig(**config), trained_with, base, ntotal)
    assert len(found) == len(words)
    assert all(word in reason for word, reason in zip(words, found, strict=True))


def test_impossible_index_is_a_config_error(session, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    config = IndexConfig(nlist=4096, pq_m=8)
    with pytest.raises(ConfigError, match="training rows"):
        build_index(make_job(store, make_live(store, ids), "r", config), quiet)


@pytest.mark.parametrize("ids", [np.arange(4000), np.arange(4000) * 2**50 + 7])
def test_sample_keys_are_uniform(ids):
    """Each of 10 stretches of the ids gets its share: chi-square, 9 degrees, p = 0.0001."""
    drawn = np.argsort(mix_ids(ids, 0, "train/image"))[:1000]
    counts = np.bincount(drawn // 400, minlength=10)
    assert ((counts - 100) ** 2 / 100).sum() < 33.7
    assert mix_ids(ids, 1, "a").tolist() != mix_ids(ids, 0, "a").tolist()
    assert mix_ids(ids, 0, "b").tolist() != mix_ids(ids, 0, "a").tolist()


@pytest.mark.parametrize("rows", [0, 7, 100, 12_000, 50_000])
def test_a_sample_is_the_rows_with_the_smallest_keys(session, tmp_path, rows):
    store = Store(str(tmp_path))
    ids, vectors = make_table(store)
    live = make_live(store, ids, 2).rows
    parts = sample_vectors(store, IMAGE, live, rows=rows, seed=3, salt="x")
    found, sample = concatenate(tuple(ray.get(parts)), rows=rows, seed=3, salt="x")
    wanted = np.sort(ids[np.argsort(mix_ids(ids, 3, "x"))[:rows]])
    assert found.tolist() == wanted.tolist()
    if rows:
        expected = unit(vectors)[np.searchsorted(ids, wanted)]
        np.testing.assert_allclose(sample, expected, atol=1e-6)


def test_other_engines_read_the_table(tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    files = [store.uri("embeddings", name) for name in store.embedding_files(1)]
    ((count, low, width),) = duckdb.sql(
        "select count(*), min(vector_id), max(len(image_embedding)) "
        f"from read_parquet({files!r}) where operation = 'upsert'"
    ).fetchall()
    assert (count, low, width) == (ROWS, ids[0], DIM)
