"""Ways to compute depthwise convolutions: the same mathematics as the library's, chosen by measuring, kept with the run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.errors import Mistake
from convince.fit import kernels
from convince.fit.kernels import Depthwise, Way, choose, install, kind_of, kinds_in, measure, way
from convince.fit.settings import from_yaml
from convince.fit.settings import settings as make

OWN = ("gradients-as-convolutions", "library")


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.sampled_from((1, 2, 3, 5)), st.sampled_from((1, 3, 4))),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(0, 4), st.integers(0, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
)
def test_gradients_are_the_librarys(shape, size, stride, padding, dilation):
    if any(side + 2 * p < d * (k - 1) + 1 for side, p, d, k in zip(shape[2:], padding, dilation, size, strict=True)):
        return
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=gen, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[1], 1, *size, generator=gen, dtype=torch.float64, requires_grad=True)
    theirs = F.conv2d(x, weight, None, stride, padding, dilation, shape[1])
    ours = Depthwise.apply(x, weight, stride, padding, dilation)
    assert torch.equal(ours, theirs)
    grad = torch.randn(theirs.shape, generator=gen, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_right():
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(a, b):
        return Depthwise.apply(a, b, (1, 1), (1, 1), (1, 1))

    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))


def test_gradients_of_single_rows_can_be_asked_for():
    """Per-example gradients by vmap, as an empirical Fisher needs them."""
    conv = nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False).double()
    install(conv_in := nn.Sequential(conv), {"depthwise": OWN})
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)

    def loss(weights, row):
        return torch.func.functional_call(conv_in, weights, row[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(conv_in.named_parameters()), x)["0.weight"]
    one = torch.autograd.grad(F.conv2d(x[1:2], conv.weight, padding=1, groups=2).square().sum(), conv.weight)[0]
    torch.testing.assert_close(each[1], one)


@pytest.mark.parametrize("text", ["library", "fp32", "channels-first", "fp32+channels-first+gradients-as-convolutions"])
def test_every_way_gives_the_librarys_numbers(text):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.Conv2d(4, 8, 3, groups=2))
    plain = plain.to(memory_format=torch.channels_last)
    other = copy.deepcopy(plain)
    ours = text.replace("+gradients-as-convolutions", "")
    assert install(other, {kind: (text, ours) for kind in ("depthwise, 5 and more", "depthwise, strided")} | {"grouped": (ours, ours)}) == 3
    x = torch.randn(3, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    for bf16, close in ((False, 1e-5), (True, 3e-2)):
        grads = []
        for net in (plain, other):
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = net(x).float()
            y.square().mean().backward()
            grads.append([y.detach(), *(p.grad for p in net.parameters())])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=close, atol=close)


def test_a_copy_runs_by_its_own_weights():
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, groups=2))
    install(net, {"depthwise": OWN})
    twin = copy.deepcopy(net)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    x = torch.ones(1, 2, 4, 4)
    assert not net(x).any()
    assert twin(x).any()
    assert list(net.state_dict()) == list(twin.state_dict()) == ["0.weight", "0.bias"]


def test_kinds():
    def kind(k, stride=1, dilation=1, groups=8, c=8):
        return kind_of(nn.Conv2d(8, c, k, stride, 0, dilation, groups))

    assert [kind(3), kind(4), kind(5), kind(9), kind(10), kind(13)] == ["depthwise"] * 2 + ["depthwise, 5 and more"] * 2 + ["depthwise, 10 and more"] * 2
    assert (kind(7, stride=2), kind(3, dilation=2), kind(3, groups=4), kind(3, c=16)) == ("depthwise, strided", "depthwise, dilated", "grouped", "grouped")
    assert (kind(3, groups=1), kind(1)) == (None, None)
    assert kinds_in(nn.Sequential(nn.Conv2d(4, 4, 11, groups=4), nn.Conv2d(4, 4, 3))) == ["depthwise, 10 and more"]


def test_ways_are_written_and_read():
    for fp32 in (False, True):
        for first in (False, True):
            for own in (False, True):
                assert way(str(Way(fp32, first, own))) == Way(fp32, first, own)
    with pytest.raises(Mistake, match="'fast' is no way to compute a convolution; it is 'library', or some of fp32"):
        way("fast")


def test_a_choice_is_measured_once_and_the_fastest(monkeypatch):
    calls = []

    def fake(kind, precision, channels_last, seconds=0.0):
        calls.append(kind)
        slow = {Way(): 10.0, Way(own=True): 1.0, Way(fp32=True): 9.0}
        return {"train": slow if kind == "depthwise" else {Way(): 1.0, Way(fp32=True): 0.9}, "infer": {Way(): 1.0, Way(fp32=True): 2.0}}

    monkeypatch.setattr(kernels, "measure", fake)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 977)  # a machine of its own in the cache
    assert choose("bf16", True, ["depthwise", "grouped"]) == {"depthwise": OWN}, "a gain within the noise chooses nothing"
    assert choose("bf16", True, ["depthwise"]) == {"depthwise": OWN}
    assert calls == ["depthwise", "grouped"]
    assert choose("fp64", True) == {}


def test_measuring_tries_every_way_that_makes_sense():
    found = measure("depthwise", "bf16", True, seconds=0.0)
    assert len(found["train"]) == 8
    assert len(found["infer"]) == 4
    assert set(measure("grouped", "fp32", False, seconds=0.0)["train"]) == {Way()}
    assert all(ms > 0 for times in found.values() for ms in times.values())


def test_ways_stand_in_the_config(tmp_path):
    asked = make(kernels={"depthwise": OWN})
    (tmp_path / "config.yaml").write_text(asked.to_yaml())
    assert from_yaml(tmp_path / "config.yaml").kernels == {"depthwise": OWN}
