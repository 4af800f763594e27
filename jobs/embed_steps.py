"""The steps of the embedding stage, as Ray Data runs them: prepare, embed, write.

Letters: B rows of a batch, N rows of a data file, D dimension, H W pixels, L tokens.
"""

import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from encoders.spec import PreprocessSpec
from jobs.catalog import Catalog
from jobs.config import EmbedConfig
from jobs.diff import locate
from jobs.fetch import fetch_images
from jobs.images import ImageRejected, ImagesConfig, RejectReason, decode_image
from jobs.items import Item, read_items
from jobs.schemas import EMBEDDING_FIELDS, EMBEDDINGS, REJECT, UPSERT
from jobs.store import DataFile, Store

Batch = dict[str, npt.NDArray[Any]]
MIN_NORM, MAX_NORM = 0.99, 1.01


@dataclass(frozen=True, kw_only=True)
class EmbedTask:
    """What the steps of one embedding run share; small, sent to every task once."""

    catalog: Catalog
    images: ImagesConfig
    embed: EmbedConfig
    store: Store
    encoder: str
    preprocess: PreprocessSpec
    generation: int

    @property
    def needs_image(self) -> bool:
        """Whether rows need an image."""
        return "image" in self.embed.fields or "multimodal" in self.embed.fields

    @property
    def needs_text(self) -> bool:
        """Whether rows need a text."""
        return "text" in self.embed.fields or "multimodal" in self.embed.fields

    @property
    def recipe(self) -> str:
        """What is made of the content, as part of its hash."""
        return recipe(self.embed)


def recipe(embed: EmbedConfig) -> str:
    """Name what is made of a row's content: a row of another recipe is embedded again."""
    weight = embed.image_weight if "multimodal" in embed.fields else None
    return f"fields={','.join(sorted(embed.fields))} image_weight={weight}"


def prepare_rows(batch: Batch, *, task: EmbedTask, todo: ray.ObjectRef) -> Iterator[Batch]:
    """Read units of the catalog; fetch, decode and tokenise their planned items.

    Args:
        batch: `unit`: (1,) numbers into `task.catalog.units`.
        task: What to embed with.
        todo: Reference to the planned vector ids, (M,) int64, sorted.

    Yields:
        Batches of B rows: keys, `pixels` (B, H, W, 3) uint8 and `tokens` (B, L) int64 where the
        fields need them, and `reject_reason`, empty where the row is good.
    """
    waiting: list[Item] = []
    todo_ids = ray.get(todo)
    for number in batch["unit"].tolist():
        for items in read_items(task.catalog, task.catalog.units[number], task.recipe):
            _, planned = locate(todo_ids, np.array([i.vector_id for i in items], np.int64))
            waiting += [item for item, wanted in zip(items, planned, strict=True) if wanted]
            while len(waiting) >= task.embed.batch_size:
                yield _prepare(task, waiting[: task.embed.batch_size])
                waiting = waiting[task.embed.batch_size :]
    if waiting:
        yield _prepare(task, waiting)


def _prepare(task: EmbedTask, items: Sequence[Item]) -> Batch:
    rejects: list[ImageRejected | None] = [None] * len(items)
    seconds = {"fetch_s": 0.0, "decode_s": 0.0, "tokenize_s": 0.0}
    batch: Batch = {
        "product_id": np.array([i.product_id for i in items], object),
        "image_number": np.array([i.image_number for i in items], np.int32),
        "vector_id": np.array([i.vector_id for i in items], np.int64),
        "content_hash": np.array([i.content_hash for i in items], np.int64),
        "image_bytes": np.zeros(len(items), np.int64),
    }
    if task.needs_text:
        started = time.monotonic()
        for place, item in enumerate(items):
            rejects[place] = _check_text(item.text, task.catalog.max_text_chars)
        good = [item.text if r is None else "" for item, r in zip(items, rejects, strict=True)]
        batch["tokens"] = _tokenizer(task)(good)
        seconds["tokenize_s"] = time.monotonic() - started
    if task.needs_image:
        _load_pixels(task, items, rejects, batch, seconds)
    batch["reject_reason"] = np.array([str(r.reason) if r else "" for r in rejects], object)
    batch["reject_detail"] = np.array([r.detail if r else "" for r in rejects], object)
    for name, value in seconds.items():  # spread over the rows, so that a sum gives it back
        batch[name] = np.full(len(items), value / len(items))
    return batch


def _check_text(text: str, max_chars: int) -> ImageRejected | None:
    if not text:
        return ImageRejected(RejectReason.EMPTY_TEXT, "all columns of the text template are empty")
    if len(text) > max_chars:
        detail = f"{len(text)} characters, the limit is {max_chars}"
        return ImageRejected(RejectReason.TEXT_TOO_LONG, detail)
    return None


def _load_pixels(
    task: EmbedTask,
    items: Sequence[Item],
    rejects: list[ImageRejected | None],
    batch: Batch,
    seconds: dict[str, float],
) -> None:
    """Fill `pixels`; rows that were rejected before are not fetched."""
    started = time.monotonic()
    wanted = [place for place, reject in enumerate(rejects) if reject is None]
    fetched = fetch_images([items[p].image for p in wanted], task.catalog.root, task.images)
    fetch_end = time.monotonic()
    side = task.preprocess.size_px
    pixels = np.zeros((len(items), side, side, 3), np.uint8)
    for place, data in zip(wanted, fetched, strict=True):
        try:
            pixels[place] = load_pixels(data, task.images, task.preprocess)
            batch["image_bytes"][place] = len(data) if isinstance(data, bytes) else 0
        except ImageRejected as reject:
            rejects[place] = reject
    batch["pixels"] = pixels
    seconds["fetch_s"] = fetch_end - started
    seconds["decode_s"] = time.monotonic() - fetch_end


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
    """Return the encoder's tokenizer, built once a process."""
    if task.encoder not in _tokenizers:
        from encoders.checkpoint import read_checkpoint_config
        from encoders.preprocess import load_tokenizer

        directory = task.store.local_copy(checkpoint_cache(), "checkpoints", task.encoder)
        _tokenizers[task.encoder] = load_tokenizer(read_checkpoint_config(directory)[0])
    return _tokenizers[task.encoder]


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
        directory = task.store.local_copy(checkpoint_cache(), "checkpoints", task.encoder)
        self.encoder = load_encoder(
            directory, precision=task.embed.precision, expected_fingerprint=task.encoder
        )

    def __call__(self, batch: Batch) -> Batch:
        """Replace `pixels` and `tokens` by one `<field>_embedding` (B, D) float32 a field."""
        started = time.monotonic()
        for name in ("reject_reason", "reject_detail"):
            batch[name] = np.array(batch[name], object)  # Ray's own is read-only
        good = batch["reject_reason"] == ""
        vectors = self._embed(batch, good)
        for row in np.flatnonzero(good):
            bad = [n for n, v in vectors.items() if not _is_unit(v[row])]
            if bad:
                batch["reject_reason"][row] = str(RejectReason.BAD_VECTOR)
                batch["reject_detail"][row] = f"the encoder's {bad[0]} vector is not of unit length"
        kept = {k: v for k, v in batch.items() if k not in ("pixels", "tokens")}
        kept |= {f"{name}_embedding": value for name, value in vectors.items()}
        kept["embed_s"] = np.full(len(good), (time.monotonic() - started) / len(good))
        return kept

    def _embed(self, batch: Batch, good: npt.NDArray[np.bool_]) -> dict[str, Any]:
        from encoders.encoder import fuse

        found: dict[str, Any] = {}
        if good.any() and self.task.needs_image:
            found["image"] = self.encoder.encode_images(_as_uint8(batch["pixels"][good]))
        if good.any() and self.task.needs_text:
            # A product's images share its text: embed each text of the batch once.
            texts, places = np.unique(batch["tokens"][good], axis=0, return_inverse=True)
            found["text"] = self.encoder.encode_texts(texts)[places.reshape(-1)]
        if good.any() and "multimodal" in self.task.embed.fields:
            weight = self.task.embed.image_weight
            found["multimodal"] = fuse(found["image"], found["text"], weight)
        vectors: dict[str, Any] = {}
        for name in self.task.embed.fields:
            vectors[name] = np.zeros((len(good), self.encoder.dim), np.float32)
            if good.any():
                vectors[name][good] = found[name]
        return vectors


def _as_uint8(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def _is_unit(vector: npt.NDArray[np.float32]) -> bool:
    return bool(MIN_NORM < float(np.linalg.norm(vector)) < MAX_NORM)


def write_rows(batch: Batch, *, task: EmbedTask) -> pa.Table:
    """Write one data file of the embeddings table; return one small row that describes it."""
    started = time.monotonic()
    rows = len(batch["vector_id"])
    bad = np.array(batch["reject_reason"], object) != ""
    columns: dict[str, Any] = {
        name: batch[name] for name in ("product_id", "image_number", "vector_id", "content_hash")
    }
    columns["generation"] = np.full(rows, task.generation, np.int64)
    columns["operation"] = np.where(bad, REJECT, UPSERT).astype(object)
    columns["encoder"] = np.full(rows, task.encoder, object)
    for name in ("reject_reason", "reject_detail"):
        columns[name] = pa.array(batch[name], pa.string(), mask=~bad)
    for name in EMBEDDING_FIELDS:
        column = f"{name}_embedding"
        columns[column] = _list_array(batch.get(column), bad)
    table = pa.table(
        {
            name: pa.array(columns[name], EMBEDDINGS.field(name).type)
            if not isinstance(columns[name], pa.Array)
            else columns[name]
            for name in EMBEDDINGS.names
        },
        schema=EMBEDDINGS,
    )
    file = write_data_file(task.store, table, task.generation)
    names, counts = np.unique(batch["reject_reason"][bad].astype(str), return_counts=True)
    sums = ("fetch_s", "decode_s", "tokenize_s", "embed_s", "image_bytes")
    row = {name: [batch[name].sum()] for name in sums}
    described = {
        "path": [file.path],
        "size_bytes": [file.size_bytes],
        "rows": [rows],
        "rejected": [int(bad.sum())],
        "reason_names": [names.tolist()],
        "reason_counts": [counts.tolist()],
        "write_s": [time.monotonic() - started],
    }
    return pa.table(row | described)


def _list_array(vectors: npt.NDArray[np.float32] | None, bad: npt.NDArray[np.bool_]) -> pa.Array:
    """Pack (N, D) vectors, rounded to float16, as lists; null where the row is bad."""
    if vectors is None:
        return pa.nulls(len(bad), pa.list_(pa.float32()))
    vectors = np.stack(list(vectors)) if vectors.dtype == object else vectors
    good = vectors[~bad].astype(np.float16).astype(np.float32)
    ends = np.concatenate([[0], np.cumsum(~bad)]).astype(np.int32) * vectors.shape[1]
    offsets = pa.array(ends, mask=np.append(bad, False))
    return pa.ListArray.from_arrays(offsets, pa.array(good.reshape(-1), pa.float32()))


def write_data_file(store: Store, table: pa.Table, generation: int) -> DataFile:
    """Write a table as one Parquet file below the embeddings table; no commit names it yet."""
    name = f"generation-{generation:06d}-{uuid.uuid4().hex}.parquet"
    filesystem = store.filesystem()
    target = store.uri("embeddings", name)
    lists = [f"{field}_embedding.list.element" for field in EMBEDDING_FIELDS]
    with filesystem.open(target, "wb") as handle:
        pq.write_table(
            table,
            handle,
            compression="zstd",
            use_dictionary=["operation", "encoder", "reject_reason"],
            use_byte_stream_split=lists,
        )
    return DataFile(name, filesystem.size(target), table.num_rows)
