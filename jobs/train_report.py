"""Writes the report of a training run: what it reached, the curves, the configuration."""

from typing import Any

import numpy as np

from jobs.config import JobConfig
from jobs.plots import Line, draw_lines
from jobs.report import render_report
from jobs.store import Store

SMOOTH_STEPS = 25
MOST_POINTS = 600  # of a line: a chart is not wider in pixels, and the page stays small


def write_train_report(store: Store, run: str, config: JobConfig, history: dict[str, Any]) -> str:
    """Write `report.json` and `report.html` below `runs/<run>/`.

    Args:
        store: The store.
        run: The run's id.
        config: What was run.
        history: `jobs.train_loop.History` as a dict.

    Returns:
        Address of report.html.
    """
    report = history | {"run": run, "config": config.model_dump(mode="json")}
    report["config_hash"] = config.hash()
    return render_report(store, run, "train.html", report, charts=_charts(history))


def _charts(history: dict[str, Any]) -> list[str]:
    steps = history["steps"]
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).astype(int))

    def line(values: list[float]) -> Line:
        return [steps[place]["step"] for place in places], [values[place] for place in places]

    losses = {"loss": line(_smooth([step["loss"] for step in steps]))}
    for term in steps[0]["terms"] if len(steps[0]["terms"]) > 1 else ():
        losses[term] = line(_smooth([step["terms"][term] for step in steps]))
    charts = [
        draw_lines(
            losses,
            title=f"Loss, and its terms before their weights (mean of {SMOOTH_STEPS} steps)",
            x_label="step",
            y_label="nats",
        )
    ]
    validations = history["validations"]
    if validations:
        at = [one["step"] for one in validations]
        recall = {
            kind: (at, [one["figures"][kind]["recall_at_1"] for one in validations])
            for kind in validations[-1]["figures"]
        }
        charts.append(
            draw_lines(
                recall, title="Validation recall@1", x_label="step", y_label="recall", marks=True
            )
        )
    scales = {
        kind: line([1 / step["scales"][kind] for step in steps]) for kind in steps[0]["scales"]
    }
    charts.append(
        draw_lines(scales, title="Learned temperatures", x_label="step", y_label="temperature")
    )
    return charts


def _smooth(values: list[float]) -> list[float]:
    """Average each value with those before it, up to `SMOOTH_STEPS` in all."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTH_STEPS)
    return [float(v) for v in (sums[ends] - sums[starts]) / (ends - starts)]
