"""Pairs, their pictures and the batches, over real files."""

import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from encoders.checkpoint import load_tokenizers
from encoders.checkpoint_files import read_checkpoint_config
from encoders.create import create_checkpoint, create_start
from encoders.fusion import FusionSpec
from encoders.spec import EncoderSpec
from jobs.batches import Batches
from jobs.config import TrainConfig
from jobs.errors import CatalogError, JobError
from jobs.images import ImagesConfig
from jobs.pair_data import PairData

SIDE = 96


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    create_checkpoint(EncoderSpec(architecture="vitrine-tiny", pretrained="random"), folder)
    return read_checkpoint_config(folder), load_tokenizers(folder)


@pytest.fixture(scope="module")
def msr_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("msr")
    spec = EncoderSpec(architecture="vitrine-tiny", pretrained="random")
    create_start(spec, folder, preset="msr3", fusion=FusionSpec(kind="concat"))
    return read_checkpoint_config(folder), load_tokenizers(folder)


@pytest.fixture
def shop(tmp_path, sample_catalog):
    """A sample's folder to change, and its training pairs as rows."""
    shutil.copytree(sample_catalog, tmp_path / "shop")
    return tmp_path / "shop", pq.read_table(sample_catalog / "pairs-train.parquet").to_pylist()


def open_pairs(folder, rows, encoder, preset="mim4", **options):
    path = folder / "pairs.parquet"
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, path)
    return PairData(str(path), "train.pairs", preset, encoder[0], ImagesConfig(), **options)


def make_batches(data, encoder, rank=0, ranks=1, **config):
    values = {"pairs": "p", "preset": data.preset, "batch_size": 8, "augment": False} | config
    return Batches(data, encoder[1], TrainConfig(**values), rank=rank, ranks=ranks)


def names_of(batch):
    return batch.labels["product_ids"].tolist()


def same(one, two):
    return (
        one.inputs.keys() == two.inputs.keys()
        and all((one.inputs[name] == two.inputs[name]).all() for name in one.inputs)
        and all((one.labels[name] == two.labels[name]).all() for name in one.labels)
    )


def test_batch_is_a_function_of_seed_and_step(shop, encoder):
    data = open_pairs(*shop, encoder)
    one, two = make_batches(data, encoder, augment=True), make_batches(data, encoder, augment=True)
    two.load(9)
    two.load(1)
    assert same(one.load(3), two.load(3))
    other = make_batches(data, encoder, seed=1, augment=True).load(3)
    assert names_of(other) != names_of(one.load(3))
    plain = make_batches(data, encoder).load(3)
    assert names_of(plain) == names_of(one.load(3))
    assert (plain.inputs["product_pixels"] == one.load(3).inputs["product_pixels"]).all()
    assert (plain.inputs["query_pixels"] != one.load(3).inputs["query_pixels"]).any()
    assert plain.inputs["query_pixels"].shape == (8, SIDE, SIDE, 3)


def test_each_pass_covers_all_pairs_but_the_remainder(shop, encoder):
    data = open_pairs(*shop, encoder)
    batches = make_batches(data, encoder, batch_size=12)
    passes = [
        [name for step in steps for name in names_of(batches.load(step))]
        for steps in (range(1, 4), range(4, 7))
    ]
    for seen in passes:
        assert len(set(seen)) == len(seen) == 36  # of 40
    assert passes[0] != passes[1]


@pytest.mark.parametrize("augment", [False, True])
def test_shares_of_ranks_together_are_the_batch(shop, encoder, augment):
    data = open_pairs(*shop, encoder)
    whole = make_batches(data, encoder, augment=augment).load(4)
    shares = [make_batches(data, encoder, rank, 2, augment=augment).load(4) for rank in range(2)]
    for part in ("inputs", "labels"):
        for name, tensor in getattr(whole, part).items():
            joined = np.concatenate([getattr(share, part)[name].numpy() for share in shares])
            assert (tensor.numpy() == joined).all(), name


def test_unusable_pictures_are_passed_over_and_counted(shop, encoder):
    folder, rows = shop
    (folder / "page.jpg").write_bytes(b"<html>")
    rows[0]["query_image_uri"] = "nowhere.jpg"
    rows[1]["query_image_uri"] = rows[2]["product_image_uri"] = "page.jpg"
    rows[3]["product_image_uri"] = None
    data = open_pairs(folder, rows, encoder)
    batches = make_batches(data, encoder)
    seen = {name for step in range(1, 6) for name in names_of(batches.load(step))}
    assert seen == set(data.product_ids[4:].tolist())
    assert data.count_bad() == {"not_found": 1, "not_an_image": 1, "missing_image": 1}
    assert data.load(0) is None
    assert "not_found" in data.explain_bad()


def test_all_pictures_unusable_is_one_error(shop, encoder):
    folder, rows = shop
    data = open_pairs(folder, [row | {"query_image_uri": "gone.jpg"} for row in rows], encoder)
    with pytest.raises(JobError, match=r"40 pairs .*: 1 not_found \(such as"):
        make_batches(data, encoder).load(1)


def test_msr_without_words_is_one_error(shop, msr_encoder):
    folder, rows = shop
    data = open_pairs(folder, [r | {"query_text": " "} for r in rows], msr_encoder, "msr3")
    with pytest.raises(JobError, match="no words"):
        make_batches(data, msr_encoder).load(1)


def jpeg(folder, row, role):
    return (folder / row[f"{role}_image_uri"]).read_bytes()


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_pictures_in_the_table_are_the_files(shop, encoder, form):
    folder, rows = shop
    expected = make_batches(open_pairs(folder, rows, encoder), encoder).load(1)
    inside = []
    for row in rows:
        kept = {name: value for name, value in row.items() if not name.endswith("uri")}
        for role in ("query", "product"):
            forms = {
                "bytes": jpeg(folder, row, role),
                "struct": {"bytes": jpeg(folder, row, role), "path": "elsewhere.jpg"},
                "path": {"bytes": None, "path": row[f"{role}_image_uri"]},
            }
            kept[f"{role}_image"] = forms[form]
        inside.append(kept)
    assert same(expected, make_batches(open_pairs(folder, inside, encoder), encoder).load(1))


def test_null_texts_are_said(shop, encoder):
    folder, rows = shop
    for place, row in enumerate(rows):
        row["query_text"] = None if place % 2 else "red"
        row["product_text"] = " " if place % 3 else "red vase"
    batch = make_batches(open_pairs(folder, rows, encoder), encoder, batch_size=40).load(1)
    assert int(batch.labels["has_query_text"].sum()) == 20
    assert int(batch.labels["has_product_text"].sum()) == 14
    absent = open_pairs(folder, pa.Table.from_pylist(rows).drop(["query_text"]), encoder, "mim3")
    assert not make_batches(absent, encoder).load(1).labels["has_query_text"].any()


def test_cache_keeps_to_its_bound(shop, encoder):
    bound = 10 * SIDE * SIDE * 3
    small = open_pairs(*shop, encoder, cache_bytes=bound)
    large = open_pairs(*shop, encoder)
    batches = [make_batches(data, encoder) for data in (small, large)]
    for step in range(1, 6):
        assert same(batches[0].load(step), batches[1].load(step))
    kept = sum(picture.nbytes for picture in small._cache.values())
    assert kept == small._cached_bytes == bound
    assert len(large._cache) == 80


def test_msr_batch_masks_what_is_missing_and_carries_negatives(shop, msr_encoder):
    folder, rows = shop
    (folder / "page.jpg").write_bytes(b"<html>")
    for row in rows[:4]:
        row["product_image_uri"] = "page.jpg"
    for row in rows[4:8]:
        row["product_text"] = None
    rows[8] |= {"product_text": "", "product_image_uri": None}
    data = open_pairs(folder, rows, msr_encoder, "msr3")
    batches = make_batches(data, msr_encoder, batch_size=4)
    batches.negatives = np.tile(np.array([0, 5, 20]), (40, 1))
    places = {one: row for row, one in enumerate(data.product_ids.tolist())}
    images = texts = 0
    for step in range(1, 11):
        batch = batches.load(step)
        has_image = batch.inputs["has_product_image"].numpy()
        has_text = batch.inputs["has_product_text"].numpy()
        assert (has_image | has_text).all()
        seen = np.array([places[one] for one in names_of(batch)])
        assert not has_image[:4][seen < 4].any()
        assert not has_text[:4][(seen >= 4) & (seen < 8)].any()
        assert 8 not in seen
        assert has_image[4:].reshape(4, 3).tolist() == [[False, True, True]] * 4
        assert has_text[4:].reshape(4, 3).tolist() == [[True, False, True]] * 4
        assert not batch.inputs["product_pixels"][4].any()
        wrong = data.product_ids[[0, 5, 20]].tolist()
        assert batch.labels["negative_ids"].tolist() == wrong * 4
        images, texts = images + has_image[:4].sum(), texts + has_text[:4].sum()
    assert images < 36  # dropped by chance
    assert texts < 36


@pytest.mark.parametrize(
    ("change", "preset", "words"),
    [
        ({"query_image_uri": ...}, "image_only", "no column query_image_uri: image_only"),
        ({"product_text": ..., "query_text": ...}, "mim4", "product_text, query_text: mim4"),
        ({"query_text": ...}, "msr3", "no column query_text: msr3"),
        ({"product_id": ...}, "mim3", "no column product_id"),
        ({"product_id": None}, "mim3", "40 rows have no product_id"),
        ({"query_text": 5}, "mim4", "column query_text is int64, expected string"),
        ({"query_image_uri": ["a"]}, "mim3", "query_image_uri is list<.*>, expected string"),
    ],
)
def test_tables_that_cannot_be_used(shop, encoder, change, preset, words):
    folder, rows = shop
    changed = [
        {name: change.get(name, value) for name, value in row.items() if change.get(name) != ...}
        for row in rows
    ]
    with pytest.raises(CatalogError, match=words):
        open_pairs(folder, changed, encoder, preset)


def test_texts_that_are_no_utf8(shop, encoder):
    folder, rows = shop
    offsets = pa.py_buffer(np.arange(len(rows) + 1, dtype=np.int32))
    bad = pa.Array.from_buffers(
        pa.string(), len(rows), [None, offsets, pa.py_buffer(b"\xff" * len(rows))]
    )
    table = pa.Table.from_pylist(rows)
    table = table.set_column(table.schema.get_field_index("query_text"), "query_text", bad)
    with pytest.raises(CatalogError, match="UTF8"):
        open_pairs(folder, table, encoder)


def test_ids_may_be_numbers(shop, encoder):
    folder, rows = shop
    data = open_pairs(folder, [r | {"product_id": n // 2} for n, r in enumerate(rows)], encoder)
    assert len(data.products().ids) == 20
    assert data.names[:3] == ["0", "0", "1"]


def test_batches_that_cannot_be_made(shop, encoder):
    data = open_pairs(*shop, encoder)
    with pytest.raises(JobError, match=r"40 pairs, fewer than train\.batch_size 41"):
        make_batches(data, encoder, batch_size=41)
    with pytest.raises(JobError, match=r"8 does not divide by 3 workers x train\.accumulate 2"):
        make_batches(data, encoder, ranks=3, accumulate=2)


def test_bytes_that_are_no_picture(shop, encoder):
    folder, _ = shop
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    table = pa.table(
        {
            "product_id": ["a", "b"],
            "query_image": [buffer.getvalue(), b"\x00"],
            "product_image": [buffer.getvalue()] * 2,
        }
    )
    data = open_pairs(folder, table, encoder, "image_only")
    assert data.load(0).picture.shape == (SIDE, SIDE, 3)
    assert data.load(1) is None
    assert data.count_bad() == {"not_an_image": 1}
