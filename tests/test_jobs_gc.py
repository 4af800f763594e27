"""Garbage collection and compaction: true Delta tables and files, a real Ray, a real S3 server."""

import json
import os
import threading
import time
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import S3Server
from store_maker import ENCODER, Row, age, append, publish

from jobs import leases
from jobs.compact import compact, find_encoders, list_table, plan_compaction
from jobs.compact_rows import mark_needed
from jobs.config_file import read_config
from jobs.errors import ConfigError, StoreError
from jobs.files import delete_files, files_since, list_files, replace_files
from jobs.gc import describe, gc
from jobs.leases import hold_lease, live_leases
from jobs.progress import Progress
from jobs.release_files import check_files
from jobs.rollback import rollback
from jobs.schemas import DELETE, EMBEDDINGS, REJECT
from jobs.state import OPERATIONS, STATE_DTYPE, newest_rows, read_data_file, read_state
from jobs.store import Store
from jobs.tasks import gather

OTHER = "d" * 64
RUNS = [f"2026010{n}T120000-aaaaaa" for n in range(1, 7)]
ROWS = 1000
DAY_S = 86_400


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def write_config(path, root):
    job = {
        "store": root,
        "catalog": {"path": "nowhere.parquet"},
        "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
        "ray": {"object_store_mb": 128},
    }
    path.write_text(json.dumps(job))
    return path


@pytest.fixture
def collect(store, tmp_path):
    config = read_config(write_config(tmp_path / "job.yaml", store.root))
    return lambda **options: gc(config, Progress(quiet=True), **options)


def read_rows(store, encoder=ENCODER):
    """The newest row of every vector id that is no delete, all columns, and its generation."""
    version = store.embeddings().version()
    tables = [
        read_data_file(store, file, EMBEDDINGS.names) for file in store.embedding_files(version)
    ]
    newest = {}
    for row in pa.concat_tables(tables).to_pylist() if tables else []:
        kept = newest.get(row["vector_id"])
        if row["encoder"] == encoder and (not kept or row["generation"] >= kept["generation"]):
            newest[row["vector_id"]] = row
    return {n: row for n, row in newest.items() if row["operation"] != DELETE}


def read_newest(store, encoder=ENCODER):
    version = store.embeddings().version()
    parts = read_state(store, version, encoder, 2, ROWS)
    found = [np.zeros(0, STATE_DTYPE), *(r for bucket in parts for r in gather(bucket))]
    rows = newest_rows(np.concatenate(found))
    rows = rows[rows["operation"] != OPERATIONS[DELETE]]
    return rows[[n for n in STATE_DTYPE.names if n not in ("file", "row")]]


def paths(store, *parts):
    return {file.path for file in list_files(store, *parts)}


# leases


def test_lease_lives_as_long_as_its_job(store, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    with hold_lease(store, RUNS[0], None) as lease:
        time.sleep(0.3)
        (found,) = live_leases(store)
        assert (found.run, found.pid, found.parent) == (RUNS[0], os.getpid(), None)
        assert found.renewed_at > lease.renewed_at
    assert live_leases(store) == []
    with pytest.raises(ZeroDivisionError), hold_lease(store, RUNS[0], None):
        raise ZeroDivisionError
    assert live_leases(store) == []


def test_lease_of_a_killed_job_expires(store, monkeypatch):
    with hold_lease(store, RUNS[0], None):
        assert len(live_leases(store)) == 1
        monkeypatch.setattr(leases, "EXPIRE_S", 0.0)
        assert live_leases(store) == []


@pytest.mark.parametrize("text", ["", '{"run": "x"', '{"run": "x"}'])
def test_lease_that_is_being_written_counts(store, tmp_path, text):
    store.write_text(text, "runs", RUNS[0], "lease.json")
    (found,) = live_leases(store)
    assert (found.run, found.parent) == (RUNS[0], None)
    age(tmp_path / "store", 700)
    assert live_leases(store) == []


def test_job_outlives_renewals_that_fail(store, monkeypatch, caplog):
    monkeypatch.setattr(leases, "RENEW_S", 0.02)
    monkeypatch.setattr(leases, "SILENT_S", 0.0)
    with hold_lease(store, RUNS[0], None):
        folder = Path(store.uri("runs", RUNS[0]))
        (folder / "lease.json").unlink()
        folder.rmdir()
        folder.write_text("in the way")
        time.sleep(0.3)
        folder.unlink()
    assert caplog.text.count("lease not renewed") == 1


# which rows are needed


ROW = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.sampled_from((0, 1, 2)))


@given(st.lists(ROW, max_size=14), st.lists(st.booleans(), min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_not_marked_changes_nothing(found, rewritten):
    """Whatever is rewritten: the newest rows and generations are counted as before."""
    rows = np.zeros(len(found), STATE_DTYPE)
    for name, values in zip(
        ("vector_id", "generation", "file", "operation"), zip(*found, strict=True), strict=False
    ):
        rows[name] = values
    rows["row"] = np.arange(len(rows))
    rows = np.sort(rows, order=["vector_id", "generation", "file", "row"])
    newest = int(rows["generation"].max(initial=0))
    mask = np.array(rewritten)
    left = rows[mark_needed(rows, newest, mask) | ~mask[rows["file"]]]

    def live(some):
        kept = newest_rows(some)
        return kept[kept["operation"] != OPERATIONS[DELETE]].tolist()

    assert live(left) == live(rows)
    assert left["generation"].max(initial=0) == newest
    needed = rows[mark_needed(rows, newest, mask)]
    assert all(len(list(g)) == 1 for _, g in groupby(needed["vector_id"].tolist()))


# compaction


def write_history(store):
    """Generations of changes, removals, rejects and another encoder, in 12 files."""
    append(store, [Row(n, 1) for n in range(40)], seed=1)
    append(store, [Row(n, 1, encoder=OTHER) for n in range(40)], seed=2)
    for generation in range(2, 12):
        changed = [Row(n, generation) for n in range(0, 40, 3)]
        refused = [Row(generation, generation, REJECT)]
        removed = [Row(39 - generation, generation, DELETE)]
        append(store, [*changed[:generation], *refused, *removed], seed=generation)


def test_compaction_keeps_the_state(local_ray, store):
    write_history(store)
    rows, newest = read_rows(store), read_newest(store)
    files = list_table(store)
    assert set(find_encoders(store, files, ROWS)) == {ENCODER, OTHER}
    plan = plan_compaction(store, files, [ENCODER], 10)
    done = compact(store, plan)
    assert done.done
    assert (done.files, done.written) == (12, 1)
    assert done.dropped_rows == plan.dropped_rows > 100
    assert read_rows(store) == rows
    np.testing.assert_array_equal(read_newest(store), newest)
    assert read_rows(store, OTHER) == {}
    assert set(files.names) <= {path.partition("/")[2] for path in paths(store, "embeddings")}
    again = compact(store, plan_compaction(store, list_table(store), [ENCODER], ROWS))
    assert not again.done


def test_compaction_leaves_full_files_alone(local_ray, store):
    full = append(store, [Row(n, 1) for n in range(3000)])
    append(store, [Row(n, 2) for n in range(10)])
    gone = append(store, [Row(n, 3, DELETE) for n in range(20, 25)])
    append(store, [Row(11, 4)])
    files = list_table(store)
    plan = plan_compaction(store, files, [ENCODER], ROWS)
    assert not plan.rewritten.any(), "deletes are needed while their older rows stay"
    assert {full, gone} <= set(files.names)


def test_rows_appended_during_a_compaction_stay(local_ray, store):
    write_history(store)
    before = len(read_rows(store))
    plan = plan_compaction(store, list_table(store), [ENCODER, OTHER], ROWS)
    threads = [
        threading.Thread(target=append, args=(store, [Row(100 + n, 12)], n)) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    done = compact(store, plan)
    for thread in threads:
        thread.join()
    assert done.done
    assert len(read_rows(store)) == before + 4
    assert len(read_rows(store, OTHER)) == 40


def test_second_compaction_at_once_is_left_out(local_ray, store):
    write_history(store)
    plan = plan_compaction(store, list_table(store), [ENCODER], ROWS)
    assert compact(store, plan).done
    rows = read_rows(store)
    late = compact(store, plan)
    assert (late.done, late.note) == (False, "another job rewrote the same data files")
    assert read_rows(store) == rows


def test_files_are_replaced_only_after_a_version(store):
    first = append(store, [Row(1, 1)])
    version = store.embeddings().version()
    second = append(store, [Row(2, 2)])
    address = store.uri("embeddings")
    assert not replace_files(address, [], {first: 1}, EMBEDDINGS, only_after=version)
    assert replace_files(address, [], {first: 1}, EMBEDDINGS, only_after=version + 1)
    assert store.embedding_files(store.embeddings().version()) == [second]
    assert not replace_files(address, [], {first: 1}, EMBEDDINGS)
    assert files_since(address, time.time() - DAY_S) == {second}


# collection


def test_only_the_kept_and_what_they_need_stays(local_ray, store, collect, tmp_path):
    first = append(store, [Row(n, 1) for n in range(10)], seed=1)
    publish(store, RUNS[0])
    append(store, [Row(n, 2) for n in range(10)], seed=2)
    publish(store, RUNS[1], folder=RUNS[0])
    append(store, [Row(n, 3) for n in range(10)], seed=3)
    publish(store, RUNS[2])
    store.write_text("x", "indexes", RUNS[3], "image.faiss")
    store.write_text("x", "indexes", "notes", "mine.txt")
    store.write_text("x", "checkpoints", "f" * 64, "encoder.json")
    store.write_text("x", "embeddings", "generation-000009-lost.parquet")
    store.write_text("x", "training", "old", "state")
    store.write_text("x", "partials", "a" * 64, "image.faiss")
    age(tmp_path / "store", 8 * DAY_S)
    young = store.write_text("x", "embeddings", "generation-000009-young.parquet")
    rows, before = read_rows(store), paths(store)

    would = collect(keep=2, dry_run=True)
    assert paths(store) == before
    assert (would.kept, would.dropped, would.compaction.files) == ((3, 2), (1,), 2)
    done = collect(keep=2)
    assert (done.kept, done.dropped, done.compaction.done) == ((3, 2), (1,), True)
    assert done.removed == would.removed | {"data files": done.removed["data files"]}
    assert {kind: counts["files"] for kind, counts in done.removed.items()} == {
        "index files": 4,  # the first's manifest, ids and rows; the dead run's index
        "data files": 1,
        "release rows": 0,
        "checkpoints": 1,
        "reports of runs": 0,
        "unfinished trainings": 1,
        "parts of unfinished indexes": 1,
    }
    left = paths(store)
    assert {f"indexes/{RUNS[0]}/image.faiss", "indexes/notes/mine.txt"} <= left
    assert f"indexes/{RUNS[0]}/manifest.json" not in left
    assert "training/old/state" not in left
    assert os.path.exists(young)
    assert f"embeddings/{first}" in left, "release 2 reads it"
    assert read_rows(store) == rows
    for version in (2, 3):
        check_files(store, store.release(version))
    with pytest.raises(StoreError, match=r"no release 1, but 3, 2; `vitrine gc` drops old ones"):
        store.release(1)
    assert "would be dropped: 1" in describe(would)
    assert "removed: index files: 4 files" in describe(done)

    age(tmp_path / "store", 2 * 3600)
    assert collect(keep=1).removed["data files"]["files"] == 1  # release 3 reads the others
    publish(store, RUNS[4])
    age(tmp_path / "store", 2 * 3600)
    assert collect(keep=1).removed["data files"]["files"] == 2
    check_files(store, store.release())
    assert read_rows(store) == rows


def test_rows_of_a_killed_backfill_stay(local_ray, store, collect):
    append(store, [Row(n, 1) for n in range(10)])
    lost = append(store, [Row(n, 1, encoder=OTHER) for n in range(10)])
    publish(store, RUNS[0])
    assert collect().compaction.files == 0
    assert len(read_rows(store, OTHER)) == 10
    assert lost in store.embedding_files(store.embeddings().version())


def test_old_rows_of_an_encoder_without_a_release(local_ray, store, collect):
    append(store, [Row(n, 1) for n in range(10)])
    append(store, [Row(n, 1, encoder=OTHER) for n in range(10)], written_at=time.time() - 9 * DAY_S)
    publish(store, RUNS[0])
    with hold_lease(store, RUNS[5], store.release()):
        assert collect().compaction.files == 0, "the job may just be about to use it"
    assert collect().compaction.dropped_rows == 10
    assert (len(read_rows(store)), len(read_rows(store, OTHER))) == (10, 0)


def test_what_a_running_job_writes_stays(local_ray, store, collect, tmp_path):
    for run in RUNS[:3]:
        append(store, [Row(n, int(run[7])) for n in range(10)])
        publish(store, run)
    age(tmp_path / "store", 2 * 3600)
    with hold_lease(store, RUNS[5], store.release(2)):
        store.write_text("x", "indexes", RUNS[5], "image.faiss")
        store.write_text("x", "embeddings", "generation-000009-new.parquet")
        os.utime(store.uri("indexes", RUNS[5], "image.faiss"), (1, 1))
        before = paths(store, "indexes", RUNS[5]) | paths(store, "indexes", RUNS[1])
        done = collect(keep=1, min_age_s=0)
        assert (done.kept, done.dropped, done.running) == ((3, 2), (1,), (RUNS[5],))
        assert before <= paths(store, "indexes")
        assert "embeddings/generation-000009-new.parquet" in paths(store, "embeddings")
        assert done.removed["checkpoints"]["files"] == 0
        check_files(store, store.release(2))
    time.sleep(0.01)
    assert collect(keep=1, min_age_s=0).dropped == (2,)
    assert not paths(store, "indexes", RUNS[5])


def test_unpublished_release_stays_for_a_week(local_ray, store, collect, tmp_path):
    append(store, [Row(1, 1)])
    release = publish(store, RUNS[0])
    publish(store, RUNS[1])
    store.write_text(json.dumps(vars(release)), "indexes", RUNS[0], "release.json")
    folder = f"indexes/{RUNS[0]}/release.json"
    replace_rows_of_release_1 = replace_files(
        store.uri("releases"),
        [],
        {next(p.partition("/")[2] for p in paths(store, "releases") if "-000001-" in p): 1},
        EMBEDDINGS,
    )
    assert replace_rows_of_release_1
    age(tmp_path / "store", 2 * 3600)
    collect()
    assert folder in paths(store)
    age(tmp_path / "store", 8 * DAY_S)
    collect()
    assert folder not in paths(store)


def test_rollback_to_a_dropped_release_is_refused(local_ray, store, collect, tmp_path):
    for run in RUNS[:2]:
        append(store, [Row(1, int(run[7]))])
        publish(store, run)
    collect(keep=1)
    config = read_config(tmp_path / "job.yaml")
    for version in (1, None):
        with pytest.raises(StoreError, match="no release 1, but 2"):
            rollback(config, Progress(quiet=True), version)


def test_damaged_kept_release_stops_the_collection(store, collect):
    append(store, [Row(1, 1)])
    for run in RUNS[:3]:
        publish(store, run)
    delete_files(store, [f"indexes/{RUNS[1]}/manifest.json"])
    before = paths(store)
    with pytest.raises(StoreError, match=r"manifest\.json is missing"):
        collect(keep=2)
    assert paths(store) == before
    with pytest.raises(ConfigError):
        collect(keep=0)


def test_store_without_a_release(collect):
    with pytest.raises(StoreError, match="run `vitrine refresh` first"):
        collect()


def test_command_line_on_s3(tmp_path, run_vitrine, monkeypatch):
    with S3Server(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = Store("s3://shop/store")
        for n, run in enumerate(RUNS[:3]):
            append(store, [Row(p, n + 1) for p in range(10)], seed=n)
            publish(store, run)
        names = [f"indexes/{RUNS[4]}/{n}" for n in range(3)]
        for name in names:
            store.write_text("x", *name.split("/"))
        delete_files(store, [*names, f"indexes/{RUNS[4]}/missing"])
        assert paths(store, "indexes", RUNS[4]) == set()
        config = write_config(tmp_path / "job.yaml", store.root)
        done = run_vitrine("gc", "--config", config, "--keep", 2, "--json", "--quiet")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert (result["kept"], result["dropped"]) == ([3, 2], [1])
        assert result["removed"]["index files"]["files"] == 5
        assert result["compaction"]["dropped_rows"] == 20
        assert len(read_rows(store)) == 10
        assert live_leases(store) == []
        for version in (2, 3):
            check_files(store, store.release(version))
        done = run_vitrine("rollback", "--config", config, "--json", "--quiet")
        assert done.returncode == 0, done.stderr
        assert store.release().command == "rollback to 2"
