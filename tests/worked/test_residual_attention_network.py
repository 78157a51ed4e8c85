"""Residual attention by hand: eqs. 1 and 3 to 6, the order of a unit, the hourglass, depth, published counts, settings refused."""

import pytest
import torch
from torch import nn

from convince.backbones import builder
from convince.backbones.residual_attention_network import AttentionModule, Hourglass, ResidualAttentionNetwork, Unit, activate, attend, resized
from convince.errors import Mistake


def test_worked_attention():
    trunk, mask = torch.tensor([[[[2.0, -4.0]]]]), torch.tensor([[[[0.5, 0.25]]]])
    assert attend(trunk, mask, "arl").flatten().tolist() == [3.0, -5.0]
    assert attend(trunk, mask, "nal").flatten().tolist() == [1.0, -1.0]


def test_worked_masks():
    x = torch.tensor([3.0, 0.0, 4.0, 0.0]).view(1, 2, 1, 2)  # position 0 holds (3, 4), position 1 (0, 0)
    assert activate(x, "mixed")[0, :, 0, 1].tolist() == [0.5, 0.5]
    assert activate(x, "channel")[0, :, 0].flatten().tolist() == pytest.approx([0.6, 0.0, 0.8, 0.0])
    spread = activate(x, "spatial")[0, :, 0]  # each map is (mean + d, mean - d): one deviation up and down
    for row in spread.tolist():
        assert row == pytest.approx([1 / (1 + 2.718281828**-1), 1 / (1 + 2.718281828)])
    assert activate(torch.full((1, 1, 1, 1), 7.0), "spatial").item() == 0.5, "a map of one pixel has no deviation"


@pytest.mark.parametrize("kind", ["mixed", "channel", "spatial"])
def test_masks_have_finite_gradients_on_flat_maps(kind):
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    activate(x, kind).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_a_unit_is_pre_activated_and_its_shortcut_reads_the_activated_input():
    names = {nn.BatchNorm2d: "bn", nn.Conv2d: "conv", nn.ReLU: "relu"}
    unit = Unit(8, 16, 2).eval()
    assert " ".join(names[type(m)] for m in (*unit.entry, *unit.branch)) == "bn relu conv bn relu conv bn relu conv"
    assert [m.kernel_size[0] for m in unit.branch if isinstance(m, nn.Conv2d)] == [1, 3, 1]
    with torch.no_grad():
        unit.branch[-1].weight.zero_()
        x = torch.randn(2, 8, 6, 6)
        torch.testing.assert_close(unit(x), unit.shortcut((x / (1 + 1e-5) ** 0.5).relu()))
        same = Unit(8, 8).eval()
        same.branch[-1].weight.zero_()
        assert torch.equal(same(x), x), "without a change of shape the input itself is added, not rectified"


def shut(module: AttentionModule) -> None:
    """Make the mask's last layer answer -20 everywhere."""
    norm, _, last = module.mask.ending[-3:]
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(1.0)
        last.weight.fill_(-20.0 / last.in_channels)


@pytest.mark.parametrize("mode", ["arl", "nal"])
def test_with_the_mask_shut_arl_is_its_trunk_and_nal_is_zero(mode):
    module = AttentionModule(8, down=2, mode=mode).eval()
    shut(module)
    x = torch.randn(2, 8, 9, 12)
    with torch.no_grad():
        before = module.before(x)
        trunk = module.trunk(before)
        got = attend(trunk, activate(module.mask(before)), mode)
        want = trunk if mode == "arl" else torch.zeros_like(trunk)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        torch.testing.assert_close(module(x), module.after(want), rtol=0, atol=1e-5)


def test_the_hourglass_goes_down_and_up_by_the_papers_rule():
    """With units that add nothing and no ending, level l is the max-pooled input, and each inner level adds its own map to the resized lower one."""
    mask = Hourglass(4, down=2, r=1).eval()
    assert [len(level) for level in mask.down] == [1, 2], "2r units at the lowest level"
    assert (len(mask.skip), len(mask.up)) == (1, 1)
    with torch.no_grad():
        for unit in mask.modules():
            if isinstance(unit, Unit):
                unit.branch[-1].weight.zero_()
        mask.ending = nn.Identity()
        x = torch.randn(1, 4, 8, 10)
        one = mask.pool(x)
        two = mask.pool(one)
        assert (one.shape[-2:], two.shape[-2:]) == ((4, 5), (2, 3))
        torch.testing.assert_close(mask(x), resized(resized(two, one) + one, x))


def test_resizing_keeps_the_corners():
    x = torch.tensor([[1.0, 3.0]]).view(1, 1, 1, 2)
    assert resized(x, torch.empty(1, 1, 1, 3)).flatten().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("name", "m"), [("attention56-cifar", 1), ("attention92-cifar", 2), ("attention236-cifar", 6)])
def test_the_trunk_is_36_m_plus_20_layers_deep(name, m):
    with torch.device("meta"):
        net = builder(name, num_classes=10, in_chans=3, size=(32, 32))()
    units = [path for path, module in net.named_modules() if isinstance(module, Unit) and ".mask." not in path]
    assert 3 * len(units) + 2 == 36 * m + 20 == int(name.removeprefix("attention").removesuffix("-cifar"))


@pytest.mark.parametrize(("name", "weights"), [("attention56", 31_738_024), ("attention92", 52_332_712)])
def test_weights_of_convolutions_and_head_are_those_of_the_released_networks(name, weights):
    with torch.device("meta"):
        net = builder(name, num_classes=1000, in_chans=3, size=(224, 224))()
        assert net.forward_features(torch.empty(1, 3, 224, 224)).shape == (1, 2048, 7, 7)
    assert sum(p.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters(recurse=False)) == weights


def test_the_smallest_mask_of_every_photo_stage_is_7_pixels_wide():
    with torch.device("meta"):
        net, seen = ResidualAttentionNetwork(), []
        for module in net.modules():
            if isinstance(module, Hourglass):
                module.down[-1].register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[-2:])))
        net(torch.empty(1, 3, 224, 224))
    assert seen == [(7, 7)] * 3


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match=r"residual-attention-network: modules=\(1, 1\).*one number a stage each"):
        ResidualAttentionNetwork(modules=(1, 1))
    with pytest.raises(Mistake, match="at a quarter of its width"):
        ResidualAttentionNetwork(widths=(16, 30, 64))
