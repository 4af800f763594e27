"""The query contract: how serving must make query vectors, and the proof that it does.

Each release's manifest holds it under `query`: the encoder's fingerprint, preprocessing and
fusion with the weights in force, the fields with their dimensions, and canaries: inputs with the
vectors that they must give. `Searcher` checks it whenever it opens a release. Serving code with a
runtime of its own checks itself:

    manifest = store.read_json("indexes", release.indexes, "manifest.json")
    check_contract(manifest["query"], encode)

Letters: Q queries, D dimension.
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from jobs.embed_steps import load_pixels
from jobs.errors import FingerprintError, JobError
from jobs.images import ImageRejected, ImagesConfig
from jobs.space import VectorSpace, describe_space, parse_space

if TYPE_CHECKING:
    from encoders.encoder import Encoder
    from encoders.preprocess import TokenizeTexts

Float32Array = npt.NDArray[np.float32]
Encode = Callable[[Sequence[bytes | None], Sequence[str | None]], Float32Array]
"""Encoded pictures and texts of Q queries, None where a query lacks one, to (Q, D) float32 unit
rows; photo and words are fused with the contract's `query_image_weight`."""

# The canaries' vectors are made in fp32 on a CPU. How far bf16 moves them depends on the encoder,
# so it is measured when the contract is made: cosine 0.9999 for a random ViT-S-32-alt (squashing
# for cropping 0.991, another mean and std 0.97, a tenth of noise on the weights 0.98 and below),
# 0.993 for a fine-tuned EfficientNet-lite0, which therefore runs in fp32 everywhere. Three times as
# far as bf16 goes is let through where it is allowed, since a GPU rounds otherwise than a CPU.
MIN_COSINE = 0.999
BF16_ROOM = 3.0

_TEXTS = {
    "ascii text": "red leather sneaker, size 42",
    "non-Latin text": "赤い革のスニーカー, красные кеды, حذاء أحمر",
    "long text": "a warm winter coat with two pockets and a hood, " * 40,
}

_ADVICE = (
    "queries are encoded otherwise than this release's products; use the release's own "
    "checkpoint, preprocessing and query_image_weight, or publish a release for this encoder"
)


@dataclass(frozen=True, kw_only=True)
class QueryEncoder:
    """The whole path of a query: decode, preprocess, tokenise, encode, fuse.

    Attributes:
        encoder: A live encoder, on any device.
        tokenizer: Its tokenizer of query texts.
        images: Limits for query images.
        image_weight: Share of the photo in a query of photo and words.
    """

    encoder: "Encoder"
    tokenizer: "TokenizeTexts"
    images: ImagesConfig
    image_weight: float

    def encode(self, images: Sequence[bytes | None], texts: Sequence[str | None]) -> Float32Array:
        """Encode queries, one forward pass a kind: photos, words, both.

        Args:
            images: Q encoded pictures; None: words alone.
            texts: Q texts; None: the photo alone.

        Returns:
            (Q, D) float32 unit rows.

        Raises:
            JobError: A query has neither, an image can't be decoded, a text is empty, or the
                encoder gives a query no direction.
        """
        if len(images) != len(texts):
            raise JobError(f"{len(images)} images and {len(texts)} texts, expected as many")
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for place, (image, text) in enumerate(zip(images, texts, strict=True)):
            if text is not None and not text.strip():
                raise JobError("the query text is empty")
            kinds.setdefault((image is not None, text is not None), []).append(place)
        if (False, False) in kinds:
            raise JobError("a search needs an image, a text, or both")
        found: dict[int, Float32Array] = {}
        for kind, places in kinds.items():
            pixels = self.pixels([images[p] for p in places]) if kind[0] else None
            tokens = self.tokenizer([texts[p] or "" for p in places]) if kind[1] else None
            rows = self.encoder.encode_queries(pixels, tokens, image_weight=self.image_weight)
            found |= dict(zip(places, rows, strict=True))
        vectors = np.stack([found[place] for place in range(len(images))])
        if not np.isfinite(vectors).all():
            raise JobError("the encoder gives this query no direction: its vector isn't finite")
        return vectors

    def pixels(self, images: Sequence[bytes | None]) -> npt.NDArray[np.uint8]:
        """Decode and preprocess pictures: (B, H, W, 3) uint8.

        Raises:
            JobError: One can't be decoded.
        """
        preprocess = self.encoder.preprocess
        try:
            return np.stack([load_pixels(i or b"", self.images, preprocess) for i in images])
        except ImageRejected as reject:
            raise JobError(f"the query image can't be used: {reject}") from reject


def make_contract(directory: Path, space: VectorSpace) -> dict[str, Any]:
    """Encode the canaries on this machine's CPU, in fp32, and return the `query` of a manifest.

    Args:
        directory: The checkpoint.
        space: What the job makes of it.

    Raises:
        ValueError: The checkpoint can't be loaded.
        JobError: The encoder gives a canary no direction.
    """
    from encoders.checkpoint import load_model, load_tokenizers, wrap_model
    from encoders.runtime import round_weights

    inputs = _canary_inputs()
    pictures, texts = [i for _, i, _ in inputs], [t for _, _, t in inputs]
    model, config = load_model(directory)
    tokenizers = load_tokenizers(config)

    def encode(precision: str) -> tuple[Float32Array, dict[str, Float32Array]]:
        query = QueryEncoder(
            encoder=wrap_model(
                model, config, fingerprint=space.encoder, device="cpu", precision=precision
            ),
            tokenizer=tokenizers.query,
            images=ImagesConfig(),
            image_weight=space.fusion.query_image_weight,
        )
        return query.encode(pictures, texts), _encode_products(query, tokenizers.product)

    vectors, products = encode("fp32")
    round_weights(model)  # as a loaded encoder's are
    rounded, rounded_products = encode("bf16")
    cosines = _cosines(vectors, rounded)
    # A query may hide what its parts do: of an MSR encoder it is fused with a constant.
    parts = [_cosines(rows, rounded_products[name]) for name, rows in products.items()]
    bf16_cosine = float(np.concatenate([cosines, *parts]).min())
    room = BF16_ROOM if bf16_cosine >= MIN_COSINE else 0.0  # where nobody may use bf16: none
    canaries = [
        {
            "name": name,
            "image": None if image is None else base64.b64encode(image).decode(),
            "text": text,
            "vector": base64.b64encode(vector.astype("<f4").tobytes()).decode(),
            "min_cosine": min(MIN_COSINE, 1 - room * (1 - float(cosine))),
        }
        for (name, image, text), vector, cosine in zip(inputs, vectors, cosines, strict=True)
    ]
    contract = describe_space(space) | {"canaries": canaries, "bf16_cosine": bf16_cosine}
    return contract | {"sha256": _digest(contract)}


def _encode_products(query: QueryEncoder, tokenize: "TokenizeTexts") -> dict[str, Float32Array]:
    """Encode the canaries' pictures and texts as products are: column to (B, D) float32."""
    pictures = [image for _, image, text in _canary_inputs() if text is None]
    texts = [text or "" for _, image, text in _canary_inputs() if image is None][: len(pictures)]
    there = np.ones(len(pictures), bool)
    return query.encoder.encode_products(query.pixels(pictures), tokenize(texts), there, there)


def _cosines(rows: Float32Array, others: Float32Array) -> Float32Array:
    found: Float32Array = (rows * others).sum(axis=1) / np.linalg.norm(others, axis=1)
    return found


def allowed_precision(contract: dict[str, Any]) -> str:
    """Return "auto" if bf16 leaves all canaries where fp32 puts them, to `MIN_COSINE`; else "fp32".

    Args:
        contract: The `query` part of a manifest.
    """
    return "auto" if contract["bf16_cosine"] >= MIN_COSINE else "fp32"


def _canary_inputs() -> list[tuple[str, bytes | None, str | None]]:
    """Return (name, encoded picture, text) of each canary."""
    # The second isn't square: cropping, padding and squashing differ in it.
    photo, other = _render_picture(0, (64, 64)), _render_picture(1, (96, 64))
    texts: list[tuple[str, bytes | None, str | None]] = [(n, None, t) for n, t in _TEXTS.items()]
    return [
        *texts,
        ("photo", photo, None),
        ("other photo", other, None),
        ("photo and text", photo, _TEXTS["ascii text"]),
    ]


def _render_picture(seed: int, size_px: tuple[int, int]) -> bytes:
    """Draw soft blobs of colour: smooth as photos are, and not symmetric."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    picture = Image.fromarray(blocks).resize(size_px, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _digest(contract: dict[str, Any]) -> str:
    values = {name: value for name, value in contract.items() if name != "sha256"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_contract(contract: dict[str, Any]) -> VectorSpace:
    """Return the space that a contract describes.

    Raises:
        FingerprintError: It was edited after it was written, or is incomplete.
    """
    if contract.get("sha256") != _digest(contract):
        raise FingerprintError(
            "the release's query contract was edited after it was written (its sha256 differs): "
            "publish a new release with other weights instead"
        )
    try:
        return parse_space(contract)
    except ValueError as error:
        raise FingerprintError(str(error)) from error


def check_contract(contract: dict[str, Any], encode: Encode) -> None:
    """Check that queries get the vectors that the release was built for.

    Args:
        contract: The `query` part of a release's manifest.
        encode: The whole path of a query, as serving runs it; called once.

    Raises:
        FingerprintError: The contract was edited, or a canary's vector is of another dimension or
            has a cosine below the canary's `min_cosine` with the one that it must give.
    """
    read_contract(contract)
    canaries = contract["canaries"]
    images = [None if c["image"] is None else base64.b64decode(c["image"]) for c in canaries]
    found = np.asarray(encode(images, [c["text"] for c in canaries]), np.float32)
    for canary, vector in zip(canaries, found, strict=True):
        expected = np.frombuffer(base64.b64decode(canary["vector"]), "<f4")
        if vector.shape != expected.shape:
            raise FingerprintError(
                f"canary {canary['name']!r}: a vector of shape {vector.shape}, the release has "
                f"{expected.shape}: {_ADVICE}"
            )
        cosine = float(vector @ expected / (np.linalg.norm(vector) * np.linalg.norm(expected)))
        if not cosine >= canary["min_cosine"]:  # NaN too
            raise FingerprintError(
                f"canary {canary['name']!r}: cosine {cosine:.4f} with the vector it must give, "
                f"expected at least {canary['min_cosine']:.4f}: {_ADVICE}"
            )


def check_encoder(space: VectorSpace, encoder: "Encoder") -> None:
    """Check what a live encoder says of itself, before its vectors are compared.

    Raises:
        FingerprintError: It has another fingerprint, or another preprocessing.
    """
    if encoder.fingerprint != space.encoder:
        raise FingerprintError(
            f"the encoder given is {encoder.fingerprint[:12]}, the release belongs to "
            f"{space.encoder[:12]}: load checkpoints/{space.encoder} of its store"
        )
    if encoder.preprocess != space.preprocess:
        raise FingerprintError(
            f"the encoder given has {encoder.preprocess}, the release was made with "
            f"{space.preprocess}: load checkpoints/{space.encoder[:12]}… of its store unchanged"
        )
