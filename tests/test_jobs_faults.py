"""A refresh on S3 that fails: 503s, slow and cut answers, a server that dies and comes back."""

import io
import json
import os
import threading
import time

import pyarrow.parquet as pq
import pytest
from fault_proxy import FaultProxy, Faults
from s3_server import BUCKET, KEY, SECRET, S3Server, environment

from jobs.errors import PublishConflictError
from jobs.storage import PATIENCE_VARIABLE, PatientS3, StorageError
from jobs.store import DataFile, Release, Store

PRODUCTS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose bucket holds a catalog of 12 products."""
    from jobs.sample import write_sample

    folder = tmp_path_factory.mktemp("faults-sample") / "catalog"
    write_sample(folder, products=PRODUCTS, seed=5, street_per_product=1, image_px=96)
    with S3Server(tmp_path_factory.mktemp("faults")) as server:
        server.files.put(str(folder) + os.sep, f"{BUCKET}/catalog/", recursive=True)
        yield server


@pytest.fixture(scope="module")
def proxy(server):
    with FaultProxy(server.port, seed=7) as proxy:
        yield proxy


@pytest.fixture
def calm(proxy):
    """The proxy, without faults before and after the test."""
    proxy.injected.clear()
    yield proxy
    proxy.faults = Faults()


@pytest.fixture(scope="module")
def refresh(proxy, tmp_path_factory, run_vitrine):
    """Refresh a store through the proxy; return the process and its seconds."""
    path = tmp_path_factory.mktemp("faults-job") / "job.yaml"
    job = {
        "store": f"s3://{BUCKET}/none",
        "catalog": {"path": f"s3://{BUCKET}/catalog/catalog.parquet"},
        "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
        "embed": {"fields": ["image", "text"]},
        "ray": {"object_store_mb": 128},
    }
    path.write_text(json.dumps(job))
    printed = []

    def run(store, env=None):
        started = time.monotonic()
        done = run_vitrine(
            "refresh", "--config", path, "--json", "--quiet", "--set", f"store=s3://{BUCKET}/{store}",
            env=environment(proxy.endpoint) | (env or {}),
        )  # fmt: skip
        printed.append(done.stdout + done.stderr)
        return done, time.monotonic() - started

    run.printed = printed
    return run


@pytest.fixture(scope="module")
def expected(refresh, server):
    """What a refresh without faults publishes."""
    done, _ = refresh("calm")
    assert done.returncode == 0, done.stderr
    return published(server, "calm")


def tables(server, store, folder):
    paths = [p for p in server.files.find(f"{BUCKET}/{store}/{folder}") if p.endswith(".parquet")]
    return [pq.read_table(io.BytesIO(server.files.cat_file(path))) for path in paths]


def published(server, store):
    """What the newest release of a store serves: its counts, ids, vectors and quality."""
    releases = [row for table in tables(server, store, "releases") for row in table.to_pylist()]
    release = max(releases, key=lambda row: row["version"])
    address = f"{BUCKET}/{store}/indexes/{release['indexes']}"
    manifest = json.loads(server.files.cat_file(f"{address}/manifest.json"))
    ids = pq.read_table(io.BytesIO(server.files.cat_file(f"{address}/{manifest['ids']['file']}")))
    rows = [row for table in tables(server, store, "embeddings") for row in table.to_pylist()]
    rows.sort(key=lambda row: row["generation"])
    vectors = {row["vector_id"]: row["image_embedding"] for row in rows}
    counts = {name: release[name] for name in ("products", "rows", "vectors", "rejected")}
    return {"ids": ids.to_pylist(), "vectors": vectors, "encoder": release["encoder"], **counts}


def settled(refresh, store):
    """Refresh until no picture is left that a fault has rejected for now."""
    for _ in range(3):
        done, _ = refresh(store)
        assert done.returncode == 0, done.stderr
        if json.loads(done.stdout)["rejected"] == 0:
            return done
    raise AssertionError(done.stdout)


def test_503s_cut_and_slow_answers(calm, refresh, server, expected):
    calm.faults = Faults(slow_down=0.1, lost=0.03, cut=0.05, delay_s=0.03)
    settled(refresh, "rough")
    assert min(calm.injected[name] for name in ("slow_down", "lost", "cut")) > 0, calm.injected
    assert published(server, "rough") == expected


def test_server_dies_and_comes_back_in_every_stage(calm, refresh, server, expected):
    deaths = []

    def die(event):
        if event.wait(120):
            server.kill()
            time.sleep(3)
            server.start()
            deaths.append(time.monotonic())

    # The write of a data file, of an index, and the publishing commit.
    marks = [
        ("PUT", "/again/embeddings/g"),
        ("PUT", "/again/indexes/"),
        ("PUT", "/again/releases/"),
    ]
    threads = [threading.Thread(target=die, args=(calm.when(*mark),)) for mark in marks]
    for thread in threads:
        thread.start()
    settled(refresh, "again")
    for thread in threads:
        thread.join()
    assert len(deaths) == len(marks)
    assert published(server, "again") == expected


def test_gone_for_good_is_one_line_and_the_next_run_goes_on(calm, refresh, server, expected):
    gone = calm.when("PUT", "/gone/indexes/")
    thread = threading.Thread(target=lambda: gone.wait(120) and calm.down())
    thread.start()
    done, seconds = refresh("gone", {PATIENCE_VARIABLE: "5"})
    thread.join()
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("vitrine: error: ")]
    assert [done.stderr.splitlines()[-1]] == errors, done.stderr
    assert f"s3://{BUCKET}/gone/" in errors[0]
    assert "the next run goes on" in errors[0]
    assert len(done.stderr.splitlines()) <= 3, done.stderr  # at most what it waits for, said once
    assert seconds < 90
    calm.up()
    again, _ = refresh("gone")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["embedded"] == 0
    assert published(server, "gone") == expected


def test_catalog_that_never_answers_is_one_line(calm, refresh):
    calm.faults = Faults(slow_down=1.0)
    done, seconds = refresh("never", {PATIENCE_VARIABLE: "2"})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "did not answer for 2 s" in done.stderr.splitlines()[-1]
    assert seconds < 60


def test_credentials_are_nowhere(calm, refresh, server, expected):
    wrong = "Wrong/Secret+Aekee2ieghai"
    done, _ = refresh("wrong", {"AWS_SECRET_ACCESS_KEY": wrong})
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    texts = list(refresh.printed)
    for path in server.files.find(BUCKET):
        content = server.files.cat_file(path)
        texts.append(content.decode("latin-1"))
        if path.endswith(".parquet"):  # compressed
            texts.append(str(pq.read_table(io.BytesIO(content)).to_pylist()))
    assert len(texts) > 40
    for text in texts:
        for credential in (SECRET, KEY, wrong):
            assert credential not in text


@pytest.fixture
def store(calm, monkeypatch, request):
    """A store of its own for a test, used in this process."""
    for name, value in environment(calm.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(PATIENCE_VARIABLE, "8")
    PatientS3.clear_instance_cache()
    yield Store(f"s3://{BUCKET}/{request.node.name.partition('[')[0]}")
    PatientS3.clear_instance_cache()


def release_of(run, *, version=1, parent=None):
    return Release(
        version=version, parent=parent, created_at="2026-01-31T00:00:00+00:00", run=run,
        encoder="e", embeddings_version=1, indexes=run, command="refresh", products=1,
        vectors=1, rejected=0, rows=1, config_hash="c", quality={},
    )  # fmt: skip


def test_publishing_commit_whose_answer_is_lost_is_made_once(store, calm):
    for version, fault in enumerate(("lost", "cut", "slow_down"), 1):
        calm.fail_next("PUT", "/releases/_delta_log/", fault)
        store.publish(release_of(fault, version=version, parent=version - 1 or None))
    assert [one.run for one in store.releases()] == ["slow_down", "cut", "lost"]
    assert [calm.injected[fault] for fault in ("lost", "cut", "slow_down")] == [1, 1, 1]
    with pytest.raises(PublishConflictError):
        store.publish(release_of("late", version=3, parent=2))


def test_embedding_commit_whose_answer_is_lost_is_made_once(store, calm):
    store.embeddings()
    for version, fault in enumerate(("lost", "cut", "slow_down"), 1):
        store.filesystem().pipe_file(store.uri("embeddings", f"{fault}.parquet"), b"not read")
        calm.fail_next("PUT", "/embeddings/_delta_log/", fault)
        store.commit_embeddings([DataFile(f"{fault}.parquet", 8, 1)])
        assert store.embeddings().version() == version
    assert store.embedding_files(3) == ["cut.parquet", "lost.parquet", "slow_down.parquet"]


def test_waiting_is_said_once_and_ends(store, calm, caplog, tmp_path, monkeypatch):
    store.write_text("{}", "here.json")
    calm.down()
    try:
        started = time.monotonic()
        monkeypatch.setenv(PATIENCE_VARIABLE, "4")
        # Waits are jittered: else chance decides whether one is long enough to be told.
        monkeypatch.setattr("jobs.storage.SILENT_S", 0.3)
        with pytest.raises(StorageError, match="did not answer for 4 s"):
            store.read_json("here.json")
        assert time.monotonic() - started < 30
        with pytest.raises(StorageError):
            store.releases()
        with pytest.raises(StorageError):
            store.publish(release_of("down"))
        with pytest.raises(StorageError):
            store.local_copy(tmp_path, "here.json")
    finally:
        calm.up()
    said = [line.getMessage() for line in caplog.records if "does not answer" in line.getMessage()]
    assert said, caplog.records
    assert len(said) <= 4
    assert store.read_json("here.json") == {}
