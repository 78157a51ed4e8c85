"""NovoGrad by hand: the worked example to eight digits, timm's parity, scale invariance, state, resume, pruning."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.checks.subject import MODEL, bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.state import load_optimizer, optimizer_state, read_tree, write_tree
from convince.fit.train import prepare
from convince.optim.novograd import NovoGrad, state_bytes


def steps(w, grads, **options):
    p = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    optimizer = NovoGrad([p], **options)
    rows = []
    for g in grads:
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        rows.append({"w": p.detach().tolist(), "v": float(optimizer.state[p]["v"]), "m": optimizer.state[p]["m"].tolist()})
    return rows


def test_worked_example():
    first, second = steps((1.0, -1.0), [(3.0, 4.0), (0.0, 5.0)], lr=0.01, betas=(0.95, 0.98), weight_decay=0.001, eps=1e-8)
    assert first["v"] == pytest.approx(25, abs=1e-12)
    assert first["m"] == pytest.approx([0.601, 0.799], abs=1e-7)
    assert first["w"] == pytest.approx([0.99399, -1.00799], abs=1e-7)
    assert second["v"] == pytest.approx(25, abs=1e-12)
    assert second["m"] == pytest.approx([0.57194399, 1.75804201], abs=1e-8)
    assert second["w"] == pytest.approx([0.98827056, -1.02557042], abs=1e-8)


def test_defaults_are_the_papers():
    found = NovoGrad([nn.Parameter(torch.zeros(1))]).defaults
    assert (found["lr"], found["betas"], found["eps"], found["weight_decay"]) == (0.01, (0.95, 0.98), 1e-8, 0.001)
    assert not found["grad_averaging"]
    assert not found["amsgrad"]


def test_grad_averaging_and_amsgrad_by_hand():
    """One number: g = 2 then 1. Averaging: the bracket times 0.05. AMSGrad: v = 4, then 3.94 < 4, so 2 divides again."""
    rows = steps((1.0,), [(2.0,), (1.0,)], lr=0.1, weight_decay=0.0, eps=0.0, grad_averaging=True, amsgrad=True)
    assert rows[0]["m"] == pytest.approx([0.05])
    assert rows[1]["v"] == pytest.approx(0.98 * 4 + 0.02)
    assert rows[1]["m"] == pytest.approx([0.95 * 0.05 + 0.05 * 0.5])
    assert rows[1]["w"] == pytest.approx([1 - 0.1 * 0.05 - 0.1 * 0.0725])


@pytest.fixture(scope="module")
def timm_novograd():
    """timm's file alone: importing the package takes seconds."""
    spec = importlib.util.find_spec("timm")
    package = types.ModuleType("timm_optim")
    package.__path__ = [f"{spec.submodule_search_locations[0]}/optim"]
    sys.modules["timm_optim"] = package
    yield importlib.import_module("timm_optim.nvnovograd").NvNovoGrad
    for name in [name for name in sys.modules if name.split(".")[0] == "timm_optim"]:
        del sys.modules[name]


@pytest.mark.parametrize("options", [{}, {"grad_averaging": True}, {"amsgrad": True}, {"weight_decay": 0.1, "betas": (0.9, 0.25)}])
def test_equals_timm(timm_novograd, options):
    """Same rule: float64 weights after 20 steps agree to what timm's float32 second moment allows."""
    options = {"lr": 0.01, "weight_decay": 0.001, **options}
    ends = []
    for kind in (NovoGrad, timm_novograd):
        gen = generator("timm")
        params = [nn.Parameter(torch.randn(shape, generator=gen, dtype=torch.float64)) for shape in ((3, 2, 3, 3), (5,), (4, 6), ())]
        optimizer = kind(params, **options)
        for _ in range(20):
            for p in params:
                p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            optimizer.step()
        ends.append([p.detach() for p in params])
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@given(st.floats(1e-2, 1e3), st.integers(0, 2**30))
@settings(max_examples=25, deadline=None)
def test_scale_of_each_tensors_gradient_does_not_matter(scale, seed):
    """Multiplying all gradients of one tensor leaves the trajectory (but for eps)."""
    ends = []
    for s in (1.0, scale):
        gen = generator("scale", seed)
        params = [nn.Parameter(torch.randn(4, 3, generator=gen, dtype=torch.float64)), nn.Parameter(torch.randn(3, generator=gen, dtype=torch.float64))]
        optimizer = NovoGrad(params)
        for _ in range(10):
            params[0].grad = s * torch.randn(4, 3, generator=gen, dtype=torch.float64)
            params[1].grad = torch.randn(3, generator=gen, dtype=torch.float64)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_gradients_and_missing_ones_are_left():
    """Gradients are not changed; a tensor without one stands still and starts its own first step later."""
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = NovoGrad([a, b])
    a.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer.step()
    assert a.grad.tolist() == [3.0, 4.0]
    assert b.tolist() == [1.0, 1.0]
    assert b not in optimizer.state
    b.grad = torch.tensor([6.0, 8.0], dtype=torch.float64)
    optimizer.step()
    assert float(optimizer.state[b]["v"]) == pytest.approx(100)  # ||g_1||^2, no (1 - betas[1])
    assert float(optimizer.state[a]["v"]) == pytest.approx(25)


def test_zero_gradient_is_finite():
    rows = steps((1.0, 2.0), [(0.0, 0.0), (1.0, 0.0)])
    assert all(math.isfinite(w) for row in rows for w in row["w"])


def test_closure():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = NovoGrad([p])

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() < 2.0


def test_state_is_half_of_adams():
    """ResNet-50: 25,557,032 numbers of momentum and 161 scalars, against Adam's 51,114,064 (and its 161 step counts)."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
    counts = {}
    for kind in (NovoGrad, torch.optim.Adam):
        optimizer = kind(model.parameters())
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        counts[kind] = sum(t.numel() for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert len(optimizer.state) == 161
    assert counts == {NovoGrad: 25_557_032 + 161, torch.optim.Adam: 51_114_064}


def test_state_bytes():
    p = nn.Parameter(torch.zeros(10))
    optimizer = NovoGrad([p])
    assert state_bytes(optimizer) == 0
    p.grad = torch.ones(10)
    optimizer.step()
    assert state_bytes(optimizer) == 4 * 10 + 4


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_survives_a_file(tmp_path, amsgrad):
    """Saved by name, written, read and given to a new optimiser: the next steps have equal bits."""

    def network():
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
        gen = generator("file")
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(generator=gen)
        return model.to(memory_format=torch.channels_last)

    def go(model, optimizer, count, gen):
        for _ in range(count):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=gen)
            optimizer.step()

    whole, gen = network(), generator("gradients")
    optimizer = NovoGrad(whole.parameters(), amsgrad=amsgrad)
    go(whole, optimizer, 3, gen)
    names = {p: n for n, p in whole.named_parameters()}
    write_tree(tmp_path / "state", {"optimizer": optimizer_state(optimizer, names), "model": dict(whole.state_dict())})
    place = gen.get_state()
    go(whole, optimizer, 3, gen)

    kept, other = read_tree(tmp_path / "state"), network()
    other.load_state_dict(kept["model"])
    again = NovoGrad(other.parameters(), amsgrad=amsgrad, lr=1.0)
    load_optimizer(again, {p: n for n, p in other.named_parameters()}, kept["optimizer"])
    gen.set_state(place)
    go(other, again, 3, gen)
    assert again.param_groups[0]["lr"] == 0.01
    assert not equal(bits(whole), bits(other))


def test_run_uses_the_runs_learning_rate():
    run = prepare(make(model=MODEL, batch=8, epochs=1, lr=0.02, precision="fp32", parts=("novograd",)), tiny_images())
    rates = []
    fit(run, None, lambda *_: rates.append(run.optimizer.param_groups[0]["initial_lr"]))
    assert rates == [0.02] * 4
    assert prepare(make(model=MODEL, batch=8, parts=("novograd",)), tiny_images()).team.owner("optimizer").options == {}


@pytest.mark.parametrize(("options", "words"), [
    ({"lr": -1.0}, "lr=-1.0"), ({"lr": math.nan}, "lr=nan"), ({"betas": (0.9, 1.0)}, "betas="), ({"eps": -1e-8}, "eps="),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
])  # fmt: skip
def test_bad_settings_are_named(options, words):
    with pytest.raises(Mistake, match=words):
        NovoGrad([nn.Parameter(torch.zeros(1))], **options)
