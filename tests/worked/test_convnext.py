"""ConvNeXt by hand: a block equals its equation, networks equal torchvision's and timm's, the roadmap's costs are the paper's, rates fall by layer."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from convince.backbones import builder
from convince.backbones.convnext import STEPS, ConvNeXtBlock, OwnConvNeXt, convnext, param_groups, roadmap
from convince.errors import Mistake
from convince.models.counting import count

# Table 10 of the paper [10^9 multiply-adds]; its rows "BN -> LN" and "separate d.s. conv" are printed as 4.46 and 4.49
GIGA = {
    "resnet-50": 4.09,
    "stage-ratio": 4.53,
    "patchify": 4.42,
    "depthwise": 2.35,
    "width": 5.27,
    "inverted": 4.64,
    "depthwise-first": 4.07,
    "kernel-7": 4.15,
    "gelu": 4.15,
    "one-activation": 4.15,
    "one-norm": 4.15,
}


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Their weights into ours: both list them in the order in which a pass meets them, but for the place of gamma."""

    def rows(model):
        return sorted((name.endswith(("gamma", "layer_scale")), at, p) for at, (name, p) in enumerate(model.named_parameters()))

    with torch.no_grad():
        for (_, _, a), (_, _, b) in zip(rows(ours), rows(theirs), strict=True):
            a.copy_(b.reshape(a.shape))


def stirred(model: nn.Module) -> nn.Module:
    """All weights drawn anew, so that layer scales and biases count."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape) if p.dim() < 2 or p.shape[-1] == 1 else torch.randn(p.shape) / p[0].numel() ** 0.5)
    return model.eval()


def test_a_block_is_its_equation():
    block = ConvNeXtBlock(4, layer_scale=0.5)
    x = torch.randn(2, 4, 6, 5)
    y = nn.functional.conv2d(x, block.conv_dw.weight, block.conv_dw.bias, padding=3, groups=4)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    y = torch.einsum("nchw,dc->ndhw", y, block.mlp[0].weight) + block.mlp[0].bias[:, None, None]
    y = torch.einsum("nchw,dc->ndhw", nn.functional.gelu(y), block.mlp[2].weight) + block.mlp[2].bias[:, None, None]
    torch.testing.assert_close(block(x), x + 0.5 * y)


def test_at_the_start_every_block_is_the_identity():
    model = convnext(depths=(1, 2), dims=(8, 16), stem="small")
    x = torch.randn(2, 16, 8, 8)
    for block in model.stages[1].blocks:
        with torch.no_grad():
            assert 0 < float((block(x) - x).abs().max()) < 1e-4
        assert torch.equal(block.gamma, torch.full((16,), 1e-6))


@pytest.mark.parametrize("ours", ["own", "timm"])
def test_outputs_are_torchvisions(ours):
    theirs = stirred(torchvision.models.convnext_tiny(num_classes=7))
    model = roadmap(STEPS[-1], 7) if ours == "own" else convnext(7, img_size=(64, 64))
    assert isinstance(model, OwnConvNeXt) == (ours == "own")
    copied(model.eval(), theirs)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_our_small_network_is_timms_with_another_stem():
    theirs = stirred(timm.models.convnext.ConvNeXt(1, 5, depths=(1, 2, 1, 1), dims=(4, 8, 12, 16), patch_size=1))
    theirs.stem[0] = stirred(nn.Conv2d(1, 4, 3, padding=1))
    model = convnext(5, 1, depths=(1, 2, 1, 1), dims=(4, 8, 12, 16), stem="small").eval()
    copied(model, theirs)
    x = torch.randn(2, 1, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_every_step_of_the_roadmap_costs_what_the_paper_prints():
    found = {}
    for step in STEPS:
        with torch.device("meta"):
            found[step] = count(roadmap(step, 1000), (224, 224))
    assert {step: round(found[step].macs / 1e9, 2) for step in GIGA} == GIGA
    assert found["layer-norm"].macs == found["one-norm"].macs
    assert found["resnet-50"].parameters == 25_557_032, "ResNet-50"
    assert found[STEPS[-1]].parameters == 28_589_128, "ConvNeXt-T"
    assert round(found[STEPS[-1]].macs / 1e9, 2) == 4.46


def kinds(module: nn.Module) -> str:
    short = {"Conv2d": "conv", "BatchNorm2d": "bn", "LayerNorm2d": "ln", "ReLU": "relu", "GELU": "gelu"}
    return " ".join(short[type(m).__name__] for m in module)


@pytest.mark.parametrize(
    ("step", "branch", "act"),
    [
        ("resnet-50", "conv bn relu conv bn relu conv bn", "ReLU"),
        ("gelu", "conv bn gelu conv bn gelu conv bn", "GELU"),
        ("one-activation", "conv bn conv bn gelu conv bn", "Identity"),
        ("one-norm", "conv bn conv gelu conv", "Identity"),
        ("layer-norm", "conv ln conv gelu conv", "Identity"),
    ],
)
def test_what_a_block_holds_at_a_step(step, branch, act):
    block = roadmap(step, depths=(2,), dims=(4,), stem="small").stages[0].blocks[1]
    assert kinds(block.branch) == branch
    assert type(block.act).__name__ == act


def test_where_the_spatial_convolution_stands():
    def shape(step):
        convs = [m for m in roadmap(step, depths=(2,), dims=(4,), stem="small").stages[0].blocks[1].branch if isinstance(m, nn.Conv2d)]
        return [(m.in_channels, m.out_channels, m.kernel_size[0], m.groups) for m in convs]

    assert shape("patchify") == [(16, 4, 1, 1), (4, 4, 3, 1), (4, 16, 1, 1)]
    assert shape("width") == [(16, 4, 1, 1), (4, 4, 3, 4), (4, 16, 1, 1)]
    assert shape("inverted") == [(4, 16, 1, 1), (16, 16, 3, 16), (16, 4, 1, 1)]
    assert shape("depthwise-first") == [(4, 4, 3, 4), (4, 16, 1, 1), (16, 4, 1, 1)]
    assert shape("kernel-7") == [(4, 4, 7, 4), (4, 16, 1, 1), (16, 4, 1, 1)]


def test_each_step_trains_and_is_a_model_by_name():
    for step in STEPS:
        model = builder(f"convnext:step={step},depths=(1,1),dims=(4,8),stem=small", num_classes=3, in_chans=1, size=(8, 8))()
        model(torch.randn(4, 1, 8, 8)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters()), step
        assert model.feature_info[-1]["reduction"] == 2


def test_drop_path_rises_evenly():
    model = convnext(depths=(1, 2, 1), dims=(4, 4, 4), stem="small", drop_path=0.3)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("stem", ["small", "patch"])
def test_learning_rates_fall_towards_the_input_and_vectors_do_not_decay(stem):
    model = convnext(depths=(1, 4, 1, 1), dims=(4, 4, 4, 4), stem=stem)  # layers: stem, 1, 3 + 1 blocks, 1, 1, head
    groups = param_groups(model, lr=1.0, layer_decay=0.5)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    found = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert found["stem.0.weight"] == (0.5**6, 0.05)
    assert found["stages.0.blocks.0.conv_dw.weight"] == (0.5**5, 0.05)
    assert found["stages.1.downsample.1.weight"] == found["stages.1.blocks.2.conv_dw.weight"] == (0.5**4, 0.05)
    assert found["stages.1.blocks.3.gamma"] == (0.5**3, 0.0)
    assert found["stages.3.blocks.0.conv_dw.bias"] == (0.5, 0.0)
    assert [found[name] for name in found if name.endswith("fc.weight")] == [(1.0, 0.05)]
    torch.optim.AdamW(groups).step()
    with pytest.raises(Mistake, match=r"Linear has no stages\.N\.blocks"):
        param_groups(nn.Linear(2, 2), 1.0)


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="no step of the roadmap; did you mean 'kernel-7'"):
        roadmap("kernel7")
    with pytest.raises(Mistake, match="one number a stage each"):
        convnext(depths=(1, 1), dims=(4,))
    with pytest.raises(Mistake, match="must be 'patch'"):
        convnext(stem="photo")
    with pytest.raises(Mistake, match="divide the sides by 32, so both must be at least 32 pixels; the image has 31x64"):
        convnext(img_size=(31, 64))
    with pytest.raises(Mistake, match="at least 2 pixels; the image has 1x4"):
        convnext(depths=(1, 1), dims=(4, 8), stem="small")(torch.zeros(1, 3, 1, 4))
