"""VGG: 11 to 19 layers of plain 3x3 convolutions, for photographs with three fully connected layers, for small images with a pooled head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="vgg",
    kind="backbone",
    paper="vgg",
    title="Very Deep Convolutional Networks for Large-Scale Image Recognition",
    year=2014,
    url="https://arxiv.org/abs/1409.1556",
    accepts=("image",),
    departs=(
        "weights start from He's law; init_from_shallow is the paper's own start, in which a deep network begins with a trained shallow one",
        "batch normalisation (bn=true, sizes ending in -bn), the pooled head (head=gap) and width are later additions, none of them in the paper",
        "the fully connected layers are convolutions from the start, so a photograph of another size is evaluated densely; a smaller map is pooled up to 7x7",
        "response normalisation stands behind the first ReLU and adds 1e-4 times the sum of squares, as in AlexNet; Caffe divides by the size 5 as well",
        "the paper's training recipe is not part of the network: SGD 0.01 divided by ten thrice, images of 256 to 512 pixels, shifted colours",
    ),
    tiny={"cfg": "A", "width": 1 / 16, "head": "gap"},
    variants={
        "vgg11": {"cfg": "A"},
        "vgg11-lrn": {"cfg": "A-LRN"},
        "vgg13": {"cfg": "B"},
        "vgg16-c": {"cfg": "C"},
        "vgg16": {"cfg": "D"},
        "vgg19": {"cfg": "E"},
        "vgg11-bn": {"cfg": "A", "bn": True},
        "vgg13-bn": {"cfg": "B", "bn": True},
        "vgg16-bn": {"cfg": "D", "bn": True},
        "vgg19-bn": {"cfg": "E", "bn": True},
        "vgg8-five-by-five": {"cfg": "5x5"},
        "vgg16-bn-gap": {"cfg": "D", "bn": True, "head": "gap", "dropout": 0.0},
        "vgg-mini": {"cfg": "B", "width": 0.25, "bn": True, "head": "gap", "dropout": 0.0},
    },
    small=("vgg-mini",),
    published={
        "vgg11": {"size": 224, "classes": 1000, "parameters": 132863336, "macs": 7.61e9},
        "vgg11-lrn": {"size": 224, "classes": 1000, "parameters": 133e6},
        "vgg13": {"size": 224, "classes": 1000, "parameters": 133047848, "macs": 11.31e9},
        "vgg16-c": {"size": 224, "classes": 1000, "parameters": 133638952, "macs": 11.77e9},
        "vgg16": {"size": 224, "classes": 1000, "parameters": 138357544, "macs": 15.47e9},
        "vgg19": {"size": 224, "classes": 1000, "parameters": 143667240, "macs": 19.63e9},
        "vgg11-bn": {"size": 224, "classes": 1000, "parameters": 132868840, "macs": 7.61e9},
        "vgg16-bn": {"size": 224, "classes": 1000, "parameters": 138365992, "macs": 15.47e9},
    },
)
WIDTHS = (64, 128, 256, 512, 512)
KERNELS: dict[str, tuple[tuple[int, ...], ...]] = {
    "A": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "A-LRN": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "B": ((3, 3),) * 5,
    "C": ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1)),
    "D": ((3, 3), (3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "E": ((3, 3), (3, 3), (3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 3)),
    "5x5": ((5,),) * 5,
}
"""Kernels of each stage (Table 1); "5x5" is B with each pair of 3x3 replaced by one 5x5 (section 4.1)."""
IN_TIMM = {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}


@final
class StackedConvs(Headed):
    """Any configuration of Table 1: convolutions with bias and ReLU, a 2x2 max-pool after each stage, and a head.

    ``width`` scales all hidden channels. With the head "gap" (the mean over positions and one linear layer) a pool that would
    leave less than 2 pixels of ``img_size`` is left out; with "fc" there are timm's two layers of 4096 before it. ``dropout``
    stands before every linear layer but the first of "fc".
    """

    def __init__(
        self, num_classes: int, in_chans: int, img_size: Sequence[int], cfg: str, width: float, bn: bool, head: Literal["fc", "gap"], dropout: float
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        layers: list[nn.Module] = []
        rows, c_in, step = [], in_chans, 1
        for stage, (kernels, full) in enumerate(zip(KERNELS[cfg], WIDTHS, strict=True)):
            c_out = max(round(full * width), 1)
            for kernel in kernels:
                layers += [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), *([nn.BatchNorm2d(c_out)] if bn else []), nn.ReLU(inplace=True)]
                c_in = c_out
            if cfg == "A-LRN" and stage == 0:
                layers.append(nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0))  # torch divides alpha by the size
            rows.append((f"features.{len(layers) - 1}", c_out, step))
            if head == "fc" or min(img_size) // (2 * step) >= 2:
                layers.append(nn.MaxPool2d(2, 2))
                step *= 2
        self.features = nn.Sequential(*layers)
        self.feature_info = maps(*rows)
        self.pre_logits: nn.Module = nn.Identity()
        if head == "fc":
            from timm.models.vgg import ConvMlp

            self.pre_logits = ConvMlp(c_in, round(4096 * width), 7, drop_rate=dropout)
            c_in = round(4096 * width)
        self.drop = nn.Dropout(dropout)
        self.fc, self.num_features = nn.Linear(c_in, num_classes), c_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        return self.features(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """The vector before the last layer: the mean over positions, of "fc" after its two wide layers."""
        return self.drop(self.pre_logits(features).mean((2, 3)))


def vgg(
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: Sequence[int] = (224, 224),
    cfg: str = "D",
    width: float = 1.0,
    bn: bool = False,
    head: Literal["fc", "gap"] = "fc",
    dropout: float = 0.5,
) -> nn.Module:
    """timm's vgg11, 13, 16 or 19 for configurations A, B, D and E as published, else :class:`StackedConvs`.

    ``cfg`` as in Table 1 (A, A-LRN, B, C, D, E), or "5x5"; ``bn`` puts batch normalisation before each ReLU. Without it
    take a learning rate of 0.01. Raises Mistake for an unknown configuration, and with the head "fc" for images below 32 pixels.
    """
    if cfg not in KERNELS:
        raise Mistake(f"vgg: cfg={cfg!r} is no configuration{nearest(cfg, list(KERNELS))} Configurations: {', '.join(KERNELS)}")
    if not width > 0 or head not in ("fc", "gap"):
        raise Mistake(f"vgg: width={width}, head={head!r}: width must be positive and head 'fc' or 'gap'")
    if head == "fc" and min(img_size) < 32:
        raise Mistake(f"vgg: {img_size[0]}x{img_size[1]} pixels: five pools leave nothing of a side below 32; take head=gap or --model vgg-mini")
    if head == "fc" and width == 1 and cfg in IN_TIMM:
        import timm

        return timm.create_model(IN_TIMM[cfg] + ("_bn" if bn else ""), num_classes=num_classes, in_chans=in_chans, drop_rate=dropout)
    return StackedConvs(num_classes, in_chans, img_size, cfg, width, bn, head, dropout)


# -- the paper's start for deep networks -----------------------------------------------------------


def stages(model: Any) -> list[list[nn.Conv2d]]:
    """The convolutions of a VGG, ours or timm's, between its pools."""
    found: list[list[nn.Conv2d]] = [[]]
    for layer in model.features:
        if isinstance(layer, nn.MaxPool2d):
            found.append([])
        elif isinstance(layer, nn.Conv2d):
            found[-1].append(layer)
    return [stage for stage in found if stage]


def fully_connected(model: Any) -> list[nn.Module]:
    """The layers behind the last pool, in order: three of them, or one where the head is pooled."""
    return [m for part in (model.pre_logits, model.get_classifier()) for m in part.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@torch.no_grad()
def init_from_shallow(deep: nn.Module, shallow: nn.Module, std: float = 0.1, gen: torch.Generator | None = None) -> int:
    """Start ``deep`` with the first four convolutions and the fully connected layers of ``shallow``, in place; returns how many layers were copied.

    A convolution goes to the same place of the same stage, the only one whose shape fits. The other convolutions are drawn from a
    normal law of mean 0 and variance 0.01 (``std`` 0.1) with zero bias (section 3.1). Raises Mistake where a shape does not fit.
    """
    mine, theirs = ({(i, j): m for i, stage in enumerate(stages(net)) for j, m in enumerate(stage)} for net in (deep, shallow))
    first = list(theirs)[:4]
    into = [*(mine.get(place) for place in first), *fully_connected(deep)]
    out_of = [*(theirs[place] for place in first), *fully_connected(shallow)]
    shapes = [[None if m is None else tuple(m.weight.shape) for m in layers] for layers in (into, out_of)]  # type: ignore[arg-type]
    if shapes[0] != shapes[1]:
        raise Mistake(
            f"init_from_shallow: layers of shapes {shapes[1]} do not fit {shapes[0]}; give two VGGs of one width, head, image size and set of classes"
        )
    for conv in mine.values():
        conv.weight.normal_(0, std, generator=gen)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    for a, b in zip(into, out_of, strict=True):
        a.load_state_dict(b.state_dict())  # type: ignore[union-attr]
    return len(into)


# -- evaluation ------------------------------------------------------------------------------------


@torch.no_grad()
def dense_eval(model: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """Class probabilities of whole images of any size: the class map's mean, soft-max, averaged with the mirrored image's (section 3.2).

    The model is left in its mode; put it in eval mode first.
    """
    return (model(x).softmax(1) + model(x.flip(3)).softmax(1)) / 2


def crops(x: Float[Tensor, "n c h w"], side: int, grid: int = 5) -> Float[Tensor, "m n c s s"]:
    """``grid`` x ``grid`` square crops at equal distances, then the same mirrored: m is 50 for the paper's 5. Raises Mistake where they do not fit."""
    h, w = x.shape[2:]
    if side < 1 or side > min(h, w):
        raise Mistake(f"crops: side={side} does not fit images of {h}x{w} pixels")
    at = [torch.linspace(0, whole - side, grid).round().long().tolist() for whole in (h, w)]
    cut = torch.stack([x[:, :, r : r + side, c : c + side] for r in at[0] for c in at[1]])
    return torch.cat([cut, cut.flip(4)])


@torch.no_grad()
def multi_crop_eval(model: nn.Module, x: Float[Tensor, "n c h w"], side: int, grid: int = 5) -> Float[Tensor, "n k"]:
    """Class probabilities averaged over :func:`crops` of ``side`` pixels."""
    return torch.stack([model(cut).softmax(1) for cut in crops(x, side, grid)]).mean(0)


def multi_scale_eval(model: nn.Module, x: Float[Tensor, "n c h w"], scales: Sequence[int] = (256, 384, 512)) -> Float[Tensor, "n k"]:
    """:func:`dense_eval` averaged over images whose smaller side is resized to each of ``scales`` pixels."""
    if not scales:
        raise Mistake("multi_scale_eval: scales is empty; name at least one side in pixels")
    short = min(x.shape[2:])
    sizes = [[math.floor(side * scale / short + 0.5) for side in x.shape[2:]] for scale in scales]
    resized = (F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False) for size in sizes)
    return torch.stack([dense_eval(model, image) for image in resized]).mean(0)
