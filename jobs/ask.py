"""Runs labelled queries one at a time, as serving does, and times each step.

Letters: Q queries, D dimension.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.errors import JobError
from jobs.fetch import fetch_images
from jobs.images import ImageRejected, ImagesConfig
from jobs.queries import Query
from jobs.scores import RANKS
from jobs.search import Result, Searcher, result_rows

IMAGE, TEXT, BOTH = KINDS = ("image", "text", "image + text")
FETCH_ROWS = 64
LATENCY_QUERIES = 200
SHEET_RESULTS = 5
EXAMPLES = 3

Float32Array = npt.NDArray[np.float32]


@dataclass(kw_only=True)
class Skipped:
    """What was left out for one reason.

    Attributes:
        of: What is counted: rows, queries or products.
    """

    of: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count one more; the first few are kept to show."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One kind of query.

    Attributes:
        places: (Q,) int64 into `Answers.queries`.
        vectors: (Q, D) float32 unit rows.
        found: By field: at most `RANKS` product ids a query, best first.
    """

    places: npt.NDArray[np.int64]
    vectors: Float32Array
    found: dict[str, list[list[str]]]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Queries with their vectors by kind: (place of the query, (D,) float32)."""

    queries: list[Query] = field(default_factory=list)
    vectors: dict[str, list[tuple[int, Float32Array]]] = field(default_factory=dict)
    times_s: dict[str, list[float]] = field(default_factory=dict)


def encode_queries(
    searcher: Searcher,
    queries: Sequence[Query],
    root: str,
    images: ImagesConfig,
    skipped: dict[str, Skipped],
    tell: Callable[[str], None],
) -> Encoded:
    """Encode one query at a time, as serving does, in every kind that it can ask; time it.

    Args:
        searcher: The opened release.
        queries: The queries.
        root: Where their relative image URIs start.
        images: Limits for their photos.
        skipped: Takes those that can't be used, with the reason.
        tell: Called with words that say how far it is.
    """
    encoded = Encoded()
    for start in range(0, len(queries), FETCH_ROWS):
        tell(f"encode queries, {start} of {len(queries)}")
        batch = queries[start : start + FETCH_ROWS]
        photos = fetch_images([query.image or b"" for query in batch], root, images)
        for query, photo in zip(batch, photos, strict=True):
            try:
                _encode_query(searcher, query, photo, encoded)
            except JobError as error:
                skip(skipped, "query_not_usable", f"{query}: {error}")
    return encoded


def _encode_query(
    searcher: Searcher,
    query: Query,
    photo: bytes | ImageRejected,
    encoded: Encoded,
) -> None:
    image = None
    if query.image:
        if isinstance(photo, ImageRejected):
            raise JobError(f"the query image can't be used: {photo}")
        image = photo
    inputs = {IMAGE: (image, None), TEXT: (None, query.text), BOTH: (image, query.text)}
    if image is None or query.text is None:
        inputs.pop(BOTH)
    found: dict[str, tuple[Float32Array, float]] = {}
    for kind, (pixels, words) in inputs.items():
        if pixels is None and words is None:
            continue
        if kind not in encoded.times_s:  # the first pass of a model is slower than all others
            searcher.encode(pixels, words)
        started = time.perf_counter()
        vector = searcher.encode(pixels, words)
        found[kind] = (vector, time.perf_counter() - started)
        if not np.isfinite(vector).all():
            raise JobError("the encoder gives it no direction")
    for kind, (vector, seconds) in found.items():
        encoded.vectors.setdefault(kind, []).append((len(encoded.queries), vector))
        encoded.times_s.setdefault(kind, []).append(seconds)
    encoded.queries.append(query)


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One query's answer: what was asked, where a right product is, the best results.

    Attributes:
        rank: Of the first right product; None if none is among the `RANKS` best.
        right: That product; where none was found, the best judged one.
    """

    query: Query
    rank: int | None
    right: str
    best: list[dict[str, Any]]


def search_queries(
    searcher: Searcher,
    encoded: Encoded,
    sheet_kind: str,
    tell: Callable[[str], None],
) -> tuple[dict[str, Asked], dict[str, dict[str, Any]], list[Ranked]]:
    """Search every field with every vector, one at a time; time it.

    Args:
        searcher: The opened release.
        encoded: From `encode_queries`.
        sheet_kind: The kind of query whose results are kept to be shown.
        tell: Called with words that say how far it is.

    Returns:
        What was asked; seconds as percentiles by step and field; what `sheet_kind` found in the
        default field.
    """
    asked: dict[str, Asked] = {}
    ranked: list[Ranked] = []
    times_s: dict[str, dict[str, list[float]]] = {"index": {}, "search": {}}
    for kind in (kind for kind in KINDS if kind in encoded.vectors):
        places, vectors = zip(*encoded.vectors[kind], strict=True)
        rows: Float32Array = np.stack(vectors).astype(np.float32)
        found: dict[str, list[list[str]]] = {}
        for name in searcher.fields:
            answers = []
            for number, (row, place) in enumerate(zip(rows, places, strict=True)):
                if number % FETCH_ROWS == 0:
                    tell(f"search {name} by {kind}, {number} of {len(rows)}")
                results = _timed_search(searcher, row[None], name, times_s)
                answers.append([result.product_id for result in results])
                if (kind, name) == (sheet_kind, searcher.fields[0]):
                    ranked.append(_rank(encoded.queries[place], kind, results))
            found[name] = answers
        asked[kind] = Asked(places=np.array(places, np.int64), vectors=rows, found=found)
    latency = {
        step: {name: percentiles(seconds) for name, seconds in by_field.items()}
        for step, by_field in times_s.items()
    }
    return asked, latency, ranked


def _timed_search(
    searcher: Searcher,
    query: Float32Array,
    name: str,
    times_s: dict[str, dict[str, list[float]]],
) -> list[Result]:
    alone = times_s["index"].setdefault(name, [])
    if len(alone) < LATENCY_QUERIES:
        depth = searcher.depth(RANKS, name)
        if not alone:
            searcher.search_ids(query, depth, field=name)
        started = time.perf_counter()
        searcher.search_ids(query, depth, field=name)
        alone.append(time.perf_counter() - started)
    started = time.perf_counter()
    (results,) = searcher.search_vectors(query, k=RANKS, field=name)
    times_s["search"].setdefault(name, []).append(time.perf_counter() - started)
    return results


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50 and p99 in ms, and of how many queries."""
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99]).tolist()
    return {"p50": p50, "p99": p99, "queries": len(seconds)}


def _rank(query: Query, kind: str, results: list[Result]) -> Ranked:
    relevant = query.relevant
    rank = next((n for n, one in enumerate(results, 1) if one.product_id in relevant), None)
    right = relevant[0] if rank is None else results[rank - 1].product_id
    asked = replace(
        query,
        image=None if kind == TEXT else query.image,
        text=None if kind == IMAGE else query.text,
    )
    best = [] if rank == 1 else result_rows(results[:SHEET_RESULTS])
    return Ranked(query=asked, rank=rank, right=right, best=best)


def skip(skipped: dict[str, Skipped], reason: str, example: str, of: str = "queries") -> None:
    """Count one that is left out, by its reason."""
    skipped.setdefault(reason, Skipped(of=of)).add(example)
