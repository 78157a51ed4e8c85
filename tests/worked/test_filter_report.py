"""Filter report by hand: two filters whose every number can be reckoned, degenerate layers, names."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.diagnose.filter_report import FilterReport, filter_report
from convince.errors import Mistake
from convince.layers.filter_design import filters


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_worked_numbers():
    """(3, 4) and (4, 3): lengths 5, cosine 24/25, squared singular values 49 and 1, steps of 1 against a mean tap of 3.5."""
    found = filter_report(torch.tensor([[[[3.0, 4.0]]], [[[4.0, 3.0]]]]))
    assert found.norm == 5
    assert found.cosine == pytest.approx(0.96)
    assert found.twins == 1
    assert found.dead == 0
    assert found.first == pytest.approx(0.98)
    assert found.rank == pytest.approx(math.exp(-0.98 * math.log(0.98) - 0.02 * math.log(0.02)))
    assert found.tv == pytest.approx(1 / 3.5)


def test_a_dead_filter_is_counted_and_otherwise_left_out():
    weight = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 1.0]]], [[[0.0, 0.001]]]])
    found = filter_report(weight)
    assert found.dead == pytest.approx(1 / 3)
    assert (found.cosine, found.twins) == (0, 0)
    assert found.rank == pytest.approx(2)


def test_nothing_alive_gives_finite_numbers():
    found = filter_report(torch.zeros(3, 2, 3, 3))
    assert found == (0, 0, 0, 1, 0, 0, 0)
    assert filter_report(torch.ones(1, 1, 1, 1)) == (1, 0, 0, 0, 1, 1, 0)


def test_schemes_as_the_survey_sorts_them():
    shape = (16, 1, 5, 5)
    assert filter_report(filters("constant", shape, gen())).cosine == pytest.approx(1)
    assert filter_report(filters("kaiming", shape, gen())).cosine > 0.1
    assert filter_report(filters("orthogonal", shape, gen())).cosine < 1e-6
    assert filter_report(filters("gabor", shape, gen())).tv < filter_report(filters("kaiming", shape, gen())).tv


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_bounds_and_scale(m, c, k, factor):
    weight = torch.randn(m, c, k, k, generator=gen(m), dtype=torch.float64)
    found, scaled = filter_report(weight), filter_report(factor * weight)
    assert 0 <= found.cosine <= 1
    assert 1 <= found.rank <= min(m, c * k * k) + 1e-9
    assert scaled.norm == pytest.approx(factor * found.norm)
    assert scaled[1:] == pytest.approx(found[1:])


def test_every_convolution_is_read_or_those_named():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1))
    x, y = torch.zeros(1, 1, 5, 5), torch.zeros(1, dtype=torch.int64)
    assert len(FilterReport().probe(net, x, y).readings) == 14
    assert {r.name.split(":")[0] for r in FilterReport(layers=("2",)).probe(net, x, y).readings} == {"2"}
    with pytest.raises(Mistake, match="filter-report: Sequential has no convolution named 9"):
        FilterReport(layers=("9",)).probe(net, x, y)
