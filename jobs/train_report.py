"""Writes the report of a training run: what it reached, the curves, the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.config import JobConfig
from jobs.plots import Line, Mark, draw_lines
from jobs.report import render_report
from jobs.run import Run
from jobs.trace import write_trace

SMOOTH_STEPS = 25
MOST_POINTS = 600  # of a line: a chart is not wider in pixels, and the page stays small
MOST_ROWS = 12  # of a table beside a chart


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart and some of its numbers.

    Attributes:
        heads: Of the table; the first is the step.
        rows: Step, and the value of each line there.
    """

    title: str
    svg: str
    heads: list[str]
    rows: list[list[float]]


def write_train_report(run: Run, config: JobConfig, history: dict[str, Any]) -> str:
    """Write `report.json` and `report.html` below `runs/<run>/`.

    Args:
        run: The run; it is nearly over.
        config: What was run.
        history: `jobs.train_loop.History` as a dict.

    Returns:
        Address of report.html.
    """
    report = history | {"run": run.run_id, "config": config.model_dump(mode="json")}
    report |= {"config_hash": config.hash(), "time": write_trace(run, (), {})}
    return render_report(run.store, run.run_id, "train.html", report, charts=draw_charts(history))


def draw_charts(history: Mapping[str, Any]) -> list[Chart]:
    """Draw loss, validation and temperatures by step.

    Args:
        history: `jobs.train_loop.History` as a dict.
    """
    loss, temperatures = _draw_steps(history)
    return [loss, *_draw_validations(history), temperatures]


def _draw_steps(history: Mapping[str, Any]) -> tuple[Chart, Chart]:
    steps = history["steps"]
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).astype(int))

    def line(values: list[float]) -> Line:
        return [steps[place]["step"] for place in places], [values[place] for place in places]

    losses = {"loss": line(_smooth([step["loss"] for step in steps]))}
    for term in steps[0]["terms"] if len(steps[0]["terms"]) > 1 else ():
        losses[term] = line(_smooth([step["terms"][term] for step in steps]))
    scales = {
        kind: line([1 / step["scales"][kind] for step in steps]) for kind in steps[0]["scales"]
    }
    smoothed = f"Loss, and its terms before their weights (mean of {SMOOTH_STEPS} steps)"
    temperatures = _draw(scales, "Learned temperatures", "temperature")
    return _draw(losses, smoothed, "nats"), temperatures


def _draw_validations(history: Mapping[str, Any]) -> list[Chart]:
    validations = history["validations"]
    if not validations:
        return []
    at = [one["step"] for one in validations]
    recall = {
        kind: (at, [one["figures"][kind]["recall_at_1"] for one in validations])
        for kind in validations[-1]["figures"]
    }
    best = next((one for one in validations if one["step"] == history["best_step"]), None)
    mark = best and Mark(
        x=best["step"],
        y=best["figures"][best["kind"]]["recall_at_1"],
        words=f"kept: step {best['step']}",
    )
    return [_draw(recall, "Validation recall@1", "recall@1", mark=mark, marks=True)]


def _draw(
    lines: Mapping[str, Line],
    title: str,
    y_label: str,
    *,
    mark: Mark | None = None,
    marks: bool = False,
) -> Chart:
    steps = next(iter(lines.values()))[0]
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_ROWS)).astype(int))
    return Chart(
        title=title,
        svg=draw_lines(lines, title=title, x_label="step", y_label=y_label, marks=marks, mark=mark),
        heads=["#step", *(f"#{name}" for name in lines)],
        rows=[[steps[place], *(values[place] for _, values in lines.values())] for place in places],
    )


def _smooth(values: list[float]) -> list[float]:
    """Average each value with those before it, up to `SMOOTH_STEPS` in all."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTH_STEPS)
    return [float(v) for v in (sums[ends] - sums[starts]) / (ends - starts)]
