"""Rollback and collection around real refreshes of a rendered catalog."""

import json
import shutil
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_maker import Row, age, append, publish

from jobs.config_file import read_config
from jobs.errors import PublishConflictError, StoreError
from jobs.files import list_files
from jobs.gc import gc
from jobs.leases import live_leases
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.release_files import check_files
from jobs.rollback import rollback
from jobs.search import Searcher
from jobs.store import Store

pytestmark = pytest.mark.usefixtures("local_ray")

PRODUCTS = 12
RUNS = [f"2026010{n}T120000-aaaaaa" for n in range(1, 4)]
QUIET = Progress(quiet=True)


class Shop:
    """A catalog whose prices and pictures change, and its store."""

    def __init__(self, folder, sample):
        self.folder, self.catalog = folder, folder / "catalog"
        shutil.copytree(sample, self.catalog)
        self.rows = pq.read_table(self.catalog / "catalog.parquet").to_pylist()[:PRODUCTS]
        self.path = folder / "job.yaml"
        self.path.write_text(json.dumps(self._job()))
        self.config, self.store = read_config(self.path), Store(str(folder / "store"))

    def _job(self):
        return {
            "store": str(self.folder / "store"),
            "catalog": {"path": str(self.catalog / "shop.parquet"), "text": "{title}"},
            "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
            "embed": {"fields": ["image", "text"]},
            "ray": {"object_store_mb": 128},
            "gate": {"min_self_retrieval": 0, "max_live_drop": 1, "min_overlap_at_10": 0},
        }

    def refresh(self, rows):
        pq.write_table(pa.Table.from_pylist(rows), self.catalog / "shop.parquet")
        return refresh(self.config, QUIET)

    def search(self, version=None):
        """Each of some products' photo, answered: (product, title, score)."""
        release = self.store.release(version)
        searcher = Searcher(
            self.store, release.indexes, images=self.config.images, encoder=release.encoder
        )
        images = [self.catalog / row["image_uri"] for row in self.rows[:4]]
        found = [searcher.search(image=image, k=3) for image in images]
        return [
            [(one.product_id, one.metadata["title"], round(one.score, 4)) for one in answer]
            for answer in found
        ]


@pytest.fixture(scope="module")
def shop(tmp_path_factory, sample_catalog):
    return Shop(tmp_path_factory.mktemp("rollback"), sample_catalog)


def test_a_week_of_refreshes_rollbacks_and_collections(shop, call_vitrine):
    """One story, since every release costs seconds."""
    first = shop.rows
    second = [row | {"title": f"new {row['title']}"} for row in first[2:]]
    assert shop.refresh(first).release == 1
    answers = {1: shop.search()}
    found = shop.refresh(second)
    assert (found.release, found.removed, found.live) == (2, 2, PRODUCTS - 2)
    answers[2] = shop.search()
    assert answers[1] != answers[2]

    # Back to the first, and on from it.
    done = rollback(shop.config, QUIET)
    assert (done.release, done.content, done.replaced, done.live) == (3, 1, 2, PRODUCTS)
    newest = shop.store.release()
    assert (newest.parent, newest.command) == (2, "rollback to 1")
    assert shop.search() == answers[1]
    found = shop.refresh(second)
    assert (found.release, found.live, found.embedded) == (4, PRODUCTS - 2, 0)
    assert shop.search() == answers[2]
    check_files(shop.store, shop.store.release())

    # Compaction and collection: nothing is embedded again, and what is kept still answers.
    age(shop.folder / "store", 2 * 3600)
    collected = gc(shop.config, QUIET, keep=2)
    assert (collected.kept, collected.dropped) == ((4, 3), (2, 1))
    assert collected.compaction.done
    assert (shop.search(4), shop.search(3)) == (answers[2], answers[1])
    found = shop.refresh([row | {"price": 1.25} for row in second])
    assert (found.release, found.embedded, found.unchanged) == (5, 0, PRODUCTS - 2)
    assert shop.search() == answers[2]

    # An hour later the replaced files go with the last release that reads them.
    age(shop.folder / "store", 2 * 3600)
    collected = gc(shop.config, QUIET, keep=1)
    assert collected.removed["data files"]["files"] > 0
    check_files(shop.store, shop.store.release())
    assert shop.search() == answers[2]
    done = call_vitrine("rollback", "3", "--config", shop.path)
    assert "no release 3, but 5" in done.stderr
    assert shop.refresh(first[:-1]).live == PRODUCTS - 1
    assert live_leases(shop.store) == []


def test_collection_in_the_middle_of_a_refresh(shop):
    """A collector without any floor but the lease, again and again while a refresh runs."""
    rows = [row | {"title": f"other {row['title']}"} for row in shop.rows]
    results = []
    job = threading.Thread(target=lambda: results.append(shop.refresh(rows)))
    before = shop.store.release().version
    job.start()
    seen, collections = set(), 0
    while job.is_alive():
        if live_leases(shop.store):
            seen |= set(gc(shop.config, QUIET, keep=1, min_age_s=0).running)
            collections += 1
        time.sleep(0.05)
    (result,) = results
    assert collections >= 1
    assert seen == {result.run}
    assert (result.published, result.release, result.live) == (True, before + 1, PRODUCTS)
    check_files(shop.store, shop.store.release())
    assert [answer[0][0] for answer in shop.search()] == [
        row["product_id"] for row in shop.rows[:4]
    ]


# without an encoder


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "store"))
    for run in RUNS:
        append(store, [Row(1, int(run[7]))])
        publish(store, run)
    return store


@pytest.fixture
def config(shop, store):
    return shop.config.model_copy(update={"store": store.root})


def test_rollback_twice_is_back_where_it_began(store, config):
    assert rollback(config, QUIET).content == 2
    assert rollback(config, QUIET).content == 3
    assert [r.indexes for r in store.releases()] == [RUNS[n] for n in (2, 1, 2, 1, 0)]


@pytest.mark.parametrize(
    ("version", "message"),
    [(3, "release 3 .* is the newest"), (9, "no release 9, but 3, 2, 1")],
)
def test_rollback_to_what_is_no_older_release(store, config, version, message):
    with pytest.raises(StoreError, match=message):
        rollback(config, QUIET, version)
    assert len(store.releases()) == 3


def test_rollback_to_what_is_shown_already(store, config):
    rollback(config, QUIET, 1)
    with pytest.raises(StoreError, match="is what the newest release, 4, shows"):
        rollback(config, QUIET, 1)


def test_first_release_has_nothing_before_it(tmp_path, config):
    store = Store(str(tmp_path / "other"))
    append(store, [Row(1, 1)])
    publish(store, RUNS[0])
    with pytest.raises(StoreError, match="is the first: nothing to go back to"):
        rollback(config.model_copy(update={"store": store.root}), QUIET)


INDEX_FILES = (
    "manifest.json",
    "image.faiss",
    "image.template.faiss",
    "ids.parquet",
    "rows.parquet",
)
FAULTS = [("missing", part) for part in (*INDEX_FILES, "encoder.json", "generation-000001")]


@pytest.mark.parametrize(
    ("fault", "part"), [*FAULTS, *(("corrupted", part) for part in INDEX_FILES)]
)
def test_release_that_is_not_whole_is_refused(store, config, part, fault):
    files = list_files(store, "indexes", RUNS[1]) + list_files(store, "checkpoints")
    files += list_files(store, "embeddings")
    (path,) = [
        Path(store.root, f.path) for f in files if f.path.rpartition("/")[2].startswith(part)
    ]
    path.unlink() if fault == "missing" else path.write_bytes(b"damaged")
    with pytest.raises(StoreError, match=rf"{part}.* (is {fault}|can't be read)"):
        rollback(config, QUIET, 2)
    assert len(store.releases()) == 3
    assert live_leases(store) == []


def test_one_of_two_at_once_wins(store, config):
    barrier, outcomes = threading.Barrier(4), []

    def go_back():
        barrier.wait()
        try:
            outcomes.append(rollback(config, QUIET, 1).release)
        except (PublishConflictError, StoreError) as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=go_back) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(4) == 1
    assert set(outcomes) <= {4, PublishConflictError, StoreError}
    assert len(store.releases()) == 4
