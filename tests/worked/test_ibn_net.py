"""IBN-Net by hand: both halves, what they take over, exact counts, which norms are changed, divergence of two domains."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from convince.backbones.resnet import ResNet
from convince.backbones.small_cnn import SmallCNN
from convince.errors import Mistake
from convince.layers.ibn_net import IbnNet, Normed, appearance_divergence, install, symmetric_kl


def small(**options):
    return ResNet(num_classes=4, in_chans=3, **{"layers": (2, 2, 1), "widths": (4, 8, 8), **options})


def numbers(model):
    return sum(p.numel() for p in model.parameters())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.sampled_from([0.25, 0.5, 0.75]), st.booleans())
def test_halves_by_hand(channels, ratio, training):
    """The first ``int(ratio c)`` channels by each image's own mean and variance, the rest by the batch's, or in evaluation by the running ones."""
    cut = int(ratio * channels)
    if not 0 < cut < channels:
        with pytest.raises(Mistake, match=f"leaves {cut} of {channels} channels"):
            IbnNet(channels, ratio)
        return
    layer = IbnNet(channels, ratio).double().train(training)
    with torch.no_grad():
        for norm in (layer.IN, layer.BN):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        layer.BN.running_mean.normal_()
        layer.BN.running_var.uniform_(0.5, 2)
    x = torch.randn(3, channels, 4, 5, dtype=torch.float64)
    a, b = x[:, :cut], x[:, cut:]
    a = (a - a.mean((2, 3), keepdim=True)) / (a.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    mean, var = (b.mean((0, 2, 3)), b.var((0, 2, 3), unbiased=False)) if training else (layer.BN.running_mean.clone(), layer.BN.running_var.clone())
    b = (b - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    scale, shift = (torch.cat([getattr(layer.IN, n), getattr(layer.BN, n)]).view(1, -1, 1, 1) for n in ("weight", "bias"))
    torch.testing.assert_close(layer(x), torch.cat([a, b], 1) * scale + shift)


def test_style_of_an_image_is_forgotten_by_the_first_half_only():
    """Contrast and brightness of one image do not pass the instance half."""
    layer = IbnNet(6).eval()
    x = torch.randn(2, 6, 5, 5)
    y, other = layer(x), layer(3 * x + 2)
    torch.testing.assert_close(y[:, :3], other[:, :3], rtol=1e-4, atol=1e-4)
    assert bool((y[:, 3:] != other[:, 3:]).all())


def test_made_from_a_batch_norm():
    norm = nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        norm.weight.uniform_()
        norm.bias.normal_()
    norm(torch.randn(5, 6, 3, 3))
    made = IbnNet.of(norm, 0.5).eval()
    assert (made.IN.eps, made.BN.eps, made.BN.momentum) == (1e-3, 1e-3, 0.3)
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(made(x)[:, 3:], norm.eval()(x)[:, 3:])
    torch.testing.assert_close(made(x)[:, :3], functional.instance_norm(x[:, :3], weight=norm.weight[:3], bias=norm.bias[:3], eps=1e-3))


@pytest.mark.parametrize(("name", "parameters", "places"), [("resnet18", 11_689_512, 6), ("resnet50", 25_557_032, 13)])
def test_variant_a_changes_no_count(name, parameters, places):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
        done = install(model)
    assert numbers(model) == parameters
    assert done.added == 0
    assert len(done.places) == places
    assert all(place.endswith(".bn1") and not place.startswith("layer4") for place in done.places)
    buffers = {n: b.shape for n, b in model.named_buffers()}
    assert buffers["layer1.0.bn1.BN.running_mean"] == (32,)
    assert not any(".IN." in n for n in buffers), "running statistics exist for the batch half only"


def test_variant_b_of_resnet50_adds_1536():
    import timm

    with torch.device("meta"):
        model = timm.create_model("resnet50")
        before = numbers(model)
        done = install(model, variant="b")
    assert before == 25_557_032
    assert done.added == 2 * (256 + 512)
    assert done.places == ["layer1.2.act3", "layer2.3.act3", "bn1"]
    assert isinstance(model.bn1, nn.InstanceNorm2d)


def test_block_of_variant_b_by_hand():
    model = small().eval()
    install(model, variant="b")
    block, x = model.layer1[1], torch.randn(2, 4, 6, 6)
    assert isinstance(block.act2, Normed)
    assert not isinstance(model.layer1[0].act2, Normed), "only the last block of a stage"
    assert not isinstance(model.layer3[0].act2, Normed)
    y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())) + x
    torch.testing.assert_close(block(x), functional.instance_norm(y).relu())


def test_stages_are_chosen_and_old_weights_survive():
    model = small()
    state = copy.deepcopy(model.state_dict())
    assert install(copy.deepcopy(model)).places == ["layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1", "layer2.1.bn1"]
    assert install(copy.deepcopy(model), stages=(3,)).places == ["layer3.0.bn1"]
    done = install(model)
    kept = [name for name in state if ".bn1." not in name or name.startswith("layer3")]
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in kept)
    done.undo()
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("name", ["densenet121", "resnetv2_50"])
def test_activations_inside_norms_are_kept(name):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
        before = sum(isinstance(m, nn.ReLU) for m in model.modules())
        install(model)
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == before


def test_divergence_by_hand():
    """N(0, 1) against N(1, 4): (1 + 1) / 8 + (4 + 1) / 2 - 1 = 1.75; and of equals 0."""
    one = torch.tensor
    assert float(symmetric_kl(one(0.0), one(1.0), one(1.0), one(4.0))) == pytest.approx(1.75)
    assert float(symmetric_kl(one(1.0), one(4.0), one(0.0), one(1.0))) == pytest.approx(1.75)
    assert float(symmetric_kl(one(3.0), one(2.0), one(3.0), one(2.0))) == pytest.approx(0)
    p, q = torch.distributions.Normal(0.3, 0.7), torch.distributions.Normal(-1.0, 1.9)
    wanted = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(symmetric_kl(one(0.3), one(0.49), one(-1.0), one(3.61)), wanted)


def test_divergence_of_feature_maps():
    model = small().eval()
    x = torch.rand(12, 3, 8, 8)
    assert appearance_divergence(model, x, x) == pytest.approx({"layer1": 0, "layer2": 0, "layer3": 0}, abs=1e-9)
    apart = appearance_divergence(model, x, 1 - 2 * x, names=["layer1"])
    assert list(apart) == ["layer1"]
    means = [model.layer1(model.relu(model.bn1(model.conv1(z)))).mean((2, 3)).double() for z in (x, 1 - 2 * x)]
    wanted = symmetric_kl(means[0].mean(0), means[0].var(0), means[1].mean(0), means[1].var(0)).mean()
    assert apart["layer1"] == pytest.approx(wanted.item(), rel=1e-5)


def test_instance_norm_brings_styles_nearer():
    """An untrained network with IBN-b sees two contrasts of the same images as nearer than with batch norm, in its first stage."""
    torch.manual_seed(0)
    model = ResNet(num_classes=4, layers=(1, 1, 1), widths=(16, 16, 16)).eval()
    x = torch.rand(40, 3, 12, 12)
    plain = appearance_divergence(model, x, 0.3 * x)["layer1"]
    install(model, variant="b")
    assert appearance_divergence(model, x, 0.3 * x)["layer1"] < plain


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: install(SmallCNN()), "no residual blocks with normalisation"),
        (lambda: install(small(), variant="c"), "variant='c' must be"),
        (lambda: install(small(), stages=(4,)), "must be some of 1 to 3"),
        (lambda: install(small(), stages=(0,)), "must be some of 1 to 3"),
        (lambda: install(small(), ratio=1.0), "ratio=1.0 leaves 4 of 4"),
        (lambda: install(torchvision.models.resnet18(), variant="b"), "no activation of its own behind the addition"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(Mistake, match=words):
        call()


def test_a_refused_install_changes_nothing():
    model = small()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(Mistake, match="ratio"):
        install(model, ratio=0.0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
