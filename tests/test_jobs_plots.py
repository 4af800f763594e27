import re
import xml.etree.ElementTree as ET

import pytest

from jobs.plots import Mark, draw_histogram, draw_lines
from jobs.train_report import MOST_POINTS, MOST_ROWS, _smooth, draw_charts

LINES = {"loss": ([1, 2, 3], [3.0, 2.0, 1.0]), "a < b & c": ([1, 3], [1.0, 1.0])}


def draw(**changes):
    options = {"title": 'Loss "<b>" & more', "x_label": "step", "y_label": "nats"} | changes
    return draw_lines(LINES, **options)


def test_svg_is_valid_named_and_takes_the_pages_colours():
    svg = draw()
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'Loss "<b>" & more'
    assert root.get("fill") == "currentColor"
    assert "#000000" not in svg
    words = "".join(root.itertext())
    assert all(word in words for word in ("loss", "a < b & c", "step", "nats"))


def test_svg_refers_to_nothing_outside():
    svg = draw(marks=True)
    addresses = re.findall(r"""(?:href|src)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", svg)
    assert all("".join(one).strip("\"'").startswith("#") for one in addresses)
    assert re.findall(r"(\S+)=\"https?://", svg) == ["xmlns:xlink", "xmlns"]
    assert "<script" not in svg
    assert "@import" not in svg


def test_svg_is_the_same_each_time():
    assert draw() == draw()
    assert draw() != draw(marks=True)


def test_more_lines_than_colours_differ():
    svg = draw_lines(
        {f"line {n}": ([0, 1], [n, n + 1]) for n in range(14)}, title="t", x_label="x", y_label="y"
    )
    styles = re.findall(r'<path d="M[^"]*"[^>]*clip-path[^>]*style="([^"]*)"', svg)
    lines = [style for style in styles if "stroke-width: 1.6" in style]
    assert len(lines) == len(set(lines)) == 14


def test_one_point_is_a_chart():
    ET.fromstring(draw_lines({"a": ([0], [0.5])}, title="t", x_label="x", y_label="y", marks=True))


def test_mean_of_the_last_steps():
    assert _smooth([1.0, 3.0]) == [1.0, 2.0]
    rising = [float(n) for n in range(100)]
    assert _smooth(rising)[-1] == pytest.approx(sum(rising[-25:]) / 25)


def test_ids_differ_between_charts_and_only_those_referred_to_are_left():
    one, other = draw(), draw(y_label="else")
    ids, others = (set(re.findall(r' id="([^"]*)"', svg)) for svg in (one, other))
    assert ids
    assert not ids & others
    assert ids == set(re.findall(r"""(?:url\(|href=")#([^")]*)""", one))


def test_mark_and_target_are_in_words():
    mark = Mark(x=2, y=2.0, words="chosen: nprobe 8")
    root = ET.fromstring(draw(mark=mark, target=("target 2.5", 2.5), log_x=True))
    words = "".join(root.itertext())
    assert "chosen: nprobe 8" in words
    assert "target 2.5" in words
    assert "chosen" not in "".join(ET.fromstring(draw()).itertext())


@pytest.mark.parametrize("edges", [[0, 1, 2, 3], [0, 1, 10, 1000]])
def test_histogram_names_its_axes_and_its_level(edges):
    svg = draw_histogram(
        edges, [4, 0, 2], title="t", x_label="size", y_label="lists", level=("median 1.5", 1.5)
    )
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "t"
    words = "".join(root.itertext())
    assert all(word in words for word in ("size", "lists", "median 1.5"))


def history(steps, validations=(), best=30):
    return {
        "steps": [
            {"step": n, "loss": 1 / n, "terms": {"a": 0.1, "b": 0.2}, "scales": {"a": 14.0}}
            for n in range(1, steps + 1)
        ],
        "validations": [
            {
                "step": n,
                "kind": "image to image",
                "figures": {"image to image": {"recall_at_1": 0.5}},
            }
            for n in validations
        ],
        "best_step": best,
    }


def test_charts_of_a_run():
    loss, recall, temperature = draw_charts(history(30, validations=(0, 30)))
    assert ">b<" in loss.svg
    assert "image to image" in recall.svg
    assert "kept: step 30" in recall.svg
    assert "temperature" in temperature.svg
    assert len(draw_charts(history(1))) == 2


def test_numbers_of_a_chart_are_some_of_its_steps():
    loss, recall, _ = draw_charts(history(1000, validations=(0, 1000), best=1000))
    assert loss.heads == ["#step", "#loss", "#a", "#b"]
    assert len(loss.rows) == MOST_ROWS
    assert (loss.rows[0][:2], loss.rows[-1][0]) == ([1, 1.0], 1000)
    assert recall.rows == [[0, 0.5], [1000, 0.5]]


def test_long_runs_keep_the_page_small():
    long = "".join(chart.svg for chart in draw_charts(history(50_000)))
    assert len(long) < 200_000
    assert MOST_POINTS < 1000
