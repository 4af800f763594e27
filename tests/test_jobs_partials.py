"""Parts of an index in the store: what is damaged or gone is made anew."""

import pytest

from indexing.files import check_file
from jobs.errors import StoreError
from jobs.files import list_files
from jobs.partials import (
    PARTIALS,
    RECORD,
    delete_partials,
    fetched_partial,
    find_partial,
    make_key,
    put_partial,
)
from jobs.storage import PatientS3, StorageError, file_sha256
from jobs.store import Store

KEY = make_key("rows", b"template")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def test_a_part_that_its_record_lacks_is_left_out(store, tmp_path):
    partial = put_one(store, tmp_path)
    with (
        pytest.raises(StoreError, match="is not in its record; it is left out now"),
        fetched_partial(store, partial, "1.index"),
    ):
        pass
    assert find_partial(store, KEY) is None


def test_a_file_that_vanishes_while_it_is_read_is_left_out(store, tmp_path):
    partial = put_one(store, tmp_path)
    with (
        pytest.raises(StoreError, match="is missing; it is left out now"),
        fetched_partial(store, partial, "0.index") as (path, sha256),
    ):
        check_file(path.rename(tmp_path / "else").with_name("gone"), sha256=sha256)
    assert find_partial(store, KEY) is None


def put_one(store, folder):
    path = folder / "0.index"
    path.write_bytes(b"lists")
    return put_partial(store, KEY, [(path, file_sha256(path))], [5])


def test_a_part_is_found_and_fetched(store, tmp_path):
    assert find_partial(store, KEY) is None
    partial = put_one(store, tmp_path)
    assert find_partial(store, KEY) == partial
    with fetched_partial(store, partial, "0.index") as (path, sha256):
        assert path.read_bytes() == b"lists"
        check_file(path, sha256=sha256)
    delete_partials(store, [KEY])
    assert list_files(store, PARTIALS) == []


@pytest.mark.parametrize(
    "record",
    [b"", b'{"key": "a", "fil', b"\xff\xfe", b"[]", b"{}", b'{"files": [1], "counts": []}'],
)
def test_a_damaged_record_is_no_part(store, tmp_path, record):
    partial = put_one(store, tmp_path)
    (tmp_path / "store" / PARTIALS / KEY / RECORD).write_bytes(record)
    assert find_partial(store, KEY) is None
    assert put_one(store, tmp_path) == partial == find_partial(store, KEY)


def test_a_storage_that_does_not_answer_is_an_error(monkeypatch):
    monkeypatch.setenv("VITRINE_STORAGE_PATIENCE_S", "0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    PatientS3.clear_instance_cache()  # connected to another server by an earlier test
    with pytest.raises(StorageError):
        find_partial(Store("s3://bucket/store"), KEY)
    PatientS3.clear_instance_cache()


@pytest.mark.parametrize(("damage", "words"), [("flipped", "is corrupted"), ("gone", "is missing")])
def test_a_part_that_lost_a_file_is_left_out(store, tmp_path, damage, words):
    partial = put_one(store, tmp_path)
    path = tmp_path / "store" / PARTIALS / KEY / "0.index"
    path.write_bytes(b"other") if damage == "flipped" else path.unlink()
    told = f"{words}.*; it is left out now: run the command again"
    with (
        pytest.raises(StoreError, match=told),
        fetched_partial(store, partial, "0.index") as (path, sha256),
    ):
        check_file(path, sha256=sha256)
    assert find_partial(store, KEY) is None
