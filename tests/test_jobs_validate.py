"""Validation against plain NumPy, and mining of negatives, over tiny real encoders."""

import itertools
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from encoders.checkpoint import load_encoder, load_model, load_tokenizers, wrap_model
from encoders.checkpoint_files import read_checkpoint_config
from encoders.create import create_start
from encoders.fusion import FusionSpec
from encoders.spec import EncoderSpec
from jobs.errors import JobError
from jobs.images import ImagesConfig
from jobs.mining import MINE_FROM, mine_negatives
from jobs.pair_data import PairData
from jobs.validate import WEIGHTS, measure, validate


@pytest.fixture(scope="module")
def starts(tmp_path_factory, tiny_towers):
    folder = tmp_path_factory.mktemp("starts")
    spec = EncoderSpec(architecture=str(tiny_towers), pretrained="random")
    create_start(spec, folder / "mim", preset="mim4")
    for kind in ("mlp", "alpha_concat"):
        create_start(spec, folder / kind, preset="msr3", fusion=FusionSpec(kind=kind))
    return folder


@pytest.fixture(scope="module")
def rows(sample_catalog):
    return pq.read_table(sample_catalog / "pairs-val.parquet").to_pylist()


@pytest.fixture
def shop(tmp_path, sample_catalog):
    shutil.copytree(sample_catalog / "images", tmp_path / "images")
    return tmp_path


def open_pairs(folder, rows, start, preset="mim4"):
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    config = read_checkpoint_config(start)
    return PairData(
        str(folder / "pairs.parquet"), "train.validation", preset, config, ImagesConfig()
    )


def check(folder, rows, start, preset="mim4", *, encoder=None, most=1000):
    data = open_pairs(folder, rows, start, preset)
    encoder = encoder or load_encoder(start)
    return validate(encoder, load_tokenizers(start), data, max_queries=most)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def plain(queries, database, right, also=None):
    """Figures of single right answers, one by one."""
    ranks = []
    for row, (query, place) in enumerate(zip(queries, right, strict=True)):
        scores, known = database @ query, {place} | set(also[row] if also else ())
        ranks.append(1 + sum(s >= scores[place] for n, s in enumerate(scores) if n not in known))
    ranks = np.array(ranks)
    return {f"recall_at_{k}": (ranks <= k).mean() for k in (1, 5, 10)} | {"mrr": (1 / ranks).mean()}


def test_measure_is_the_plain_calculation():
    random = np.random.default_rng(0)
    database = unit(random.standard_normal((90, 16)))
    right = random.integers(0, 90, 700)
    queries = unit(database[right] + 0.3 * random.standard_normal((700, 16)))
    found, expected = measure(queries, database, right), plain(queries, database, right)
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.1 < found["recall_at_1"] < 0.99


def test_queries_without_a_vector_are_left_out_and_products_without_one_not_found():
    database = np.eye(4, dtype=np.float32)
    queries = np.eye(4, dtype=np.float32)
    queries[0] = np.nan
    database[1] = np.nan
    found = measure(queries, database, np.arange(4))
    assert found["recall_at_1"] == pytest.approx(2 / 3)
    assert measure(queries[:1], database, np.array([0]))["mrr"] == 0


def test_other_right_products_do_not_count_against_a_query():
    database = unit(np.array([[1, 0, 0], [0.9, 0.1, 0], [0.8, 0.2, 0], [0, 0, 1]]))
    queries = database[[0, 0, 0]]
    right, also = np.array([0, 1, 2]), [np.array([0, 1]), np.array([0, 1]), np.array([2])]
    assert measure(queries, database, right)["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    found = measure(queries, database, right, also)
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert found["recall_at_1"] == pytest.approx(2 / 3)


def test_words_are_right_by_any_pair(shop, rows, starts):
    alike = [row | {"query_text": "red"} for row in rows]
    found = check(shop, alike, starts / "mlp", "msr3")
    assert found.figures["text to multimodal"]["recall_at_1"] == 1


@pytest.mark.parametrize("rows", [33, 40, 257])
def test_a_collapsed_encoder_finds_nothing(rows):
    one = unit(np.random.default_rng(rows).standard_normal((1, 129)))
    found = measure(one.repeat(rows, axis=0), one.repeat(rows, axis=0), np.arange(rows))
    assert found == pytest.approx(
        {"recall_at_1": 0, "recall_at_5": 0, "recall_at_10": 0, "mrr": 1 / rows}, abs=1e-6
    )


def test_a_collapsed_model_finds_nothing(shop, rows, starts):
    model, config = load_model(starts / "mim")
    with torch.no_grad():
        model.visual.proj.zero_()
        model.visual.proj[:, 0] = 1
        model.text_projection.zero_()
        model.text_projection[:, 0] = 1
    model.visual.ln_post = torch.nn.Identity()
    found = check(shop, rows, starts / "mim", encoder=wrap_model(model, config, fingerprint="x"))
    figures = found.figures["image to image"]
    assert figures["recall_at_1"] <= 0.1


def test_fields_and_kinds_of_mim(shop, rows, starts):
    found = check(shop, rows, starts / "mim")
    kinds, fields = ("image", "text", "image + text"), ("image", "text", "multimodal")
    assert set(found.figures) == {f"{k} to {f}" for k, f in itertools.product(kinds, fields)}
    assert (found.queries, found.products, found.kind) == (40, 40, "image to image")
    figures = found.figures["image to image"]
    assert found.score == (figures["recall_at_1"], figures["mrr"])
    assert check(shop, rows, starts / "mim") == found
    some = check(shop, rows, starts / "mim", most=7)
    assert (some.queries, some.products) == (7, 40)


def test_fusion_weights_are_the_best_of_all_pairs(shop, rows, starts):
    found = check(shop, rows, starts / "mim")
    encoder, tokenizers = load_encoder(starts / "mim"), load_tokenizers(starts / "mim")
    data = open_pairs(shop, rows, starts / "mim")
    order = list(range(40))
    photos = encoder.encode_images(np.stack([data.picture("query", n) for n in order]))
    shots = encoder.encode_images(np.stack([data.picture("product", n) for n in order]))
    words = encoder.encode_texts(tokenizers.query(data.texts("query", order)))
    titles = encoder.encode_texts(tokenizers.product(data.texts("product", order)))
    texts = data.texts("query", order)
    alike = [[n for n in order if texts[n] == text] for text in texts]
    right, scores = order, {}
    for weight, share in itertools.product(WEIGHTS, WEIGHTS):
        database = unit(weight * shots + (1 - weight) * titles)
        both = unit(share * photos + (1 - share) * words)
        asked = ((photos, None), (words, alike), (both, None))
        scores[weight, share] = np.mean([plain(a, database, right, k)["mrr"] for a, k in asked])
    chosen = found.fusion.image_weight, found.fusion.query_image_weight
    assert scores[chosen] == pytest.approx(max(scores.values()), abs=1e-5)
    for kind, vectors, known in (("image", photos, None), ("text", words, alike)):
        expected = plain(vectors, shots, order, known)
        assert found.figures[f"{kind} to image"] == pytest.approx(expected, abs=1e-6)


def test_pairs_without_texts_leave_the_weights_alone(shop, rows, starts):
    bare = [{k: v for k, v in row.items() if not k.endswith("text")} for row in rows]
    found = check(shop, bare, starts / "mim", "image_only")
    assert set(found.figures) == {"image to image", "image to multimodal"}
    assert (found.fusion.image_weight, found.fusion.query_image_weight) == (0.5, 0.5)


def test_rows_without_words_or_pictures(shop, rows, starts):
    odd = [dict(row) for row in rows]
    for row in odd[:10]:
        row["query_text"] = None
    odd[11]["query_image_uri"] = odd[12]["product_image_uri"] = "gone.jpg"
    found = check(shop, odd, starts / "mim")
    assert (found.queries, found.products) == (38, 40)
    assert found.figures["text to text"]["recall_at_1"] * 28 == pytest.approx(
        round(found.figures["text to text"]["recall_at_1"] * 28), abs=1e-6
    )


def test_no_usable_pair_is_one_error(shop, rows, starts):
    with pytest.raises(JobError, match=r"train.validation: none .* 1 not_found \(such as not_fo"):
        check(shop, [r | {"query_image_uri": "gone.jpg"} for r in rows], starts / "mim")
    with pytest.raises(JobError, match="no words"):
        check(shop, [r | {"query_text": None} for r in rows], starts / "mlp", "msr3")


@pytest.mark.parametrize("kind", ["mlp", "alpha_concat"])
def test_msr_is_asked_in_words(shop, rows, starts, kind):
    odd = [dict(row) for row in rows]
    odd[0] |= {"product_text": None}
    odd[1] |= {"product_image_uri": None}
    odd[2] |= {"product_text": "", "product_image_uri": "gone.jpg"}  # can't be found
    found = check(shop, odd, starts / kind, "msr3")
    assert set(found.figures) == {"text to multimodal"}
    assert (found.kind, found.queries, found.products) == ("text to multimodal", 39, 40)
    assert found.fusion.kind == kind


def mine(data, start, *, wanted=3, seed=0):
    return mine_negatives(
        load_encoder(start),
        load_tokenizers(start),
        data,
        wanted=wanted,
        random=np.random.default_rng(seed),
    )


def test_mined_products_are_wrong_near_and_seeded(shop, rows, starts):
    words = [row | {"query_text": f"words {n // 2}"} for n, row in enumerate(rows)]
    words[1] |= {name: rows[0][name] for name in ("product_id", "product_text")}
    data = open_pairs(shop, words, starts / "mlp", "msr3")
    found = mine(data, starts / "mlp")
    assert found.shape == (40, 3)
    encoder, tokenizers = load_encoder(starts / "mlp"), load_tokenizers(starts / "mlp")
    queries = encoder.encode_queries(
        None, tokenizers.query(data.texts("query", range(40))), image_weight=0
    )
    pixels, there = data.pictures("product", range(40))
    tokens = tokenizers.product(data.texts("product", range(40)))
    stored = encoder.encode_products(pixels, tokens, there, np.ones(40, bool))["multimodal"]
    for row in range(40):
        right = set(data.product_ids[[row // 2 * 2, row // 2 * 2 + 1]].tolist())
        drawn = data.product_ids[found[row]].tolist()
        assert not right & set(drawn)
        assert len(set(drawn)) == 3
        order = np.argsort(-(stored @ queries[row]))
        wrong = [one for one in data.product_ids[order].tolist() if one not in right]
        nearest = list(dict.fromkeys(wrong))[: MINE_FROM + 2]
        assert set(drawn) <= set(nearest)
    assert (found == mine(data, starts / "mlp")).all()
    assert (found != mine(data, starts / "mlp", seed=1)).any()


def test_mining_where_every_product_is_right(shop, rows, starts):
    alike = [row | {"query_text": "red"} for row in rows[:5]]
    data = open_pairs(shop, alike, starts / "alpha_concat", "msr3")
    found = mine(data, starts / "alpha_concat")
    assert (found == np.arange(5)[:, None]).all()


def test_mining_of_more_than_there_are(shop, rows, starts):
    data = open_pairs(shop, rows[:3], starts / "mlp", "msr3")
    found = mine(data, starts / "mlp", wanted=30)
    assert all(row not in found[row] for row in range(3))
