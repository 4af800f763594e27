import shutil
import subprocess
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from readme_shop import PRODUCTS, readme_shop

from jobs.embeddings import iter_embeddings, load_embeddings
from jobs.errors import ConfigError, StoreError
from jobs.search import open_release
from jobs.store import Store


@pytest.fixture(scope="module")
def shop(local_ray, tmp_path_factory):
    return readme_shop(tmp_path_factory)


@pytest.fixture(scope="module")
def store(shop):
    return shop / "store-trained"


def to_array(table, field):
    column = table[f"{field}_embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), -1)


@pytest.mark.parametrize("field", ["image", "multimodal"])
def test_gives_what_an_export_has(shop, store, field):
    table = load_embeddings(store, field=field, columns=["title", "price"]).sort_by("vector_id")
    names = f"product_id, image_number, vector_id, image_uri, title, price, {field}_embedding"
    asked = f"SELECT {names} FROM '{shop}/embeddings/*.parquet' ORDER BY vector_id"
    exported = pa.table(duckdb.sql(asked).arrow().read_all())
    for name in ("product_id", "image_number", "vector_id", "image_uri", "title", "price"):
        assert table[name].to_pylist() == exported[name].to_pylist()
    vectors = to_array(table, field)
    rounded = np.array(exported[f"{field}_embedding"].to_pylist())
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, rounded, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("field", ["image", "text", "multimodal"])
def test_vectors_are_those_that_are_searched(store, field):
    table, searcher = load_embeddings(store, field=field), open_release(store)
    vectors = to_array(table, field)
    scores, ids = searcher.search_ids(vectors, 1, field=field)
    assert searcher.indexes[field][0].index.ntotal == len(table)
    np.testing.assert_array_equal(ids[:, 0], table["vector_id"].to_numpy())
    np.testing.assert_allclose(scores, 1, atol=1e-5)


def test_rows_are_those_of_the_release_that_is_named(store):
    first, second = (load_embeddings(store, version, field="text") for version in (1, 2))
    assert len(first) == PRODUCTS
    newest = load_embeddings(store, field="text")
    assert newest.equals(second)
    gone = set(first["product_id"].to_pylist()) - set(second["product_id"].to_pylist())
    assert gone == {f"P{PRODUCTS:07}"}
    before, after = (dict(zip(t["product_id"].to_pylist(), to_array(t, "text"), strict=True))
                     for t in (first, second))  # fmt: skip
    changed = [name for name in after if not np.array_equal(after[name], before[name])]
    assert changed == ["P0000001"]


def test_columns_are_of_the_release_too(store):
    prices = [
        dict(zip(*(t[name].to_pylist() for name in ("product_id", "price")), strict=True))
        for t in (load_embeddings(store, version, columns=["price"]) for version in (1, 2))
    ]
    assert all(prices[1][name] != prices[0][name] for name in prices[1])
    everything = load_embeddings(store, columns=None)
    assert {"title", "description", "price"} <= set(everything.column_names)
    assert load_embeddings(store).column_names[-1] == "multimodal_embedding"


def test_stream_gives_the_table(store):
    reader = iter_embeddings(Store(str(store)), field="image", columns=["title"])
    batches = list(reader)
    assert all(len(batch) for batch in batches)
    table = load_embeddings(store, field="image", columns=["title"])
    assert pa.Table.from_batches(batches, reader.schema).equals(table)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"field": "picture"}, "no field 'picture'; it has image, multimodal, text"),
        ({"columns": ["prize"]}, "no column 'prize'; it has title,"),
    ],
)
def test_unknown_names_are_told_at_once(store, given, told):
    with pytest.raises(ConfigError, match=told):
        iter_embeddings(store, **given)


def test_release_that_is_not_there(store, tmp_path):
    with pytest.raises(StoreError, match="no release 9, but 2, 1"):
        load_embeddings(store, 9)
    with pytest.raises(StoreError, match="has no release"):
        load_embeddings(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_copy_for_serving_has_none(shop):
    with pytest.raises(StoreError, match="a copy for serving"):
        load_embeddings(shop / "embeddings" / "_serving")


def test_data_file_that_is_gone_is_named(store, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    written = (copy / "embeddings").glob("*.parquet")
    lost = max(written, key=lambda path: path.stat().st_size)  # of the full build
    lost.unlink()
    reader = iter_embeddings(copy, field="image")
    with pytest.raises(StoreError, match=lost.name):
        list(reader)


def test_neither_says_a_word_nor_starts_ray(store):
    code = (
        "import sys; from jobs.embeddings import load_embeddings; import ray\n"
        "load_embeddings(sys.argv[1], field='image', columns=['title'])\n"
        "sys.exit(ray.is_initialized() or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
