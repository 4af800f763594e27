"""The steps of the embedding stage, as Ray Data runs them: prepare, embed. See `embed_write`.

Letters: B rows of a batch, D dimension, H W pixels, L tokens.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray

from jobs.catalog import Catalog
from jobs.config import EmbedConfig
from jobs.duplicates import BatchImages, SharedVectors
from jobs.embed_images import Fault, decode_images
from jobs.embed_images import load_pixels as load_pixels
from jobs.fetch import fetch_images
from jobs.images import ImageRejected, ImagesConfig, RejectReason
from jobs.items import Item, read_items
from jobs.schemas import hash63
from jobs.space import VectorSpace
from jobs.state import take_rows
from jobs.storage import machine_cache
from jobs.store import Store

if TYPE_CHECKING:
    from encoders.encoder import Encoder

Batch = dict[str, npt.NDArray[Any]]
BoolArray = npt.NDArray[np.bool_]
MIN_NORM, MAX_NORM = 0.99, 1.01
PLANNED = ("vector_id", "image_hash", "text_hash", "etag_hash", "first_seen", "attempts")
NO_IMAGE_COLUMN = "the catalog has no image column"


@dataclass(frozen=True, kw_only=True)
class EmbedTask:
    """What the steps of one embedding run share; small, sent to every task once.

    Attributes:
        image_vectors: Handle of the run's `jobs.duplicates.ImageVectors`; None: equal images are
            found within a batch alone.
    """

    catalog: Catalog
    images: ImagesConfig
    embed: EmbedConfig
    store: Store
    space: VectorSpace
    generation: int
    image_vectors: Any | None = None

    @property
    def loads_images(self) -> bool:
        """Whether pictures are fetched: the vectors are made from them, and the catalog has any."""
        return "image" in self.space.takes and "image" in self.catalog.columns

    @property
    def shares_images(self) -> bool:
        """Whether an image's vector is made from its bytes alone, so that equal ones share it."""
        return (
            self.loads_images and "image" in self.space.columns and self.space.fusion.kind == "sum"
        )

    @property
    def loads_texts(self) -> bool:
        """Whether texts are tokenised."""
        return "text" in self.space.takes


def prepare_rows(batch: Batch, *, task: EmbedTask, todo: list[ray.ObjectRef]) -> Iterator[Batch]:
    """Read the rows of a piece of work; fetch, decode and tokenise them.

    Args:
        batch: One piece of work: `group` (1,) counts in `todo`, and `start` and `stop` (1,) in
            its rows.
        task: What to embed with.
        todo: References to `EMBED_DTYPE` rows, sorted by unit and vector id; one a group of units.

    Yields:
        Batches of B rows: keys, `pixels` (B, H, W, 3) uint8 and `tokens` (B, L) int64 where the
        fields need them, `has_image`, `has_text` and `rejected`, and `reject_reason`: empty where
        nothing is wrong; why the row is rejected; or what a live row lacks. Where equal images
        share their vector, `image_known` says whose is known already, with no pixels then, and
        `image_vector` (B, D) float16 holds it.
    """
    shared = SharedVectors(task.image_vectors, task.space.dim)
    group, start, stop = (int(batch[name][0]) for name in ("group", "start", "stop"))
    rows = ray.get(todo[group])[start:stop]
    waiting: list[tuple[Item, Any]] = []
    for number in np.unique(rows["unit"]).tolist():
        planned = rows[rows["unit"] == number]
        for items in read_items(task.catalog, task.catalog.units[number], task.space.recipe):
            ids = np.array([item.vector_id for item in items], np.int64)
            found, wanted = take_rows(planned, ids)
            waiting += [(item, row) for item, row, w in zip(items, found, wanted, strict=True) if w]
            while len(waiting) >= task.embed.batch_size:
                yield _prepare(task, shared, waiting[: task.embed.batch_size])
                waiting = waiting[task.embed.batch_size :]
    if waiting:
        yield _prepare(task, shared, waiting)


def _prepare(task: EmbedTask, shared: SharedVectors, work: Sequence[tuple[Item, Any]]) -> Batch:
    items, planned = [item for item, _ in work], np.array([row for _, row in work])
    seconds = {"fetch_s": 0.0, "decode_s": 0.0, "tokenize_s": 0.0}
    batch: Batch = {
        "product_id": np.array([i.product_id for i in items], object),
        "image_number": np.array([i.image_number for i in items], np.int32),
        "image_bytes": np.zeros(len(items), np.int64),
        "image_content": np.zeros(len(items), np.int64),
    }
    # The hashes are the plan's: what changed since it was made differs from them in the next.
    batch |= {name: planned[name] for name in PLANNED}
    texts = _load_tokens(task, items, batch, seconds)
    images = _load_images(task, shared, items, texts, batch, seconds)
    last = (planned["attempts"] + 1 >= task.images.max_attempts).tolist()
    judged = [
        judge_row(task.space, image, text, last_try=last_try)
        for image, text, last_try in zip(images, texts, last, strict=True)
    ]
    reasons = [fault for _, fault in judged]
    batch["rejected"] = np.array([rejected for rejected, _ in judged], bool)
    batch["reject_reason"] = np.array([str(r.reason) if r else "" for r in reasons], object)
    batch["reject_detail"] = np.array([r.detail if r else "" for r in reasons], object)
    batch["has_image"] = np.array([fault is None for fault in images], bool)
    batch["has_text"] = np.array([fault is None for fault in texts], bool)
    for name, value in seconds.items():  # spread over the rows, so that a sum gives it back
        batch[name] = np.full(len(items), value / len(items))
    return batch


def judge_row(
    space: VectorSpace, image: Fault, text: Fault, *, last_try: bool = False
) -> tuple[bool, Fault]:
    """Decide from the faults of a row's image and text whether it can be live.

    A row that lacks what no field requires is live by the rest; but a passing fault rejects it,
    so that the next refresh tries again, until the last try.

    Args:
        space: Says what the fields are made from and what they require.
        image: What is wrong with the image, or None.
        text: What is wrong with the text, or None.
        last_try: Whether no further refresh tries the row after a passing fault.

    Returns:
        Whether the row is rejected, and the reason: for that, or for what a live row lacks.
    """
    image = image if "image" in space.takes else None
    text = text if "text" in space.takes else None
    if text is not None and "text" in space.requires:
        return True, text
    waits = image is not None and image.reason.transient and not last_try
    if image is not None and ("image" in space.requires or waits):
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


def _load_images(
    task: EmbedTask,
    shared: SharedVectors,
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
    skips = "text" in task.space.requires
    wanted = [place for place, text in enumerate(texts) if text is None or not skips]
    references = [items[place].image for place in wanted]
    found = fetch_images(references, task.catalog.root, task.images)
    fetched = dict(zip(wanted, found, strict=True))
    for place, data in fetched.items():
        if isinstance(data, bytes):
            batch["image_content"][place] = hash63((data,))
            batch["image_bytes"][place] = len(data)
    seconds["fetch_s"] = time.monotonic() - started
    if task.shares_images:
        answer = shared.lookup(batch["image_content"])
        batch["image_known"], batch["image_vector"] = answer.known, answer.vectors
        fetched = {place: data for place, data in fetched.items() if not answer.known[place]}
    started = time.monotonic()
    batch["pixels"], faults = decode_images(
        fetched, batch["image_content"], task.images, task.space.preprocess
    )
    seconds["decode_s"] = time.monotonic() - started
    return faults


_tokenizers: dict[str, Any] = {}


def _tokenizer(task: EmbedTask) -> Any:  # noqa: ANN401
    """Return the tokenizer of product texts, built once a process."""
    encoder = task.space.encoder
    if encoder not in _tokenizers:
        from encoders.checkpoint import load_tokenizers

        directory = task.store.local_copy(machine_cache(), "checkpoints", encoder)
        _tokenizers[encoder] = load_tokenizers(directory).product
    return _tokenizers[encoder]


class Embedder:
    """The model in an actor: loads once, then embeds batches."""

    def __init__(self, task: EmbedTask, threads: int, *, on_gpu: bool) -> None:
        """Load the encoder from the store.

        Args:
            task: What to embed with.
            threads: CPU threads of the forward pass.
            on_gpu: Whether the actor has asked for a GPU; else it takes none that it sees.
        """
        import torch

        from encoders.checkpoint import load_encoder

        torch.set_num_threads(threads)
        self.task = task
        self.shared = SharedVectors(task.image_vectors, task.space.dim)
        directory = task.store.local_copy(machine_cache(), "checkpoints", task.space.encoder)
        self.encoder: Encoder = load_encoder(
            directory,
            device=None if on_gpu else "cpu",
            precision=task.embed.precision,
            expected_fingerprint=task.space.encoder,
        )

    def __call__(self, batch: Batch) -> Batch:
        """Embed a batch as Ray Data gives it; see `embed`."""
        return self.embed(batch)

    def embed(self, batch: Batch) -> Batch:
        """Replace `pixels` and `tokens` by one `<name>_embedding` (B, D) float32 a stored vector.

        A row is NaN where there is none. `images_embedded` (B,) int64 is 1 where the row's own
        image went through the encoder, `images_reused` where the vector is that of an equal one.
        `precision` (B,) is what the encoder multiplied in.
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
        dropped = ("pixels", "tokens", "has_image", "has_text", "image_known", "image_vector")
        kept = {name: column for name, column in batch.items() if name not in dropped}
        kept |= {f"{name}_embedding": rows for name, rows in vectors.items()}
        rows = len(batch["rejected"])
        kept["precision"] = np.full(rows, self.encoder.precision, object)
        kept["embed_s"] = np.full(rows, (time.monotonic() - started) / rows)
        return kept

    def _embed(self, batch: Batch, good: BoolArray) -> dict[str, Any]:
        size = (len(good), self.task.space.dim)
        vectors = {name: np.full(size, np.nan, np.float32) for name in self.task.space.columns}
        embedded = has_image = good & batch["has_image"]
        if self.task.shares_images:
            embedded = self._embed_shared(batch, good, vectors)
        elif good.any():
            pixels = _as_uint8(batch["pixels"][good]) if self.task.loads_images else None
            tokens = batch["tokens"][good] if self.task.loads_texts else None
            masks = batch["has_image"][good], batch["has_text"][good]
            for name, rows in self.encoder.encode_products(pixels, tokens, *masks).items():
                vectors[name][good] = rows
        batch["images_embedded"] = embedded.astype(np.int64)
        batch["images_reused"] = (has_image & ~embedded).astype(np.int64)
        return vectors

    def _embed_shared(self, batch: Batch, good: BoolArray, vectors: dict[str, Any]) -> BoolArray:
        """Fill the vectors of the good rows; return whose own image went through the encoder."""
        rows = np.flatnonzero(good & batch["has_image"])

        def encode(places: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            pixels, all_of = _as_uint8(batch["pixels"][rows[places]]), np.ones(len(places), bool)
            return self.encoder.encode_products(pixels, None, all_of, ~all_of)["image"]

        riding = batch["image_known"][rows], batch["image_vector"][rows]
        images = BatchImages(self.shared, batch["image_content"][rows], riding, encode)
        images.embed_claimed(int(batch["vector_id"][0]))
        if self.task.loads_texts:
            mask = good & batch["has_text"]
            found = self.encoder.encode_products(None, batch["tokens"], ~mask, mask)
            vectors["text"] = found["text"]
        images.await_others()
        vectors["image"][rows] = images.vectors
        embedded = np.zeros(len(good), bool)
        embedded[rows] = images.embedded
        return embedded

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
