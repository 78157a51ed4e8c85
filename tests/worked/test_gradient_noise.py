"""Gradient noise by hand: the paper's variances, the noise's moments, clipping first, its end, off, resume."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.checks.subject import MODEL, bits, equal, tiny_images
from convince.claims.gradient_noise import DeepMLP
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.fit.weights import build_by_name
from convince.optim.gradient_noise import GradientNoise, add_noise, variance


def zeros(*shapes, dtype=torch.float64):
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


@pytest.mark.parametrize(("t", "expected"), [(0, 0.3), (1, 0.20490604), (100, 0.02369979)])
def test_worked_variances(t, expected):
    assert variance(t, 0.3, 0.55) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("t", [0, 1, 100])
def test_the_noise_has_that_variance(t):
    """200,000 entries: mean and variance within 3 standard errors, and no entry twice."""
    (p,) = zeros((200_000,))
    add_noise([p], variance(t, 0.3), generator("noise", t))
    var, n = variance(t, 0.3), p.grad.numel()
    assert abs(float(p.grad.mean())) < 3 * math.sqrt(var / n)
    assert abs(float(p.grad.var()) - var) < 3 * var * math.sqrt(2 / n)
    assert len(p.grad.unique()) == n
    assert abs(float((p.grad[1:] * p.grad[:-1]).mean())) < 3 * var / math.sqrt(n)


@given(st.integers(0, 2**40), st.floats(1e-6, 4.0))
@settings(max_examples=30, deadline=None)
def test_noise_adds_to_what_is_there_and_repeats(seed, var):
    a, b, still = zeros((3, 2), (4,), (2,))
    still.grad = None
    a.grad += 5
    add_noise([a, still, b], var, generator(seed))
    c, d = zeros((3, 2), (4,))
    add_noise([c, d], var, generator(seed))
    torch.testing.assert_close(a.grad, c.grad + 5)
    assert torch.equal(b.grad, d.grad)
    assert still.grad is None
    again, _ = zeros((3, 2), (4,))
    add_noise([again], 4 * var, generator(seed))
    torch.testing.assert_close(again.grad, 2 * c.grad)


def test_dtype_is_the_gradients():
    (p,) = zeros((4,), dtype=torch.float32)
    add_noise([p], 1.0, generator(0))
    assert p.grad.dtype == torch.float32


def run(*parts, **changes):
    return prepare(make(**{"model": MODEL, "batch": 8, "epochs": 2, "precision": "fp32", "checkpoint_seconds": 0, "parts": parts, **changes}), tiny_images())


def added(spec, **changes):
    """The variance that each step of a run asks for."""
    noisy = run(spec, **changes)
    seen = []

    def watch(run):
        before = [p.grad.clone() for p in run.model.parameters()]
        GradientNoise.on_grad(part, run)
        noise = torch.cat([(p.grad - g).flatten() for p, g in zip(run.model.parameters(), before, strict=True)])
        seen.append(float(noise.square().mean()))

    part = noisy.team.seats[-1].technique
    part.on_grad = watch
    fit(noisy)
    return seen


def test_a_run_adds_it_step_by_step():
    seen = added("gradient-noise:eta=0.3")
    entries = sum(p.numel() for p in run().build().parameters())
    assert entries > 1000
    for t, found in enumerate(seen):
        assert found == pytest.approx(variance(t, 0.3), rel=5 * math.sqrt(2 / entries))
    assert len(seen) == 8


def test_fixed_stays_and_until_ends():
    seen = added("gradient-noise:eta=0.3,anneal=fixed,until=3")
    assert seen[:3] == pytest.approx([0.3] * 3, rel=0.25)
    assert seen[3:] == [0.0] * 5


def test_noise_comes_after_clipping():
    """With both, the gradient is longer than the limit: the noise was not clipped."""
    norms = []
    noisy = run("gradient-noise:eta=1.0", "gradient-clipping:max_norm=0.01")
    assert [seat.name for seat in noisy.team.seats] == ["gradient-clipping", "gradient-noise"]
    fit(noisy, None, lambda *_: norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in noisy.model.parameters()))))
    assert min(norms) > 1


def test_off_is_the_baseline_undropped():
    plain, off = run(), prepare(run("gradient-noise:eta=0.0").settings, tiny_images(), drop_off=False)
    assert len(off.team.seats) == 1
    fit(plain)
    fit(off)
    assert not equal(bits(plain.model), bits(off.model))


def test_interrupted_and_resumed(tmp_path):
    whole = run("gradient-noise:eta=0.3")
    fit(whole)

    def stop(done, total, text):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(run("gradient-noise:eta=0.3"), tmp_path / "c", stop)
    again = run("gradient-noise:eta=0.3")
    fit(again, tmp_path / "c")
    assert not equal(bits(whole.model), bits(again.model))


@pytest.mark.parametrize(("options", "words"), [
    ({"eta": -1.0}, ("eta=-1.0", "0.01")), ({"eta": math.nan}, ("eta=nan",)), ({"gamma": -0.5}, ("gamma=-0.5", "0.55")), ({"until": 0}, ("until=0", "eta=0")),
])  # fmt: skip
def test_bad_settings_are_named(options, words):
    with pytest.raises(Mistake) as found:
        GradientNoise(**options)
    assert all(word in str(found.value) for word in words)


def test_the_papers_network():
    """784-50x20-10: 784*50+50 + 19*(50*50+50) + 50*10+10 = 88,210."""
    assert sum(p.numel() for p in DeepMLP(784).parameters()) == 88_210
    simple, he, zero = (build_by_name(lambda start=start: DeepMLP(784, start=start), 0) for start in ("simple", "he", "zero"))
    weights = torch.cat([m.weight.flatten() for m in simple.modules() if isinstance(m, nn.Linear)])
    assert float(weights.detach().std()) == pytest.approx(0.1, rel=0.02)
    assert float(he.layers[2].weight.detach().std()) == pytest.approx(math.sqrt(2 / 50), rel=0.05)
    assert all(not p.any() for p in zero.parameters())
    assert all(not m.bias.any() for m in he.modules() if isinstance(m, nn.Linear))
