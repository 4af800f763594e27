"""Draws the charts of a report on indexes: what is found at what cost, how long the lists are."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.plots import Line, Mark, draw_histogram, draw_lines

LOG_RATIO = 20

Values = Mapping[str, Any]
_FOUND = {
    "intersection@10": "intersection",
    "of street queries": "labelled_intersection",
    "recall@10": "recall",
}
_TIMES = {"median": "latency_p50_ms", "99th percentile": "latency_p99_ms"}


def draw_curve(index: Values, target: float) -> list[str]:
    """Draw what an index finds against the bytes that a query touches, and against its time.

    Args:
        index: `jobs.index.FieldIndex` as plain values.
        target: The intersection that the operating point has to reach.

    Returns:
        SVG elements; none for a single point.
    """
    curve = index["curve"]
    if len(curve) < 2:
        return []
    chosen = next(one for one in curve if one["point"] == index["point"])
    field, words = index["field"], f"chosen: {name_point(chosen['point'])}"
    reach = (f"target {target:g}", target)
    found = {name: key for name, key in _FOUND.items() if curve[0][key] is not None}
    touched = {
        name: ([one["cost"] / 1e3 for one in curve], _values(curve, key))
        for name, key in found.items()
    }
    by_time: dict[str, Line] = {
        name: (_values(curve, key), _values(curve, "intersection")) for name, key in _TIMES.items()
    }
    return [
        draw_lines(
            touched,
            title=f"{field}: what a search finds, by what it touches",
            x_label="kB that a query touches",
            y_label="share",
            marks=True,
            log_x=_spreads([one["cost"] for one in curve]),
            mark=Mark(x=chosen["cost"] / 1e3, y=chosen["intersection"], words=words),
            target=reach,
        ),
        draw_lines(
            by_time,
            title=f"{field}: what a search finds, by its time",
            x_label="ms of one query by itself",
            y_label="intersection@10",
            marks=True,
            log_x=_spreads([one[key] for one in curve for key in _TIMES.values()]),
            mark=Mark(x=chosen["latency_p50_ms"], y=chosen["intersection"], words=words),
            target=reach,
        ),
    ]


def _spreads(values: Sequence[float]) -> bool:
    """Say whether the small ones would share a few pixels on a linear axis."""
    return 0 < LOG_RATIO * min(values) < max(values)


def _values(curve: Sequence[Values], key: str) -> list[float]:
    return [one[key] for one in curve]


def name_point(point: Values) -> str:
    """Name an operating point for people."""
    parts = [f"nprobe {point['nprobe']}" if point["nprobe"] else "every vector"]
    parts += [f"efSearch {point['ef_search']}"] if point["ef_search"] else []
    parts += [f"re-rank {point['rerank']}"] if point["rerank"] else []
    return ", ".join(parts)


def draw_lists(index: Values) -> str:
    """Draw how many lists of an index have how many vectors; nothing for an index without lists."""
    lists = index["measured"]["lists"]
    if lists is None:
        return ""
    bins = lists["bins"]
    return draw_histogram(
        [*(one["from"] for one in bins), bins[-1]["to"]],
        [one["lists"] for one in bins],
        title=f"{index['field']}: how long its lists are",
        x_label="vectors in a list",
        y_label="lists",
        level=(f"median {lists['median']:,.1f}", lists["median"]),
    )
