"""Folders of a remote store on this machine, and what a damaged store comes to."""

import threading
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from aiohttp import ClientPayloadError
from fsspec.implementations.local import LocalFileSystem

from encoders.fusion import FusionSpec
from indexing.build import add_vectors, train_index, write_index
from indexing.spec import IndexSpec
from jobs import exact, index_tasks
from jobs.embed_write import write_data_file
from jobs.errors import StoreError
from jobs.index_files import FieldFiles, PartitionFiles, open_index, upload_file
from jobs.index_tasks import Changes, Target
from jobs.release_files import read_file_names
from jobs.schemas import EMBEDDINGS, RELEASES
from jobs.space import VectorField
from jobs.state import read_data_file, read_row_groups
from jobs.storage import fetch_folder, parquet_errors
from jobs.store import DataFile, Store

FILES = {"encoder.json": b"{}", "model.safetensors": bytes(200_000), "text-tower/vocab.txt": b"a"}
PARTS = ("checkpoints", "f00d")


class Remote(LocalFileSystem):
    """A storage elsewhere; `downloads` counts, `cut` shortens what comes."""

    cachable = False
    downloads = 0
    cut = False

    def get_file(self, rpath, lpath, **named):
        type(self).downloads += 1
        super().get_file(rpath, lpath, **named)
        if self.cut:
            with open(lpath, "rb+") as file:
                file.truncate(1)


@pytest.fixture
def remote(tmp_path_factory, monkeypatch):
    """A storage and the address of a checkpoint on it."""
    remote, root = Remote(auto_mkdir=True), f"{tmp_path_factory.mktemp('remote')}/f00d"
    monkeypatch.setattr(Remote, "downloads", 0)
    for name, content in FILES.items():
        remote.pipe_file(f"{root}/{name}", content)
    return remote, root


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_folder_is_fetched_once(remote, tmp_path):
    local = tmp_path / "f00d"
    for _ in range(3):
        fetch_folder(*remote, local)
        assert contents(local) == FILES
    assert Remote.downloads == len(FILES)


def test_folder_is_whole_for_all_that_fetch_it_at_once(remote, tmp_path):
    local, barrier, seen = tmp_path / "f00d", threading.Barrier(8), []

    def fetch():
        barrier.wait()
        fetch_folder(*remote, local)
        seen.append(contents(local))

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [FILES] * 8
    assert list(tmp_path.iterdir()) == [local]


@pytest.mark.parametrize("left", [{}, {"model.safetensors": b"half"}, {"f00d/encoder.json": b"{}"}])
def test_what_a_killed_or_swept_fetch_left_is_replaced(remote, tmp_path, left):
    local = tmp_path / "f00d"
    local.mkdir()
    for name, content in left.items():
        (local / name).parent.mkdir(exist_ok=True)
        (local / name).write_bytes(content)
    fetch_folder(*remote, local)
    assert contents(local) == FILES
    assert list(tmp_path.iterdir()) == [local]


def test_folder_that_is_cut_on_its_way_is_not_kept(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(Remote, "cut", True)
    with pytest.raises(OSError, match="cut short"):
        fetch_folder(*remote, tmp_path / "f00d")
    assert list(tmp_path.iterdir()) == []


def test_local_copy_of_a_remote_store(tmp_path):
    store = Store(f"memory://{uuid.uuid4().hex}")
    for name, content in FILES.items():
        store.filesystem().pipe_file(store.uri(*PARTS, name), content)
    assert contents(store.local_copy(tmp_path, *PARTS)) == FILES
    assert store.local_copy(tmp_path, *PARTS, "encoder.json").read_bytes() == b"{}"
    for parts in (("checkpoints", "other"), (*PARTS, "other")):
        with pytest.raises(StoreError, match="other is missing"):
            store.local_copy(tmp_path, *parts)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("error", [ClientPayloadError("cut\nhere"), OSError("cut\nhere")])
def test_answer_that_is_cut_is_one_line(error):
    with pytest.raises(StoreError) as caught, parquet_errors("s3://shop/x.parquet"):
        raise error
    assert str(caught.value) == "s3://shop/x.parquet can't be read: cut here"


def damage(content, how):
    if how == "cut":
        return content[: len(content) // 2]
    if how == "metadata":
        return content[:-40] + b"\xff" * 30 + content[-10:]
    return b"no parquet"


@pytest.mark.parametrize("how", ["cut", "metadata", "other"])
def test_damaged_table_is_one_line(store, how):
    table = pa.table({"vector_id": np.arange(1000), "file": np.zeros(1000)})
    target = store.uri("embeddings", "x.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.write_text("", "embeddings", "x.parquet")
    store.filesystem().pipe_file(target, damage(sink.getvalue().to_pybytes(), how))
    for read in (
        lambda: read_data_file(store, "x.parquet", ["vector_id"]),
        lambda: read_row_groups(store, target, range(1), ["vector_id"]),
        lambda: read_file_names(store, target),
    ):
        with pytest.raises(StoreError, match=r"x\.parquet can't be read") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_table_without_its_list_of_files(store):
    store.write_text("", "indexes", "rows.parquet")
    pq.write_table(pa.table({"a": [1]}), store.uri("indexes", "rows.parquet"))
    with pytest.raises(StoreError, match=r"rows\.parquet is corrupted: it doesn't list"):
        read_file_names(store, store.uri("indexes", "rows.parquet"))


def test_data_file_that_cannot_be_written(store):
    store.write_text("a file where a folder should be", "embeddings")
    with pytest.raises(StoreError, match=r"embeddings/generation-000001-.* can't be written"):
        write_data_file(store, EMBEDDINGS.empty_table(), 1)


@pytest.fixture
def index(store, tmp_path):
    """A written flat index of ids 0 to 9."""
    vectors = np.eye(10, 16, dtype=np.float32)
    spec = IndexSpec(dim=16)
    filled = add_vectors(train_index(spec, vectors, seed=0), np.arange(10), vectors)
    path = tmp_path / "image.faiss"
    sha256 = write_index(filled, path)
    return upload_file(store, path, sha256, "run", path.name)


def test_damaged_index_is_one_line(store, index):
    assert open_index(store, index, mapped=False).ntotal == 10
    store.write_text("damaged", "indexes", "run", "image.faiss")
    with pytest.raises(StoreError, match=r"indexes/run: .*image\.faiss is corrupted"):
        open_index(store, index, mapped=True)


def test_index_that_does_not_hold_what_its_release_says(local_ray, store, index):
    stale = np.zeros(1, [("vector_id", "<i8"), ("all", "?")])
    stale["vector_id"], stale["all"] = 77, True
    spec = IndexSpec(dim=16)
    partition = PartitionFiles(ntotal=10, codes=index, refine=None)
    base = FieldFiles(spec=spec, template=index, partitions=(partition,))
    field = VectorField(name="image", dim=16, fusion=FusionSpec())
    target = Target(store=store, field=field, spec=spec, folder="next", partitions=1)
    changes = Changes(base=base, stale=[ray.put(stale)], mark="all", added=0)
    with pytest.raises(StoreError, match=r"image\.faiss doesn't fit its release .*reindex"):
        index_tasks.merge_codes._function(target, index, 0, changes)


def test_damaged_ids_are_one_line(store, tmp_path):
    class OfRun:
        indexes = "run"

    entry = {"folder": "earlier", "file": "ids.parquet", "sha256": "0" * 64}
    store.write_json({"ids": entry}, "indexes", "run", "manifest.json")
    store.write_text("damaged", "indexes", "earlier", "ids.parquet")
    with pytest.raises(StoreError, match=r"indexes/earlier: ids\.parquet is corrupted"):
        exact._open_ids(store, OfRun)


@pytest.mark.parametrize("table", ["embeddings", "releases"])
def test_damaged_delta_log_is_one_line(store, table):
    store._table(table, {"embeddings": EMBEDDINGS, "releases": RELEASES}[table], None)
    store.write_text("{", table, "_delta_log", "00000000000000000001.json")
    reads = {
        "embeddings": (
            lambda: store.embedding_files(1),
            lambda: sum(store.embedding_counts(0)) or store.embeddings_version(),
            lambda: store.commit_embeddings([DataFile("x.parquet", 1, 1)]),
        ),
        "releases": (store.releases,),
    }
    for read in reads[table]:
        with pytest.raises(StoreError, match=f"{table} can't be") as caught:
            read()
        assert "\n" not in str(caught.value)
        assert "unknown" not in str(caught.value)
