import threading
from dataclasses import replace

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs.errors import PublishConflictError, StoreError
from jobs.schemas import EMBEDDINGS
from jobs.search import Searcher
from jobs.store import DataFile, Release, Store, new_run_id


def make_release(version, parent, run="run"):
    return Release(
        version=version,
        parent=parent,
        created_at="2026-01-31T12:00:00+00:00",
        run=run,
        encoder="e" * 64,
        embeddings_version=1,
        indexes=run,
        products=2,
        vectors=3,
        rejected=1,
        rows=4,
        config_hash="c" * 64,
        command="refresh",
        quality={"image": {"intersection_at_10": 0.5}},
    )


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def test_new_store_has_no_release(store):
    assert store.releases() == []
    assert store.current_release() is None
    with pytest.raises(StoreError, match="run `vitrine refresh` first"):
        store.release()


def test_releases_are_newest_first_and_whole(store):
    published = [make_release(1, None), make_release(2, 1), make_release(3, 2)]
    for release in published:
        store.publish(release)
    assert store.releases() == published[::-1]
    assert store.current_release() == published[2]
    assert store.release(2) == published[1]
    with pytest.raises(StoreError, match="no release 7"):
        store.release(7)


def test_stale_publisher_loses(store):
    store.publish(make_release(1, None, "first"))
    with pytest.raises(PublishConflictError, match="another job published"):
        store.publish(make_release(1, None, "second"))
    store.publish(make_release(2, 1, "third"))
    with pytest.raises(PublishConflictError):
        store.publish(make_release(2, 1, "fourth"))
    assert [release.run for release in store.releases()] == ["third", "first"]


@pytest.mark.parametrize("parent", [None, 1])
def test_one_of_many_publishers_at_once_wins(store, parent):
    if parent:
        store.publish(make_release(1, None))
    version = (parent or 0) + 1
    barrier, outcomes = threading.Barrier(6), {}

    def publish(number):
        barrier.wait()
        try:
            store.publish(make_release(version, parent, f"run-{number}"))
            outcomes[number] = "won"
        except PublishConflictError:
            outcomes[number] = "lost"

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes.values()) == ["lost"] * 5 + ["won"]
    winner = next(number for number, outcome in outcomes.items() if outcome == "won")
    assert store.releases()[0] == make_release(version, parent, f"run-{winner}")
    assert len(store.releases()) == version


def test_publisher_that_read_before_the_other_committed_loses(store, monkeypatch):
    """The narrow case: both saw the same parent, only then does one commit."""
    store.publish(make_release(1, None))
    seen = store.current_release()
    late = Store(store.root)

    def current_release():
        monkeypatch.undo()
        store.publish(make_release(2, 1, "early"))
        return seen

    monkeypatch.setattr(late, "current_release", current_release)
    with pytest.raises(PublishConflictError):
        late.publish(make_release(2, 1, "late"))
    assert [release.run for release in store.releases()] == ["early", "run"]


@pytest.mark.parametrize("text", ["{", "", "[1]", "\x00\x01"])
def test_damaged_manifest(store, text):
    store.publish(make_release(1, None))
    store.write_text(text, "indexes", "run", "manifest.json")
    with pytest.raises(StoreError, match=r"manifest\.json is corrupted"):
        Searcher(store, "run")


def test_manifest_that_is_no_text(store):
    address = store.write_text("", "indexes", "run", "manifest.json")
    with open(address, "wb") as file:
        file.write(b"\xff\xfe\x00")
    with pytest.raises(StoreError, match=r"manifest\.json is corrupted"):
        Searcher(store, "run")


@pytest.mark.parametrize("text", ["{}", '{"format_version": 99}', '{"format_version": 1}'])
def test_manifest_of_another_shape(store, text):
    store.write_text(text, "indexes", "run", "manifest.json")
    with pytest.raises(StoreError):
        Searcher(store, "run")


def test_missing_manifest(store):
    with pytest.raises(StoreError, match=r"manifest\.json is missing"):
        Searcher(store, "run")


def test_damaged_log_of_releases(store, tmp_path):
    store.publish(make_release(1, None))
    for entry in (tmp_path / "store" / "releases" / "_delta_log").glob("*.json"):
        entry.write_text("{garbage")
    with pytest.raises(StoreError):
        store.releases()


def test_table_of_a_stranger_is_refused(store):
    write_deltalake(store.uri("embeddings"), pa.table({"a": [1]}))
    with pytest.raises(StoreError, match="no table of this version"):
        store.embeddings()


def test_missing_table_version(store):
    store.embeddings()
    with pytest.raises(StoreError):
        store.embeddings(99)


def test_committed_files_are_listed_by_version(store):
    assert store.embedding_files(store.embeddings().version()) == []
    store.commit_embeddings([DataFile("b.parquet", 10, 1), DataFile("a.parquet", 10, 2)])
    table = store.embeddings()
    assert store.embedding_files(table.version()) == ["a.parquet", "b.parquet"]
    assert store.embedding_files(0) == []
    assert pa.schema(table.schema().to_arrow()).names == EMBEDDINGS.names


def test_checkpoint_is_copied_once(store, tmp_path):
    source = tmp_path / "checkpoint"
    source.mkdir()
    for name in ("encoder.json", "model.safetensors"):
        (source / name).write_text("one")
    store.add_checkpoint(source, "f")
    (source / "encoder.json").write_text("two")
    store.add_checkpoint(source, "f")
    found = store.local_copy(tmp_path / "cache", "checkpoints", "f")
    assert {p.name: p.read_text() for p in found.iterdir()} == {
        "encoder.json": "one",
        "model.safetensors": "one",
    }
    with pytest.raises(StoreError, match="is missing"):
        store.local_copy(tmp_path / "cache", "checkpoints", "g")


def test_what_is_mapped_stays_when_a_file_is_written_again(store, tmp_path):
    (tmp_path / "one").write_bytes(b"first")
    target = store.upload(tmp_path / "one", "partials", "key", "file")
    (tmp_path / "one").write_bytes(b"other")
    for write in (
        lambda: store.upload(tmp_path / "one", "partials", "key", "file"),
        lambda: store.write_text("third", "partials", "key", "file"),
    ):
        with open(target, "rb") as opened:
            before = opened.read()
            write()
            opened.seek(0)
            assert opened.read() == before
    assert [path.name for path in (tmp_path / "store" / "partials" / "key").iterdir()] == ["file"]
    with pytest.raises(StoreError, match="is missing"):
        store.upload(tmp_path / "gone", "partials", "key", "file")
    with open(target) as opened:
        assert opened.read() == "third"


def test_root_is_one_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("a/").root == Store(str(tmp_path / "a")).root
    assert Store("s3://bucket/a/").uri("runs") == "s3://bucket/a/runs"
    assert not Store("s3://bucket/a").is_local


def test_run_ids_differ():
    assert len({new_run_id() for _ in range(50)}) == 50


def test_release_keeps_none_as_parent(store):
    store.publish(replace(make_release(1, None), quality={}))
    assert store.release().parent is None
    assert store.release().quality == {}
