"""Class imbalance by hand: set sizes, resampling, priors, the two phases, AUC, weights, and the table."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from convince import parts
from convince.checks.subject import bits, tiny_images
from convince.data_quality.class_imbalance_study import (
    ClassImbalanceStudy,
    balanced_accuracy,
    class_sizes,
    make_imbalance,
    measure_imbalance,
    multiclass_auc,
    same_steps,
)
from convince.data_quality.cost_sensitive import class_weights
from convince.data_quality.focal_loss import focal
from convince.data_quality.oversampling import oversample
from convince.data_quality.prior_thresholding import Thresholded, threshold_by_prior
from convince.data_quality.undersampling import undersample
from convince.errors import Mistake
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.types import Budget, Split

LABELS = st.lists(st.integers(-1, 3), min_size=1, max_size=40).filter(lambda y: max(y) >= 0).map(torch.tensor)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def counts(y):
    return torch.bincount(y[y >= 0]).tolist()


# -- the sets --------------------------------------------------------------------------------------


def test_sizes_of_the_paper():
    assert sum(class_sizes("step", 50, 0.5, 1000, 10)) == 5_100
    assert class_sizes("step", 10, 0.5, 1000, 10) == [100] * 5 + [1000] * 5
    assert class_sizes("step", 10, 0.2, 1000, 10) == [100] * 2 + [1000] * 8
    assert class_sizes("linear", 10, 0.5, 1000, 10) == list(range(100, 1001, 100))
    assert class_sizes("step", 5000, 0.5, 1000, 2) == [1, 1000]


def test_make_imbalance():
    y = torch.arange(10).repeat_interleave(60)
    kept = make_imbalance(y, "step", 10, 0.5, gen(), majority=50)
    assert sorted(counts(y[kept])) == [5] * 5 + [50] * 5
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert measure_imbalance(y[kept]) == (10, 0.5)
    small = {tuple(c for c, n in enumerate(counts(y[make_imbalance(y, "step", 10, 0.5, gen(s))])) if n == 6) for s in range(4)}
    assert len(small) > 1, "the small classes vary with the seed"
    assert measure_imbalance(y) == (1, 0)


def test_wrong_imbalance_is_named():
    y = torch.tensor([0, 0, 1])
    with pytest.raises(Mistake, match="rho"):
        make_imbalance(y, "step", 0.5, 0.5, gen())
    with pytest.raises(Mistake, match="'step' or 'linear'"):
        class_sizes("steps", 2, 0.5, 10, 2)
    with pytest.raises(Mistake, match="only 1"):
        make_imbalance(y, "step", 1, 0.5, gen(), majority=2)
    with pytest.raises(Mistake, match="every class"):
        make_imbalance(torch.tensor([0, 2]), "step", 1, 0.5, gen())


# -- resampling ------------------------------------------------------------------------------------


def test_oversample_by_hand():
    y = torch.tensor([0] * 7 + [1] * 3 + [2])
    rows = oversample(y, 1.0, gen())
    assert counts(y[rows]) == [7, 7, 7]
    assert sorted(torch.bincount(rows)[7:10].tolist()) == [2, 2, 3]
    assert counts(y[oversample(y, 0.5, gen())]) == [7, 4, 4]
    assert oversample(y, 0.0, gen()).tolist() == list(range(11))


def test_undersample_by_hand():
    y = torch.tensor([0] * 7 + [1] * 3 + [2] * 2)
    assert counts(y[undersample(y, 1.0, gen())]) == [2, 2, 2]
    assert counts(y[undersample(y, 0.5, gen())]) == [4, 3, 2]
    assert undersample(y, 0.0, gen()).tolist() == list(range(12))


@quick(max_examples=60, deadline=None)
@given(LABELS, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_resampling_reaches_its_level(y, to):
    before = [n for n in counts(y) if n]
    over, under = oversample(y, to, gen()), undersample(y, to, gen())
    assert set(over.tolist()) == set(range(len(y))), "oversampling leaves nobody out"
    assert len(set(under.tolist())) == len(under), "undersampling repeats nobody"
    assert int((y[over] < 0).sum()) == int((y[under] < 0).sum()) == int((y < 0).sum())
    assert min(n for n in counts(y[over]) if n) >= round(to * max(before))
    assert max(counts(y[over])) == max(before)
    assert min(n for n in counts(y[under]) if n) == min(before)
    assert to == 0 or max(counts(y[under])) <= max(round(min(before) / to), min(before))


def test_counts_agree_with_imbalanced_learn():
    over = pytest.importorskip("imblearn.over_sampling")
    under = pytest.importorskip("imblearn.under_sampling")
    y = torch.tensor([0] * 40 + [1] * 17 + [2] * 5)
    x = y[:, None].numpy()
    for mine, theirs in ((oversample, over.RandomOverSampler), (undersample, under.RandomUnderSampler)):
        assert counts(y[mine(y, 1.0, gen())]) == counts(torch.from_numpy(theirs(random_state=0).fit_resample(x, y.numpy())[1]))
    two = y[y < 2]
    x = two[:, None].numpy()
    for mine, theirs in ((oversample, over.RandomOverSampler), (undersample, under.RandomUnderSampler)):
        assert counts(two[mine(two, 0.5, gen())]) == counts(torch.from_numpy(theirs(sampling_strategy=0.5, random_state=0).fit_resample(x, two.numpy())[1]))


@pytest.mark.parametrize("part", ["oversampling", "undersampling"])
@pytest.mark.parametrize("to", [-0.1, 1.1])
def test_a_wrong_level_is_named(part, to):
    with pytest.raises(Mistake, match=f"to={to}"):
        parts.make(part, to=to)


# -- runs ------------------------------------------------------------------------------------------


def unequal():
    """16, 8 and 4 training rows of the three classes."""
    data = tiny_images()
    rows = [(data.y == c).nonzero()[:n, 0] for c, n in enumerate((16, 8, 4))]
    rest = torch.cat([(data.y == c).nonzero()[n:, 0] for c, n in enumerate((16, 8, 4))])
    return dataclasses.replace(data, split=Split(torch.cat(rows), rest[:4], rest[4:]))


def made(*specs, **changes):
    chosen = {"model": "resnet:layers=(1,1),widths=(4,8)", "parts": specs, "batch": 4, "epochs": 2, "lr": 0.05, "precision": "fp32", "augment": "none"}
    return prepare(settings(**{**chosen, **changes}), unequal(), drop_off=False)


def watched(*specs, **changes):
    """A finished run, and the labels it was shown: one list a stage."""
    run, shown = made(*specs, **changes), {}
    fit(run, None, lambda *_: shown.setdefault(run.stage_number, []).extend(run.batch.y.argmax(1).tolist()))
    return run, {stage: torch.bincount(torch.tensor(y), minlength=3).tolist() for stage, y in shown.items()}


def test_what_a_run_is_shown():
    assert watched()[1] == {0: [32, 16, 8]}
    assert watched("oversampling")[1] == {0: [32, 32, 32]}
    assert watched("undersampling")[1] == {0: [8, 8, 8]}


def test_undersampling_shows_the_same_rows_in_each_epoch():
    run, rows = made("undersampling"), []
    fit(run, None, lambda *_: rows.append(run.batch.index.tolist()))
    first, second = ([i for batch in epoch for i in batch] for epoch in (rows[:3], rows[3:]))
    assert set(first) == set(second)
    assert first != second


def test_same_steps_for_all():
    y = torch.tensor([0] * 16 + [1] * 8 + [2] * 4)
    assert same_steps(14, y, (), 4) == {"steps": 14}
    assert same_steps(15, y, ("undersampling",), 4) == {"epochs": 5}
    run = made("undersampling", **same_steps(15, y, ("undersampling",), 4))
    fit(run)
    assert run.steps_done == 15


def test_worked_thresholds():
    probs, priors = torch.tensor([[0.6, 0.25, 0.15]]), torch.tensor([0.8, 0.15, 0.05])
    ratios = threshold_by_prior(probs, priors)
    torch.testing.assert_close(ratios, torch.tensor([[0.75, 1.6666667, 3.0]]))
    assert probs.argmax(1) == 0
    assert ratios.argmax(1) == 2
    answer = Thresholded(torch.nn.Identity(), priors.log())
    torch.testing.assert_close(answer(probs.log()).softmax(1), ratios / ratios.sum())
    with pytest.raises(Mistake, match="above 0"):
        threshold_by_prior(probs, torch.tensor([0.5, 0.5, 0.0]))


def test_the_prior_is_what_training_showed():
    run, _ = watched("prior-thresholding")
    assert run.team.seats[0].technique.counts.tolist() == [32, 16, 8]
    x = torch.rand(5, 1, 8, 8)
    ratios = threshold_by_prior(run.answer.answer.eval()(x).softmax(1), torch.tensor([4, 2, 1]) / 7)
    torch.testing.assert_close(run.answer.eval()(x).softmax(1), ratios / ratios.sum(1, keepdim=True))


def test_after_full_oversampling_thresholding_changes_nothing():
    run, _ = watched("oversampling", "prior-thresholding")
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(run.answer.eval()(x).softmax(1), run.answer.answer.eval()(x).softmax(1))


def test_a_reloaded_run_knows_its_prior(tmp_path):
    run, _ = watched("prior-thresholding")
    write_config(tmp_path, run.settings)
    write_model(tmp_path, run)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(open_run(tmp_path).answer(x), run.answer.eval()(x))


@pytest.mark.parametrize("pre", ["over", "under"])
def test_two_phases(pre):
    run = made(f"two-phase:pre={pre},second=0.25,lr=0.5", epochs=8)
    seen = {}

    def watch(*_):
        stage = seen.setdefault(run.stage_number, {"labels": [], "weights": bits(run.model), "lr": run.optimizer.param_groups[0]["initial_lr"]})
        stage["labels"] += run.batch.y.argmax(1).tolist()

    fit(run, None, watch)
    assert run.steps_done == 56, "as many steps as without the part"
    one, two = (torch.bincount(torch.tensor(seen[i]["labels"])).float() for i in (0, 1))
    assert len(seen[0]["labels"]) == 42 * 4
    assert len(seen[1]["labels"]) == 14 * 4
    assert (one.max() - one.min()) / one.sum() < 0.1, "the first phase is balanced"
    assert two.tolist() == [32, 16, 8]
    moved = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, seen[1]["weights"][name])}
    assert moved == {"fc.weight", "fc.bias"}, "the second phase moves the output layer alone, and no statistics"
    assert (seen[0]["lr"], seen[1]["lr"]) == (0.05, 0.025)


def test_two_phase_takes_the_prior_of_its_second_phase():
    run, _ = watched("two-phase", "prior-thresholding", epochs=8)
    technique = next(s.technique for s in run.team.seats if s.name == "prior-thresholding")
    assert technique.counts.tolist() == [32, 16, 8]


def test_two_phase_refuses():
    for options in ({"pre": "no"}, {"second": 0.0}, {"second": 1.0}, {"lr": 0.0}):
        with pytest.raises(Mistake, match=next(iter(options))):
            parts.make("two-phase", **options)
    with pytest.raises(Mistake, match="mutes"):
        made("two-phase", "oversampling")


# -- measures and losses ---------------------------------------------------------------------------


def test_multiclass_auc_is_sklearns():
    from sklearn.metrics import roc_auc_score

    probs = torch.rand(60, 4, dtype=torch.float64, generator=gen()).softmax(1)
    y = torch.arange(60) % 4
    assert multiclass_auc(probs, y) == pytest.approx(roc_auc_score(y.numpy(), probs.numpy(), multi_class="ovr", average="macro"))
    assert multiclass_auc(torch.eye(3), torch.arange(3)) == 1
    with pytest.raises(Mistake, match="two classes"):
        multiclass_auc(torch.eye(3)[:1], torch.tensor([0]))


def test_balanced_accuracy_by_hand():
    assert balanced_accuracy(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])) == 0.5


def test_class_weights_by_hand():
    y = torch.tensor([0] * 6 + [1] * 2 + [-1])
    torch.testing.assert_close(class_weights(y, 3), torch.tensor([8 / 12, 8 / 4, 0.0], dtype=torch.float64))
    assert class_weights(y, 2)[y[y >= 0]].mean() == pytest.approx(1)
    assert class_weights(y, 2, power=0.0).tolist() == [1, 1]


def test_focal_by_hand():
    p = torch.tensor([[0.8, 0.2]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert float(focal(p.log(), y, 2.0)) == pytest.approx(0.00892574, abs=1e-8)
    assert float(focal(p.log(), y, 0.0)) == pytest.approx(0.22314355, abs=1e-8)
    sure = torch.tensor([[60.0, -60.0]], requires_grad=True)
    focal(sure, torch.tensor([[1.0, 0.0]]), 0.5).sum().backward()
    assert torch.isfinite(sure.grad).all()


# -- the study -------------------------------------------------------------------------------------


def test_the_table(capsys):
    study = ClassImbalanceStudy(rhos=(4.0,), seeds=1, methods=("none", "undersample"), model="small-cnn:widths=(4,)")
    found = study.run(Budget(6, "steps"))
    assert [row["method"] for row in found["table"]] == ["none", "undersample"]
    assert all(0 <= row["auc"] <= 1 and 0 <= row["accuracy"] <= 1 for row in found["table"])
    assert "undersample" in capsys.readouterr().out
    with pytest.raises(Mistake, match="seconds"):
        study.run(Budget(1, "seconds"))
    with pytest.raises(Mistake, match="nothing"):
        ClassImbalanceStudy(methods=("nothing",)).run(Budget(1, "steps"))
