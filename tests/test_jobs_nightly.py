"""What a refresh does night after night: what changed is embedded, the rest stays as it is."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.config import JobConfig
from jobs.errors import FingerprintError, GateError, StoreError
from jobs.evaluate import evaluate
from jobs.preview import Preview
from jobs.progress import Progress
from jobs.refresh import preview_refresh, refresh
from jobs.reindex import reindex
from jobs.sample import write_sample
from jobs.search import Searcher
from jobs.store import Store

pytestmark = pytest.mark.usefixtures("local_ray")

PRODUCTS = 60
REPOSITORY = Path(__file__).resolve().parent.parent
QUIET = Progress(quiet=True)


def read_log(store, run):
    """A run's log, oldest event first."""
    text = Path(store.uri("runs", run, "log.jsonl")).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nightly") / "sample"
    write_sample(folder, products=PRODUCTS, seed=1, street_per_product=1, image_px=64)
    return folder


@pytest.fixture(scope="module")
def rows(sample):
    found = pq.read_table(sample / "catalog.parquet").to_pylist()
    return [row | {"image_uri": str(sample / row["image_uri"])} for row in found]


class Shop:
    """A store and a catalog that changes; each refresh runs in this process."""

    def __init__(self, folder, sample, rows):
        self.folder, self.sample = folder, sample
        self.catalog = folder / "catalog.parquet"
        self.write(rows)

    def write(self, rows):
        schema = pa.Table.from_pylist(rows).schema
        pq.write_table(pa.Table.from_pylist(rows, schema), self.catalog, row_group_size=16)

    def config(self, store="store", **sections):
        values = {
            "store": str(self.folder / store),
            "catalog": {"path": str(self.catalog), "text": "{title}. {description}"},
            "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
            "evaluate": {"queries": str(self.sample / "queries.parquet"), "sample_rows": 200},
            "embed": {"actors": 1},
            "ray": {"bucket_rows": 20},  # several buckets and groups
        }
        return JobConfig.model_validate(values | sections)

    def refresh(self, store="store", **sections):
        return refresh(self.config(store, **sections), QUIET)

    def store(self, name="store"):
        return Store(str(self.folder / name))

    def report(self, result, store="store"):
        return self.store(store).read_json("runs", result.run, "report.json")

    def searcher(self, store="store"):
        opened = self.store(store)
        return Searcher(opened, opened.release().indexes)


@pytest.fixture(scope="module")
def built(tmp_path_factory, sample, rows):
    """A store with release 1 of the sample; copied, never changed."""
    shop = Shop(tmp_path_factory.mktemp("built"), sample, rows)
    shop.refresh()
    return shop


@pytest.fixture
def empty(tmp_path, sample, rows):
    """A catalog and no store."""
    return Shop(tmp_path, sample, rows)


@pytest.fixture
def shop(empty, built):
    """A catalog and a store with its release 1."""
    shutil.copytree(built.folder / "store", empty.folder / "store")
    return empty


def answers(searcher, queries):
    """The score of each product, for some words in every field."""
    return [
        {r.product_id: r.score for r in searcher.search(text=text, k=200, field=field)}
        for text in queries
        for field in searcher.fields
    ]


def change(rows, night):
    """Another catalog each night: removed, new, changed text, another picture, other prices."""
    random = np.random.default_rng(night)
    kept = [dict(row) for row in rows if random.random() > 0.1]
    for row in kept:
        row["price"] = float(night)
        if random.random() < 0.1:
            row["title"] = f"{row['title']} {night}"
        if random.random() < 0.1:
            row["image_uri"] = rows[int(random.integers(len(rows)))]["image_uri"]
    new = [dict(rows[int(n)]) for n in random.integers(0, len(rows), 5)]
    return kept + [row | {"product_id": f"new-{night}-{n}"} for n, row in enumerate(new)]


def test_after_many_nights_it_answers_like_one_built_afresh(shop, rows):
    catalog = rows
    for night in range(1, 4):
        catalog = change(catalog, night)
        shop.write(catalog)
        result = shop.refresh()
        assert (result.release, result.rows) == (night + 1, len(catalog))
        assert result.live + result.rejected == result.rows
        assert result.new + result.changed + result.unchanged == result.rows
        assert result.embedded == result.new + result.changed < PRODUCTS / 2
    report = shop.report(result)
    assert {index["action"] for index in report["indexes"]} == {"updated"}
    measured = [index["measured"] for index in report["indexes"]]
    assert all(one["missing"] == one["extra"] == 0 for one in measured)
    assert 0 < report["share_of_first_build"] < 5
    assert report["wall_share_of_first_build"] > 0
    fresh = shop.refresh("fresh")
    assert fresh.embedded == fresh.rows == result.rows
    queries = [row["title"] for row in catalog[::7]]
    mine, theirs = (answers(shop.searcher(name), queries) for name in ("store", "fresh"))
    assert [set(one) for one in mine] == [set(one) for one in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-3)  # stored as float16, after other batches
    tables = [
        pq.read_table(shop.folder / name / "indexes" / run.run / "ids.parquet").to_pylist()
        for name, run in (("store", result), ("fresh", fresh))
    ]
    assert tables[0] == tables[1]


def test_metadata_alone_embeds_nothing_and_shows_tonights_values(shop, rows):
    version = shop.store().embeddings_version()
    shop.write([row | {"price": 9.75} for row in rows])
    result = shop.refresh()
    assert (result.embedded, result.unchanged, result.metadata_changed) == (0, PRODUCTS, PRODUCTS)
    assert (result.release, result.published) == (2, True)
    assert shop.store().embeddings_version() == version
    report = shop.report(result)
    assert {index["action"] for index in report["indexes"]} == {"kept"}
    folders = {p["codes"]["folder"] for i in report["indexes"] for p in i["partitions"]}
    assert result.run not in folders  # no file was copied
    found = shop.searcher().search(text=rows[3]["title"], k=5)
    assert {one.metadata["price"] for one in found} == {9.75}


def test_nothing_to_do_publishes_nothing(built, rows):
    two = built.refresh()
    assert (two.release, two.published, two.unchanged, two.embedded) == (1, False, PRODUCTS, 0)
    assert len(built.store().releases()) == 1
    log = read_log(built.store(), two.run)
    assert "nothing to do" in [event["event"] for event in log]
    built.write(rows[::-1])  # another order is no change
    assert built.refresh().published is False
    built.write(rows)


def test_another_configuration_is_built_without_embedding(shop):
    result = shop.refresh(index={"factory": "IVF1,Flat"})
    assert (result.release, result.embedded) == (2, 0)
    index = shop.report(result)["indexes"][0]
    assert (index["action"], index["factory"]) == ("trained", "IVF1,Flat")
    assert "asks for IVF1,Flat" in index["reasons"][0]


def test_a_product_that_comes_back_and_a_text_that_is_set_back(shop, rows):
    shop.write([rows[0] | {"title": "Something else"}, *rows[2:]])
    gone = shop.refresh()
    assert (gone.changed, gone.removed, gone.live) == (1, 1, PRODUCTS - 1)
    shop.write(rows)
    back = shop.refresh()
    assert (back.new, back.changed, back.embedded, back.live) == (1, 1, 2, PRODUCTS)
    text = f"{rows[1]['title']}. {rows[1]['description']}"
    best = shop.searcher().search(text=text, k=1, field="text")[0]
    assert best.product_id == rows[1]["product_id"]


def test_dry_run_before_the_first_build(empty):
    before = preview_refresh(empty.config(), QUIET)
    assert isinstance(before, Preview)
    assert (before.release, before.to_embed, before.counts["new"]) == (None, PRODUCTS, PRODUCTS)
    embed = next(one for one in before.plan["stages"] if one["stage"] == "embed")
    assert embed["seconds"] > 0
    assert "a calibration" in embed["source"]
    assert before.plan["bytes"]["table"]["value"] > 0
    assert not (empty.folder / "store").exists()


def test_dry_run_tells_and_changes_nothing(shop, rows):
    files = sorted(str(p) for p in (shop.folder / "store").rglob("*"))
    removed, changed = rows[0]["product_id"], rows[1] | {"title": "Else"}
    shop.write([changed, *(r | {"price": 1.0} for r in rows[2:]), rows[3] | {"product_id": "n"}])
    preview = preview_refresh(shop.config(), QUIET)
    assert preview.release == 1
    wanted = {"new": 1, "changed": 1, "changed_text": 1, "changed_image": 0, "removed": 1,
              "unchanged": PRODUCTS - 2, "metadata_changed": PRODUCTS - 2, "retried": 0,
              "formerly_rejected": 0}  # fmt: skip
    assert preview.counts == wanted
    assert preview.examples["new"] == ["n"]
    assert preview.examples["removed"] == [removed]
    assert preview.examples["changed"] == [rows[1]["product_id"]]
    assert len(preview.examples["metadata"]) == 3
    assert f"{PRODUCTS} rows" in preview.plan["bytes"]["table"]["source"]
    assert sorted(str(p) for p in (shop.folder / "store").rglob("*")) == files
    json.dumps(preview.__dict__)


def test_a_picture_that_changed_behind_its_name_is_seen_by_its_etag(empty, rows, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    local = []
    for row in rows[:10]:
        target = photos / row["image_uri"].rpartition("/")[2]
        shutil.copy(row["image_uri"], target)
        local.append(row | {"image_uri": str(target)})
    empty.write(local)
    options = {"images": {"etags": True}}
    empty.refresh(**options)
    assert empty.refresh(**options).published is False
    shutil.copy(rows[20]["image_uri"], local[0]["image_uri"])
    result = empty.refresh(**options)
    assert (result.changed, result.embedded) == (1, 1)
    assert empty.report(result)["changed_image"] == 1


def test_placeholders_are_embedded_once_and_named(empty, rows, tmp_path):
    copies = [tmp_path / f"soon-{n}.jpg" for n in range(20)]
    for copy in copies:
        shutil.copy(rows[0]["image_uri"], copy)
    shared = [r | {"image_uri": str(c)} for r, c in zip(rows[:20], copies, strict=True)]
    catalog = [*shared, *rows[20:]]
    empty.write(catalog)
    report = empty.report(empty.refresh())
    assert report["images_embedded"] + report["images_reused"] == PRODUCTS
    contents = {hashlib.sha256(Path(r["image_uri"]).read_bytes()).digest() for r in catalog}
    assert report["images_embedded"] == len(contents) <= PRODUCTS - 19
    assert report["placeholders"][0]["rows"] == 20
    assert report["placeholders"][0]["image_uri"] in {str(c) for c in copies}


def stopped(shop, **sections):
    before = shop.store().release()
    with pytest.raises(GateError) as stop:
        shop.refresh(**sections)
    assert shop.store().release() == before
    return str(stop.value)


def test_gates(shop, rows):
    shop.write(rows[: PRODUCTS // 2])
    assert "gate.max_live_drop" in stopped(shop)
    fine = {"gate": {"max_live_drop": 0.6}}
    shop.write([*rows[: PRODUCTS // 2], *({**r, "image_uri": None} for r in rows[30:])])
    assert "gate.max_reject_share" in stopped(shop, **fine)
    shop.write([r | {"image_uri": s["image_uri"]} for r, s in zip(rows, rows[::-1], strict=True)])
    line = stopped(shop, gate={"min_overlap_at_10": 1.0})
    assert "overlap_at_10" in line
    assert "min_recall_at_10 is 1.000" in stopped(shop, gate={"min_recall_at_10": 1.0})
    assert shop.refresh(gate={"min_overlap_at_10": 0.0}).release == 2


def test_a_night_of_rejects_alone_comes_before_the_gate_again_and_is_published(shop, rows):
    broken = shop.folder / "broken.jpg"
    broken.write_bytes(b"no picture")
    shop.write([*rows, rows[0] | {"product_id": "broken", "image_uri": str(broken)}])
    for _ in range(2):  # then nothing is left to embed
        assert "gate.max_reject_share" in stopped(shop, gate={"max_reject_share": 0})
    published = shop.refresh()
    assert (published.release, published.embedded, published.rejected) == (2, 0, 1)
    assert not shop.refresh().published
    shop.write(rows)  # and a night without them
    assert shop.refresh().rejected == 0
    assert not shop.refresh().published


def test_two_refreshes_at_once_one_wins(shop, rows):
    shop.write(change(rows, 7))
    config = shop.folder / "job.yaml"
    config.write_text(shop.config(ray={"object_store_mb": 100}).model_dump_json())
    command = [sys.executable, "-m", "jobs", "refresh", "-c", str(config), "-q"]
    jobs = [
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outcomes = [(*job.communicate(timeout=300), job.returncode) for job in jobs]
    lost = [error for _, error, code in outcomes if code]
    assert len(lost) == 1, outcomes  # both began from release 1
    assert "another job" in lost[0]
    assert [r.version for r in shop.store().releases()] == [2, 1]
    again = shop.refresh()
    assert (again.embedded, again.live + again.rejected) == (0, again.rows)
    indexes = shop.store().release().indexes
    ids = pq.read_table(shop.folder / "store" / "indexes" / indexes / "ids.parquet")
    assert len(set(ids["vector_id"].to_pylist())) == again.live


def test_reindex_embeds_nothing_and_publishes(shop):
    first = shop.store().release()
    result = reindex(
        shop.config(index={"factory": "IVF1,Flat"}, gate={"min_overlap_at_10": 0}), QUIET
    )
    assert (result.release, result.embedded, result.published) == (2, 0, True)
    report = shop.report(result)
    assert (report["command"], report["rows"]) == ("reindex", first.rows)
    assert {index["factory"] for index in report["indexes"]} == {"IVF1,Flat"}
    measured = [index["measured"] for index in report["indexes"]]
    assert all(one["missing"] == one["extra"] == 0 for one in measured)
    queries = ["red shoe"]
    assert len(answers(shop.searcher(), queries)[0]) == PRODUCTS
    after = shop.refresh(index={"factory": "IVF1,Flat"})  # the gate makes no other release
    assert (after.release, after.published) == (2, False)


def test_a_candidate_is_left_for_evaluate(shop):
    config = shop.config(index={"factory": "IVF1,Flat"})
    result = reindex(config, QUIET, publish=False)
    assert (result.published, result.release, result.candidate) == (False, 1, result.run)
    assert len(shop.store().releases()) == 1
    found = evaluate(config, QUIET, candidate=result.candidate)
    assert (found.release, found.candidate) == (None, result.run)
    assert found.queries > 0
    with pytest.raises(StoreError, match="no candidate 'nothing'"):
        evaluate(config, QUIET, candidate="nothing")


def test_another_encoder_is_backfilled_while_the_old_one_serves(shop, rows):
    other = {"encoder": {"architecture": "vitrine-tiny", "pretrained": "random", "seed": 5}}
    with pytest.raises(FingerprintError, match="vitrine reindex"):
        shop.refresh(**other)
    old = shop.store().release()
    result = reindex(shop.config(**other), QUIET)
    assert (result.release, result.embedded, result.published) == (2, PRODUCTS, True)
    new = shop.store().release()
    assert new.encoder != old.encoder
    for release in (old, new):  # the old one is whole
        found = Searcher(shop.store(), release.indexes).search(text=rows[0]["title"], k=3)
        assert len(found) == 3
    shop.write([rows[0] | {"title": "Else"}, *rows[1:]])
    after = shop.refresh(**other)
    assert (after.embedded, after.release) == (1, 3)
    assert {i["action"] for i in shop.report(after)["indexes"]} <= {"updated", "kept"}


def test_reindex_needs_a_release(empty):
    with pytest.raises(StoreError, match="no release"):
        reindex(empty.config(), QUIET)


def test_the_log_tells_the_stages_of_a_run(built):
    log = read_log(built.store(), built.store().release(1).run)
    assert len({event["run"] for event in log}) == 1
    stages = [event["stage"] for event in log if event["event"] == "stage ends"]
    assert stages[:3] == ["compare the catalog with the store", "embed", "find the live rows"]
    assert all({"timestamp", "command", "parent"} <= set(event) for event in log)
