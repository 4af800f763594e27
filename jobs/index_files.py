"""The files of a field's index: what the manifest says of them, how they are written and opened.

A field's index is one partition, or several: ranges of vector ids, filled from one trained
template. Each partition is a whole FAISS file, with a refine store beside it where the spec asks
for one. Files may lie in the folder of an earlier run.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from indexing.build import read_index, share_quantizer
from indexing.refine import open_refine
from indexing.search import Partition, SearchPoint
from indexing.spec import IndexSpec
from jobs.buckets import number_buckets
from jobs.errors import StoreError
from jobs.store import Store, scratch_folder

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class IndexFile:
    """A written file.

    Attributes:
        folder: Name of the folder below `indexes/`: of the run that wrote it.
        sha256: Hex: FAISS notices no flipped byte.
    """

    folder: str
    file: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class PartitionFiles:
    """One partition of an index.

    Attributes:
        refine: Its vectors to re-rank with, if the spec has them.
    """

    ntotal: int
    codes: IndexFile
    refine: IndexFile | None


@dataclass(frozen=True, kw_only=True)
class FieldFiles:
    """All files of one field's index.

    Attributes:
        template: The trained index without a vector: what an update fills.
        partitions: A power of two of them, by range of vector ids.
    """

    spec: IndexSpec
    template: IndexFile
    partitions: tuple[PartitionFiles, ...]

    @property
    def ntotal(self) -> int:
        """How many vectors the index holds."""
        return sum(part.ntotal for part in self.partitions)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that serving opens."""
        return sum(file.size_bytes for file in self.served)

    @property
    def served(self) -> list[IndexFile]:
        """The files that serving opens: all but the template."""
        found = [(part.codes, part.refine) for part in self.partitions]
        return [file for pair in found for file in pair if file is not None]


def read_files(entry: Mapping[str, Any]) -> FieldFiles:
    """Read what a manifest says of a field's files.

    Raises:
        StoreError: It is no such entry.
    """
    try:
        partitions = [
            PartitionFiles(
                ntotal=part["ntotal"],
                codes=IndexFile(**part["codes"]),
                refine=None if part["refine"] is None else IndexFile(**part["refine"]),
            )
            for part in entry["partitions"]
        ]
        template = IndexFile(**entry["template"])
        spec = IndexSpec(**entry["spec"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"a damaged manifest: its entry of an index has no {error}") from error
    return FieldFiles(spec=spec, template=template, partitions=tuple(partitions))


def read_point(entry: Mapping[str, Any]) -> SearchPoint:
    """Read the operating point that a manifest gives for a field.

    Raises:
        StoreError: It has none.
    """
    try:
        return SearchPoint(**entry["point"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"a damaged manifest: its entry of an index has no {error}") from error


def upload_file(store: Store, path: Path, sha256: str, folder: str, name: str) -> IndexFile:
    """Put a written file below `indexes/` in the store."""
    store.upload(path, "indexes", folder, name)
    size = path.stat().st_size
    return IndexFile(folder=folder, file=name, sha256=sha256, size_bytes=size)


def join_files(written: list[tuple[IndexFile, int]], count: int) -> tuple[PartitionFiles, ...]:
    """Join the files of partitions.

    Args:
        written: Of each partition its codes, then, if there are any, of each its refine store:
            the file, and how many vectors it holds.
        count: How many partitions there are.

    Raises:
        StoreError: The two files of a partition hold different numbers of vectors.
    """
    codes = written[:count]
    refines: list[tuple[IndexFile, int] | None] = [*written[count:]] or [None] * count
    partitions = []
    for (file, ntotal), refine in zip(codes, refines, strict=True):
        if refine is not None and refine[1] != ntotal:
            raise StoreError(
                f"index {file.folder}/{file.file} holds {ntotal} vectors, its refine store "
                f"{refine[1]}; `vitrine reindex` builds another from the stored vectors"
            )
        partitions.append(
            PartitionFiles(ntotal=ntotal, codes=file, refine=refine[0] if refine else None)
        )
    return tuple(partitions)


@contextmanager
def fetched(store: Store, file: IndexFile) -> Iterator[Path]:
    """Give a local path of a file; what is fetched is deleted after the block.

    A file that is mapped into memory in the block stays readable: it has lost its name alone.

    Raises:
        StoreError: The file is missing or, by the block's own checks (ValueError), damaged.
    """
    scratch = scratch_folder("index")
    try:
        yield store.local_copy(scratch, "indexes", file.folder, file.file)
    except ValueError as error:
        raise StoreError(f"{store.uri('indexes', file.folder)}: {error}") from error
    finally:
        shutil.rmtree(scratch)


def open_index(store: Store, file: IndexFile, *, mapped: bool) -> faiss.Index:
    """Open a FAISS file once its bytes are proved unchanged.

    Args:
        store: The store.
        file: The file.
        mapped: Whether to map it into memory, to be searched alone; else it is read, and is the
            caller's to change.

    Raises:
        StoreError: The file is missing or damaged.
    """
    with fetched(store, file) as path:
        return read_index(path, sha256=file.sha256, mapped=mapped)


def open_partition(store: Store, spec: IndexSpec, files: PartitionFiles) -> Partition:
    """Open a partition to search it: mapped into memory, read only.

    Raises:
        StoreError: A file is missing or damaged.
    """
    index = open_index(store, files.codes, mapped=True)
    if files.refine is None or spec.refine == "none":
        return Partition(index, None)
    with fetched(store, files.refine) as path:
        sha256 = files.refine.sha256
        return Partition(index, open_refine(path, kind=spec.refine, dim=spec.dim, sha256=sha256))


def open_partitions(store: Store, files: FieldFiles) -> list[Partition]:
    """Open a field's whole index; its partitions share one coarse quantizer in memory.

    Raises:
        StoreError: A file is missing or damaged.
    """
    opened = [open_partition(store, files.spec, part) for part in files.partitions]
    share_quantizer(opened[0].index, [part.index for part in opened[1:]])
    return opened


def count_partitions(ntotal: int, most: int) -> int:
    """Return the smallest power of two of partitions that hold at most so many vectors each.

    Args:
        ntotal: Vectors in all; ids are spread evenly, so that partitions hardly differ.
        most: `index.max_partition_vectors`.
    """
    partitions = 1
    while partitions * most < ntotal:
        partitions *= 2
    return partitions


def partition_range(number: int, partitions: int) -> tuple[int, int]:
    """Return the ids of a partition: from the first on, and under the second."""
    width = 2**63 // partitions
    return number * width, (number + 1) * width


def in_partition(vector_ids: Int64Array, number: int, partitions: int) -> BoolArray:
    """Mark the (N,) ids that belong to a partition."""
    inside: BoolArray = number_buckets(vector_ids, partitions) == number
    return inside
