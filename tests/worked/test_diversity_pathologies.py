"""Diversity by hand: the four terms, the joint loss, the exact identity, independent members at gamma 0, the study."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from convince import parts
from convince.checks.subject import bits, equal, tiny_images
from convince.ensemble.deep_ensemble import MeanAnswer, mean_scores
from convince.ensemble.diversity_pathologies import DiversityPathologies, ensemble_report
from convince.ensemble.diversity_regularised_ensemble import DIVERSITIES, jensen_gap, joint_ensemble_loss, jsd_uniform, one_vs_all, variance
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.types import Budget

P = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]]], dtype=torch.float64)  # two members, one row, class 0
LOGITS, Y = P.log(), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
CHOSEN = {"model": "small-cnn:widths=(4,)", "batch": 8, "epochs": 1, "lr": 0.05, "augment": "none", "precision": "fp32"}


def made(*specs, **changes):
    run = prepare(settings(**{**CHOSEN, **changes}, parts=specs), tiny_images(), drop_off=False)
    fit(run)
    return run


def scores(seed=0, m=3, n=4, k=5):
    gen = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(m, n, k, generator=gen, dtype=torch.float64), F.one_hot(torch.randint(0, k, (n,), generator=gen), k).double()


def test_the_worked_example():
    each = F.cross_entropy(LOGITS[:, 0], Y.repeat(2, 1), reduction="none").mean()
    assert float(each) == pytest.approx(0.56971714, abs=1e-8)
    assert float(F.cross_entropy(mean_scores(LOGITS), Y)) == pytest.approx(0.51082562, abs=1e-8)
    assert float(jensen_gap(LOGITS, Y)) == pytest.approx(0.05889152, abs=1e-8)
    assert float(variance(LOGITS, Y)) == pytest.approx(0.08, abs=1e-12)
    assert float(jsd_uniform(LOGITS, Y)) == pytest.approx(0.08630462, abs=1e-8)
    by_hand = (0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.6) + 0.4 * math.log(0.4 / 0.8) + 0.6 * math.log(0.6 / 0.2)) / 2
    assert float(one_vs_all(LOGITS, Y)) == pytest.approx(by_hand)


def test_the_joint_loss_of_the_worked_example():
    for gamma, expected in ((0.0, 0.56971714), (1.0, 0.51082562), (-0.5, 0.56971714 + 0.05889152 / 2)):
        assert float(joint_ensemble_loss(LOGITS, Y, gamma)) == pytest.approx(expected, abs=1e-8)


@quick(max_examples=8, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4))
def test_gamma_one_is_the_loss_of_the_mean_and_its_gradient(seed, m):
    logits, y = scores(seed, m)
    logits.requires_grad_(True)
    joint = torch.autograd.grad(joint_ensemble_loss(logits, y, 1.0).sum(), logits)[0]
    mean = torch.autograd.grad(F.cross_entropy(mean_scores(logits), y, reduction="sum"), logits)[0]
    torch.testing.assert_close(joint, mean)


@quick(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(DIVERSITIES)), st.integers(0, 999), st.integers(1, 4))
def test_diversity_is_none_for_equal_members_and_never_negative(name, seed, m):
    logits, y = scores(seed, m)
    assert float(DIVERSITIES[name](logits[:1].expand(m, -1, -1), y).abs().max()) < 1e-12
    assert float(DIVERSITIES[name](logits, y).min()) > -1e-12
    torch.testing.assert_close(DIVERSITIES[name](logits, y), DIVERSITIES[name](logits.flip(0) + 5, y))


def test_gradients_are_exact():
    logits, y = scores(m=2, n=2, k=3)
    for name in DIVERSITIES:
        assert torch.autograd.gradcheck(lambda z, name=name: joint_ensemble_loss(z, y, 0.7, name), logits.requires_grad_(True))


@quick(max_examples=8, deadline=None)
@given(st.integers(0, 999))
def test_the_identity_is_exact(seed):
    logits, y = scores(seed, 4, 20)
    found = ensemble_report(logits.softmax(2).float(), y.argmax(1))
    assert found["ensemble_nll"] == pytest.approx(found["member_nll"] - found["jensen_gap"], abs=1e-6)
    assert 0 <= found["disagreement"] <= 1


def test_report_by_hand():
    found = ensemble_report(P, torch.tensor([0]))
    assert found["member_nll"] == pytest.approx(0.56971714, abs=1e-8)
    assert found["ensemble_nll"] == pytest.approx(0.51082562, abs=1e-8)
    assert (found["member_error"], found["ensemble_error"], found["disagreement"]) == (0.5, 0.0, 1.0)


def test_members_are_independent_at_gamma_zero():
    plain, run = made(), made("diversity-regularised-ensemble:gamma=0.0,members=3")
    assert not equal(bits(plain.model), bits(run.model)), "this network trains as if it were alone"
    members = list(run.answer.members)
    assert len(members) == 3
    assert equal(bits(members[1]), bits(members[2]))
    assert run.images == 3 * plain.images
    pushed = made("diversity-regularised-ensemble:gamma=1.0,members=3")
    assert equal(bits(plain.model), bits(pushed.model))


def test_more_gamma_more_diversity():
    from convince.ensemble.mcdnn import column_probs

    found = []
    for gamma in (-1.0, 0.0, 1.0):
        run = made(f"diversity-regularised-ensemble:gamma={gamma},members=3", epochs=10)
        found.append(ensemble_report(*column_probs(run, "train"))["jensen_gap"])
    assert found[0] < found[1] < found[2]


def test_members_have_the_edits_of_the_network():
    run = made("diversity-regularised-ensemble:members=2", "eca", model="resnet:layers=(1,1),widths=(4,8)")
    assert isinstance(run.answer, MeanAnswer)
    assert {name for name, _ in run.answer.members[1].named_parameters()} == {name for name, _ in run.answer.members[0].named_parameters()}
    assert len(run.edits) == 1


def test_wrong_options_are_named():
    for options in ({"diversity": "variances"}, {"members": 0}):
        with pytest.raises(Mistake, match=next(iter(options))):
            parts.make("diversity-regularised-ensemble", **options)
    with pytest.raises(Mistake, match="seconds"):
        DiversityPathologies().run(Budget(1.0, "seconds"))


def test_the_study_prints_a_table(capsys):
    study = DiversityPathologies(models=("small-cnn:widths=(4,)",), gammas=(0.0, 1.0), members=2, seeds=1)
    found = json.loads(json.dumps(study.run(Budget(2.0, "steps"))))
    assert [row["gamma"] for row in found["table"]] == [0.0, 1.0]
    assert "jensen_gap" in capsys.readouterr().out
