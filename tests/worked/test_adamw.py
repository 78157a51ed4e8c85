"""AdamW by hand: two steps, decay apart from the moments, what is refused; state that survives a file."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.checks.subject import MODEL, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings as make
from convince.fit.state import load_optimizer, optimizer_state, read_tree, write_tree
from convince.fit.train import prepare
from convince.optim.adamw import AdamW


def walk(w, grads, **options):
    p = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    optimizer = AdamW([p], **options)
    for g in grads:
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    return p.tolist(), optimizer.state[p]


def test_two_steps_by_hand():
    """w = 1, g = 2 then -1, lr 0.1, decay 0.5, eps 0: m' = v'^(1/2) = 2, so w = 0.95 - 0.1 = 0.85; then decay first, Adam's step after."""
    w, _ = walk([1.0], [[2.0]], lr=0.1, eps=0.0, weight_decay=0.5)
    assert w == pytest.approx([0.85], abs=1e-15)
    m = (0.9 * 0.1 * 2 + 0.1 * -1) / (1 - 0.9**2)
    v = (0.999 * 0.001 * 4 + 0.001 * 1) / (1 - 0.999**2)
    w, state = walk([1.0], [[2.0], [-1.0]], lr=0.1, eps=0.0, weight_decay=0.5)
    assert w == pytest.approx([0.85 * 0.95 - 0.1 * m / math.sqrt(v)], abs=1e-15)
    assert state["exp_avg"].item() == pytest.approx(0.08)


@given(st.floats(0.01, 0.9), st.floats(-3, 3).filter(lambda g: abs(g) > 1e-3))
@settings(max_examples=30, deadline=None)
def test_decay_stays_out_of_the_moments(decay, g):
    """The moments are those without decay, whatever the decay; Adam with an L2 term mixes the two."""
    apart, plain = walk([2.0], [[g], [g]], weight_decay=decay)[1], walk([2.0], [[g], [g]], weight_decay=0.0)[1]
    assert torch.equal(apart["exp_avg"], plain["exp_avg"])
    assert torch.equal(apart["exp_avg_sq"], plain["exp_avg_sq"])
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    mixed = torch.optim.Adam([p], weight_decay=decay)
    p.grad = torch.tensor([g], dtype=torch.float64)
    mixed.step()
    assert not torch.equal(mixed.state[p]["exp_avg"], walk([2.0], [[g]], weight_decay=decay)[1]["exp_avg"])


def test_without_a_gradient_only_the_decay_works():
    assert walk([4.0], [[0.0]], lr=0.1, weight_decay=0.5)[0] == pytest.approx([3.8])


def test_defaults():
    found = AdamW([nn.Parameter(torch.zeros(1))]).defaults
    assert (found["lr"], found["betas"], found["eps"], found["weight_decay"]) == (0.001, (0.9, 0.999), 1e-8, 0.01)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": -0.1}, {"lr": math.nan}])
def test_bad_settings_are_named(options):
    with pytest.raises(Mistake, match=f"adamw: {next(iter(options))}="):
        AdamW([nn.Parameter(torch.zeros(1))], **options)


def test_a_run_uses_it_with_its_own_rate_or_the_persons():
    for lr, expected in ((None, 1e-3), (0.02, 0.02)):
        run = prepare(make(model=MODEL, batch=8, steps=1, lr=lr, precision="fp32", parts=("adamw:weight_decay=0.1",)), tiny_images())
        seen = []
        fit(run, None, lambda *_, run=run, seen=seen: seen.append(run.optimizer))
        assert isinstance(seen[0], AdamW)
        assert (seen[0].defaults["lr"], seen[0].defaults["weight_decay"]) == (expected, 0.1)


def test_state_survives_a_file(tmp_path):
    def network():
        model = nn.Linear(3, 2).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        return model

    def go(model, optimizer, times):
        for i in times:
            optimizer.zero_grad()
            model(torch.arange(3.0, dtype=torch.float64) + i).square().sum().backward()
            optimizer.step()

    whole, first = network(), network()
    go(whole, AdamW(whole.parameters()), range(4))
    optimizer = AdamW(first.parameters())
    go(first, optimizer, range(2))
    write_tree(tmp_path / "state", optimizer_state(optimizer, {p: n for n, p in first.named_parameters()}))
    again = AdamW(first.parameters())
    load_optimizer(again, {p: n for n, p in first.named_parameters()}, read_tree(tmp_path / "state"))
    go(first, again, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), first.parameters(), strict=True))
