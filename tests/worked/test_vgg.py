"""VGG by hand: the configurations, torchvision's twins by copied weights, normalisation of responses, crops, the start from a shallow net."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from convince.backbones import builder
from convince.backbones.vgg import KERNELS, crops, dense_eval, init_from_shallow, multi_crop_eval, multi_scale_eval, stages, vgg
from convince.errors import Mistake


def small(cfg="A", size=(32, 32), **options):
    return vgg(3, 1, size, cfg, **{"width": 1 / 16, "head": "gap", "dropout": 0.0, **options})


@pytest.mark.parametrize(("cfg", "weighted"), [("A", 11), ("A-LRN", 11), ("B", 13), ("C", 16), ("D", 16), ("E", 19), ("5x5", 8)])
def test_weight_layers(cfg, weighted):
    assert sum(len(stage) for stage in KERNELS[cfg]) + 3 == weighted
    with torch.device("meta"):
        model = vgg(1000, cfg=cfg)
        assert [tuple(conv.kernel_size[0] for conv in stage) for stage in stages(model)] == list(KERNELS[cfg])
        assert model.forward_features(torch.empty(1, 3, 224, 224)).shape == (1, 512, 7, 7)


@pytest.mark.parametrize(("name", "tolerance"), [("vgg11", 1e-5), ("vgg16", 1e-4)])
def test_torchvisions_twin_whose_last_layers_are_linear(name, tolerance):
    """The same weights as 7x7 and 1x1 convolutions give the same scores of a 224 px image; so does our own network of that configuration."""
    wired = builder(name, num_classes=10, in_chans=3, size=(224, 224))().eval()
    with torch.device("meta"):
        twin = getattr(torchvision.models, name)(weights=None, num_classes=10)
        own = vgg(10, cfg="A" if name == "vgg11" else "D", width=1.0000001)  # a width of exactly 1 would be timm's
    assert type(own) is not type(wired)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found = wired(x)
        scale = float(found.abs().max())
        for other in (twin, own):
            values = [value.view(like.shape) for like, value in zip(other.state_dict().values(), wired.state_dict().values(), strict=True)]
            other.load_state_dict(dict(zip(other.state_dict(), values, strict=True)), assign=True)
            torch.testing.assert_close(other.eval()(x) / scale, found / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cfg", ["A-LRN", "C", "5x5", "D"])
def test_own_networks_have_the_same_head_as_timms(cfg):
    """A narrow one, its head written out as linear layers on the 7x7 map."""
    model = vgg(5, 3, cfg=cfg, width=1 / 32).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        y = model.forward_features(x).flatten(1)
        for conv in (model.pre_logits.fc1, model.pre_logits.fc2):
            y = (y @ conv.weight.flatten(1).T + conv.bias).relu()
        torch.testing.assert_close(model(x), model.fc(y), rtol=1e-4, atol=1e-5)


def test_response_normalisation_by_hand():
    """Six channels of ones behind the ReLU: the first has 3 neighbours with itself, the third 5; 1 / (2 + 1e-4 * 5)^0.75."""
    layer = next(m for m in small("A-LRN").features if isinstance(m, nn.LocalResponseNorm))
    found = layer(torch.ones(1, 6, 1, 1)).flatten()
    assert float(found[2]) == pytest.approx((2 + 1e-4 * 5) ** -0.75, rel=1e-6)
    assert float(found[0]) == pytest.approx((2 + 1e-4 * 3) ** -0.75, rel=1e-6)
    assert isinstance(small("A-LRN").features[1], nn.ReLU)
    assert isinstance(small("A-LRN").features[2], nn.LocalResponseNorm)


def test_weights_of_a_pair_and_of_a_five_by_five():
    """18 C^2 against 25 C^2 (section 2.3): in the last stage, where the width stays."""
    pair, one = (sum(conv.weight.numel() for conv in stages(small(cfg))[-1]) for cfg in ("B", "5x5"))
    assert pair / one == 18 / 25


@pytest.mark.parametrize(("side", "last"), [(64, 2), (32, 2), (28, 3), (8, 2), (3, 3), (1, 1)])
def test_pools_that_would_leave_less_than_two_pixels_are_left_out(side, last):
    model = small("E", (side, side)).eval()
    features = model.forward_features(torch.randn(1, 1, side, side))
    assert features.shape[2:] == (last, last)
    assert model.feature_info[-1]["module"] == f"features.{len(model.features) - 1 - isinstance(model.features[-1], nn.MaxPool2d)}"


def test_start_from_a_shallow_network():
    shallow, deep = small("A", width=0.5), small("E", width=0.5)
    gen = torch.Generator().manual_seed(0)
    assert init_from_shallow(deep, shallow, gen=gen) == 5, "four convolutions and the one linear layer of the pooled head"
    a, e = stages(shallow), stages(deep)
    for i, j in ((0, 0), (1, 0), (2, 0), (2, 1)):
        assert torch.equal(a[i][j].weight, e[i][j].weight)
        assert torch.equal(a[i][j].bias, e[i][j].bias)
    assert torch.equal(shallow.fc.weight, deep.fc.weight)
    drawn = [e[0][1], e[1][1], *e[2][2:], *e[3], *e[4]]
    assert float(torch.cat([conv.weight.detach().flatten() for conv in drawn]).std()) == pytest.approx(0.1, rel=0.01)
    assert not any(bool(conv.bias.any()) for conv in drawn)


def test_the_start_carries_all_three_layers_of_the_head():
    shallow, deep = (vgg(3, 1, (32, 32), cfg, width=1 / 32) for cfg in ("A", "D"))
    assert init_from_shallow(deep, shallow) == 7
    assert torch.equal(shallow.pre_logits.fc2.weight, deep.pre_logits.fc2.weight)


def test_a_larger_image_is_evaluated_densely():
    """On 256x224 pixels the class map is 2x1: the mean of the scores of the two windows of the last feature map."""
    model = vgg(4, 1, width=1 / 32).eval()
    x = torch.randn(1, 1, 256, 224)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[2:] == (8, 7)
        windows = (model.forward_head(features[:, :, :7]) + model.forward_head(features[:, :, 1:])) / 2
        torch.testing.assert_close(model(x), windows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dense_eval(model, x), (model(x).softmax(1) + model(x.flip(3)).softmax(1)) / 2)
        torch.testing.assert_close(dense_eval(model, x), dense_eval(model, x.flip(3)))


def test_crops():
    x = torch.arange(36.0).view(1, 1, 6, 6)
    cut = crops(x, 4, grid=2)
    assert cut.shape == (8, 1, 1, 4, 4)
    assert torch.equal(cut[0], x[:, :, :4, :4])
    assert torch.equal(cut[1], x[:, :, :4, 2:])
    assert torch.equal(cut[3], x[:, :, 2:, 2:])
    assert torch.equal(cut[4:], cut[:4].flip(4))
    assert len(crops(x, 2)) == 50, "the paper's 50 crops a scale"


def test_averages_are_probabilities():
    model, x = small("A").eval(), torch.rand(2, 1, 40, 48)
    for found in (multi_crop_eval(model, x, 32, grid=2), multi_scale_eval(model, x, (32, 40))):
        torch.testing.assert_close(found.sum(1), torch.ones(2))
    torch.testing.assert_close(multi_scale_eval(model, x, (40,)), dense_eval(model, x))
    torch.testing.assert_close(multi_crop_eval(model, x[..., :40], 40, grid=1), dense_eval(model, x[..., :40]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vgg(cfg="F"), "'F' is no configuration"),
        (lambda: vgg(img_size=(28, 28)), r"28x28 pixels: five pools .* vgg-mini"),
        (lambda: vgg(width=0.0), "width must be positive"),
        (lambda: crops(torch.zeros(1, 1, 8, 8), 9), "side=9 does not fit images of 8x8"),
        (lambda: multi_scale_eval(nn.Identity(), torch.zeros(1, 1, 8, 8), ()), "at least one side"),
        (lambda: init_from_shallow(small("E"), small("A", width=0.5)), "do not fit"),
        (lambda: init_from_shallow(vgg(3, 1, (32, 32), width=1 / 32), small("A", width=1 / 32)), "do not fit"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(Mistake, match=words):
        make()
