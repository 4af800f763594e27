"""Writes a run's report: `report.json` for programs, self-contained `report.html` for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from jobs.answers import Failure
from jobs.images import ImagesConfig
from jobs.plain import title_columns
from jobs.report_charts import draw_curve, draw_lists, name_point
from jobs.report_examples import Examples
from jobs.report_pictures import Picture, Pictures
from jobs.report_sheets import show_failures
from jobs.run import Run
from jobs.store import Release, Store
from jobs.trace import write_trace


def write_report(
    store: Store, run: str, report: dict[str, Any], examples: Examples, **shown: object
) -> str:
    """Write the report of a build below `runs/<run>/`.

    Args:
        store: The store.
        run: The run's id.
        report: Plain values; all of them measured in this run.
        examples: What is shown of rejects, changes and neighbours; their words go into the JSON.
        **shown: Contact sheets with pictures: `sheet` and `shared`.

    Returns:
        Address of report.html.
    """
    report |= {
        "changes": drop_pictures(examples.changes),
        "faults_of_report": examples.faults,
    }
    for one in report["neighbours"]:
        one["shown"] = drop_pictures(examples.neighbours.get(one["field"], []))
    charts = {
        index["field"]: {
            "curve": draw_curve(index, report["config"]["index"]["target_intersection"]),
            "lists": draw_lists(index),
        }
        for index in report["indexes"]
    }
    return render_report(
        store, run, "report.html", report, examples=examples, charts=charts, **shown
    )


def drop_pictures(value: Any) -> Any:  # noqa: ANN401 - lists and dicts of plain values
    """Return plain values without the pictures among them."""
    if isinstance(value, dict):
        kept = {name: one for name, one in value.items() if not isinstance(one, Picture)}
        return {name: drop_pictures(one) for name, one in kept.items()}
    return [drop_pictures(one) for one in value] if isinstance(value, list) else value


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
        report: Plain values, `run` and `config` among them; all of them of this run.
        failures: Queries to show on the contact sheet.
        catalog_root: Where relative product image URIs start.
        images: Limits for the pictures.

    Returns:
        Address of report.html.
    """
    report["report"] = store.uri("runs", report["run"], "report.html")
    pictures = Pictures(
        images=images, nowhere="no address: the catalog has none or holds the picture"
    )
    titles = title_columns(report["config"]["catalog"]["columns"])
    sheet = show_failures(failures, catalog_root, pictures, titles)
    return render_report(store, report["run"], "evaluate.html", report, sheet=sheet)


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
    page = open_templates().get_template(template).render(r=report, **shown)
    store.write_text(json.dumps(report, indent=2, ensure_ascii=False), "runs", run, "report.json")
    return store.write_text(page, "runs", run, "report.html")


def open_templates() -> Environment:
    """Return the templates of all reports; a name that is missing in one is an error."""
    environment = Environment(
        loader=PackageLoader("jobs"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"point": name_point, "count": "{:,}".format}
    return environment
