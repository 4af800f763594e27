"""The index stage over a real table and real Ray, without an encoder: IVF-PQ needs 10,000 rows."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import ray

from encoders.fusion import FusionSpec
from indexing.build import add_vectors
from indexing.drift import DriftLimits
from indexing.refine import encode_refine
from indexing.search import SearchPoint, search_index, search_partition, search_partitions
from indexing.spec import IndexSpec
from jobs.buckets import split_by_bucket
from jobs.config import IndexConfig
from jobs.diff import Plan
from jobs.embed_write import write_data_file
from jobs.errors import ConfigError, StoreError
from jobs.index import IndexJob, build_index
from jobs.index_choice import choose_spec, reasons_to_retrain
from jobs.index_files import open_index, open_partitions, read_files
from jobs.index_memory import ask, train_bytes
from jobs.items import PLAN_DTYPE
from jobs.live import STALE_DTYPE, join_live
from jobs.nodes import Room, find_room
from jobs.partials import PARTIALS, RECORD
from jobs.schemas import EMBEDDINGS
from jobs.space import VectorField
from jobs.store import Store
from jobs.vectors import Draw, join_sample, mix_ids, sample_vectors

ROWS, DIM, FILES = 12_000, 32, 3
IMAGE = VectorField(name="image", dim=DIM, fusion=FusionSpec())


def make_table(store, *, spread=False):
    """Commit clustered unit vectors as image embeddings in three files; return ids and vectors.

    Args:
        store: Where to.
        spread: Whether ids are all over the range, as a catalog's; else they are all small.
    """
    random = np.random.default_rng(0)
    centers = random.standard_normal((200, DIM))
    vectors = centers[random.integers(0, 200, ROWS)] + 0.5 * random.standard_normal((ROWS, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = np.sort(random.choice(2**40, ROWS, replace=False)) << (23 if spread else 0)
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


def make_live(store, ids, buckets=1):
    rows = np.zeros(len(ids), PLAN_DTYPE)
    for name in ("vector_id", "image_hash", "text_hash", "product"):
        rows[name] = ids
    parts = [[ray.put(part)] for part in split_by_bucket(rows, buckets)]
    plan = Plan(groups=[range(1)], parts=parts, rows=len(ids))
    version = store.embeddings().version()
    return join_live(plan, store, version, "e", bucket_rows=5000, parent=None)


def make_job(store, live, folder, config=None, **values):
    values = {"sample_rows": 300, "base": None, "retrain": (), "labelled": None} | values
    where = {"store": store, "field": IMAGE, "live": live, "folder": folder, "ids": {}}
    return IndexJob(config=config or IndexConfig(), **where, **values)


def build(store, live, folder, config=None, **values):
    return build_index(make_job(store, live, folder, config, **values), quiet).index


def entry(index):
    """What a manifest says of an index."""
    return json.loads(json.dumps(dataclasses.asdict(index)))


def opened(store, index):
    return open_partitions(store, read_files(entry(index)))


def quiet(step):
    pass


def test_ivf_pq_is_trained_filled_merged_and_measured(local_ray, tmp_path):
    store = Store(str(tmp_path))
    ids, vectors = make_table(store)
    built = [
        build(store, make_live(store, ids, buckets), run)
        for run, buckets in (("one", 1), ("two", 4))
    ]
    one = built[0]
    assert one.factory.startswith("IVF")
    assert "PQ" in one.factory
    assert one.factory.endswith("Refine(SQ8)")
    assert one.action == "trained"
    assert (one.ntotal, one.measured.missing, one.measured.extra) == (ROWS, 0, 0)
    assert one.measured.intersection_at_10 >= 0.95
    assert one.measured.self_retrieval > 0.9
    assert (one.measured.queries, one.measured.ambiguous) == (300, 0)
    assert len(one.curve) > 1
    assert one.point in [point["point"] for point in entry(one)["curve"]]
    # The same table gives the same files.
    for kind in ("codes", "refine"):
        assert len({getattr(index.partitions[0], kind).sha256 for index in built}) == 1
    (partition,) = opened(store, one)
    found = search_partition(partition, unit(vectors[:20]), 1, SearchPoint(**one.point))[1][:, 0]
    assert (found == ids[:20]).mean() > 0.9


def test_steps_are_told_in_their_order(local_ray, tmp_path):
    store, told = Store(str(tmp_path)), []
    ids, _ = make_table(store)
    built = build_index(make_job(store, make_live(store, ids), "run"), told.append)
    steps = [
        "image: exact search of held-out queries",
        "image: sample up to 12,000 rows to train on",
        f"image: train {built.index.factory}",
        "image: add and merge",
        "image: measure",
    ]
    assert [words for words in told if words in steps] == steps  # the task tells more if it is slow


def test_partitions_hold_what_one_file_would(local_ray, tmp_path):
    store = Store(str(tmp_path))
    ids, vectors = make_table(store, spread=True)
    live = make_live(store, ids)
    whole = build(store, live, "whole")
    config = IndexConfig(max_partition_vectors=4000)
    parted = build(store, live, "parted", config)
    assert (len(whole.partitions), len(parted.partitions)) == (1, 4)
    assert max(part.ntotal for part in parted.partitions) < 4000
    assert (parted.ntotal, parted.measured.missing, parted.measured.extra) == (ROWS, 0, 0)
    assert parted.measured.intersection_at_10 >= 0.95
    assert parted.template.sha256 == whole.template.sha256
    point = SearchPoint(nprobe=16, rerank=100)
    expected = search_partitions(opened(store, whole), unit(vectors[:50]), 10, point)
    found = search_partitions(opened(store, parted), unit(vectors[:50]), 10, point)
    # A partition re-ranks a hundred of its own: never less is found than by one file.
    assert (found[0] >= expected[0] - 1e-6).all()


def test_a_build_goes_on_from_the_parts_that_are_whole(local_ray, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    first = build_index(make_job(store, make_live(store, ids), "first"), quiet)
    assert len(first.partials) == len(list((tmp_path / PARTIALS).iterdir())) > 2
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / PARTIALS).rglob("*.*")}
    lost = tmp_path / PARTIALS / first.partials[1]  # as if the task had been killed while it wrote
    (lost / RECORD).unlink()
    again = build(store, make_live(store, ids), "again")
    kept = {path for path, time in written.items() if path.stat().st_mtime_ns == time}
    assert kept == {path for path in written if lost not in path.parents}
    assert again.partitions[0].codes.sha256 == first.index.partitions[0].codes.sha256


CHILD = """
import sys
import tempfile
sys.path.insert(0, sys.argv[1])
from jobs.cluster import ray_session
from jobs.config import RayConfig
from test_jobs_index import *
with ray_session(RayConfig(object_store_mb=100)):
    store = Store(sys.argv[2])
    build(store, make_live(store, np.load(sys.argv[3])), "killed")
"""


def parts_there(store):
    return set(Path(store.root, PARTIALS).glob(f"*/{RECORD}"))


@pytest.mark.parametrize(
    ("moment", "sign", "whole"),
    [("train", "vitrine-train-*", 0), ("add", "vitrine-add-*", 1), ("merge", "vitrine-merge-*", 4)],
)
def test_a_build_that_is_killed_goes_on(local_ray, tmp_path, moment, sign, whole):
    """At the moment when a task makes its scratch folder, which is deleted at its end."""
    store, scratch = Store(str(tmp_path / "store")), tmp_path / "scratch"
    scratch.mkdir()
    ids, _ = make_table(store)
    np.save(tmp_path / "ids.npy", ids)
    tests = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, tests, store.root, tmp_path / "ids.npy"]
    environment = os.environ | {"TMPDIR": str(scratch), "RAY_TMPDIR": tempfile.gettempdir()}
    child = subprocess.Popen(command, cwd=tests.parent, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(scratch.glob(sign)):
        assert child.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in parts_there(store)}
    assert len(before) >= whole
    index = build(store, make_live(store, ids), "again")
    assert (index.ntotal, index.measured.missing, index.measured.extra) == (ROWS, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_part_is_refused_and_made_anew(local_ray, tmp_path, damage):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    first = build_index(make_job(store, make_live(store, ids), "first"), quiet)
    path = next((tmp_path / PARTIALS / first.partials[1]).glob("*.faiss"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data if damage == "flipped" else data[:-1])
    with pytest.raises(StoreError, match=r"is corrupted.*run the command again"):
        build(store, make_live(store, ids), "second")
    again = build(store, make_live(store, ids), "third")
    assert again.partitions[0].codes.sha256 == first.index.partitions[0].codes.sha256


def test_removed_and_older_rows_are_not_indexed(local_ray, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    kept = ids[::2]
    index = build(store, make_live(store, kept), "run")
    assert (index.ntotal, index.measured.missing, index.measured.extra) == (len(kept), 0, 0)


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


@pytest.mark.parametrize("most", [20_000, 4000])
def test_a_trained_index_is_updated_beside_the_old_one(local_ray, tmp_path, most):
    """Also into more files than it had: they are split, nothing is added again."""
    store = Store(str(tmp_path))
    ids, vectors = make_table(store, spread=True)
    before, after = ids[:-200], ids[100:]
    old = build(store, make_live(store, before), "old")
    live = with_release(make_live(store, after), before)
    new = build(store, live, "new", IndexConfig(max_partition_vectors=most), base=entry(old))
    assert (new.action, new.template) == ("updated", old.template)
    assert new.trained == entry(old)["trained"]
    assert len(new.partitions) == (1 if most > ROWS else 4)
    assert {part.codes.folder for part in new.partitions} == {"new"}
    assert "200 vectors added, 100 removed" in new.reasons[0]
    assert (new.ntotal, new.measured.missing, new.measured.extra) == (len(after), 0, 0)
    assert new.measured.overlap_at_10 > 0.8
    template = open_index(store, new.template, mapped=False)
    fresh = add_vectors(template, after, unit(vectors[100:]))
    queries, point = unit(vectors[:50]), SearchPoint(nprobe=8)
    expected = search_index(fresh, queries, 10, point)
    found = search_partitions(
        [dataclasses.replace(part, refine=None) for part in opened(store, new)], queries, 10, point
    )
    np.testing.assert_allclose(expected[0], found[0], atol=1e-6)
    above = expected[0] > expected[0][:, -1:] + 1e-6  # equal scores may end the list either way
    for one, other, kept in zip(expected[1], found[1], above, strict=True):
        assert set(one[kept].tolist()) <= set(other.tolist())
    stored = [part.refine for part in opened(store, new)]
    assert np.concatenate([part.ids for part in stored]).tolist() == after.tolist()
    codes = np.concatenate([part.codes for part in stored])
    np.testing.assert_array_equal(codes, encode_refine("sq8", unit(vectors[100:])))
    same = with_release(make_live(store, after), after)
    kept = build(store, same, "third", base=entry(new))
    assert (kept.action, kept.partitions) == ("kept", new.partitions)


def test_a_damaged_base_is_replaced_not_obeyed(local_ray, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    old = build(store, make_live(store, ids[:-200]), "old")
    path = tmp_path / "indexes" / "old" / old.partitions[0].codes.file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    live = with_release(make_live(store, ids), ids[:-200])
    new = build(store, live, "new", base=entry(old))
    assert (new.action, new.ntotal, new.measured.overlap_at_10) == ("trained", ROWS, None)
    assert "can't be updated" in new.reasons[0]
    assert "is corrupted" in new.reasons[0]
    assert "Not compared with the newest release" in new.reasons[-1]
    (partition,) = opened(store, new)
    assert partition.index.ntotal == ROWS


def test_a_base_of_another_template_is_replaced(local_ray, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    before = make_live(store, ids[:-200])
    old, other = build(store, before, "old"), build(store, before, "other", IndexConfig(seed=1))
    base = entry(old) | {"template": entry(other)["template"]}
    new = build(store, with_release(make_live(store, ids), ids[:-200]), "new", base=base)
    assert (new.action, new.ntotal, new.measured.missing) == ("trained", ROWS, 0)
    assert "image.faiss stems from another template than image.template.faiss" in new.reasons[0]


def unit(vectors):
    """What the table gives back of vectors."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_drift_trains_anew_and_says_why(local_ray, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    old = build(store, make_live(store, ids[:10_000]), "old")
    live = with_release(make_live(store, ids), ids[:10_000])
    config = IndexConfig(drift=DriftLimits(max_size_growth=1.1))
    new = build(store, live, "new", config, base=entry(old))
    assert (new.action, new.ntotal, new.trained["run"]) == ("trained", ROWS, "new")
    assert any("12,000 vectors" in reason and "1.1" in reason for reason in new.reasons)


def test_an_update_that_drift_discards_leaves_no_file(local_ray, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    parted = IndexConfig(max_partition_vectors=4_000)
    old = build(store, make_live(store, ids[:10_000]), "old", parted)
    assert len(old.partitions) == 4
    live = with_release(make_live(store, ids), ids[:10_000])
    config = IndexConfig(drift=DriftLimits(max_size_growth=1.1))
    new = build(store, live, "new", config, base=entry(old))
    assert (new.action, len(new.partitions)) == ("trained", 1)
    found = {path.name for path in (tmp_path / "indexes" / "new").iterdir()}
    assert found == {"image.faiss", "image.refine", "image.template.faiss"}


def test_what_no_machine_can_hold_is_asked_for_as_far_as_it_goes(local_ray, caplog):
    spec = IndexSpec.parse("IVF1024,PQ16x4fs", DIM)
    most = find_room(2**60).memory
    room = ask("training it", train_bytes(spec, 10**12), "a smaller index.train_rows")
    assert room == Room(cpus=max(2, os.cpu_count() or 2), memory=most, gpus=0)
    (record,) = caplog.records
    assert "training it takes up to" in record.getMessage()
    assert "a smaller index.train_rows, or a larger machine" in record.getMessage()
    taken = train_bytes(spec, 10_000)
    assert ask("training it", taken, "").memory == taken < most
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("config", "ntotal", "words"),
    [
        ({}, 12_000, []),
        ({"seed": 1}, 12_000, ["index.seed was 0"]),
        ({"factory": "IVF64,SQ8"}, 12_000, ["asks for IVF64,SQ8"]),
        ({"memory_budget_mb": 1}, 12_000, ["index.memory_budget_mb was None"]),
        ({"target_intersection": 0.999}, 12_000, ["asks for IVF128,PQ16x4fs,Refine(SQfp16)"]),
        ({"factory": "IVF4096,SQ8"}, 12_000, ["asks for IVF4096,SQ8"]),  # training it says no
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


def test_impossible_index_is_a_config_error(local_ray, tmp_path):
    store = Store(str(tmp_path))
    ids, _ = make_table(store)
    config = IndexConfig(factory="IVF4096,PQ8np")
    with pytest.raises(ConfigError, match="training rows"):
        build_index(make_job(store, make_live(store, ids), "r", config), quiet)


def test_no_factory_any_more_leaves_the_choice_again():
    spec = dataclasses.asdict(IndexSpec.parse("IVF64,SQ8", DIM))
    trained_with = IndexConfig(factory="IVF64,SQ8").model_dump(mode="json")
    (reason,) = reasons_to_retrain(IndexConfig(), trained_with, {"spec": spec}, 12_000)
    assert "the index is IVF64,SQ8" in reason


@pytest.mark.parametrize("ids", [np.arange(4000), np.arange(4000) * 2**50 + 7])
def test_sample_keys_are_uniform(ids):
    """Each of 10 stretches of the ids gets its share: chi-square, 9 degrees, p = 0.0001."""
    drawn = np.argsort(mix_ids(ids, 0, "train/image"))[:1000]
    counts = np.bincount(drawn // 400, minlength=10)
    assert ((counts - 100) ** 2 / 100).sum() < 33.7
    assert mix_ids(ids, 1, "a").tolist() != mix_ids(ids, 0, "a").tolist()
    assert mix_ids(ids, 0, "b").tolist() != mix_ids(ids, 0, "a").tolist()


@pytest.mark.parametrize("rows", [0, 7, 100, 12_000, 50_000])
def test_a_sample_is_the_rows_with_the_smallest_keys(local_ray, tmp_path, rows):
    store = Store(str(tmp_path))
    ids, vectors = make_table(store)
    live = make_live(store, ids, 2).rows
    draw = Draw(rows=rows, seed=3, salt="x")
    found, sample = join_sample(ray.get(sample_vectors(store, IMAGE, live, draw)), draw)
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
