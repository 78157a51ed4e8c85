"""Figures: points stand at the right coordinates, labels are escaped, gaps stay gaps."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from convince.report import figures
from convince.report.figures import Series, Strip

NAN = float("nan")


def attributes(svg: str, kind: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            row = {k: v or "" for k, v in attrs}
            if kind in row.get("class", "").split():
                found.append({**row, "tag": tag})

        handle_startendtag = handle_starttag

    Reader().feed(svg)
    return found


def test_ticks_are_round_numbers() -> None:
    assert figures.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert figures.ticks(0, 100, 4) == [0, 50, 100]
    assert figures.ticks(0.91, 0.99, 4) == [0.92, 0.94, 0.96, 0.98]
    assert figures.ticks(-3, 3, 3) == [-2, 0, 2]
    assert figures.ticks(5, 5) == [5]


def test_a_line_goes_where_it_should() -> None:
    chart = figures.line_chart([Series("a", [1, 2, 3], [0.0, 0.5, 1.0])], title="t", width=420, height=236, y_range=(0, 1))
    # the plot spans x 46 to 336 and y 204 (zero) to 12 (one)
    assert attributes(chart, "line")[0]["d"] == "M46 204L191 108L336 12"
    assert [(c["cx"], c["cy"]) for c in attributes(chart, "hit")] == [("46", "204"), ("191", "108"), ("336", "12")]
    assert "<title>a, epoch 2: 0.5</title>" in chart


def test_nan_breaks_a_line() -> None:
    y = [0.0, NAN, 1.0, 0.5, None, float("inf")]
    chart = figures.line_chart([Series("a", [1, 2, 3, 4, 5, 6], y)], title="t", y_range=(0, 1))
    assert re.sub(r"[\d. ]+", "", attributes(chart, "line")[0]["d"]) == "MML"
    assert "no finite values" in figures.line_chart([Series("a", [1], [NAN])], title="t")


def test_a_logarithmic_axis_is_even_in_ratios() -> None:
    chart = figures.line_chart([Series("a", [0, 1, 2], [1, 10, 100])], title="t", log=True, y_range=(1, 100))
    heights = [float(c["cy"]) for c in attributes(chart, "hit")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2])
    assert len(attributes(figures.line_chart([Series("a", [0, 1], [0, 1])], title="t", log=True), "hit")) == 1


def test_names_at_line_ends_keep_apart() -> None:
    chart = figures.line_chart([Series(str(i), [0, 1], [0.5, 0.5 + i / 1000]) for i in range(4)], title="t")
    at = sorted(float(t["y"]) for t in attributes(chart, "end"))
    assert all(b - a >= 13.9 for a, b in itertools.pairwise(at))


def test_stages_are_marked_where_they_begin() -> None:
    chart = figures.line_chart([Series("a", [1, 3], [0, 1])], title="t", marks=[(1, "one"), (2, "<two>")])
    marks = attributes(chart, "mark")
    assert [m["x1"] for m in marks] == ["46", "191"]
    assert "&lt;two&gt;" in chart
    assert "<two>" not in chart


@pytest.mark.parametrize(("share", "width"), [(0.25, "18"), (1.5, "72"), (-1, "0"), (None, "0"), (NAN, "0")])
def test_a_bar_fills_its_share(share: float | None, width: str) -> None:
    assert attributes(figures.bar_row(share, width=72), "bar")[0]["width"] == width


def test_columns_stand_on_zero() -> None:
    bars = attributes(figures.columns([0, 5, 10], ["a", "b", "<c>"], title="t", width=90), "bar")
    assert [b["height"] for b in bars] == ["0", "33", "66"]
    assert [b["x"] for b in bars] == ["0", "30", "60"]
    assert [float(b["y"]) + float(b["height"]) for b in bars] == [78, 78, 78]


def test_the_heat_map_shows_the_share_of_the_row() -> None:
    counts = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    chart = figures.heat_map(counts, ["a", "b", "<c>"])
    good, bad = attributes(chart, "good"), attributes(chart, "bad")
    assert len(good) == 2
    assert len(bad) == 1
    assert good[1]["fill-opacity"] == "1.00"
    assert float(good[0]["fill-opacity"]) == pytest.approx(0.12 + 0.88 * 0.8**0.6, abs=0.005)
    assert float(bad[0]["x"]) - float(good[0]["x"]) == pytest.approx(88)
    assert "a → b: 2 (20.0\u00a0% of the row)" in chart
    assert "<c>" not in chart


def test_heat_maps_of_many_classes_draw_only_what_is_there() -> None:
    counts = np.eye(100, dtype=int) * 5
    chart = figures.heat_map(counts, [f"class {i}" for i in range(100)])
    assert len(attributes(chart, "good")) == 100
    assert not attributes(chart, "bad")
    assert not attributes(chart, "cell")
    assert len(chart) < 80_000
    assert float(attributes(chart, "figure")[0]["width"]) < 870


def test_reliability_points_stand_at_claim_and_truth() -> None:
    bins = [
        {"low": 0.4, "high": 0.6, "n": 10, "confidence": 0.5, "accuracy": 0.5},
        {"low": 0.8, "high": 1.0, "n": 40, "confidence": 0.9, "accuracy": 0.75},
        {"low": 0.6, "high": 0.8, "n": 0, "confidence": NAN, "accuracy": NAN},
    ]
    chart = figures.reliability(bins, width=380)
    dots = attributes(chart, "dot")  # x from 46 to 368, y from 286 to 26
    assert [float(d["cx"]) for d in dots] == pytest.approx([207, 335.8])
    assert [float(d["cy"]) for d in dots] == pytest.approx([156, 91])
    assert [float(b["height"]) for b in attributes(chart, "bar")] == [12.5, 50]


def test_a_forest_draws_intervals_and_leaves_out_a_far_reference() -> None:
    rows = [Strip("<test>", 0.5, 0.4, 0.6), Strip("none", None, None, None)]
    chart = figures.forest(rows, reference=(0.45, "chance"))
    (span,) = attributes(chart, "span")
    (dot,) = attributes(chart, "dot")
    assert float(span["x1"]) < float(dot["cx"]) < float(span["x2"])
    assert float(dot["cx"]) == pytest.approx((float(span["x1"]) + float(span["x2"])) / 2, abs=0.1)
    assert "chance" in chart
    assert "<test>" not in chart
    assert "chance" not in figures.forest([Strip("test", 0.97, 0.95, 0.98)], reference=(0.1, "chance"))
    assert figures.forest([Strip("a", NAN, None, None)]) == ""


def test_sparks_need_two_points() -> None:
    assert figures.spark([1.0]) == ""
    assert figures.spark([1.0, NAN]) == ""
    assert attributes(figures.spark([0.0, 1.0], width=96, height=22), "line")[0]["d"] == "M2 19L94 3"
