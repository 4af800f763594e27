"""The `sample` command: render a catalog of products, with labelled street pictures of them.

Owns the sample's files and its split into training, validation and held-out queries. Product i
is the same in every sample of one seed, however many products there are.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from jobs.outputs import RowWriter
from jobs.render import compose_shop, draw_cutout
from jobs.sample_products import (
    Row,
    SampleProduct,
    describe_product,
    shard_folder,
    word_query,
)
from jobs.street import draw_street

MAX_QUERIES = 500
MAX_VALIDATION = 200
MIN_IMAGE_PX = 32
VALIDATION_VIEW = 1_000_000
QUERY_VIEW = 1_000_001
_CHUNK_PRODUCTS = 50
_IN_PROCESS_BELOW = 200
_MARKER = "sample.json"
_FILES = ("catalog.parquet", "pairs-train.parquet", "pairs-val.parquet", "queries.parquet")
# Separate streams of random numbers under one seed; jobs/sample_products.py uses others.
_TEXTURE, _VIEW, _SPLIT = 2, 3, 5

CATALOG_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("product_id", "title", "description", "category")),
        *((name, pa.string()) for name in ("color", "pattern", "material")),
        ("price", pa.float64()),
        ("stock", pa.int64()),
        ("image_uri", pa.string()),
    ]
)
PAIRS_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            "query_id", "query_image_uri", "query_text",
            "product_id", "product_image_uri", "product_text",
        )
    ]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampleSummary:
    """Where a sample lies and how many rows each file holds."""

    catalog: Path
    pairs_train: Path
    pairs_val: Path
    queries: Path
    products: int
    train_pairs: int
    val_pairs: int
    query_count: int


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to render; picklable, so that every worker gets the whole of it."""

    dest: Path
    products: int
    seed: int
    street_per_product: int
    image_px: int
    validation: frozenset[int]
    queries: frozenset[int]

    def views(self, number: int) -> list[int]:
        """List the product's street views: training first, then the held-out ones."""
        held_out = [VALIDATION_VIEW] * (number in self.validation)
        held_out += [QUERY_VIEW] * (number in self.queries)
        return [*range(self.street_per_product), *held_out]


def _name_view(number: int, view: int) -> str:
    suffix = {VALIDATION_VIEW: "val", QUERY_VIEW: "query"}.get(view, str(view))
    return f"P{number:07d}-{suffix}"


def _pair_row(product: SampleProduct, seed: int, view: int) -> Row:
    name = _name_view(product.number, view)
    return {
        "query_id": name,
        "query_image_uri": f"images/street/{shard_folder(product.number)}/{name}.jpg",
        "query_text": word_query(product, seed, view),
        "product_id": product.row["product_id"],
        "product_image_uri": product.row["image_uri"],
        "product_text": f"{product.row['title']}. {product.row['description']}",
    }


def _save_jpeg(picture: Image.Image, path: Path, quality: int, *, clean: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Halved chroma would bleed colour into the white around a shop picture.
    picture.save(path, "JPEG", quality=quality, subsampling=0 if clean else 2)


def _render_chunk(plan: _Plan, numbers: range) -> range:
    """Write the shop and street pictures of some products; return their numbers."""
    for number in numbers:
        product = describe_product(number, plan.seed)
        texture = np.random.default_rng((plan.seed, _TEXTURE, number))
        cutout = draw_cutout(product.look, plan.image_px, texture)
        shop_path = plan.dest / str(product.row["image_uri"])
        _save_jpeg(compose_shop(cutout), shop_path, 90, clean=True)
        for view in plan.views(number):
            rng = np.random.default_rng((plan.seed, _VIEW, number, view))
            quality = int(rng.integers(40, 86))
            name = _name_view(number, view)
            path = plan.dest / "images" / "street" / shard_folder(number) / f"{name}.jpg"
            _save_jpeg(draw_street(cutout, rng), path, quality)
    return numbers


def _render(plan: _Plan) -> Iterator[range]:
    """Render every chunk, in order; on all cores where there is enough to do."""
    starts = range(1, plan.products + 1, _CHUNK_PRODUCTS)
    chunks = (range(s, min(s + _CHUNK_PRODUCTS, plan.products + 1)) for s in starts)
    if plan.products < _IN_PROCESS_BELOW:
        yield from (_render_chunk(plan, chunk) for chunk in chunks)
        return
    workers = os.cpu_count() or 1
    running: deque[Future[range]] = deque()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for chunk in chunks:
                running.append(pool.submit(_render_chunk, plan, chunk))
                if len(running) >= 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _prepare_dest(plan: _Plan) -> None:
    """Empty DEST of an earlier sample and mark it as a sample's folder.

    Raises:
        ValueError: DEST holds something that is no sample.
    """
    dest, marker = plan.dest, plan.dest / _MARKER
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{dest} is a file; name a new or empty folder")
    if dest.is_dir() and any(dest.iterdir()) and not marker.is_file():
        raise ValueError(f"{dest} is not empty and holds no sample; name a new or empty folder")
    for name in _FILES:
        (dest / name).unlink(missing_ok=True)
    for kind in ("shop", "street"):
        if (dest / "images" / kind).is_dir():
            shutil.rmtree(dest / "images" / kind)
    dest.mkdir(parents=True, exist_ok=True)
    fields = ("products", "seed", "street_per_product", "image_px")
    marker.write_text(json.dumps({f: getattr(plan, f) for f in fields}) + "\n", encoding="utf-8")


def _make_plan(
    dest: Path, products: int, seed: int, street_per_product: int, image_px: int
) -> _Plan:
    """Check the arguments and draw which products get a held-out view."""
    bounds = (
        ("products", products, 1),
        ("seed", seed, 0),
        ("street_per_product", street_per_product, 1),
        ("image_px", image_px, MIN_IMAGE_PX),
    )
    for name, value, least in bounds:
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    rng = np.random.default_rng((seed, _SPLIT))
    validation = rng.choice(products, min(MAX_VALIDATION, products), replace=False) + 1
    queries = rng.choice(products, min(MAX_QUERIES, products), replace=False) + 1
    return _Plan(
        dest=dest,
        products=products,
        seed=seed,
        street_per_product=street_per_product,
        image_px=image_px,
        validation=frozenset(validation.tolist()),
        queries=frozenset(queries.tolist()),
    )


def write_sample(
    dest: Path,
    *,
    products: int,
    seed: int,
    street_per_product: int = 2,
    image_px: int = 224,
    progress: Callable[[int], None] | None = None,
) -> SampleSummary:
    """Render a sample catalog with training pairs and labelled, held-out queries.

    The same arguments give the same bytes. Memory does not grow with `products`. An earlier
    sample in `dest` is replaced; its tables go first, so no table names a missing picture.

    Args:
        dest: Folder to fill: new, empty, or an earlier sample.
        products: How many products, at least 1.
        seed: Decides everything drawn, at least 0.
        street_per_product: Street views of each product for training, at least 1.
        image_px: Side of every picture in pixels, at least 32.
        progress: Called with the number of products rendered so far, after each chunk.

    Returns:
        The paths of the tables and their row counts.

    Raises:
        ValueError: An argument is out of range, or `dest` holds something that is no sample.
    """
    plan = _make_plan(dest, products, seed, street_per_product, image_px)
    _prepare_dest(plan)
    catalog_path, *pair_paths = (dest / name for name in _FILES)
    with (
        RowWriter(catalog_path, CATALOG_SCHEMA) as catalog,
        RowWriter(pair_paths[0], PAIRS_SCHEMA) as train,
        RowWriter(pair_paths[1], PAIRS_SCHEMA) as validation,
        RowWriter(pair_paths[2], PAIRS_SCHEMA) as queries,
    ):
        held_out = {VALIDATION_VIEW: validation, QUERY_VIEW: queries}
        for numbers in _render(plan):
            for number in numbers:
                product = describe_product(number, seed)
                catalog.add(product.row)
                for view in plan.views(number):
                    held_out.get(view, train).add(_pair_row(product, seed, view))
            if progress is not None:
                progress(numbers[-1])
    return SampleSummary(
        catalog=catalog_path,
        pairs_train=pair_paths[0],
        pairs_val=pair_paths[1],
        queries=pair_paths[2],
        products=catalog.rows,
        train_pairs=train.rows,
        val_pairs=validation.rows,
        query_count=queries.rows,
    )
