"""What a report says and shows: its parts, its pictures, and that the page needs nothing else."""

import base64
import contextlib
import http.server
import io
import json
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_checks import check_page
from PIL import Image

from jobs import publish
from jobs.config import GateConfig, JobConfig
from jobs.errors import GateError
from jobs.gate_bars import check_gate, list_bars
from jobs.images import ImagesConfig
from jobs.index_lists import BINS, describe_lists
from jobs.neighbours import KEPT, ChangedQuery, compare_neighbours, name_neighbours
from jobs.plain import plain_rows, title_columns, title_of
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.reindex import reindex
from jobs.report import drop_pictures
from jobs.report_examples import _compare_columns
from jobs.report_lookup import _read_ids, read_ids
from jobs.report_pictures import MOST_BYTES, Picture, Pictures
from jobs.sample import write_sample
from jobs.store import Store

PRODUCTS, REMOVED = 200, 12
QUIET = Progress(quiet=True)
OPEN_GATE = {
    "max_reject_share": 1,
    "min_intersection_at_10": 0,
    "min_self_retrieval": 0,
    "min_overlap_at_10": 0,
}


def jpeg(width, height, colour=(180, 60, 40), **options):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "JPEG", **options)
    return buffer.getvalue()


DATA = jpeg(30, 20)


def found(*lists):
    """Ids of each query with falling scores, padded."""
    width = max(map(len, lists))
    ids = np.array([[*one, *[-1] * (width - len(one))] for one in lists], np.int64)
    return np.tile(np.linspace(0.9, 0.1, width, dtype=np.float32), (len(lists), 1)), ids


def test_queries_that_share_the_fewest_neighbours_come_first():
    own = np.array([1, 2, 3, -1, 5], np.int64)
    now = found([1, 10, 11, 12], [2, 20, 21, 22], [3, 30, 31, 32], [40, 41, 42, 43], [5, 50, 51])
    then = found([10, 11, 12, 1], [2, 20, 28, 29], [3, 30, 31, 39], [46, 47, 48, 49], [58, 59, 57])
    told = compare_neighbours(own, np.array([True] * 4 + [False]), now, then)
    assert (told.queries, told.changed) == (4, 3)  # the first found the same, the last is unclear
    assert [(one.place, one.vector_id, one.shared) for one in told.least] == [
        (3, -1, 0), (1, 2, 1), (2, 3, 2),
    ]  # fmt: skip
    second = told.least[1]
    assert [one for one, _ in second.before] == [20, 28, 29]
    assert [one for one, _ in second.after] == [20, 21, 22]
    assert second.after[0][1] == pytest.approx(0.9 - 0.8 / 3)


def test_lists_of_different_lengths_are_compared_as_far_as_both_go():
    own = np.array([7], np.int64)
    told = compare_neighbours(own, np.ones(1, bool), found([1, 2, 3, 4]), found([1, 2, 7]))
    assert (told.queries, told.changed) == (1, 0)
    alone = compare_neighbours(own, np.ones(1, bool), found([7]), found([7]))
    assert (alone.queries, alone.changed, alone.least) == (0, 0, ())


def test_few_changed_queries_are_kept_of_many():
    ids = np.arange(1000, dtype=np.int64)
    now, then = found(*([n, n + 5000] for n in ids)), found(*([n, n + 9000] for n in ids))
    told = compare_neighbours(ids, np.ones(1000, bool), now, then)
    assert (told.queries, told.changed, len(told.least)) == (1000, 1000, KEPT)


def row(product_id):
    return {"product_id": product_id, "image_uri": f"{product_id}.jpg", "title": product_id.upper()}


def test_neighbours_are_named_by_product_with_both_ranks():
    rows = {1: row("q"), 2: row("q"), 3: row("a"), 4: row("a"), 5: row("b"), 6: row("c")}
    query = ChangedQuery(
        place=0,
        vector_id=1,
        shared=1,
        before=((3, 0.9), (4, 0.8), (5, 0.7)),
        after=((2, 0.95), (6, 0.9), (3, 0.8), (99, 0.1)),  # 2 is its own product, 99 is not live
    )
    told = name_neighbours(query, rows, rows)
    assert (told["shared"], told["of"]) == (1, 2)
    ranks = {
        side: [(one["product_id"], one["rank"], one["other_rank"]) for one in told[side]]
        for side in ("before", "after")
    }
    assert ranks == {
        "before": [("a", 1, 2), ("b", 2, None)],
        "after": [("c", 1, None), ("a", 2, 1)],
    }
    assert told["before"][0] == row("a") | {"score": 0.9, "rank": 1, "other_rank": 2}
    other_images = ChangedQuery(
        place=0, vector_id=1, shared=0, before=((3, 0.9),), after=((4, 0.9), (2, 0.8))
    )
    assert name_neighbours(other_images, rows, rows) is None


@pytest.mark.parametrize(
    "sizes",
    [
        [0, 0, 0],
        [1],
        [0, 1, 1, 2, 5],
        [39, 40, 41, 0],
        list(range(1000)),
        [0] * 50 + [3] * 500 + [1_000_000],
        np.random.default_rng(0).poisson(900, 4096).tolist(),
    ],
)
def test_list_sizes_sum_to_lists_and_vectors(sizes):
    told = describe_lists(np.array(sizes, np.int64))
    bins = told["bins"]
    assert sum(one["lists"] for one in bins) == told["lists"] == len(sizes)
    assert sum(one["vectors"] for one in bins) == told["vectors"] == sum(sizes)
    assert (told["empty"], told["largest"]) == (sizes.count(0), max(sizes))
    assert told["median"] == np.median(sizes)
    assert len(bins) <= BINS
    assert [one["from"] for one in bins][1:] == [one["to"] for one in bins][:-1]
    for one in bins:
        assert one["from"] < one["to"]
        assert one["lists"] == sum(one["from"] <= size < one["to"] for size in sizes)
    json.dumps(told)


def test_a_long_list_leaves_the_others_apart():
    bins = describe_lists(np.array([0] * 50 + [3] * 500 + [1_000_000]))["bins"]
    assert [(one["lists"], one["vectors"]) for one in bins if one["lists"]] == [
        (50, 0), (500, 1500), (1, 1_000_000),
    ]  # fmt: skip


def test_a_flat_index_has_no_lists():
    assert describe_lists(np.zeros(0, np.int64)) is None


def built(vectors):
    rows = SimpleNamespace(vectors=vectors, rejected=0)
    return SimpleNamespace(
        live=SimpleNamespace(rows=rows), indexes=[], measured=SimpleNamespace(recall={})
    )


@pytest.mark.parametrize(("live", "holds"), [(7, True), (6, False)])
def test_the_gate_and_the_bars_of_the_report_agree(live, holds):
    gate, parent = GateConfig(max_live_drop=0.3), SimpleNamespace(vectors=10, version=4)
    bars = {bar.key: bar for bar in list_bars(gate, live, built(live), parent)}
    assert bars["gate.max_live_drop"].holds is holds
    told = f"{live} rows are live, 40.0% fewer than the 10 of release 4, gate.max_live_drop is 30.0"
    assert check_gate(gate, live, built(live), parent) == ([] if holds else [f"{told}%"])


def test_a_bar_that_nothing_measures_is_missed():
    (told,) = check_gate(GateConfig(min_recall_at_10=0.5), 5, built(5), None)
    assert told == "recall_at_10 0.000, gate.min_recall_at_10 is 0.500"
    assert len(list_bars(GateConfig(), 5, built(5), None)) == 1


@pytest.mark.parametrize("value", [None, float("nan")])
def test_what_is_still_missing_did_not_change(value):
    nothing = {"metadata": {"price": float("nan"), "stock": 1}}
    told = _compare_columns(nothing, {"metadata": {"price": value, "stock": 2}})
    assert told == [{"column": "stock", "before": "1", "after": "2"}]


def test_long_texts_are_cut_to_where_they_differ():
    start = "a" * 100
    (told,) = _compare_columns({"metadata": {"t": start}}, {"metadata": {"t": start + "b" * 100}})
    assert told["before"] == "…" + "a" * 40
    assert told["after"] == "…" + "a" * 40 + "b" * 40 + "…"
    (short,) = _compare_columns({"metadata": {"t": "a" * 70}}, {"metadata": {"t": "a" * 71}})
    assert (short["before"], short["after"]) == ("a" * 70, "a" * 71)


def test_a_text_that_is_no_utf8_is_shown_as_far_as_it_can_be_read():
    bad = pa.array([b"caf\xe9", b"fine"]).cast(pa.binary()).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2]), bad)
    metadata = pa.StructArray.from_arrays([bad, lists, pa.array([1, 2])], ["title", "tags", "n"])
    rows = plain_rows(pa.table({"vector_id": [1, 2], "metadata": metadata}))
    told = {"title": "caf\ufffd", "tags": ["caf\ufffd"], "n": 1}
    assert rows[0] == {"vector_id": 1, "metadata": told}
    assert rows[1]["metadata"] == {"title": "fine", "tags": ["fine"], "n": 2}


def test_row_groups_of_a_release_are_read_with_the_columns_that_are_shown(tmp_path):
    metadata = [{"title": f"t{n}", "price": n} for n in range(9)]
    keys = {"vector_id": range(9), "product_id": [f"p{n}" for n in range(9)]}
    table = pa.table(keys | {"metadata": metadata})
    store, entry = Store(str(tmp_path)), {"folder": "one", "file": "ids.parquet"}
    (tmp_path / "indexes" / "one").mkdir(parents=True)
    pq.write_table(table, tmp_path / "indexes" / "one" / "ids.parquet", row_group_size=2)

    def read(columns, groups):
        return _read_ids._function(store, entry, [1, 4, 8, 77], columns, groups)

    titles = read(["vector_id", "metadata.title", "metadata.name"], range(5))
    assert titles == [{"vector_id": n, "metadata": {"title": f"t{n}"}} for n in (1, 4, 8)]
    assert read(None, range(1, 3)) == table.slice(4, 1).to_pylist()
    assert read(["vector_id", "metadata.name"], range(1)) == [{"vector_id": 1}]


def test_the_title_is_of_the_column_that_the_configuration_names():
    row = {"metadata": {"title": "no", "Product Name": "Chair", "name": "n"}}
    assert title_of(row, title_columns({"title": "Product Name"})) == "Chair"
    assert title_of(row, title_columns({})) == "no"
    assert title_of({"metadata": {"name": "n"}}, title_columns({})) == "n"
    assert title_of({"metadata": None}, title_columns({"title": "name"})) == ""


def fail_the_report(monkeypatch, *, published):
    """Write the report of a run whose examples can't be collected."""

    def fail(*_):
        raise KeyError("no such thing")

    logged = []
    run = SimpleNamespace(
        stage=lambda name: contextlib.nullcontext(),
        log=lambda event, **values: logged.append((event, values["error"])),
        write_log=lambda: None,
    )
    task = SimpleNamespace(
        catalog=SimpleNamespace(root="", has_bytes=False),
        config=SimpleNamespace(images=ImagesConfig(), catalog=SimpleNamespace(columns={})),
    )
    changes = SimpleNamespace(embedded=SimpleNamespace(writes=[], seconds={}), counts=None)
    monkeypatch.setattr(publish, "collect_examples", fail)
    told = publish._write_report(run, task, None, changes, [], {"published": published})
    return told, logged


def test_a_published_run_does_not_fail_for_its_report(monkeypatch):
    told, logged = fail_the_report(monkeypatch, published=True)
    assert told == "not written: KeyError: 'no such thing'"
    assert logged == [("report not written", "KeyError: 'no such thing'")]
    with pytest.raises(KeyError):
        fail_the_report(monkeypatch, published=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.jpg").write_bytes(jpeg(300, 200))
    (tmp_path / "large.jpg").write_bytes(jpeg(700, 600))
    (tmp_path / "progressive.jpg").write_bytes(jpeg(700, 600, progressive=True))
    (tmp_path / "large.png").write_bytes(b"")
    Image.new("RGB", (700, 600)).save(tmp_path / "large.png")
    (tmp_path / "cut.jpg").write_bytes(jpeg(300, 200)[:-200])
    (tmp_path / "page.jpg").write_text("<html>")
    return tmp_path


def decode(picture):
    head, _, data = picture.src.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_what_can_be_shown_is_shown_and_the_rest_said(folder):
    pictures = Pictures(images=ImagesConfig(max_pixels=100_000))
    names = [
        "good.jpg",
        "large.jpg",
        "progressive.jpg",
        "large.png",
        "cut.jpg",
        "page.jpg",
        "no.jpg",
    ]
    shown = dict(zip(names, pictures.show(names, str(folder)), strict=True))
    assert decode(shown["good.jpg"]).size == (160, 107)
    assert max(decode(shown["large.jpg"]).size) == 160  # over the limit, but cheap to decode
    assert {name: one.why for name, one in shown.items() if not one.src} == {
        "progressive.jpg": "too many pixels to show",
        "large.png": "too many pixels to show",
        "cut.jpg": "the file is cut off",
        "page.jpg": "the file is no picture",
        "no.jpg": "there is no such file",
    }
    assert pictures.show([None, ""], str(folder)) == [Picture(why="no address of a picture")] * 2
    assert max(decode(pictures.show(["good.jpg"], str(folder), 40)[0]).size) == 40


def test_a_page_has_its_fill_of_pictures(folder):
    pictures = Pictures(images=ImagesConfig())
    shown = pictures.show(["good.jpg"] * 5000, str(folder))
    assert sum(len(one.src) for one in shown) <= MOST_BYTES
    assert shown[0].src
    assert shown[-1] == Picture(why="left out: the page has its fill of pictures")


def test_nothing_is_fetched_for_a_full_page(folder, monkeypatch):
    monkeypatch.setattr("jobs.report_pictures.MOST_BYTES", 100)
    monkeypatch.setattr("jobs.report_pictures.AT_ONCE", 1)
    asked = []

    def fetch(_, uris, root):
        asked.extend(uris)
        return [DATA] * len(uris)

    monkeypatch.setattr(Pictures, "_fetch", fetch)
    Pictures(images=ImagesConfig()).load(["a.jpg", "b.jpg", "c.jpg"], str(folder))
    assert asked == ["a.jpg"]


def test_decoding_takes_of_the_time_for_pictures(folder, monkeypatch):
    made = []

    def make(*_):
        made.append(time.sleep(0.02))
        return Picture(src="data:")

    monkeypatch.setattr("jobs.report_pictures.make_picture", make)
    monkeypatch.setattr("jobs.report_pictures.MOST_S", 0.01)
    monkeypatch.setattr(Pictures, "_fetch", lambda self, uris, root: [DATA] * len(uris))
    shown = Pictures(images=ImagesConfig()).show([f"{n}.jpg" for n in range(20)], str(folder))
    assert len(made) == 1
    assert {one.why for one in shown[1:]} == {"left out: the report's time for pictures was over"}


def test_a_silent_server_is_asked_once():
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        host = f"127.0.0.1:{server.getsockname()[1]}"
        images = ImagesConfig(http_hosts=(host,), timeout_s=0.2, retries=5)
        pictures = Pictures(images=images)
        began = time.monotonic()
        shown = pictures.show([f"http://{host}/{n}.jpg" for n in range(100)], "/nowhere")
        assert time.monotonic() - began < 2
    assert shown[0].why == "the server took too long"
    assert {one.why for one in shown[8:]} == {"not fetched: the server did not answer"}


def test_pictures_stay_out_of_the_json():
    value = {"a": [{"picture": Picture(src="x"), "id": 1}], "b": Picture(), "c": {"d": None}}
    assert drop_pictures(value) == {"a": [{"id": 1}], "c": {"d": None}}


class Server(http.server.BaseHTTPRequestHandler):
    """Has no picture, and counts who asks."""

    asked = 0

    def do_GET(self):
        type(self).asked += 1
        self.send_error(404)

    def log_message(self, *_):
        pass


class Nights:
    """A store of two releases with lists, and a stopped run."""

    def __init__(self, folder):
        self.folder, self.catalog = folder, folder / "catalog"
        write_sample(self.catalog, products=PRODUCTS, seed=5, street_per_product=1, image_px=48)
        queries = pq.read_table(self.catalog / "queries.parquet").slice(0, 20)
        pq.write_table(queries, self.catalog / "queries.parquet")
        self.rows = pq.read_table(self.catalog / "catalog.parquet").to_pylist()
        self.runs = {}

    def run(self, name, command=refresh, **sections):
        values = {
            "store": str(self.folder / "store"),
            "catalog": {
                "path": str(self.catalog / "catalog.parquet"),
                "text": "{title}. {description}",
            },
            "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
            "embed": {"fields": ["image", "text"], "actors": 1},
            "index": {"factory": "IVF4,Flat", "drift": {"max_intersection_drop": 1}},
            "evaluate": {"queries": str(self.catalog / "queries.parquet"), "sample_rows": 50},
            "gate": OPEN_GATE,
        }
        try:
            address = command(JobConfig.model_validate(values | sections), QUIET).report
        except GateError as error:
            address = error.report
        self.runs[name] = Path(address)

    def write(self, rows):
        schema = pq.read_schema(self.catalog / "catalog.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema), self.catalog / "catalog.parquet")

    def page(self, name):
        return check_page(self.runs[name].read_text(encoding="utf-8"))

    def report(self, name):
        return json.loads(self.runs[name].with_suffix(".json").read_text(encoding="utf-8"))


def bad_rows(catalog, good, address):
    """A row of each kind that can be rejected: shown, not to be decoded, not to be had."""
    files = {
        "large": jpeg(700, 600),
        "cut": jpeg(300, 200)[:-200],
        "page": b"<!doctype html>",
    }
    for name, data in files.items():
        (catalog / f"{name}.jpg").write_bytes(data)
    rows = [good | {"product_id": f"bad-{name}", "image_uri": f"{name}.jpg"} for name in files]
    rows.append(good | {"product_id": "bad-gone", "image_uri": f"{address}/gone.jpg"})
    rows.append(good | {"product_id": "bad-text", "title": "", "description": ""})
    return rows


@pytest.fixture(scope="module")
def nights(local_ray, tmp_path_factory):
    nights = Nights(tmp_path_factory.mktemp("reports"))
    nights.run("first")
    rows = [dict(one) for one in nights.rows[REMOVED:]]
    rows[0]["title"] = "Another title"
    rows[1]["image_uri"] = nights.rows[0]["image_uri"]
    rows[2]["price"] = 1.25
    new = [nights.rows[n] | {"product_id": f"new-{n}"} for n in range(REMOVED)]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    host = f"127.0.0.1:{server.server_port}"
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        nights.write([*rows, *new, *bad_rows(nights.catalog, rows[9], f"http://{host}")])
        images = {"max_pixels": 100_000, "http_hosts": [host], "retries": 0}
        nights.run("stopped", images=images, gate=OPEN_GATE | {"max_reject_share": 0})
        nights.run("second", images=images, gate=OPEN_GATE)
        server.shutdown()
    other = {"architecture": "vitrine-tiny", "pretrained": "random", "seed": 1}
    nights.run("other", reindex, images=images, index={}, encoder=other)
    return nights


ORDER = [
    "changes", "rejects", "shared", "indexes", "labelled", "neighbours", "found", "time", "plan",
    "configuration",
]  # fmt: skip


def test_every_page_has_its_parts_in_the_same_order(nights):
    for name in nights.runs:
        sections = nights.page(name).sections
        assert sections == [one for one in ORDER if one in sections]
        assert set(ORDER) - set(sections) <= {"shared"}


def test_the_head_says_what_came_of_it_beside_the_bars(nights):
    first, stopped = nights.page("first"), nights.page("stopped")
    assert "Published release 1 at" in first.text
    assert "after release" not in first.text
    assert "Published release 2 at" in nights.page("second").text
    assert "after release 1" in nights.page("second").text
    assert "Nothing published. Release 1 is served as before." in stopped.text
    for name in nights.runs:
        report = nights.report(name)
        missed = [bar for bar in report["gate"] if not bar["holds"]]
        assert bool(missed) == bool(report["gate_failures"])
        for bar in missed:
            assert any(bar["key"] in failure for failure in report["gate_failures"])
        text = " ".join(nights.page(name).texts[""].split())
        for bar in report["gate"]:
            rule = "at most" if bar["most"] else "at least"
            assert f"{bar['value']:.3f} {rule} {bar['limit']:.3f}" in text
    (share,) = (bar for bar in nights.report("stopped")["gate"] if not bar["holds"])
    assert (share["key"], share["limit"]) == ("gate.max_reject_share", 0)


def test_what_changed_is_shown_with_examples(nights):
    report, page = nights.report("stopped"), nights.page("stopped")
    changes = report["changes"]
    assert {kind: len(rows) for kind, rows in changes.items()} == {
        "new": 3, "changed": 2, "metadata": 1, "removed": 3,
    }  # fmt: skip
    (priced,) = changes["metadata"]
    assert priced["product_id"] == nights.rows[REMOVED + 2]["product_id"]
    assert [(one["column"], one["after"]) for one in priced["differs"]] == [("price", "1.25")]
    titled, moved = (
        next(one for one in changes["changed"] if one["product_id"] == nights.rows[n]["product_id"])
        for n in (REMOVED, REMOVED + 1)
    )
    assert titled["differs"] == [
        {"column": "title", "before": nights.rows[REMOVED]["title"], "after": "Another title"}
    ]
    assert moved["differs"] == []
    gone = {one["product_id"] for one in nights.rows[:REMOVED]}
    assert {one["product_id"] for one in changes["removed"]} <= gone
    assert page.images["changes"] >= 2 + 1 + 1 + 3  # of what changed its picture, both
    assert "Removed: 3 of 12 rows" in page.text


def test_rejects_show_what_can_be_shown_and_fetch_nothing_again(nights):
    for name in ("stopped", "second"):
        report, page = nights.report(name), nights.page(name)
        reasons = ("too_many_pixels", "truncated", "not_an_image", "not_found", "empty_text")
        found = {one["reason"]: one["rows"] for one in report["rejects"]}
        assert found == dict.fromkeys(reasons, 1)
        assert page.images["rejects"] == 2  # the large one, and the good one without a text
        text = page.texts["rejects"]
        for words in ("the file is cut off", "the file is no picture", "there is no such file"):
            assert words in text
        assert all(f"bad-{name}" in text for name in ("large", "cut", "page", "gone", "text"))
    # By the embedding of both: what a run that published nothing found missing is tried again.
    assert Server.asked == nights.report("second")["retried"] + 1 == 2


def test_curve_and_list_sizes_are_drawn(nights):
    report, page = nights.report("second"), nights.page("second")
    html = nights.runs["second"].read_text(encoding="utf-8")
    for index in report["indexes"]:
        lists = index["measured"]["lists"]
        assert (lists["lists"], lists["vectors"]) == (4, index["ntotal"])
        assert sum(one["vectors"] for one in lists["bins"]) == index["ntotal"]
        field = index["field"]
        assert f'aria-label="{field}: how long its lists are"' in html
        if len(index["curve"]) > 1:
            assert f'aria-label="{field}: what a search finds, by its time"' in html
            assert "chosen: nprobe" in page.texts["indexes"]
    assert "4 lists hold" in page.text
    flat = nights.report("other")["indexes"]
    assert all(index["measured"]["lists"] is None for index in flat)
    assert "list sizes" not in nights.page("other").texts["indexes"]


def test_changed_neighbours_are_shown_before_and_after(nights):
    (image, text), page = nights.report("second")["neighbours"], nights.page("second")
    assert (image["field"], text["field"]) == ("image", "text")
    assert 0 < image["changed"] <= image["queries"] <= 50 + 20
    assert 0 < len(image["shown"]) <= 6
    live = {one["product_id"] for one in nights.rows[REMOVED:]} | {
        f"new-{n}" for n in range(REMOVED)
    }
    before = {one["product_id"] for one in nights.rows}
    shares = [one["shared"] / one["of"] for one in image["shown"]]
    assert shares == sorted(shares)
    for query in image["shown"]:
        assert query["shared"] < query["of"]
        assert {one["product_id"] for one in query["before"]} <= before
        assert {one["product_id"] for one in query["after"]} <= live
        assert query["product_id"] not in {one["product_id"] for one in query["after"]}
        came = [one for one in query["after"] if one["other_rank"] is None]
        stayed = {one["product_id"] for one in query["after"] if one["other_rank"]}
        assert len(stayed) == query["shared"]
        assert came or any(one["other_rank"] is None for one in query["before"])
    assert page.images["neighbours"] > 10
    assert "find other neighbours than in release 1" in page.text
    assert "before, release 1" in page.text


def test_where_there_is_nothing_to_compare_it_is_said(nights):
    assert "There is no release to compare with." in nights.page("first").texts["neighbours"]
    assert "is of another encoder" in nights.page("other").texts["neighbours"]


def test_rows_of_a_release_are_read_by_their_ids(nights):
    store = Store(str(nights.folder / "store"))
    folder = store.release(1).indexes
    entry = store.read_json("indexes", folder, "manifest.json")["ids"]
    table = pq.read_table(store.uri("indexes", entry["folder"], entry["file"]))
    ids = table["vector_id"].to_pylist()
    told = read_ids(store, folder, {ids[0], ids[7], ids[-1], 12345}, ["title"])
    assert {one: row["product_id"] for one, row in told.items()} == {
        ids[n]: table["product_id"][n].as_py() for n in (0, 7, -1)
    }
    assert told[ids[7]]["metadata"] == {"title": told[ids[7]]["title"]}
    (whole,) = read_ids(store, folder, [ids[7]], ["title"], whole=True).values()
    assert whole == table.slice(7, 1).to_pylist()[0] | {"title": whole["title"]}
    (bare,) = read_ids(store, folder, [ids[7]], ["no such"]).values()
    assert (bare["metadata"], bare["title"]) == (None, "")
    assert read_ids(store, folder, (), ["title"]) == {}
