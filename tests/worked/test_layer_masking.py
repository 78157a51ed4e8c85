"""Layer masking: the worked fill, masks by hand layer by layer, what must not change, what must not matter, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.backbones import builder
from convince.errors import Mistake
from convince.explain.layer_masking import LayerMasking, carried_masks, masked_forward, neighbour_fill
from convince.explain.lime import Lime
from convince.explain.maskers import class_entropy, masked_scores, missingness
from convince.fit.answer import Answer, Normalise


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().eval()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                nn.init.normal_(m.bias)
        return net


class Lambda(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Mixed(nn.Module):
    """What networks do between convolutions: gates, dense maps, channels last, shuffles, padding by hand, a strided shortcut without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 5, padding="same", groups=4, dilation=2), nn.Conv2d(16, 8, 3, stride=2)
        self.gate, self.norm, self.mlp, self.fc = nn.Conv2d(8, 8, 1), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.hardswish(self.a(x), inplace=True)
        a = a * self.gate(a.mean((2, 3), keepdim=True)).sigmoid()
        a = a.view(len(a), 2, 4, *a.shape[2:]).transpose(1, 2).reshape(a.shape)
        b = F.max_pool2d(self.b(a), 3, 1, 1)
        c = self.c(F.pad(torch.cat([a, b], 1), (0, 1, 0, 1)))
        c = c + F.pad(a[:, :4, ::2, ::2], (0, 0, 0, 0, 2, 2))
        c = self.mlp(self.norm(c.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        c += F.avg_pool2d(b, 2)
        return self.fc(torch.cat([F.adaptive_avg_pool2d(c, 1).flatten(1), c.flatten(2).mean(2)], 1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "basic blocks": builder("resnet:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=2, size=(8, 8)),
    "bottlenecks": builder("resnext-mini", num_classes=3, in_chans=2, size=(8, 8)),
    "flattened": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)),
    "mixed": Mixed,
    "answer": lambda: Answer(Normalise([0.4, 0.5], [0.2, 0.3]), Mixed()),
}


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def keep() -> Tensor:
    return (torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(2)) > 0.4).repeat_interleave(2, 2).repeat_interleave(2, 3)


# -- by hand -----------------------------------------------------------------------------------------


def test_worked_fill() -> None:
    x = torch.tensor([[[[1.0, 2, 3], [4, 0, 6], [7, 8, 9]]]])
    keep = torch.tensor([[[[1.0, 1, 1], [1, 0, 1], [0, 0, 0]]]])
    for rounds in (1, 2, 5):
        found = neighbour_fill(x, keep, rounds)[0, 0]
        torch.testing.assert_close(found, torch.tensor([[1.0, 2, 3], [4, 3.2, 6], [4, 5, 6]]), rtol=2e-5, atol=0)
    assert torch.equal(neighbour_fill(x, torch.ones_like(keep), 3), x)
    far = neighbour_fill(x, torch.tensor([[[[1.0, 0, 0]] * 3]]), 1)[0, 0]  # one round reaches one pixel
    torch.testing.assert_close(far, torch.tensor([[1.0, 2.5, 0], [4, 4, 0], [7, 5.5, 0]]), rtol=1e-4, atol=0)
    moving = x.clone().requires_grad_(True)
    neighbour_fill(moving, keep, 2).sum().backward()
    assert torch.equal(moving.grad, keep)  # what is filled carries no gradient


def through(f: Callable[[Tensor], Tensor], x: Tensor, keep: Tensor, mode: str = "neighbours") -> tuple[Tensor, Tensor | None]:
    with carried_masks(mode) as masks:
        out = f(masks.mark(x, keep))
    return out, masks.masks.get(out)


def test_layers_by_hand() -> None:
    x, keep = torch.ones(1, 1, 1, 6), torch.tensor([[[[True, True, False, False, False, False]]]])
    weight = torch.ones(1, 1, 1, 3)
    out, mask = through(lambda t: F.conv2d(t, weight, padding=(0, 1)), x, keep)
    assert mask.tolist() == [[[[True, True, True, False, False, False]]]]  # a window that sees one visible pixel is visible
    torch.testing.assert_close(out, torch.tensor([[[[2.0, 3, 3, 0, 0, 0]]]]), rtol=1e-4, atol=0)
    out, _ = through(lambda t: F.conv2d(t, weight, padding=(0, 1)), x, keep, "zeros")
    assert out.tolist() == [[[[2.0, 2, 1, 0, 0, 0]]]]
    bias = torch.tensor([0.5])
    out, _ = through(lambda t: F.conv2d(t, weight, bias, padding=(0, 1)), x, keep, "partial")  # 2/(2/3), 2/(2/3), 1/(1/3), and the bias as it is
    torch.testing.assert_close(out, torch.tensor([[[[3.5, 3.5, 3.5, 0, 0, 0]]]]))
    out, mask = through(lambda t: F.conv2d(t, weight, padding=(0, 1), stride=2) + t[..., ::2], x, keep)  # a shortcut keeps its region
    assert mask.tolist() == [[[[True, False, False]]]]
    torch.testing.assert_close(out, torch.tensor([[[[3.0, 0, 0]]]]), rtol=1e-4, atol=0)
    assert through(lambda t: F.max_pool2d(t * -3, (1, 2)), x, keep)[0].tolist() == [[[[-3.0, 0, 0]]]]
    assert through(lambda t: F.avg_pool2d(t, (1, 3)), x, keep)[0].tolist() == [[[[pytest.approx(2 / 3), 0]]]]  # not scaled up
    for pool in (nn.AdaptiveAvgPool2d(1), nn.AvgPool2d((1, 6)), Lambda(lambda t: t.mean((2, 3))), Lambda(lambda t: t.flatten(2).mean(-1))):
        out, mask = through(pool, x, keep)
        assert float(out) == pytest.approx(1)  # the mean of what is visible
        assert mask is None
    assert through(lambda t: t.sigmoid() + 1, x, keep)[0][0, 0, 0, 2:].tolist() == [0.0] * 4


# -- what must not change, and what must not matter ----------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_of_ones_changes_no_bit(x: Tensor, name: str, dtype: torch.dtype) -> None:
    net, x = seeded(NETS[name]).to(dtype), x.to(dtype)
    for mode in ("neighbours", "zeros"):
        assert torch.equal(masked_forward(net, x, torch.ones(3, 1, 8, 8, dtype=torch.bool), mode), net(x))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("mode", ["neighbours", "zeros", "partial"])
def test_hidden_pixels_do_not_matter(x: Tensor, keep: Tensor, name: str, mode: str) -> None:
    net = seeded(NETS[name])
    found = masked_forward(net, x, keep, mode)
    for other in (0.0, 1.0, torch.rand(x.shape, generator=torch.Generator().manual_seed(5))):
        assert torch.equal(masked_forward(net, torch.where(keep, x, other), keep, mode), found)
    assert not torch.allclose(found, net(x))
    for i in range(3):  # nor do the other rows
        torch.testing.assert_close(masked_forward(net, x[i : i + 1], keep[i : i + 1], mode), found[i : i + 1])
    assert bool(masked_forward(net, x, torch.zeros_like(keep), mode).isfinite().all())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(masked_forward(net, x, keep, mode).float(), found, rtol=0.1, atol=0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_fills_farther_than_a_window_can_look_do_not_matter(seed: int) -> None:
    """The paper fills kernel-size times; k - 1 rounds give the same output, for the window's width is k."""
    gen = torch.Generator().manual_seed(seed)
    k = int(torch.randint(2, 6, (), generator=gen))
    x, keep = torch.rand(1, 2, 9, 9, generator=gen).double(), torch.rand(1, 1, 9, 9, generator=gen) > 0.8
    weight = torch.randn(3, 2, k, k, generator=gen).double()
    found, mask = through(lambda t: F.conv2d(t, weight, padding=k // 2), x, keep)
    wanted = torch.where(mask, F.conv2d(neighbour_fill(x, keep.double(), k), weight, padding=k // 2), 0)
    torch.testing.assert_close(found, wanted)


def test_the_region_does_not_grow_within_a_stage(x: Tensor) -> None:
    net = seeded(NETS["basic blocks"])
    keep = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    keep[..., 2:5, 2:5] = True
    seen: list[Tensor] = []
    with carried_masks() as masks:
        handle = net.get_submodule("layer1").register_forward_hook(lambda m, a, out: seen.append(masks.masks[out]))
        net(masks.mark(x, keep))
        handle.remove()
    assert torch.equal(seen[0][:, :1], F.max_pool2d(keep.float(), 3, 1, 1) > 0)  # the stem's convolution grows it by one, the block does not


# -- as a masker, and as an explainer ------------------------------------------------------------------


def test_missingness_by_hand(x: Tensor, keep: Tensor) -> None:
    assert class_entropy(torch.tensor([0, 0, 1, 1]), 4) == pytest.approx(math.log(2))
    assert class_entropy(torch.tensor([[3, 3]]), 4) == 0
    net = seeded(NETS["basic blocks"])
    whole = torch.ones(3, 2, 1, 8, 8, dtype=torch.bool)
    classes = net(x).argmax(1)
    assert missingness(net, x, whole, "layer") == {"agreement": 1.0, "class entropy": pytest.approx(class_entropy(classes, 3) / math.log(3))}
    several = torch.stack([keep, ~keep], 1)
    found = masked_scores(net, x, several, "layer")
    torch.testing.assert_close(found[:, 1], masked_forward(net, x, ~keep).detach())


def test_the_explainer_is_lime_with_this_masker(x: Tensor) -> None:
    net = seeded(NETS["answer"])
    found = LayerMasking(samples=30, cells=4)(net, x, 1)
    assert torch.equal(found.map, Lime(samples=30, cells=4, masker="layer")(net, x, 1).map)
    assert found.table["cells"] == 16
    assert not torch.equal(found.map, Lime(samples=30, cells=4)(net, x, 1).map)


def test_refusals_say_why(x: Tensor, keep: Tensor) -> None:
    for f, said in (
        (lambda t: t.flatten(2).transpose(1, 2).softmax(-1), "passes through 'softmax'"),
        (lambda t: F.group_norm(t, 1), "passes through 'group_norm'"),
        (lambda t: F.layer_norm(t, (8, 8)), "passes through 'layer_norm'"),
        (lambda t: F.max_pool2d(t, 2, return_indices=True)[0], "max_pool2d_with_indices"),
        (lambda t: F.conv2d(torch.ones(1, 2, 8, 8), t), "kernel made from the image"),
        (lambda t: t.mean((2, 3)), "no convolution of this answer sees its input"),
        (lambda t: F.pad(t, (-1, 0)), "pad by less than 0"),
    ):
        with pytest.raises(Mistake, match=said):
            masked_forward(Lambda(f), x, keep)
    with pytest.raises(Mistake, match="mode='zero' is none; did you mean 'zeros'"):
        masked_forward(Lambda(lambda t: t), x, keep, "zero")
    with pytest.raises(Mistake, match="layer-masking: samples=1"):
        LayerMasking(samples=1)
    with pytest.raises(Mistake, match="layer-masking: cells=9 does not fit images of 8x8"):
        LayerMasking(cells=9)(seeded(Mixed), x)
