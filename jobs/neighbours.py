"""Finds the queries whose nearest neighbours changed most since the newest release.

Both indexes are asked with the same vectors, so that nothing but what they hold, and how well they
find it, makes a difference.

Letters: Q queries, K neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.queries import Query

SHOWN = 6
KEPT = 4 * SHOWN  # where several images of one product changed places, the products did not

BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Found = tuple[Float32Array, Int64Array]
"""Scores (Q, K) float32, best first, and vector ids (Q, K) int64, padded with -1."""
Neighbours = tuple[tuple[int, float], ...]
"""Vector ids with their scores, best first."""


@dataclass(frozen=True, kw_only=True)
class ChangedQuery:
    """A query that finds other vectors than in the newest release, itself left out.

    Attributes:
        place: Which of its kind's Q queries it is.
        vector_id: Its own, of a catalog vector; -1: it is a labelled query.
        shared: How many vectors both releases find, of as many as both return.
        asked: The labelled query.
        root: The folder that its image URI starts from.
    """

    place: int
    vector_id: int
    shared: int
    before: Neighbours
    after: Neighbours
    asked: Query | None = None
    root: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the neighbours of some queries changed.

    Attributes:
        queries: How many could be compared.
        changed: How many of them find other vectors.
        least: Those of them that share the fewest, the fewest first.
    """

    queries: int
    changed: int
    least: tuple[ChangedQuery, ...]


def compare_neighbours(own: Int64Array, counted: BoolArray, now: Found, then: Found) -> Comparison:
    """Compare what two indexes find for the same queries.

    Args:
        own: (Q,) int64, the query's own vector id, which is left out of both; -1: it has none.
        counted: (Q,) bool, whose nearest neighbours are defined.
        now: What the new index finds.
        then: What the newest release's index finds.
    """
    queries, changed = 0, []
    for place in np.flatnonzero(counted).tolist():
        vector_id = int(own[place])
        after, before = (_others(found, place, vector_id) for found in (now, then))
        compared = min(len(after), len(before))
        after, before = after[:compared], before[:compared]
        shared = len({one for one, _ in after} & {one for one, _ in before})
        queries += compared > 0
        if shared < compared:
            changed.append(
                ChangedQuery(
                    place=place, vector_id=vector_id, shared=shared, before=before, after=after
                )
            )
    changed.sort(key=lambda one: one.shared / len(one.after))
    return Comparison(queries=queries, changed=len(changed), least=tuple(changed[:KEPT]))


def _others(found: Found, place: int, own: int) -> Neighbours:
    pairs = zip(found[1][place].tolist(), found[0][place].tolist(), strict=True)
    return tuple((one, score) for one, score in pairs if one not in (-1, own))


def join_comparisons(one: Comparison, other: Comparison) -> Comparison:
    """Return the comparison of two sets of queries together."""
    least = sorted((*one.least, *other.least), key=lambda query: query.shared / len(query.after))
    return Comparison(
        queries=one.queries + other.queries,
        changed=one.changed + other.changed,
        least=tuple(least[:KEPT]),
    )


Rows = Mapping[int, Mapping[str, Any]]
"""By vector id: product_id, image_uri and title."""


def name_neighbours(query: ChangedQuery, before: Rows, after: Rows) -> dict[str, Any] | None:
    """Name the products that a query found before and after, with their ranks in both.

    Args:
        query: The query.
        before: Rows of the newest release.
        after: Rows of the new one.

    Returns:
        shared, of, and the lists before and after: product_id, image_uri, title, score, rank, and
        other_rank, in the other list; None: not there. None where both hold the same products.
    """
    own = after.get(query.vector_id, {}).get("product_id")
    now, then = _products(query.after, after, own), _products(query.before, before, own)
    shared = {one["product_id"] for one in now} & {one["product_id"] for one in then}
    if len(shared) == len(now) == len(then):
        return None
    _add_ranks(now, then)
    _add_ranks(then, now)
    of = max(len(now), len(then))
    return {"shared": len(shared), "of": of, "before": then, "after": now}


def _products(found: Neighbours, rows: Rows, own: str | None) -> list[dict[str, Any]]:
    """Return the best vector of each product, without those of the query's own product."""
    best: dict[str, dict[str, Any]] = {}
    for vector_id, score in found:
        row = rows.get(vector_id)  # an id that is not live stops the gate, not the report
        if row is not None and row["product_id"] != own:
            kept = {name: row[name] for name in ("product_id", "image_uri", "title")}
            best.setdefault(row["product_id"], kept | {"score": score, "rank": len(best) + 1})
    return list(best.values())


def _add_ranks(mine: Sequence[dict[str, Any]], others: Sequence[Mapping[str, Any]]) -> None:
    ranks = {one["product_id"]: one["rank"] for one in others}
    for one in mine:
        one["other_rank"] = ranks.get(one["product_id"])
