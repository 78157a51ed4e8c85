"""The page of a comparison: every finding on it, figures that stay in their frame, hostile names, verdicts in words."""

import dataclasses
import re

import pytest

from convince.comparison.evidence import Evidence, Finding
from convince.report.compare import lede, view, write_comparison
from convince.report.paired import Row, differences, two_arms

COST = {"seconds": 3.0, "images": 1000.0, "steps": 10.0, "peak_bytes": 5e8, "operations": 2e12}


def finding(change="cutmix", difference=0.01, low=0.002, high=0.018, verdict="better", **more):
    given = dict(
        change=change, kind="train", n=8, baseline_mean=0.9, change_mean=0.9 + difference, difference=difference, interval=(low, high), sd=0.01, p=0.02,
        p_flip=0.03, p_corrected=0.02, inside=0.2, detectable=0.012, margin=0.005, verdict=verdict, higher_is_better=True,
        cost={"baseline": COST, "change": COST}, seeds=list(range(8)), differences=[difference] * 8,
        metrics={"accuracy": {"baseline": 0.9, "change": 0.91, "difference": 0.01, "low": 0.0, "high": 0.02}},
        curves={"baseline": [[[100, 1.0, 0.5], [200, 0.5, 0.8]]] * 2, "change": [[[100, 0.9, 0.6], [200, 0.4, None]]] * 2}, share=0.97,
    )  # fmt: skip
    return Finding(**{**given, **more})


def evidence(*changes, **more):
    given = dict(
        baseline="resnet8", metric="accuracy", unit="share", budget={"unit": "images", "value": 1000.0, "images": 1000.0, "steps": 10, "epochs": 2},
        changes=list(changes) or [finding()], refused=[], alpha=0.05, looks=[8],
        data={"origin": "photos", "digest": "ab", "classes": ["a"], "size": [8, 8], "rows": {"train": 9, "val": 1, "test": 5}, "test_is_fixed": False,
              "skipped": 0, "samples": None},
        settings={"model": "resnet8"}, notes=[], seconds=60.0, overhead=0.02, environment={"python": "3", "versions": {"torch": "2"}},
        command="convince compare x",
    )  # fmt: skip
    return Evidence(**{**given, **more})


def test_a_page_holds_every_finding_and_asks_the_network_for_nothing(tmp_path):
    found = evidence(finding(), finding("mixup", -0.01, -0.02, -0.001, "worse"), refused=[{"change": "madl", "reason": "no annotators"}])
    text = write_comparison(tmp_path / "c.html", found).read_text()
    for word in ("cutmix", "mixup", "madl", "no annotators", "better", "worse", "convince compare x", "97.0", "To quote"):
        assert word in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_names_cannot_break_out_of_the_page(tmp_path):
    bad = '<script>alert(1)</script>"'
    found = evidence(finding(bad), refused=[{"change": bad, "reason": bad}], baseline=bad, notes=[bad], command=bad)
    text = write_comparison(tmp_path / "c.html", found).read_text()
    assert "<script>alert" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([finding()], "cutmix helps"),
        ([finding(), finding("mixup")], "cutmix and mixup help"),
        ([finding(verdict="worse")], "did harm"),
        ([finding(verdict="equivalent")], "a difference of less than 0.50 points"),
        ([finding(verdict="equivalent", margin=0.36)], "a difference of less than 36 points"),
        ([finding(verdict="not decided")], "do not decide"),
    ],
)
def test_the_headline_says_what_was_found(changes, words):
    assert words in lede(evidence(*changes))


def test_an_interval_without_end_is_drawn_as_a_point(tmp_path):
    found = evidence(finding(low=float("-inf"), high=float("inf"), n=1, detectable=float("inf"), verdict="not decided"))
    assert "no interval yet" in found.changes[0].sentence("accuracy", "share")
    assert "<circle" in view(found)["forest"]
    write_comparison(tmp_path / "c.html", found)


def test_a_forest_stays_in_its_frame():
    rows = [Row("a", 1.0, 0.5, 1.5, [9.0, -9.0], "better", "+1.0 ± 0.5"), Row("b" * 60, -0.2, -0.4, 0.0, [], "not decided", "−0.2 ± 0.2")]
    drawn = differences(rows, margin=0.5, unit="points", higher=True, width=700)
    xs = [float(x) for x in re.findall(r'(?:cx|x1|x2)="(-?[\d.]+)"', drawn)]
    assert min(xs) >= 0
    assert max(xs) <= 700
    assert 'class="margin"' in drawn
    assert "better" in drawn


def test_curves_of_arms_with_a_gap_end_where_the_numbers_end():
    f = finding()
    drawn = two_arms(f.curves["baseline"], f.curves["change"], column=2, title="t", as_percent=True)
    assert drawn.count('class="line') == 2
    assert "nothing was measured" in two_arms([], [], column=1, title="t", as_percent=False)


def test_a_sentence_stands_alone():
    said = dataclasses.replace(finding(), inside=0.97, margin=0.02).sentence("accuracy", "share")
    assert said.startswith("cutmix: +1.00 ± 0.80 points of accuracy, n = 8, better, but by less than ±2.0 points (p = 0.02 corrected)")
