"""The `export` command: real releases as plain Parquet, read by DuckDB, pyarrow and Ray."""

import hashlib
import json
import os
import shutil
from itertools import pairwise
from urllib.parse import quote

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import ray
from s3_server import S3Server

from jobs import export_files
from jobs.config_file import read_config
from jobs.errors import ConfigError, JobError, StoreError
from jobs.exact import release_rows
from jobs.export import MANIFEST, export
from jobs.export_files import FileWriter
from jobs.export_layout import KEY_COLUMNS, NO_VALUE, ExportOptions, Layout, hive_folders
from jobs.export_rows import group_files
from jobs.export_serving import SERVING
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.search import open_release, result_rows
from jobs.space import parse_space
from jobs.store import Store
from jobs.vectors import read_blocks

pytestmark = pytest.mark.usefixtures("local_ray")

BRANDS = ["Acme", "", None, "a/b c=é%", ".."]
FIELDS = ("image", "multimodal", "text")
QUIET = Progress(quiet=True)


class Shop:
    """A store with two releases: ten products of up to two photos; in the second four more."""

    def __init__(self, folder, sample):
        shutil.copytree(sample, folder / "catalog")
        self.root, self.path = folder / "store", folder / "catalog" / "products.parquet"
        self.rows = pq.read_table(folder / "catalog" / "catalog.parquet").to_pylist()
        self.job = folder / "job.yaml"
        described = {
            "store": str(self.root),
            "catalog": {"path": str(self.path), "text": "{title}. {description}"},
            "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
            "embed": {"fields": list(FIELDS)},
            "ray": {"object_store_mb": 128},
            "gate": {"min_self_retrieval": 0},
        }
        self.job.write_text(json.dumps(described))
        self.config = read_config(self.job)
        self.store = Store(str(self.root))

    def refresh(self, products, price):
        kept = ("product_id", "title", "description")
        rows = [
            {name: self.rows[n][name] for name in kept}
            | {"image_uri": [self.rows[m]["image_uri"] for m in (n, n + 20)[: 1 + n % 2]]}
            | {"brand": BRANDS[n % 5], "year": None if n == 3 else 2020 + n % 2}
            | {"price": price + n, "Vector_ID": f"theirs {n}"}
            for n in range(products)
        ]
        pq.write_table(pa.Table.from_pylist(rows), self.path)
        refresh(self.config, QUIET)

    def export(self, to, **options):
        return export(self.config, ExportOptions(to=str(to), **options), QUIET)

    def expected(self, version, field):
        """What the store has: vector id to vector."""
        release = self.store.release(version)
        manifest = self.store.read_json("indexes", release.indexes, "manifest.json")
        live = release_rows(self.store, release, 1_000)
        one, found = parse_space(manifest["query"]).field(field), {}
        for files, parts in zip(live.files, live.parts, strict=True):
            rows = np.concatenate(ray.get(parts)).copy()
            rows["first"] = True
            for ids, vectors in read_blocks(self.store, one, files, rows):
                found |= dict(zip(ids.tolist(), vectors, strict=True))
        return found

    def ids(self, version):
        release = self.store.release(version)
        entry = self.store.read_json("indexes", release.indexes, "manifest.json")["ids"]
        path = self.root / "indexes" / entry["folder"] / entry["file"]
        return pq.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def shop(tmp_path_factory, sample_catalog):
    shop = Shop(tmp_path_factory.mktemp("export"), sample_catalog)
    shop.refresh(10, 1.5)
    shop.refresh(14, 100.5)
    return shop


def check_manifest(folder):
    """Check each file's entry against the file; return the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {str(path.relative_to(folder)) for path in folder.rglob("part-*")} == {
        one["path"] for one in manifest["files"]
    }
    for one in manifest["files"]:
        content = (folder / one["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            one["size_bytes"],
            one["sha256"],
        )
        assert pq.read_metadata(folder / one["path"]).num_rows == one["rows"]
    assert sum(one["rows"] for one in manifest["files"]) == manifest["rows"]
    return manifest


def check_vectors(shop, rows, version, dtype, fields=FIELDS):
    for field in fields:
        expected = shop.expected(version, field)
        found = {row["vector_id"]: np.array(row[f"{field}_embedding"], dtype) for row in rows}
        assert found.keys() == expected.keys()
        for vector_id, vector in expected.items():
            assert np.array_equal(found[vector_id], vector.astype(dtype))
            assert np.linalg.norm(found[vector_id].astype(np.float64)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_reader_finds_what_the_store_has(shop, tmp_path, dtype):
    done = shop.export(tmp_path / "out", dtype=dtype, rows_per_file=7, row_group_rows=3)
    assert (done.release, done.rows, done.products, done.fields) == (2, 21, 14, FIELDS)
    manifest = check_manifest(tmp_path / "out")
    assert manifest["fields"]["image"] == {"column": "image_embedding", "dim": 128, "dtype": dtype}
    assert (manifest["release"], manifest["products"], done.files) == (
        2,
        14,
        len(manifest["files"]),
    )
    assert manifest["query_sha256"]
    assert manifest["serving"] is None
    table = ds.dataset(tmp_path / "out", format="parquet").to_table()  # passes over the manifest
    assert table.schema.field("text_embedding").type.list_size == 128
    assert manifest["columns"] == {field.name: str(field.type) for field in table.schema}
    rows = table.to_pylist()
    check_vectors(shop, rows, 2, np.dtype(dtype))
    by_id = {row["vector_id"]: row for row in rows}
    for expected in shop.ids(2):
        row, metadata = by_id[expected["vector_id"]], expected["metadata"]
        assert [row[name] for name in KEY_COLUMNS] == [expected[name] for name in KEY_COLUMNS]
        assert row["metadata_Vector_ID"] == metadata["Vector_ID"]
        names = ("title", "description", "brand", "year", "price")
        assert [row[name] for name in names] == [metadata[name] for name in names]
    files = f"'{tmp_path}/out/*.parquet'"
    read = duckdb.sql(f"SELECT * FROM {files}")
    assert (
        dict(zip(read.columns, map(str, read.types), strict=True))["image_embedding"] == "FLOAT[]"
    )
    check_vectors(
        shop, [dict(zip(read.columns, r, strict=True)) for r in read.fetchall()], 2, dtype
    )
    vector = "image_embedding::FLOAT[128]"
    near = duckdb.sql(f"SELECT array_inner_product({vector}, {vector}) FROM {files}").fetchall()
    assert all(score == pytest.approx(1, abs=2e-3) for (score,) in near)
    assert ray.data.read_parquet(str(tmp_path / "out")).count() == 21


def test_files_and_row_groups_have_the_sizes_asked_for(shop, tmp_path):
    shop.export(tmp_path / "out", rows_per_file=7, row_group_rows=3, fields=("text",))
    sizes = []
    for path in sorted((tmp_path / "out").glob("*.parquet")):
        footer = pq.read_metadata(path)
        groups = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
        assert groups[:-1] == [3] * (len(groups) - 1)
        sizes.append((path.name[5:10], footer.num_rows))
    assert max(rows for _, rows in sizes) == 7
    assert len({group for group, _ in sizes}) > 1  # each task its own files, the last one smaller
    for (group, rows), (following, _) in pairwise(sizes):
        assert rows == 7 or group != following


def test_older_release_is_exported_after_a_newer_one(shop, tmp_path):
    done = shop.export(tmp_path / "out", release=1, fields=("image",), columns=("price",))
    assert (done.release, done.rows, done.products) == (1, 15, 10)
    table = pq.read_table(tmp_path / "out" / "part-00000-00000.parquet")
    assert table.column_names == [*KEY_COLUMNS, "price", "image_embedding"]
    assert min(table["price"].to_pylist()) == 1.5
    check_vectors(shop, table.to_pylist(), 1, np.float16, ("image",))


def test_partitions_are_hive_folders(shop, tmp_path):
    out = tmp_path / "out"
    shop.export(out, columns=("title",), fields=("text",), partition_by=("brand", "year"))
    manifest = check_manifest(out)
    assert manifest["partition_by"] == ["brand", "year"]
    assert list(manifest["columns"]) == [*KEY_COLUMNS, "title", "text_embedding"]
    folders = {path.parent.relative_to(out).parts for path in out.rglob("*.parquet")}
    assert ("brand=a%2Fb%20c%3D%C3%A9%25", f"year={NO_VALUE}") in folders
    assert {brand for brand, _ in folders} == {
        f"brand={NO_VALUE if brand is None else quote(brand, safe='')}" for brand in BRANDS
    }
    read = duckdb.sql(
        f"SELECT product_id, image_number, brand, year FROM '{out}/*/*/*.parquet'"
    ).fetchall()
    arrow = ds.dataset(out, format="parquet", partitioning="hive").to_table().to_pylist()
    names = ("product_id", "image_number", "brand")
    expected = {
        (row["product_id"], row["image_number"], row["metadata"]["brand"]): row["metadata"]["year"]
        for row in shop.ids(2)
    }
    assert {row[:3]: row[3] if row[3] is None else int(row[3]) for row in read} == expected
    assert {tuple(row[n] for n in names): row["year"] for row in arrow} == expected
    check_vectors(shop, arrow, 2, np.float16, ("text",))


def test_exported_folder_serves_without_the_store(shop, tmp_path, call_vitrine):
    copy = tmp_path / "store"
    shutil.copytree(shop.root, copy)
    out = tmp_path / "out"
    to = ("--to", out, "--set", f"store={copy}", "--quiet", "--release", 1, "--no-metadata")
    said = call_vitrine("export", "--config", shop.job, *to, "--index")
    assert said.returncode == 0, said.stderr
    assert f"for serving: {out}/{SERVING}" in said.stdout
    words = {"text": shop.rows[0]["title"], "k": 5}
    before = [
        result_rows(open_release(Store(str(copy)), 1).search(**words, field=f)) for f in FIELDS
    ]
    shutil.rmtree(copy)
    searcher = open_release(Store(f"{out}/{SERVING}"))
    assert [result_rows(searcher.search(**words, field=f)) for f in FIELDS] == before
    assert Store(f"{out}/{SERVING}").release().version == 1
    listed = check_manifest(out)["serving"]["files"]
    for one in listed:
        assert hashlib.sha256((out / one["path"]).read_bytes()).hexdigest() == one["sha256"]
    assert ds.dataset(out, format="parquet").count_rows() == 15  # and not the copied ids


def test_target_that_holds_something_is_refused(shop, tmp_path, call_vitrine, failed_line):
    (tmp_path / "empty").mkdir()
    shop.export(tmp_path / "empty", fields=("text",), columns=())
    (tmp_path / "file").write_text("a")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "part-00000-00000.parquet").write_text("a")
    for name, words in [
        ("empty", "is not empty (an export)"),
        ("half", f"no whole export: it has no {MANIFEST}"),
        ("file", "is a file"),
    ]:
        done = call_vitrine("export", "--config", shop.job, "--to", tmp_path / name, "--quiet")
        assert words in failed_line(done)
    with pytest.raises(JobError, match="lies in the store"):
        shop.export(shop.root / "embeddings" / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fields": ("smell",)}, "no field 'smell'; it has image, multimodal, text"),
        ({"columns": ("weight",)}, "no column 'weight'; it has title, .*price"),
        ({"partition_by": ("weight",)}, "no column 'weight'; it has"),
        ({"partition_by": ("price",)}, "'price' is double: folders can be made of"),
        ({"release": 9}, "no release 9"),
        ({"dtype": "int8"}, "expected float16 or float32"),
        ({"row_group_rows": 0}, "row_group_rows is 0"),
    ],
)
def test_export_that_cannot_be_made(shop, tmp_path, options, words):
    with pytest.raises(JobError, match=words):
        shop.export(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_too_many_folders_are_refused_before_anything_is_written(shop, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.export_rows.MAX_FOLDERS", 13)
    with pytest.raises(ConfigError, match="title would make more than 13 folders"):
        shop.export(tmp_path / "out", partition_by=("title",))
    assert not (tmp_path / "out").exists()


def test_damaged_store_leaves_no_mark(shop, tmp_path):
    shutil.copytree(shop.root, tmp_path / "store")
    written = (tmp_path / "store" / "embeddings").glob("*.parquet")
    lost = max(written, key=lambda path: path.stat().st_size)  # of the full build
    lost.unlink()
    config = shop.config.model_copy(update={"store": str(tmp_path / "store")})
    with pytest.raises(StoreError, match=lost.name):
        export(config, ExportOptions(to=str(tmp_path / "out"), rows_per_file=4), QUIET)
    assert not (tmp_path / "out" / MANIFEST).exists()
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(shop.root, tmp_path / "store")
    for path in (tmp_path / "store" / "indexes").rglob("text.faiss"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"text\.faiss is corrupted"):
        export(config, ExportOptions(to=str(tmp_path / "serving"), index=True), QUIET)
    assert not (tmp_path / "serving" / MANIFEST).exists()


def test_export_to_s3(shop, tmp_path, run_vitrine, monkeypatch):
    with S3Server(tmp_path) as server:
        to = ("--to", "s3://shop/vectors", "--partition-by", "brand", "--index", "--json", "-q")
        done = run_vitrine("export", "--config", shop.job, *to, env=server.environment)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["manifest"] == f"s3://shop/vectors/{MANIFEST}"
        manifest = json.loads(server.files.cat_file(said["manifest"]))
        for one in [*manifest["files"], *manifest["serving"]["files"]]:
            content = server.files.cat_file(f"shop/vectors/{one['path']}")
            assert hashlib.sha256(content).hexdigest() == one["sha256"]
        parts = [f"shop/vectors/{one['path']}" for one in manifest["files"]]
        table = pa.concat_tables(
            pq.ParquetFile(pa.BufferReader(server.files.cat_file(p))).read() for p in parts
        )
        check_vectors(shop, table.to_pylist(), 2, np.float16)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        searcher = open_release(Store(said["serving"]))
        found = searcher.search(text="a red shoe", k=3)
        assert result_rows(found) == result_rows(
            open_release(shop.store).search(text="a red shoe", k=3)
        )
        with pytest.raises(JobError, match="is not empty"):
            shop.export("s3://shop/vectors")


def test_groups_of_files_have_about_as_many_rows():
    counts = np.array([0, 3, 0, 4, 9, 1, 1, 0])
    groups = group_files(counts, 5)
    assert groups == [range(1, 4), range(4, 5), range(5, 7)]
    assert group_files(counts, 100) == [range(1, 7)]
    assert group_files(np.zeros(3, np.int64), 5) == group_files(np.zeros(0, np.int64), 5) == []


def test_folders_of_all_kinds_of_values():
    table = pa.table(
        {
            "flag": [True, None, False],
            "day": pa.array([0, None, 1], pa.date32()),
            "kind": pa.array(["x", None, "x"]).dictionary_encode(),
        }
    )
    folders, places = hive_folders(table, ["flag", "day", "kind"])
    assert [folders[place] for place in places] == [
        "flag=true/day=1970-01-01/kind=x",
        f"flag={NO_VALUE}/day={NO_VALUE}/kind={NO_VALUE}",
        "flag=false/day=1970-01-02/kind=x",
    ]
    assert hive_folders(table, [])[0] == [""]


def test_many_folders_do_not_pile_up_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(export_files, "PENDING_BYTES", 400)
    layout = Layout(
        fields=(),
        metadata=(("brand", "brand"),),
        partition_by=("brand",),
        schema=pa.schema([("n", pa.int64())]),
        rows_per_file=40,
        row_group_rows=1_000,
    )
    (tmp_path / "scratch").mkdir()
    writer = FileWriter(Store(str(tmp_path / "out")), layout, 7, tmp_path / "scratch")
    for start in range(0, 1_000, 100):
        numbers = list(range(start, start + 100))
        writer.add(pa.table({"n": numbers, "brand": [f"b{n % 3}" for n in numbers]}))
        assert writer.pending_bytes <= 400
    files = writer.close()
    assert sum(file.rows for file in files) == 1_000
    assert max(file.rows for file in files) == 40
    assert not os.listdir(tmp_path / "scratch")
    for brand in range(3):
        parts = sorted((tmp_path / "out" / f"brand=b{brand}").iterdir())
        read = [n for path in parts for n in pq.ParquetFile(path).read()["n"].to_pylist()]
        assert read == list(range(brand, 1_000, 3))
    assert parts[0].name == "part-00007-00000.parquet"
