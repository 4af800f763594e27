"""Searcher over real releases of one store: flat, in partitions, and in lists with a refine store.

200 products of one small picture each, but one product that has 60 almost alike.
"""

import gc
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from encoders.create import create_checkpoint
from encoders.spec import EncoderSpec
from indexing.search import SearchPoint
from jobs.config import JobConfig
from jobs.errors import JobError, StoreError
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.reindex import reindex
from jobs.search import Searcher, open_release, result_rows
from jobs.store import Store

PRODUCTS, MANY = 200, 60  # the first product has MANY pictures
CROWD = "p0"
FLAT, PARTED, LISTS = 1, 2, 3  # the releases
INDEXES = {
    FLAT: {},
    PARTED: {"max_partition_vectors": 100},
    LISTS: {"factory": "IVF4,SQ8,Refine(SQ8)", "max_partition_vectors": 200},
}
COLORS = ("red", "green", "blue", "black", "white")
THINGS = ("coat", "boot", "lamp", "chair")


def draw_picture(path, number, noise=0):
    """Draw blocks of colour that differ from product to product, and a little with the noise."""
    blocks = np.random.default_rng(number).integers(0, 255, (4, 4, 3))
    blocks[0, 0, 0] = (blocks[0, 0, 0] + noise) % 256
    Image.fromarray(blocks.astype(np.uint8)).resize((32, 32), Image.Resampling.NEAREST).save(path)
    return path.name


def write_catalog(folder):
    folder.mkdir()
    rows = []
    for number in range(PRODUCTS):
        pictures = range(MANY if number == 0 else 1)
        names = [draw_picture(folder / f"{number}-{p}.png", number, noise=p) for p in pictures]
        title = f"{COLORS[number % 5]} {THINGS[number % 4]} number {number}"
        row = {"product_id": f"p{number}", "title": title, "image_uri": names}
        rows.append(row | {"price": float(number), "brand": f"b{number % 3}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "catalog.parquet")
    return rows


class Shop:
    """A store with a release of every kind of index."""

    def __init__(self, folder, towers):
        self.rows = write_catalog(folder / "catalog")
        spec = EncoderSpec(architecture=str(towers), pretrained="random")
        create_checkpoint(spec, folder / "encoder")
        quiet = Progress(quiet=True)
        for version, index in INDEXES.items():
            config = JobConfig.model_validate(
                {
                    "store": str(folder / "store"),
                    "catalog": {"path": str(folder / "catalog" / "catalog.parquet")},
                    "encoder": {"checkpoint": str(folder / "encoder")},
                    "embed": {"fields": ["image", "text"]},
                    "index": index,
                    "gate": {
                        "min_intersection_at_10": 0,
                        "min_self_retrieval": 0,
                        "min_overlap_at_10": 0,
                    },
                }
            )
            command = refresh if version == FLAT else reindex
            assert command(config, quiet).release == version
        self.store, self.config = Store(str(folder / "store")), config
        self.searchers = {version: open_release(self.store, version) for version in INDEXES}
        self.searcher = self.searchers[LISTS]
        self.titles = [row["title"] for row in self.rows]
        self.queries = self.searcher.encode_batch([None] * 40, self.titles[:40])
        self.photos = self.searcher.encode_batch(
            [(folder / "catalog" / f"{n}-0.png").read_bytes() for n in range(12)], [None] * 12
        )

    def manifest(self, version=LISTS):
        return self.store.read_json("indexes", self.store.release(version).indexes, "manifest.json")

    def copy(self, root):
        """The store in another folder, to be damaged."""
        shutil.copytree(self.store.root, root)
        return Store(str(root))


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_towers, local_ray):
    return Shop(tmp_path_factory.mktemp("search"), tiny_towers)


@pytest.fixture(params=INDEXES, ids=["flat", "parted", "lists"])
def searcher(shop, request):
    return shop.searchers[request.param]


def names(results):
    return [one.product_id for one in results]


def same(found, expected):
    """Whether answers agree; scores of a batch may differ in the last bit."""
    rows, wanted = ([result_rows(one) for one in answers] for answers in (found, expected))
    for a, b in zip(rows, wanted, strict=True):
        assert [one["product_id"] for one in a] == [one["product_id"] for one in b]
        assert np.allclose([x["score"] for x in a], [x["score"] for x in b], atol=1e-5)


def test_releases_are_of_every_kind(shop):
    parts = {
        version: {name: len(found) for name, found in searcher.indexes.items()}
        for version, searcher in shop.searchers.items()
    }
    assert parts == {
        FLAT: {"image": 1, "text": 1},
        PARTED: {"image": 4, "text": 2},
        LISTS: {"image": 2, "text": 1},
    }
    assert all(part.refine is not None for part in shop.searcher.indexes["image"])
    assert len(shop.searcher.ids) == PRODUCTS + MANY - 1


def test_words_and_photos_find_their_product(shop, searcher):
    whole = SearchPoint(nprobe=0) if searcher is not shop.searcher else SearchPoint(nprobe=4)
    for queries, field in ((shop.queries[:12], "text"), (shop.photos, "image")):
        found = searcher.search_vectors(queries, k=1, field=field, point=whole)
        assert [one.product_id for (one,) in found] == [f"p{n}" for n in range(12)]
    best = searcher.search(text=shop.titles[3], field="text", k=3)
    assert len(best) == 3
    assert (best[0].image_uri, best[0].metadata["price"]) == ("3-0.png", 3.0)
    assert [one.score for one in best] == sorted((one.score for one in best), reverse=True)
    picture = Path(shop.config.catalog.path).parent / "5-0.png"
    assert names(searcher.search(image=picture, field="image", k=1)) == ["p5"]


def test_every_kind_of_index_answers_alike(shop):
    """Partitions join to what one file says; refine scores differ by what 8 bits round."""
    flat, parted, lists = (
        shop.searchers[version].search_vectors(shop.queries, k=5, field="text", point=point)
        for version, point in (
            (FLAT, None),
            (PARTED, None),
            (LISTS, SearchPoint(nprobe=4, rerank=100)),
        )
    )
    same(parted, flat)
    agree = [len({*names(a)} & {*names(b)}) / 5 for a, b in zip(lists, flat, strict=True)]
    assert np.mean(agree) > 0.9
    for a, b in zip(lists, flat, strict=True):
        assert abs(a[0].score - b[0].score) < 0.01


def test_a_batch_answers_as_its_queries_do(shop, searcher):
    for field in ("image", "text"):
        batch = searcher.search_vectors(shop.queries, k=5, field=field)
        alone = [searcher.search_vectors(q[None], k=5, field=field)[0] for q in shop.queries]
        same(batch, alone)
    assert searcher.search_vectors(shop.queries[:0], k=5) == []


def test_threads_answer_as_one(shop, searcher):
    """Each thread asks all, with filters and points of its own, by words and by vectors."""
    cheap = pc.field("price") < 100
    steps = [
        lambda n: searcher.search(text=shop.titles[n], k=4, field="text"),
        lambda n: searcher.search(text=shop.titles[n], k=4, field="image", only=cheap),
        lambda n: searcher.search_vectors(shop.queries[n : n + 1], k=3, only=["p1", "p9"])[0],
        lambda n: searcher.search_vectors(shop.photos[n : n + 1], k=7, field="image")[0],
    ]
    if searcher is shop.searcher:
        for point in (SearchPoint(nprobe=1), SearchPoint(nprobe=4, rerank=50)):
            steps.append(
                lambda n, p=point: searcher.search_vectors(shop.queries[n : n + 1], k=3, point=p)[0]
            )
    expected = [step(number) for number in range(12) for step in steps]
    start = threading.Barrier(8)

    def ask(thread):
        start.wait()
        order = np.random.default_rng(thread).permutation(len(expected)).tolist()
        return {place: steps[place % len(steps)](place // len(steps)) for place in order}

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    for found in answers:
        assert [found[place] for place in range(len(expected))] == expected


def test_filter_by_metadata(shop, searcher):
    for predicate, passes in (
        (pc.field("price") < 20, lambda row: row["price"] < 20),
        (
            (pc.field("brand") == "b1") & (pc.field("price") >= 150),
            lambda row: row["brand"] == "b1" and row["price"] >= 150,
        ),
        (pc.field("product_id") == "p7", lambda row: row["product_id"] == "p7"),
    ):
        allowed = {row["product_id"] for row in shop.rows if passes(row)}
        for field in ("text", "image"):
            found = searcher.search(text="red coat", k=PRODUCTS, field=field, only=predicate)
            assert {*names(found)} == allowed
            assert len(found) == len(allowed)


def test_a_prepared_filter_serves_many_searches(shop, searcher):
    for only in (pc.field("price") < 20, ["p3", "p77"]):
        chosen = searcher.choose(only, field="text")
        for rows in (shop.queries[:2], shop.queries[3:4]):
            expected = searcher.search_vectors(rows, k=5, field="text", only=only)
            assert searcher.search_vectors(rows, k=5, field="text", only=chosen) == expected
    assert searcher.choose(None) is None


def test_filter_keeps_the_order_of_the_unfiltered(shop, searcher):
    whole = searcher.search_vectors(shop.queries[:8], k=PRODUCTS, field="text")
    some = searcher.search_vectors(
        shop.queries[:8], k=5, field="text", only=pc.field("price") >= 100
    )
    if searcher is not shop.searcher:  # it re-ranks what a filter leaves, not what lists hold
        for a, b in zip(some, whole, strict=True):
            assert names(a) == [one.product_id for one in b if one.metadata["price"] >= 100][:5]
    assert all(one.metadata["price"] >= 100 for row in some for one in row)


def test_filter_by_products(shop, searcher):
    wanted = {"p3", CROWD, "p77", "no such product"}
    found = searcher.search(text="boot", k=10, field="image", only=wanted)
    assert {*names(found)} == wanted - {"no such product"}
    assert searcher.search(text="boot", k=10, only={"p3"}) != []


def test_filter_that_nothing_passes(searcher):
    for nothing in (pc.field("price") < 0, [], ["no such product"]):
        for field in ("image", "text"):
            assert searcher.search(text="boot", field=field, only=nothing) == []


@pytest.mark.parametrize(
    ("only", "words"),
    [
        (pc.field("colour") == "red", r"colour.*; the columns are vector_id, .*title.*price"),
        (pc.field("price") == "red", r"can't be used: .*; the columns are .*price"),
        (pc.field("price") + 1, "gives double, expected bool"),
    ],
)
def test_filter_that_cannot_be_used(shop, only, words):
    with pytest.raises(JobError, match=words) as caught:
        shop.searcher.search(text="boot", only=only)
    assert "\n" not in str(caught.value)


def test_images_of_a_product_are_one_answer(shop, searcher):
    """The 60 nearest vectors are all of one product: more are looked at until k are found."""
    (found,) = searcher.search_vectors(shop.photos[:1], k=5, field="image")
    assert len(set(names(found))) == len(found) == 5
    assert names(found)[0] == CROWD
    assert searcher.depth(5, "image") < MANY
    everything = searcher.search_vectors(shop.photos[:2], k=2 * PRODUCTS, field="image")
    if searcher is not shop.searcher:
        assert [len({*names(row)}) for row in everything] == [PRODUCTS] * 2


def test_point_goes_with_the_call(shop):
    searcher, query = shop.searcher, shop.queries[:20]
    default = searcher.search_vectors(query, k=5, field="text")
    own = searcher.search_vectors(query, k=5, field="text", point=searcher.points["text"])
    assert own == default
    codes = searcher.search_vectors(query, k=5, field="text", point=SearchPoint(nprobe=4))
    refined = searcher.search_vectors(
        query, k=5, field="text", point=SearchPoint(nprobe=4, rerank=50)
    )
    assert [r[0].score for r in codes] != [r[0].score for r in refined]
    shallow = searcher.search_ids(query, 200, field="text", point=SearchPoint(nprobe=1))[1]
    deep = searcher.search_ids(query, 200, field="text", point=SearchPoint(nprobe=4))[1]
    assert (shallow >= 0).sum() < (deep >= 0).sum() == 20 * 200
    assert searcher.search_vectors(query, k=5, field="text") == default


@pytest.mark.parametrize(
    ("version", "point", "words"),
    [
        (LISTS, SearchPoint(nprobe=5), "nprobe is 5, expected 1 to nlist 4"),
        (LISTS, SearchPoint(nprobe=0), "nprobe is 0, expected 1 to nlist 4"),
        (LISTS, SearchPoint(nprobe=1, ef_search=8), "ef_search is 8, expected 0"),
        (FLAT, SearchPoint(nprobe=1), "a flat index has no lists"),
        (PARTED, SearchPoint(nprobe=0, rerank=10), "no refine store"),
    ],
)
def test_impossible_point(shop, version, point, words):
    with pytest.raises(JobError, match=words):
        shop.searchers[version].search_vectors(shop.queries[:1], point=point)


def test_queries_that_cannot_be_used(shop):
    query = shop.queries[:1]
    for queries, words in (
        (query[:, :-1], r"expected \(N, 32\)"),
        (query * np.nan, "NaN or Inf"),
        (query * 2, "unit length"),
        (query.astype(np.float64), "float64, expected float32"),
    ):
        with pytest.raises(JobError, match=words):
            shop.searcher.search_vectors(queries)
    with pytest.raises(JobError, match="k is 0"):
        shop.searcher.search_vectors(query, k=0)
    with pytest.raises(JobError, match="no field 'smell'; it has image, text"):
        shop.searcher.search(text="boot", field="smell")


def mapped_files(root):
    """How each mapping of a file below a folder is protected, as in `r--s`; gone ones too."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {
        (Path(line.split(maxsplit=5)[5].removesuffix(" (deleted)")).name, line.split()[1])
        for line in lines
        if str(root) in line
    }


@pytest.mark.parametrize("version", [PARTED, LISTS])
def test_files_are_mapped_read_only_and_may_go(shop, tmp_path, version):
    """A release that is collected or moved goes on serving where it is open."""
    store = shop.copy(tmp_path / "store")
    folder = store.release(version).indexes
    before = {
        path.name: path.stat().st_mtime_ns
        for path in (tmp_path / "store" / "indexes" / folder).iterdir()
    }
    searcher = open_release(store, version)
    found = mapped_files(tmp_path)
    served = {"codes"} | ({"refine"} if version == LISTS else set())
    expected = {
        part[kind]["file"]
        for entry in shop.manifest(version)["fields"].values()
        for part in entry["partitions"]
        for kind in served
    }
    assert {name for name, _ in found} == expected
    assert all(rights[1] == "-" for _, rights in found)  # not writable
    (tmp_path / "store" / "indexes").rename(tmp_path / "elsewhere")
    after = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "elsewhere" / folder).iterdir()
    }
    assert after == before
    shutil.rmtree(tmp_path / "elsewhere")
    same(
        searcher.search_vectors(shop.queries, field="image"),
        shop.searchers[version].search_vectors(shop.queries, field="image"),
    )


def test_what_is_dropped_lets_go_of_files_and_threads(shop, tmp_path):
    store = shop.copy(tmp_path / "store")
    before = set(threading.enumerate())
    searcher = open_release(store, PARTED)
    searcher.search_vectors(shop.queries, field="image")
    started = set(threading.enumerate()) - before
    assert mapped_files(tmp_path)
    assert started
    del searcher
    gc.collect()
    assert mapped_files(tmp_path) == set()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("kind", ["codes", "refine"])
def test_flipped_byte_is_refused(shop, tmp_path, kind):
    store = shop.copy(tmp_path / "store")
    entry = shop.manifest()["fields"]["image"]["partitions"][1][kind]
    path = tmp_path / "store" / "indexes" / entry["folder"] / entry["file"]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match=rf"{entry['file']} is corrupted: sha256 "):
        open_release(store, LISTS)
    path.unlink()
    with pytest.raises(StoreError, match=rf"{entry['file']} is missing"):
        open_release(store, LISTS)
    assert open_release(store, FLAT).search(text="boot")


def test_other_formats_and_damaged_entries_are_refused(shop, tmp_path):
    store = shop.copy(tmp_path / "store")
    folder, manifest = store.release(LISTS).indexes, shop.manifest()

    def change(**values):
        text = json.dumps(manifest | values)
        store.write_text(text, "indexes", folder, "manifest.json")
        return store, folder

    with pytest.raises(StoreError, match="format 99, expected"):
        Searcher(*change(format_version=99))
    image = manifest["fields"]["image"]
    for name in ("partitions", "template", "spec", "point"):
        left = {key: value for key, value in image.items() if key != name}
        with pytest.raises(StoreError, match="damaged manifest"):
            Searcher(*change(fields={"image": left}))
    assert Searcher(*change()).fields == ["image", "text"]


def test_files_open_without_vitrine_as_the_page_says(shop, searcher):
    """The page's own reader, which knows FAISS and NumPy alone, finds what Searcher finds."""
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for block in blocks:
        compile(block, "serving.md", "exec")
    (reader,) = (block for block in blocks if "def search_field" in block)
    assert "jobs" not in reader
    assert "indexing" not in reader
    found = {}
    exec(reader, found)
    version = next(v for v, opened in shop.searchers.items() if opened is searcher)
    indexes = Path(shop.store.root) / "indexes"
    for field in ("image", "text"):
        given = (indexes, shop.store.release(version).indexes, field, shop.queries, 10)
        scores, ids = found["search_field"](*given)
        expected = searcher.search_ids(shop.queries, 10, field=field)
        np.testing.assert_allclose(scores, expected[0], atol=1e-5)
        if field == "text":
            np.testing.assert_array_equal(ids, expected[1])
