"""The steps of the embedding stage, as Ray Data runs them: prepare, embed. See `embed_write`.

Letters: B rows of a batch, D dimension, H W pixels, L tokens.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray

from encoders.spec import PreprocessSpec
from jobs.catalog import Catalog
from jobs.config import EmbedConfig
from jobs.diff import locate
from jobs.fetch import fetch_images
from jobs.images import ImageRejected, ImagesConfig, RejectReason, decode_image
from jobs.items import Item, read_items
from jobs.space import VectorSpace
from jobs.store import Store

if TYPE_CHECKING:
    from encoders.encoder import Encoder

Batch = dict[str, npt.NDArray[Any]]
BoolArray = npt.NDArray[np.bool_]
Fault = ImageRejected | None
MIN_NORM, MAX_NORM = 0.99, 1.01
NO_IMAGE_COLUMN = "the catalog has no image column"


@dataclass(frozen=True, kw_only=True)
class EmbedTask:
    """What the steps of one embedding run share; small, sent to every task once."""

    catalog: Catalog
    images: ImagesConfig
    embed: EmbedConfig
    store: Store
    space: VectorSpace
    generation: int

    @property
    def loads_images(self) -> bool:
        """Whether pictures are fetched: the vectors are made from them, and the catalog has any."""
        return "image" in self.space.takes and "image" in self.catalog.columns

    @property
    def loads_texts(self) -> bool:
        """Whether texts are tokenised."""
        return "text" in self.space.takes


def prepare_rows(batch: Batch, *, task: EmbedTask, todo: ray.ObjectRef) -> Iterator[Batch]:
    """Read units of the catalog; fetch, decode and tokenise their planned items.

    Args:
        batch: `unit`: (1,) numbers into `task.catalog.units`.
        task: What to embed with.
        todo: Reference to the planned vector ids, (M,) int64, sorted.

    Yields:
        Batches of B rows: keys, `pixels` (B, H, W, 3) uint8 and `tokens` (B, L) int64 where the
        fields need them, `has_image`, `has_text` and `rejected`, and `reject_reason`: empty where
        nothing is wrong; why the row is rejected; or what a live row lacks.
    """
    waiting: list[Item] = []
    todo_ids = ray.get(todo)
    for number in batch["unit"].tolist():
        for items in read_items(task.catalog, task.catalog.units[number], task.space.recipe):
            _, planned = locate(todo_ids, np.array([i.vector_id for i in items], np.int64))
            waiting += [item for item, wanted in zip(items, planned, strict=True) if wanted]
            while len(waiting) >= task.embed.batch_size:
                yield _prepare(task, waiting[: task.embed.batch_size])
                waiting = waiting[task.embed.batch_size :]
    if waiting:
        yield _prepare(task, waiting)


def _prepare(task: EmbedTask, items: Sequence[Item]) -> Batch:
    seconds = {"fetch_s": 0.0, "decode_s": 0.0, "tokenize_s": 0.0}
    batch: Batch = {
        "product_id": np.array([i.product_id for i in items], object),
        "image_number": np.array([i.image_number for i in items], np.int32),
        "vector_id": np.array([i.vector_id for i in items], np.int64),
        "content_hash": np.array([i.content_hash for i in items], np.int64),
        "image_bytes": np.zeros(len(items), np.int64),
    }
    texts = _load_tokens(task, items, batch, seconds)
    images = _load_pixels(task, items, texts, batch, seconds)
    judged = [judge_row(task.space, *faults) for faults in zip(images, texts, strict=True)]
    reasons = [fault for _, fault in judged]
    batch["rejected"] = np.array([rejected for rejected, _ in judged], bool)
    batch["reject_reason"] = np.array([str(r.reason) if r else "" for r in reasons], object)
    batch["reject_detail"] = np.array([r.detail if r else "" for r in reasons], object)
    batch["has_image"] = np.array([fault is None for fault in images], bool)
    batch["has_text"] = np.array([fault is None for fault in texts], bool)
    for name, value in seconds.items():  # spread over the rows, so that a sum gives it back
        batch[name] = np.full(len(items), value / len(items))
    return batch


def judge_row(space: VectorSpace, image: Fault, text: Fault) -> tuple[bool, Fault]:
    """Decide from the faults of a row's image and text whether it can be live.

    A row that lacks what no field requires is live by the rest; but a passing fault rejects it,
    so that the next refresh tries again.

    Args:
        space: Says what the fields are made from and what they require.
        image: What is wrong with the image, or None.
        text: What is wrong with the text, or None.

    Returns:
        Whether the row is rejected, and the reason: for that, or for what a live row lacks.
    """
    image = image if "image" in space.takes else None
    text = text if "text" in space.takes else None
    if text is not None and "text" in space.requires:
        return True, text
    if image is not None and ("image" in space.requires or image.reason.transient):
        return True, image
    if image is not None and (text is not None or "text" not in space.takes):
        detail = image.detail if text is None else f"{image.detail}; and {text}"
        return True, ImageRejected(image.reason, detail)
    if text is not None and "image" not in space.takes:
        return True, text
    return False, image or text


def _load_tokens(
    task: EmbedTask, items: Sequence[Item], batch: Batch, seconds: dict[str, float]
) -> list[Fault]:
    """Fill `tokens` where texts are wanted; return what is wrong with each text."""
    started = time.monotonic()
    faults = [_check_text(item.text, task.catalog.max_text_chars) for item in items]
    if task.loads_texts:
        good = [item.text if f is None else "" for item, f in zip(items, faults, strict=True)]
        batch["tokens"] = _tokenizer(task)(good)
    seconds["tokenize_s"] = time.monotonic() - started
    return faults


def _check_text(text: str, max_chars: int) -> Fault:
    if not text:
        return ImageRejected(RejectReason.EMPTY_TEXT, "all columns of the text template are empty")
    if len(text) > max_chars:
        detail = f"{len(text)} characters, the limit is {max_chars}"
        return ImageRejected(RejectReason.TEXT_TOO_LONG, detail)
    return None


def _load_pixels(
    task: EmbedTask,
    items: Sequence[Item],
    texts: Sequence[Fault],
    batch: Batch,
    seconds: dict[str, float],
) -> list[Fault]:
    """Fill `pixels` where images are wanted; return what is wrong with each image.

    The images of rows that their text has rejected are not fetched.
    """
    if not task.loads_images:
        return [ImageRejected(RejectReason.MISSING_IMAGE, NO_IMAGE_COLUMN) for _ in items]
    started = time.monotonic()
    faults: list[Fault] = [None] * len(items)
    skips = "text" in task.space.requires
    wanted = [place for place, text in enumerate(texts) if text is None or not skips]
    fetched = fetch_images([items[p].image for p in wanted], task.catalog.root, task.images)
    fetch_end = time.monotonic()
    side = task.space.preprocess.size_px
    pixels = np.zeros((len(items), side, side, 3), np.uint8)
    for place, data in zip(wanted, fetched, strict=True):
        try:
            pixels[place] = load_pixels(data, task.images, task.space.preprocess)
            batch["image_bytes"][place] = len(data) if isinstance(data, bytes) else 0
        except ImageRejected as reject:
            faults[place] = reject
    batch["pixels"] = pixels
    seconds["fetch_s"] = fetch_end - started
    seconds["decode_s"] = time.monotonic() - fetch_end
    return faults


def load_pixels(
    data: bytes | ImageRejected, images: ImagesConfig, preprocess: PreprocessSpec
) -> npt.NDArray[np.uint8]:
    """Decode one fetched image into (H, W, 3) uint8 as the encoder wants it.

    Raises:
        ImageRejected: It was not fetched, or can't be decoded.
    """
    from encoders.preprocess import preprocess_image

    if isinstance(data, ImageRejected):
        raise data
    image = decode_image(data, images, min_side_px=2 * preprocess.size_px)
    return preprocess_image(image, preprocess)


_tokenizers: dict[str, Any] = {}


def _tokenizer(task: EmbedTask) -> Any:  # noqa: ANN401
    """Return the tokenizer of product texts, built once a process."""
    encoder = task.space.encoder
    if encoder not in _tokenizers:
        from encoders.checkpoint import load_tokenizers

        directory = task.store.local_copy(checkpoint_cache(), "checkpoints", encoder)
        _tokenizers[encoder] = load_tokenizers(directory).product
    return _tokenizers[encoder]


def checkpoint_cache() -> Path:
    """Return this machine's folder for checkpoints of remote stores; names are content hashes."""
    return Path(tempfile.gettempdir()) / "vitrine-cache"


class Embedder:
    """The model in an actor: loads once, then embeds batches."""

    def __init__(self, task: EmbedTask, threads: int) -> None:
        """Load the encoder from the store.

        Args:
            task: What to embed with.
            threads: CPU threads of the forward pass.
        """
        import torch

        from encoders.checkpoint import load_encoder

        torch.set_num_threads(threads)
        self.task = task
        directory = task.store.local_copy(checkpoint_cache(), "checkpoints", task.space.encoder)
        self.encoder: Encoder = load_encoder(
            directory, precision=task.embed.precision, expected_fingerprint=task.space.encoder
        )

    def __call__(self, batch: Batch) -> Batch:
        """Replace `pixels` and `tokens` by one `<name>_embedding` (B, D) float32 a stored vector.

        A row is NaN where there is none.
        """
        started = time.monotonic()
        for name in ("reject_reason", "reject_detail"):
            batch[name] = np.array(batch[name], object)  # Ray's own is read-only
        batch["rejected"] = np.array(batch["rejected"], bool)
        vectors = self._embed(batch, ~batch["rejected"])
        for name, rows in vectors.items():
            needed = ~batch["rejected"] & self._needs(name, batch)
            bad = needed & ~_are_unit(rows)
            batch["rejected"] |= bad
            batch["reject_reason"][bad] = str(RejectReason.BAD_VECTOR)
            batch["reject_detail"][bad] = f"the encoder's {name} vector is not of unit length"
        dropped = ("pixels", "tokens", "has_image", "has_text")
        kept = {name: column for name, column in batch.items() if name not in dropped}
        kept |= {f"{name}_embedding": rows for name, rows in vectors.items()}
        rows = len(batch["rejected"])
        kept["embed_s"] = np.full(rows, (time.monotonic() - started) / rows)
        return kept

    def _embed(self, batch: Batch, good: BoolArray) -> dict[str, Any]:
        space = self.task.space
        size = (len(good), space.dim)
        vectors = {name: np.full(size, np.nan, np.float32) for name in space.columns}
        if good.any():
            pixels = _as_uint8(batch["pixels"][good]) if self.task.loads_images else None
            tokens = batch["tokens"][good] if self.task.loads_texts else None
            masks = batch["has_image"][good], batch["has_text"][good]
            for name, rows in self.encoder.encode_products(pixels, tokens, *masks).items():
                vectors[name][good] = rows
        return vectors

    def _needs(self, name: str, batch: Batch) -> BoolArray:
        """Say which rows must have a vector: only a weighted sum goes on without one."""
        if self.task.space.fusion.kind == "sum":
            return np.asarray(batch[f"has_{name}"], bool)
        return np.ones(len(batch["rejected"]), bool)


def _as_uint8(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def _are_unit(vectors: npt.NDArray[np.float32]) -> BoolArray:
    norms = np.linalg.norm(vectors, axis=1)
    return np.asarray((norms > MIN_NORM) & (norms < MAX_NORM))
