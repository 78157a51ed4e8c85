"""Local complexity by hand: the hyperplane of the paper's criterion, exact counts of one layer, functions and modules, phases, a slice."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.diagnose.local_complexity import LocalComplexity, directions, local_complexity, partition_slice, phases, vertices, watched
from convince.errors import Mistake


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(weight, bias=0.0):
    """One linear unit and its ReLU, in float64."""
    net = nn.Sequential(nn.Linear(len(weight), 1), nn.ReLU()).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([weight]))
        net[0].bias.fill_(bias)
    return net


def cut(net, x, v, radius):
    """Whether the signs differ at the corners around x, with directions given by hand."""
    corners = vertices(torch.tensor([x], dtype=torch.float64), torch.tensor(v, dtype=torch.float64), radius).flatten(0, 1)
    ((found, _),) = watched(net, corners, lambda z: z.sign().amax(0) != z.sign().amin(0)).values()
    return bool(found)


def test_the_worked_unit():
    """w = (3, 4), x = (1, 0), axes: the hull is cut where 4 r > 3."""
    net = unit([3.0, 4.0])
    assert not cut(net, [1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], 0.5)
    assert cut(net, [1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], 1.0)


def test_corners_by_hand():
    found = vertices(torch.tensor([[1.0, 2.0]]), torch.eye(2), 0.5)
    assert found.tolist() == [[[1.5, 2.0], [1.0, 2.5], [0.5, 2.0], [1.0, 1.5]]]


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_directions_are_orthonormal(d, count, seed):
    if count > d:
        with pytest.raises(Mistake, match=f"at most {2 * d}"):
            directions(d, count, gen(seed))
        return
    v = directions(d, count, gen(seed))
    torch.testing.assert_close(v @ v.T, torch.eye(count, dtype=torch.float64), atol=1e-12, rtol=0)


@given(st.integers(0, 10**6), st.floats(0.05, 3))
@settings(max_examples=30, deadline=None)
def test_the_first_layer_is_counted_exactly(seed, radius):
    """A unit is cut where radius max_i |w . v_i| > |w . x + b|; a second layer has no less than none and no more than all."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 6, generator=gen(seed), dtype=torch.float64)
    found = local_complexity(net, x, radius, 8, gen=gen(1))
    v = directions(6, 4, gen(1))
    expected = (radius * (net[0].weight @ v.T).abs().amax(1) > net[0](x).abs()).sum(1)
    assert found.names == ("1", "3")
    assert found.units == (9, 5)
    assert found.cut[:, 0].tolist() == expected.tolist()
    assert bool((found.cut[:, 1] <= 5).all())
    assert found.total.tolist() == found.cut.sum(1).tolist()


def test_no_unit_is_cut_within_nothing_and_all_are_far_out():
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU()).double()
    x = torch.randn(4, 6, generator=gen(), dtype=torch.float64)
    assert int(local_complexity(net, x, 1e-9, 12, gen=gen()).total.sum()) == 0
    assert local_complexity(net, x, 1e6, 12, gen=gen()).shares.tolist() == [1]


def test_zero_is_a_sign_of_its_own():
    """A unit at 0 on one side and negative on the other is cut, as in the authors' code; one that is 0 everywhere is not."""

    class Clipped(nn.Module):
        def forward(self, x):
            return F.relu(x.clamp_max(0))

    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    assert local_complexity(Clipped(), x, 1.0, 2, gen=gen()).total.tolist() == [1, 0]
    assert local_complexity(unit([0.0]), x, 1.0, 2, gen=gen()).total.tolist() == [0, 0]


class Twice(nn.Module):
    """The same module used twice, a function, an inner module, and a function in place."""

    def __init__(self):
        super().__init__()
        self.act, self.deep = nn.ReLU(inplace=True), nn.Sequential(nn.Linear(4, 4), nn.ReLU6())

    def forward(self, x):
        y = self.act(x - 0.5) + self.act(x + 0.5)
        return F.gelu(self.deep(y)).relu_()


def test_modules_and_functions_are_seen_before_they_change_anything():
    seen = watched(Twice(), torch.full((2, 4), -0.25), lambda z: z.flatten()[0].clone())
    assert list(seen) == ["act", "act#2", "deep.1", "network", "network#2"]
    assert float(seen["act"][0]) == -0.75
    assert float(seen["act#2"][0]) == 0.25
    assert list(watched(Twice(), torch.zeros(2, 4), torch.clone, layers=("act*",))) == ["act", "act#2"]


def test_hooks_are_taken_off_also_after_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("on purpose")

    net = nn.Sequential(nn.ReLU(), Fails())
    with pytest.raises(RuntimeError, match="on purpose"):
        watched(net, torch.zeros(1, 2), torch.clone)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_any_number_of_rows_gives_the_same():
    net = builder("resnet:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=1, size=(8, 8))()
    x = torch.rand(11, 1, 8, 8, generator=gen())
    whole = local_complexity(net, x, 0.5, 50, gen=gen())
    alone = torch.cat([local_complexity(net, row[None], 0.5, 50, gen=gen()).cut for row in x])
    assert (whole.cut - alone).abs().sum() <= 2  # a sign at rounding error
    assert net.training


def test_phases_by_hand():
    """Down to 2, up to 8, down to 6: a quarter of the peak is lost; the high start is no peak."""
    found = phases([1, 10, 100, 1000], [9, 2, 8, 6])
    assert found == (10, 2, 100, 8, 0.25)
    assert phases([1, 2, 3], [5, 4, 1]) == (1, 5, 1, 5, pytest.approx(0.8))
    assert phases([1, 2], [0, 0]).drop == 0
    with pytest.raises(Mistake, match="2 steps and 1 values"):
        phases([1, 2], [1])


def test_slice_sees_one_line():
    """A unit that switches at x_1 = 0.5: one row of cells has it, the rest nothing."""
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # to the third is down
    cells = partition_slice(unit([1.0, 0.0], -0.5), corners, side=7, margin=0.0)
    assert cells.shape == (7, 7)
    assert cells.sum(1).tolist() == [0, 0, 0, 7, 0, 0, 0]


def test_the_probe_on_tables_and_on_functions_alone():
    y = torch.zeros(5, dtype=torch.int64)
    table = LocalComplexity().probe(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3, generator=gen()), y)
    assert [r.name for r in table.readings][:2] == ["cut units, images", "1: cut units, images"]
    net = builder("plain-cnn:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=1, size=(8, 8))()
    found = LocalComplexity(images=2).probe(net, torch.rand(5, 1, 8, 8, generator=gen()), y)
    assert len(found.figures) == 1  # two images span no plane


def test_refusals():
    x, y = torch.rand(4, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(Mistake, match="local-complexity: Sequential has no ReLU-like layer; choose a network"):
        LocalComplexity().probe(nn.Sequential(nn.Linear(6, 2), nn.Tanh()), x, y)
    with pytest.raises(Mistake, match="no ReLU-like layer named 7; it has 1"):
        LocalComplexity(layers=("7",)).probe(nn.Sequential(nn.Linear(6, 2), nn.ReLU()), x, y)
    with pytest.raises(Mistake, match="rows of floating-point numbers"):
        LocalComplexity().probe(nn.Sequential(nn.ReLU()), torch.ones(4, 6, dtype=torch.int64), y)
    with pytest.raises(Mistake, match="an even number of vertices"):
        LocalComplexity(vertices=7)
    with pytest.raises(Mistake, match="an even number of vertices"):
        local_complexity(nn.ReLU(), x, 0.0, gen=gen())
    with pytest.raises(Mistake, match="side of at least 2"):
        partition_slice(nn.ReLU(), x[:3], side=1)
