"""Collects what a report of a build shows by example, with pictures.

Rejected rows, rows that changed, queries whose neighbours changed most. What can't be looked up is
told in its place: a release that is published is not failed by its report.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from jobs.build import BuildTask
from jobs.diff import Counts
from jobs.embed_steps import NO_IMAGE_COLUMN
from jobs.errors import JobError
from jobs.gate import Built
from jobs.images import RejectReason
from jobs.index import FieldIndex
from jobs.live import Reason
from jobs.neighbours import SHOWN, ChangedQuery, name_neighbours
from jobs.plain import title_columns
from jobs.report_lookup import (
    CatalogRow,
    IdsRows,
    Place,
    find_units,
    read_catalog_rows,
    read_ids,
    read_places,
)
from jobs.report_pictures import SMALL_PX, Picture, Pictures, describe_reason
from jobs.run import Run
from jobs.store import Release

KINDS = ("new", "changed", "retried", "metadata", "removed")
NO_PICTURE = Picture(why=describe_reason(RejectReason.MISSING_IMAGE))
NOT_LIVE = Picture(why="not live: see Rejects")
MOST_COLUMNS = 5
VALUE_CHARS = 80
# What is wrong lies not in fetching or in the file, so that there may be a picture to show.
SHOWABLE = frozenset(
    (
        RejectReason.TOO_MANY_PIXELS,
        RejectReason.EMPTY_TEXT,
        RejectReason.TEXT_TOO_LONG,
        RejectReason.BAD_VECTOR,
    )
)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What was found; empty where there is nothing to show.

    Attributes:
        rejects: By (operation, reason): product_id, detail, text, picture.
        changes: By kind of change: product_id, text, picture, before (a picture, or None), differs
            (column, before, after).
        neighbours: By index field: queries with product_id, title, picture, words, shared, of,
            before and after.
        faults: Why something could not be looked up.
    """

    rejects: dict[Reason, list[dict[str, Any]]] = field(default_factory=dict)
    changes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    neighbours: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The rows that examples are made of: of the table, the catalog and both releases."""

    places: dict[Place, Any]
    catalog: dict[int, CatalogRow]
    before: IdsRows
    after: IdsRows


def collect_examples(
    run: Run, task: BuildTask, built: Built, counts: Counts, pictures: Pictures
) -> Examples:
    """Look up the examples, and fetch their pictures.

    Args:
        run: The run; its id names the new index version.
        task: What was built from.
        built: What was built.
        counts: Of the comparison with the store.
        pictures: Of the page.
    """
    try:
        found = _look_up(run, task, built, counts)
        return Examples(
            rejects=_show_rejects(task, built, found, pictures),
            changes=_show_changes(task, counts, found, pictures),
            neighbours={
                index.field: _show_neighbours(task, index, found, pictures)
                for index in built.indexes
            },
        )
    except JobError as error:
        return Examples(faults=[str(error)])


def _look_up(run: Run, task: BuildTask, built: Built, counts: Counts) -> _Found:
    examples, parent = built.live.examples, run.parent
    places = read_places(run.store, built.live.names, chain.from_iterable(examples.values()))
    shown = {
        places[place]["vector_id"]
        for (_, reason), mine in examples.items()
        if RejectReason(reason) in SHOWABLE
        for place in mine
    }
    units = find_units(task.plan, shown) if task.plan is not None else {}
    units |= {one[0]: one[1] for kind in KINDS[:-1] for one in counts.examples.get(kind, ())}
    changed = [one[0] for kind in KINDS for one in counts.examples.get(kind, ())]
    asked = [query for index in built.indexes for query in _least(index)]
    before, after = (
        {one for query in asked for one, _ in getattr(query, side)} for side in ("before", "after")
    )
    own = {query.vector_id for query in asked if query.vector_id >= 0}
    titles = title_columns(task.config.catalog.columns)
    newest, new = parent.indexes if parent else None, run.run_id if built.indexes else None
    return _Found(
        places=places,
        catalog=read_catalog_rows(task.catalog, task.space.recipe, units, task.config.images),
        before=_read_release(run, newest, before, changed, titles),
        after=_read_release(run, new, after | own, changed, titles),
    )


def _read_release(
    run: Run, folder: str | None, found: set[int], changed: list[int], titles: Sequence[str]
) -> IdsRows:
    """Read rows that were found, and with all their metadata those that changed."""
    if folder is None:
        return {}
    rows = read_ids(run.store, folder, found.difference(changed), titles)
    return rows | read_ids(run.store, folder, changed, titles, whole=True)


def describe_neighbours(built: Built, parent: Release | None, encoder: str) -> list[dict[str, Any]]:
    """Say of each index how many queries have other neighbours, or why that is not known.

    Args:
        built: What was measured.
        parent: The newest release.
        encoder: Fingerprint of the new one's.

    Returns:
        One dict an index: field, queries, changed, overlap, why.
    """
    return [
        {
            "field": index.field,
            "queries": index.measured.changed.queries if index.measured.changed else 0,
            "changed": index.measured.changed.changed if index.measured.changed else 0,
            "overlap": index.measured.overlap_at_10,
            "why": _why_not_compared(index, parent, encoder),
        }
        for index in built.indexes
    ]


def _why_not_compared(index: FieldIndex, parent: Release | None, encoder: str) -> str:
    if index.measured.changed is not None:
        return ""
    if parent is None:
        return "There is no release to compare with."
    if parent.encoder != encoder:
        return f"Release {parent.version} is of another encoder: its vectors mean other things."
    if index.measured.not_compared:
        return f"Release {parent.version} can't be asked: {index.measured.not_compared}."
    return f"Release {parent.version} has no index of the same vectors to compare with."


def _least(index: FieldIndex) -> tuple[ChangedQuery, ...]:
    changed = index.measured.changed
    return () if changed is None else changed.least


def _show_rejects(
    task: BuildTask, built: Built, found: _Found, pictures: Pictures
) -> dict[Reason, list[dict[str, Any]]]:
    shown: dict[Reason, list[dict[str, Any]]] = {}
    for key, places in built.live.examples.items():
        told = [found.places[place] for place in places]
        told = [one for one in told if one["reject_detail"] != NO_IMAGE_COLUMN]
        reason = RejectReason(key[1])
        # The row may be known as an example of a change: what was not to be had is not asked again.
        rows = [found.catalog.get(one["vector_id"]) for one in told]
        asked = [row if reason in SHOWABLE else None for row in rows]
        made = _pictures_of(asked, task.catalog.root, pictures)
        shown[key] = [
            {
                "product_id": one["product_id"],
                "detail": one["reject_detail"] or "",
                "text": row.text if row else "",
                "picture": picture if fetched else Picture(why=describe_reason(reason)),
            }
            for one, row, fetched, picture in zip(told, rows, asked, made, strict=True)
        ]
    return shown


def _pictures_of(
    rows: Sequence[CatalogRow | None], root: str, pictures: Pictures
) -> Iterator[Picture]:
    fetched = pictures.show([row.uri if row else None for row in rows], root)
    for row, picture in zip(rows, fetched, strict=True):
        if row is None or row.uri:
            yield picture
        else:
            yield pictures.count(row.picture) if row.picture else NO_PICTURE


def _show_changes(
    task: BuildTask, counts: Counts, found: _Found, pictures: Pictures
) -> dict[str, list[dict[str, Any]]]:
    live = (row.uri for vector_id, row in found.catalog.items() if vector_id in found.after)
    pictures.load(live, task.catalog.root)
    shown = {
        kind: [
            _show_change(task, kind, one[0], found, pictures)
            for one in counts.examples.get(kind, ())
            if one[0] in found.catalog or one[0] in found.before
        ]
        for kind in KINDS
    }
    return {kind: rows for kind, rows in shown.items() if rows}


def _show_change(
    task: BuildTask, kind: str, vector_id: int, found: _Found, pictures: Pictures
) -> dict[str, Any]:
    root, row = task.catalog.root, found.catalog.get(vector_id)
    then, now = found.before.get(vector_id), found.after.get(vector_id)
    if row is None:  # removed: what the newest release knows of it
        then = then or {}
        picture = pictures.show([then.get("image_uri")], root)[0]
        name = {"product_id": then.get("product_id", ""), "text": then.get("title", "")}
        return name | {"picture": picture, "before": None, "differs": []}
    moved = kind == "changed" and then is not None and then["image_uri"] not in (None, row.uri)
    # What was refused is not fetched again.
    fetched = next(_pictures_of([row], root, pictures)) if now or row.picture else NOT_LIVE
    return {
        "product_id": row.product_id,
        "text": row.text,
        "picture": fetched,
        "before": pictures.show([then["image_uri"]], root)[0] if then and moved else None,
        "differs": _compare_columns(then, now) if then and now else [],
    }


def _compare_columns(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return some columns that differ, with their values before and after."""
    before, after = then["metadata"] or {}, now["metadata"] or {}
    texts = ((name, _text(before.get(name)), _text(value)) for name, value in after.items())
    differ = [(name, *pair) for name, *pair in texts if pair[0] != pair[1]]
    return [{"column": name, **_cut(*pair)} for name, *pair in differ[:MOST_COLUMNS]]


def _text(value: object) -> str:
    missing = value is None or value != value  # NaN differs from itself
    return "nothing" if missing else str(value)


def _cut(before: str, after: str) -> dict[str, str]:
    """Cut two texts to what fits a line and shows where they begin to differ."""
    pairs, shorter = enumerate(zip(before, after, strict=False)), min(len(before), len(after))
    same = next((place for place, (one, other) in pairs if one != other), shorter)
    fits = max(len(before), len(after)) <= VALUE_CHARS
    start = 0 if fits else max(0, same - VALUE_CHARS // 2)
    return {"before": _cut_from(start, before), "after": _cut_from(start, after)}


def _cut_from(start: int, text: str) -> str:
    end = start + VALUE_CHARS
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def _show_neighbours(
    task: BuildTask, index: FieldIndex, found: _Found, pictures: Pictures
) -> list[dict[str, Any]]:
    named = ((query, name_neighbours(query, found.before, found.after)) for query in _least(index))
    told = [(query, lists) for query, lists in named if lists is not None][:SHOWN]
    sides = [one for _, lists in told for side in ("before", "after") for one in lists[side]]
    pictures.load((one["image_uri"] for one in sides), task.catalog.root, SMALL_PX)
    return [
        _show_query(task, query, found.after, pictures)
        | {name: lists[name] for name in ("shared", "of")}
        | {side: _show_list(task, lists[side], pictures) for side in ("before", "after")}
        for query, lists in told
    ]


def _show_query(
    task: BuildTask, query: ChangedQuery, after: IdsRows, pictures: Pictures
) -> dict[str, Any]:
    if query.asked is not None:
        picture = pictures.show([query.asked.image], query.root)[0] if query.asked.image else None
        words = (query.asked.text or "")[:VALUE_CHARS]
        return {"product_id": "", "title": "", "picture": picture, "words": words}
    row = after[query.vector_id]
    picture = pictures.show([row["image_uri"]], task.catalog.root)[0]
    name = {"product_id": row["product_id"], "title": row["title"]}
    return name | {"picture": picture, "words": ""}


def _show_list(
    task: BuildTask, products: list[dict[str, Any]], pictures: Pictures
) -> list[dict[str, Any]]:
    uris = [one["image_uri"] for one in products]
    made = pictures.show(uris, task.catalog.root, SMALL_PX)
    return [one | {"picture": picture} for one, picture in zip(products, made, strict=True)]
