"""Byte-identical images: embedded once by all actors together, right whatever happens to them."""

import asyncio
import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from ray.data import ActorPoolStrategy, DataContext

from encoders.checkpoint import load_encoder, load_tokenizers
from encoders.fusion import FusionSpec
from jobs.catalog import read_catalog
from jobs.config import CatalogConfig, EmbedConfig, JobConfig
from jobs.diff import make_todo
from jobs.duplicates import BatchImages, ImageVectors, SharedVectors, image_vectors
from jobs.embed_images import load_pixels
from jobs.embed_steps import Embedder, EmbedTask, prepare_rows
from jobs.embed_write import PieceEmbedder, write_rows
from jobs.images import ImagesConfig
from jobs.inputs import add_encoder
from jobs.items import scan_unit
from jobs.schemas import REJECT, hash63
from jobs.state import STATE_DTYPE
from jobs.store import Store

SHARED, SINGLE, COPIES, BROKEN = 3, 40, 20, 5
DISTINCT, DIM, BATCH, PIECE = SHARED + SINGLE, 32, 8, 16


def draw_picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """105 products in no order: 60 share 3 pictures, each under its own URI; 5 a broken one."""
    folder = tmp_path_factory.mktemp("products")
    pictures = [draw_picture(n) for n in range(DISTINCT)]
    shared = [pictures[n % SHARED] for n in range(SHARED * COPIES)]
    every = [*pictures[SHARED:], *shared, *[b"no picture"] * BROKEN]
    rows = []
    for number in np.random.default_rng(1).permutation(len(every)).tolist():
        uri = folder / f"{number}.png"
        uri.write_bytes(every[number])
        title = f"number {number}" if number % 7 else ""
        rows.append({"product_id": f"p{number}", "title": title, "image_uri": str(uri)})
    pq.write_table(pa.Table.from_pylist(rows), folder / "catalog.parquet")
    return folder / "catalog.parquet", rows


@pytest.fixture(scope="module")
def task(products, tiny_towers, tmp_path_factory):
    """What to embed with, into a store of the module's own."""
    config = JobConfig.model_validate(
        {
            "store": str(tmp_path_factory.mktemp("store")),
            "catalog": {"path": str(products[0])},
            "encoder": {"architecture": str(tiny_towers), "pretrained": "random"},
            "embed": {"fields": ["image", "multimodal"], "batch_size": BATCH},
        }
    )
    store = Store(config.store)
    store.embeddings()  # makes the table
    space, _ = add_encoder(config, store)
    catalog = read_catalog(CatalogConfig(path=str(products[0])), need_images=True, need_text=True)
    return EmbedTask(
        catalog=catalog,
        images=ImagesConfig(),
        embed=config.embed,
        store=store,
        space=space,
        generation=1,
    )


@pytest.fixture(scope="module")
def expected(products, task):
    """The vectors of each product's own image and text, embedded by themselves."""
    directory = task.store.local_copy(None, "checkpoints", task.space.encoder)
    encoder, tokenize = load_encoder(directory), load_tokenizers(directory).product
    found = {}
    for row in products[1]:
        data = Path(row["image_uri"]).read_bytes()
        if data != b"no picture":
            pixels = load_pixels(data, task.images, encoder.preprocess)
            image = encoder.encode_images(pixels[None])[0]
            text = encoder.encode_texts(tokenize([row["title"]]))[0] if row["title"] else None
            found[row["product_id"]] = (image, text, hash63((data,)))
    return found


@pytest.fixture(scope="module")
def quiet_data(local_ray):
    """Ray, whose Data says nothing of what it does."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False


def plan_all(task):
    plan = scan_unit(task.catalog, 0, task.space.recipe, task.images)
    everything = np.ones(len(plan), bool)
    todo = make_todo(plan, np.zeros(len(plan), STATE_DTYPE), everything, ~everything)
    return np.sort(todo, order=["unit", "vector_id"])


def embed_all(task, after_first=lambda: None):
    """Embed the whole catalog as `jobs.embed` does, by two actors; return rows and files."""
    todo = [ray.put(plan_all(task))]
    count = task.catalog.rows
    work = [{"group": 0, "start": n, "stop": min(n + PIECE, count)} for n in range(0, count, PIECE)]
    dataset = ray.data.from_items(work, override_num_blocks=len(work)).map_batches(
        PieceEmbedder,
        batch_size=1,
        compute=ActorPoolStrategy(size=2),
        fn_constructor_args=(task, 1, todo),
        num_cpus=0.75,
    )
    files = []
    for file in dataset.iter_rows():
        files.append(file)
        if len(files) == 1:
            after_first()
    return read_rows(task, files), files


def embed_here(task):
    """Embed the whole catalog in this process; return rows and files."""
    todo = [ray.put(plan_all(task))]
    work = {"group": [0], "start": [0], "stop": [task.catalog.rows]}
    embedder = Embedder(task, 1, on_gpu=False)
    files = []
    for batch in prepare_rows(work, task=task, todo=todo):
        files += write_rows(embedder.embed(batch), task=task).to_pylist()
    return read_rows(task, files), files


def read_rows(task, files):
    tables = [pq.read_table(task.store.uri("embeddings", file["path"])) for file in files]
    rows = pa.concat_tables(tables).to_pylist()
    return {row["product_id"]: row for row in rows}


def count(files):
    return [sum(file[name] for file in files) for name in ("images_embedded", "images_reused")]


def check_rows(rows, expected):
    """Rows are right and equal images have equal vectors; broken ones are rejects."""
    assert len(rows) == len(expected) + BROKEN
    vectors = {}
    for name, row in rows.items():
        if name not in expected:
            assert (row["operation"], row["reject_reason"]) == (REJECT, "not_an_image")
            assert row["image_content"] == hash63((b"no picture",))
            continue
        image, text, content = expected[name]
        assert row["image_content"] == content
        np.testing.assert_allclose(row["image_embedding"], image, atol=1e-3)  # stored as float16
        vectors.setdefault(content, set()).add(tuple(row["image_embedding"]))
        assert (row["text_embedding"] is None) == (text is None)
        if text is not None:
            np.testing.assert_allclose(row["text_embedding"], text, atol=1e-3)
    return vectors


@pytest.mark.usefixtures("quiet_data")
def test_equal_images_are_embedded_once_by_all_actors_together(task, expected):
    with image_vectors(1000, DIM) as actor:
        rows, files = embed_all(replace(task, image_vectors=actor))
    assert count(files) == [DISTINCT, SHARED * COPIES - SHARED]
    assert sum(file["rejected"] for file in files) == BROKEN
    vectors = check_rows(rows, expected)
    assert len(vectors) == DISTINCT
    assert all(len(of_one) == 1 for of_one in vectors.values())


@pytest.mark.usefixtures("quiet_data")
def test_images_that_were_forgotten_are_embedded_again(task, expected):
    with image_vectors(2, DIM) as actor:
        rows, files = embed_all(replace(task, image_vectors=actor))
    check_rows(rows, expected)
    embedded, reused = count(files)
    assert embedded >= DISTINCT
    assert embedded + reused == SHARED * COPIES + SINGLE
    with image_vectors(0, DIM) as actor:
        assert actor is None
        rows, files = embed_here(task)
    check_rows(rows, expected)
    assert DISTINCT < count(files)[0] < SHARED * COPIES + SINGLE  # equal ones of a batch: once


@pytest.mark.usefixtures("quiet_data")
@pytest.mark.parametrize("for_good", [False, True])
def test_a_run_goes_on_without_its_vectors(task, expected, for_good):
    with image_vectors(1000, DIM) as actor:
        rows, files = embed_all(
            replace(task, image_vectors=actor),
            after_first=lambda: ray.kill(actor, no_restart=for_good),
        )
    check_rows(rows, expected)
    assert sum(count(files)) == SHARED * COPIES + SINGLE


@pytest.mark.usefixtures("quiet_data")
def test_a_batch_that_died_with_its_claim_blocks_nobody(task, expected):
    shared = np.array([hash63((draw_picture(n),)) for n in range(SHARED)])
    with image_vectors(1000, DIM, claim_s=1.0) as actor:
        assert ray.get(actor.claim.remote(shared, 1)).mine.all()
        rows, files = embed_here(replace(task, image_vectors=actor))
    check_rows(rows, expected)
    assert DISTINCT <= count(files)[0] < SHARED * COPIES + SINGLE


@pytest.mark.usefixtures("quiet_data")
def test_an_image_without_a_vector_rejects_all_its_products(task):
    todo, work = [ray.put(plan_all(task))], {"group": [0], "start": [0], "stop": [40]}
    with image_vectors(1000, DIM) as actor:
        shared = replace(task, image_vectors=actor)
        embedder = Embedder(shared, 1, on_gpu=False)
        with torch.no_grad():
            for weights in embedder.encoder._model.visual.parameters():
                weights.fill_(float("nan"))
        batches = [embedder.embed(batch) for batch in prepare_rows(work, task=shared, todo=todo)]
    images = sum(int((b["images_embedded"] + b["images_reused"]).sum()) for b in batches)
    contents = {c for b in batches for c in b["image_content"][b["reject_reason"] == "bad_vector"]}
    assert all(batch["rejected"].all() for batch in batches)
    assert len(contents) == sum(int(b["images_embedded"].sum()) for b in batches) < images


def test_only_vectors_of_the_image_alone_are_shared(task):
    assert task.shares_images
    for kind in ("concat", "alpha_concat", "mlp"):
        fused = replace(task.space, fusion=FusionSpec(kind=kind), fields=("multimodal",))
        assert not replace(task, space=fused).shares_images
    words = replace(task.space, fields=("text",))
    assert not replace(task, space=words).shares_images


def vector(value):
    return np.full((1, 2), value, np.float16)


ONE, TWO = np.array([1]), np.array([2])


def test_claims_and_memory_of_the_actor():
    async def scenario():
        kept = ImageVectors(1, 2, claim_s=0.2)
        assert (await kept.claim(ONE, 7)).mine.all()
        other = await kept.claim(ONE, 8)
        assert not other.mine.any()
        assert not other.known.any()
        assert (await kept.claim(ONE, 7)).mine.all()  # the same batch, run again
        waiting = asyncio.create_task(kept.wait(np.array([1, 3])))
        await asyncio.sleep(0)
        await kept.publish(ONE, vector(0.5))
        await kept.publish(TWO, vector(0.25))  # the first is forgotten
        found = await waiting
        assert found.known.tolist() == [True, False]  # nobody embeds the third
        assert found.vectors[0].tolist() == [0.5, 0.5]
        assert (await kept.lookup(np.array([1, 2]))).known.tolist() == [False, True]
        assert (await kept.claim(ONE, 7)).mine.all()
        assert not (await kept.wait(ONE)).known.any()  # its time is over
        assert (await kept.claim(ONE, 8)).mine.all()

    asyncio.run(scenario())


def test_without_an_actor_equal_images_of_a_batch_are_embedded_once():
    seen = []

    def encode(places):
        seen.append(places.tolist())
        return np.stack([np.full(2, place, np.float32) for place in places])

    contents = np.array([5, 9, 5, 7, 9])
    known = np.array([False, False, False, False, True])
    riding = np.full((5, 2), np.nan, np.float16)
    riding[4] = 0.5
    images = BatchImages(SharedVectors(None, 2), contents, (known, riding), encode)
    images.embed_claimed(1)
    images.await_others()
    assert seen == [[0, 3]]
    assert images.embedded.tolist() == [True, False, False, True, False]
    assert images.vectors[:, 0].tolist() == [0, 0.5, 0, 3, 0.5]
    nothing = BatchImages(SharedVectors(None, 2), contents[:0], (known[:0], riding[:0]), encode)
    nothing.embed_claimed(1)
    nothing.await_others()
    assert nothing.vectors.shape == (0, 2)


def test_the_default_keeps_vectors():
    assert EmbedConfig().duplicate_cache_rows == 100_000
