"""Figures of probes as SVG and JSON, and the place they get in a run's report."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from convince.errors import Mistake
from convince.report.drawings import draw, from_json, to_json
from convince.report.probes import keep, kept, renew
from convince.types import Bars, Curves, Findings, Plane, Reading

FIGURES = [
    Curves("Fall <of> a & b", "epoch", "share", {"a": [(1.0, 0.5), (2.0, 0.25)], "b & c": [(1.0, 1.0), (2.0, float("nan"))]}),
    Curves("Points", "x", "y", {"cloud": [(float(i), 2.0**i) for i in range(6)]}, log=True, points=True),
    Bars("Shares", "of images", {"first": 0.5, "negative <one>": -0.25}),
    Plane("Map", "rows", "columns", [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
]


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_a_well_formed_picture_with_a_name(figure) -> None:  # type: ignore[no-untyped-def]
    text = draw(figure)
    tree = ElementTree.fromstring(text)
    assert tree.attrib["role"] == "img"
    assert figure.title.split(" ")[0] in tree.attrib["aria-label"]
    assert "NaN" not in text.replace("aria-label", "")


def test_bars_start_at_zero_and_keep_their_proportions() -> None:
    tree = ElementTree.fromstring(draw(FIGURES[2]))
    first, second = (r for r in tree.iter("rect"))
    assert float(first.attrib["width"]) == pytest.approx(2 * float(second.attrib["width"]), abs=0.2)
    assert float(second.attrib["x"]) + float(second.attrib["width"]) == pytest.approx(float(first.attrib["x"]), abs=0.2)


def test_points_are_not_joined() -> None:
    assert draw(FIGURES[1]).count('<circle class="dot') == 6
    assert "<path" not in draw(FIGURES[1])


def test_a_plane_must_be_a_rectangle_and_may_be_flat() -> None:
    assert draw(Plane("flat", "r", "c", [[1.0, 1.0]])).startswith("<svg")
    with pytest.raises(Mistake, match="a plane needs rows of equal length"):
        draw(Plane("empty", "r", "c", []))


def test_findings_survive_json() -> None:
    found = Findings([Reading("x", 1.5, "m")], [f for f in FIGURES[1:]])
    again = from_json(json.loads(json.dumps(to_json(found))))
    assert again.readings == found.readings
    assert [draw(f) for f in again.figures] == [draw(f) for f in found.figures]


def test_a_report_gets_what_probes_found_and_keeps_the_rest(tmp_path) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "report.html"
    assert renew(tmp_path) is None
    page.write_text("<html>before<!--probes-->old<!--/probes-->after</html>")
    keep(tmp_path, "b-probe", "Second <title>", Findings([Reading("size", 2.0, "px")], [FIGURES[2]]))
    keep(tmp_path, "a-probe", "First", Findings([Reading("count", 7.0)]))
    (tmp_path / "probes" / "foreign.json").write_text('{"part": "x"}')
    (tmp_path / "probes" / "torn.json").write_text("{")
    assert renew(tmp_path) == page
    text = page.read_text()
    assert text.startswith("<html>before<!--probes--><section")
    assert text.endswith("<!--/probes-->after</html>")
    assert text.index("a-probe") < text.index("b-probe")
    assert "Second &lt;title&gt;" in text
    assert "old" not in text
    assert "foreign.json cannot be read (KeyError)" in text
    assert "torn.json cannot be read (JSONDecodeError)" in text
    assert [row["part"] for row in kept(tmp_path)] == ["a-probe", "b-probe", "foreign", "torn"]
    page.write_text("<html>a report of before</html>")
    assert renew(tmp_path) is None
