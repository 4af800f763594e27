"""How two vectors become one: the product's fused field, and the fused query. NumPy only.

    sum            normalize(w * image + (1 - w) * text)
    concat         [text ; image] / sqrt(2)
    alpha_concat   normalize([(1 - w) * text ; w * image])
    mlp            learned; the encoder gives the fused vector itself

`sum` is our rule for MIM encoders and stock models. The others are after MSR ("Multimodal
semantic retrieval for product search", arXiv 2501.07365), which concatenates alpha * v1 and
(1 - alpha) * v2; that v1 is the text, and the unit length, are ours: alpha is 1 - w. With unit
parts an inner product with [q ; q] is a weighted sum of two cosines.

Letters: B rows, D dimension of one tower's vectors.
"""

from dataclasses import dataclass

import numpy as np

from encoders.spec import Float32Array

FUSIONS = ("sum", "concat", "alpha_concat", "mlp")


@dataclass(frozen=True, kw_only=True)
class FusionSpec:
    """Say how an encoder's vectors are fused.

    Attributes:
        kind: "sum", "concat", "alpha_concat" or "mlp".
        image_weight: Share of the image in a product's fused vector, in [0, 1].
        query_image_weight: Share of the photo in a query of photo and words, in [0, 1].

    Raises:
        ValueError: An unknown kind, or a weight outside [0, 1].
    """

    kind: str = "sum"
    image_weight: float = 0.5
    query_image_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in FUSIONS:
            raise ValueError(f"fusion is {self.kind!r}, expected one of {FUSIONS}")
        for name in ("image_weight", "query_image_weight"):
            check_weight(name, getattr(self, name))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that an index can be built of."""
        return ("image", "text", "multimodal") if self.kind == "sum" else ("multimodal",)

    @property
    def weighted(self) -> bool:
        """Whether the fused vector is computed from stored image and text vectors by a weight."""
        return self.kind in ("sum", "alpha_concat")

    def columns(self, fields: tuple[str, ...]) -> tuple[str, ...]:
        """List the vectors that have to be stored for these fields."""
        if self.kind == "mlp":
            return ("multimodal",)
        if "multimodal" in fields:
            return ("image", "text")
        return tuple(name for name in ("image", "text") if name in fields)

    def field_dim(self, field: str, dim: int) -> int:
        """Return the dimension of a field's vectors, given D of one tower."""
        doubled = field == "multimodal" and self.kind in ("concat", "alpha_concat")
        return 2 * dim if doubled else dim


def fuse(image: Float32Array, text: Float32Array, weight: float) -> Float32Array:
    """Blend image and text vectors: normalize(weight * image + (1 - weight) * text).

    Args:
        image: (B, D) float32 unit rows.
        text: (B, D) float32 unit rows.
        weight: Share of the image in [0, 1].

    Returns:
        (B, D) float32 unit rows; NaN where the two cancel out or one holds NaN.

    Raises:
        ValueError: The shapes differ or are not (B, D), or weight is outside [0, 1].
    """
    _check_parts(image, text, weight)
    return _unit_rows(np.float32(weight) * image + np.float32(1.0 - weight) * text)


def fuse_products(
    spec: FusionSpec, image: Float32Array, text: Float32Array, weight: float
) -> Float32Array:
    """Fuse the stored image and text vectors of products.

    A product that lacks one of the two (a NaN row) has the other one's vector under `sum`; the
    concatenations have no such row, since MSR encoders put a learned vector there.

    Args:
        spec: Of kind "sum", "concat" or "alpha_concat".
        image: (B, D) float32 unit rows, or NaN rows.
        text: (B, D) float32 unit rows, or NaN rows.
        weight: Share of the image in [0, 1]; "concat" has none, and does not read it.

    Returns:
        (B, spec.field_dim("multimodal", D)) float32 unit rows; NaN where both are missing.

    Raises:
        ValueError: As `fuse`; or the kind is "mlp", which no weight computes.
    """
    _check_parts(image, text, weight)
    if spec.kind == "sum":
        no_image, no_text = np.isnan(image[:, :1]), np.isnan(text[:, :1])
        fused = fuse(image, text, weight)
        either = np.where(no_image, text, image)
        return np.where(no_image | no_text, either, fused)
    if spec.kind in ("concat", "alpha_concat"):
        share = 0.5 if spec.kind == "concat" else weight
        parts = [np.float32(1.0 - share) * text, np.float32(share) * image]
        return _unit_rows(np.concatenate(parts, axis=1))
    raise ValueError("an mlp fusion is computed by its encoder, not from stored vectors")


def fuse_stored(spec: FusionSpec, stored: dict[str, Float32Array]) -> Float32Array:
    """Return the `multimodal` vectors of products: as stored, or fused by the spec's own weight.

    Args:
        spec: The fusion, with the weight in force.
        stored: What `Encoder.encode_products` gave.

    Returns:
        (B, spec.field_dim("multimodal", D)) float32 unit rows; NaN where a product has none.
    """
    if "multimodal" in stored:
        return stored["multimodal"]
    return fuse_products(spec, stored["image"], stored["text"], spec.image_weight)


def check_weight(name: str, weight: float) -> None:
    """Raise ValueError where a weight is outside [0, 1]."""
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"{name} is {weight}, expected 0 to 1")


def _check_parts(image: Float32Array, text: Float32Array, weight: float) -> None:
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"image {image.shape} and text {text.shape}, expected the same (B, D)")
    check_weight("weight", weight)


def _unit_rows(rows: Float32Array) -> Float32Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit: Float32Array = (rows / norms).astype(np.float32, copy=False)
    return unit
