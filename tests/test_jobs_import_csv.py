import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.catalog import read_catalog
from jobs.config_file import read_config
from jobs.errors import JobError
from jobs.import_csv import ImportOptions, import_csv

PLAIN = "id,title,image_url,price\n1,Red mug,http://a.example/1.jpg,12.50\n2,Blue mug,,9\n"
SHOPIFY = (
    "Handle,Title,Body (HTML),Vendor,Type,Tags,Variant SKU,Variant Price,Image Src,Variant Image\n"
    'mug,Mug,"<p>Holds <b>tea</b> &amp;\ncoffee</p>",Acme,Cups,,M-1,"1,299.00",'
    "https://cdn.example/1.jpg,\n"
    "mug,,,,,,M-2,12.00,https://cdn.example/2.jpg,https://cdn.example/1.jpg\n"
    "mug,,,,,,M-3,12.00,,\n"
    "pot,Pot,,Acme,Pots,,P-1,20.00,https://cdn.example/3.jpg,\n"
)


@pytest.fixture
def run(tmp_path):
    """Import a text or bytes; the summary, the products and the rejected rows."""

    def run(content, *columns, name="products.csv", **options):
        path, dest = tmp_path / name, tmp_path / "catalog"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        summary = import_csv(path, dest, ImportOptions(columns=columns, **options))
        rejects = pq.read_table(dest / "rejects.parquet").to_pylist()
        assert summary.rows == summary.products + summary.merged + len(rejects)
        return summary, pq.read_table(dest / "catalog.parquet").to_pylist(), rejects

    return run


def test_columns_are_guessed_and_the_config_is_accepted(run, tmp_path):
    _, products, rejects = run(PLAIN)
    assert products[0] == {
        "product_id": "1",
        "title": "Red mug",
        "image_uri": "http://a.example/1.jpg",
        "price": 12.5,
    }
    assert products[1]["image_uri"] is None
    assert rejects == []
    config = read_config(tmp_path / "catalog" / "config.yaml")
    assert config.images.http_hosts == ("a.example",)
    assert read_catalog(config.catalog, need_images=True, need_text=True).rows == 2


def test_shopify_rows_are_joined(run, tmp_path):
    summary, products, rejects = run(SHOPIFY)
    assert summary.columns["product_id"] == ["Handle"]
    assert summary.columns["image_uri"] == ["Image Src", "Variant Image"]
    assert (summary.rows, summary.products, summary.merged, rejects) == (4, 2, 2, [])
    mug = products[0]
    assert mug["image_uri"] == ["https://cdn.example/1.jpg", "https://cdn.example/2.jpg"]
    assert mug["description"] == "Holds tea &\ncoffee"
    assert (mug["brand"], mug["category"], mug["price"]) == ("Acme", "Cups", 1299.0)
    assert mug["variant_sku"] == "M-1"
    assert summary.empty == ["Tags"]
    config = read_config(tmp_path / "catalog" / "config.yaml")
    assert config.catalog.text == "{title}. {brand}. {description}"
    assert read_catalog(config.catalog, need_images=True, need_text=True).rows == 2


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            "asin,product_title,main_image_url,other_image_url1,other_image_url2,brand",
            {"product_id": 1, "title": 1, "image_uri": 3, "brand": 1},
        ),
        (
            "g:id,g:title,g:image_link,g:additional_image_link,g:gtin,g:product_type",
            {"product_id": 1, "title": 1, "image_uri": 2, "gtin": 1, "category": 1},
        ),
        (
            "Artikelnummer,Bezeichnung,Bild,Preis,Farbe,Marke",
            {"product_id": 1, "title": 1, "image_uri": 1, "price": 1, "color": 1, "brand": 1},
        ),
        (
            "SKU,Nome,Imagem,Preço,Cor,EAN",
            {"product_id": 1, "title": 1, "image_uri": 1, "price": 1, "color": 1, "ean": 1},
        ),
    ],
)
def test_names_of_marketplaces(run, header, expected):
    def cell(name, row):
        if any(word in name.lower() for word in ("image", "bild", "imagem")):
            return f"https://a.example/{name}{row}.jpg"
        return f"{row}9.90" if "pre" in name.lower() else f"0{row} {name}"

    lines = [",".join(cell(name, row) for name in header.split(",")) for row in "123"]
    summary, products, _ = run("\n".join([header, *lines]))
    assert {name: len(sources) for name, sources in summary.columns.items()} == expected
    assert len(products) == 3


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_form_is_found(run, delimiter, encoding):
    buffer = io.StringIO()
    rows = [
        ["Item ID", "Name", "Notes"],
        ["7", "Café crème", "a, b; c"],
        ["8", 'x "y"', "two\nlines"],
    ]
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    summary, products, rejects = run(buffer.getvalue().encode(encoding))
    assert summary.delimiter == delimiter
    assert [list(product.values()) for product in products] == rows[1:]
    assert rejects == []


def test_ebay_file_exchange(run):
    _, products, _ = run(
        "*Action(SiteID=US),Custom label (SKU),Category ID,Title,PicURL,*Description,*StartPrice\n"
        "Add,AB-1,123,Shoe,https://a.example/a.jpg|https://a.example/b.jpg,<b>x</b>,12.50\n"
    )
    assert products[0] == {
        "product_id": "AB-1",
        "title": "Shoe",
        "description": "x",
        "image_uri": ["https://a.example/a.jpg", "https://a.example/b.jpg"],
        "price": 12.5,
        "action_site_id_us": "Add",
        "category_id": "123",
    }


def test_gzip_and_excels_separator_line(run):
    _, products, _ = run(gzip.compress(b"sep=;\r\nsku;title\r\na;b,c\r\n"), name="x.csv.gz")
    assert products == [{"product_id": "a", "title": "b,c"}]


def test_rejects_name_line_reason_and_text(run):
    content = (
        b"sku,title,note\n"
        b'1,"two\nlines",ok\n'
        b"2,too few\n"
        b"3,too,many,cells\n"
        b",no id,\n"
        b"1,Another title,\n"
        b'4,"never closed,\n'
        b"5,fine,after,\n"
        b"6,caf\xe9,\n"
        b"7,caf\xc3\xa9,\n"
        b'8,"15" TV",stray quotes\n'
        b"\n"
    )
    summary, products, rejects = run(content)
    assert [product["product_id"] for product in products] == ["1", "5", "7", "8"]
    assert [(row["line"], row["reason"]) for row in rejects] == [
        (4, "too_few_cells"),
        (5, "too_many_cells"),
        (6, "missing_product_id"),
        (7, "duplicate_id"),
        (8, "unclosed_quote"),
        (10, "bad_encoding"),
    ]
    assert rejects[3]["detail"] == "'1' is already on line 2"
    assert rejects[4]["raw"] == '4,"never closed,'
    assert rejects[5]["raw"] == "6,caf\\xe9,"
    assert summary.reasons["duplicate_id"] == 1


def test_repeated_id_further_down_is_rejected_with_its_first_line(run):
    _, products, rejects = run("sku,title\na,A\nb,B\na,A again\na,\nc,C\n")
    assert [product["title"] for product in products] == ["A", "B", "C"]
    assert [(row["line"], row["detail"]) for row in rejects] == [
        (4, "'a' is already on line 2"),
        (5, "'a' is already on line 2"),
    ]


def test_row_a_picture_with_the_same_title_is_joined(run):
    _, products, rejects = run(
        "sku,title,image\na,A,1.jpg\na,A,2.jpg\na,A,2.jpg\nb,B,\n", image_root="s3://b"
    )
    assert products[0]["image_uri"] == ["s3://b/1.jpg", "s3://b/2.jpg"]
    assert products[1]["image_uri"] is None
    assert [row["line"] for row in rejects] == [4]


def test_numbers_and_codes(run):
    _, products, _ = run(
        "sku;title;preis;stock;weight;plz;gtin;serie;mixed\n"
        "1;A;1.299,00 €;3;0,5;01067;4006381333931;20240101;12\n"
        "2;B;12,99 €;n/a;1,25;10115;;20240102;M\n"
    )
    assert products[0] == {
        "product_id": "1",
        "title": "A",
        "price": 1299.0,
        "stock": 3,
        "weight": 0.5,
        "plz": "01067",
        "gtin": "4006381333931",
        "serie": "20240101",
        "mixed": "12",
    }
    assert products[1]["stock"] is None
    assert products[1]["gtin"] is None


def test_relative_images_start_at_the_csv(run, tmp_path):
    _, products, _ = run("sku,title,image\n1,A,pics/1.jpg\n2,B,../../up.jpg\n3,C,/abs.jpg\n")
    uris = [product["image_uri"] for product in products]
    assert uris == [f"{tmp_path}/pics/1.jpg", "../../up.jpg", "/abs.jpg"]


def test_choices_override_the_guess(run):
    content = "id,title,alt,pic a,pic b,brand\n1,A,Other,x.jpg,y.jpg,Acme\n"
    choices = ("title=ALT", "image=pic a,pic b", "brand=")
    summary, products, _ = run(content, *choices, image_root="/r")
    assert products == [
        {
            "product_id": "1",
            "title": "Other",
            "image_uri": ["/r/x.jpg", "/r/y.jpg"],
            "title_2": "A",
            "brand": "Acme",
        }
    ]
    assert summary.columns["title_2"] == ["title"]


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("a,b\n1,2\n", {}, "no column looks like the product_id"),
        ("sku,b\n1,2\n", {}, "--column title=NAME; the columns are 'sku', 'b'"),
        ("sku,title\n1,2\n1,3\n1,4\n1,5\n", {}, "different in each product"),
        (PLAIN, {"columns": ("titel=title",)}, "did you mean 'title'?"),
        (PLAIN, {"columns": ("title=titel",)}, "no column 'titel'; did you mean 'title'"),
        (PLAIN, {"columns": ("title",)}, "expected role=NAME"),
        (PLAIN, {"columns": ("title=id", "product_id=id")}, "named for two roles"),
        (PLAIN, {"encoding": "klingon"}, "no known text encoding"),
        (PLAIN, {"delimiter": "::"}, "expected one character"),
        ("", {}, "is empty"),
        ("sku,title\n", {}, "no good row"),
        (
            "sku,title\n,a\n,b\n",
            {"columns": ("product_id=sku",)},
            "all 2 rows were rejected; line 2",
        ),
        (b"PK\x03\x04zip", {}, "zip or Excel"),
        (gzip.compress(PLAIN.encode())[:-9], {}, "can't be read whole"),
    ],
)
def test_errors_leave_nothing(run, tmp_path, content, options, words):
    columns = options.pop("columns", ()) if "columns" in (options := dict(options)) else ()
    with pytest.raises(JobError) as raised:
        run(content, *columns, **options)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["products.csv"]


def test_destination_must_be_empty(run, tmp_path):
    (tmp_path / "catalog").mkdir()
    run(PLAIN)
    with pytest.raises(JobError, match="not empty"):
        run(PLAIN)


def test_same_file_gives_the_same_bytes(tmp_path):
    (tmp_path / "a.csv").write_text(SHOPIFY)
    for name in ("one", "two"):
        import_csv(tmp_path / "a.csv", tmp_path / name, ImportOptions())
    for file in ("catalog.parquet", "rejects.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


CELLS = st.text('ab1,;"\n\r \u00e9', max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(CELLS, min_size=1, max_size=4).map(",".join), max_size=12))
def test_no_row_is_lost(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("any")
    text = "\n".join(["sku,title,note", "first,First,", *lines])
    (folder / "a.csv").write_text(text, encoding="utf-8", newline="")
    choices = ("product_id=sku", "title=title")
    options = ImportOptions(columns=choices, delimiter=",", encoding="utf-8")
    summary = import_csv(folder / "a.csv", folder / "out", options)
    ids = pq.read_table(folder / "out" / "catalog.parquet")["product_id"].to_pylist()
    rejects = pq.read_table(folder / "out" / "rejects.parquet").to_pylist()
    assert summary.rows == len(ids) + summary.merged + len(rejects)
    assert len(set(ids)) == len(ids)
    assert all(row["raw"].strip("\r\n") in text for row in rejects)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
def test_well_formed_rows_all_arrive(tmp_path_factory, cells):
    folder = tmp_path_factory.mktemp("good")
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as handle:
        rows = [[f"p{n}", title, note] for n, (title, note) in enumerate(cells)]
        csv.writer(handle).writerows([["sku", "title", "kept note"], *rows])
    options = ImportOptions(columns=("title=title",), delimiter="comma")
    summary = import_csv(folder / "a.csv", folder / "out", options)
    assert (summary.products, summary.rejected) == (len(cells), 0)


def test_command_prints_mapping_and_json(call_vitrine, failed_line, tmp_path):
    (tmp_path / "a.csv").write_text(SHOPIFY)
    done = call_vitrine("import-csv", tmp_path / "a.csv", tmp_path / "one")
    assert "= product_id" in done.stdout
    assert "4 rows = 2 products + 2 merged + 0 rejected" in done.stdout
    done = call_vitrine("import-csv", tmp_path / "a.csv", tmp_path / "two", "--json", "--quiet")
    assert json.loads(done.stdout)["products"] == 2
    assert done.stderr == ""
    done = call_vitrine("import-csv", tmp_path / "a.csv", tmp_path / "two", "--quiet")
    assert "not empty" in failed_line(done)


def test_interleaved_rows_of_products_are_rejected_and_lose_no_picture(tmp_path):
    lines = ["id,title,image", "A,Tee,a1.jpg", "B,Mug,b1.jpg", "A,Tee,a2.jpg", "B,Mug,b2.jpg"]
    path = tmp_path / "products.csv"
    path.write_text("\n".join([*lines, "C,Hat,c1.jpg", "C,Hat,c2.jpg"]) + "\n")
    summary = import_csv(path, tmp_path / "catalog", ImportOptions())
    assert (summary.rows, summary.products, summary.merged, summary.rejected) == (6, 3, 1, 2)
    rows = pq.read_table(tmp_path / "catalog" / "catalog.parquet").to_pylist()
    found = {row["product_id"]: [Path(uri).name for uri in row["image_uri"]] for row in rows}
    assert found == {"A": ["a1.jpg"], "B": ["b1.jpg"], "C": ["c1.jpg", "c2.jpg"]}
    rejects = pq.read_table(tmp_path / "catalog" / "rejects.parquet").to_pylist()
    assert [(row["line"], row["reason"]) for row in rejects] == [
        (4, "duplicate_id"),
        (5, "duplicate_id"),
    ]


def test_relative_image_root_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("products.csv").write_text("id,title,image\nA,Tee,a1.jpg\nB,Mug,b1.jpg\n")
    options = ImportOptions(image_root="pics")
    import_csv(Path("products.csv"), Path("catalog"), options)
    uris = pq.read_table("catalog/catalog.parquet")["image_uri"].to_pylist()
    assert uris == [str(tmp_path / "pics" / name) for name in ("a1.jpg", "b1.jpg")]
