"""The last step of the embedding stage: rows in, Parquet files of the embeddings table out.

And all steps in one, as CPUs do them. Letters: N rows of a data file, D dimension.
"""

import os
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from jobs.embed_steps import Batch, BoolArray, Embedder, EmbedTask, prepare_rows
from jobs.images import hash_limits
from jobs.schemas import DELETE, EMBEDDING_FIELDS, EMBEDDINGS, PRECISIONS, REJECT, UPSERT
from jobs.storage import storage_errors
from jobs.store import DataFile, Store

HASHES = ("image_hash", "text_hash", "etag_hash", "image_content")
IMAGE_COUNTS = ("images_embedded", "images_reused")
COUNTS = (*IMAGE_COUNTS, *(f"rows_{name}" for name in PRECISIONS))


class PieceEmbedder:
    """All steps in an actor on CPUs: what comes and goes are pieces of work and names of files.

    A process that only writes would have to import all that writing needs, on the same cores.
    """

    def __init__(self, task: EmbedTask, threads: int, todo: list[ray.ObjectRef]) -> None:
        """Load the encoder from the store.

        Args:
            task: What to embed with.
            threads: CPU threads of the forward pass.
            todo: See `prepare_rows`.
        """
        self.task, self.todo = task, todo
        self.embedder = Embedder(task, threads, on_gpu=False)

    def __call__(self, piece: Batch) -> Iterator[pa.Table]:
        """Embed a piece of work in batches of `embed.batch_size`, and write what comes of it.

        Args:
            piece: See `prepare_rows`.

        Yields:
            See `write_rows`, for each data file of at most `embed.rows_per_file` rows; nothing
            where the catalog has none of the rows any more.
        """
        prepared = prepare_rows(piece, task=self.task, todo=self.todo)
        embedded = (self.embedder.embed(batch) for batch in prepared)
        for rows in gather_rows(embedded, self.task.embed.rows_per_file):
            yield write_rows(rows, task=self.task)


def gather_rows(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    """Yield the rows of batches of equal columns in batches of `most`; the last may have fewer."""
    held: list[Batch] = []
    room = most
    for batch in batches:
        start, rows = 0, len(batch["vector_id"])
        while start < rows:
            stop = min(rows, start + room)
            held.append({name: column[start:stop] for name, column in batch.items()})
            start, room = stop, room - (stop - start)
            if room == 0:
                yield _join(held)
                held, room = [], most
    if held:
        yield _join(held)


def _join(batches: list[Batch]) -> Batch:
    return {name: np.concatenate([one[name] for one in batches]) for name in batches[0]}


def write_rows(batch: Batch, *, task: EmbedTask) -> pa.Table:
    """Write one data file of the embeddings table; return one small row that describes it.

    Among it, how many images went through the encoder, and how many have an equal one's vector;
    in which precision; and which process wrote it when.
    """
    started, began_at = time.monotonic(), time.time()
    rows = len(batch["vector_id"])
    bad = np.array(batch["rejected"], bool)
    reasons = np.array(batch["reject_reason"], object)
    columns: dict[str, Any] = {
        name: batch[name] for name in ("product_id", "image_number", *HASHES, "vector_id")
    }
    now_us = time.time_ns() // 1000
    columns["written_at"] = np.full(rows, now_us, np.int64)
    columns["first_seen"] = _seen(batch["first_seen"], bad, now_us)
    limits = hash_limits(task.images, task.catalog.max_text_chars)
    columns["limits_hash"] = np.full(rows, limits, np.int64)
    columns["attempts"] = pa.array(batch["attempts"] + 1, pa.int32(), mask=~bad)
    columns["generation"] = np.full(rows, task.generation, np.int64)
    columns["operation"] = np.where(bad, REJECT, UPSERT).astype(object)
    columns["encoder"] = np.full(rows, task.space.encoder, object)
    precision = np.array(batch["precision"], object)
    columns["precision"] = pa.array(precision, pa.string(), mask=bad)
    for name in ("reject_reason", "reject_detail"):
        columns[name] = pa.array(batch[name], pa.string(), mask=reasons == "")
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
    names, counts = np.unique(reasons[bad].astype(str), return_counts=True)
    sums = ("fetch_s", "decode_s", "tokenize_s", "embed_s", "image_bytes", *IMAGE_COUNTS)
    row = {name: [batch[name].sum()] for name in sums}
    described = {
        "path": [file.path],
        "size_bytes": [file.size_bytes],
        "rows": [rows],
        "rejected": [int(bad.sum())],
        "reason_names": pa.array([names.tolist()], pa.list_(pa.string())),
        "reason_counts": pa.array([counts.tolist()], pa.list_(pa.int64())),
        **{f"rows_{name}": [int((~bad & (precision == name)).sum())] for name in PRECISIONS},
        "began_at": [began_at],
        "write_s": [time.monotonic() - started],
        "node": [ray.util.get_node_ip_address()],
        "pid": [os.getpid()],
    }
    return pa.table(row | described)


def _seen(before: npt.NDArray[np.int64], bad: BoolArray, now_us: int) -> pa.Array:
    """Return when each reject was refused first; null for live rows."""
    seen = pa.array(np.where(before > 0, before, now_us), mask=~bad)
    return seen.cast(pa.timestamp("us", "UTC"))


def _list_array(vectors: npt.NDArray[np.float32] | None, bad: BoolArray) -> pa.Array:
    """Pack (N, D) vectors, rounded to float16, as lists; null where the row is bad or NaN."""
    if vectors is None:
        return pa.nulls(len(bad), pa.list_(pa.float32()))
    vectors = np.stack(list(vectors)) if vectors.dtype == object else vectors
    bad = bad | np.isnan(vectors).any(axis=1)
    good = vectors[~bad].astype(np.float16).astype(np.float32)
    ends = np.concatenate([[0], np.cumsum(~bad)]).astype(np.int32) * vectors.shape[1]
    offsets = pa.array(ends, mask=np.append(bad, False))
    return pa.ListArray.from_arrays(offsets, pa.array(good.reshape(-1), pa.float32()))


def write_deletes(store: Store, vector_ids: npt.NDArray[np.int64], task: EmbedTask) -> DataFile:
    """Write delete rows of vector ids; return the file.

    Args:
        store: The store.
        vector_ids: (N,) int64.
        task: Names generation and encoder.
    """
    rows = len(vector_ids)
    columns = {
        "vector_id": pa.array(vector_ids),
        "generation": pa.array(np.full(rows, task.generation, np.int64)),
        "operation": pa.array([DELETE] * rows),
        "written_at": pa.array(np.full(rows, time.time_ns() // 1000)).cast(
            EMBEDDINGS.field("written_at").type
        ),
        "encoder": pa.array([task.space.encoder] * rows),
    }
    table = pa.table(
        {f.name: columns.get(f.name, pa.nulls(rows, f.type)) for f in EMBEDDINGS}, EMBEDDINGS
    )
    return write_data_file(store, table, task.generation)


def write_data_file(store: Store, table: pa.Table, generation: int) -> DataFile:
    """Write a table as one Parquet file below the embeddings table; no commit names it yet.

    Its name begins with the generation and the smallest vector id: files are read in the order of
    their names, and so the same work gives the same index file, whoever was done first.

    Raises:
        StoreError: It can't be written.
    """
    first = pc.min(table["vector_id"]).as_py() or 0
    name = f"generation-{generation:06d}-{first:016x}-{uuid.uuid4().hex}.parquet"
    target = store.uri("embeddings", name)
    lists = [f"{field}_embedding.list.element" for field in EMBEDDING_FIELDS]
    with storage_errors(target, "written"):
        filesystem = store.filesystem()
        with filesystem.open(target, "wb") as handle:
            pq.write_table(
                table,
                handle,
                compression="zstd",
                use_dictionary=["operation", "encoder", "precision", "reject_reason"],
                use_byte_stream_split=lists,
            )
        return DataFile(name, filesystem.size(target), table.num_rows)
