"""Fields, weights and missing modalities: small refreshes end to end, without a process each."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_rows import make_live

from encoders.checkpoint import build_checkpoint_model, save_checkpoint
from encoders.checkpoint_files import CheckpointConfig, read_checkpoint_config
from encoders.create import create_checkpoint
from encoders.fusion import FusionSpec, fuse
from encoders.spec import EncoderSpec
from jobs.config import JobConfig
from jobs.embed_write import write_data_file
from jobs.errors import ConfigError, StoreError
from jobs.live import LiveRows
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.schemas import EMBEDDINGS
from jobs.search import Searcher
from jobs.space import VectorField
from jobs.state import read_data_file
from jobs.store import Store
from jobs.vectors import exact_search, read_blocks

ROWS = 10
NO_GATE = {"max_reject_share": 1, "min_intersection_at_10": 0, "min_self_retrieval": 0}


@pytest.fixture(scope="module")
def products(sample_catalog):
    """Rows of the sample, and where their pictures are."""
    rows = pq.read_table(sample_catalog / "catalog.parquet").slice(0, ROWS).to_pylist()
    return [row | {"image_uri": str(sample_catalog / row["image_uri"])} for row in rows]


def write_products(path, rows, without=()):
    table = pa.Table.from_pylist(rows).drop_columns(list(without))
    pq.write_table(table, path)
    return path


def run_refresh(store, catalog, **sections):
    sections = {"encoder": {"architecture": "vitrine-tiny", "pretrained": "random"}} | sections
    config = JobConfig.model_validate(
        {"store": str(store), "catalog": {"path": str(catalog)}, "gate": NO_GATE} | sections
    )
    result = refresh(config, Progress(quiet=True))
    report = Store(config.store).read_json("runs", result.run, "report.json")
    return result, report, Searcher(Store(config.store), result.run)


def answers(searcher, text):
    return [(r.product_id, r.score) for r in searcher.search(text=text, k=ROWS)]


@pytest.mark.usefixtures("local_ray")
def test_another_weight_embeds_nothing_and_answers_like_a_fresh_store(products, tmp_path):
    catalog = write_products(tmp_path / "c.parquet", products)
    store, fresh = tmp_path / "store", tmp_path / "fresh"
    one, _, _ = run_refresh(store, catalog, embed={"fields": ["text", "image"]})
    three = {"fields": ["image", "text", "multimodal"]}
    two, before, searcher = run_refresh(store, catalog, embed=three)
    weighted = three | {"image_weight": 0.9, "query_image_weight": 0.2}
    last, after, changed = run_refresh(store, catalog, embed=weighted)
    assert [one.embedded, two.embedded, last.embedded] == [ROWS, 0, 0]
    sha256 = [
        {i["field"]: i["partitions"][0]["codes"]["sha256"] for i in r["indexes"]}
        for r in (before, after)
    ]
    assert sha256[0]["image"] == sha256[1]["image"]
    assert sha256[0]["multimodal"] != sha256[1]["multimodal"]
    assert searcher.manifest["query"]["fusion"]["image_weight"] == 0.5
    assert changed.manifest["query"]["fusion"]["image_weight"] == 0.9
    assert changed.space.fusion.query_image_weight == 0.2
    built, _, expected = run_refresh(fresh, catalog, embed=weighted)
    assert built.embedded == ROWS
    for row in products:
        found, wanted = answers(changed, row["title"]), answers(expected, row["title"])
        assert [name for name, _ in found] == [name for name, _ in wanted]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in wanted], atol=1e-5)


@pytest.mark.usefixtures("local_ray")
def test_products_without_an_image_or_a_text_are_live_by_the_other(products, tmp_path):
    gone = {"image_uri": "http://127.0.0.1:9/a.jpg"}  # nothing listens there: a passing fault
    odd = [
        products[1] | {"image_uri": None},
        products[2] | {"image_uri": "nowhere.jpg"},
        products[3] | {"title": ""},
        products[4] | {"title": "", "image_uri": None},
        products[5] | gone,
        products[6] | gone | {"title": ""},
    ]
    catalog = write_products(tmp_path / "c.parquet", [products[0], *odd])
    sections = {
        "embed": {"fields": ["multimodal"], "image_weight": 0.4},
        "images": {"http_hosts": ["127.0.0.1:9"], "retries": 0},
    }
    result, report, searcher = run_refresh(tmp_path / "store", catalog, **sections)
    assert (result.rows, result.live, result.rejected) == (7, 4, 3)
    assert {r["reason"]: r["rows"] for r in report["rejects"]} == {
        "missing_image": 1,
        "unreachable": 2,
    }
    masked = {r["reason"]: r["examples"][0]["product_id"] for r in report["masked"]}
    names = [row["product_id"] for row in products]
    assert masked == {"missing_image": names[1], "not_found": names[2], "empty_text": names[3]}
    page = (tmp_path / "store" / "runs" / result.run / "report.html").read_text()
    assert "Live without an image or a text" in page
    by_words = searcher.search(text=products[1]["title"], k=1)[0]
    assert (by_words.product_id, round(by_words.score, 2)) == (names[1], 1.0)
    by_photo = searcher.search(image=products[3]["image_uri"], k=7)
    assert names[3] in [r.product_id for r in by_photo if r.score > 0.999]
    again, report, _ = run_refresh(tmp_path / "store", catalog, **sections)
    assert (again.embedded, report["retried"], report["rejected_in_run"]) == (0, 2, 2)
    assert again.live + again.rejected == again.rows
    all_fields = {"embed": {"fields": ["image", "text", "multimodal"]}}
    strict, report, _ = run_refresh(tmp_path / "strict", catalog, **sections | all_fields)
    assert (strict.live, strict.rejected, report["masked"]) == (1, 6, [])


@pytest.mark.usefixtures("local_ray")
def test_catalog_without_an_image_column(products, tmp_path):
    catalog = write_products(tmp_path / "c.parquet", products, without=["image_uri"])
    result, report, searcher = run_refresh(
        tmp_path / "store", catalog, embed={"fields": ["multimodal"]}
    )
    assert (result.live, result.rejected) == (ROWS, 0)
    (masked,) = report["masked"]
    assert masked == {
        "reason": "missing_image", "kind": "permanent", "rows": ROWS, "examples": [],
    }  # fmt: skip
    assert answers(searcher, products[2]["title"])[0][1] == pytest.approx(1, abs=1e-3)


def make_msr(folder, kind):
    stock = folder.parent / f"{folder.name}-stock"
    create_checkpoint(EncoderSpec(architecture="vitrine-tiny", pretrained="random"), stock)
    found = read_checkpoint_config(stock)
    config = CheckpointConfig(
        model_config=found.model_config,
        preprocess=found.preprocess,
        fusion=FusionSpec(kind=kind),
    )
    save_checkpoint(build_checkpoint_model(config), config, folder)
    return {"checkpoint": str(folder)}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("kind", "doubled"), [("alpha_concat", True), ("mlp", False)])
def test_msr_encoder_has_one_field(products, tmp_path, kind, doubled):
    rows = [*products[:4], products[4] | {"image_uri": None}]
    catalog = write_products(tmp_path / "c.parquet", rows)
    encoder = make_msr(tmp_path / "msr", kind)
    result, report, searcher = run_refresh(tmp_path / "store", catalog, encoder=encoder)
    assert (result.live, result.embedded) == (5, 5)
    assert [m["rows"] for m in report["masked"]] == [1]
    assert searcher.fields == ["multimodal"]
    dim = searcher.space.dim
    assert searcher.indexes["multimodal"][0].index.d == (2 * dim if doubled else dim)
    assert len(answers(searcher, products[0]["title"])) == 5
    files = Store(str(tmp_path / "store"))
    stored = read_data_file(
        files, files.embedding_files(1)[0], [f.name for f in EMBEDDINGS if "embedding" in f.name]
    )
    full = {name for name in stored.column_names if stored[name].null_count == 0}
    expected = ("image", "text") if doubled else ("multimodal",)
    assert full == {f"{name}_embedding" for name in expected}
    weighted = {"encoder": encoder, "embed": {"image_weight": 0.8}}
    if doubled:
        again, _, _ = run_refresh(tmp_path / "store", catalog, **weighted)
        assert (again.embedded, again.live) == (0, 5)
    else:
        with pytest.raises(ConfigError, match=r"fusion \(mlp\) has no weight"):
            run_refresh(tmp_path / "store", catalog, **weighted)
    with pytest.raises(ConfigError, match=r"embed.fields has image.* has multimodal"):
        run_refresh(tmp_path / "s", catalog, encoder=encoder, embed={"fields": ["image"]})


def unit_rows(random, rows, dim):
    vectors = random.standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_vectors(store, ids, image, text):
    """Write one data file; a None vector is null."""
    columns = {
        "vector_id": ids,
        "generation": [1] * len(ids),
        "operation": ["upsert"] * len(ids),
        "image_embedding": [None if v is None else v.tolist() for v in image],
        "text_embedding": [None if v is None else v.tolist() for v in text],
    }
    arrays = {
        f.name: pa.array(columns[f.name], f.type)
        if f.name in columns
        else pa.nulls(len(ids), f.type)
        for f in EMBEDDINGS
    }
    store.embeddings()
    return write_data_file(store, pa.table(arrays, EMBEDDINGS), 1)


def multimodal(dim, **fusion):
    spec = FusionSpec(**fusion)
    return VectorField(name="multimodal", dim=spec.field_dim("multimodal", dim), fusion=spec)


def test_a_fused_field_is_computed_from_what_is_stored(tmp_path):
    store, random = Store(str(tmp_path)), np.random.default_rng(0)
    image, text = unit_rows(random, 3, 8), unit_rows(random, 3, 8)
    file = write_vectors(store, [3, 1, 2], [image[0], None, image[2]], [text[0], text[1], None])
    field = multimodal(8, image_weight=0.25)
    rows = make_live(*({"vector_id": v, "row": r} for r, v in enumerate([3, 1, 2])))
    ((ids, vectors),) = read_blocks(store, field, (0, [file.path]), rows)
    assert ids.tolist() == [1, 2, 3]
    expected = [text[1], image[2], fuse(image[:1], text[:1], 0.25)[0]]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    ((ids, vectors),) = read_blocks(store, field, (0, [file.path]), rows[1:2])
    assert ids.tolist() == [2]
    np.testing.assert_allclose(vectors, [image[2]], atol=1e-5)
    assert list(read_blocks(store, field, (0, [file.path]), rows[:0])) == []


def test_vectors_of_several_dimensions_are_damage(tmp_path):
    """Even if they average out."""
    store, random = Store(str(tmp_path)), np.random.default_rng(0)
    image = [unit_rows(random, 1, 3)[0], unit_rows(random, 1, 13)[0]]
    file = write_vectors(store, [1, 2], image, [None, None])
    field = VectorField(name="image", dim=8, fusion=FusionSpec())
    rows = make_live({"vector_id": 1, "row": 0}, {"vector_id": 2, "row": 1})
    with pytest.raises(StoreError, match="is damaged: vectors of different dimensions"):
        list(read_blocks(store, field, (0, [file.path]), rows))


def test_a_text_field_takes_the_first_rows_alone(tmp_path):
    store, text = Store(str(tmp_path)), unit_rows(np.random.default_rng(0), 2, 8)
    file = write_vectors(store, [1, 2], [None, None], list(text))
    rows = make_live({"vector_id": 1, "row": 0, "first": False}, {"vector_id": 2, "row": 1})
    field = VectorField(name="text", dim=8, fusion=FusionSpec())
    ((ids, _),) = read_blocks(store, field, (0, [file.path]), rows)
    assert ids.tolist() == [2]


def test_a_file_without_any_image(tmp_path):
    store, text = Store(str(tmp_path)), unit_rows(np.random.default_rng(1), 2, 8)
    file = write_vectors(store, [1, 2], [None, None], list(text))
    rows = make_live({"vector_id": 1, "row": 0}, {"vector_id": 2, "row": 1})
    ((_, vectors),) = read_blocks(store, multimodal(8), (0, [file.path]), rows)
    np.testing.assert_allclose(vectors, text, atol=1e-5)
    doubled = multimodal(8, kind="alpha_concat")
    for field in (doubled, VectorField(name="image", dim=8, fusion=FusionSpec())):
        with pytest.raises(StoreError, match=r"2 of 2 rows|found 0"):
            list(read_blocks(store, field, (0, [file.path]), rows))


@pytest.mark.usefixtures("local_ray")
def test_exact_search_goes_through_all_files(tmp_path):
    import ray

    store, random = Store(str(tmp_path)), np.random.default_rng(2)
    image, text = unit_rows(random, 6, 8), unit_rows(random, 6, 8)
    files = [
        write_vectors(store, ids, list(image[ids]), list(text[ids])).path
        for ids in ([0, 1, 2], [3, 4, 5])
    ]
    field = multimodal(8, image_weight=0.7)
    places = [{"vector_id": n, "file": n // 3, "row": n % 3} for n in range(6)]
    rows = LiveRows(
        files=[(0, files[:1]), (1, files[1:])],
        group_rows=[3, 3],
        file_rows=3,
        parts=[[ray.put(make_live(*places[:2])), ray.put(make_live(places[2]))],
               [ray.put(make_live(*places[3:]))]],
        vectors=6, products=6, rejected=0, most_images=1,
    )  # fmt: skip
    database = fuse(image, text, 0.7)
    scores, found = exact_search(store, field, rows, ray.put(database[:2]), 3)
    exact = database[:2] @ database.T
    assert found.tolist() == np.argsort(-exact, axis=1)[:, :3].tolist()
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :3], atol=1e-3)
