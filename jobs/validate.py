"""Measures an encoder on validation pairs while it trains, and chooses its fusion weights.

Letters: Q queries, P products, D dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from encoders.checkpoint import Tokenizers
from encoders.encoder import Encoder
from encoders.fusion import FusionSpec, fuse, fuse_products, fuse_stored
from jobs.errors import JobError
from jobs.pair_data import PairData

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

RECALL_KS = (1, 5, 10)
WEIGHTS = tuple(round(0.1 * step, 1) for step in range(11))
ENCODE_ROWS = 64
RANK_ROWS = 256
SAME_SCORE = 1e-6  # equal vectors differ by so little, in float32, by their place in a block


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What the validation pairs showed.

    Attributes:
        score: What the best checkpoint is kept by: recall@1 of `kind`, MRR where equal.
        kind: The queries and field that `score` is of.
        figures: By kind, such as "image to multimodal": recall_at_k and mrr.
        fusion: The encoder's fusion with the weights that served these pairs best.
    """

    score: tuple[float, float]
    kind: str
    figures: dict[str, dict[str, float]]
    fusion: FusionSpec
    queries: int
    products: int


def validate(
    encoder: Encoder, tokenizers: Tokenizers, data: PairData, *, max_queries: int
) -> Validation:
    """Search the pairs' products by their queries, exactly.

    The best of MIM encoders is kept by the photo against product images, of MSR encoders by the
    words against the fused product.

    Args:
        encoder: The encoder as it is now.
        tokenizers: Its tokenizers.
        data: Validation pairs.
        max_queries: Most pairs to ask; evenly taken where there are more.

    Raises:
        JobError: No pair can be used.
    """
    rows = _spread(len(data), max_queries)
    products = data.products()
    right = np.searchsorted(products.ids, data.product_ids[rows])
    stored = encode_products(encoder, tokenizers, data, products.rows)
    queries = encode_queries(encoder, tokenizers, data, rows)
    usable = _usable(queries.get("text" if data.is_msr else "image"), stored, right)
    if not usable.any():
        raise JobError(f"train.validation: none of its pairs can be used: {data.explain_bad()}")
    queries = _present(queries, usable)
    answers = _find_answers(data, np.array(rows)[usable], products.ids)
    fusion = _choose_fusion(encoder.fusion, queries, stored, answers)
    databases = _databases(fusion, stored)
    asked = dict(queries)
    if {"image", "text"} <= set(queries):
        asked["image + text"] = fuse(queries["image"], queries["text"], fusion.query_image_weight)
    figures = {
        f"{kind} to {field}": answers.measure(kind, vectors, database)
        for field, database in databases.items()
        for kind, vectors in asked.items()
    }
    kind = "text to multimodal" if data.is_msr else "image to image"
    return Validation(
        score=(figures[kind]["recall_at_1"], figures[kind]["mrr"]),
        kind=kind,
        figures=figures,
        fusion=fusion,
        queries=int(usable.sum()),
        products=len(products.ids),
    )


def _usable(
    asked: Float32Array | None, stored: dict[str, Float32Array], right: Int64Array
) -> BoolArray:
    """Say which queries have what a preset asks with, and a right product that can be found."""
    if asked is None:
        return np.zeros(len(right), bool)
    found = stored["image"] if "image" in stored else stored["multimodal"]
    usable: BoolArray = ~np.isnan(asked[:, 0]) & ~np.isnan(found[right, 0])
    return usable


def _present(queries: dict[str, Float32Array], usable: BoolArray) -> dict[str, Float32Array]:
    """Keep the usable queries; a kind that none of them has goes."""
    kept = {kind: rows[usable] for kind, rows in queries.items()}
    return {kind: rows for kind, rows in kept.items() if not np.isnan(rows).all()}


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """Which products are right.

    Attributes:
        right: (Q,) int64, the product of each query's own pair.
        by_words: Q times: all products that some pair says are right for the same words.
    """

    right: Int64Array
    by_words: list[Int64Array]

    def measure(self, kind: str, queries: Float32Array, database: Float32Array) -> dict[str, float]:
        """Measure queries of a kind: "text" is right by any pair, a photo by its own alone."""
        return measure(queries, database, self.right, self.by_words if kind == "text" else None)


def _find_answers(data: PairData, rows: Int64Array, product_ids: Int64Array) -> _Answers:
    asked = data.query_ids[rows].tolist()
    return _Answers(
        right=np.searchsorted(product_ids, data.product_ids[rows]),
        by_words=[np.searchsorted(product_ids, data.answers[query]) for query in asked],
    )


def measure(
    queries: Float32Array,
    database: Float32Array,
    right: Int64Array,
    also_right: Sequence[Int64Array] | None = None,
) -> dict[str, float]:
    """Return recall_at_k and mrr of queries that each look for one right product.

    Equal scores count against the query: an encoder that has collapsed finds nothing. Other right
    products do not: the rank is that among the wrong ones.

    Args:
        queries: (Q, D) float32; a NaN row is left out.
        database: (P, D) float32; a NaN row is never found.
        right: (Q,) int64, the row of `database` that is looked for.
        also_right: Q times: rows of `database` that are right too.
    """
    there = np.flatnonzero(~np.isnan(queries[:, 0]))
    if not len(there):
        return {f"recall_at_{k}": 0.0 for k in RECALL_KS} | {"mrr": 0.0}
    blocks = []
    for start in range(0, len(there), RANK_ROWS):
        part = there[start : start + RANK_ROWS]
        others = [] if also_right is None else [also_right[row] for row in part]
        blocks.append(rank_right(queries[part], database, right[part], others))
    ranks = np.concatenate(blocks)
    found = {f"recall_at_{k}": float((ranks <= k).mean()) for k in RECALL_KS}
    return found | {"mrr": float((1 / ranks).mean())}


def rank_right(
    queries: Float32Array,
    database: Float32Array,
    right: Int64Array,
    also_right: Sequence[Int64Array] = (),
) -> Float32Array:
    """Return the rank of each query's right row, from 1; equal scores count against it.

    Args:
        queries: (Q, D) float32 unit rows.
        database: (P, D) float32 unit rows; a NaN row is last.
        right: (Q,) int64, the row of `database` that is right.
        also_right: Q times: further right rows, which count for nothing.

    Returns:
        (Q,) float32.
    """
    scores = np.nan_to_num(queries @ database.T, nan=-2.0)
    rows = np.arange(len(queries))
    ahead = scores >= scores[rows, right][:, None] - SAME_SCORE
    for row, others in enumerate(also_right):
        ahead[row, others] = False
    ahead[rows, right] = True
    ranks: Float32Array = ahead.sum(axis=1).astype(np.float32)
    return ranks


def encode_products(
    encoder: Encoder, tokenizers: Tokenizers, data: PairData, rows: Int64Array
) -> dict[str, Float32Array]:
    """Encode the products at some rows of the pairs: what a refresh would store of them."""
    parts: list[dict[str, Float32Array]] = []
    for start in range(0, len(rows), ENCODE_ROWS):
        some = rows[start : start + ENCODE_ROWS]
        pixels, has_image = data.pictures("product", some)
        texts = data.texts("product", some)
        has_text = np.array([bool(text) for text in texts])
        parts.append(
            encoder.encode_products(pixels, tokenizers.product(texts), has_image, has_text)
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def encode_queries(
    encoder: Encoder, tokenizers: Tokenizers, data: PairData, rows: Sequence[int]
) -> dict[str, Float32Array]:
    """Encode photos and words of rows apart, (Q, D) each.

    A row without a usable photo, or without words, is NaN; a kind that no row has is left out.
    """
    found: dict[str, list[Float32Array]] = {}
    for start in range(0, len(rows), ENCODE_ROWS):
        some = rows[start : start + ENCODE_ROWS]
        if not data.is_msr:
            pixels, there = data.pictures("query", some)
            vectors = encoder.encode_queries(pixels, None, image_weight=1.0)
            vectors[~there] = np.nan
            found.setdefault("image", []).append(vectors)
        texts = data.texts("query", some)
        words = encoder.encode_queries(None, tokenizers.query(texts), image_weight=0.0)
        words[[not text for text in texts]] = np.nan
        found.setdefault("text", []).append(words)
    joined = {kind: np.concatenate(parts) for kind, parts in found.items()}
    return {kind: rows for kind, rows in joined.items() if not np.isnan(rows).all()}


def _databases(fusion: FusionSpec, stored: dict[str, Float32Array]) -> dict[str, Float32Array]:
    """Return the vectors of every field that the encoder has."""
    found = {name: stored[name] for name in fusion.fields if name in stored}
    found["multimodal"] = fuse_stored(fusion, stored)
    return {name: rows for name, rows in found.items() if not np.isnan(rows).all()}


def _choose_fusion(
    fusion: FusionSpec,
    queries: dict[str, Float32Array],
    stored: dict[str, Float32Array],
    answers: _Answers,
) -> FusionSpec:
    """Try every pair of weights; keep those of the highest MRR, averaged over kinds of query.

    Of equal ones, those nearest to the weights that the encoder has: pairs without product texts
    say nothing about them.
    """
    if not fusion.weighted:
        return fusion
    both = {"image", "text"} <= set(queries)
    best: tuple[float, FusionSpec] = (-1.0, fusion)
    for weight in _nearest_first(fusion.image_weight):
        database = fuse_products(fusion, stored["image"], stored["text"], weight)
        plain = [answers.measure(k, rows, database)["mrr"] for k, rows in queries.items()]
        for share in _nearest_first(fusion.query_image_weight) if both else (0.5,):
            figures = list(plain)
            if both:
                fused = fuse(queries["image"], queries["text"], share)
                figures.append(answers.measure("both", fused, database)["mrr"])
            score = float(np.mean(figures))
            if score > best[0] + SAME_SCORE:
                shown = share if both else fusion.query_image_weight
                best = (score, replace(fusion, image_weight=weight, query_image_weight=shown))
    return best[1]


def _nearest_first(weight: float) -> list[float]:
    return sorted(WEIGHTS, key=lambda one: (abs(one - weight), one))


def _spread(rows: int, most: int) -> list[int]:
    places = np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(int))
    return [int(place) for place in places]
