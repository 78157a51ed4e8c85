"""Numbers: how they are written, and the report's own arithmetic against worked values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from convince.errors import Mistake
from convince.report import reckon, units

NAN, INF = float("nan"), float("inf")


def plain(text: str) -> str:
    return text.replace(units.GAP, " ").replace(units.THIN, " ")


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (units.percent, 0.975, "97.5 %"),
        (units.percent, 1, "100.0 %"),
        (units.percent, NAN, "NaN"),
        (units.percent, None, "–"),
        (units.count, 1797, "1 797"),
        (units.count, -12345678, "−12 345 678"),
        (units.count, INF, "∞"),
        (units.short, 9999, "9 999"),
        (units.short, 272474, "272 thousand"),
        (units.short, 11_173_962, "11.2 million"),
        (units.short, 4.1e9, "4.10 billion"),
        (units.decimal, 0.0931, "0.093"),
        (units.decimal, NAN, "NaN"),
        (units.number, True, "yes"),
        (units.number, 3.14159, "3.142"),
        (units.number, 67102.4, "67 102"),
        (units.number, 2.0, "2"),
        (units.number, 0.0000123456, "1.235e-5".replace("-", "−")),
        (units.number, "text", "text"),
        (units.duration, 0.0214, "21 ms"),
        (units.duration, 0.9999, "1.0 s"),
        (units.duration, 59.97, "1 min 00 s"),
        (units.duration, 125, "2 min 05 s"),
        (units.duration, 3599.7, "1 h 00 min"),
        (units.duration, 5025, "1 h 24 min"),
        (units.size, 412_000_000, "412 MB"),
        (units.size, 999_999, "1.00 MB"),
        (units.size, 12, "12 B"),
        (units.rate, 2.2e12, "2.20 TFLOP/s"),
        (units.date, "2026-11-20T18:59:00", "20 November 2026, 18:59"),
        (units.date, "2026-11-20", "20 November 2026"),
        (units.date, "yesterday", "yesterday"),
    ],
)
def test_numbers_in_words(write: object, value: object, text: str) -> None:
    assert plain(write(value)) == text  # type: ignore[operator]


def test_wilson() -> None:
    assert reckon.wilson(351, 360) == pytest.approx((0.9532, 0.9868), abs=5e-5)
    assert reckon.wilson(0, 10) == pytest.approx((0, 0.2775), abs=5e-5)  # Brown, Cai and DasGupta 2001
    assert reckon.wilson(10, 10)[1] == 1
    assert all(math.isnan(v) for v in reckon.wilson(0, 0))


def test_scores_per_class_equal_scikit_learns() -> None:
    gen = np.random.default_rng(0)
    y, said = gen.integers(0, 5, 300), gen.integers(0, 5, 300)
    counts = np.zeros((5, 5), int)
    np.add.at(counts, (y, said), 1)
    theirs = np.array(precision_recall_fscore_support(y, said))
    ours = [[row[key] for row in reckon.per_class(counts)] for key in ("precision", "recall", "f1", "n")]
    assert np.allclose(ours, theirs)


def test_scores_that_do_not_exist_are_none() -> None:
    first, second = reckon.per_class(np.array([[0, 0], [3, 0]]))
    assert (first["recall"], first["precision"]) == (None, 0)
    assert (second["recall"], second["precision"]) == (0, None)
    assert second["taken_for"] == (0, 3)


def test_confused_pairs_come_most_frequent_first() -> None:
    assert reckon.confused_pairs(np.array([[9, 2, 0], [5, 9, 1], [0, 0, 9]])) == [(1, 0, 5), (0, 1, 2), (1, 2, 1)]
    assert reckon.confused_pairs(np.eye(3, dtype=int)) == []


def test_reliability_bins_by_hand() -> None:
    made = reckon.reliability_bins([0.1, 0.2, 0.9, 1.0], [0, 1, 1, 1], bins=5)
    assert [(b["low"], b["n"]) for b in made["bins"]] == [(0, 2), (0.8, 2)]
    # |.5 - .15| * 2/4 + |1 - .95| * 2/4
    assert made["ece"] == pytest.approx(0.2)
    assert math.isnan(reckon.reliability_bins([], [])["ece"])
    with pytest.raises(Mistake, match="must both be"):
        reckon.reliability_bins([0.5], [1, 0])


def test_a_confusion_matrix_must_be_square() -> None:
    with pytest.raises(Mistake, match=r"\[1, 2\]"):
        reckon.matrix([[1, 2]])
