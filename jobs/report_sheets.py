"""Makes the contact sheets of a report: queries with what they found, shared images."""

from collections.abc import Sequence
from typing import Any

from jobs.answers import Failure
from jobs.plain import title_of
from jobs.queries import SearchedQuery
from jobs.report_pictures import Pictures

SHEET_RESULTS = 5
WORDS_CHARS = 120


def show_queries(
    sheet: Sequence[SearchedQuery], catalog_root: str, pictures: Pictures, titles: Sequence[str]
) -> list[dict[str, Any]]:
    """Return queries with pictures of what they found.

    Args:
        sheet: The queries.
        catalog_root: Where relative product image URIs start.
        pictures: Of the page.
        titles: See `jobs.plain.title_columns`.

    Returns:
        One dict a query: picture (None: it is words), words, right (product ids), and found:
        picture, product_id, title, score, right.
    """
    _load(sheet, catalog_root, pictures)
    return [_show_query(one, catalog_root, pictures, titles) for one in sheet]


def show_failures(
    failures: Sequence[Failure], catalog_root: str, pictures: Pictures, titles: Sequence[str]
) -> list[dict[str, Any]]:
    """Return as `show_queries`, and rank and wanted: the right product that did not come first."""
    _load([one.searched for one in failures], catalog_root, pictures)
    pictures.load((one.right["image_uri"] for one in failures), catalog_root)
    return [
        _show_query(one.searched, catalog_root, pictures, titles)
        | {"rank": one.rank, "wanted": _show_product(one.right, catalog_root, pictures, titles)}
        for one in failures
    ]


def show_shared(
    placeholders: Sequence[dict[str, Any]], catalog_root: str, pictures: Pictures
) -> list[dict[str, Any]]:
    """Return the images that many rows share, with their pictures."""
    made = pictures.show([one["image_uri"] for one in placeholders], catalog_root)
    return [one | {"picture": picture} for one, picture in zip(placeholders, made, strict=True)]


def _load(sheet: Sequence[SearchedQuery], catalog_root: str, pictures: Pictures) -> None:
    for root in {one.root for one in sheet}:
        pictures.load((one.query.image for one in sheet if one.root == root), root)
    found = (row["image_uri"] for one in sheet for row in one.found[:SHEET_RESULTS])
    pictures.load(found, catalog_root)


def _show_query(
    one: SearchedQuery, catalog_root: str, pictures: Pictures, titles: Sequence[str]
) -> dict[str, Any]:
    right = one.query.relevant
    return {
        "picture": pictures.show([one.query.image], one.root)[0] if one.query.image else None,
        "words": (one.query.text or "")[:WORDS_CHARS],
        "right": ", ".join(right),
        "found": [
            _show_product(row, catalog_root, pictures, titles)
            | {"score": row["score"], "right": row["product_id"] in right}
            for row in one.found[:SHEET_RESULTS]
        ],
    }


def _show_product(
    row: dict[str, Any], catalog_root: str, pictures: Pictures, titles: Sequence[str]
) -> dict[str, Any]:
    picture = pictures.show([row["image_uri"]], catalog_root)[0]
    return {"product_id": row["product_id"], "title": title_of(row, titles), "picture": picture}
