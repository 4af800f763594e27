"""Writes a run's report: `report.json` for programs, self-contained `report.html` for people."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from jobs.answers import Failure
from jobs.fetch import fetch_images
from jobs.images import ImageRejected, ImagesConfig, decode_image
from jobs.plots import Line, draw_lines
from jobs.queries import SearchedQuery
from jobs.run import Run
from jobs.store import Release, Store
from jobs.trace import write_trace

THUMBNAIL_PX = 160
SHEET_RESULTS = 5


def write_report(
    store: Store,
    run: str,
    report: dict[str, Any],
    sheet: Sequence[SearchedQuery],
    catalog_root: str,
    images: ImagesConfig,
) -> str:
    """Write both forms below `runs/<run>/`.

    Args:
        store: The store.
        run: The run's id.
        report: Plain values; all of them measured in this run.
        sheet: Queries and results for the contact sheet.
        catalog_root: Where relative product image URIs start.
        images: Limits for the pictures.

    Returns:
        Address of report.html.
    """
    rows = [_sheet_row(one, catalog_root, images) for one in sheet]
    pictures = _thumbnails(
        [one["image_uri"] for one in report["placeholders"]], catalog_root, images
    )
    shared = [
        one | {"picture": picture}
        for one, picture in zip(report["placeholders"], pictures, strict=True)
    ]
    charts = {index["field"]: _draw_curve(index) for index in report["indexes"]}
    return render_report(
        store, run, "report.html", report, sheet=rows, shared=shared, charts=charts
    )


def _draw_curve(index: dict[str, Any]) -> str:
    """Draw what an index finds, and the time it takes, against the bytes that a query touches.

    Nothing for a single point.
    """
    curve = index["curve"]
    if len(curve) < 2:
        return ""
    shares = {
        "intersection@10": "intersection",
        "of street queries": "labelled_intersection",
        "recall@10": "recall",
    }
    times = {"median": "latency_p50_ms", "99th percentile": "latency_p99_ms"}
    chosen = next(one for one in curve if one["point"] == index["point"])
    x_label = "kB that a query touches"
    return draw_lines(
        _lines(curve, shares) | {"chosen point": _line([chosen], "intersection")},
        title=f"{index['field']}: what a search finds",
        x_label=x_label,
        y_label="share",
        marks=True,
    ) + draw_lines(
        _lines(curve, times) | {"chosen point": _line([chosen], "latency_p50_ms")},
        title=f"{index['field']}: how long a query takes by itself",
        x_label=x_label,
        y_label="ms",
        marks=True,
    )


def _lines(curve: Sequence[dict[str, Any]], named: dict[str, str]) -> dict[str, Line]:
    return {n: _line(curve, key) for n, key in named.items() if curve[0][key] is not None}


def _line(curve: Sequence[dict[str, Any]], key: str) -> Line:
    return [one["cost"] / 1e3 for one in curve], [one[key] for one in curve]


def write_idle_report(run: Run, release: Release) -> str:
    """Write the report of a run that found nothing to do.

    Args:
        run: The run.
        release: The newest release, which shows the catalog as it is.

    Returns:
        Address of report.html.
    """
    report = asdict(release) | {
        "run": run.run_id,
        "release": release.version,
        "published": False,
        "stages": run.stages,
        "embedded": 0,
        "time": write_trace(run, (), {}),
    }
    return render_report(run.store, run.run_id, "idle.html", report)


def write_evaluation(
    store: Store,
    report: dict[str, Any],
    failures: Sequence[Failure],
    catalog_root: str,
    images: ImagesConfig,
) -> str:
    """Write both forms of an evaluation below `runs/<run>/`.

    Args:
        store: The store.
        report: Plain values, `run` among them; all of them measured in this run.
        failures: Queries to show on the contact sheet.
        catalog_root: Where relative product image URIs start.
        images: Limits for the pictures.

    Returns:
        Address of report.html.
    """
    report["report"] = store.uri("runs", report["run"], "report.html")
    rows = [_failure_row(one, catalog_root, images) for one in failures]
    return render_report(store, report["run"], "evaluate.html", report, sheet=rows)


def render_report(
    store: Store, run: str, template: str, report: dict[str, Any], **shown: object
) -> str:
    """Write a report below `runs/<run>/`: as JSON, and as a page.

    Args:
        store: The store.
        run: The run's id.
        template: Name in `jobs/templates`.
        report: Plain values; `r` in the template.
        **shown: What the page shows beside them: pictures, charts.

    Returns:
        Address of report.html.
    """
    environment = Environment(
        loader=PackageLoader("jobs"), autoescape=select_autoescape(), undefined=StrictUndefined
    )
    page = environment.get_template(template).render(r=report, **shown)
    store.write_text(json.dumps(report, indent=2, ensure_ascii=False), "runs", run, "report.json")
    return store.write_text(page, "runs", run, "report.html")


def _failure_row(one: Failure, catalog_root: str, images: ImagesConfig) -> dict[str, Any]:
    row = _sheet_row(one.searched, catalog_root, images)
    picture = _thumbnails([one.right["image_uri"]], catalog_root, images)[0]
    words = one.searched.query.text or ""
    return row | {
        "caption": words[:120] if one.searched.query.image else "",
        "rank": one.rank,
        "right": {"picture": picture, "caption": _caption(one.right)},
    }


def _sheet_row(one: SearchedQuery, catalog_root: str, images: ImagesConfig) -> dict[str, Any]:
    found = one.found[:SHEET_RESULTS]
    pictures = _thumbnails([row["image_uri"] for row in found], catalog_root, images)
    results = [
        {
            "picture": picture,
            "score": row["score"],
            "caption": _caption(row),
            "right": row["product_id"] in one.query.relevant,
        }
        for row, picture in zip(found, pictures, strict=True)
    ]
    picture = _thumbnails([one.query.image], one.root, images)[0] if one.query.image else ""
    caption = ", ".join(one.query.relevant)
    if one.query.text and not one.query.image:
        picture = f'<div class="none">{html.escape(one.query.text[:120])}</div>'
    return {"picture": picture, "caption": caption, "found": results, "right": None, "rank": None}


def _caption(row: dict[str, Any]) -> str:
    metadata = row["metadata"]
    name = next((metadata[key] for key in ("title", "name") if metadata.get(key)), "")
    return f"{row['product_id']} {str(name)[:60]}"


def _thumbnails(uris: list[str | None], root: str, images: ImagesConfig) -> list[str]:
    """Return an <img> with its data for each URI; words where there is no picture."""
    return [_thumbnail(data, images) for data in fetch_images(uris, root, images)]


def _thumbnail(data: bytes | ImageRejected, images: ImagesConfig) -> str:
    try:
        if isinstance(data, ImageRejected):
            raise data
        image = decode_image(data, images, min_side_px=THUMBNAIL_PX)
    except ImageRejected as reject:
        return f'<div class="none">{html.escape(str(reject.reason))}</div>'
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{text}">'
