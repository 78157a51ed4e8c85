"""Whole comparisons on tiny pictures: equal budgets, equal bits, interruption, and what is refused before the first run."""

import json

import pytest

from convince.checks.subject import MODEL, tiny_images
from convince.comparison import compare
from convince.comparison.engine import ask, change
from convince.comparison.hands import Here
from convince.comparison.plan import Planner
from convince.errors import Mistake
from convince.types import Budget

HOW = {"model": "small-cnn:widths=(4,8)", "batch": 8, "augment": "none", "precision": "fp32", "lr": 0.05, "epochs": 2}


def tried(*changes, **how):
    said = []
    found = compare(tiny_images(), list(changes), **{"seeds": 3, "say": said.append, **HOW, **how})
    return found, said


def test_a_part_that_is_off_differs_by_exactly_nothing():
    found, said = tried("cutmix:prob=0")
    assert found["cutmix:prob=0"].differences == [0.0] * 3
    assert found["cutmix:prob=0"].verdict == "equivalent"
    assert found["cutmix:prob=0"].share == 1.0
    assert any("cannot reach p" in line for line in said), "too few pairs are said before the first run"


@pytest.fixture(scope="module")
def pair():
    return tried("poly1", "poly1+label-smoothing", seeds=4)


def test_evidence_has_the_promised_names(pair):
    found = json.loads(json.dumps(pair[0].to_json()))
    assert set(found) >= {"baseline", "metric", "unit", "budget", "changes"}
    for row in found["changes"]:
        assert set(row) >= {"change", "n", "difference", "interval", "p", "p_corrected", "detectable", "margin", "verdict", "cost"}
        assert set(row["cost"]) == {"baseline", "change"}
        assert {"seconds", "images", "peak_bytes"} <= set(row["cost"]["change"])
    assert "NaN" not in json.dumps(found)
    assert "Infinity" not in json.dumps(found)


def test_both_arms_see_the_same_images(pair):
    for f in pair[0].changes:
        assert f.cost["baseline"]["images"] == f.cost["change"]["images"] == 2 * 32
        assert f.n == 4
        assert f.seeds == [0, 1, 2, 3]


def test_the_margin_is_said_before_any_change_is_trained(pair):
    assert any("before any change is trained" in line for line in pair[1])
    assert pair[0].changes[0].margin >= 0.005


def test_the_best_comes_first(pair):
    assert [f.difference for f in pair[0].changes] == sorted((f.difference for f in pair[0].changes), reverse=True)
    assert all(str(f.n) in line and "±" in line for f, line in zip(pair[0].changes, pair[0].sentences(), strict=True))


def test_the_reverse_is_the_negative():
    """Baseline and change exchanged: the same runs, the opposite difference."""
    forth, _ = tried("poly1")
    back, _ = tried("poly1:epsilon=0", baseline=["poly1"])
    assert back.changes[0].differences == [-d for d in forth.changes[0].differences]


def test_a_loss_is_better_when_it_is_smaller():
    found, _ = tried("poly1", metric="log-loss")
    f = found.changes[0]
    assert not f.higher_is_better
    assert f.metrics["log-loss"]["difference"] == pytest.approx(f.difference)


def test_a_pretext_gets_half_of_the_budget_and_says_so():
    found, said = tried("rotnet", seeds=2, epochs=12)
    f = found.changes[0]
    assert "epochs in place of 100" in f.note
    assert any("in place of" in line for line in said)
    assert f.cost["change"]["images"] <= f.cost["baseline"]["images"]
    assert f.cost["change"]["images"] > 0.8 * f.cost["baseline"]["images"]


def test_members_share_the_budget():
    found, _ = tried("deep-ensemble:members=3", seeds=2, epochs=6)
    cost = found.changes[0].cost
    assert 0.8 * cost["baseline"]["images"] < cost["change"]["images"] <= cost["baseline"]["images"]


@pytest.mark.parametrize(("unit", "value", "images"), [("images", 48.0, 48), ("steps", 3.0, 24), ("epochs", 1.0, 32)])
def test_budgets(unit, value, images):
    found, _ = tried("poly1", budget=Budget(value, unit), seeds=2)
    assert found.changes[0].cost["change"]["images"] == images
    assert found.budget["unit"] == unit


def test_seconds_become_steps_before_the_first_run():
    found, _ = tried("poly1", budget=Budget(0.5, "seconds"), seeds=2)
    assert found.settings["steps"] >= 1
    assert found.settings["minutes"] is None


def test_parts_that_work_on_a_finished_answer_are_not_retrained():
    found, _ = tried("int8", seeds=2, metric="bytes", epochs=1)
    f = found["int8"]
    assert f.cost["change"]["images"] == 0
    assert f.verdict == "better"
    assert f.change_mean < 0.7 * f.baseline_mean


def test_explainers_are_compared_by_what_their_maps_do():
    found, _ = tried("grad-cam", "saliency", seeds=2, epochs=1)
    assert found.metric == "insertion-auc"
    assert found.baseline == "random maps"
    other, _ = tried("grad-cam", baseline=["saliency"], seeds=2, epochs=1)
    assert other.baseline == "saliency"
    with pytest.raises(Mistake, match="ask for them apart"):
        tried("grad-cam", "poly1")


def test_a_compressor_that_finds_no_network_takes_no_other_with_it():
    found, _ = tried("int8", "rics", seeds=2, epochs=1, baseline=["triplet-network"])
    assert [f.change for f in found.changes] == ["rics"]
    assert "compresses one network" in found.refused[0]["reason"]


def test_another_network_shares_few_weights():
    found, _ = tried(MODEL, seeds=2, epochs=1)
    assert found.changes[0].share < 0.5


@pytest.mark.parametrize(
    ("changes", "how", "words"),
    [
        ((), {}, "at least one change"),
        (("poly1",), {"seeds": 1}, "no interval"),
        (("poly1",), {"margin": -1.0}, "above 0"),
        (("poly1",), {"metric": "insertion-auc"}, "not compared by"),
        (("poly1:epsilonn=1",), {}, "epsilon"),
        (("cutmixx",), {}, "cutmix"),
        (("poly1",), {"epochs": 2, "budget": Budget(3, "images")}, "less than one step"),
        (("triplet-network",), {"baseline": ["oversampling"]}, "both own the order"),
    ],
)
def test_what_cannot_be_compared_is_a_mistake_before_the_first_run(changes, how, words):
    with pytest.raises(Mistake, match=words):
        tried(*changes, **how)


def test_a_part_that_stands_in_the_baseline_is_no_change():
    with pytest.raises(Mistake, match="in the baseline already"):
        tried("poly1", baseline=["poly1"])


def test_a_race_leaves_out_what_does_not_fit_and_goes_on():
    found, _ = tried("poly1", "madl", race=True, seeds=4, epochs=1)
    assert [f.change for f in found.changes] == ["poly1"]
    assert found.refused[0]["change"] == "madl"
    assert "annotators" in found.refused[0]["reason"]


def test_a_part_that_cannot_be_trained_is_refused_before_the_first_run():
    with pytest.raises(Mistake, match="loss is"):
        tried("adamw:lr=1e30", seeds=2)


def cut(monkeypatch, spoil):
    """Hands whose results pass through ``spoil(job, result)``; None is a job that was never begun."""
    real = Here.run

    def run(self, jobs, done, until=float("inf")):
        def handed(job, result):
            result = spoil(job, result) if job["do"] == "train" else result
            if result is not None:
                done(job, result)

        real(self, jobs, handed, until)

    monkeypatch.setattr(Here, "run", run)


def test_an_arm_that_fails_takes_no_other_with_it(monkeypatch):
    cut(monkeypatch, lambda job, result: {"mistake": "lost"} if (job["arm"], job["at"]) == ("ema", 1) else result)
    found, said = tried("ema", "poly1", seeds=2, epochs=1)
    assert [f.change for f in found.changes] == ["poly1"]
    assert found.refused == [{"change": "ema", "reason": "seed 1: lost"}]
    assert "ema: failed with seed 1: lost" in said


def test_a_defect_of_one_part_is_told_and_takes_no_other_with_it(monkeypatch):
    cut(monkeypatch, lambda job, result: {"defect": "Traceback\nZeroDivisionError: x"} if job["arm"] == "ema" else result)
    found, _ = tried("ema", "poly1", seeds=2, epochs=1)
    assert "ZeroDivisionError" in found.refused[0]["reason"]


def test_a_baseline_that_fails_ends_the_comparison(monkeypatch):
    cut(monkeypatch, lambda job, result: {"mistake": "lost"} if job["arm"] == "baseline" else result)
    with pytest.raises(Mistake, match="the baseline cannot be trained: lost"):
        tried("poly1", seeds=2, epochs=1)


def test_a_finished_arm_is_never_trained_again(tmp_path, monkeypatch):
    """Killed after three arms, started again: three are read, the rest is trained, the numbers are the undisturbed ones."""
    whole, _ = tried("poly1", folder=tmp_path / "whole", epochs=1)
    trained = []
    real = Here.run

    def counting(self, jobs, done, until=float("inf")):
        def kept(job, result):
            done(job, result)
            if job["do"] == "train":
                trained.append((job["arm"], job["at"]))
                if len(trained) == 3:
                    raise KeyboardInterrupt

        real(self, jobs, kept, until)

    monkeypatch.setattr(Here, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        tried("poly1", folder=tmp_path / "cut", epochs=1)
    done = list(trained)
    found, said = tried("poly1", folder=tmp_path / "cut", epochs=1)
    assert len(trained) == 6
    assert len(set(trained)) == 6, f"trained twice: {trained}, after {done}"
    assert any("going on" in line for line in said)
    assert found.changes[0].differences == whole.changes[0].differences
    assert (found.changes[0].interval, found.changes[0].margin) == (whole.changes[0].interval, whole.changes[0].margin)


def test_a_torn_file_of_an_arm_is_made_anew(tmp_path):
    first, _ = tried("poly1", seeds=2, folder=tmp_path)
    torn = sorted((tmp_path / "arms").glob("*.json"))[0]
    torn.write_text(torn.read_text()[: len(torn.read_text()) // 2])
    again, _ = tried("poly1", seeds=2, folder=tmp_path)
    assert again.changes[0].differences == first.changes[0].differences


def test_a_folder_of_another_comparison_is_refused(tmp_path):
    tried("poly1", seeds=2, folder=tmp_path)
    with pytest.raises(Mistake, match="another comparison"):
        tried("poly1", seeds=3, folder=tmp_path)


def test_a_plan_that_cannot_be_read_is_a_mistake(tmp_path):
    (tmp_path / "plan.json").write_text('{"asked": {}')
    with pytest.raises(Mistake, match="no plan of a comparison can be read"):
        tried("poly1", seeds=2, folder=tmp_path)


def test_data_that_changed_since_are_noticed(tmp_path):
    import dataclasses

    tried("poly1", seeds=2, epochs=1, folder=tmp_path)
    data = tiny_images()
    other = dataclasses.replace(data, y=data.y.roll(1), digest="")
    with pytest.raises(Mistake, match="has changed since"):
        compare(other, "poly1", seeds=2, folder=tmp_path, **{**HOW, "epochs": 1})


def asked(*texts, **how):
    given = {"seeds": None, "margin": None, "budget": None, "minutes": None, "metric": None, "baseline": (), "early": False, "race": False}
    return ask(list(texts), **{**given, "samples": None, "workers": None, "alpha": 0.05, "settings": dict(HOW), **how})


def planner(minutes, hands, **how):
    import time

    return Planner(asked("poly1", minutes=minutes, **how), hands, time.monotonic())


def test_minutes_are_kept_by_shorter_runs_then_by_fewer_pairs():
    hands = Here(tiny_images())
    facts = planner(1.0, hands)
    from convince.comparison.plan import Arm

    base, arms = Arm({}, 10.0, 100.0), {"poly1": Arm({}, 10.0, 100.0)}
    assert facts._pairs(base, arms) == (6, pytest.approx(54 / 20 / 6, rel=0.05)), "six pairs, each run at about half its length"
    assert planner(5.0, hands)._pairs(base, arms)[1] == 1.0
    assert planner(60.0, hands)._pairs(base, arms) == (16, 1.0)
    with pytest.raises(Mistake, match="give at least"):
        planner(0.001, hands)._pairs(base, arms)


def test_time_that_ends_leaves_whole_pairs(monkeypatch):
    """The last runs of poly1 never begin: three pairs are judged, and the baseline's further runs do not count."""
    cut(monkeypatch, lambda job, result: None if job["arm"] == "poly1" and job["at"] >= 3 else result)
    found, _ = tried("poly1", seeds=5, epochs=1)
    f = found.changes[0]
    assert (f.n, f.seeds, len(f.differences)) == (3, [0, 1, 2], 3)


def test_an_arm_that_would_end_too_late_is_not_begun():
    import time

    begun = []
    hands = Here(tiny_images())
    hands.desk.do = lambda job: begun.append(job["name"]) or {}
    now = time.monotonic()
    hands.run([{"name": "short", "estimate": 1.0}, {"name": "long", "estimate": 100.0}], lambda job, result: None, until=now + 50)
    assert begun == ["short"]


def test_reading_a_change_twice_is_one_change():
    assert [c.text for c in asked("poly1", "poly1", "ema").changes] == ["poly1", "ema"]
    assert change("poly1").kind == "train"
