"""L2-SVM by hand: the worked example, both forms, mixed labels, scikit-learn's LinearSVC on the same features, the temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import LinearSVC
from torch import nn

from convince.checks.subject import MODEL, bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.losses.l2svm import L2SVM, SVMHead, head_weight, l2svm_loss, penalty, squared_hinge, temperature
from convince.types import Batch, Out

SCORES = torch.tensor([[2.0, -0.5, 0.3]], dtype=torch.float64)
FIRST = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)


def test_worked_example():
    """Scores [2, -0.5, 0.3], class 0: squared hinges [0, 0.25, 1.69], sum 1.94, mean 0.64666667; without squares [0, 0.5, 1.3]."""
    torch.testing.assert_close(squared_hinge(SCORES, FIRST), torch.tensor([[0.0, 0.25, 1.69]], dtype=torch.float64))
    torch.testing.assert_close(squared_hinge(SCORES, FIRST, "l1"), torch.tensor([[0.0, 0.5, 1.3]], dtype=torch.float64))
    assert float(l2svm_loss(SCORES, FIRST)) == pytest.approx(0.64666667, abs=5e-9)
    assert float(l2svm_loss(SCORES, FIRST, reduction="sum")) == pytest.approx(1.94)
    assert float(l2svm_loss(SCORES, FIRST, C=10.0)) == pytest.approx(6.4666667, abs=5e-8)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_plain_labels_are_the_papers_signs(row, c):
    s = torch.tensor([row], dtype=torch.float64)
    y = F.one_hot(torch.tensor([c % len(row)]), len(row)).double()
    t = 2 * y - 1
    torch.testing.assert_close(squared_hinge(s, y), (1 - t * s).clamp_min(0) ** 2)


def test_a_mixed_label_is_the_mean_of_its_classes_and_an_empty_row_costs_nothing():
    y = torch.tensor([[0.7, 0.3, 0.0]], dtype=torch.float64)
    apart = [squared_hinge(SCORES, F.one_hot(torch.tensor([c]), 3).double()) for c in (0, 1)]
    torch.testing.assert_close(squared_hinge(SCORES, y), 0.7 * apart[0] + 0.3 * apart[1])
    assert torch.equal(squared_hinge(SCORES, 0 * y), torch.zeros_like(y))


def test_penalties():
    w = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert float(penalty(w)) == 6.5
    assert float(penalty(w, "paper")) == 13.0


def test_gradient_is_the_closed_form():
    """d/ds max(0, 1 - t s)^2 = -2 t max(0, 1 - t s)."""
    s = torch.randn(6, 4, generator=generator("svm"), dtype=torch.float64).requires_grad_(True)
    y = F.one_hot(torch.arange(6) % 4, 4).double()
    (found,) = torch.autograd.grad(l2svm_loss(s, y, reduction="sum"), s)
    t = 2 * y - 1
    torch.testing.assert_close(found, -2 * t * (1 - t * s.detach()).clamp_min(0))
    assert torch.autograd.gradcheck(lambda z: l2svm_loss(z, y), s)


def test_the_papers_form_is_sklearns_linear_svc():
    """The head alone on fixed features, form "paper": the weights that scikit-learn finds (its bias is penalised like a weight)."""
    gen = generator("svc")
    c = torch.arange(90) % 3
    x = torch.randn(90, 4, generator=gen, dtype=torch.float64) + 1.2 * F.one_hot(c, 4)
    x = torch.cat([x, torch.ones(90, 1, dtype=torch.float64)], 1)  # the penalised bias, as a feature
    head, y = SVMHead(5, 3, C=0.5, form="paper").double(), F.one_hot(c, 3).double()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    head.bias.requires_grad_(False)
    optimizer = torch.optim.LBFGS([head.weight], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = head.objective(head(x), y)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    oracle = LinearSVC(C=0.5, loss="squared_hinge", fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x.numpy(), c.numpy())
    np.testing.assert_allclose(head.weight.detach().numpy(), oracle.coef_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_objective_is_penalty_and_hinge_of_one_form(form):
    """Means with means, sums with sums; row weights multiply rows; a shard's sum counts for the whole batch."""
    run = prepare(make(model=MODEL, batch=8, parts=()), tiny_images())
    run.model = run.build()
    s, y = torch.randn(4, 3, generator=generator("objective")), F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    part, w = L2SVM(C=2.0, form=form), run.model.fc.weight
    hinges = squared_hinge(s, y)
    reduce = (lambda a: a.mean()) if form == "released" else (lambda a: a.sum())
    batch = Batch(s, y, torch.arange(4))
    torch.testing.assert_close(part.objective(run, Out(s), batch), penalty(w, form) + 2 * reduce(hinges))
    head = SVMHead(8, 3, C=2.0, form=form)
    head.weight = w
    torch.testing.assert_close(head.objective(s, y), part.objective(run, Out(s), batch))
    batch.weight = torch.tensor([0.0, 1.0, 2.0, 1.0])
    torch.testing.assert_close(part.objective(run, Out(s), batch), penalty(w, form) + 2 * reduce(hinges * batch.weight[:, None]))
    batch.weight, run.share = None, 0.5
    torch.testing.assert_close(part.objective(run, Out(s), batch), penalty(w, form) + 2 * reduce(hinges) * (1 if form == "released" else 2))


def test_forms_shrink_the_head_differently():
    """The paper's penalty pulls each weight by w itself, the released one by 2 w / size."""
    w = torch.randn(10, 64, generator=generator("pull"), requires_grad=True)
    pulls = [torch.autograd.grad(penalty(w, form), w)[0] for form in ("paper", "released")]
    torch.testing.assert_close(pulls[0], w.detach())
    torch.testing.assert_close(pulls[1], w.detach() / 320)


def test_temperature_is_the_one_that_was_planted():
    """Labels drawn from softmax(s / 0.25): that T comes back, and scaling the scores scales it."""
    gen = generator("temperature")
    s = torch.randn(4000, 3, generator=gen, dtype=torch.float64)
    y = torch.multinomial((s / 0.25).softmax(1), 1, generator=gen)[:, 0]
    found = temperature(s, y)
    assert found == pytest.approx(0.25, rel=0.06)
    assert temperature(8 * s, y) == pytest.approx(8 * found, rel=1e-4)
    least = float(F.cross_entropy(s / found, y))
    assert all(least < float(F.cross_entropy(s / (found * by), y)) for by in (0.95, 1.05))


def test_the_released_form_pulls_on_the_whole_network():
    runs = []
    for part in ("l2svm", "l2svm:form=paper,C=0.01", "l2svm:hinge=l1"):
        runs.append(prepare(make(model=MODEL, batch=8, steps=3, parts=(part,), augment="none", lr=0.02), tiny_images()))
        fit(runs[-1])
    assert equal(bits(runs[0].model), bits(runs[1].model))
    assert equal(bits(runs[0].model), bits(runs[2].model))
    assert runs[0].evaluate("test").probs.sum(1).tolist() == pytest.approx([1.0] * 8)


def test_mistakes_teach():
    with pytest.raises(Mistake, match="C=0"):
        L2SVM(C=0.0)
    with pytest.raises(Mistake, match="'released'"):
        L2SVM(form="official")
    with pytest.raises(Mistake, match="hinge='l3'"):
        L2SVM(hinge="l3")
    with pytest.raises(Mistake, match=r"l2svm: the network 'bare' .* choose another --model"):
        head_weight(nn.Sequential(nn.Linear(2, 3)), "bare")
