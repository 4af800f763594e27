import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.catalog import read_catalog, template_names
from jobs.config import CatalogConfig
from jobs.errors import CatalogError
from jobs.images import ImagesConfig
from jobs.items import (
    explain_duplicates,
    fill_template,
    read_items,
    read_unit,
    scan_unit,
)
from jobs.schemas import vector_id

IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, columns=None, **options):
    """Write a catalog; without columns one of three products."""
    columns = columns or {
        "product_id": ["a", "b", "c"],
        "title": ["one", "two", "three"],
        "image_uri": ["a.jpg", "b.jpg", "c.jpg"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def read(path, *, need_images=True, need_text=True, **config):
    config = CatalogConfig(path=str(path), **config)
    return read_catalog(config, need_images=need_images, need_text=need_text)


def items_of(catalog):
    return [i for unit in catalog.units for some in read_items(catalog, unit, "r") for i in some]


def ids_of(catalog):
    return [item.product_id for item in items_of(catalog)]


def test_file(tmp_path):
    catalog = read(write(tmp_path / "catalog.parquet"))
    assert catalog.rows == 3
    assert catalog.root == str(tmp_path)
    assert [(i.product_id, i.image, i.text, i.image_number) for i in items_of(catalog)] == [
        ("a", "a.jpg", "one", 0),
        ("b", "b.jpg", "two", 0),
        ("c", "c.jpg", "three", 0),
    ]


def test_relative_path_gives_an_absolute_root(tmp_path, monkeypatch):
    write(tmp_path / "in" / "catalog.parquet")
    monkeypatch.chdir(tmp_path)
    assert read("in/catalog.parquet").root == str(tmp_path / "in")
    assert read("in").root == str(tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    assert read("catalog.parquet").root == str(tmp_path / "in")


def test_folder_is_read_whole_but_for_the_writers_own_files(tmp_path):
    for number in range(3):
        name = f"{'ab'[number % 2]}/part-{number}.parquet"
        ids = [f"{number}"]
        write(tmp_path / "in" / name, {"product_id": ids, "title": ids, "image_uri": ids})
    write(tmp_path / "in" / "_delta_log" / "checkpoint.parquet", {"x": [1]})
    (tmp_path / "in" / ".part-0.parquet").write_text("hidden")
    (tmp_path / "in" / "_SUCCESS").write_text("")
    catalog = read(tmp_path / "in")
    assert sorted(ids_of(catalog)) == ["0", "1", "2"]
    assert catalog.root == str(tmp_path / "in")
    assert list(catalog.files) == sorted(catalog.files)


def test_glob(tmp_path):
    for name in "abc":
        columns = {"product_id": [name], "title": [name], "image_uri": [name]}
        write(tmp_path / f"{name}.parquet", columns)
    catalog = read(tmp_path / "[ab].parquet")
    assert ids_of(catalog) == ["a", "b"]
    assert catalog.root == str(tmp_path)


def test_hive_partitions_are_columns(tmp_path):
    for category, name in (("lamps", "a"), ("shoes%20%26%20more", "b")):
        columns = {"product_id": [name], "title": [name], "image_uri": [name]}
        write(tmp_path / f"category={category}" / "x.parquet", columns)
    catalog = read(tmp_path, text="{title} in {category}")
    assert [i.text for i in items_of(catalog)] == ["a in lamps", "b in shoes & more"]
    assert catalog.partitions == ("category",)
    assert "category" in catalog.metadata


def test_null_hive_partition_is_no_word(tmp_path):
    columns = {"product_id": ["a"], "title": ["a"], "image_uri": ["a"]}
    write(tmp_path / "category=__HIVE_DEFAULT_PARTITION__" / "x.parquet", columns)
    assert items_of(read(tmp_path, text="{title} {category}"))[0].text == "a"


def test_columns_are_mapped(tmp_path):
    path = write(
        tmp_path / "x.parquet", {"asin": ["a"], "name": ["Lamp"], "photo": ["a.jpg"], "price": [3]}
    )
    catalog = read(
        path, columns={"product_id": "asin", "title": "name", "image_uri": "photo"}, text="{title}!"
    )
    (item,) = items_of(catalog)
    assert (item.product_id, item.image, item.text) == ("a", "a.jpg", "Lamp!")
    assert set(catalog.metadata) == {"asin", "name", "price"}


def test_template_over_other_types(tmp_path):
    path = write(
        tmp_path / "x.parquet",
        {
            "product_id": ["a", "b"],
            "tags": [["red", "blue"], None],
            "price": [3, None],
            "image_uri": ["x", "y"],
        },
    )
    catalog = read(path, text="{tags}, {price} {{EUR}}")
    assert [i.text for i in items_of(catalog)] == ["red, blue, 3 {EUR}", ""]


def test_empty_columns_give_an_empty_text():
    assert fill_template("{a}. {b}", {"a": None, "b": " "}) == ""
    assert fill_template("{a}. {b}", {"a": "x", "b": None}) == "x."
    assert fill_template("{a}", {"a": "{b}"}) == "{b}"


@pytest.mark.parametrize(
    "template", ["{title", "title}", "plain words", "", "{}", "{0}", "{title.real}", "{title[0]}"]
)
def test_malformed_template(template):
    with pytest.raises(CatalogError, match=r"catalog\.text"):
        template_names(template)


@pytest.mark.parametrize("template", ["{title:d}", "{title!x}", "{title:{width}}"])
def test_template_that_would_fail_only_when_filled(template):
    with pytest.raises(CatalogError, match=r"catalog\.text"):
        template_names(template)


def images_of(tmp_path, array, **config):
    count = len(array)
    ids = [chr(97 + n) for n in range(count)]
    catalog = read(
        write(tmp_path / "x.parquet", {"product_id": ids, "title": ids, "image": array}), **config
    )
    return catalog, [(i.product_id, i.image_number, i.image) for i in items_of(catalog)]


def test_list_of_uris(tmp_path):
    array = pa.array([["1.jpg", "2.jpg"], [], None, ["3.jpg", None]], pa.list_(pa.string()))
    catalog, found = images_of(tmp_path, array)
    assert not catalog.has_bytes
    assert found == [
        ("a", 0, "1.jpg"),
        ("a", 1, "2.jpg"),
        ("b", 0, None),
        ("c", 0, None),
        ("d", 0, "3.jpg"),
        ("d", 1, None),
    ]


def test_bytes(tmp_path):
    catalog, found = images_of(tmp_path, pa.array([b"x", None], pa.binary()))
    assert catalog.has_bytes
    assert "image" not in catalog.metadata
    assert found == [("a", 0, b"x"), ("b", 0, None)]


def test_struct_of_bytes_and_path(tmp_path):
    rows = [
        {"bytes": b"x", "path": "x.jpg"},
        {"bytes": None, "path": "y.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    catalog, found = images_of(tmp_path, pa.array(rows, IMAGE_STRUCT))
    assert catalog.has_bytes
    assert [image for _, _, image in found] == [b"x", "y.jpg", None, None]


@pytest.mark.parametrize("as_struct", [False, True])
def test_list_of_bytes(tmp_path, as_struct):
    rows = [[b"x", b"y"], None, [b"z"]]
    type_ = pa.list_(pa.binary())
    if as_struct:
        rows = [row and [{"bytes": one, "path": None} for one in row] for row in rows]
        type_ = pa.list_(IMAGE_STRUCT)
    catalog, found = images_of(tmp_path, pa.array(rows, type_))
    assert catalog.has_bytes
    assert found == [("a", 0, b"x"), ("a", 1, b"y"), ("b", 0, None), ("c", 0, b"z")]


@pytest.mark.parametrize("column", ["image_uri", "image"])
def test_uris_in_other_string_types(tmp_path, column):
    ids = pa.array(["a"]).dictionary_encode()
    path = write(
        tmp_path / "x.parquet",
        {"product_id": ids, "title": pa.array(["t"], pa.large_string()), column: ids},
    )
    assert items_of(read(path))[0].image == "a"


def hashes(tmp_path, **changes):
    columns = {"product_id": ["a"], "title": ["t"], "image_uri": ["u"]} | changes
    catalog = read(write(tmp_path / "x.parquet", columns))
    rows = scan_unit(catalog, 0, "r", ImagesConfig())
    return rows[["image_hash", "text_hash"]][0].item()


def test_content_hash_follows_the_content_alone(tmp_path):
    base = hashes(tmp_path)
    assert hashes(tmp_path, price=[3]) == base
    for change in ({"title": ["s"]}, {"image_uri": ["v"]}, {"image_version": [2]}):
        assert hashes(tmp_path, **change) != base
    catalog = read(tmp_path / "x.parquet")
    one, other = (scan_unit(catalog, 0, r, ImagesConfig())["text_hash"] for r in "rs")
    assert one != other


def test_faults_are_listed_all_at_once_with_their_file(tmp_path):
    write(tmp_path / "a.parquet", {"product_id": [1], "title": ["t"]})
    write(tmp_path / "b.parquet", {"asin": ["x"], "image_uri": [3]})
    (tmp_path / "c.parquet").write_text("no parquet")
    with pytest.raises(CatalogError) as caught:
        read(tmp_path, columns={"colour": "color"})
    faults = caught.value.faults
    for file, words in (
        ("a.parquet", "column 'product_id' is int64, expected string"),
        ("a.parquet", "column 'image_uri' is missing"),
        ("a.parquet", "column 'color' (catalog.columns) is missing"),
        ("b.parquet", "column 'product_id' is missing; it has asin, image_uri"),
        ("b.parquet", "column 'image_uri' is int64"),
        ("b.parquet", "column 'title' is missing"),
        ("c.parquet", "no readable Parquet file"),
    ):
        assert any(file in fault and words in fault for fault in faults), (file, words, faults)


def test_files_that_differ_in_what_they_hold(tmp_path):
    ids = {"product_id": ["a"], "title": ["a"]}
    write(tmp_path / "a.parquet", ids | {"image_uri": ["x"]})
    write(tmp_path / "b.parquet", {"product_id": ["b"], "title": ["b"], "image": [b"x"]})
    with pytest.raises(CatalogError, match=r"b\.parquet.*differ"):
        read(tmp_path)


def test_what_a_field_does_not_need_may_be_missing(tmp_path):
    path = write(tmp_path / "x.parquet", {"product_id": ["a"], "title": ["t"]})
    assert items_of(read(path, need_images=False))[0].image is None
    path = write(tmp_path / "y.parquet", {"product_id": ["a"], "image_uri": ["u"]})
    assert items_of(read(path, need_text=False))[0].image == "u"


@pytest.mark.parametrize("name", ["nowhere.parquet", "nowhere", "nowhere/*.parquet", "*.parquet"])
def test_path_that_does_not_exist(tmp_path, name):
    with pytest.raises(CatalogError, match=r"does not exist|is empty"):
        read(tmp_path / name)


@pytest.mark.parametrize("path", ["", "nonsense://x", "s3:/x"])
def test_path_that_is_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CatalogError, match="catalog"):
        read(path)


def test_empty_catalog(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError, match="is empty: no Parquet file"):
        read(tmp_path / "empty")
    columns = {name: pa.array([], pa.string()) for name in ("product_id", "title", "image_uri")}
    with pytest.raises(CatalogError, match="is empty: 1 files, 0 rows"):
        read(write(tmp_path / "x.parquet", columns))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\x00" * 100 + b"PAR1", b"a,b\n1,2"])
def test_file_that_is_no_parquet(tmp_path, content):
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(CatalogError, match=r"x\.parquet: no readable Parquet file"):
        read(path)


def test_parquet_damaged_inside_is_named(tmp_path):
    ids = [f"p{n:04d}" for n in range(300)]
    path = write(tmp_path / "x.parquet", {"product_id": ids, "title": ids, "image_uri": ids})
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(CatalogError, match=r"x\.parquet"):
        items_of(read(path))


def test_text_that_is_no_utf8_is_named(tmp_path):
    bad = pa.array([b"ok", b"caf\xe9"]).view(pa.string())
    path = write(
        tmp_path / "x.parquet", {"product_id": ["a", "b"], "title": bad, "image_uri": ["x", "y"]}
    )
    try:
        found = items_of(read(path))
    except CatalogError as error:
        assert "x.parquet" in str(error)  # noqa: PT017 - either is right: a fault, or a live row
    else:
        assert len(found) == 2


def find_twice(catalog):
    units = range(len(catalog.units))
    plan = np.concatenate([scan_unit(catalog, n, "r", ImagesConfig()) for n in units])
    ids, counts = np.unique(plan["vector_id"], return_counts=True)
    return set(ids[counts > 1].tolist())


def test_duplicate_ids_are_named_across_files(tmp_path):
    for name, ids in (("a", ["p", "q", "r"]), ("b", ["q", "s", "r"])):
        columns = {"product_id": ids, "title": ids, "image_uri": ids}
        write(tmp_path / f"{name}.parquet", columns)
    catalog = read(tmp_path)
    error = explain_duplicates(catalog, find_twice(catalog))
    assert isinstance(error, CatalogError)
    assert "2 product ids occur more than once: 'q', 'r'" in str(error)


def test_duplicates_with_lists_of_unequal_length(tmp_path):
    columns = {"product_id": ["p", "p"], "title": ["t"] * 2, "image_uri": [["1", "2"], ["1"]]}
    catalog = read(write(tmp_path / "x.parquet", columns))
    assert "'p'" in str(explain_duplicates(catalog, find_twice(catalog)))


def test_distinct_ids_pass(tmp_path):
    catalog = read(write(tmp_path / "x.parquet"))
    assert find_twice(catalog) == set()


@pytest.mark.parametrize(("value", "words"), [(None, "a null"), ("", "an empty")])
def test_null_id_is_named_with_its_row(tmp_path, value, words):
    ids = [*(f"p{n}" for n in range(700)), value]
    columns = {"product_id": ids, "title": ids, "image_uri": ids}
    catalog = read(write(tmp_path / "x.parquet", columns, row_group_size=600))
    with pytest.raises(CatalogError, match=rf"x\.parquet: row 100 of row group 1 has {words}"):
        items_of(catalog)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 2500), group=st.integers(50, 2000), has_bytes=st.booleans())
def test_units_cover_each_row_once(tmp_path_factory, rows, group, has_bytes):
    ids = [str(n) for n in range(rows)]
    images = pa.array([b"x"] * rows) if has_bytes else ids
    path = tmp_path_factory.mktemp("units") / "x.parquet"
    columns = {"product_id": ids, "title": ids, "image": images}
    catalog = read(write(path, columns, row_group_size=group))
    found = [
        name
        for unit in catalog.units
        for _, table in read_unit(catalog, unit, ["product_id"])
        for name in table["product_id"].to_pylist()
    ]
    assert found == ids
    assert catalog.rows == rows


def test_rows_are_read_in_small_tables(tmp_path):
    ids = [str(n) for n in range(1000)]
    catalog = read(
        write(tmp_path / "x.parquet", {"product_id": ids, "title": ids, "image_uri": ids})
    )
    tables = [t for unit in catalog.units for _, t in read_unit(catalog, unit, ["product_id"])]
    assert max(table.num_rows for table in tables) <= 256


@given(names=st.lists(st.text(max_size=5), unique=True, max_size=30))
@settings(max_examples=50, deadline=None)
def test_vector_ids_are_63_bits_and_distinct(names):
    ids = [vector_id(name, number) for name in names for number in range(3)]
    assert len(set(ids)) == len(ids)
    assert all(0 <= one < 2**63 for one in ids)


def scan(path, columns):
    return scan_unit(read(write(path, columns)), 0, "r", ImagesConfig())


def test_metadata_is_told_by_its_names_too(tmp_path):
    base = {"product_id": ["a"], "title": ["t"], "image_uri": ["x"]}
    one = scan(tmp_path / "1.parquet", base | {"price": [1]})
    two = scan(tmp_path / "2.parquet", base | {"prize": [1]})
    three = scan(tmp_path / "3.parquet", base | {"price": [2]})
    assert len({one["metadata_hash"][0], two["metadata_hash"][0], three["metadata_hash"][0]}) == 3
    assert one["text_hash"] == two["text_hash"] == three["text_hash"]


def test_a_column_that_some_files_lack_is_metadata(tmp_path):
    base = {"product_id": ["a"], "title": ["t"], "image_uri": ["x"]}
    write(tmp_path / "1.parquet", base | {"price": [1]})
    write(tmp_path / "2.parquet", base | {"product_id": ["b"], "stock": [2]})
    catalog = read(tmp_path)
    assert catalog.metadata == ("product_id", "title", "price", "stock")
    rows = [scan_unit(catalog, number, "r", ImagesConfig()) for number in range(2)]
    assert [len(one) for one in rows] == [1, 1]


@pytest.mark.parametrize(
    ("values", "kind", "images"),
    [
        (["a", "b", "c"], pa.string(), 3),
        ([["a", "b"], [], None, ["c", "d", "e"]], pa.list_(pa.string()), 7),
        ([[{"bytes": b"x", "path": None}] * 3], pa.list_(IMAGE_STRUCT), 3),
    ],
)
def test_images_are_counted_without_reading_them(tmp_path, values, kind, images):
    names = [f"p{n}" for n in range(len(values))]
    columns = {"product_id": names, "title": names, "image_uri": pa.array(values, kind)}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet", row_group_size=2)
    config = CatalogConfig(path=str(tmp_path / "c.parquet"))
    catalog = read_catalog(config, need_images=True, need_text=True)
    assert (catalog.rows, catalog.images) == (len(values), images)
