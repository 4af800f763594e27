"""Mines hard negatives for MSR training: wrong products that are near a query.

Letters: N pairs, P products, D dimension.
"""

import numpy as np

from encoders.checkpoint import Tokenizers
from encoders.encoder import Encoder
from encoders.fusion import fuse_stored
from jobs.pair_data import Int64Array, PairData
from jobs.validate import Float32Array, encode_products

MINE_FROM = 20  # negatives are drawn from so many of the nearest wrong products
ENCODE_ROWS = 1024
SCORES = 2**24  # most inner products in memory at once: 64 MiB


def mine_negatives(
    encoder: Encoder,
    tokenizers: Tokenizers,
    data: PairData,
    *,
    wanted: int,
    random: np.random.Generator,
) -> Int64Array:
    """Draw wrong products among the nearest of each pair's query.

    A product is right for a query if any pair says so, of all that ask the same words.

    Args:
        encoder: An MSR encoder as it is now.
        tokenizers: Its tokenizers.
        data: The pairs.
        wanted: Negatives a query.
        random: Decides everything drawn.

    Returns:
        (N, wanted) int64, rows of the pairs. Where every product is right, the row's own product,
        which the loss masks.
    """
    products = data.products()
    stored = encode_products(encoder, tokenizers, data, products.rows)
    database = fuse_stored(encoder.fusion, stored)
    found = np.empty((len(data), wanted), np.int64)
    block = max(1, min(ENCODE_ROWS, SCORES // len(database)))
    for start in range(0, len(data), block):
        rows = range(start, min(start + block, len(data)))
        tokens = tokenizers.query(data.texts("query", rows))
        scores = _scores(encoder.encode_queries(None, tokens, image_weight=0.0), database)
        for row, near in zip(rows, scores, strict=True):
            right = data.answers[int(data.query_ids[row])]
            wrong = _nearest_wrong(near, products.ids, right, wanted)
            if not len(wrong):
                wrong = np.flatnonzero(products.ids == data.product_ids[row])
            drawn = random.choice(wrong, wanted, replace=len(wrong) < wanted)
            found[row] = products.rows[drawn]
    return found


def _scores(queries: Float32Array, database: Float32Array) -> Float32Array:
    scores: Float32Array = np.nan_to_num(queries @ database.T, nan=-2.0)
    return scores


def _nearest_wrong(
    scores: Float32Array, product_ids: Int64Array, right: Int64Array, wanted: int
) -> Int64Array:
    """Return places of the nearest products that are not right, in the products' order."""
    depth = min(len(scores), max(MINE_FROM, wanted) + len(right))
    near = np.sort(np.argpartition(-scores, depth - 1)[:depth])
    return near[~np.isin(product_ids[near], right)].astype(np.int64)
