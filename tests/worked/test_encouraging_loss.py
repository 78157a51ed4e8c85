"""Encouraging and halted loss by hand: the worked example, the closed-form slope, where gradients stop, 1 as cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.losses.encouraging_loss import EncouragingLoss, bonus, encouraging_loss, margin
from convince.losses.halted_loss import HaltedLoss, halted_loss
from convince.losses.poly1 import poly1_cross_entropy


def scores(p, k=4):
    """One row of logits whose softmax gives class 0 the probability ``p`` and the others the rest in equal shares."""
    row = torch.full((1, k), (1 - p) / (k - 1), dtype=torch.float64)
    row[0, 0] = p
    return row.log(), F.one_hot(torch.tensor([0]), k).double()


def draw(n=7, k=5):
    gen = generator("encouraging")
    return torch.randn(n, k, generator=gen, dtype=torch.float64) * 3, torch.randn(n, k, generator=gen, dtype=torch.float64).softmax(1)


@pytest.mark.parametrize(("p", "loss"), [(0.3, 0.84729786), (0.5, 0.0), (0.75, -1.09861229), (0.9, -1.88093385), (0.99, -2.33624403)])
def test_worked_example(p, loss):
    z, y = scores(p)
    assert float(encouraging_loss(z, y)) == pytest.approx(loss, abs=5e-9)


def test_slope_at_nine_tenths():
    """d loss / d p at 0.9: -1/0.9 - 1/(1 - 0.75) = -5.1111."""
    p = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad((-p.log() + bonus(p)).sum(), p)
    assert float(found) == pytest.approx(-1 / 0.9 - 4)
    assert float(found) == pytest.approx(-5.1111, abs=5e-5)


@given(st.floats(0.0, 0.999), st.floats(0.001, 0.999))
@settings(max_examples=80, deadline=None)
def test_bonus_is_the_curve_then_its_tangent(end, p):
    """Against the formula written out; never above 0, falls with p, at or above the full bonus, slope -1/(1-p) then constant."""
    at = torch.tensor([p], dtype=torch.float64, requires_grad=True)
    found = bonus(at, end)
    expected = math.log(1 - p) if p <= end else math.log(1 - end) - (p - end) / (1 - end)
    value = float(found.detach())
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert math.log(1 - p) - 1e-12 <= value <= 0
    (slope,) = torch.autograd.grad(found.sum(), at)
    assert float(slope) == pytest.approx(-1 / (1 - min(p, end)), rel=1e-9)


def test_gradient_in_the_logits_is_the_closed_form():
    """d/dz of a hard row is (p - e)(1 - p_y b'(p_y)), b' = -1/(1 - min(p_y, log_end)): at p -> 1 it is 1/(1 - log_end) + 1 times cross-entropy's."""
    z, _ = draw()
    z = torch.cat([z, 9 * torch.eye(5, dtype=torch.float64)])
    y = F.one_hot(torch.cat([torch.arange(7) % 5, torch.arange(5)]), 5).double()
    for end in (0.0, 0.5, 0.75, 0.99):
        z = z.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(encouraging_loss(z, y, end, reduction="sum"), z)
        p = z.detach().softmax(1)
        py = (p * y).sum(1, keepdim=True)
        torch.testing.assert_close(found, (p - y) * (1 + py / (1 - py.clamp_max(end))))


def test_cross_entropy_and_the_bonus_and_soft_labels():
    z, y = draw()
    p = z.softmax(1)
    each = -p.log() + bonus(p, 0.5)
    torch.testing.assert_close(encouraging_loss(z, y, 0.5, reduction="none"), (y * each).sum(1))
    hard = F.one_hot(torch.arange(7) % 5, 5).double()
    smoothed = 0.9 * (hard * each).sum(1) + 0.1 / 5 * each.sum(1)
    torch.testing.assert_close(encouraging_loss(z, hard, 0.5, label_smoothing=0.1, reduction="none"), smoothed)
    torch.testing.assert_close(encouraging_loss(z, hard, 0.5, 0.1), smoothed.mean())


def test_log_end_zero_is_poly1_less_one():
    """b(p) = -p then: CE - p = CE + (1 - p) - 1."""
    z, y = draw()
    torch.testing.assert_close(encouraging_loss(z, y, 0.0, reduction="none"), poly1_cross_entropy(z, y, 1.0) - 1)


def test_full_bonus_stops_at_the_clamp():
    """A sure answer costs log 1e-5 with the full bonus, and the gradients of sure rows are finite; a row without label costs nothing."""
    y = F.one_hot(torch.tensor([0, 1]), 3).double()
    z = (y * 80).requires_grad_(True)
    losses = encouraging_loss(z, y, 1.0, reduction="none")
    assert losses.tolist() == pytest.approx([math.log(1e-5)] * 2)
    for end in (0.75, 1.0):
        (found,) = torch.autograd.grad(encouraging_loss(z, y, end), z)
        assert bool(torch.isfinite(found).all())
    assert torch.equal(encouraging_loss(z, torch.zeros_like(z), reduction="none"), torch.zeros(2, dtype=torch.float64))


def test_halted_loss_by_hand():
    """Below 0.9 cross-entropy and its gradient; above it -log 0.9 and none; at 1 cross-entropy bit for bit."""
    z, y = scores(0.8)
    assert float(halted_loss(z, y)) == pytest.approx(-math.log(0.8))
    sure, _ = scores(0.95)
    assert float(halted_loss(sure, y)) == pytest.approx(-math.log(0.9))
    for row, still in ((z, False), (sure, True)):
        row = row.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(halted_loss(row, y).sum(), row)
        (plain,) = torch.autograd.grad(F.cross_entropy(row, y), row)
        torch.testing.assert_close(found, torch.zeros_like(found) if still else plain)
    z, y = draw()
    assert torch.equal(halted_loss(z, y, 1.0), F.cross_entropy(z, y, reduction="none"))


def test_margin_by_hand():
    z = torch.tensor([[2.0, -0.5, 0.3], [1.0, 4.0, 3.5], [1.0, 1.0, 0.0]])
    y = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0.4, 0.6, 0]])
    torch.testing.assert_close(margin(z, y), torch.tensor([1.7, -0.5, 0.0]))


def test_mistakes_teach():
    with pytest.raises(Mistake, match=r"log_end=1\.2"):
        EncouragingLoss(1.2)
    with pytest.raises(Mistake, match="label_smoothing=1"):
        EncouragingLoss(label_smoothing=1.0)
    with pytest.raises(Mistake, match="reduction='avg'"):
        EncouragingLoss(reduction="avg")
    with pytest.raises(Mistake, match="threshold=0"):
        HaltedLoss(0.0)
