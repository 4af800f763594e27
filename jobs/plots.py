"""Draws charts as SVG that takes the colours of the page it stands in."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

if TYPE_CHECKING:  # matplotlib takes a third of a second, and most commands draw nothing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = tuple[Sequence[float], Sequence[float]]
"""The x and the y values of a line."""

# Else each chart would name its maker's page and the time.
_NO_METADATA: dict[Any, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
# Black is replaced by the page's text colour; the lines' colours have a contrast of 3.6 and more
# with the page, light and dark.
_COLORS = ("#2f81f7", "#c2701c", "#2b9348", "#c05ad8", "#7d8590", "#d1495b")
_DASHES = ("-", "--", ":")  # where there are more lines than colours
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it is read aloud and takes the page's font
    "svg.hashsalt": "vitrine",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
}
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r'(url\(#|href="#)([^)"]*)')


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point that is pointed out, with a few words beside it."""

    x: float
    y: float
    words: str


def draw_lines(
    lines: Mapping[str, Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: bool = False,
    log_x: bool = False,
    mark: Mark | None = None,
    target: tuple[str, float] | None = None,
) -> str:
    """Draw named lines in one chart.

    Args:
        lines: By name; the name is in the legend.
        title: What the chart shows; also its accessible name.
        x_label: With its unit.
        y_label: With its unit.
        marks: Whether to mark every point, for lines of few.
        log_x: Whether the x axis is logarithmic.
        mark: A point to point out.
        target: Words and the y that is to be reached: a level line.

    Returns:
        An `<svg>` element.
    """
    with _styled():
        figure, axes = _begin(title, x_label, y_label)
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
        if log_x:
            axes.set_xscale("log")
        if target is not None:
            axes.axhline(target[1], label=target[0], color="black", linestyle=":", linewidth=1.2)
        if mark is not None:
            _point_out(axes, mark)
        axes.grid(visible=True)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        return _finish(figure, title)


def draw_histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    title: str,
    x_label: str,
    y_label: str,
    level: tuple[str, float],
) -> str:
    """Draw how many there are of each size.

    Args:
        edges: (bins + 1,) rising bounds; where their widths differ, the axis is logarithmic.
        counts: (bins,) how many.
        title: What the chart shows; also its accessible name.
        x_label: With its unit.
        y_label: With its unit.
        level: Words and the x of an upright line.

    Returns:
        An `<svg>` element.
    """
    from matplotlib.ticker import MaxNLocator

    with _styled():
        figure, axes = _begin(title, x_label, y_label)
        axes.stairs(counts, edges, fill=True, color=_COLORS[0])
        if edges[-1] - edges[-2] != edges[1] - edges[0]:
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(0, edges[-1])
        axes.axvline(level[1], label=level[0], color="black", linestyle=":", linewidth=1.2)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=True, axis="y")
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        return _finish(figure, title)


def _styled() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context(_STYLE)


def _begin(title: str, x_label: str, y_label: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    return figure, axes


def _point_out(axes: "Axes", mark: Mark) -> None:
    axes.plot(
        [mark.x],
        [mark.y],
        marker="o",
        markersize=10,
        markerfacecolor="none",
        markeredgecolor="black",
        linestyle="none",
    )
    low, high = axes.get_xlim()
    left = axes.transData.transform((mark.x, mark.y))[0]
    ends = axes.transData.transform([(low, mark.y), (high, mark.y)])[:, 0]
    on_right = left > ends.mean()
    axes.annotate(
        mark.words,
        (mark.x, mark.y),
        xytext=(-12 if on_right else 12, -16),
        textcoords="offset points",
        ha="right" if on_right else "left",
        va="top",
        fontsize=9,
    )


def _finish(figure: "Figure", title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = _own_ids(svg[svg.index("<svg") :].replace("#000000", "currentColor"))
    svg = svg.replace("<svg ", f'<svg role="img" aria-label={quoteattr(title)} ', 1)
    # Text without a colour of its own takes the fill from here.
    return svg.replace("<svg ", '<svg fill="currentColor" style="width:100%;height:auto" ', 1)


def _own_ids(svg: str) -> str:
    """Drop the ids that nothing refers to, and make the others differ from another chart's."""
    used = {name for _, name in _REFERENCE.findall(svg)}
    own = f"c{hashlib.sha256(svg.encode()).hexdigest()[:8]}"
    svg = _ID.sub(lambda found: f' id="{own}-{found[1]}"' if found[1] in used else "", svg)
    return _REFERENCE.sub(rf"\g<1>{own}-\g<2>", svg)
