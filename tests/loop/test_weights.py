"""Initial weights go by parameter name, under the network's own law."""

import torch
from torch import nn

from convince.fit.weights import build_by_name, edit_by_name, shared


def small(extra=False):
    net = nn.Sequential()
    net.add_module("a", nn.Conv2d(1, 4, 3))
    if extra:
        net.add_module("new", nn.Conv2d(4, 4, 1))
    net.add_module("b", nn.Linear(4, 2))
    return net


def test_a_layer_in_between_moves_no_other_weight():
    plain, more = build_by_name(small, 0), build_by_name(lambda: small(True), 0)
    for name in ("a.weight", "a.bias", "b.weight", "b.bias"):
        assert torch.equal(plain.get_parameter(name), more.get_parameter(name)), name
    assert 0.5 < shared(plain, more) < 1


def test_seeds_differ_and_repeat():
    a, again, b = build_by_name(small, 0), build_by_name(small, 0), build_by_name(small, 1)
    assert torch.equal(a.a.weight, again.a.weight)
    assert not torch.equal(a.a.weight, b.a.weight)


def test_the_law_of_initialisation_is_kept():
    def build():
        net = nn.Linear(2000, 50)
        nn.init.kaiming_normal_(net.weight)
        return net

    weight = build_by_name(build, 0).weight
    assert abs(float(weight.detach().std()) - (2 / 2000) ** 0.5) < 5e-4


def test_truncated_normals_and_fresh_draws_are_named_too():
    class Net(nn.Module):
        def __init__(self, more=False):
            super().__init__()
            if more:
                self.first = nn.Parameter(torch.randn(7))
            self.token = nn.Parameter(torch.zeros(5))
            nn.init.trunc_normal_(self.token, std=0.02)
            self.other = nn.Parameter(torch.randn(3))

    a, b = build_by_name(Net, 0), build_by_name(lambda: Net(True), 0)
    assert torch.equal(a.token, b.token)
    assert torch.equal(a.other, b.other)
    assert float(a.token.detach().abs().max()) > 0


def test_global_state_is_untouched():
    state = torch.get_rng_state()
    net = build_by_name(small, 0)
    edit_by_name(net, lambda m: m.add_module("c", nn.Linear(2, 2)), 0)
    assert torch.equal(state, torch.get_rng_state())


def test_an_edit_gives_the_weights_of_a_build_with_the_same_names():
    net = build_by_name(small, 0)
    edit_by_name(net, lambda m: m.add_module("new", nn.Conv2d(4, 4, 1)), 0)
    built = build_by_name(lambda: small(True), 0)
    assert torch.equal(net.new.weight, built.new.weight)
