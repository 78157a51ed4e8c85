"""ConvNeXt: a residual network brought up to date step by step until it is a transformer's equal, with nothing but convolutions."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="convnext",
    kind="backbone",
    paper="convnext",
    title="A ConvNet for the 2020s",
    year=2022,
    url="https://arxiv.org/abs/2201.03545",
    accepts=("image",),
    departs=(
        "four stages behind a patch stem are timm's network; other numbers of stages, and stem='small' (a 3x3 convolution of stride 1), are our own",
        "the size atto is not this paper's but timm's, after the follow-up ConvNeXt V2",
        "the paper's learning rate for batches of 4,096 images, 0.004, is kept for small batches",
        "in the roadmap layer scale comes with the last step; the paper counts it to the training recipe, which all its steps share",
        "in the roadmap the stem loses its activation together with the blocks, and all weights are drawn alike; of both the paper says nothing",
    ),
    tiny={"depths": (1, 1), "dims": (8, 16), "stem": "small"},
    variants={
        "convnext-mini": {"depths": (1, 2, 1), "dims": (16, 32, 72), "stem": "small"},
        "convnext-atto": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)},
        "convnext-tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
        "convnext-small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
        "convnext-base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
        "convnext-large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
        "convnext-xlarge": {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)},
    },
    small=("convnext-mini",),
    published={
        "convnext-atto": {"size": 224, "classes": 1000, "parameters": 3695520, "macs": 0.55e9},
        "convnext-tiny": {"size": 224, "classes": 1000, "parameters": 28589128, "macs": 4.46e9},
        "convnext-small": {"size": 224, "classes": 1000, "parameters": 50223688, "macs": 8.68e9},
        "convnext-base": {"size": 224, "classes": 1000, "parameters": 88591464, "macs": 15.35e9},
        "convnext-large": {"size": 224, "classes": 1000, "parameters": 197767336, "macs": 34.36e9},
        "convnext-xlarge": {"size": 224, "classes": 1000, "parameters": 350196968, "macs": 60.92e9},
    },
    optimizer="adamw:lr=0.004,weight_decay=0.05",
)
STEPS = (
    "resnet-50",
    "stage-ratio",
    "patchify",
    "depthwise",
    "width",
    "inverted",
    "depthwise-first",
    "kernel-7",
    "gelu",
    "one-activation",
    "one-norm",
    "layer-norm",
    "separate-downsampling",
)
"""The roadmap of section 2, in the paper's order; the last is ConvNeXt."""


@final
class ConvNeXtBlock(nn.Module):
    """``x + gamma * W2 gelu(W1 LN(depthwise 7x7 (x)))`` (Fig. 4): one norm, one activation, 4 times the width inside; ``gamma`` begins at ``layer_scale``."""

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale: float = 1e-6) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        return x + self.drop_path((self.gamma * self.mlp(y)).permute(0, 3, 1, 2))


@final
class RoadmapBlock(nn.Module):
    """A residual block as it stands at a step before the last; ``width`` is the paper's 64 or 96 of the first stage, doubled in each that follows.

    From a bottleneck (4 width - width - 4 width) to its inversion (width - 4 width - width), the k x k convolution in the middle,
    then first. It halves the side itself where ``stride`` is 2.
    """

    def __init__(self, step: int, c_in: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        hidden, self.channels = (4 * width, width) if reached(step, "inverted") else (width, 4 * width)
        kernel, spatial = 7 if reached(step, "kernel-7") else 3, 0 if reached(step, "depthwise-first") else 1
        outs = (hidden if spatial else c_in, hidden, self.channels)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip((c_in, *outs), outs, strict=False)):
            normed = i == 0 or not reached(step, "one-norm")
            side, groups = (kernel, a if reached(step, "depthwise") else 1) if i == spatial else (1, 1)
            layers += [nn.Conv2d(a, b, side, stride if i == spatial else 1, side // 2, groups=groups, bias=not normed)]
            layers += [norm_of(step, b)] if normed else []
            layers += [act_of(step)] if i == 1 or (i == 0 and not reached(step, "one-activation")) else []
        self.branch = nn.Sequential(*layers)
        self.act = nn.Identity() if reached(step, "one-activation") else act_of(step)
        self.drop_path = DropPath(drop_path)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != self.channels:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, self.channels, 1, stride, bias=False), norm_of(step, self.channels))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return self.act(self.drop_path(self.branch(x)) + self.downsample(x))


def reached(step: int, name: str) -> bool:
    """Whether the step of this number holds the change of this name."""
    return step >= STEPS.index(name)


def norm_of(step: int, channels: int) -> nn.Module:
    """Batch normalisation, and from the step "layer-norm" on layer normalisation over the channels of each pixel."""
    return LayerNorm2d(channels, eps=1e-6) if reached(step, "layer-norm") else nn.BatchNorm2d(channels)


def act_of(step: int) -> nn.Module:
    """ReLU, and from the step "gelu" on GELU."""
    return nn.GELU() if reached(step, "gelu") else nn.ReLU()


@final
class OwnConvNeXt(Headed):
    """A stem, stages of blocks, the mean over positions, a linear head, at a step of the roadmap; at the last a LayerNorm before the head.

    ``depths`` blocks a stage, ``dims`` their width. ``stem`` "patch": 4x4 of stride 4 (before the step "patchify" 7x7 of stride 2 and a max-pool),
    "small": 3x3 of stride 1. Each stage after the first halves the side, at the last step by LayerNorm and a 2x2 convolution of stride 2.
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        step: int,
        depths: Sequence[int],
        dims: Sequence[int],
        stem: str,
        drop_path: float = 0.0,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        last, pool = reached(step, STEPS[-1]), stem == "patch" and not reached(step, "patchify")
        kernel, stride = (3, 1) if stem == "small" else (7, 2) if pool else (4, 4)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel, stride, 0 if kernel == 4 else kernel // 2, bias=last), norm_of(step, dims[0]))
        if not reached(step, "one-activation"):
            self.stem.append(act_of(step))
        if pool:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        first = 1 if stem == "small" else 4
        self.side = first * 2 ** (len(depths) - 1)
        rates, c_in, stages, rows = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()), dims[0], [], []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            down: nn.Module = nn.Identity()
            if last and i:
                down = nn.Sequential(LayerNorm2d(c_in, eps=1e-6), nn.Conv2d(c_in, dim, 2, 2))
            blocks: list[Any] = []
            for j in range(depth):
                if last:
                    blocks.append(ConvNeXtBlock(dim, next(rates), layer_scale))
                    c_in = dim
                else:
                    blocks.append(RoadmapBlock(step, c_in, dim, 2 if i and j == 0 else 1, next(rates)))
                    c_in = blocks[-1].channels
            stages.append(nn.Sequential(OrderedDict(downsample=down, blocks=nn.Sequential(*blocks))))
            rows.append((f"stages.{i}", c_in, first * 2**i))
        self.stages, self.feature_info, self.num_features = nn.Sequential(*stages), maps(*rows), c_in
        self.norm: nn.Module = nn.LayerNorm(c_in, eps=1e-6) if last else nn.Identity()
        self.fc = nn.Linear(c_in, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        refuse_small(x.shape[-2:], self.side)
        return self.stages(self.stem(x))

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions, normalised."""
        return self.norm(features.mean((2, 3)))


def refuse_small(size: Sequence[int], least: int) -> None:
    """A Mistake for an image that would shrink to nothing."""
    if min(size) < least:
        raise Mistake(
            f"convnext: the stem and the stages divide the sides by {least}, so both must be at least {least} pixels; the image has {size[0]}x{size[1]}. "
            "Give larger images (--size) or fewer depths and dims, with stem=small"
        )


def sizes(step: str, depths: Sequence[int] | None, dims: Sequence[int] | None, stem: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The number of a step, and the blocks and widths a stage: those given, or the paper's at that step. Mistake for what does not fit."""
    if stem not in ("patch", "small"):
        raise Mistake(f"convnext: stem={stem!r} must be 'patch' (4x4 of stride 4) or 'small' (3x3 of stride 1, for images up to about 64 pixels)")
    if step not in STEPS:
        raise Mistake(f"convnext: step={step!r} is no step of the roadmap{nearest(step, STEPS)} Steps: {', '.join(STEPS)}")
    at = STEPS.index(step)
    depths = tuple(depths or ((3, 3, 9, 3) if reached(at, "stage-ratio") else (3, 4, 6, 3)))
    dims = tuple(dims or [(96 if reached(at, "width") else 64) * 2**i for i in range(len(depths))])
    if len(depths) != len(dims):
        raise Mistake(f"convnext: depths={depths} and dims={dims} must have one number a stage each")
    return at, depths, dims


def roadmap(
    step: str,
    num_classes: int = 10,
    in_chans: int = 3,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    stem: str = "patch",
) -> OwnConvNeXt:
    """The network at a step of the roadmap, one of :data:`STEPS`: each holds all changes up to its own, so it differs from the one before by that alone.

    Without ``depths`` and ``dims`` the paper's: 3, 4, 6, 3 blocks at "resnet-50", then 3, 3, 9, 3; 64, 128, 256, 512 wide up to "depthwise",
    then 96, 192, 384, 768. Raises Mistake for a step that is not known.
    """
    return OwnConvNeXt(num_classes, in_chans, *sizes(step, depths, dims, stem), stem)


def convnext(
    num_classes: int = 10,
    in_chans: int = 3,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    stem: str = "patch",
    step: str = "separate-downsampling",
    drop_path: float = 0.0,
    layer_scale: float = 1e-6,
    img_size: Sequence[int] | None = None,
) -> nn.Module:
    """ConvNeXt of ``depths`` blocks and ``dims`` channels a stage (those of ConvNeXt-T if none are given), or with ``step`` an earlier :func:`roadmap` network.

    ``drop_path`` is the last block's chance to be skipped in training, rising evenly from 0 at the first (the paper has 0.1, 0.4, 0.5, 0.5 for T, S, B, L).
    """
    at, depths, dims = sizes(step, depths, dims, stem)
    if img_size is not None:
        refuse_small(img_size, (1 if stem == "small" else 4) * 2 ** (len(depths) - 1))
    if step != STEPS[-1] or stem == "small" or len(depths) != 4:
        return OwnConvNeXt(num_classes, in_chans, at, depths, dims, stem, drop_path, layer_scale)
    import timm.models.convnext

    return timm.models.convnext.ConvNeXt(in_chans, num_classes, depths=depths, dims=dims, drop_path_rate=drop_path, ls_init_value=layer_scale)


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0, group: int = 3) -> list[dict[str, Any]]:
    """Groups for a torch optimiser: layers nearer to the input learn more slowly, and vectors (norms, biases, layer scales) do not decay.

    The head's rate is ``lr``; each layer before it has ``layer_decay`` times that of the next (the paper fine-tunes with 0.7 to 0.9). The stem is a
    layer, and so are ``group`` consecutive blocks of a stage, with the downsampling before them (appendix A.2). Takes ours and timm's ConvNeXt.
    """
    named: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    places = {name: (int(m[1]), int(m[2] or 0) // group) for name, _ in named if (m := re.match(r"stages\.(\d+)\.(?:blocks\.(\d+)|downsample)", name))}
    if not places:
        raise Mistake(f"param_groups: {type(model).__name__} has no stages.N.blocks; give a ConvNeXt, ours or timm's")
    order = {place: i for i, place in enumerate(sorted(set(places.values())), 1)}
    for name, p in named:
        layer = order[places[name]] if name in places else 0 if name.startswith("stem.") else len(order) + 1
        row = found.setdefault((layer, p.dim() > 1), {"params": [], "lr": lr * layer_decay ** (len(order) + 1 - layer)})
        row["params"].append(p)
        row["weight_decay"] = weight_decay if p.dim() > 1 else 0.0
    return [found[key] for key in sorted(found)]
