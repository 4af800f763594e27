"""The embedding stage: catalog rows in, committed Parquet files of the embeddings table out.

One streaming Ray Data execution: read units -> fetch, decode, tokenise (CPU tasks) -> embed
(actors) -> write a data file (tasks); the driver commits the files as they come.
"""

import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from encoders.spec import PreprocessSpec
from jobs.catalog import Catalog, Item, read_items
from jobs.cluster import cluster_cpus, cluster_gpus, job_error
from jobs.config import EmbedConfig, JobConfig
from jobs.diff import Diff, locate
from jobs.errors import JobError
from jobs.fetch import fetch_images
from jobs.images import ImageRejected, ImagesConfig, RejectReason, decode_image
from jobs.schemas import DELETE, EMBEDDING_FIELDS, EMBEDDINGS, REJECT, UPSERT
from jobs.store import DataFile, Store

Batch = dict[str, npt.NDArray[Any]]
CPU_ACTOR_SLOTS = 0.75
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


@dataclass
class EmbedResult:
    """What an embedding run did. Counts are rows, times are seconds."""

    embedded: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0
    image_bytes: int = 0


def embed_items(task: EmbedTask, diff: Diff, progress: Callable[[int, int], None]) -> EmbedResult:
    """Embed what the diff names and commit it to the embeddings table as it comes.

    Args:
        task: What to embed with.
        diff: Which items; removed ones get a delete row.
        progress: Called with (rows done, of them rejected) whenever files are committed.

    Returns:
        Counts and times. The vectors never pass through this process.

    Raises:
        JobError: A step failed; what was committed before stays, and the next run goes on.
    """
    started, result = time.monotonic(), EmbedResult()
    pending: list[DataFile] = []
    last_commit = started
    try:
        for row in _written_files(task, diff) if len(diff.todo) else ():
            pending.append(DataFile(row["path"], row["size_bytes"], row["rows"]))
            _count(result, row)
            if time.monotonic() - last_commit >= task.embed.commit_interval_s:
                task.store.commit_embeddings(pending)
                pending, last_commit = [], time.monotonic()
            progress(result.embedded + result.rejected, result.rejected)
    except ray.exceptions.RayError as error:
        cause = job_error(error)
        if isinstance(cause, JobError):
            raise cause from error
        raise
    if len(diff.removed):
        pending.append(_write_deletes(task, diff))
    if pending:
        task.store.commit_embeddings(pending)
    result.wall_s = time.monotonic() - started
    return result


def _count(result: EmbedResult, row: dict[str, Any]) -> None:
    result.embedded += row["rows"] - row["rejected"]
    result.rejected += row["rejected"]
    result.image_bytes += row["image_bytes"]
    result.reasons.update(dict(zip(row["reason_names"], row["reason_counts"], strict=True)))
    for name in ("fetch_s", "decode_s", "tokenize_s", "embed_s", "write_s"):
        result.seconds[name] += row[name]


def _written_files(task: EmbedTask, diff: Diff) -> Iterator[dict[str, Any]]:
    """Run the pipeline; yield one small row a written data file."""
    _set_data_context()
    gpus = cluster_gpus()
    actors = task.embed.actors or gpus or cluster_cpus()
    # On CPUs the same slots everywhere, so that Ray fuses decoding into the actors and no pixel
    # crosses the object store; 0.75 leaves the writing tasks room. A GPU is fed by its own tasks.
    reading = {"num_cpus": 1.0 if gpus else CPU_ACTOR_SLOTS}
    embedding = {"num_gpus": 1} if gpus else reading
    threads = 1 if gpus else max(1, cluster_cpus() // actors)
    todo = ray.put(diff.todo)
    units = [{"unit": number} for number in range(len(task.catalog.units))]
    dataset: Dataset = (
        ray.data.from_items(units, override_num_blocks=len(units))
        .map_batches(
            prepare_rows,
            batch_size=1,
            fn_kwargs={"task": task, "todo": todo},
            **reading,
        )
        .map_batches(
            Embedder,
            batch_size=task.embed.batch_size,
            compute=ActorPoolStrategy(size=actors),
            fn_constructor_args=(task, threads),
            **embedding,
        )
        .map_batches(
            write_rows, batch_size=task.embed.rows_per_file, fn_kwargs={"task": task}, num_cpus=0.25
        )
    )
    yield from dataset.iter_rows()


def _set_data_context() -> None:
    context = DataContext.get_current()
    for name, value in (
        ("target_max_block_size", 32 * 2**20),
        ("max_errored_blocks", 0),  # bad rows are ours to keep, Ray would drop whole blocks
        ("enable_progress_bars", False),
        ("execution_no_progress_timeout_s", -1),
        ("print_on_execution_start", False),
    ):
        if not hasattr(context, name):
            raise JobError(f"this version of Ray ({ray.__version__}) has no DataContext.{name}")
        setattr(context, name, value)


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


def _write_deletes(task: EmbedTask, diff: Diff) -> DataFile:
    rows = len(diff.removed)
    columns = {
        "vector_id": pa.array(diff.removed),
        "generation": pa.array(np.full(rows, task.generation, np.int64)),
        "operation": pa.array([DELETE] * rows),
        "encoder": pa.array([task.encoder] * rows),
        "content_hash": pa.array(np.zeros(rows, np.int64)),
    }
    table = pa.table(
        {f.name: columns.get(f.name, pa.nulls(rows, f.type)) for f in EMBEDDINGS}, EMBEDDINGS
    )
    return write_data_file(task.store, table, task.generation)


def embed_task(
    config: JobConfig,
    catalog: Catalog,
    store: Store,
    encoder: str,
    preprocess: PreprocessSpec,
    generation: int,
) -> EmbedTask:
    """Gather what the steps share."""
    return EmbedTask(
        catalog=catalog,
        images=config.images,
        embed=config.embed,
        store=store,
        encoder=encoder,
        preprocess=preprocess,
        generation=generation,
    )
