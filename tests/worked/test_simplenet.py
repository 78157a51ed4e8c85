"""SimpleNet by hand: the list of layers, where dropout stands, strides, the design rules on nets that keep and break them."""

import pytest
import torch
from torch import nn

from convince.backbones import builder
from convince.backbones.simplenet import SimpleNet, design_lint, parse
from convince.errors import Mistake

EARLY = "64-P-32-P-32-32-32-32-64-64-64-P-128-256k1-64k1-P-64"  # the first two pools after the first two convs


def meta(name, **options):
    with torch.device("meta"):
        return builder(name, num_classes=10, in_chans=3, size=(32, 32))() if not options else SimpleNet(**options)


def test_worked_list():
    assert parse("64-128-P-256k1") == [[(64, 3), (128, 3)], [(256, 1)]]


@pytest.mark.parametrize("name", ["simplenet-cifar-5m", "simplenet-cifar-310k", "simplenet-cifar-460k", "simplenet-5m-m2", "simplenet-9m-m1"])
def test_thirteen_convs(name):
    assert sum(isinstance(m, nn.Conv2d) for m in meta(name).modules()) == 13


def test_32_pixels_become_2_by_four_pools():
    net, sides = builder("simplenet-mini", num_classes=10, in_chans=3, size=(32, 32))().eval(), []
    assert sum(isinstance(m, nn.MaxPool2d) for m in net.modules()) == 4
    for group in net.groups:
        group.register_forward_hook(lambda _m, _i, out: sides.append(out.shape[-1]))
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert sides == [32, 16, 8, 4, 2]


def test_dropout_stands_after_units_and_pools_but_not_between_a_unit_and_its_pool():
    net = meta("", layers="4-6-P-8-8", dropout=0.2)
    kinds = [type(m).__name__ for m in net.groups.modules() if not isinstance(m, (nn.Sequential, nn.ModuleList))]
    unit = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds == [*unit, "Dropout2d", *unit, "MaxPool2d", "Dropout2d", *unit, "Dropout2d", *unit]
    assert net.dropout.p == 0.2


def test_scale_rounds_widths_and_halve_strides_convs():
    net = meta("", layers="5-7-P-9k1", scale=0.5, halve=(0, 2))
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [2, 4, 4]
    assert [m.stride[0] for m in convs] == [2, 1, 2]
    assert [m.padding[0] for m in convs] == [1, 1, 0]
    assert [row["reduction"] for row in net.feature_info] == [2, 8]


def test_the_head_reads_the_largest_value_of_each_map():
    net = SimpleNet(num_classes=2, in_chans=1, layers="4-6").eval()
    x = torch.randn(2, 1, 5, 7)
    with torch.no_grad():
        features = net.forward_features(x)
        assert torch.equal(net.forward_head(features, pre_logits=True), features.flatten(2).max(2).values)


def test_weights_are_xavier_uniform_with_the_gain_of_relu():
    """Bound sqrt(2) * sqrt(6 / (fan in + fan out)): 0.1021 for 3x3 from 64 to 64."""
    weight = SimpleNet(layers="64-64").groups[0][1][0].weight
    bound = 2**0.5 * (6 / (64 * 9 + 64 * 9)) ** 0.5
    assert bound == pytest.approx(0.1021, abs=1e-4)
    assert 0.99 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["simplenet-cifar-5m", "simplenet-cifar-310k", "simplenet-cifar-460k", "simplenet-mini"])
def test_simplenet_keeps_its_own_rules(name):
    found = design_lint(meta(name))
    assert len(found) == 7
    assert all(row.kept for row in found)


def broken(net):
    """Rules that a net breaks, by their first words, and where."""
    return {row.rule.split(":")[0]: (row.value, row.layer) for row in design_lint(net) if not row.kept}


def test_early_pooling_is_flagged():
    assert broken(meta("", layers=EARLY)) == {"late pooling": (round(1 / 13, 4), "groups.1.0")}
    assert broken(meta("simplenet-5m-m2")) == {"late pooling": (0.0, "groups.0.0.0")}, "strides pool as early as pools do"


@pytest.mark.parametrize(
    ("layers", "rule", "value"),
    [
        ("8-8-24-24", "gradual growth", 3.0),
        ("8-8-P-8-P-8-P-8", "homogeneous groups", 1.25),
        ("8-8k1-8-8", "local correlation", 1.0),
        ("32-8-32-32", "no early bottleneck", 0.25),
    ],
)
def test_each_rule_can_be_broken(layers, rule, value):
    found = {row.rule.split(":")[0]: row for row in design_lint(meta("", layers=layers))}
    assert (found[rule].kept, found[rule].value) == (False, value)


def test_a_layer_with_most_of_the_weights_and_a_mean_pool_are_flagged():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.AvgPool2d(2), nn.Conv2d(8, 16, 5), nn.Conv2d(16, 16, 1))
    assert broken(net) == {"balanced capacity": (round(3200 / (576 + 576 + 3200 + 256), 4), "3"), "max-pooling": (1.0, "2")}


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match=r"simplenet: layers='64-P-P-64': 'P' stands where a layer should"):
        parse("64-P-P-64")
    with pytest.raises(Mistake, match="'64k2' stands where a layer should"):
        parse("64k2-64")
    with pytest.raises(Mistake, match="ends in a pool"):
        parse("64-P")
    with pytest.raises(Mistake, match="dropout is a probability"):
        SimpleNet(dropout=1.0)
    with pytest.raises(Mistake, match="number the 2 convolutions from 0"):
        SimpleNet(layers="4-4", halve=(2,))
    with pytest.raises(Mistake, match="design_lint: the network has 0 convolutions"):
        design_lint(nn.Linear(2, 2))
