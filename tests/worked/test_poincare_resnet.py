"""PoincareResnet by hand: the skip along channels, depth and sizes, full precision under autocast, the head."""

import pytest
import torch
from torch import nn

from convince.backbones import builder
from convince.backbones.poincare_resnet import Block, PoincareResnet, skip
from convince.errors import Mistake
from convince.layers.poincare import PoincareBall, PoincareConv2d, PoincareLinear, expmap0, frechet_mean, logmap0, midpoint, mobius_add


def test_the_skip_adds_channel_vectors_position_by_position():
    f, x = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    got = skip(f, x, 0.1)
    one = logmap0(mobius_add(expmap0(f[1, :, 2, 4], 0.1), expmap0(x[1, :, 2, 4], 0.1), 0.1), 0.1)
    torch.testing.assert_close(got[1, :, 2, 4], one)
    torch.testing.assert_close(skip(f, torch.zeros_like(x), 0.1), f)
    assert not torch.allclose(skip(f, x, 0.1), skip(x, f, 0.1)), "the sum does not commute: f comes first"
    torch.testing.assert_close(skip(f, x, 1e-9), f + x)


@pytest.mark.parametrize(("depth", "blocks"), [(8, 1), (20, 3), (32, 5)])
def test_depth_counts_the_weighted_layers(depth, blocks):
    with torch.device("meta"):
        model = PoincareResnet(depth=depth)
    assert [len(getattr(model, f"layer{i}")) for i in (1, 2, 3)] == [blocks] * 3
    layers = [m for m in model.modules() if isinstance(m, (PoincareConv2d, PoincareLinear))]
    assert len(layers) - 2 == depth, "all but the two 1x1 convolutions of the skips"


def test_the_size_of_a_network():
    """Weights of a plain net of the same shape and a bias each; one vector and one number a norm, against the two vectors of a flat one."""
    with torch.device("meta"):
        model = builder("poincare-resnet20", num_classes=10, in_chans=3, size=(32, 32))()
    convolutions = 3 * 8 * 9 + 6 * 8 * 8 * 9 + 8 * 16 * 9 + 5 * 16 * 16 * 9 + 16 * 32 * 9 + 5 * 32 * 32 * 9 + 8 * 16 + 16 * 32
    vectors = 8 * 7 + 16 * 6 + 32 * 6
    assert sum(p.numel() for p in model.parameters()) == convolutions + vectors + 16 + 32 + vectors + 19 + 32 * 10 + 10
    assert model.forward_features(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 32, 8, 8)


def test_a_block_whose_branch_is_nothing_is_the_input_rectified():
    block = Block(4, 4, 1, PoincareBall(), "identity", "midpoint").eval()
    with torch.no_grad():
        block.bn2.gain.zero_()
        x = torch.randn(2, 4, 3, 3)
        torch.testing.assert_close(block(x), x.relu())


def test_computes_in_full_precision_under_autocast():
    model = PoincareResnet(num_classes=3, in_chans=1, depth=8, channels=(4, 4, 8)).eval()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        plain = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.forward_features(x).dtype == torch.float32
            assert torch.equal(model(x), plain)


def test_the_older_start_and_the_slow_mean_are_options():
    model = PoincareResnet(depth=8, init="normal", mean="frechet", learn_c=True)
    weight = model.layer2[0].conv2.weight
    assert float(weight.detach().std()) == pytest.approx((2 * 16 * 9 * 16) ** -0.5, rel=0.05)
    assert model.bn.mean is frechet_mean
    assert PoincareResnet(depth=8).bn.mean is midpoint
    assert sum(name.endswith("ball.raw") for name, _ in model.named_parameters()) == 1, "one ball for all layers"


def test_the_head_is_a_poincare_layer_and_can_be_reset():
    model = PoincareResnet(num_classes=3, in_chans=1, depth=8).double().eval()
    assert isinstance(model.get_classifier(), PoincareLinear)
    model.reset_classifier(7)
    assert model(torch.randn(2, 1, 8, 8, dtype=torch.float64)).shape == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(torch.randn(2, 1, 8, 8, dtype=torch.float64)).shape == (2, 32)


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="a depth of 8, 14, 20"):
        PoincareResnet(depth=18)
    with pytest.raises(Mistake, match="mean='median' must be"):
        PoincareResnet(depth=8, mean="median")
    with pytest.raises(Mistake, match="init='he' must be"):
        PoincareResnet(depth=8, init="he")
