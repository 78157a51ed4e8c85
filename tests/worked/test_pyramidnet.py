"""PyramidNet by hand: the widths of Eq. 2 and 3, zero-padded shortcuts, the order of a unit, published counts, cut units."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.pyramidnet import PyramidNet, Unit, lesion, shortcut, widths
from convince.errors import Mistake


def test_worked_widths():
    found = widths(54, 48)
    assert found[:10] == [16, 17, 18, 19, 20, 21, 22, 23, 24, 24]
    assert found[-2:] == [63, 64]
    assert widths(3, 32) == [26, 37, 48]
    assert widths(4, 8, base=8, rule="multiplicative") == [13, 22, 38, 64]  # 8 * 8^(1/4), ...


@given(st.integers(1, 120), st.integers(1, 300), st.integers(1, 64))
def test_widths_never_fall_and_end_at_base_plus_alpha(n, alpha, base):
    for rounding in ("floor", "nearest"):
        found = widths(n, alpha, base, rounding=rounding)
        assert found == sorted(found)
        assert found[-1] == base + alpha
        assert all(abs(w - (base + alpha * k / n)) < 1 for k, w in enumerate(found, 1))


def test_shortcut_keeps_the_first_channels_and_adds_zeros():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(shortcut(x, 5, 1)[:, :3], x)
    assert not shortcut(x, 5, 1)[:, 3:].any()
    halved = shortcut(x, 5, 2)
    assert halved.shape == (2, 5, 2, 3)
    assert halved[0, 1, 1, 2] == pytest.approx(float(x[0, 1, 2:, 4:].mean()), abs=1e-6)
    assert shortcut(torch.ones(1, 1, 3, 3), 1, 2)[0, 0, 1, 1] == 1, "an odd last row is taken as it is"


@pytest.mark.parametrize(("bottleneck", "order"), [(False, "bn conv bn relu conv bn"), (True, "bn conv bn relu conv bn relu conv bn")])
def test_a_unit_has_no_relu_at_its_entry_and_a_norm_at_its_end(bottleneck, order):
    names = {nn.BatchNorm2d: "bn", nn.Conv2d: "conv", nn.ReLU: "relu"}
    unit = Unit(4, 3, 2, bottleneck)
    assert " ".join(names[type(m)] for m in unit.branch) == order
    assert unit.channels == (12 if bottleneck else 3)
    unit = Unit(4, 5, 1, bottleneck).eval()
    with torch.no_grad():
        unit.branch[-1].weight.zero_()
        x = -torch.rand(1, 4, 2, 2)
        assert torch.equal(unit(x)[:, :4], x), "negative values pass the sum: nothing stands after it"


def test_the_authors_port_rounds():
    """1,772,706 parameters are what the PyTorch port of the authors has for 110 layers and alpha 48."""
    with torch.device("meta"):
        model = PyramidNet(rounding="nearest")
    assert sum(p.numel() for p in model.parameters()) == 1_772_706


def test_the_shape_of_the_imagenet_network():
    with torch.device("meta"):
        model = builder("pyramidnet200-a300", num_classes=1000, in_chans=3, size=(224, 224))()
        assert model.forward_features(torch.empty(1, 3, 224, 224)).shape == (1, 4 * 364, 7, 7)


def test_cutting_nothing_changes_nothing_and_cutting_a_unit_leaves_its_shortcut():
    model = PyramidNet(num_classes=3, in_chans=1, blocks=(2, 2), alpha=6, base=4).eval()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        whole = model(x)
        kept = lesion(model, "layer2.0")
        y = model.layer1(model.stem(model.bn1(model.conv1(x))))
        torch.testing.assert_close(model.layer2[0](y), shortcut(y, model.layer2[0].channels, 2))
        assert not torch.equal(model(x), whole)
        model.layer2[0].branch = kept
        assert torch.equal(model(x), whole)
    with pytest.raises(Mistake, match=r"no unit 'layer9.0'; it has layer1.0, layer1.1"):
        lesion(model, "layer9.0")


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="every stage needs a block"):
        PyramidNet(blocks=(1, 0))
