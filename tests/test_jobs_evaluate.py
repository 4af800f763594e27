"""The `evaluate` command: real releases of a rendered catalog, asked through the command line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_checks import check_page

from jobs.config import EvaluateConfig
from jobs.config_file import read_config
from jobs.errors import CatalogError
from jobs.progress import Progress
from jobs.queries import Query, read_queries
from jobs.refresh import refresh
from jobs.scores import by_category, overlap, score_queries, subtract, summarize

pytestmark = pytest.mark.usefixtures("local_ray")

METRICS = {"recall_at_1", "recall_at_5", "recall_at_10", "mrr", "ndcg_at_10"}
KINDS = ["image", "text", "image + text"]
FIELDS = ["multimodal", "image", "text"]


class Shop:
    """A store with two releases of ten products of three photos each."""

    def __init__(self, folder, sample):
        shutil.copytree(sample, folder / "catalog")
        self.folder, self.catalog = folder, folder / "catalog"
        self.rows = pq.read_table(self.catalog / "catalog.parquet").to_pylist()[:30]
        self.config = folder / "job.yaml"
        self.write_catalog(self.rows)

    def write_catalog(self, rows):
        products = [
            rows[n] | {"image_uri": [row["image_uri"] for row in rows[n : n + 3]]}
            for n in range(0, len(rows), 3)
        ]
        pq.write_table(pa.Table.from_pylist(products), self.catalog / "products.parquet")

    def write_queries(self, name, rows):
        path = self.catalog / name
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    def configure(self, **evaluate):
        config = {
            "store": str(self.folder / "store"),
            "catalog": {
                "path": str(self.catalog / "products.parquet"),
                "text": "{title}. {description}",
            },
            "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
            "embed": {"fields": ["image", "text", "multimodal"]},
            "ray": {"object_store_mb": 128},
            "gate": {"min_self_retrieval": 0, "min_overlap_at_10": 0},
            "evaluate": evaluate,
        }
        self.config.write_text(json.dumps(config))
        return self.config

    def own(self, place):
        """The product that the sample's row belongs to, asked with that row's photo."""
        owner = self.rows[place - place % 3]
        return {
            "query_image_uri": self.rows[place]["image_uri"],
            "query_text": f"{owner['title']}. {owner['description']}",
            "product_id": owner["product_id"],
        }


@pytest.fixture(scope="module")
def shop(tmp_path_factory, sample_catalog):
    shop = Shop(tmp_path_factory.mktemp("evaluate"), sample_catalog)
    config = read_config(shop.configure())
    refresh(config, Progress(quiet=True))
    swapped = [*shop.rows[15:], *shop.rows[:15]]
    ids = [row["product_id"] for row in shop.rows]
    shop.write_catalog([r | {"product_id": i} for r, i in zip(swapped, ids, strict=True)])
    refresh(config, Progress(quiet=True))
    return shop


def ask(call, shop, *options, **evaluate):
    done = call("evaluate", "--config", shop.configure(**evaluate), "--json", "--quiet", *options)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


def read_report(answer):
    return json.loads(Path(answer["report"]).with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture
def own(shop):
    return str(shop.write_queries("own.parquet", [shop.own(place) for place in range(30)]))


def check_figures(figures):
    assert set(figures) >= METRICS
    for name in METRICS:
        one = figures[name]
        assert one["low"] <= one["value"] <= one["high"]


def test_products_find_themselves_in_the_release_that_holds_them(shop, own, call_vitrine):
    answer = ask(call_vitrine, shop, "--release", "1", queries=own)
    assert (answer["release"], answer["queries"], answer["skipped"]) == (1, 30, {})
    assert list(answer["metrics"]) == KINDS
    for fields in answer["metrics"].values():
        assert list(fields) == FIELDS
        for figures in fields.values():
            assert figures["queries"] == 30
            check_figures(figures["index"])
            assert figures["exact"] == figures["index"]  # the index is flat
            assert figures["cost"]["recall_at_10"] == {"value": 0, "low": 0, "high": 0}
            assert figures["intersection_at_10"] == 1
            categories = figures["by_category"].values()
            assert sum(one["queries"] for one in categories) == 30
    image, text = answer["metrics"]["image"]["image"], answer["metrics"]["text"]["text"]
    assert image["index"]["recall_at_1"]["value"] == text["index"]["ndcg_at_10"]["value"] == 1
    assert set(answer["paired"]["image"]) == {"image + text - image", "image + text - text"}
    assert answer["paired"]["image"]["image + text - image"]["recall_at_1"]["high"] <= 0
    latency = answer["latency_ms"]
    assert set(latency["encode"]) == set(KINDS)
    assert set(latency["index"]) == set(latency["search"]) == set(FIELDS)
    for step in latency.values():
        assert all(0 < one["p50"] <= one["p99"] for one in step.values())


def test_newest_release_is_asked_by_default_and_nothing_is_published(shop, own, call_vitrine):
    answer = ask(call_vitrine, shop, queries=own)
    assert answer["release"] == 2
    swapped = answer["metrics"]["image"]["image"]
    assert swapped["index"]["recall_at_1"]["value"] == 0  # every photo belongs to another now
    for name in METRICS:  # the index is flat, but an untrained encoder's neighbours are nearly tied
        exact, found = (swapped[by][name]["value"] for by in ("exact", "index"))
        assert exact == pytest.approx(found, abs=0.05)
    status = json.loads(call_vitrine("status", "--config", shop.config, "--json").stdout)
    assert [release["version"] for release in status["releases"]] == [2, 1]


def test_report_shows_failures_and_is_self_contained(shop, own, call_vitrine):
    answer = ask(call_vitrine, shop, queries=own)
    report = read_report(answer)
    assert report["report"] == answer["report"]
    assert {name: report[name] for name in ("metrics", "paired", "latency_ms")} == {
        name: answer[name] for name in ("metrics", "paired", "latency_ms")
    }
    failures = report["failures"]
    first = report["metrics"]["image"]["multimodal"]["index"]["recall_at_1"]["value"]
    assert failures["near"] + failures["missed"] == round(30 * (1 - first))
    ranks = [one["rank"] for one in failures["shown"]]
    assert len(ranks) == 24
    near = [rank for rank in ranks if rank]
    assert near == sorted(near)
    assert near + [None] * (24 - len(near)) == ranks
    page = Path(answer["report"]).read_text(encoding="utf-8")
    assert page.count("<b>right, rank ") == len(near)
    assert check_page(page).images["found"] > len(ranks)
    stages = [one["stage"] for one in report["time"]["spans"]]
    assert [name for name in stages if name not in ("start", "between stages", "end")] == [
        "ask the release",
        "search exactly",
        "measure",
    ]


def test_what_cannot_be_asked_is_counted_by_reason(shop, call_vitrine):
    good, other = shop.own(0), shop.own(3)
    (shop.catalog / "page.jpg").write_bytes(b"<html>")
    rows = [
        good | {"query_id": "a", "gain": 100.0},
        good | {"query_id": "a", "gain": 10.0, "product_id": other["product_id"]},
        good | {"query_id": "a", "gain": 10.0, "product_id": "long-gone"},
        good | {"query_id": "b", "gain": 1.0, "product_id": "never-there"},
        good | {"query_id": "c", "gain": 0.0},
        good | {"query_id": "d", "gain": 1.0, "query_image_uri": "nowhere.jpg"},
        good | {"query_id": "e", "gain": 1.0, "query_image_uri": "page.jpg"},
        good | {"query_id": "f", "gain": -1.0},
        good | {"query_id": "g", "gain": None},
        good | {"query_id": "h", "gain": 1.0, "product_id": None},
        good | {"query_id": "i", "gain": 1.0, "query_image_uri": None, "query_text": " "},
        other | {"query_id": "j", "gain": 1.0, "query_image_uri": None},
    ]
    queries = str(shop.write_queries("odd.parquet", rows))
    answer = ask(call_vitrine, shop, "--release", "1", queries=queries)
    counted = {name: (one["of"], one["count"]) for name, one in answer["skipped"].items()}
    assert counted == {
        "bad_gain": ("rows", 2),
        "no_product_id": ("rows", 1),
        "no_query": ("rows", 1),
        "no_right_product": ("queries", 1),
        "not_in_release": ("queries", 1),
        "query_not_usable": ("queries", 2),
        "right_product_not_in_release": ("products", 1),
    }
    assert answer["queries"] == 2
    for one in read_report(answer)["failures"]["shown"]:
        assert one["rank"] is None or one["found"][one["rank"] - 1 : one["rank"]] in (
            [],  # only the first few are shown
            [one["right"]],
        )
    by_kind = {kind: fields["image"]["queries"] for kind, fields in answer["metrics"].items()}
    assert by_kind == {"image": 1, "text": 2, "image + text": 1}
    assert answer["paired"]["text"]["image + text - text"]["queries"] == 1
    examples = answer["skipped"]["query_not_usable"]["examples"]
    assert ["not_found" in examples[0], "not_an_image" in examples[1]] == [True, True]


def test_table_for_people(shop, own, call_vitrine):
    config = shop.configure(queries=own, max_queries=5)
    done = call_vitrine("evaluate", "--config", config, "--quiet", "--release", "1")
    assert done.returncode == 0, done.stderr
    assert "release 1, 5 queries" in done.stdout
    assert "multimodal *" in done.stdout
    assert re.search(r"report: \S+/report\.html", done.stdout.replace("\n", ""))


@pytest.mark.parametrize(
    ("rows", "evaluate", "options", "words"),
    [
        (None, {}, (), "evaluate.queries is not set"),
        (None, {"queries": "/nowhere.parquet"}, (), "can't be read"),
        ([{"product_id": "a"}], {}, (), "has no column query_image_uri or query_text"),
        ([{"query_text": "a"}], {}, (), "has no column product_id"),
        ([{"query_text": "a", "product_id": "x"}], {}, (), "not_in_release 1; a: x"),
        ([{"query_text": "a", "product_id": None}], {}, (), "none of 1 rows is a judgment"),
        ([{"query_text": 1, "product_id": "x"}], {}, (), "query_text is int64, expected string"),
        ([{"query_text": "a", "product_id": "x", "gain": "E"}], {}, (), "expected a number"),
        ([{"query_text": "a", "product_id": "x"}], {}, ("--release", "9"), "no release 9"),
        ([{"query_text": "a", "product_id": "x"}], {"category": "smell"}, (), "'smell'; it has"),
    ],
)
def test_evaluation_that_cannot_be_made(
    shop, call_vitrine, failed_line, rows, evaluate, options, words
):
    if rows is not None:
        evaluate = evaluate | {"queries": str(shop.write_queries("bad.parquet", rows))}
    config = shop.configure(**evaluate)
    done = call_vitrine("evaluate", "--config", config, "--quiet", *options)
    assert words in failed_line(done)


def write_judgments(folder, **columns):
    pq.write_table(pa.table(columns), folder / "q.parquet")
    return EvaluateConfig(queries=str(folder / "q.parquet"), max_queries=3)


def test_rows_of_one_query_are_joined(tmp_path):
    config = write_judgments(
        tmp_path,
        query_id=[1, 1, 1, 2],
        query_text=["a", "a", "a", "a"],
        product_id=["p", "q", "p", "p"],
        gain=[1, 0, 5, 2],
    )
    read = read_queries(config)
    assert [query.gains for query in read.queries] == [{"p": 5.0, "q": 0.0}, {"p": 2.0}]
    assert (read.queries[0].relevant, read.root) == (("p",), str(tmp_path))


def test_without_ids_and_gains_the_same_words_are_one_query(tmp_path):
    config = write_judgments(tmp_path, query_text=["a", "b", "a"], product_id=["p", "q", "q"])
    read = read_queries(config)
    assert [(query.text, query.relevant) for query in read.queries] == [
        ("a", ("p", "q")),
        ("b", ("q",)),
    ]


def test_sample_of_queries_is_seeded_and_whole(tmp_path):
    texts = [str(number) for number in range(50)]
    config = write_judgments(tmp_path, query_text=texts * 2, product_id=["p"] * 50 + ["q"] * 50)
    one, two = read_queries(config), read_queries(config)
    assert one == two
    assert (len(one.queries), one.in_file) == (3, 50)
    assert all(query.relevant == ("p", "q") for query in one.queries)


def test_file_that_is_no_utf8(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")]
    )
    config = write_judgments(tmp_path, query_text=bad, product_id=["p"])
    with pytest.raises(CatalogError, match="no UTF-8"):
        read_queries(config)


def asked(*relevant):
    return [Query(image=None, text="a", gains=dict.fromkeys(r, 1.0)) for r in relevant]


def test_figures_by_category_and_difference():
    queries = asked("p", "q", "p")
    better = score_queries([["p"], ["q"], ["p"]], queries)
    worse = score_queries([["x", "p"], ["q"], []], queries)
    summary = summarize(subtract(better, worse))
    assert summary["mrr"]["value"] == pytest.approx(0.5)
    assert summary["mrr"]["low"] >= 0
    split = by_category(worse, ["b", "a", "b"])
    assert [(name, one["queries"]) for name, one in split.items()] == [("b", 2), ("a", 1)]
    assert split["a"]["recall_at_1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert split["b"]["mrr"]["value"] == 0.25


def test_overlap_of_rankings():
    exact = [[str(number) for number in range(10)], ["a", "b"]]
    assert overlap(exact, exact) == 1
    assert overlap([[*exact[0][5:], "x"], ["b"]], exact) == 0.5
