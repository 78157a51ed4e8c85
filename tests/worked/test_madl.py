"""MaDL by hand: the start of the confusion matrices, the likelihood, the weights, votes and simulated crowds; and runs on annotators."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from convince.checks.subject import bits, equal, tiny_images
from convince.data_quality.madl import (
    AnnotatorModel,
    annotator_weights,
    answers_with,
    average_labels,
    diagonal_bias,
    drop_labels,
    log_annotation,
    log_confusion,
    log_gamma_prior,
    majority_vote,
    simulate_annotators,
    stress,
)
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_start_of_the_confusion_matrices():
    assert diagonal_bias(3, 0.8, "full") == pytest.approx(2.07944154, abs=1e-8)
    assert diagonal_bias(3, 0.8, "diagonal") == pytest.approx(1.38629436, abs=1e-8)
    expected = torch.full((3, 3), 0.1) + 0.7 * torch.eye(3)
    full = log_confusion((torch.eye(3) * 2.07944154).flatten(), 3, "full").exp()
    diagonal = log_confusion(torch.full((3,), 1.38629436), 3, "diagonal").exp()
    isotropic = log_confusion(torch.full((1,), 1.38629436), 3, "isotropic").exp()
    for found in (full, diagonal, isotropic):
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("confusion", ["full", "diagonal", "isotropic"])
@quick(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(0, 1000))
def test_rows_of_a_confusion_matrix_sum_to_one(confusion, k, seed):
    scores = 3 * torch.randn(4, {"full": k * k, "diagonal": k, "isotropic": 1}[confusion], generator=gen(seed), dtype=torch.float64)
    found = log_confusion(scores, k, confusion).exp()
    assert torch.allclose(found.sum(-1), torch.ones(4, k, dtype=torch.float64))


def test_the_likelihood_by_hand():
    matrix = torch.full((3, 3), 0.1) + 0.7 * torch.eye(3)
    found = log_annotation(torch.tensor([[0.7, 0.2, 0.1]]).log(), matrix.log()[None])
    assert torch.allclose(found.exp(), torch.tensor([[0.59, 0.24, 0.17]]))
    assert float(-found[0, 0]) == pytest.approx(0.52763274, abs=1e-6)


def test_weights_by_hand():
    found = annotator_weights(torch.tensor([[0.0, 0], [0, 0], [3, 0]]), torch.tensor(1.0))
    assert torch.allclose(found, torch.tensor([0.75006941, 0.75006941, 1.49986119]), atol=1e-7)
    copies = annotator_weights(torch.cat([torch.eye(10) * 100, torch.zeros(90, 10)]), torch.tensor(1.0))
    assert copies[:10].tolist() == pytest.approx([100 / 11] * 10)  # ninety copies count as one voice
    assert float(copies[10:].sum()) == pytest.approx(100 / 11, rel=1e-5)


@quick(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_weights_have_mean_one(m, seed):
    found = annotator_weights(torch.randn(m, 3, generator=gen(seed), dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    assert float(found.mean()) == pytest.approx(1)


def test_the_prior_is_highest_at_one():
    gamma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    found = log_gamma_prior(gamma, 1.25, 0.25)
    density = [0.25**1.25 * g**0.25 * math.exp(-0.25 * g) / math.gamma(1.25) for g in gamma.tolist()]
    assert found.exp().tolist() == pytest.approx(density)
    assert found.argmax() == 1


def test_size_and_start_of_the_annotator_model():
    torch.manual_seed(0)
    m, d, k = 7, 12, 3
    model = AnnotatorModel(m, d, k, "full", 0.8, 16, True, 1.0)
    hidden = (48 * 128 + 128) + 2 * 128 + (128 * 16 + 16) + 2 * 16
    expected = (m * 16 + 16) + (d * 16 + 16) + (16**3 + 16) + hidden + (16 * 9 + 9) + 1
    assert sum(p.numel() for p in model.parameters()) == expected
    model.output.weight.data.zero_()
    found = model(torch.randn(5, d), torch.ones(5, m, dtype=torch.bool)).exp()
    assert found.shape == (35, 3, 3)
    assert torch.allclose(found, (torch.full((3, 3), 0.1) + 0.7 * torch.eye(3)).expand(35, 3, 3), atol=1e-6)


def test_the_interaction_is_the_bilinear_form_of_each_pair():
    torch.manual_seed(0)
    model = AnnotatorModel(3, 4, 2, "diagonal", 0.8, 5, True, 1.0).eval()
    x = torch.randn(2, 4)
    a, e = model.embeddings(), model.instance(x)
    rows = []
    for i in range(2):
        for j in range(3):
            inputs = torch.cat([a[j], e[i], model.interaction(a[j], e[i])])[None]
            rows.append(log_confusion(model.output((model.hidden(inputs) + a[j]).relu()), 2, "diagonal")[0])
    assert torch.allclose(model(x, torch.ones(2, 3, dtype=torch.bool)), torch.stack(rows), atol=1e-6)


def test_features_get_no_gradient_from_the_annotators():
    model = AnnotatorModel(3, 4, 2, "full", 0.8, 5, True, 1.0)
    x = torch.randn(2, 4, requires_grad=True)
    model(x, torch.ones(2, 3, dtype=torch.bool)).sum().backward()
    assert x.grad is None
    assert model.annotator.weight.grad is not None


def test_votes_by_hand():
    z = torch.tensor([[0, 0, 1], [2, -1, -1], [-1, -1, -1], [1, 2, -1]])
    share = average_labels(z, 3)
    assert torch.allclose(share, torch.tensor([[2 / 3, 1 / 3, 0], [0, 0, 1], [0, 0, 0], [0, 0.5, 0.5]]))
    assert majority_vote(z, 3, gen())[:3].tolist() == [0, 2, -1]
    assert {int(majority_vote(z, 3, gen(seed))[3]) for seed in range(20)} == {1, 2}


def test_simulated_crowds():
    y = torch.arange(4000) % 10
    z = simulate_annotators(torch.zeros(4000, 2), y, 10, gen(), kind="class", m=4)
    for j in range(4):
        right = torch.tensor([float((z[y == c, j] == c).double().mean()) for c in range(10)])
        assert sorted((right > 0.7).tolist()) == [False] * 7 + [True] * 3
    assert 0.05 < float((simulate_annotators(torch.zeros(4000, 2), y, 10, gen(), kind="adversarial") == y[:, None]).double().mean()) < 0.15
    blobs = torch.cat([torch.zeros(40, 2), torch.ones(40, 2) * 9, torch.ones(40, 2) * -9])
    assert simulate_annotators(blobs, torch.zeros(120, dtype=torch.int64), 3, gen(), kind="cluster").shape == (120, 10)
    with pytest.raises(Mistake, match="kind"):
        simulate_annotators(torch.zeros(4, 2), y[:4], 10, gen(), kind="kind")
    dependent, independent, correlated = (stress(z, 10, gen(), kind) for kind in ("rand_dep", "rand_indep", "correlated"))
    assert dependent.shape == independent.shape == (4000, 94)
    assert bool((dependent[:, 4:] == dependent[:, 4:5]).all())
    assert not bool((independent[:, 4:] == independent[:, 4:5]).all())
    assert torch.equal(correlated[:, 4:14], z[:, :1].expand(-1, 10))
    assert 0.78 < float((drop_labels(dependent, 0.8, gen()) == -1).double().mean()) < 0.82
    with pytest.raises(Mistake, match="rand_dep"):
        stress(z, 10, gen(), "kind")


def crowd(unlabelled=False):
    data = tiny_images()
    z = drop_labels(answers_with(torch.tensor([0.95, 0.9, 0.34]).expand(48, 3), data.y, 3, gen(1)), 0.3, gen(2))
    y = data.y.clone()
    if unlabelled:
        y[data.split.train] = -1
    return dataclasses.replace(data, y=y, extra={"annotators": z})


def made(spec="madl:embed=4", data=None, **changes):
    chosen = settings(
        **{
            "model": "resnet:layers=(1,1),widths=(4,8)",
            "parts": (spec,),
            "batch": 8,
            "epochs": 2,
            "lr": 0.05,
            "precision": "fp32",
            "augment": "none",
            **changes,
        }
    )
    return prepare(chosen, data or crowd())


def technique(run):
    return run.team.seats[0].technique


class Killed(Exception):
    pass


def test_own_labels_are_not_read_and_a_resumed_run_has_the_same_bits(tmp_path):
    whole, without = made(), made(data=crowd(unlabelled=True))
    fit(whole)
    fit(without)
    assert not equal(bits(whole.answer), bits(without.answer))

    def kill(done, total, text):
        if without.record is not None and done == 2:
            raise Killed

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        fit(made(checkpoint_seconds=0), path, kill)
    again = made(checkpoint_seconds=0)
    fit(again, path)
    assert not equal(bits(whole.answer), bits(again.answer))
    assert not equal(bits(whole.extra), bits(again.extra))
    x = whole.plan.pixels(whole.data.x.take(torch.arange(4)))
    kept = technique(whole).annotator_accuracy(whole, x)
    assert kept.shape == (4, 3)
    loaded = made()
    loaded.model = whole.model
    technique(loaded).restore(loaded, technique(whole).state())
    assert torch.equal(technique(loaded).annotator_accuracy(loaded, x), kept)


def test_unweighted_and_double_precision():
    fit(made("madl:embed=4,weighted=False,use_instance=False,confusion=isotropic", epochs=1))
    run = made(precision="fp64", epochs=1)
    fit(run)
    assert all(p.dtype == torch.float64 for p in run.extra.parameters())
    assert math.isfinite(float(run.loss.detach()))


def test_it_learns_who_guesses():
    run = made(epochs=12, lr=0.1)
    fit(run)
    accuracy = technique(run).annotator_accuracy(run, run.plan.pixels(run.data.x.take(run.data.split.train))).mean(0)
    assert int(accuracy.argmin()) == 2
    assert sum(row.get("unit") == "share of labels" for row in run.record.rows) == 3


def test_what_cannot_work_is_said():
    with pytest.raises(Mistake, match="annotators"):
        made(data=tiny_images())
    data = crowd()
    data.extra["annotators"] = data.extra["annotators"] + 2
    with pytest.raises(Mistake, match=r"-1\.\.2"):
        fit(made(data=data))
    for bad in ("confusion=half", "eta=1.0", "embed=0", "alpha=1.0"):
        with pytest.raises(Mistake, match=bad.split("=")[0]):
            made(f"madl:{bad}")
