"""Expanding CNN by hand: the paper's counts, growths that leave the answers alone, where new channels go."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.backbones.expanding_cnn import ExpandingCnn, grow, inserted, parameters, settle, widened
from convince.errors import Mistake

GROWTHS = list(itertools.product(("layer", "channels"), range(3)))


def trained(seed=0, **options):
    """A network whose weights and statistics are those of a few steps of training, and 64 images."""
    torch.manual_seed(seed)
    model = ExpandingCnn(**{"num_classes": 5, "layers": (1, 2, 1), "widths": (4, 6, 5), "img_size": (16, 16), **options})
    x, y = torch.randn(64, 3, 16, 16), torch.arange(64) % 5
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        steps.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        steps.step()
    return model.eval(), x


def test_the_start_and_its_layers_have_the_papers_counts_and_a_slope_each():
    counts = {layers: sum(p.numel() for p in ExpandingCnn(layers=layers).parameters()) for layers in ((1, 1, 1), (1, 2, 1), (1, 2, 2))}
    assert [counts[layers] - sum(layers) for layers in counts] == [9024, 11360, 13696]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3), st.integers(2, 7), st.integers(1, 4), st.integers(8, 20))
def test_parameters_are_counted(shape, k, c, side):
    layers, widths = zip(*shape, strict=True)
    with torch.device("meta"):
        model = ExpandingCnn(k, c, layers, widths, hidden=6, img_size=(side, side + 1))
    assert parameters(layers, widths, k, c, (side, side + 1), 6) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("kind", "block"), GROWTHS)
def test_a_growth_leaves_the_answers_alone(kind, block):
    model, x = trained()
    with torch.no_grad():
        before = model(x)
        for noise, most in ((0.0, 1e-5), (1e-4, 1e-2)):
            grown = copy.deepcopy(model)
            grow(grown, kind, block, channels=3, noise=noise, seed=1)
            settle(grown, kind, block, 3, x)
            assert (grown(x) - before).norm() / before.norm() < most
    layers, widths = [1, 2, 1], [4, 6, 5]
    if kind == "layer":
        layers[block] += 1
    else:
        widths[block] += 3
    assert (grown.layers, grown.widths) == (tuple(layers), tuple(widths))
    same = ExpandingCnn(5, 3, layers, widths, img_size=(16, 16))
    assert [(n, t.shape) for n, t in same.state_dict().items()] == [(n, t.shape) for n, t in grown.state_dict().items()]
    assert same.feature_info == grown.feature_info
    grown.train()(x).sum().backward()
    assert all(p.grad is not None for p in grown.parameters())


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(GROWTHS), min_size=2, max_size=5))
def test_many_growths_one_after_the_other(growths):
    model, x = trained()
    with torch.no_grad():
        before = model(x)
        for i, (kind, block) in enumerate(growths):
            grow(model, kind, block, channels=2, noise=0.0, seed=i)
            settle(model, kind, block, 2, x)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_a_new_layer_gives_its_input_back_in_training_too():
    model, x = trained(drop=0.0)
    grow(model, "layer", 0, noise=0.0)
    settle(model, "layer", 0, 0, x)
    with torch.no_grad():
        y = model.units(0)[0].eval()(x)
        torch.testing.assert_close(model.units(0)[1].train()(y), y, rtol=1e-4, atol=1e-5)


def test_the_skips_channels_keep_their_weights_when_the_last_block_widens():
    model, _ = trained()
    old = model.squeeze.weight.clone()
    assert widened(model, 2, 2)[-1] == ("squeeze.weight", 1, 5)
    grow(model, "channels", 2, channels=2)
    assert torch.equal(model.squeeze.weight[:, :5], old[:, :5])
    assert torch.equal(model.squeeze.weight[:, 7:], old[:, 5:])
    one, _ = trained(layers=(1,), widths=(4,))
    assert widened(one, 0, 2)[-2:] == [("squeeze.weight", 1, 4), ("squeeze.weight", 1, 10)], "one block is both the first and the last"


def test_new_channels_are_small_and_do_learn():
    model, x = trained()
    grow(model, "channels", 1, channels=2, noise=1e-4, seed=3)
    settle(model, "channels", 1, 2, x)
    new = model.units(1)[0].conv.weight[6:]
    assert float(new.detach().std()) == pytest.approx(1e-4, rel=0.2)
    model(x).square().sum().backward()
    assert float(model.layer3[0].conv.weight.grad[:, 6:].abs().max()) > 1e-3


def test_inserted_by_hand():
    t = torch.arange(6.0).view(2, 3)
    assert inserted(t, 1, 1, 2, 9.0).tolist() == [[0, 9, 9, 1, 2], [3, 9, 9, 4, 5]]
    assert inserted(t, 0, 2, 1, torch.ones(1, 3)).tolist() == [[0, 1, 2], [3, 4, 5], [1, 1, 1]]


def test_a_seed_is_one_growth():
    grown = []
    for seed in (1, 1, 2):
        model, _ = trained()
        grow(model, "layer", 0, seed=seed)
        grown.append(model.layer1[1].conv.weight)
    assert torch.equal(grown[0], grown[1])
    assert not torch.equal(grown[0], grown[2])


def test_wrong_settings_are_refused():
    for options, words in (
        ({"layers": (1, 0), "widths": (4, 4)}, "one number of each a block"),
        ({"drop": 1.0}, "share of maps"),
        ({"img_size": (4, 4)}, "halve the sides"),
    ):
        with pytest.raises(Mistake, match=words):
            ExpandingCnn(**options)
    with pytest.raises(Mistake, match="expanding-cnn: maps of"):
        ExpandingCnn(img_size=(16, 16))(torch.zeros(2, 3, 24, 24))
