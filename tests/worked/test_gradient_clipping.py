"""Gradient clipping by hand: one norm over all tensors, below it nothing moves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.checks.subject import MODEL, tiny_images
from convince.errors import Mistake
from convince.fit.adapters import seat
from convince.fit.loop import fit
from convince.fit.settings import settings as make
from convince.fit.state import named
from convince.fit.train import prepare
from convince.training.gradient_clipping import GradientClipping, clip_gradients


def two():
    """Gradients (3, 0) and (4): the norm of all is 5."""
    a, b = nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    a.grad, b.grad = torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    return a, b


def test_by_hand():
    a, b = two()
    assert float(clip_gradients([a, b, nn.Parameter(torch.zeros(3))], 1.0)) == 5.0
    assert a.grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-6)
    assert b.grad.tolist() == pytest.approx([0.8], abs=1e-6)


def test_below_the_limit_nothing_moves():
    a, b = two()
    clip_gradients([a, b], 5.1)
    assert a.grad.tolist() == [3.0, 0.0]
    assert b.grad.tolist() == [4.0]


def test_zero_stays_zero():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    clip_gradients([p], 1.0)
    assert p.grad.tolist() == [0.0, 0.0]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_norm_is_bounded_and_direction_kept(values, limit):
    p = nn.Parameter(torch.zeros(len(values), dtype=torch.float64))
    p.grad = torch.tensor(values, dtype=torch.float64)
    before = p.grad.clone()
    clip_gradients([p], limit)
    assert float(p.grad.norm()) <= limit * (1 + 1e-9)
    torch.testing.assert_close(p.grad * before.norm(), before * p.grad.norm(), rtol=1e-6, atol=1e-6)


def test_every_step_of_a_run_is_clipped():
    run = prepare(make(model=MODEL, batch=8, epochs=1, precision="fp32", parts=("gradient-clipping:max_norm=0.01",)), tiny_images())
    norms = []
    fit(run, None, lambda *_: norms.append(math.sqrt(sum(float(p.grad.square().sum()) for _, p in named(run)))))
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_it_comes_before_noise():
    assert seat("gradient-clipping").technique.rank == 10


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_bad_limit_is_named(value):
    with pytest.raises(Mistake, match=f"max_norm={value}"):
        GradientClipping(max_norm=value)
