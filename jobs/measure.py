"""Measures a written index: tunes it on queries that it was not trained on, times and checks it.

A task a partition searches at every point of a grid; what the partitions found is joined and
compared with exact search. Queries are vectors of the catalog that were held out of the training,
each without itself among its neighbours, and the labelled queries where there are any.

Letters: Q queries, D dimension, K neighbours.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray

from indexing.metrics import intersection_at_k, list_imbalance
from indexing.search import SearchPoint
from indexing.tune import MeasuredPoint, choose_point, prune_curve
from jobs.errors import StoreError
from jobs.index_files import FieldFiles
from jobs.index_lists import describe_lists
from jobs.labelled import Labelled
from jobs.live import Live
from jobs.neighbours import Comparison, compare_neighbours, join_comparisons
from jobs.probe import (
    MEASURED_K,
    BoolArray,
    Examined,
    Found,
    Probe,
    Queries,
    Swept,
    find_recalls,
)
from jobs.space import VectorField
from jobs.storage import StorageError
from jobs.store import Store
from jobs.tasks import gather
from jobs.vectors import (
    MAX_KEY,
    Draw,
    Float32Array,
    Int64Array,
    exact_search,
    join_sample,
    sample_vectors,
)

EXACT_K = MEASURED_K + 1  # one more tells whether the ten nearest are defined at all
EQUAL = 1 - 1e-4
NO_ID = -1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of an index at its operating point.

    Attributes:
        intersection_at_10: Mean share of the ten exact neighbours of a held-out catalog vector
            that the index finds, itself left out.
        labelled_intersection_at_10: The same of the labelled queries; None without any.
        recall_at_10: Of the labelled queries, their right products; None without any.
        self_retrieval: Share of sampled vectors that found themselves, or an equal vector.
        queries: How many sampled vectors count.
        labelled_queries: How many labelled queries count.
        ambiguous: How many of both don't: their tenth neighbour and the next are equally near, as
            where many products share a picture, so that the ten nearest aren't defined.
        intersections: Of every point tried, by its name.
        imbalance: FAISS's imbalance factor of the lists; 1 for a flat index.
        lists: How long the lists are; see `jobs.index_lists.describe_lists`.
        quantization_error: Mean squared distance between the sample and what the index keeps.
        missing: Live ids that are not in the index.
        extra: Ids in the index that are not live, or are there twice.
        overlap_at_10: With the newest release's index, mean share of the same neighbours; None
            where there is none to compare with.
        not_compared: Why there is none, though the release has one: it is damaged; else empty.
        changed: Which queries of both kinds find other neighbours than in the newest release;
            None as for overlap_at_10.
    """

    point: SearchPoint
    intersection_at_10: float
    labelled_intersection_at_10: float | None
    recall_at_10: float | None
    self_retrieval: float
    queries: int
    labelled_queries: int
    ambiguous: int
    intersections: dict[str, float]
    imbalance: float
    lists: dict[str, Any] | None
    quantization_error: float
    missing: int
    extra: int
    overlap_at_10: float | None
    not_compared: str
    changed: Comparison | None


def point_name(point: SearchPoint) -> str:
    """Name a point in a manifest."""
    return f"nprobe={point.nprobe},ef_search={point.ef_search},rerank={point.rerank}"


def sample_queries(
    store: Store,
    field: VectorField,
    live: Live,
    draw: Draw,
    *,
    labelled: Labelled | None,
    target_intersection: float,
    base: tuple[FieldFiles, SearchPoint] | None,
) -> Queries:
    """Draw catalog vectors as queries, add the labelled ones, and search all exactly.

    Args:
        store: The store.
        field: The field.
        live: The live rows.
        draw: Which rows: those that no training saw.
        labelled: The labelled queries.
        target_intersection: What the operating point must reach.
        base: The newest release's index, to compare with.

    Raises:
        StoreError: A row has no vector.
    """
    ids, vectors = _draw(store, field, live, draw)
    if not len(ids):  # so few of those that were held out are left that none of them was drawn
        ids, vectors = _draw(store, field, live, replace(draw, below=MAX_KEY))
    asked = [vectors.reshape(-1, field.dim)]
    asked += [labelled.vectors.reshape(-1, field.dim)] if labelled is not None else []
    together = np.concatenate(asked)
    own = np.append(ids, np.full(len(together) - len(ids), NO_ID, np.int64))
    exact = exact_search(store, field, live.rows, ray.put(together), EXACT_K, own)
    return Queries(
        live=live,
        mark="first" if field.name == "text" else None,
        ids=own,
        vectors=together,
        exact=exact,
        sampled=len(ids),
        labelled=labelled,
        target_intersection=target_intersection,
        base=base,
    )


def _draw(
    store: Store, field: VectorField, live: Live, draw: Draw
) -> tuple[Int64Array, Float32Array]:
    parts = sample_vectors(store, field, live.rows, draw)
    drawn: tuple[Int64Array, Float32Array] = gather([_join.remote(draw, *parts)])[0]
    return drawn


@ray.remote(num_cpus=1)
def _join(draw: Draw, *parts: tuple[Int64Array, Float32Array]) -> tuple[Int64Array, Float32Array]:
    return join_sample(parts, draw)


def measure_index(
    store: Store, files: FieldFiles, queries: Queries, ids: dict[str, Any]
) -> tuple[Measurement, tuple[dict[str, Any], ...]]:
    """Tune an index, time its curve, and check its ids.

    Args:
        store: The store.
        files: The written index.
        queries: What to measure it with.
        ids: The manifest's entry of `ids.parquet`: which products labelled queries found.

    Returns:
        What was measured, and the curve: points that no other one beats, as plain values.

    Raises:
        StoreError: A file is missing or damaged.
    """
    probe = Probe(store=store, queries=queries, asked=ray.put(queries.vectors))
    swept = probe.sweep(files)
    points = _compare(queries, swept)
    best = choose_point(points, queries.target_intersection)
    curve = prune_curve(points)
    examined = probe.examine(files, [one.point for one in curve], best.point)
    curve = _add_recall(probe, examined, _add_times(examined, curve), ids)
    recall = next(one.recall for one in curve if one.point == best.point)
    found = examined.found
    labelled = dict(zip((one.point for one in curve), examined.labelled, strict=False))
    overlap, changed, not_compared = _compare_with_base(probe, found, labelled.get(best.point))
    clear = queries.clear
    measured = Measurement(
        point=best.point,
        intersection_at_10=best.intersection,
        labelled_intersection_at_10=best.labelled_intersection,
        recall_at_10=recall,
        self_retrieval=_self_retrieval(queries, found),
        queries=int(clear[: queries.sampled].sum()),
        labelled_queries=int(clear[queries.sampled :].sum()),
        ambiguous=int((~clear).sum()),
        intersections={point_name(one.point): one.intersection for one in points},
        imbalance=list_imbalance(swept.list_sizes),
        lists=describe_lists(swept.list_sizes),
        quantization_error=swept.quantization_error,
        missing=swept.missing,
        extra=swept.extra,
        overlap_at_10=overlap,
        not_compared=not_compared,
        changed=changed,
    )
    return measured, tuple(asdict(one) for one in curve)


def _compare(queries: Queries, swept: Swept) -> list[MeasuredPoint]:
    """Compare what was found at each point with exact search."""
    clear, exact = queries.clear, queries.exact[1]
    sampled, labelled = slice(queries.sampled), slice(queries.sampled, None)
    street = len(exact) > queries.sampled
    return [
        MeasuredPoint(
            point=point,
            cost=swept.costs[point],
            intersection=_intersect(found[sampled], exact[sampled], clear[sampled]),
            labelled_intersection=_intersect(found[labelled], exact[labelled], clear[labelled])
            if street
            else None,
        )
        for point, (_, found) in swept.found.items()
    ]


def _intersect(found: Int64Array, exact: Int64Array, clear: BoolArray) -> float:
    counted = clear & (exact[:, 0] != NO_ID)  # the only vector of a catalog has no neighbour
    if not counted.any():
        return 1.0
    return intersection_at_k(found[counted], exact[counted], MEASURED_K)


def _add_times(examined: Examined, curve: list[MeasuredPoint]) -> list[MeasuredPoint]:
    return [
        replace(one, latency_p50_ms=p50, latency_p99_ms=p99, queries_per_s=rate)
        for one, (p50, p99, rate) in zip(curve, examined.times, strict=True)
    ]


def _add_recall(
    probe: Probe, examined: Examined, curve: list[MeasuredPoint], ids: dict[str, Any]
) -> list[MeasuredPoint]:
    """Measure at each point of a curve which right products the labelled queries find."""
    labelled = probe.queries.labelled
    if labelled is None or not labelled.queries:
        return curve
    relevant = [query.relevant for query in labelled.queries]
    recalls = gather([find_recalls.remote(probe.store, ids, examined.labelled, relevant)])[0]
    return [replace(one, recall=recall) for one, recall in zip(curve, recalls, strict=True)]


def _compare_with_base(
    probe: Probe, found: Found, labelled: Found | None
) -> tuple[float | None, Comparison | None, str]:
    """Compare with what the newest release's index finds for the same queries.

    Args:
        probe: Searches it.
        found: By the sampled queries, themselves included.
        labelled: By the labelled queries; None without any.

    Returns:
        The mean share of the newest release's neighbours and the queries that find others; or
        why it can't be compared with.
    """
    base = probe.queries.base
    if base is None or not base[0].ntotal or not len(found[1]):
        return None, None, ""
    k = min(MEASURED_K, base[0].ntotal, int((found[1] >= 0).sum(axis=1).max()))
    if k == 0:
        return None, None, ""
    try:
        then, then_labelled = _search_base(probe, *base)
    except StorageError:
        raise
    except StoreError as error:  # it must not keep a release from being replaced by a whole one
        return None, None, str(error)
    sampled = slice(probe.queries.sampled)
    clear = probe.queries.clear[sampled]
    now, before = found[1][clear, :k], then[1][clear, :k]
    same = (now[:, :, None] == before[:, None, :]) & (now[:, :, None] >= 0)
    changed = _find_changed(probe.queries, found, then, sampled)
    if probe.queries.labelled and labelled and then_labelled:
        street = slice(probe.queries.sampled, None)
        asked = _find_changed(probe.queries, labelled, then_labelled, street)
        changed = _join_labelled(changed, asked, probe.queries.labelled)
    return float(same.any(axis=2).mean()), changed, ""


def _search_base(probe: Probe, files: FieldFiles, point: SearchPoint) -> tuple[Found, Found | None]:
    """Search the newest release's index by the sampled queries, and by the labelled ones."""
    if probe.queries.sampled == len(probe.queries.ids):
        return probe.search(files, point), None
    examined = probe.examine(files, [point], point)  # which searches as deep as in the new index
    return examined.found, examined.labelled[0]


def _find_changed(queries: Queries, now: Found, then: Found, part: slice) -> Comparison:
    """Find the queries of one kind that find other neighbours."""
    after, before = ((scores[:, :MEASURED_K], ids[:, :MEASURED_K]) for scores, ids in (now, then))
    return compare_neighbours(queries.ids[part], queries.clear[part], after, before)


def _join_labelled(changed: Comparison, found: Comparison, labelled: Labelled) -> Comparison:
    """Add what changed of the labelled queries, with what was asked."""
    named = (
        replace(one, asked=labelled.queries[one.place], root=labelled.root) for one in found.least
    )
    return join_comparisons(changed, replace(found, least=tuple(named)))


def _self_retrieval(queries: Queries, found: Found) -> float:
    """Return the share of queries whose own vector, or an exactly equal one, is in the results."""
    own, sampled = queries.ids[: queries.sampled], slice(queries.sampled)
    scores, ids = queries.exact[0][sampled], queries.exact[1][sampled]
    equal = np.where(scores >= EQUAL, ids, -2)
    hits = (found[1] == own[:, None]).any(axis=1)
    hits |= (found[1][:, :, None] == equal[:, None, :]).any(axis=(1, 2))
    return float(hits.mean())
