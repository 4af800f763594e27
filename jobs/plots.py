"""Draws line charts as SVG that takes the colours of the page it stands in."""

import io
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from matplotlib import rc_context
from matplotlib.figure import Figure

Line = tuple[Sequence[float], Sequence[float]]
"""The x and the y values of a line."""

# Else each chart would name its maker's page and the time.
_NO_METADATA: dict[Any, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
# Black is replaced by the page's text colour; the lines' colours read on white and on black.
_COLORS = ("#2f81f7", "#d9822b", "#2da44e", "#c05ad8", "#8b949e", "#d1495b")
_DASHES = ("-", "--", ":")  # where there are more lines than colours
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it is read aloud and takes the page's font
    "svg.hashsalt": "vitrine",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
}


def draw_lines(
    lines: Mapping[str, Line], *, title: str, x_label: str, y_label: str, marks: bool = False
) -> str:
    """Draw named lines in one chart.

    Args:
        lines: By name; the name is in the legend.
        title: What the chart shows; also its accessible name.
        x_label: With its unit.
        y_label: With its unit.
        marks: Whether to mark every point, for lines of few.

    Returns:
        An `<svg>` element.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, (x, y)) in enumerate(lines.items()):
            again, color = divmod(number, len(_COLORS))
            axes.plot(
                x,
                y,
                label=name,
                color=_COLORS[color],
                linestyle=_DASHES[again % len(_DASHES)],
                linewidth=1.6,
                marker="o" if marks else None,
                markersize=3,
            )
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        axes.grid(visible=True)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label={quoteattr(title)} ', 1)
    # Text without a colour of its own takes the fill from here.
    return svg.replace("<svg ", '<svg fill="currentColor" style="width:100%;height:auto" ', 1)
