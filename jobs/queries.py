"""Labelled queries: reads them, and measures an index version with them for the refresh.

They are run through the same Searcher that serving uses.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from indexing.metrics import mean_reciprocal_rank, recall_at_k
from jobs.catalog import Catalog, template_names
from jobs.config import EvaluateConfig
from jobs.errors import CatalogError, JobError
from jobs.fetch import fetch_images
from jobs.images import ImagesConfig
from jobs.items import fill_template
from jobs.nodes import cluster_gpus
from jobs.pairs import read_pairs
from jobs.store import Store
from jobs.tasks import gather

if TYPE_CHECKING:
    from jobs.labelled import Labelled

RECALL_KS = (1, 5, 10)
SHEET_QUERIES = 12
KEY = "evaluate.queries"
IMAGE, TEXT = "query_image_uri", "query_text"
IMAGE_BYTES = "query_image"  # pairs may have it; queries may not


@dataclass(frozen=True, kw_only=True)
class Query:
    """One query: a photo, words or both, and how good each judged product is as its answer.

    Attributes:
        gains: Gain of each judged product, finite, >= 0; empty if the query is unlabelled.
    """

    image: str | None
    text: str | None
    gains: dict[str, float] = field(default_factory=dict)

    @property
    def relevant(self) -> tuple[str, ...]:
        """The right products: those with a gain above 0, best first."""
        right = [product for product, gain in self.gains.items() if gain > 0]
        return tuple(sorted(right, key=lambda product: -self.gains[product]))

    def __str__(self) -> str:
        """Name the query in a message."""
        return " + ".join(part for part in (self.image, self.text) if part)


@dataclass(frozen=True, kw_only=True)
class QueryFile:
    """The labelled queries of a file.

    Attributes:
        queries: A seeded sample if there are more than the configured most, in the file's order.
        root: The folder that relative image URIs start from.
        in_file: Queries in the whole file.
        bad_rows: Rows that are no judgment, by reason.
    """

    queries: list[Query]
    root: str
    in_file: int
    bad_rows: dict[str, int]


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


def read_queries(config: EvaluateConfig) -> QueryFile:
    """Read labelled queries: `product_id` with `query_image_uri` and/or `query_text`.

    Rows of the same photo and words, and of the same `query_id` where the file has that column,
    are one query with several judged products. `gain` says how good each is (1 without the
    column); of a product judged twice, the best counts.

    Args:
        config: Says where and how many.

    Raises:
        CatalogError: The file can't be read, lacks the columns, is empty or holds no judgment.
    """
    path = str(config.queries)
    optional = (IMAGE, IMAGE_BYTES, TEXT, "query_id", "gain")
    table, root = read_pairs(path, ("product_id",), key=KEY, optional=optional)
    _check_columns(path, table.schema)
    table = table.drop_columns([IMAGE_BYTES]) if IMAGE_BYTES in table.column_names else table
    rows = _read_rows(path, table)
    queries, bad_rows = _group(rows)
    if not queries:
        raise CatalogError(f"{KEY} {path}: none of {table.num_rows} rows is a judgment: {bad_rows}")
    picked = np.random.default_rng(0).permutation(len(queries))[: config.max_queries]
    chosen = [queries[place] for place in np.sort(picked)]
    return QueryFile(queries=chosen, root=root, in_file=len(queries), bad_rows=bad_rows)


def _check_columns(path: str, schema: pa.Schema) -> None:
    types = pa.types
    if not {IMAGE, TEXT} & set(schema.names):
        raise CatalogError(f"{KEY} {path} has no column {IMAGE} or {TEXT}")
    if IMAGE_BYTES in schema.names and IMAGE not in schema.names:
        raise CatalogError(
            f"{KEY} {path} has photos as bytes; write them as files named in {IMAGE}"
        )
    faults = []
    for one in schema:
        if one.name == IMAGE_BYTES:
            continue
        kind = one.type.value_type if types.is_dictionary(one.type) else one.type
        if one.name == "gain":
            numeric = types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)
            faults += [] if numeric else [f"column gain is {one.type}, expected a number"]
        elif one.name != "query_id" and not (
            types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)
        ):
            faults.append(f"column {one.name} is {one.type}, expected string")
    if faults:
        raise CatalogError(f"{KEY} {path}: {', '.join(faults)}")


def _read_rows(path: str, table: pa.Table) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except UnicodeDecodeError as error:
        raise CatalogError(f"{KEY} {path}: a text is no UTF-8: {error}") from error
    return rows


def _group(rows: Sequence[dict[str, Any]]) -> tuple[list[Query], dict[str, int]]:
    """Join judgments into queries; count the rows that are none."""
    bad: Counter[str] = Counter()
    judged: dict[tuple[Any, str, str], dict[str, float]] = {}
    for row in rows:
        image, text = row.get(IMAGE) or "", (row.get(TEXT) or "").strip()
        gain = row.get("gain", 1.0)
        if not row["product_id"]:
            bad["no_product_id"] += 1
        elif not image and not text:
            bad["no_query"] += 1
        elif gain is None or not math.isfinite(gain) or gain < 0:
            bad["bad_gain"] += 1
        else:
            gains = judged.setdefault((row.get("query_id"), image, text), {})
            gains[row["product_id"]] = max(float(gain), gains.get(row["product_id"], 0.0))
    queries = [
        Query(image=image or None, text=text or None, gains=gains)
        for (_, image, text), gains in judged.items()
    ]
    return queries, dict(bad)


def measure_queries(
    labelled: "Labelled | None",
    catalog: Catalog,
    images: ImagesConfig,
    store: Store,
    indexes: str,
    *,
    use_images: bool,
) -> Measured:
    """Run the labelled queries against an index version, in one Ray task that has the encoder.

    Args:
        labelled: The queries; None: some of the catalog's own, for the contact sheet.
        catalog: Gives those.
        images: Limits for query images.
        store: The store.
        indexes: Name of the folder below `indexes/`.
        use_images: Whether to ask with photos, or with words.
    """
    task = _run_queries.options(num_gpus=min(1, cluster_gpus()))
    outcome = gather([task.remote(labelled, catalog, images, store, indexes, use_images)])[0]
    searched, failed = outcome
    if labelled is None:
        return Measured(queries=0, recall={}, failed=failed, sheet=searched)
    found = [[row["product_id"] for row in one.found] for one in searched]
    relevant = [one.query.relevant for one in searched]
    recall: dict[str, float] = {}
    if found:
        recall = {f"recall_at_{k}": _share(found, relevant, k) for k in RECALL_KS}
        recall["mrr"] = mean_reciprocal_rank(found, [set(r) for r in relevant])
    return Measured(
        queries=len(searched),
        recall=recall,
        failed=[*labelled.failed, *failed],
        sheet=_pick_sheet(searched),
    )


def _share(found: list[list[str]], relevant: list[tuple[str, ...]], k: int) -> float:
    return recall_at_k(found, [set(r) for r in relevant], k)


def _pick_sheet(searched: Sequence[SearchedQuery]) -> list[SearchedQuery]:
    """Take queries evenly from the whole list, so that the sheet isn't one category's."""
    step = max(1, len(searched) // SHEET_QUERIES)
    return list(searched[::step][:SHEET_QUERIES])


@ray.remote(num_cpus=1)
def _run_queries(
    labelled: "Labelled | None",
    catalog: Catalog,
    images: ImagesConfig,
    store: Store,
    indexes: str,
    use_images: bool,
) -> tuple[list[SearchedQuery], list[str]]:
    from jobs.search import Searcher, result_rows

    searcher = Searcher(store, indexes, images=images)
    if labelled is not None:
        found = searcher.search_vectors(labelled.vectors, k=max(RECALL_KS))
        return [
            SearchedQuery(query=query, root=labelled.root, found=result_rows(results))
            for query, results in zip(labelled.queries, found, strict=True)
        ], []
    searched, failed = [], []
    for query in _catalog_queries(searcher, catalog, use_images):
        try:
            data = _fetch(query, catalog.root, images)
            results = searcher.search(image=data, text=query.text, k=max(RECALL_KS))
        except JobError as error:
            failed.append(f"{query}: {error}")
            continue
        searched.append(SearchedQuery(query=query, root=catalog.root, found=result_rows(results)))
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
    queries = []
    for row in searcher.ids.sample_rows(SHEET_QUERIES):
        if use_images and row["image_uri"]:
            queries.append(Query(image=row["image_uri"], text=None))
        elif not use_images:
            names = template_names(catalog.text)
            values = {n: (row["metadata"] or {}).get(catalog.columns[n]) for n in names}
            queries.append(Query(image=None, text=fill_template(catalog.text, values)))
    return queries
