"""The judge keeps its error rate, leaves nobody out of the correction, and stops only where it may."""

import numpy as np
import pytest

from convince.comparison import statistics as stats
from convince.comparison.judge import Judge


def judged(differences, looks, **how):
    judge = Judge(list(differences), looks, 0.05, how.pop("margin", 0.0), **how)
    for i, n in enumerate(looks):
        judge.look({text: d[:n] for text, d in differences.items() if text not in judge.out}, last=i == len(looks) - 1)
    return judge


def test_a_plain_win_and_its_reverse():
    d = [0.9, 1.1, 1.0, 0.8, 1.2, 1.05, 0.95, 1.0]
    assert judged({"a": d}, (8,)).verdict("a") == "better"
    assert judged({"a": [-x for x in d]}, (8,)).verdict("a") == "worse"


def test_a_clear_win_ends_early_and_keeps_the_planned_looks():
    d = [0.9, 1.1, 1.0, 0.8, 1.2, 1.05, 0.95, 1.0]
    judge = judged({"a": d}, (4, 6, 8))
    assert judge.out == {"a": "better after 4 pairs"}
    assert judge.at["a"] == [4]
    assert judge.schedule("a").pairs == (4, 6, 8), "an early end must not turn the first look into the last"
    plain = stats.paired(d[:4]).p
    assert judge.corrected()["a"] > 5 * plain, "the first look may spend only an eighth of the error"
    assert judge.level("a") > 0.99


def test_time_that_ends_makes_the_last_look_the_final_one():
    judge = Judge(["a"], (4, 8), 0.05, 0.0)
    judge.look({"a": [1.0, 1.2, 0.8, 1.1, 0.7]}, last=True)
    assert judge.schedule("a").pairs == (5,)
    assert judge.verdict("a") == "better"


def test_the_number_of_changes_counts_also_those_never_seen():
    d = [0.5, 1.2, 0.3, 1.5, 0.1, 0.9, 1.4, 0.2]
    alone, crowd = judged({"a": d}, (8,)), Judge(["a", *"bcdefghijk"], (8,), 0.05, 0.0)
    crowd.look({"a": d}, last=True)
    assert crowd.corrected()["a"] == pytest.approx(min(1.0, 11 * alone.corrected()["a"]))


def test_holm_lets_the_second_win_after_the_first():
    strong = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.0]
    middling = [1.0, 1.4, -0.2, 0.3, 1.6, 0.3, -0.4, 1.2]
    assert 0.025 < stats.paired(middling).p < 0.05
    assert judged({"a": middling, "b": [0.0, 0.1, -0.1, 0.05, 0, -0.05, 0.02, 0]}, (8,)).verdict("a") != "better"
    assert judged({"a": middling, "b": strong}, (8,)).verdict("a") == "better"


def test_a_race_drops_who_cannot_be_the_best():
    rng = np.random.default_rng(3)
    d = {"good": list(2 + 0.1 * rng.standard_normal(8)), "bad": list(0.2 + 0.1 * rng.standard_normal(8))}
    judge = judged(d, (4, 6, 8), race=True)
    assert "behind" in judge.out["bad"] or "better" in judge.out["bad"]
    assert "good" not in judge.out, "the best goes on, so that the ranking is known"
    assert judge.verdict("good") == "better"


@pytest.mark.parametrize(("changes", "looks"), [(1, (8,)), (1, (4, 6, 8)), (5, (4, 6, 8))])
def test_false_wins_stay_below_the_rate(changes, looks):
    """1,500 comparisons of nothing: at most 6.7 % have any win (5 % and three standard errors)."""
    rng, wins = np.random.default_rng(changes + len(looks)), 0
    for _ in range(1500):
        d = {str(i): rng.standard_normal(8).tolist() for i in range(changes)}
        judge = Judge(list(d), looks, 0.05, 0.0)
        for i, n in enumerate(looks):
            judge.look({text: row[:n] for text, row in d.items() if text not in judge.out}, last=i == len(looks) - 1)
        wins += any(judge.verdict(text) in ("better", "worse") for text in d)
    assert wins / 1500 <= 0.067
    if changes == 1:
        assert wins / 1500 >= 0.033


def test_equivalence_ends_the_runs_only_where_the_margin_was_asked_for():
    d = {"a": [0.01, -0.02, 0.0, 0.015, 0.01, -0.01, 0.0, 0.005]}
    assert judged(d, (4, 6, 8), margin=0.5).out == {"a": "equivalent after 4 pairs"}
    narrowing = judged(d, (4, 6, 8), margin=0.5, settles=False)
    assert narrowing.out == {}
    assert narrowing.found["a"].n == 8
    assert narrowing.verdict("a") == "equivalent"
