"""PatternNet by hand: purity and frequency, firing, coincidence at one place, planted patterns found, places led back, halves, the probe."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince.errors import Mistake
from convince.explain.patternnet import (
    PatternNet,
    Patterns,
    centres,
    evidence,
    firing,
    frequency,
    halves,
    last_maps,
    linear_accuracy,
    mine_patterns,
    pattern_loss,
    purity,
    quantiles,
    strongest,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_purity_and_frequency_by_hand():
    """Of the 10 strongest firings 9 come from the class: 0.9; it fires on 30 of its 100 images: 0.3."""
    score = torch.arange(200, 0, -1).float()
    own = torch.zeros(200, dtype=torch.bool)
    own[:10] = True
    own[4] = False
    own[20:111] = True
    assert int(own.sum()) == 100
    assert purity(score, own) == pytest.approx(0.9)
    assert strongest(score, 3).tolist() == [0, 1, 2]
    there = torch.zeros(200, dtype=torch.bool)
    there[own.nonzero()[:30, 0]] = True
    assert frequency(there, own) == pytest.approx(0.3)


def test_purity_asks_for_no_more_images_than_the_class_has():
    own = torch.tensor([True, True, False, False])
    assert purity(torch.tensor([4.0, 3.0, 2.0, 1.0]), own) == 1
    assert purity(torch.tensor([4.0, 1.0, 2.0, 3.0]), own) == 0.5


def test_quantiles_and_firing():
    maps = torch.stack([torch.arange(100.0).view(10, 10), torch.zeros(10, 10)])[None]
    q = quantiles(maps, 0.05)
    assert q.tolist() == [95.0, 1.0]
    a = firing(maps, q)[0, 0].flatten()
    assert int((a >= 0.5).sum()) == 5
    assert bool((a.diff() > 0).all())
    sparse = torch.zeros(1, 1, 10, 10)
    sparse[0, 0, 0, 0] = 3.0
    assert quantiles(sparse).tolist() == [3.0]


def hand(threshold=0.5):
    """One pattern of the filters 0 and 2, weights 1/4 and 3/4, of three filters."""
    return Patterns(torch.tensor([[0, 2]]), torch.tensor([[0.25, 0.75]]), torch.tensor([threshold]), torch.tensor([1]), torch.ones(3))


def test_a_pattern_fires_where_its_filters_meet():
    maps = torch.zeros(2, 3, 2, 2)
    maps[0, 0, 0, 1], maps[0, 2, 0, 1] = 9.0, 9.0  # together
    maps[1, 0, 0, 0], maps[1, 2, 1, 1] = 9.0, 9.0  # apart
    maps[:, 1] = 100.0  # a filter that is none of its
    score, place = hand().fire(maps)
    assert score[:, 0].tolist() == pytest.approx([0.9, 0.75 * 0.9])
    assert place[:, 0].tolist() == [1, 3]
    assert hand(0.9).indicators(score)[:, 0].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(2.25))])
    box = hand().localise(maps[:1], 0, (8, 8))
    assert 4 <= float(box[0, 0]) < float(box[0, 2]) <= 8
    assert 0 <= float(box[0, 1]) < float(box[0, 3]) <= 5


def test_places_are_led_back():
    assert centres(torch.tensor([0, 5]), (3, 4), (12, 8)).tolist() == [[2.0, 1.0], [6.0, 3.0]]


@quick(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))
def test_the_middle_of_a_place_lies_in_it(h, w, factor):
    at = centres(torch.arange(h * w), (h, w), (h * factor, w * factor))
    assert torch.equal((at // factor)[:, 0] * w + (at // factor)[:, 1], torch.arange(h * w).float())


def test_the_loss_by_hand():
    """Two images of class 0 and one of class 1; a pattern of each class."""
    z = torch.tensor([[2.0, 0.0], [0.0, 0.0], [-1.0, 3.0]])
    own = torch.tensor([[True, False], [True, False], [False, True]])

    def log(value):
        return math.log(1 / (1 + math.exp(-value)))

    first = -(log(2.0) + log(0.0)) / 2 - log(1.0)  # log(1 - sigmoid(z)) = log sigmoid(-z)
    second = -log(3.0) - (log(0.0) + log(0.0)) / 2
    assert float(pattern_loss(z, own)) == pytest.approx((first + second) / 2, rel=1e-5)


def test_evidence_is_the_mean_indicator_of_a_classs_patterns():
    assert evidence(torch.tensor([[0.8, 0.4, 0.1]]), torch.tensor([0, 0, 2]), 3).tolist() == [[pytest.approx(0.6), 0.0, pytest.approx(0.1)]]


def planted(n=120, seed=0):
    """Class 0: filters 0 and 1 at one place; class 1: 2 and 3 at one place. In class 1 the filters 0 and 1 fire as often, but apart; and the reverse."""
    g = gen(seed)
    y = torch.arange(n) % 2
    maps = torch.rand(n, 8, 4, 4, generator=g) * 0.3
    where = torch.rand(n, 16, generator=g).argsort(1)[:, :3]
    for i in range(n):
        mine, other = (0, 2) if y[i] == 0 else (2, 0)
        for channel, place in ((mine, where[i, 0]), (mine + 1, where[i, 0]), (other, where[i, 1]), (other + 1, where[i, 2])):
            maps[i, channel].view(-1)[place] = 3 + float(torch.rand((), generator=g))
    return maps, y, where[:, 0]


def test_planted_patterns_are_found_by_where_filters_meet():
    """No filter alone tells these classes apart: each fires once in every image."""
    maps, y, _ = planted()
    found = mine_patterns(maps, y, 2, 1, filters=2, gen=gen())
    assert [sorted(row) for row in found.channels.tolist()] == [[0, 1], [2, 3]]
    test, test_y, test_where = planted(seed=1)
    score, place = found.fire(test)
    for p in (0, 1):
        own = test_y == p
        assert purity(score[:, p], own) == 1
        assert bool((place[own, p] == test_where[own]).all())
    indicators = found.indicators(score)
    assert linear_accuracy(found.indicators(found.fire(maps)[0]), y, indicators, test_y) >= 0.95
    again = mine_patterns(maps, y, 2, 1, filters=2, gen=gen())
    assert torch.equal(again.weights, found.weights)


def test_halves_share_no_row_and_every_class():
    y = torch.tensor([0, 1, 0, 1, 0, 2])
    mined, measured = halves(y)
    assert mined.tolist() == [0, 1, 4]
    assert measured.tolist() == [2, 3]


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)).eval()


def test_maps_are_those_of_the_layer():
    net, x = small(), torch.rand(70, 1, 6, 6, generator=gen())
    maps, layer = last_maps(net, x)
    with torch.no_grad():
        assert torch.allclose(maps, net[1](net[0](x)))
    assert layer.plane == (6, 6)
    assert not net[1]._forward_hooks


def test_the_probe_tells_what_it_found():
    x, y = torch.rand(40, 1, 6, 6, generator=gen()), torch.arange(40) % 2
    x[y == 1, :, :3] += 1
    found = PatternNet(patterns=2).probe(small(), x, y)
    values = {r.name: r.value for r in found.readings}
    assert all(0 <= values[name] <= 1 for name in ("purity of patterns", "frequency of patterns", "accuracy of the patterns alone"))
    assert set(found.figures[0].values) == {"class 0", "class 1"}
    assert len(found.figures[1].values) == 2


def test_refusals():
    x = torch.rand(4, 1, 6, 6, generator=gen())
    with pytest.raises(Mistake, match="patternnet: 1 class among"):
        PatternNet().probe(small(), x, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(Mistake, match="no class has two"):
        PatternNet().probe(small(), x[:2], torch.tensor([0, 1]))
    with pytest.raises(Mistake, match="patternnet: filters=0"):
        PatternNet(filters=0)
    with pytest.raises(Mistake, match="patternnet finds patterns in images"):
        PatternNet().probe(nn.Linear(3, 2), torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))
