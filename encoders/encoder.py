"""Live encoders: pixels and tokens in, float32 unit rows out."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from encoders.fusion import FusionSpec, fuse, fuse_stored
from encoders.msr import MsrModel
from encoders.runtime import Runtime, check_array
from encoders.short_texts import ShortTexts
from encoders.spec import Float32Array, Int64Array, PreprocessSpec, UInt8Array

BoolArray = npt.NDArray[np.bool_]


class Encoder(Protocol):
    """What stages ask of any encoder.

    Attributes:
        fingerprint: Identity of the vector space; vectors of two fingerprints never mix.
        dim: D of the vectors that are stored.
        preprocess: How pictures become pixels.
        fusion: How the stored vectors are fused, and which fields there are.
        precision: What it multiplies in, "fp32" or "bf16".
    """

    fingerprint: str
    dim: int
    preprocess: PreprocessSpec
    fusion: FusionSpec
    precision: str

    def encode_products(
        self,
        pixels: UInt8Array | None,
        tokens: Int64Array | None,
        has_image: BoolArray,
        has_text: BoolArray,
    ) -> dict[str, Float32Array]:
        """Encode products into the vectors that are stored.

        Args:
            pixels: (B, H, W, 3) uint8 made by `preprocess_image`; None: no image is wanted.
            tokens: (B, L) int64 of the product tokenizer; None: no text is wanted.
            has_image: (B,) bool; pixels of the other rows may hold anything.
            has_text: (B,) bool; tokens of the other rows may hold anything.

        Returns:
            `image` and `text`, those that are wanted, or `multimodal` where the fusion is
            learned; each (B, D) float32 unit rows, NaN where a row has no such vector.
        """
        ...

    def encode_queries(
        self, pixels: UInt8Array | None, tokens: Int64Array | None, *, image_weight: float
    ) -> Float32Array:
        """Encode queries: photos, words, or both fused.

        Args:
            pixels: (B, H, W, 3) uint8; None: words alone.
            tokens: (B, L) int64 of the query tokenizer; None: photos alone.
            image_weight: Share of the photo where there are both, in [0, 1].

        Returns:
            (B, D') float32 unit rows, D' the dimension of the encoder's fields.

        Raises:
            ValueError: Neither is given, or a shape is wrong.
        """
        ...


class OpenClipEncoder:
    """Run an open_clip model for inference: stock models and those trained as MIM.

    A row that the model gives no direction to (it holds NaN or infinity, or is all zero)
    comes back as NaN: the caller rejects that row, and keeps the rest of the batch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: PreprocessSpec,
        *,
        dim: int,
        length_tokens: int,
        fingerprint: str,
        fusion: FusionSpec | None = None,
        device: str | None = None,
        precision: str = "auto",
    ) -> None:
        """Put a model on a device, ready to encode.

        Args:
            model: An open_clip model with `encode_image` and `encode_text`; it is moved.
            preprocess: The model's preprocessing.
            dim: D of its vectors.
            length_tokens: L, its context length.
            fingerprint: The checkpoint's fingerprint.
            fusion: Of kind "sum"; None: equal weights.
            device: A torch device; None is "cuda" where there is one, else "cpu".
            precision: "fp32", "bf16" (autocast), or "auto": bf16 where the device multiplies in
                it, as a GPU or a CPU with AMX or AVX512_BF16 does; else fp32.

        Raises:
            ValueError: `precision` is none of the three.
        """
        self.fingerprint, self.dim, self.preprocess = fingerprint, dim, preprocess
        self.fusion = fusion or FusionSpec()
        self._runtime = Runtime(preprocess, device, precision)
        self.precision = self._runtime.precision
        self._model: Any = self._runtime.place(model)
        self._short_texts = ShortTexts(self._model)
        self._texts = [_TokenRange(length_tokens, getattr(model, "vocab_size", None))]

    def encode_images(self, pixels: UInt8Array) -> Float32Array:
        """Encode pixels made by `preprocess_image`.

        Args:
            pixels: (B, H, W, 3) uint8 in [0, 255], H = W = preprocess.size_px.

        Returns:
            (B, D) float32, unit rows; NaN rows where the model gave no direction.

        Raises:
            ValueError: Another shape or dtype.
        """
        self._runtime.check_pixels(pixels)
        if len(pixels) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        with self._runtime.inference():
            parts = [self._model.encode_image(part) for part in self._runtime.stream_pixels(pixels)]
            return _unit_rows(torch.cat(parts))

    def encode_texts(self, tokens: Int64Array) -> Float32Array:
        """Encode tokens made by this model's tokenizer; equal texts of a batch only once.

        Args:
            tokens: (B, L) int64, L the model's context length.

        Returns:
            (B, D) float32, unit rows; NaN rows where the model gave no direction.

        Raises:
            ValueError: Another shape or dtype, or a token outside the vocabulary.
        """
        _check_tokens(tokens, self._texts)
        if len(tokens) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        texts, places = np.unique(tokens, axis=0, return_inverse=True)
        rows = np.empty((len(texts), self.dim), np.float32)
        with self._runtime.inference():
            for group, model, short in self._short_texts.groups(texts):
                rows[group] = _unit_rows(model.encode_text(self._runtime.load(short)))
        return rows[places.reshape(-1)]

    def encode_products(
        self,
        pixels: UInt8Array | None,
        tokens: Int64Array | None,
        has_image: BoolArray,
        has_text: BoolArray,
    ) -> dict[str, Float32Array]:
        """Encode products; see `Encoder.encode_products`."""
        found: dict[str, Float32Array] = {}
        if pixels is not None:
            found["image"] = np.full((len(pixels), self.dim), np.nan, np.float32)
            found["image"][has_image] = self.encode_images(pixels[has_image])
        if tokens is not None:
            found["text"] = np.full((len(tokens), self.dim), np.nan, np.float32)
            found["text"][has_text] = self.encode_texts(tokens[has_text])
        return found

    def encode_queries(
        self, pixels: UInt8Array | None, tokens: Int64Array | None, *, image_weight: float
    ) -> Float32Array:
        """Encode queries; see `Encoder.encode_queries`."""
        parts = [] if pixels is None else [self.encode_images(pixels)]
        parts += [] if tokens is None else [self.encode_texts(tokens)]
        return _fuse_query(parts, image_weight)


class MsrEncoder:
    """Run an MSR model for inference: words against fused products.

    A photo as a query is encoded as a product without a text: our rule.
    """

    def __init__(
        self,
        model: MsrModel,
        preprocess: PreprocessSpec,
        *,
        dim: int,
        length_tokens: int,
        fingerprint: str,
        fusion: FusionSpec,
        device: str | None = None,
        precision: str = "auto",
    ) -> None:
        """Put a model on a device, ready to encode.

        Args:
            model: The model; it is moved.
            preprocess: The image tower's preprocessing.
            dim: D of the vectors that are stored: of a tower, or of the learned fusion.
            length_tokens: Context length of the CLIP model's own text tower.
            fingerprint: The checkpoint's fingerprint.
            fusion: Its fusion.
            device: As `OpenClipEncoder`.
            precision: As `OpenClipEncoder`.

        Raises:
            ValueError: `precision` is unknown.
        """
        self.fingerprint, self.dim, self.preprocess = fingerprint, dim, preprocess
        self.fusion = fusion
        self._runtime = Runtime(preprocess, device, precision)
        self.precision = self._runtime.precision
        self._model: MsrModel = self._runtime.place(model)
        clip = _TokenRange(length_tokens, getattr(model.clip, "vocab_size", None))
        text = _TokenRange(model.text_tokens, getattr(model.text, "vocab_size", None))
        self._product_texts = [clip] if model.text is None else [text]
        self._query_texts = [clip] if model.text is None else [text, clip]

    def encode_products(
        self,
        pixels: UInt8Array | None,
        tokens: Int64Array | None,
        has_image: BoolArray,
        has_text: BoolArray,
    ) -> dict[str, Float32Array]:
        """Encode products; see `Encoder.encode_products`. A missing modality's vector is learned.

        A row that has neither is NaN.
        """
        has_image, has_text = has_image & (pixels is not None), has_text & (tokens is not None)
        if len(has_text) == 0:
            empty = np.zeros((0, self.dim), np.float32)
            return {name: empty for name in self.fusion.columns(("multimodal",))}
        images = words = None
        if pixels is not None:
            self._runtime.check_pixels(pixels)
        if tokens is not None:
            _check_tokens(tokens, self._product_texts)
        with self._runtime.inference():
            if pixels is not None:
                images = self._runtime.load_pixels(pixels)
            if tokens is not None:
                words = self._runtime.load(tokens)
            masks = [self._runtime.load(mask) for mask in (has_image, has_text)]
            text, image = self._model.encode_parts(images, words, *masks)
            if self.fusion.kind == "mlp":
                fused = self._model.fuse(text, image, self.fusion.image_weight)
                found = {"multimodal": _unit_rows(fused)}
            else:
                found = {"image": _unit_rows(image), "text": _unit_rows(text)}
        for rows in found.values():
            rows[~(has_image | has_text)] = np.nan
        return found

    def encode_queries(
        self, pixels: UInt8Array | None, tokens: Int64Array | None, *, image_weight: float
    ) -> Float32Array:
        """Encode queries; see `Encoder.encode_queries`."""
        parts = [] if pixels is None else [self._encode_photos(pixels)]
        if tokens is not None:
            _check_tokens(tokens, self._query_texts)
            with self._runtime.inference():
                parts.append(_unit_rows(self._model.encode_query(self._runtime.load(tokens))))
        return _fuse_query(parts, image_weight)

    def _encode_photos(self, pixels: UInt8Array) -> Float32Array:
        there = np.ones(len(pixels), bool)
        return fuse_stored(self.fusion, self.encode_products(pixels, None, there, ~there))


@dataclass(frozen=True)
class _TokenRange:
    """So many tokens of a row are of one tower, which knows so many different ones."""

    length_tokens: int
    vocab_size: int | None


def _fuse_query(parts: list[Float32Array], image_weight: float) -> Float32Array:
    if not parts:
        raise ValueError("a query needs pixels, tokens, or both")
    return parts[0] if len(parts) == 1 else fuse(parts[0], parts[1], image_weight)


def _unit_rows(features: torch.Tensor) -> Float32Array:
    # A plain division: a zero row becomes NaN, where F.normalize would leave zeros.
    rows = features.float()
    unit: Float32Array = (rows / rows.norm(dim=-1, keepdim=True)).cpu().numpy()
    return unit


def _check_tokens(tokens: Int64Array, ranges: list[_TokenRange]) -> None:
    # On a GPU, a wrong index would kill the whole process's device context.
    check_array("tokens", tokens, (sum(one.length_tokens for one in ranges),), np.int64)
    start = 0
    for one in ranges:
        part = tokens[:, start : start + one.length_tokens]
        start += one.length_tokens
        if part.size == 0 or one.vocab_size is None:
            continue
        lowest, highest = int(part.min()), int(part.max())
        if lowest < 0 or highest >= one.vocab_size:
            raise ValueError(
                f"tokens range from {lowest} to {highest}, the vocabulary has"
                f" {one.vocab_size}: they were made by another model's tokenizer"
            )
