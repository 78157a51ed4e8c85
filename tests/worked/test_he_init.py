"""He's initial law by hand: the worked deviations, fans, torch's own draws, variances through thirty layers, and what a run makes of it."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones.resnet import ResNet
from convince.checks.subject import MODEL, Subject, bits, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit, start
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.layers.he_init import HeInit, fan, he_init, he_std, layers, plain_net, redraw, variance_probe, xavier_std
from convince.parts import get


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_worked_deviations():
    conv = nn.Conv2d(16, 32, 3)
    assert fan(conv) == 144
    assert he_std(144) == pytest.approx(0.117851, abs=5e-7)
    assert he_std(144, a=0.25) == pytest.approx(0.114332, abs=5e-7)
    assert xavier_std(144) == pytest.approx(0.083333, abs=5e-7)


def test_what_is_left_after_thirty_layers():
    """``(fan var(w) (1 + a^2) / 2)^29``: all of the variance under He's law, 1.86e-9 of it under the paper's Xavier."""
    assert (144 * xavier_std(144) ** 2 / 2) ** 29 == pytest.approx(1.86e-9, rel=2e-3)
    assert (144 * he_std(144, a=0.25) ** 2 * (1 + 0.25**2) / 2) ** 29 == pytest.approx(1)


@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [
        (nn.Linear(5, 7), 5, 7),
        (nn.Conv2d(6, 4, 3, bias=False), 54, 36),
        (nn.Conv2d(6, 4, 3, groups=2), 27, 18),
        (nn.Conv2d(8, 8, 5, groups=8), 25, 25),
        (nn.Conv1d(3, 2, 4), 12, 8),
    ],
)
def test_fans(layer, fan_in, fan_out):
    """An input of one group is read by the outputs of that group only, which torch's own count of fan_out does not see."""
    assert (fan(layer), fan(layer, "fan_out")) == (fan_in, fan_out)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.sampled_from(["fan_in", "fan_out"]), st.sampled_from(["normal", "uniform"]))
def test_parity_with_torch(c_in, c_out, a, mode, dist):
    """The same law as nn.init.kaiming_*, from the same generator."""
    mine, theirs = nn.Conv2d(c_in, c_out, 3), nn.Conv2d(c_in, c_out, 3)
    redraw(mine, gen(1), a=a, mode=mode, dist=dist)
    draw = nn.init.kaiming_normal_ if dist == "normal" else nn.init.kaiming_uniform_
    draw(theirs.weight, a=a, mode=mode, nonlinearity="leaky_relu", generator=gen(1))
    torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-5, atol=1e-7)
    assert not mine.bias.any()


def test_xavier_is_the_papers_and_not_torchs():
    layer = nn.Linear(400, 100)
    redraw(layer, gen(), law="xavier")
    assert float(layer.weight.detach().std()) == pytest.approx(0.05, rel=0.02)  # torch's would be sqrt(2 / 500) = 0.063


@pytest.mark.parametrize(("law", "low", "high"), [("he", -1, 1), ("xavier", -11, -6)])
def test_variance_through_thirty_layers(law, low, high):
    """Median over nets of log10(variance of layer 30 / layer 1), forward, and of layer 1 / layer 30, backward."""
    forward, backward = [], []
    for seed in range(4):
        net = plain_net()
        he_init(net, gen(seed), law=law)
        rows = variance_probe(net, torch.randn(1, 64, 8, 8, generator=gen(seed)), gen(seed))
        assert [row["layer"] for row in rows] == [f"conv{i}" for i in range(1, 31)]
        forward.append(math.log10(rows[-1]["forward"] / rows[0]["forward"]))
        backward.append(math.log10(rows[0]["backward"] / rows[-1]["backward"]))
    assert low < statistics.median(forward) < high
    assert low < statistics.median(backward) < high


@pytest.mark.parametrize("inplace", [False, True])
def test_probe_by_hand(inplace):
    """One layer: the variance of w x, and of the gradient that comes through the rectifier; nothing is left behind."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    (row,) = variance_probe(net, x, gen(3))
    y = net[0](x).detach()
    noise = torch.randn(y.shape, generator=gen(3), dtype=y.dtype)
    assert row["forward"] == pytest.approx(float(y.var()))
    assert row["backward"] == pytest.approx(float((noise * (y > 0)).var()))
    assert all(p.grad is None for p in net.parameters())
    assert not net[0]._forward_hooks
    assert not x.requires_grad


def test_probe_of_a_residual_network():
    model = ResNet(num_classes=3, layers=(1, 1), widths=(4, 8))
    rows = variance_probe(model, torch.randn(4, 3, 8, 8), gen())
    assert {row["layer"] for row in rows} == {name for name, _ in layers(model)}
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in rows)


def test_plain_net_has_a_head_where_classes_are_asked_for():
    net = plain_net(depth=3, width=5, in_chans=1, num_classes=4, act=nn.PReLU)
    assert net(torch.randn(2, 1, 6, 6)).shape == (2, 4)
    assert sum(isinstance(m, nn.Conv2d) for m in net) == sum(isinstance(m, nn.PReLU) for m in net) == 3
    assert plain_net(depth=2, width=3)(torch.randn(1, 3, 5, 5)).shape == (1, 3, 5, 5)


def started(*specs, **changes):
    run = Subject(get("he-init")).run(*specs, **changes)
    start(run)
    return run


def test_a_run_draws_by_name_and_leaves_norms():
    plain, drawn = started(), started("he-init")
    for name, m in drawn.model.named_modules():
        twin = plain.model.get_submodule(name)
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            assert not torch.equal(m.weight, twin.weight)
        elif isinstance(m, nn.BatchNorm2d):
            assert torch.equal(m.weight, twin.weight)
    beside = started("he-init", "eca:k=3")
    for name, value in bits(drawn.model).items():
        assert torch.equal(value, bits(beside.model)[name]), "another layer beside it changes no weight that both have"
    assert not torch.equal(started("he-init", seed=1).model.conv1.weight, drawn.model.conv1.weight)


def test_new_layers_of_other_parts_are_drawn_too():
    run = started("se:r=2", "he-init")
    excite = run.model.layer1[0].bn2.se.excite
    assert not excite[0].bias.any()
    assert not excite[2].bias.any()


def test_weights_of_another_run_are_not_drawn_over(tmp_path):
    from convince.fit.folder import write_config, write_model

    run = prepare(make(model=MODEL, batch=8, epochs=0, augment="none", precision="fp32"), tiny_images())
    fit(run)
    write_config(tmp_path, run.settings)
    write_model(tmp_path, run)
    with pytest.raises(Mistake, match="he-init: would draw over the weights of --start"):
        started("he-init", start=str(tmp_path))


@pytest.mark.parametrize("options", [{"law": "glorot"}, {"mode": "fan"}, {"dist": "cauchy"}])
def test_refusals(options):
    name, value = next(iter(options.items()))
    with pytest.raises(Mistake, match=f"he-init: {name}='{value}': must be"):
        redraw(nn.Linear(2, 2), gen(), **options)


def test_settings_are_all_there_is():
    assert HeInit() == copy.deepcopy(HeInit())
    assert repr(HeInit(law="xavier")) == "HeInit(law='xavier', a=0.0, mode='fan_in', dist='normal')"
