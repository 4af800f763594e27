"""Asks a release its labelled queries: through the index as serving does, and exactly."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray

from jobs.ask import (
    BOTH,
    IMAGE,
    TEXT,
    Asked,
    Ranked,
    Skipped,
    encode_queries,
    percentiles,
    search_queries,
    skip,
)
from jobs.errors import ConfigError
from jobs.images import ImagesConfig
from jobs.nodes import cluster_gpus
from jobs.progress import open_progress
from jobs.queries import Query, SearchedQuery
from jobs.space import VectorField
from jobs.steps import show_words
from jobs.store import Release, Store
from jobs.tasks import run_telling, watch

DEFAULT_CATEGORY = "category"
SHEET_FAILURES = 24


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A query whose right product did not come first.

    Attributes:
        rank: Of its first right product; None if there is none among the `RANKS` best.
        right: Row of that product, or of the best judged: product_id, image_uri, metadata.
    """

    searched: SearchedQuery
    rank: int | None
    right: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a release answered.

    Attributes:
        queries: Those that were run; their gains name only products of the release.
        categories: One a query: that of its best right product; empty without a column.
        category: The metadata column of the categories, or None.
        fields: The release's fields by name, the default one first.
        indexes: What the manifest says of each field's index.
        asked: By kind of query.
        latency_ms: By step (encode, index, search), then kind or field: p50, p99, queries.
        device: What encoded and searched.
        sheet_kind: The kind of query that `failures` are of, with the default field.
        failures: Near misses, then misses; a few of them.
        near, missed: How many there are of both.
    """

    queries: list[Query]
    categories: list[str]
    category: str | None
    fields: dict[str, VectorField]
    indexes: dict[str, dict[str, Any]]
    asked: dict[str, Asked]
    latency_ms: dict[str, dict[str, Any]]
    device: str
    skipped: dict[str, Skipped]
    sheet_kind: str
    failures: list[Failure]
    near: int
    missed: int


def ask_release(
    store: Store,
    release: Release,
    queries: Sequence[Query],
    root: str,
    images: ImagesConfig,
    category: str | None,
) -> Answers:
    """Encode and search the queries in one Ray task, on a GPU if the cluster has one.

    Args:
        store: The store.
        release: What is asked.
        queries: The labelled queries.
        root: Where their relative image URIs start.
        images: Limits for their photos.
        category: Metadata column to break down by; None: `category` where there is one.

    Returns:
        The answers; `queries` is empty if none could be run.

    Raises:
        ConfigError: The release has no such metadata column.
        StoreError: The release is damaged.
    """
    task = _ask.options(num_gpus=1 if cluster_gpus() else 0)
    answers: Answers = watch(
        lambda: task.remote(store, release, list(queries), root, images, category),
        "wait for a machine with a free CPU",
        partial(show_words, open_progress()),
    )
    return answers


@ray.remote(num_cpus=1, num_returns="streaming", max_retries=0)  # `watch` tries again
def _ask(*asked: Any) -> Iterator[Any]:  # noqa: ANN401
    """Yield words that say how far it is; at last, the answers."""
    yield from run_telling(lambda tell: _answer(tell, *asked))


def _answer(
    tell: Callable[[str], None],
    store: Store,
    release: Release,
    queries: list[Query],
    root: str,
    images: ImagesConfig,
    category: str | None,
) -> Answers:
    from encoders.towers import pick_device
    from jobs.search import Searcher

    searcher = Searcher(store, release.indexes, images=images, encoder=release.encoder)
    known = searcher.ids.first_rows({product for query in queries for product in query.gains})
    column = _category_column(searcher.ids.columns, category)
    skipped: dict[str, Skipped] = {}
    judged = list(_answerable(queries, known, skipped))
    encoded = encode_queries(searcher, judged, root, images, skipped, tell)
    kept = encoded.queries
    kind = next((kind for kind in (IMAGE, BOTH, TEXT) if encoded.vectors.get(kind)), TEXT)
    asked, latency, ranked = search_queries(searcher, encoded, kind, tell)
    failures, near, missed = _pick_failures(ranked, known, root)
    encode_ms = {name: percentiles(seconds) for name, seconds in encoded.times_s.items()}
    right = [known[query.relevant[0]] for query in kept]
    return Answers(
        queries=kept,
        categories=[_first_text(row["metadata"].get(column)) for row in right] if column else [],
        category=column,
        fields={name: searcher.space.field(name) for name in searcher.fields},
        indexes=searcher.manifest["fields"],
        asked=asked,
        latency_ms={"encode": encode_ms} | latency,
        device=str(pick_device(None)),
        skipped=skipped,
        sheet_kind=kind,
        failures=failures,
        near=near,
        missed=missed,
    )


def _category_column(names: list[str], category: str | None) -> str | None:
    if category is None:
        return DEFAULT_CATEGORY if DEFAULT_CATEGORY in names else None
    if category not in names:
        raise ConfigError(
            f"evaluate.category: the release has no metadata column {category!r}; "
            f"it has {', '.join(names)}"
        )
    return category


def _first_text(value: Any) -> str:  # noqa: ANN401
    """Return a category as text; of a list, however nested, its first element."""
    while isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _answerable(
    queries: Sequence[Query], known: dict[str, Any], skipped: dict[str, Skipped]
) -> Iterator[Query]:
    """Yield the queries that have a right product in the release, with what it has of the judged.

    A right product that the release lacks can't be found: it is counted, not held against it.
    """
    for query in queries:
        gains = {product: gain for product, gain in query.gains.items() if product in known}
        missing = [product for product in query.relevant if product not in known]
        if not query.relevant:
            skip(skipped, "no_right_product", f"{query}: all gains are 0")
        elif len(missing) == len(query.relevant):
            skip(skipped, "not_in_release", f"{query}: {', '.join(missing[:3])}")
        else:
            for product in missing:
                skip(skipped, "right_product_not_in_release", f"{query}: {product}", "products")
            yield replace(query, gains=gains)


def _pick_failures(
    ranked: Sequence[Ranked], known: dict[str, dict[str, Any]], root: str
) -> tuple[list[Failure], int, int]:
    """Pick near misses (a right product is found, but not first), then misses, half of each.

    Returns:
        Failures to show, the number of near misses, the number of misses.
    """
    near = sorted(
        (one for one in ranked if one.rank and one.rank > 1), key=lambda one: one.rank or 0
    )
    missed = [one for one in ranked if one.rank is None]
    half = SHEET_FAILURES // 2
    shown_near = max(half, SHEET_FAILURES - len(missed))
    shown = near[:shown_near]
    shown += missed[: SHEET_FAILURES - len(shown)]
    failures = [
        Failure(
            searched=SearchedQuery(query=one.query, root=root, found=one.best),
            rank=one.rank,
            right=known[one.right],
        )
        for one in shown
    ]
    return failures, len(near), len(missed)
