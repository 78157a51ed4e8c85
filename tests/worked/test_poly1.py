"""PolyLoss by hand: the worked example, the series, closed-form gradients, epsilon 0 bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.checks.subject import MODEL, bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.adapters import Objective
from convince.fit.loop import fit, soft_cross_entropy
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.losses.poly1 import Poly1, poly1_cross_entropy, poly1_focal, poly1_focal_sigmoid, poly_drop, poly_n, tune_epsilon
from convince.losses.poly_n import PolyN
from convince.types import Batch, Out


def scores(pt, k=4):
    """One row of logits whose softmax gives class 0 the probability ``pt`` and the others the rest in equal shares."""
    p = torch.full((1, k), (1 - pt) / (k - 1), dtype=torch.float64)
    p[0, 0] = pt
    return p.log(), F.one_hot(torch.tensor([0]), k).double()


def draw(n=7, k=5, dtype=torch.float64):
    gen = generator("poly")
    return torch.randn(n, k, generator=gen, dtype=dtype) * 3, torch.randn(n, k, generator=gen, dtype=dtype).softmax(1)


def test_worked_example():
    """Pt = 0.8: Poly-1 0.42314355, focal 0.00892574, Poly-1 focal 0.01692574."""
    z, y = scores(0.8)
    assert float(poly1_cross_entropy(z, y, 1.0)) == pytest.approx(0.42314355, abs=5e-9)
    assert float(F.cross_entropy(z, y)) == pytest.approx(0.22314355, abs=5e-9)
    assert float(poly1_focal(z, y, 0.0)) == pytest.approx(0.00892574, abs=5e-9)
    assert float(poly1_focal(z, y, 1.0)) == pytest.approx(0.01692574, abs=5e-9)


def test_sigmoid_version():
    """p = 0.8: a positive has Pt = 0.8 as above, a negative Pt = 0.2; alpha weighs them 0.25 to 0.75."""
    z = torch.tensor([math.log(4.0)] * 2, dtype=torch.float64)
    y = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = poly1_focal_sigmoid(z, y)
    negative = -(0.8**2) * math.log(0.2) + 0.8**3
    torch.testing.assert_close(found, torch.tensor([0.04 * -math.log(0.8) + 0.008, negative], dtype=torch.float64))
    torch.testing.assert_close(poly1_focal_sigmoid(z, y, alpha=0.25), found * torch.tensor([0.25, 0.75], dtype=torch.float64))


@pytest.mark.parametrize(("pt", "error"), [(0.05, 3.0e-6), (0.03, 3.2e-4)])
def test_truncation_error(pt, error):
    z, y = scores(pt)
    assert float(F.cross_entropy(z, y) - poly_drop(z, y, 200)) == pytest.approx(error, rel=0.02)


@given(st.floats(0.05, 0.999), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_series(pt, n):
    """Against the sum written out; 200 terms are within 1e-5 of cross-entropy; more terms come nearer from below."""
    z, y = scores(pt)
    assert float(poly_drop(z, y, n)) == pytest.approx(sum((1 - pt) ** j / j for j in range(1, n + 1)), rel=1e-9)
    ce = float(F.cross_entropy(z, y))
    assert abs(float(poly_drop(z, y, 200)) - ce) <= 1e-5
    assert float(poly_drop(z, y, n)) <= float(poly_drop(z, y, n + 1)) <= ce + 1e-12


def test_gradient_is_the_closed_form():
    """d/dz of one row: (p - e)(1 + epsilon Pt) for a hard label e."""
    z, _ = draw()
    y = F.one_hot(torch.arange(7) % 5, 5).double()
    for epsilon in (-1.0, -0.5, 0.0, 2.0):
        z = z.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(poly1_cross_entropy(z, y, epsilon).sum(), z)
        p = z.detach().softmax(1)
        torch.testing.assert_close(found, (p - y) * (1 + epsilon * (p * y).sum(1, keepdim=True)))


def test_gradient_of_the_series_in_pt():
    """-d poly_drop / d Pt = sum_{j<N} (1 - Pt)^j."""
    pt = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    rest = (1 - pt) / 3
    z = torch.stack([pt, rest, rest, rest], 1).log()
    (found,) = torch.autograd.grad(poly_drop(z, F.one_hot(torch.tensor([0]), 4).double(), 6).sum(), pt)
    assert float(found) == pytest.approx(-sum(0.7**j for j in range(6)))


def test_soft_labels_and_smoothing():
    """Pt = sum_k y_k p_k; smoothing mixes the label with the uniform row in both terms; class weights multiply the class's terms."""
    z, y = draw()
    p = z.softmax(1)
    torch.testing.assert_close(poly1_cross_entropy(z, y, 2.0), F.cross_entropy(z, y, reduction="none") + 2 * (1 - (y * p).sum(1)))
    soft = y * 0.9 + 0.1 / 5
    torch.testing.assert_close(poly1_cross_entropy(z, y, 2.0, label_smoothing=0.1), poly1_cross_entropy(z, soft, 2.0))
    hard, w = F.one_hot(torch.arange(7) % 5, 5).double(), torch.arange(1.0, 6.0, dtype=torch.float64)
    torch.testing.assert_close(poly1_cross_entropy(z, hard, 2.0, weight=w), w[torch.arange(7) % 5] * poly1_cross_entropy(z, hard, 2.0))


def test_poly_n():
    z, y = scores(0.8)
    assert float(poly_n(z, y, (1.0, -2.0, 3.0))) == pytest.approx(-math.log(0.8) + 0.2 - 2 * 0.04 + 3 * 0.008)
    z, y = draw()
    assert torch.equal(poly_n(z, y, (1.5,)), poly1_cross_entropy(z, y, 1.5))
    assert torch.equal(poly_n(z, y, ()), F.cross_entropy(z, y, reduction="none"))
    assert torch.equal(PolyN(epsilon=(1.0, 0.5))(z, y), poly_n(z, y, (1.0, 0.5)).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_is_cross_entropy_bit_for_bit(dtype):
    z, y = draw(dtype=dtype)
    z = torch.cat([z, 60 * y.round()])  # and rows where the probability rounds to 1
    y = torch.cat([y, F.one_hot(torch.arange(7) % 5, 5).to(dtype)])
    batch = Batch(z, y, torch.arange(14), torch.linspace(0.5, 2, 14, dtype=dtype))
    run = prepare(make(model=MODEL, batch=8), tiny_images())
    for weight in (None, batch.weight):
        batch.weight = weight
        grads, losses = [], []
        for objective in (Objective(Poly1(0.0, "none")).objective, soft_cross_entropy):
            z = z.detach().requires_grad_(True)
            losses.append(objective(run, Out(z), batch))
            grads.append(torch.autograd.grad(losses[-1], z)[0])
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(grads[0], grads[1])


def test_zero_is_the_baseline_under_bf16():
    runs = []
    for parts in ((), ("poly1:epsilon=0.0",), ("poly-n:epsilon=()",)):
        runs.append(prepare(make(model=MODEL, batch=8, epochs=2, precision="bf16", parts=parts), tiny_images(), drop_off=False))
        fit(runs[-1])
    assert not equal(bits(runs[0].model), bits(runs[1].model))
    assert not equal(bits(runs[0].model), bits(runs[2].model))


def test_a_row_without_label_costs_nothing():
    z, _ = draw()
    assert torch.equal(poly1_cross_entropy(z, torch.zeros_like(z), 3.0), torch.zeros(7, dtype=torch.float64))


def test_tuning_takes_the_best_and_the_first_of_equals():
    best, found = tune_epsilon(lambda e: -((e - 1.2) ** 2))
    assert best == 1.0
    assert set(found) == {-1, -0.5, 0, 1, 2, 4}
    assert tune_epsilon(lambda e: 1.0, (0.0, 1.0))[0] == 0.0


def test_mistakes_teach():
    with pytest.raises(Mistake, match="epsilon=inf"):
        Poly1(math.inf)
    with pytest.raises(Mistake, match="reduction='avg'"):
        Poly1(reduction="avg")
    with pytest.raises(Mistake, match="brackets"):
        PolyN(epsilon=(math.nan,))
