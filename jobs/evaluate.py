"""Measures an index version with labelled queries, through the same Searcher that serving uses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from indexing.metrics import mean_reciprocal_rank, recall_at_k
from jobs.catalog import Catalog, template_names
from jobs.cluster import gather
from jobs.config import EvaluateConfig
from jobs.errors import JobError
from jobs.fetch import fetch_images
from jobs.images import ImagesConfig
from jobs.items import fill_template
from jobs.pairs import read_pairs
from jobs.store import Store

RECALL_KS = (1, 5, 10)
SHEET_QUERIES = 12


@dataclass(frozen=True, kw_only=True)
class Query:
    """One query: a photo or words, and the products that are right (none if unlabelled)."""

    image: str | None
    text: str | None
    relevant: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SearchedQuery:
    """A query and what it found, for the contact sheet.

    Attributes:
        found: Results as `jobs.search.result_rows` makes them, best first.
    """

    query: Query
    root: str
    found: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the labelled queries showed; empty without any.

    Attributes:
        recall: recall_at_k by k, and `mrr`.
        failed: Queries that could not be run, with the reason.
        sheet: Some queries with their results; catalog rows where no query is labelled.
    """

    queries: int
    recall: dict[str, float]
    failed: list[str] = field(default_factory=list)
    sheet: list[SearchedQuery] = field(default_factory=list)


def read_queries(config: EvaluateConfig, *, use_images: bool) -> tuple[list[Query], str]:
    """Read labelled queries: `product_id` with `query_image_uri` and/or `query_text`.

    Args:
        config: Says where and how many; a seeded sample is drawn if there are more.
        use_images: Whether the encoder's fields can be searched by a photo.

    Returns:
        The queries, and the folder that relative image URIs start from.

    Raises:
        CatalogError: The file can't be read, lacks the columns or is empty.
    """
    column = "query_image_uri" if use_images else "query_text"
    table, root = read_pairs(str(config.queries), ("product_id", column), key="evaluate.queries")
    picked = np.random.default_rng(0).permutation(table.num_rows)[: config.max_queries]
    rows = table.take(np.sort(picked)).to_pylist()
    queries = [
        Query(
            image=row[column] if use_images else None,
            text=None if use_images else row[column],
            relevant=(row["product_id"],),
        )
        for row in rows
        if row[column] and row["product_id"]
    ]
    return queries, root


def measure_queries(
    config: EvaluateConfig,
    catalog: Catalog,
    images: ImagesConfig,
    store: Store,
    indexes: str,
    *,
    use_images: bool,
) -> Measured:
    """Run the labelled queries against an index version, in one Ray task that has the encoder.

    Args:
        config: The evaluate section.
        catalog: Gives queries for the contact sheet where none are labelled.
        images: Limits for query images.
        store: The store.
        indexes: Name of the folder below `indexes/`.
        use_images: Whether to ask with photos, or with words.
    """
    queries: list[Query] = []
    root = catalog.root
    if config.queries is not None:
        queries, root = read_queries(config, use_images=use_images)
    task = _run_queries.options(num_gpus=1 if ray.cluster_resources().get("GPU") else 0)
    outcome = gather([task.remote(queries, root, catalog, images, store, indexes, use_images)])[0]
    searched, failed = outcome
    if not queries:
        return Measured(queries=0, recall={}, failed=failed, sheet=searched)
    found = [[row["product_id"] for row in one.found] for one in searched]
    relevant = [one.query.relevant for one in searched]
    recall: dict[str, float] = {}
    if found:
        recall = {f"recall_at_{k}": _share(found, relevant, k) for k in RECALL_KS}
        recall["mrr"] = mean_reciprocal_rank(found, [set(r) for r in relevant])
    return Measured(
        queries=len(searched), recall=recall, failed=failed, sheet=_pick_sheet(searched)
    )


def _share(found: list[list[str]], relevant: list[tuple[str, ...]], k: int) -> float:
    return recall_at_k(found, [set(r) for r in relevant], k)


def _pick_sheet(searched: Sequence[SearchedQuery]) -> list[SearchedQuery]:
    """Take queries evenly from the whole list, so that the sheet isn't one category's."""
    step = max(1, len(searched) // SHEET_QUERIES)
    return list(searched[::step][:SHEET_QUERIES])


@ray.remote(num_cpus=1)
def _run_queries(
    queries: list[Query],
    root: str,
    catalog: Catalog,
    images: ImagesConfig,
    store: Store,
    indexes: str,
    use_images: bool,
) -> tuple[list[SearchedQuery], list[str]]:
    from jobs.search import Searcher, result_rows

    searcher = Searcher(store, indexes, images=images)
    wanted = queries or _catalog_queries(searcher, catalog, use_images)
    searched, failed = [], []
    for query in wanted:
        try:
            data = _fetch(query, root, images)
            results = searcher.search(image=data, text=query.text, k=max(RECALL_KS))
        except JobError as error:
            failed.append(f"{query.image or query.text}: {error}")
            continue
        searched.append(SearchedQuery(query=query, root=root, found=result_rows(results)))
    return searched, failed


def _fetch(query: Query, root: str, images: ImagesConfig) -> bytes | None:
    if query.image is None:
        return None
    data = fetch_images([query.image], root, images)[0]
    if isinstance(data, bytes):
        return data
    raise JobError(str(data))


def _catalog_queries(searcher: Any, catalog: Catalog, use_images: bool) -> list[Query]:  # noqa: ANN401
    """Make unlabelled queries of some of the catalog's own products."""
    table = searcher.ids.table
    places = np.linspace(0, len(table) - 1, min(SHEET_QUERIES, len(table))).astype(int)
    queries = []
    for row in table.take(np.unique(places)).to_pylist():
        if use_images and row["image_uri"]:
            queries.append(Query(image=row["image_uri"], text=None, relevant=()))
        elif not use_images:
            names = template_names(catalog.text)
            values = {n: (row["metadata"] or {}).get(catalog.columns[n]) for n in names}
            queries.append(Query(image=None, text=fill_template(catalog.text, values), relevant=()))
    return queries
