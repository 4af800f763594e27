"""The page's HTTP interface and the `demo` command: real releases behind a real server."""

import datetime
import decimal
import io
import json
import signal
import socket
import sys
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demo_shop import CHANGED, MAX_BYTES, MAX_PIXELS, PRODUCTS, QUIET, photo_part, serve_page
from PIL import Image
from pyarrow import ipc

from jobs.catalog import read_catalog
from jobs.config import CatalogConfig
from jobs.config_file import read_config
from jobs.demo import _find_catalog
from jobs.demo_columns import MOST_VALUES, describe_columns, make_predicate, read_filters
from jobs.demo_hosts import host_name, is_loopback, page_address
from jobs.demo_pictures import PICTURE_PX, Pictures
from jobs.demo_release import product_vector
from jobs.demo_search import plain
from jobs.errors import JobError
from jobs.images import ImageRejected, ImagesConfig
from jobs.refresh import refresh

KEPT = PRODUCTS - CHANGED


@pytest.fixture(scope="module")
def page(demo_shop):
    return demo_shop.open_page(2)


@pytest.fixture(scope="module")
def client(page):
    with serve_page(page) as found:
        yield found


@pytest.fixture(scope="module")
def pair(demo_shop):
    """Release 2 beside release 1."""
    with serve_page(demo_shop.open_page(2, 1)) as found:
        yield found


def search(client, files=None, **form):
    return client.post("/api/search", data=form, files=files)


def found(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["answers"][0]["results"]


def names(answer):
    return [row["product_id"] for row in found(answer)]


def error(answer, status):
    """Check that an answer is one sentence of an error, and return it."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    sentence = answer.json()["error"]
    assert len(sentence.splitlines()) == 1
    return sentence


def nearest(shown, demo_shop):
    """The product whose picture is most like a thumbnail: a JPEG again, so never equal."""

    def distance(product):
        with Image.open(demo_shop.picture(product)) as stored:
            return np.abs(np.asarray(shown, float) - np.asarray(stored, float)).mean()

    return min(demo_shop.rows, key=distance)


def test_release_is_described(client, demo_shop):
    described = client.get("/api/release").json()
    (release,) = described["releases"]
    assert (release["name"], release["products"]) == ("release 2", KEPT)
    assert release["fields"] == ["multimodal", "image", "text"]
    assert (release["default_field"], release["image_weight"]) == ("multimodal", 0.5)
    filters = {one["column"]: one for one in release["filters"]}
    rows = [row for name, row in demo_shop.rows.items() if name in demo_shop.ids[1]]
    assert filters["category"]["kind"] == "values"
    assert filters["category"]["values"] == sorted({row["category"] for row in rows})
    prices = [row["price"] for row in rows]
    assert (filters["price"]["low"], filters["price"]["high"]) == (min(prices), max(prices))
    assert (filters["price"]["whole"], filters["stock"]["whole"]) == (False, True)
    assert described["limits"] == {
        "image_bytes": MAX_BYTES,
        "text_chars": 1000,
        "results": 100,
    }


def test_a_photo_finds_its_product_and_shows_its_picture(client, demo_shop):
    for product in sorted(demo_shop.ids[1])[:5]:
        answer = search(client, photo_part(demo_shop.picture(product)), field="image", k=4)
        best, *others = found(answer)
        row = demo_shop.rows[product]
        assert (best["product_id"], best["title"]) == (product, row["title"])
        assert (best["price"], best["place"]) == (row["price"], 1)
        assert best["score"] > 0.99 > others[0]["score"]
        assert len(others) == 3
        assert best["metadata"]["category"] == row["category"]
        taken = answer.json()["answers"][0]["ms"]
        assert taken["encode"] > 0
        assert taken["search"] > 0
    picture = client.get(best["image"])
    assert picture.headers["content-type"] == "image/jpeg"
    shown = Image.open(io.BytesIO(picture.content))
    with Image.open(demo_shop.picture(product)) as stored:
        assert shown.size == stored.size  # small already
    assert nearest(shown, demo_shop) == product


def test_words_and_photo_are_weighted(client, demo_shop):
    product = sorted(demo_shop.ids[1])[4]
    photo = photo_part(demo_shop.picture(product))
    words = "a red mug"
    scores = {}
    for share in (0, 0.5, 1):
        both = search(client, photo, text=words, image_weight=share, field="image")
        scores[share] = {row["product_id"]: row["score"] for row in found(both)}
    alone = {row["product_id"]: row["score"] for row in found(search(client, photo, field="image"))}
    spoken = found(search(client, text=f"  {words} ", field="image"))
    assert scores[1] == pytest.approx(alone, abs=1e-5)
    assert scores[0] == pytest.approx({r["product_id"]: r["score"] for r in spoken}, abs=1e-5)
    own = found(search(client, photo, text=words, field="image"))
    assert scores[0.5] == pytest.approx({r["product_id"]: r["score"] for r in own}, abs=1e-5)


def test_filters_let_through_what_they_say(client, demo_shop):
    rows = {name: demo_shop.rows[name] for name in demo_shop.ids[1]}
    color = rows[min(rows)]["color"]
    price = sorted(row["price"] for row in rows.values())[KEPT // 2]
    word = rows[min(rows)]["title"].split()[-1]
    cases = {
        json.dumps([{"column": "color", "values": [color, "no such"]}]): lambda r: (
            r["color"] == color
        ),
        json.dumps([{"column": "price", "to": price}]): lambda r: r["price"] <= price,
        json.dumps([{"column": "price", "from": price, "to": price + 10}]): lambda r: (
            price <= r["price"] <= price + 10
        ),
        json.dumps([{"column": "title", "contains": word.upper()}]): lambda r: word in r["title"],
        json.dumps([{"column": "color", "values": [color]}, {"column": "stock", "from": 1}]): (
            lambda r: r["color"] == color and r["stock"] >= 1
        ),
    }
    for filters, passes in cases.items():
        expected = {name for name, row in rows.items() if passes(row)}
        assert expected
        assert set(names(search(client, text="mug", k=100, filters=filters))) == expected
    nothing = json.dumps([{"column": "price", "to": -1}])
    assert names(search(client, text="mug", filters=nothing)) == []


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ('[{"column": "size", "values": ["L"]}]', "no column 'size' to filter by; there are"),
        ('[{"column": "price", "values": ["L"]}]', "'price' is filtered by range, not by values"),
        ('[{"column": "title", "values": [true]}]', "column 'title' is filtered by texts alone"),
        ('[{"column": "color", "values": ["red", true]}]', "'color' is filtered by texts alone"),
        ('[{"column": "price"}]', "expected values, contains, or from and to"),
        ('[{"column": "price", "to": 1, "contains": "x"}]', "expected values, contains, or from"),
        ('[{"column": "price", "to": "cheap"}]', "filters.0.to: "),
        ('[{"column": "price", "above": 1}]', "filters.0.above: "),
        ("{", "filters: "),
    ],
)
def test_bad_filters_are_refused(client, filters, words):
    assert words in error(search(client, text="mug", filters=filters), 400)


@pytest.mark.parametrize("field", ["image", "text", "multimodal"])
def test_more_like_this_searches_by_the_stored_vector(client, page, demo_shop, field):
    (shown,) = page.shown
    product = sorted(demo_shop.ids[1])[2]
    answer = search(client, product_id=product, field=field, k=5)
    vector = product_vector(shown, product, field)
    own, *others = shown.searcher.search_vectors(vector[None], k=6, field=field)[0]
    assert own.product_id == product
    assert own.score == pytest.approx(1, abs=2e-3)
    assert names(answer) == [one.product_id for one in others]
    mugs = json.dumps([{"column": "category", "values": [demo_shop.rows[product]["category"]]}])
    same = names(search(client, product_id=product, field=field, filters=mugs))
    assert product not in same
    assert {demo_shop.rows[name]["category"] for name in same} <= {
        demo_shop.rows[product]["category"]
    }


def test_a_vector_of_a_product_is_what_the_encoder_gives(page, demo_shop):
    (shown,) = page.shown
    product = sorted(demo_shop.ids[1])[0]
    encoded = shown.searcher.encode(demo_shop.picture(product).read_bytes(), None)
    assert product_vector(shown, product, "image") @ encoded > 0.999
    assert product_vector(shown, "nobody", "image") is None


def png(size):
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"just some words", 415, "This file is not a picture. These are read: JPEG, PNG"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 99, 422, "This picture's file is cut short."),
        (png((64, 64))[:90], 422, "This picture's file is cut short."),
        (png((1200, 1000)), 413, f"too many pixels: 1200 x 1000 px, limit {MAX_PIXELS} px."),
        (bytes(MAX_BYTES + 1), 413, f"too large: {MAX_BYTES + 1} bytes, limit {MAX_BYTES}."),
        (b"", 422, "This file is empty."),
    ],
)
def test_bad_photos_are_refused_in_words(client, content, status, words):
    files = {"image": ("photo.jpg", content, "image/jpeg")}
    sentence = error(search(client, files), status)
    assert words in sentence
    assert "\\x" not in sentence


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({}, "Give a photo, words, or both."),
        ({"text": "   "}, "Give a photo, words, or both."),
        ({"text": "x" * 1001}, "text: String should have at most 1000 characters"),
        ({"text": "mug", "k": 0}, "k: Input should be greater than or equal to 1"),
        ({"text": "mug", "k": 101}, "k: Input should be less than or equal to 100"),
        ({"text": "mug", "image_weight": 2}, "image_weight: "),
        ({"text": "mug", "field": "sound"}, "the release has no field 'sound'; it has"),
        ({"product_id": "P9"}, "release 2 has no product 'P9'"),
        ({"product_id": "P9", "field": "sound"}, "release 2 has no field 'sound'"),
        ({"product_id": "P9", "text": "mug"}, "Give a product, or a photo and words, not both."),
    ],
)
def test_bad_questions_are_refused_in_words(client, form, words):
    assert words in error(search(client, **form), 400)


def test_a_large_upload_is_not_read(client):
    """The server answers after the head: the body is never sent."""
    address = (client.base_url.host, client.base_url.port)
    head = (
        f"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 900000000\r\n\r\n"
    )
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # until it is closed
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"This upload is too large: the limit is 1.3 MB." in answer


def test_an_upload_of_unknown_length_is_cut_off(client):
    sent = []

    def body():
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        for _ in range(1000):
            sent.append(1)
            yield bytes(100_000)

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = client.post("/api/search", content=body(), headers=kind)
    assert "This upload is too large" in error(answer, 413)


def test_pictures_are_cached_and_only_of_the_release(client, demo_shop, page):
    first = found(search(client, text="mug", k=1))[0]
    picture = client.get(first["image"])
    assert picture.headers["cache-control"] == "private, max-age=86400"
    again = client.get(first["image"], headers={"If-None-Match": picture.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    key, number = first["image"].split("/")[-2:]
    error(client.get(f"/api/image/{key}/{int(number) + 1}"), 404)
    error(client.get(f"/api/image/{key}/{2**63}"), 404)
    error(client.get(f"/api/image/{key}/-1"), 404)
    error(client.get(f"/api/image/other/{number}"), 404)
    error(client.get(f"/api/image/{key}/x"), 400)
    error(client.get(f"/api/image/{key}/..%2F..%2Fcatalog.parquet"), 404)


def test_a_picture_that_is_gone_is_told_without_its_path(client, demo_shop):
    product = sorted(demo_shop.ids[1])[-1]
    row = next(r for r in found(search(client, text="mug", k=100)) if r["product_id"] == product)
    path = demo_shop.picture(product)
    content = path.read_bytes()
    path.unlink()
    try:
        assert error(client.get(row["image"]), 404) == "There is no picture: not_found."
    finally:
        path.write_bytes(content)


def write_bytes_catalog(folder, demo_shop):
    """A catalog that holds its pictures: two of each product, the second one grey."""
    rows = []
    for name, row in demo_shop.rows.items():
        own = demo_shop.picture(name).read_bytes()
        rows.append({"product_id": name, "title": row["title"], "image": [own, png((8, 8))]})
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "catalog.parquet", row_group_size=10)
    config = CatalogConfig(path=str(folder / "catalog.parquet"))
    return read_catalog(config, need_images=True, need_text=False)


def test_pictures_come_from_a_catalog_of_bytes(tmp_path, demo_shop):
    catalog = write_bytes_catalog(tmp_path / "bytes", demo_shop)
    pictures = Pictures(catalog, ImagesConfig())
    for name in list(demo_shop.rows)[::5]:
        row = {"product_id": name, "image_number": 0, "image_uri": None}
        assert pictures.has(None)
        shown = Image.open(io.BytesIO(pictures.thumbnail(row)))
        assert nearest(shown, demo_shop) == name
        second = Image.open(io.BytesIO(pictures.thumbnail(row | {"image_number": 1})))
        assert second.size == (8, 8)
    gone = {"product_id": "nobody", "image_number": 0, "image_uri": None}
    with pytest.raises(ImageRejected, match="no longer has it"):
        pictures.thumbnail(gone)


@pytest.mark.parametrize(("takes", "need"), [(("text",), False), (("text", "image"), True)])
def test_either_release_may_need_pictures(monkeypatch, takes, need):
    def keep(config, **needs):
        assert needs == {"need_images": need, "need_text": False}

    monkeypatch.setattr("jobs.demo.read_catalog", keep)
    shown = [
        SimpleNamespace(searcher=SimpleNamespace(space=SimpleNamespace(takes=one)))
        for one in (("text",), takes)
    ]
    _find_catalog(SimpleNamespace(catalog=None), tuple(shown))


def test_large_pictures_are_made_small(tmp_path, demo_shop):
    Image.new("RGB", (900, 600), "teal").save(tmp_path / "large.png")
    catalog = read_catalog(
        CatalogConfig(path=str(demo_shop.catalog / "catalog.parquet")),
        need_images=True,
        need_text=False,
    )
    pictures = Pictures(catalog, ImagesConfig())
    row = {"product_id": "p", "image_number": 0, "image_uri": str(tmp_path / "large.png")}
    shown = Image.open(io.BytesIO(pictures.thumbnail(row)))
    assert (shown.format, max(shown.size)) == ("JPEG", PICTURE_PX)
    assert pictures.has(row["image_uri"])
    assert not pictures.has(None)


def test_a_picture_host_that_is_dead_is_asked_once(demo_shop):
    """Else a browser's six connections wait for pictures, and a search waits behind them."""
    with socket.create_server(("127.0.0.1", 0)) as host:
        name = f"127.0.0.1:{host.getsockname()[1]}"
        catalog = read_catalog(
            CatalogConfig(path=str(demo_shop.catalog / "catalog.parquet")),
            need_images=True,
            need_text=False,
        )
        pictures = Pictures(catalog, ImagesConfig(timeout_s=0.3, retries=2, http_hosts=(name,)))
        row = {"product_id": "p", "image_number": 0, "image_uri": f"http://{name}/p.jpg"}
        with pytest.raises(ImageRejected, match="timeout"):
            pictures.thumbnail(row)
        host.settimeout(0.2)
        host.accept()[0].close()
        with pytest.raises(TimeoutError):
            host.accept()


def test_a_product_of_several_pictures_shows_the_one_that_was_found(tmp_path, demo_shop):
    product, other = sorted(demo_shop.ids[1])[:2]
    own = demo_shop.picture(product).read_bytes()
    rows = [
        {key: demo_shop.rows[name][key] for key in ("product_id", "title", "description")}
        | {"image": [png((8, 8)), own] if name == product else [png((9, 9))]}
        for name in (product, other)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "catalog.parquet")
    job = json.loads(demo_shop.config.read_text())
    job["store"] = str(tmp_path / "store")
    job["catalog"]["path"] = str(tmp_path / "catalog.parquet")
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    config = read_config(tmp_path / "job.yaml")
    assert refresh(config, QUIET).published
    with serve_page(demo_shop.open_page(1, config=config)) as client:
        best = found(search(client, photo_part(demo_shop.picture(product)), field="image"))[0]
        shown = Image.open(io.BytesIO(client.get(best["image"]).content))
    with Image.open(demo_shop.picture(product)) as stored:
        assert (best["product_id"], shown.size) == (product, stored.size)


def test_two_releases_are_compared(pair, demo_shop):
    described = pair.get("/api/release").json()["releases"]
    assert [one["name"] for one in described] == ["release 2", "release 1"]
    answer = search(pair, text="mug", k=100)
    newer, older = answer.json()["answers"]
    assert answer.json()["shared"] == KEPT - CHANGED
    places = [{row["product_id"]: row["place"] for row in one["results"]} for one in (newer, older)]
    assert [set(one) for one in places] == [demo_shop.ids[1], demo_shop.ids[0]]
    for one, other in ((newer, places[1]), (older, places[0])):
        assert {row["product_id"]: row["other_place"] for row in one["results"]} == {
            row["product_id"]: other.get(row["product_id"]) for row in one["results"]
        }
    only_old = min(demo_shop.ids[0] - demo_shop.ids[1])
    assert "no product" in error(search(pair, product_id=only_old), 400)
    only_new = min(demo_shop.ids[1] - demo_shop.ids[0])
    answer = search(pair, product_id=only_new).json()
    assert answer["shared"] is None
    assert answer["answers"][1]["error"] == f"release 1 has no product {only_new!r}"
    assert answer["answers"][0]["results"]


def test_releases_of_one_encoder_share_it(demo_shop):
    newest, older = demo_shop.open_page(2, 1).shown
    assert newest.searcher.encoder is older.searcher.encoder


def test_each_release_encodes_by_its_own_encoder(demo_shop):
    page = demo_shop.open_page(2, demo_shop.candidate)
    product = sorted(demo_shop.ids[1])[1]
    with serve_page(page) as client:
        answer = search(client, photo_part(demo_shop.picture(product)), field="image").json()
    assert page.shown[0].searcher.space.encoder != page.shown[1].searcher.space.encoder
    for one, shown in zip(answer["answers"], page.shown, strict=True):
        assert one["results"][0]["product_id"] == product
        vector = shown.searcher.encode(demo_shop.picture(product).read_bytes(), None)
        expected = shown.searcher.search_vectors(vector[None], k=10, field="image")[0]
        scores = [row["score"] for row in one["results"]]
        assert scores == pytest.approx([result.score for result in expected], abs=1e-5)
    assert answer["answers"][1]["name"] == f"candidate {demo_shop.candidate}"


STATIC = ("/", "/demo.css", "/demo.js", "/elements.js", "/filters.js", "/products.js")


def test_only_the_given_files_are_served(client):
    kinds = {path: client.get(path).headers["content-type"] for path in STATIC}
    assert kinds["/"] == "text/html; charset=utf-8"
    assert {kinds[path].split(";")[0] for path in STATIC[2:]} == {"text/javascript"}
    for path in ("/index.html", "/demo.py", "/..%2Fdemo.py", "/docs", "/openapi.json", "/api"):
        error(client.get(path), 404)
    error(client.get("/api/search"), 405)


@pytest.mark.parametrize("path", ["/", "/demo.js", "/api/release", "/nowhere"])
def test_every_answer_has_the_security_headers(client, path):
    headers = client.get(path).headers
    policy = dict(part.split(maxsplit=1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["img-src"] == "'self' blob: data:"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_other_sites_are_refused(client, page):
    own = str(client.base_url).rstrip("/")
    port = client.base_url.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert "this machine alone" in error(client.get("/", headers={"Host": host}), 421)
    for host in (f"localhost:{port}", "localhost:9999", "[::1]:80", "127.0.0.2"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    form = {"data": {"text": "mug"}}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": own},
    ):
        refused = client.post("/api/search", headers=headers, **form)
        assert "Another web site sent this" in error(refused, 403)
    for headers in ({}, {"Origin": own}, {"Origin": own, "Sec-Fetch-Site": "same-origin"}):
        assert client.post("/api/search", headers=headers, **form).status_code == 200


def test_a_page_for_others_has_any_name(page):
    with serve_page(page, loopback=False) as client:
        assert client.get("/", headers={"Host": "shop.example:8000"}).status_code == 200
        named = {"Host": "shop.example", "Origin": "http://shop.example"}
        assert client.post("/api/search", headers=named, data={"text": "mug"}).status_code == 200
        named["Origin"] = "http://evil.example"
        error(client.post("/api/search", headers=named, data={"text": "mug"}), 403)


def test_many_searches_at_once_answer_as_one(client):
    import concurrent.futures

    words = [f"{color} {thing}" for color in ("red", "blue", "green") for thing in ("mug", "rug")]
    expected = [found(search(client, text=one)) for one in words]
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda one: found(search(client, text=one)), 2 * words))
    assert answers == 2 * expected


def write_ids(path, columns):
    """An Arrow file like that of a release's ids, in two batches."""
    table = pa.table(columns)
    metadata = pa.StructArray.from_arrays(
        [column.combine_chunks() for column in table.columns], names=table.column_names
    )
    batch = pa.record_batch({"vector_id": pa.array(range(len(table))), "metadata": metadata})
    with ipc.new_file(path, batch.schema) as writer:
        writer.write_batch(batch.slice(0, 2))
        writer.write_batch(batch.slice(2))
    return batch


def test_columns_are_described_by_their_values(tmp_path):
    count = MOST_VALUES + 1
    columns = {
        "size": pa.array(["M", "L", None] * 20)[:count],
        "name": pa.array([f"n{n}" for n in range(count)]),
        "in_stock": pa.array([True, None, False] * 20)[:count],
        "price": pa.array([decimal.Decimal("1.50")] * (count - 1) + [decimal.Decimal("9.99")]),
        "rating": pa.array([float("nan"), 4.5, None, float("inf")] + [1.0] * (count - 4)),
        "weight": pa.array([3] * count, pa.int8()),
        "made": pa.array([datetime.date(2026, 1, 1)] * count),
        "tags": pa.array([["a"]] * count),
        "empty": pa.array([None] * count, pa.string()),
    }
    batch = write_ids(tmp_path / "ids.arrow", columns)
    found = describe_columns(tmp_path / "ids.arrow")
    assert {name: one.kind for name, one in found.items()} == {
        "size": "values",
        "name": "contains",
        "in_stock": "values",
        "price": "range",
        "rating": "range",
        "weight": "range",
    }
    assert found["size"].values == ("L", "M")
    assert found["in_stock"].values == (False, True)
    assert (found["price"].low, found["price"].high) == (1.5, 9.99)
    assert (found["weight"].whole, found["rating"].whole) == (True, False)
    table = pa.table(dict(zip(columns, batch["metadata"].flatten(), strict=True)))
    for filters, rows in {
        '[{"column": "in_stock", "values": [true]}]': count // 3 + (count % 3 > 0),
        '[{"column": "price", "from": 2}]': 1,
        '[{"column": "rating", "from": 4, "to": 5}]': 1,
        '[{"column": "name", "contains": "N3"}]': 2,
        '[{"column": "size", "contains": "l"}]': (count + 1) // 3,
    }.items():
        predicate = make_predicate(read_filters(filters), found)
        assert table.filter(predicate).num_rows == rows, filters
    assert make_predicate([], found) is None
    with pytest.raises(JobError, match="no column 'tags' to filter by"):
        make_predicate(read_filters('[{"column": "tags", "values": ["a"]}]'), found)


def test_filters_of_another_type_name_the_column(tmp_path):
    columns = {"sold": pa.array([True, False, None]), "size": pa.array(["L", "M", None])}
    write_ids(tmp_path / "ids.arrow", columns)
    described = describe_columns(tmp_path / "ids.arrow")
    for filters in ('"sold", "values": ["yes"]', '"sold", "contains": "y"'):
        with pytest.raises(JobError, match="column 'sold' is filtered by true and false alone"):
            make_predicate(read_filters(f'[{{"column": {filters}}}]'), described)
    with pytest.raises(JobError, match="column 'size' is filtered by texts alone"):
        make_predicate(read_filters('[{"column": "size", "values": [true]}]'), described)


def test_a_column_that_is_no_utf8_is_searched_for_a_part(tmp_path):
    raw = pa.array([b"caf\xe9", b"tea", b"tea", None])
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    write_ids(tmp_path / "ids.arrow", {"drink": text})
    assert describe_columns(tmp_path / "ids.arrow")["drink"].kind == "contains"


def test_metadata_of_any_type_becomes_json():
    row = {
        "nan": float("nan"),
        "date": datetime.date(2026, 1, 2),
        "price": decimal.Decimal("1.50"),
        "raw": b"abc",
        "list": [1, None, {"deep": float("inf")}],
        "text": "a",
        "yes": True,
        "exact": 2**53,
        "large": -(2**53) - 1,
    }
    assert plain(row) == {
        "nan": None,
        "date": "2026-01-02",
        "price": "1.50",
        "raw": "3 bytes",
        "list": [1, None, {"deep": None}],
        "text": "a",
        "yes": True,
        "exact": 2**53,
        "large": "-9007199254740993",
    }
    json.dumps(plain(row), allow_nan=False)


def test_hosts():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "")))
    assert [host_name(one) for one in ("a:1", "a", "[::1]:80", "[::1]")] == [
        "a",
        "a",
        "[::1",
        "[::1",
    ]
    assert page_address("::1", 80) == "http://[::1]:80/"
    assert page_address("localhost", 80) == "http://localhost:80/"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_serves_until_it_is_ended(demo_shop, number):
    options = {
        signal.SIGINT: ["--compare", demo_shop.candidate, "--quiet"],
        signal.SIGTERM: ["--release", "1", "--host", "0.0.0.0"],
    }[number]
    with demo_shop.serve(*options) as (address, running):
        releases = httpx.get(f"{address}api/release").json()["releases"]
        running.send_signal(number)
        rest, errors = running.communicate(timeout=60)
    assert rest == ""
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert [one["name"] for one in releases] == [
            "release 2",
            f"candidate {demo_shop.candidate}",
        ]
        assert (running.returncode, errors) == (0, "")
    else:
        assert [one["name"] for one in releases] == ["release 1"]
        assert "vitrine: warning: 0.0.0.0 is not this machine alone" in errors
        assert "open release 1" in errors


def test_command_tells_what_it_cannot_do(demo_shop, call_vitrine, failed_line, monkeypatch):
    def run(*options):
        return failed_line(call_vitrine("demo", "-c", demo_shop.config, "--quiet", *options))

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = run("--port", port)
        assert f"can't serve on 127.0.0.1, port {port}" in line
        assert "give another --port, or 0 for any" in line
    assert "has no release 9" in run("--port", 0, "--release", 9)
    assert "has no candidate 'tonight'" in run("--port", 0, "--compare", "tonight")
    assert "does not exist" in run("--port", 0, "--set", "catalog.path=/nowhere")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    line = run("--port", 0)
    assert "`vitrine demo` needs uvicorn, not installed here" in line
    assert "pip install --editable '.[demo]'" in line
