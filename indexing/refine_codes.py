"""Encode whole vectors for the re-rank store, each by itself: no training, nothing to merge."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from indexing.spec import Refine
from indexing.vectors import Float32Array, check_unit_rows

UInt8Array = npt.NDArray[np.uint8]

SCALE_BYTES = 4
HALF_BITS = np.int32(-0x70002000)  # 0x8fffe000: where a float32 keeps what a float16 has
HALF_BIAS = np.float32(2.0**112)
MAX_LEVEL = 127  # of an int8, as far below 0 as above


def refine_code_bytes(kind: Refine, dim: int) -> int:
    """Return the bytes of one code: float16 values, or a float32 scale and int8 values."""
    return {"none": 0, "fp16": 2 * dim, "sq8": SCALE_BYTES + dim}[kind]


def encode_refine(kind: Refine, vectors: Float32Array) -> UInt8Array:
    """Encode vectors, each by itself: the same vector always gives the same code.

    Args:
        kind: 'fp16': values rounded to float16. 'sq8': each row's values in 255 even steps from
            minus its largest to its largest.
        vectors: (N, D) float32 unit rows.

    Returns:
        (N, refine_code_bytes) uint8.

    Raises:
        ValueError: A vector isn't finite or not of unit length, or the kind is 'none'.
    """
    if vectors.ndim != 2:
        raise ValueError(f"vectors: shape is {vectors.shape}, expected (N, D)")
    check_unit_rows(vectors, dim=vectors.shape[1], name="vectors")
    if kind == "none":
        raise ValueError("refine is none: there is nothing to encode vectors for")
    if kind == "fp16":
        return vectors.astype("<f2").view(np.uint8)
    scales = np.abs(vectors).max(axis=1, keepdims=True).astype("<f4") / np.float32(MAX_LEVEL)
    levels = np.rint(vectors / scales).astype(np.int8)
    return np.concatenate([scales.view(np.uint8), levels.view(np.uint8)], axis=1)


def decode_refine(kind: Refine, codes: UInt8Array) -> Float32Array:
    """Turn (..., bytes) codes into (..., D) float32 vectors: of unit length, but for rounding."""
    if kind == "fp16":
        return _floats(codes)
    decoded: Float32Array = codes[..., SCALE_BYTES:].view(np.int8) * _scales(codes)
    return decoded


def score_codes(kind: Refine, queries: Float32Array, codes: UInt8Array) -> Float32Array:
    """Return (Q, K) inner products of queries (Q, D) with what (Q * K, bytes) codes stand for."""
    dim = queries.shape[1]
    if kind == "sq8":
        vectors = codes[:, SCALE_BYTES:].view(np.int8).astype(np.float32)
    else:
        vectors = _floats(codes)
    vectors = vectors.reshape(len(queries), -1, dim)
    # Not matmul: BLAS would start threads of its own for each query.
    products: Float32Array = np.einsum("qkd,qd->qk", vectors, queries)
    if kind == "sq8":
        products *= _scales(codes).reshape(products.shape)
    return products


def _scales(codes: UInt8Array) -> Float32Array:
    """Return the (..., 1) float32 scales of (..., bytes) sq8 codes."""
    return np.ascontiguousarray(codes[..., :SCALE_BYTES]).view("<f4").astype(np.float32)


def _floats(codes: UInt8Array) -> Float32Array:
    """Turn (..., 2 * D) bytes of finite float16 values into (..., D) float32.

    To the bits of numpy's astype, which takes 1.8 ns a value where this takes 0.3: sign, exponent
    and mantissa go to their places, and a product makes up for the other bias of the exponent.
    """
    bits = codes.view("<i2").astype(np.int32)
    bits <<= 13
    bits &= HALF_BITS
    floats: Float32Array = bits.view(np.float32)
    floats *= HALF_BIAS
    return floats
