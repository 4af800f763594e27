"""The `evaluate` command: labelled queries against a release, measured; nothing is published."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from typing import Any

import numpy as np

from jobs.answers import Answers, ask_release
from jobs.ask import BOTH, IMAGE, TEXT, Skipped
from jobs.catalog import read_catalog
from jobs.cluster import ray_session
from jobs.config import JobConfig
from jobs.errors import CatalogError, ConfigError
from jobs.exact import release_rows, search_release
from jobs.machines import check_shared
from jobs.progress import Progress
from jobs.queries import KEY, QueryFile, read_queries
from jobs.report import write_evaluation
from jobs.run import Run
from jobs.scores import (
    DEFINITIONS,
    RANKS,
    RESAMPLES,
    Figures,
    Scores,
    by_category,
    overlap,
    pick,
    score_queries,
    subtract,
    summarize,
)
from jobs.store import Release, Store
from jobs.trace import write_trace

Rankings = dict[tuple[str, str], list[list[str]]]
"""By kind of query and field: the product ids that each query found, best first."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured.

    Attributes:
        release: The release that was asked; None: a candidate was.
        candidate: The run that built it.
        queries: How many were measured.
        default_field: The field that a search without a field uses.
        metrics: By kind of query, then field: queries, index, exact, cost (exact minus index),
            intersection_at_10, by_category. A figure has value, low and high.
        paired: By field: what words add, over the queries that have both.
        latency_ms: By step, then kind or field: p50, p99, queries.
        skipped: By reason: of (rows, queries or products), count, examples.
        report: Address of report.html.
    """

    release: int | None
    candidate: str | None
    queries: int
    default_field: str
    metrics: dict[str, dict[str, Figures]]
    paired: dict[str, dict[str, Figures]]
    latency_ms: dict[str, dict[str, Any]]
    skipped: dict[str, dict[str, Any]]
    report: str


def evaluate(
    config: JobConfig,
    progress: Progress,
    version: int | None = None,
    *,
    candidate: str | None = None,
) -> Evaluation:
    """Ask a release the labelled queries, through the index and exactly; write a report.

    Args:
        config: The job; `evaluate.queries` names the queries.
        progress: Shows what happens.
        version: The release; the newest if None.
        candidate: Run that built an index version without publishing it; then that is asked.

    Raises:
        ConfigError: No queries are configured, or the release lacks the category column.
        CatalogError: The queries can't be read, or none of them can be used.
        StoreError: There is no such release, or it is damaged.
    """
    if config.evaluate.queries is None:
        raise ConfigError(f"{KEY} is not set: name a Parquet file of labelled queries")
    run = Run("evaluate", Store(config.store), progress)
    store = run.store
    release = store.release(version) if candidate is None else store.candidate(candidate)
    catalog_root = read_catalog(config.catalog, need_images=False, need_text=False).root
    file = read_queries(config.evaluate)
    with ray_session(config.ray):
        manifest = store.uri("indexes", release.indexes, "manifest.json")
        check_shared([manifest, config.evaluate.queries, catalog_root])
        named = f"release {release.version}" if candidate is None else f"candidate {candidate}"
        with run.stage("ask the release") as counted:
            progress.step(f"{named}, {len(file.queries):,} queries")
            answers = ask_release(
                store, release, file.queries, file.root, config.images, config.evaluate.category
            )
            counted["rows"] = len(file.queries)
        skipped = _skipped(file, answers)
        if not answers.queries:
            raise CatalogError(f"{KEY} {config.evaluate.queries}: {_why_none(file, skipped)}")
        with run.stage("search exactly"):
            exact = _search_exactly(store, release, answers, config.ray.bucket_rows)
        with run.stage("measure"):
            metrics, paired = _measure(answers, exact)
    evaluation = Evaluation(
        release=release.version if candidate is None else None,
        candidate=candidate,
        queries=len(answers.queries),
        default_field=next(iter(answers.fields)),
        metrics=metrics,
        paired=paired,
        latency_ms=answers.latency_ms,
        skipped=skipped,
        report="",
    )
    report = asdict(evaluation) | _describe(config, release, file, answers)
    report |= {"run": run.run_id, "time": write_trace(run, (), {})}
    address = write_evaluation(store, report, answers.failures, catalog_root, config.images)
    return replace(evaluation, report=address)


def _skipped(file: QueryFile, answers: Answers) -> dict[str, dict[str, Any]]:
    bad_rows = {name: Skipped(of="rows", count=rows) for name, rows in file.bad_rows.items()}
    return {name: asdict(one) for name, one in (bad_rows | answers.skipped).items()}


def _why_none(file: QueryFile, skipped: dict[str, dict[str, Any]]) -> str:
    counts = ", ".join(f"{name} {one['count']}" for name, one in skipped.items())
    example = next((one["examples"][0] for one in skipped.values() if one["examples"]), "")
    return f"none of {len(file.queries)} queries can be used ({counts}; {example})"


def _search_exactly(store: Store, release: Release, answers: Answers, bucket_rows: int) -> Rankings:
    """Search all kinds at once: each data file is read once a field."""
    live = release_rows(store, release, bucket_rows)
    kinds = list(answers.asked)
    queries = np.concatenate([answers.asked[kind].vectors for kind in kinds])
    bounds = np.cumsum([len(answers.asked[kind].vectors) for kind in kinds])[:-1].tolist()
    starts, ends = [0, *bounds], [*bounds, len(queries)]
    rankings: Rankings = {}
    for name, field in answers.fields.items():
        found = search_release(store, release, live, field, queries, RANKS)
        for kind, start, end in zip(kinds, starts, ends, strict=True):
            rankings[kind, name] = found[start:end]
    return rankings


def _measure(
    answers: Answers, exact: Rankings
) -> tuple[dict[str, dict[str, Figures]], dict[str, dict[str, Figures]]]:
    """Turn rankings into figures by kind and field, and into paired differences by field."""
    metrics: dict[str, dict[str, Figures]] = {kind: {} for kind in answers.asked}
    scores: dict[tuple[str, str], Scores] = {}
    for kind, name in product(answers.asked, answers.fields):
        asked = answers.asked[kind]
        queries = [answers.queries[place] for place in asked.places]
        found = asked.found[name]
        scores[kind, name] = score_queries(found, queries)
        exact_scores = score_queries(exact[kind, name], queries)
        categories = [answers.categories[place] for place in asked.places if answers.category]
        metrics[kind][name] = {
            "queries": len(queries),
            "index": summarize(scores[kind, name]),
            "exact": summarize(exact_scores),
            "cost": summarize(subtract(exact_scores, scores[kind, name])),
            "intersection_at_10": overlap(found, exact[kind, name]),
            "by_category": by_category(scores[kind, name], categories) if categories else {},
        }
    paired = {name: dict(_pair(answers, scores, name)) for name in answers.fields}
    return metrics, {name: value for name, value in paired.items() if value}


def _pair(
    answers: Answers, scores: dict[tuple[str, str], Scores], name: str
) -> Iterator[tuple[str, Figures]]:
    """Compare photo and words together with each alone, query by query."""
    if BOTH not in answers.asked:
        return
    both = answers.asked[BOTH].places
    for kind in (IMAGE, TEXT):
        alone = pick(scores[kind, name], np.searchsorted(answers.asked[kind].places, both))
        difference = subtract(scores[BOTH, name], alone)
        yield f"{BOTH} - {kind}", {"queries": len(both)} | summarize(difference)


def _describe(
    config: JobConfig, release: Release, file: QueryFile, answers: Answers
) -> dict[str, Any]:
    """Return what the report says beside the figures."""
    failures = [
        {"query": str(one.searched.query), "rank": one.rank, "right": one.right["product_id"]}
        | {"found": [row["product_id"] for row in one.searched.found]}
        for one in answers.failures
    ]
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "products": release.products,
        "encoder": release.encoder,
        "queries_in_file": file.in_file,
        "queries_drawn": len(file.queries),
        "indexes": {name: answers.indexes[name] for name in answers.fields},
        "category": answers.category,
        "sheet_kind": answers.sheet_kind,
        "failures": {
            "queries": len(answers.asked[answers.sheet_kind].places),
            "near": answers.near,
            "missed": answers.missed,
            "shown": failures,
        },
        "device": answers.device,
        "resamples": RESAMPLES,
        "definitions": DEFINITIONS,
        "config": config.model_dump(mode="json"),
        "config_hash": config.hash(),
    }
