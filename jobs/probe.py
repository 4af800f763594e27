"""Searches the partitions of a written index, a task each, and joins what they found.

Letters: Q queries, D dimension, K neighbours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import ray

from indexing.build import list_sizes, stored_ids
from indexing.metrics import recall_at_k
from indexing.search import Partition, SearchPoint, group_by_product, merge_topk, search_partition
from indexing.spec import IndexSpec
from indexing.tune import (
    model_costs,
    rerank_depths,
    sweep_partition,
    time_point,
)
from indexing.update import quantization_error
from jobs.buckets import Records
from jobs.ids_table import Ids
from jobs.index_files import FieldFiles, in_partition, open_partition, partition_range
from jobs.index_memory import ask, options, search_bytes
from jobs.labelled import Labelled
from jobs.live import Live
from jobs.nodes import cluster_cpus
from jobs.storage import machine_cache
from jobs.store import Store
from jobs.tasks import gather, gather_bounded

MEASURED_K = 10
TIE = 1e-6
MAX_THREADS = 4
SWEPT_CODES = 10**9  # most codes that the widest point of a sweep compares, over all queries

BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Found = tuple[Float32Array, Int64Array]
"""Scores (Q, K) float32, best first, and vector ids (Q, K) int64, padded with -1."""


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What an index is measured with.

    Attributes:
        ids: (S,) int64, the sampled vectors' ids, then -1 for each labelled query.
        vectors: (Q, D) float32 unit rows of both.
        exact: What exact search finds for all of them, `MEASURED_K` + 1 neighbours.
        sampled: S.
        base: The newest release's files of the same vector space and its point, or None.
    """

    live: Live
    mark: str | None
    ids: Int64Array
    vectors: Float32Array
    exact: Found
    sampled: int
    labelled: Labelled | None
    target_intersection: float
    base: tuple[FieldFiles, SearchPoint] | None

    @property
    def clear(self) -> BoolArray:
        """Mark the queries whose ten nearest are defined; all of a kind if none of it is."""
        scores = self.exact[0]
        gaps = scores[:, MEASURED_K - 1] - scores[:, MEASURED_K] > TIE
        for kind in (slice(self.sampled), slice(self.sampled, None)):
            gaps[kind] |= not gaps[kind].any()
        return gaps


@dataclass(frozen=True, kw_only=True)
class Part:
    """One partition of an index, as a task searches it on some threads."""

    store: Store
    files: FieldFiles
    number: int
    threads: int

    def open(self) -> Partition:
        """Open it in this process, whose FAISS uses so many threads then."""
        faiss.omp_set_num_threads(self.threads)
        return open_partition(self.store, self.files.spec, self.files.partitions[self.number])


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What one partition gave, or several together.

    Attributes:
        found: At each point, by the sampled queries and then the labelled ones.
        costs: Bytes that a query touches at each point.
    """

    found: dict[SearchPoint, Found]
    costs: dict[SearchPoint, float]
    list_sizes: Int64Array
    quantization_error: float
    missing: int
    extra: int

    def join(self, other: "Swept") -> "Swept":
        """Return what two sets of partitions gave together."""
        return Swept(
            found={
                point: merge_topk([found, other.found[point]], MEASURED_K)
                for point, found in self.found.items()
            },
            costs={point: cost + other.costs[point] for point, cost in self.costs.items()},
            list_sizes=self.list_sizes + other.list_sizes,
            quantization_error=self.quantization_error,  # of the template, which they share
            missing=self.missing + other.missing,
            extra=self.extra + other.extra,
        )


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What one partition gave at the points of a curve, or several together.

    Attributes:
        times: Of each point, p50 and p99 in milliseconds, and queries a second; of several
            partitions the slowest's.
        found: At the operating point, by the sampled queries, themselves included.
        labelled: At each point, by the labelled queries, as for ten products.
    """

    times: list[tuple[float, float, float]]
    found: Found
    labelled: list[Found]

    def join(self, other: "Examined") -> "Examined":
        """Return what two sets of partitions gave together."""
        times, labelled = (
            zip(self.times, other.times, strict=True),
            zip(self.labelled, other.labelled, strict=True),
        )
        return Examined(
            times=[
                (max(one[0], two[0]), max(one[1], two[1]), min(one[2], two[2]))
                for one, two in times
            ],
            found=merge_topk([self.found, other.found], MEASURED_K),
            labelled=[merge_topk(list(both), both[0][1].shape[1]) for both in labelled],
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Starts the tasks that search an index's partitions.

    Attributes:
        asked: Reference to the queries' vectors.
    """

    store: Store
    queries: Queries
    asked: Any

    @property
    def depth(self) -> int:
        """How many vectors are looked at for ten products: images of one share a place."""
        rows = self.queries.live.rows
        images = 1 if self.queries.mark else round(rows.vectors / max(1, rows.products))
        return 4 * MEASURED_K * max(1, images)

    def sweep(self, files: FieldFiles) -> Swept:
        """Search every partition at every point; two partitions' answers are held at once."""
        spans = gather([_span.remote(rows) for rows in self.queries.live.buckets])
        count, own = len(files.partitions), self.queries.ids

        def live_in(number: int) -> tuple[Any, ...]:
            first, last = partition_range(number, count)
            inside = [
                rows
                for rows, span in zip(self.queries.live.buckets, spans, strict=True)
                if span is not None and span[0] < last and span[1] >= first
            ]
            return own, (inside, self.queries.mark)

        joined: Swept = reduce(Swept.join, self._each(files, _sweep, live_in))
        return joined

    def examine(self, files: FieldFiles, points: list[SearchPoint], best: SearchPoint) -> Examined:
        """Time each point of a curve, and search: what is found depends on no clock."""
        parts = self._each(files, _examine, lambda _: (points, best, self.depth))
        joined: Examined = reduce(Examined.join, parts)
        return joined

    def search(self, files: FieldFiles, point: SearchPoint) -> Found:
        """Search all partitions at one point with the sampled queries, themselves included."""
        parts = self._each(files, _search, lambda _: (point,))
        found: Found = reduce(lambda one, other: merge_topk([one, other], MEASURED_K), parts)
        return found

    def _each(
        self,
        files: FieldFiles,
        task: Any,  # noqa: ANN401
        more: Callable[[int], tuple[Any, ...]],
    ) -> Iterator[Any]:
        """Yield what a task a partition returns; few of them are held at once.

        Args:
            files: The index.
            task: Takes a part, the queries, and how many of them are sampled.
            more: What it takes beside these, by the partition's number.
        """
        taken = search_bytes(files.spec, max(part.ntotal for part in files.partitions))
        room = ask("searching a partition", taken, "a smaller index.max_partition_vectors")
        wanted = options(room, most_cpus=MAX_THREADS)

        def submit(number: int) -> Any:  # noqa: ANN401
            threads: int = wanted["num_cpus"]
            part = Part(store=self.store, files=files, number=number, threads=threads)
            queries = (self.asked, self.queries.sampled)
            return task.options(**wanted).remote(part, *queries, *more(number))

        numbers = range(len(files.partitions))
        return gather_bounded(submit, numbers, in_flight=2 * cluster_cpus())


@ray.remote(num_cpus=1)
def _span(rows: Records) -> tuple[int, int] | None:
    """Return the first and the last id of sorted rows."""
    ids = rows["vector_id"]
    return (int(ids[0]), int(ids[-1])) if len(ids) else None


@ray.remote
def _sweep(
    part: Part,
    asked: Float32Array,
    sampled: int,
    own: Int64Array,
    live: tuple[list[Any], str | None],
) -> Swept:
    """Search one partition at every point, and compare its ids with the live ones."""
    partition, files = part.open(), part.files
    largest = max(one.ntotal for one in files.partitions)
    found = sweep_partition(
        partition,
        asked,
        MEASURED_K,
        depths=rerank_depths(MEASURED_K, largest),
        exclude=own,
        max_nprobe=_widest(files.spec, largest, len(asked)),
    )
    ids = stored_ids(partition.index)
    missing, extra = _compare_ids(ids, *live, (part.number, len(files.partitions)))
    return Swept(
        found=found,
        costs=model_costs(partition, found, MEASURED_K),
        list_sizes=list_sizes(partition.index),
        quantization_error=quantization_error(partition.index, asked[:sampled]),
        missing=missing,
        extra=extra,
    )


def _widest(spec: IndexSpec, ntotal: int, queries: int) -> int | None:
    """Return where a sweep ends: its last point visits a bounded number of codes in all."""
    compared = ntotal * queries
    if compared <= SWEPT_CODES:
        return None
    widest: int = max(1, spec.nlist * SWEPT_CODES // compared)
    return 1 << (widest.bit_length() - 1)  # a power of two, so that every night has the same points


def _compare_ids(
    stored: Int64Array, live: list[Any], mark: str | None, partition: tuple[int, int]
) -> tuple[int, int]:
    """Count live ids that are not stored, and stored ones that are not live or are there twice."""
    stored.sort()
    missing, matched = 0, 0
    for rows in map(ray.get, live):
        wanted = rows["vector_id"] if mark is None else rows["vector_id"][rows[mark]]
        wanted = wanted[in_partition(wanted, *partition)]
        there = np.isin(wanted, stored[slice(*np.searchsorted(stored, _ends(wanted)))])
        missing += int((~there).sum())
        matched += int(there.sum())
    return missing, len(stored) - matched


def _ends(ids: Int64Array) -> Int64Array:
    return np.array([ids[0], ids[-1] + 1] if len(ids) else [0, 0], np.int64)


@ray.remote
def _examine(
    part: Part,
    asked: Float32Array,
    sampled: int,
    points: list[SearchPoint],
    best: SearchPoint,
    depth: int,
) -> Examined:
    partition = part.open()
    ours, labelled = asked[:sampled], asked[sampled:]
    return Examined(
        times=[time_point(partition, ours, MEASURED_K, point) for point in points],
        found=search_partition(partition, ours, MEASURED_K, best),
        labelled=[
            search_partition(partition, labelled, depth, point) for point in points if len(labelled)
        ],
    )


@ray.remote
def _search(
    part: Part,
    asked: Float32Array,
    sampled: int,
    point: SearchPoint,
) -> Found:
    partition = part.open()
    return search_partition(partition, asked[:sampled], MEASURED_K, point)


@ray.remote(num_cpus=1)
def find_recalls(
    store: Store,
    ids: dict[str, Any],
    found: list[Found],
    relevant: list[tuple[str, ...]],
) -> list[float]:
    """Return recall at ten products of the labelled queries, at each point."""
    table = Ids.open(store, ids, machine_cache() / "ids")
    known = np.unique(np.concatenate([one[1].ravel() for one in found]))
    known = table.present(known)  # an id that is not live is counted as extra, and stops the gate
    owners = dict(zip(known.tolist(), table.products(known), strict=True))
    wanted = [set(products) for products in relevant]
    recalls = []
    for scores, vector_ids in found:
        ranked = [
            _ten_products(row, mine, owners) for row, mine in zip(scores, vector_ids, strict=True)
        ]
        recalls.append(recall_at_k(ranked, wanted, MEASURED_K))
    return recalls


def _ten_products(scores: Float32Array, ids: Int64Array, owners: dict[int, str]) -> list[str]:
    kept = np.array([one in owners for one in ids.tolist()], bool)
    mine = [owners[one] for one in ids[kept].tolist()]
    best = group_by_product(scores[kept], ids[kept], mine, MEASURED_K)
    return [product for product, _, _ in best]
