"""The Ray tasks that make an index: train, add, merge or update; one field at a time.

A part that is added is spilled to the store, so that a build that is killed goes on from the parts
that are whole, and merging holds one partition in memory whatever the size of the catalog.

Letters: N rows, D dimension.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import ray
from threadpoolctl import threadpool_limits

from indexing.build import (
    append_vectors,
    check_unique,
    move_vectors,
    read_partial,
    stored_ids,
    take_range,
    template_hash,
    train_index,
    write_index,
    write_partial,
)
from indexing.files import check_file
from indexing.refine import (
    encode_refine,
    kept_blocks,
    open_refine,
    refine_code_bytes,
    stored_blocks,
    write_refine,
)
from indexing.spec import IndexSpec
from indexing.update import update_index
from jobs.buckets import Records
from jobs.errors import StoreError
from jobs.index_files import (
    FieldFiles,
    IndexFile,
    PartitionFiles,
    fetched,
    in_partition,
    open_index,
    partition_range,
    upload_file,
)
from jobs.partials import Partial, fetched_partial, find_partial, make_key, put_partial
from jobs.space import VectorField
from jobs.store import Store, scratch_folder
from jobs.tasks import run_telling
from jobs.vectors import Draw, Float32Array, Int64Array, join_sample, read_blocks

TEMPLATE = "template.faiss"
TRAINS_ON_GPUS = hasattr(faiss, "StandardGpuResources")  # a build of FAISS with GPUs
BLOCK_ROWS = 65_536

Blocks = Iterator[tuple[Int64Array, npt.NDArray[np.uint8]]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where an index is written.

    Attributes:
        folder: Below `indexes/`.
        partitions: How many files the index has: a power of two.
    """

    store: Store
    field: VectorField
    spec: IndexSpec
    folder: str
    partitions: int

    def file(self, number: int, kind: str = "faiss") -> str:
        """Name a file of a partition."""
        if self.partitions == 1:
            return f"{self.field.name}.{kind}"
        return f"{self.field.name}-{number:05d}.{kind}"


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What an update takes from an index.

    Attributes:
        stale: References to `STALE_DTYPE` rows.
        mark: The flag of those that this index has.
        added: How many vectors come.
    """

    base: FieldFiles
    stale: list[Any]
    mark: str
    added: int


@ray.remote(num_returns="streaming", max_retries=0)  # `jobs.tasks.watch` tries again
def train(
    target: Target, draw: Draw, threads: int, *parts: tuple[Int64Array, Float32Array]
) -> Iterator[Any]:
    """Train on this task's cores, or find what an earlier try trained on the same sample.

    The sample is sorted by id, so that the order is always one.

    Yields:
        Words that say how far it is; at last the template, and the name of the part that it was
        spilled as.
    """
    yield from run_telling(lambda tell: _train(target, draw, threads, tell, parts))


def _train(
    target: Target,
    draw: Draw,
    threads: int,
    tell: Callable[[str], None],
    parts: tuple[tuple[Int64Array, Float32Array], ...],
) -> tuple[IndexFile, str]:
    faiss.omp_set_num_threads(threads)
    ids, vectors = join_sample(parts, draw)
    sample = vectors.reshape(-1, target.spec.dim)
    tell(f"{target.field.name}: train on {len(sample):,} rows")
    key = make_key(repr(target.spec), str(draw.seed), ids.data, sample.data)
    scratch = scratch_folder("train")
    try:
        path, name = scratch / TEMPLATE, f"{target.field.name}.{TEMPLATE}"
        partial = find_partial(target.store, key)
        if partial is None:

            def progress(step: str, done: int, total: int) -> None:
                tell(f"{target.field.name}: train {step}, {done} of {total}")

            with threadpool_limits(threads):  # BLAS too: the workers' environment gives it one
                template = train_index(target.spec, sample, seed=draw.seed, progress=progress)
            sha256 = write_index(template, path)
            put_partial(target.store, key, [(path, sha256)], [])
        else:
            with fetched_partial(target.store, partial, TEMPLATE) as (found, sha256):
                check_file(found, sha256=sha256)
                shutil.copyfile(found, path)
        return upload_file(target.store, path, sha256, target.folder, name), key
    finally:
        shutil.rmtree(scratch)


@ray.remote(num_cpus=1)
def add(
    target: Target,
    template: IndexFile,
    files: tuple[int, list[str]],
    mark: str | None,
    *parts: Records,
) -> Partial:
    """Fill a clone of the template with a group's live rows, or with those that have a mark."""
    faiss.omp_set_num_threads(1)
    rows = np.concatenate(parts)
    rows = rows if mark is None else rows[rows[mark]]
    rows = rows[rows["first"]] if target.field.name == "text" else rows
    if not len(rows):
        return Partial(key="", files=(), counts=(0,) * target.partitions)
    order = np.argsort(rows["vector_id"])
    content = [rows[name][order].tobytes() for name in ("vector_id", "generation")]
    key = make_key(template.sha256, repr((target.field, target.spec, target.partitions)), *content)
    found = find_partial(target.store, key)
    if found is not None:
        return found
    scratch = scratch_folder("add")
    try:
        return _fill(target, template, files, rows, key, scratch)
    finally:
        shutil.rmtree(scratch)


def _fill(
    target: Target,
    template: IndexFile,
    files: tuple[int, list[str]],
    rows: Records,
    key: str,
    scratch: Path,
) -> Partial:
    index = open_index(target.store, template, mapped=False)
    seal = template_hash(index)
    refine, dim = target.spec.refine, target.spec.dim
    ids, done = np.zeros(len(rows), np.int64), 0
    width = refine_code_bytes(refine, dim)
    codes = np.lib.format.open_memmap(
        scratch / "codes.npy", "w+", np.uint8, (len(rows) if width else 0, width)
    )
    for block, vectors in read_blocks(target.store, target.field, files, rows):
        append_vectors(index, block, vectors)
        ids[done : done + len(block)] = block
        if width:
            codes[done : done + len(block)] = encode_refine(refine, vectors)
        done += len(block)
    written, counts = [], []
    for number in range(target.partitions):
        part = _take_partition(index, number, target.partitions)
        counts.append(part.ntotal)
        if not part.ntotal:
            continue
        path = scratch / target.file(number)
        written.append((path, write_partial(part, path, template_sha256=seal)))
        if width:
            path = scratch / target.file(number, "refine")
            blocks = _Blocks(ids, codes, number, target.partitions)
            sha256 = write_refine(path, refine, dim, [blocks], part.ntotal)
            written.append((path, sha256))
    return put_partial(target.store, key, written, counts)


def _take_partition(index: faiss.Index, number: int, partitions: int) -> faiss.Index:
    if partitions == 1:
        return index  # all of it, without a copy
    return take_range(index, *partition_range(number, partitions))


@dataclass(frozen=True)
class _Blocks:
    """The rows of one partition among those that were added; can be iterated again."""

    ids: Int64Array
    codes: npt.NDArray[np.uint8]
    number: int
    partitions: int

    def __iter__(self) -> Blocks:
        """Yield ids and codes, a block at a time."""
        for start in range(0, len(self.ids), BLOCK_ROWS):
            ids = self.ids[start : start + BLOCK_ROWS]
            mine = in_partition(ids, self.number, self.partitions)
            yield ids[mine], self.codes[start : start + BLOCK_ROWS][mine]


@ray.remote(num_cpus=1)
def merge_codes(
    target: Target,
    template: IndexFile,
    number: int,
    changes: Changes | None,
    *partials: Partial,
) -> tuple[IndexFile, int]:
    """Join the codes of one partition of all parts, with what an update keeps of the base.

    One part is in memory at a time, beside the partition.

    Returns:
        The written file, and how many vectors it holds.
    """
    faiss.omp_set_num_threads(1)
    scratch = scratch_folder("merge")
    try:
        removed = _removed_ids(changes, number, target.partitions)
        index = _merge_codes(target, template, number, changes, removed, partials)
        path = scratch / target.file(number)
        sha256 = write_index(index, path)
        written = upload_file(target.store, path, sha256, target.folder, path.name)
        return written, index.ntotal
    finally:
        shutil.rmtree(scratch)


@ray.remote(num_cpus=1)
def merge_refine(
    target: Target, number: int, changes: Changes | None, *partials: Partial
) -> tuple[IndexFile, int]:
    """Join the re-rank stores of one partition, as `merge_codes` does its codes."""
    kind, dim = target.spec.refine, target.spec.dim
    scratch = scratch_folder("merge-refine")
    try:
        parts, count = _kept_refine(target, number, changes)
        name = target.file(number, "refine")
        for partial in partials:
            if partial.counts[number]:
                with fetched_partial(target.store, partial, name) as (path, sha256):
                    store = open_refine(path, kind=kind, dim=dim, sha256=sha256)
                parts.append(stored_blocks(store))
                count += partial.counts[number]
        path = scratch / name
        sha256 = write_refine(path, kind, dim, parts, count)
        return upload_file(target.store, path, sha256, target.folder, name), count
    finally:
        shutil.rmtree(scratch)


def _kept_refine(target: Target, number: int, changes: Changes | None) -> tuple[list[Any], int]:
    if changes is None:
        return [], 0
    base = _base_partition(changes, number, target.partitions).refine
    if base is None:
        raise ValueError("the base has no refine store")
    with fetched(target.store, base) as path:
        old = open_refine(path, kind=target.spec.refine, dim=target.spec.dim, sha256=base.sha256)
    removed = _removed_ids(changes, number, target.partitions)
    kept = kept_blocks(old, removed, *partition_range(number, target.partitions))
    return [kept], len(kept)


def _removed_ids(changes: Changes | None, number: int, partitions: int) -> Int64Array:
    removed = [np.zeros(0, np.int64)]
    for reference in changes.stale if changes else []:
        rows = ray.get(reference)
        ids = rows["vector_id"][rows[changes.mark]] if changes else removed[0]
        removed.append(ids[in_partition(ids, number, partitions)])
    return np.concatenate(removed)


def _base_partition(changes: Changes, number: int, partitions: int) -> PartitionFiles:
    """Return the base's partition that has these ids; it may have been split since."""
    return changes.base.partitions[number * len(changes.base.partitions) // partitions]


def _merge_codes(
    target: Target,
    template: IndexFile,
    number: int,
    changes: Changes | None,
    removed: Int64Array,
    partials: tuple[Partial, ...],
) -> faiss.Index:
    store, empty = target.store, open_index(target.store, template, mapped=False)
    index, seal = empty, template_hash(empty)
    if changes is not None:
        base = _base_partition(changes, number, target.partitions)
        index = open_index(store, base.codes, mapped=False)
        low, high = partition_range(number, target.partitions)
        try:
            update_index(index, removed, [], low=low, high=high)
        except ValueError as error:
            raise StoreError(
                f"{store.uri('indexes', base.codes.folder, base.codes.file)} doesn't fit its "
                f"release ({error}); `vitrine reindex` builds another from the stored vectors"
            ) from error
        if template_hash(index) != seal:
            raise StoreError(
                f"{store.uri('indexes', base.codes.folder, base.codes.file)} stems from another "
                f"template than {template.file} of its release"
            )
    for partial in partials:
        if partial.counts[number]:
            name = target.file(number)
            with fetched_partial(store, partial, name) as (path, sha256):
                part = read_partial(path, empty, sha256=sha256, template_sha256=seal)
            move_vectors([index, part])
    try:
        check_unique(stored_ids(index))
    except ValueError as error:
        raise StoreError(f"the parts of index {target.field.name} overlap: {error}") from error
    return index
