"""ids.parquet and rows.parquet: written by buckets, and opened by memory-map."""

import json
import os
import tempfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from table_rows import make_live

from jobs import ids_table
from jobs.buckets import split_by_bucket
from jobs.catalog import read_catalog
from jobs.config import CatalogConfig
from jobs.diff import Plan
from jobs.errors import CatalogError, JobError, StoreError
from jobs.ids import KEYS, write_ids
from jobs.ids_cache import UNUSED_S
from jobs.ids_table import Ids
from jobs.live import Live, LiveRows
from jobs.schemas import IMAGE_BITS, vector_id
from jobs.storage import file_sha256, machine_cache
from jobs.store import Store

IMAGES = 100


def write_live(catalog, ids, store, buckets):
    rows = make_live(*({"vector_id": v, "row": n} for n, v in enumerate(ids)))
    parts = split_by_bucket(rows, buckets)
    live = Live(
        rows=LiveRows(
            files=[], group_rows=[], file_rows=0, parts=[], vectors=len(ids),
            products=2, rejected=0, most_images=IMAGES,
        ),
        buckets=[ray.put(part) for part in parts],
        stale=[], names=["a.parquet"], reasons={}, examples={},
    )  # fmt: skip
    plan = Plan(groups=[range(len(catalog.units))], parts=[[]] * buckets, rows=len(ids))
    return write_ids(catalog, plan, live, store, "run")


@pytest.mark.parametrize("buckets", [1, 8])
def test_every_live_image_of_a_product_is_listed(local_ray, tmp_path, buckets):
    table = {"product_id": ["a", "b"], "title": ["x", "y"], "image": [[b"1"] * IMAGES, [b"2"]]}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    config = CatalogConfig(path=str(tmp_path / "c.parquet"))
    catalog = read_catalog(config, need_images=True, need_text=True)
    live = sorted([*(vector_id("a", n) for n in range(1, IMAGES)), vector_id("b", 0)])
    store = Store(str(tmp_path / "store"))
    entries = write_live(catalog, live, store, buckets)
    folder = tmp_path / "store" / "indexes" / "run"
    assert entries["ids"]["rows"] == entries["rows"]["rows"] == IMAGES
    assert entries["ids"]["folder"] == "run"
    ids = Ids.open(store, entries["ids"], tmp_path / "cache", batch_rows=7)
    assert len(ids) == IMAGES
    assert ids.select_products(["a", "b"]).tolist() == live
    (row,) = ids.find(np.array([vector_id("a", 99)]))
    assert (row["product_id"], row["image_number"], row["metadata"]["title"]) == ("a", 99, "x")
    with pytest.raises(ValueError, match="not in ids"):
        ids.find(np.array([vector_id("a", 0)]))
    rows = pq.read_table(folder / "rows.parquet")
    assert rows["vector_id"].to_pylist() == live
    assert rows["row"].to_pylist() == list(range(IMAGES))
    assert json.loads(rows.schema.metadata[b"files"]) == ["a.parquet"]


def test_a_row_that_left_the_catalog_meanwhile_is_an_error(local_ray, tmp_path):
    pq.write_table(pa.table({"product_id": ["a"], "title": ["x"]}), tmp_path / "c.parquet")
    config = CatalogConfig(path=str(tmp_path / "c.parquet"))
    catalog = read_catalog(config, need_images=False, need_text=True)
    live = sorted([vector_id("a", 0), vector_id("gone", 0)])
    with pytest.raises(CatalogError, match="changed while it was read"):
        write_live(catalog, live, Store(str(tmp_path / "store")), 1)


class Table:
    """An ids.parquet of a store of its own, with row groups of four, and its cache."""

    def __init__(self, folder, rows, metadata=None):
        self.store, self.cache = Store(str(folder / "store")), folder / "cache"
        self.parquet = folder / "store" / "indexes" / "run" / "ids.parquet"
        self.parquet.parent.mkdir(parents=True)
        table = pa.Table.from_pylist([{n: row[n] for n in KEYS.names} for row in rows], KEYS)
        if metadata is None:
            metadata = pa.array([row["metadata"] for row in rows])
        table = table.append_column("metadata", metadata)
        pq.write_table(table, self.parquet, row_group_size=4)
        self.entry = {"folder": "run", "file": "ids.parquet", "sha256": file_sha256(self.parquet)}

    @property
    def arrow(self):
        return self.cache / f"{self.entry['sha256']}.arrow"

    def open(self):
        return Ids.open(self.store, self.entry, self.cache, batch_rows=3)


def make_rows(products=12, images=2):
    rows = [
        {
            "vector_id": vector_id(f"p{n}", image),
            "product_id": f"p{n}",
            "image_number": image,
            "image_uri": f"{n}-{image}.jpg",
            "metadata": {"product_id": f"p{n}", "price": None if n == 3 else 1.0 * n, "tag": "ab"},
        }
        for n in range(products)
        for image in range(images)
    ]
    return sorted(rows, key=lambda row: row["vector_id"])


def int64(values):
    return np.array(values, np.int64)


def test_rows_are_found_in_the_order_asked(tmp_path):
    rows = make_rows()
    ids = Table(tmp_path, rows).open()
    wanted = [*np.random.default_rng(0).permutation(len(rows)).tolist(), 5, 5]
    asked = int64([rows[place]["vector_id"] for place in wanted])
    assert ids.find(asked) == [rows[place] for place in wanted]
    assert ids.products(asked) == [rows[place]["product_id"] for place in wanted]
    assert ids.find(int64([])) == ids.products(int64([])) == []
    assert ids.columns == ["product_id", "price", "tag"]
    assert len(ids) == len(rows)


def test_an_unknown_id_is_named(tmp_path):
    rows = make_rows()
    ids = Table(tmp_path, rows).open()
    known = [row["vector_id"] for row in rows]
    strangers = {-1, 0, 2**63 - 1} | {one + step for one in known for step in (-1, 1)}
    for stranger in strangers - set(known):
        with pytest.raises(ValueError, match=f"vector id {stranger} is not in ids.parquet"):
            ids.find(int64([known[0], stranger]))
        with pytest.raises(ValueError, match="is not in"):
            ids.products(int64([stranger]))


def test_an_empty_table_has_nothing(tmp_path):
    kind = pa.struct([("price", pa.float64())])
    ids = Table(tmp_path, [], pa.array([], kind)).open()
    assert len(ids) == 0
    assert ids.columns == ["price"]
    assert ids.select(pc.field("price") < 1).tolist() == ids.select_products(["a"]).tolist() == []
    assert ids.sample_rows(3) == []
    assert ids.first_rows(["a"]) == {}
    with pytest.raises(ValueError, match="is not in"):
        ids.find(int64([0]))


@pytest.mark.parametrize(
    ("predicate", "kept"),
    [
        (pc.field("price") < 3, {"p0", "p1", "p2"}),
        (pc.field("price").is_null(), {"p3"}),
        ((pc.field("product_id") == "p7") & (pc.field("tag") == "ab"), {"p7"}),
        ((pc.field("image_number") == 2) | (pc.field("product_id") == "p8"), {"p8"}),
        (pc.field("tag") == "none", set()),
        (pc.scalar(True), {f"p{n}" for n in range(12)}),
    ],
)
def test_select_keeps_what_satisfies_a_predicate(tmp_path, predicate, kept):
    rows = make_rows()
    found = Table(tmp_path, rows).open().select(predicate)
    assert found.dtype == np.int64
    assert found.tolist() == [row["vector_id"] for row in rows if row["product_id"] in kept]


def test_a_row_without_metadata_satisfies_no_predicate(tmp_path):
    rows = make_rows(3, 1)
    rows[1]["metadata"] = None
    ids = Table(tmp_path, rows).open()
    assert ids.select(pc.field("tag") == "ab").tolist() == [rows[n]["vector_id"] for n in (0, 2)]
    name = rows[1]["product_id"]
    assert ids.first_rows([name])[name]["metadata"] == {}


@pytest.mark.parametrize(
    ("predicate", "reason"),
    [
        (pc.field("prize") < 3, r"Name\(prize\); the columns are .*image_uri, price, tag$"),
        (pc.field("tag") < 3, "no kernel matching"),
        (pc.field("price") + 1, "gives double, expected bool"),
        (pc.match_substring_regex(pc.field("tag"), "("), "missing \\)"),
    ],
)
def test_a_predicate_that_cannot_be_used_is_one_line(tmp_path, predicate, reason):
    ids = Table(tmp_path, make_rows()).open()
    with pytest.raises(JobError, match=reason) as caught:
        ids.select(predicate)
    assert "\n" not in str(caught.value)


def test_products_are_told_apart_that_share_the_upper_bits(tmp_path):
    base = vector_id("mine", 0) >> IMAGE_BITS << IMAGE_BITS
    owners = [("mine", 2), ("other", 0), ("mine", 0), ("other", 1), ("mine", 1)]
    rows = [
        {"vector_id": base + 10 * n, "product_id": name, "image_number": image, "image_uri": None,
         "metadata": {"n": n}}
        for n, (name, image) in enumerate(owners)
    ]  # fmt: skip
    ids = Table(tmp_path, rows).open()
    assert ids.select_products(["mine", "gone"]).tolist() == [base, base + 20, base + 40]
    assert ids.first_rows({"mine", "gone"}) == {"mine": rows[2]}


def test_ranges_full_of_other_products_are_walked_in_little_memory(tmp_path, monkeypatch):
    names = [f"p{n}" for n in range(40)]
    starts = {name: vector_id(name, 0) >> IMAGE_BITS << IMAGE_BITS for name in names}
    rows = [
        {"vector_id": start + n, "product_id": name if n % 100 == 7 else "other",
         "image_number": 300 - n, "image_uri": None, "metadata": {"n": n}}
        for name, start in starts.items() for n in range(300)
    ]  # fmt: skip
    ids = Table(tmp_path, sorted(rows, key=lambda row: row["vector_id"])).open()
    expected = sorted(start + n for start in starts.values() for n in (7, 107, 207))
    monkeypatch.setattr(ids_table, "BLOCK_ROWS", 1_000)
    tracemalloc.start()
    found, (_, peak) = ids.select_products([*names, "gone"]), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.tolist() == expected
    assert peak < 12_000 * 4 * 8  # four numbers of every row in the ranges
    assert {row["image_number"] for row in ids.first_rows(names).values()} == {93}


def test_all_products_are_found_by_name(tmp_path):
    rows = make_rows(40, 3)
    ids = Table(tmp_path, rows).open()
    names = sorted({row["product_id"] for row in rows})
    assert ids.select_products(names).tolist() == [row["vector_id"] for row in rows]
    first = ids.first_rows([*names, "gone"])
    assert sorted(first) == names
    assert all(
        row["image_number"] == 0 and name == row["product_id"] for name, row in first.items()
    )
    assert ids.sample_rows(3) == [rows[0], rows[59], rows[-1]]
    assert ids.sample_rows(1_000) == rows


def test_ids_that_are_not_there(tmp_path):
    rows = make_rows(3, 2)
    ids, wanted = Table(tmp_path, rows).open(), [row["vector_id"] for row in rows]
    asked = int64([-1, wanted[0], wanted[0] + 1, wanted[-1], 2**63 - 1])
    assert ids.present(asked).tolist() == [wanted[0], wanted[-1]]
    assert ids.present(int64([])).tolist() == []


def test_columns_of_dictionaries_that_differ(tmp_path):
    rows = make_rows(6, 2)
    texts = [f"category {n // 5}" for n in range(len(rows))]
    lists = pa.ListArray.from_arrays(range(len(rows) + 1), pa.array(texts).dictionary_encode())
    columns = [pa.array(texts).dictionary_encode(), lists]
    ids = Table(tmp_path, rows, pa.StructArray.from_arrays(columns, names=["one", "many"])).open()
    found = ids.find(int64([row["vector_id"] for row in rows]))
    assert [row["metadata"] for row in found] == [{"one": t, "many": [t]} for t in texts]
    assert len(ids.select(pc.field("one") == "category 1")) == 5


def test_text_that_is_not_utf8_is_found_as_far_as_it_can_be_read(tmp_path):
    """A catalog's column that is not embedded may hold any bytes; its rows are live."""
    rows = make_rows(1, 1)
    column = pa.array([b"caf\xe9"]).view(pa.string())
    metadata = pa.StructArray.from_arrays([column], names=["note"])
    (found,) = Table(tmp_path, rows, metadata).open().find(int64([rows[0]["vector_id"]]))
    assert found["metadata"] == {"note": "caf\ufffd"}
    assert found["product_id"] == "p0"


def test_a_second_open_maps_what_is_there(tmp_path):
    table = Table(tmp_path, make_rows())
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: table.open(), range(4)))
    assert {len(ids) for ids in opened} == {24}
    inode = table.arrow.stat().st_ino
    assert len(table.open()) == 24
    assert table.arrow.stat().st_ino == inode
    assert {path.name for path in table.cache.iterdir()} == {"lock", table.arrow.name}


@pytest.mark.parametrize(("damage", "words"), [("flipped", "is corrupted"), ("gone", "is missing")])
def test_a_damaged_release_is_refused_though_it_is_cached(tmp_path, damage, words):
    table = Table(tmp_path, make_rows())
    table.open()
    content = bytearray(table.parquet.read_bytes())
    content[len(content) // 2] ^= 1
    table.parquet.write_bytes(content) if damage == "flipped" else table.parquet.unlink()
    with pytest.raises(StoreError, match=words):
        table.open()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_made_again(tmp_path, share):
    table = Table(tmp_path, make_rows())
    whole = len(table.open())
    content = table.arrow.read_bytes()
    table.arrow.write_bytes(content[: int(share * len(content))])
    (table.cache / "work").mkdir()  # of a process that was killed
    (table.cache / "work" / "rest").write_text("half")
    assert len(table.open()) == whole
    assert table.arrow.read_bytes() == content
    assert not (table.cache / "work").exists()


def test_the_cache_of_a_machine_is_its_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    table = Table(tmp_path, make_rows(3))
    table.cache = machine_cache() / "ids"
    table.open()
    assert str(os.getuid()) in table.cache.relative_to(tmp_path).parts[0]
    assert [path.stat().st_mode & 0o777 for path in (table.cache, table.cache.parent)] == [
        0o700
    ] * 2


def test_the_cache_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"vitrine-cache-{os.getuid()}").write_text("no folder")
    with pytest.raises(StoreError, match="can't be written"):
        machine_cache()


def test_what_nobody_opens_leaves_the_cache(tmp_path):
    old, new = Table(tmp_path / "a", make_rows(3)), Table(tmp_path / "b", make_rows(4))
    new.cache = old.cache
    mapped, then = old.open(), time.time() - UNUSED_S - 60
    os.utime(old.arrow, (then, then))
    old.open()
    new.open()
    assert old.arrow.exists()
    os.utime(old.arrow, (then, then))
    new.arrow.unlink()
    new.open()
    assert not old.arrow.exists()
    assert len(mapped.sample_rows(10)) == 6


def test_damage_is_refused_before_it_is_mapped(tmp_path):
    table = Table(tmp_path, make_rows())
    content = bytearray(table.parquet.read_bytes())
    content[100] ^= 1
    table.parquet.write_bytes(content)
    with pytest.raises(StoreError, match=r"run: ids\.parquet is corrupted: sha256 .* expected"):
        table.open()
    table.parquet.unlink()
    with pytest.raises(StoreError, match=r"ids\.parquet is missing"):
        table.open()
    assert not table.arrow.exists()


@pytest.mark.parametrize("place", [2, 4])  # in a row group, and at the border of two
@pytest.mark.parametrize("step", [0, -1])
def test_ids_that_do_not_rise_are_refused(tmp_path, place, step):
    rows = make_rows()
    rows[place]["vector_id"] = rows[place - 1]["vector_id"] + step
    table = Table(tmp_path, rows)
    with pytest.raises(StoreError, match="corrupted: its vector ids don't rise"):
        table.open()
    assert [path.name for path in table.cache.iterdir()] == ["lock"]
