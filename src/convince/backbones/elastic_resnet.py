"""Elastic ResNet: basic blocks in stages of any depth and width, each block stored in 32, 8 or 4 bits; a small one is a slice of a large one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.compress.qat import simulated
from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="elastic-resnet",
    kind="backbone",
    paper="simq-nas",
    title="SimQ-NAS: Simultaneous Quantization Policy and Neural Architecture Search",
    year=2023,
    url="https://arxiv.org/abs/2312.13301",
    accepts=("image",),
    departs=(
        "basic blocks for small images; the paper's super-network is a ResNet-50 of bottlenecks, trained on ImageNet by others",
        "weights are quantised symmetrically, a scale for each output channel; the authors' toolkit may choose asymmetric ones layer by layer",
        "4 bits are ours; the authors' toolkit chooses between 8 and 32",
        "a quantised block also trains, with straight-through gradients and moving ranges; the paper only quantises after training",
        "stem and head stay in floating point, and the first block of each stage always has a projection, so that a slice keeps all names",
    ),
    tiny={"depths": (1, 1), "widths": (4, 6), "bits": (8, 4), "stem": 4},
    variants={
        "elastic-resnet-largest": {"depths": (3, 3, 3), "widths": (16, 32, 48), "stem": 16},
        "elastic-resnet-smallest": {"depths": (1, 1, 1), "widths": (8, 16, 24), "stem": 16},
        "elastic-resnet-int8": {"depths": (3, 3, 3), "widths": (16, 32, 48), "stem": 16, "bits": (8, 8, 8, 8, 8, 8, 8, 8, 8)},
        "elastic-resnet-mini": {"depths": (2, 2, 2), "widths": (16, 32, 48), "stem": 16},
    },
    small=("elastic-resnet-mini", "elastic-resnet-largest", "elastic-resnet-smallest", "elastic-resnet-int8"),
)
BITS = (4, 8, 32)


def conv(c_in: int, c_out: int, kernel: int, stride: int, bits: int) -> nn.Module:
    """A convolution without bias; below 32 bits its weights are quantised by channel and its input by tensor, in training straight-through."""
    plain = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return plain if bits == 32 else simulated(plain, None, 0.9, {"w_bits": bits, "a_bits": bits, "granularity": "channel", "scheme": "symmetric"})


@final
class ElasticBlock(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN, plus the input (projected in the first block of a stage), ReLU; all convolutions in ``bits``."""

    def __init__(self, c_in: int, c_out: int, stride: int, first: bool, bits: int) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride, bits)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = conv(c_out, c_out, 3, 1, bits)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Sequential(conv(c_in, c_out, 1, stride, bits), nn.BatchNorm2d(c_out)) if first else nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.downsample(x))


@final
class ElasticResnet(Headed):
    """A 3x3 stem, stages of :class:`ElasticBlock`, global average pooling, a linear head; each stage after the first halves the side.

    ``depths`` are blocks a stage and ``widths`` their channels; ``bits`` a number for each block in order, 4, 8 or 32, or nothing for 32
    everywhere, which is a plain ResNet; ``stem`` channels before the first stage. Raises Mistake.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 48),
        bits: Sequence[int] = (),
        stem: int = 16,
    ) -> None:
        super().__init__()
        bits = checked(depths, widths, bits, stem)
        self.num_classes, self.num_features, self.in_chans = num_classes, widths[-1], in_chans
        self.depths, self.widths, self.bits, self.stem = tuple(depths), tuple(widths), bits, stem
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        each, c_in = iter(bits), stem
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = [ElasticBlock(width if j else c_in, width, 2 if i and not j else 1, not j, next(each)) for j in range(depth)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = width
        self.fc = nn.Linear(c_in, num_classes)
        self.feature_info = maps(*((f"layer{i + 1}", width, 2**i) for i, width in enumerate(widths)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        x = self.relu(self.bn1(self.conv1(x)))
        for i in range(len(self.depths)):
            x = getattr(self, f"layer{i + 1}")(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))


def checked(depths: Sequence[int], widths: Sequence[int], bits: Sequence[int], stem: int) -> tuple[int, ...]:
    """The bits of each block, or a Mistake that names the setting."""
    if not depths or len(depths) != len(widths) or min(*depths, *widths, stem) < 1:
        raise Mistake(f"elastic-resnet: depths={tuple(depths)}, widths={tuple(widths)}, stem={stem}: one depth and one width a stage, all at least 1")
    bits = tuple(bits) or (32,) * sum(depths)
    if len(bits) != sum(depths):
        raise Mistake(f"elastic-resnet: bits={bits} names {len(bits)} blocks, and depths={tuple(depths)} has {sum(depths)}; give a number for each, or none")
    if not set(bits) <= set(BITS):
        raise Mistake(f"elastic-resnet: bits={bits}: each must be one of {', '.join(map(str, BITS))}; 32 is floating point")
    return bits


def stored_bytes(depths: Sequence[int], widths: Sequence[int], bits: Sequence[int] = (), stem: int = 16, num_classes: int = 10, in_chans: int = 3) -> float:
    """Bytes of a network as it is deployed: BN folded into the convolution before it.

    A convolution takes ``bits / 8`` bytes a weight and 4 a channel for the bias, and 4 more a channel for the scale below 32 bits; stem and
    head take 4 bytes a number.
    """
    bits = checked(depths, widths, bits, stem)
    total, each, c_in = 4.0 * stem * (9 * in_chans + 1), iter(bits), stem
    for depth, width in zip(depths, widths, strict=True):
        for j in range(depth):
            b, weights, channels = next(each), width * width * 9, 2 * width
            weights += width * 9 * width if j else width * (9 + 1) * c_in  # the first block reads c_in, and projects it
            channels += 0 if j else width
            total += weights * b / 8 + channels * (4 if b == 32 else 8)
        c_in = width
    return total + 4.0 * num_classes * (c_in + 1)


def sliced(state: Mapping[str, Tensor], small: nn.Module) -> dict[str, Tensor]:
    """The tensors of a super-network's ``state`` that the network ``small`` shares: the first channels of each, by name; views, so gradients flow back.

    Whatever ``small`` alone has, the ranges of quantised activations, is left out.
    """
    shapes = {name: tensor.shape for name, tensor in small.state_dict().items() if name in state}
    return {name: state[name][tuple(slice(length) for length in shape)] for name, shape in shapes.items()}


@torch.no_grad()
def sub_network(model: ElasticResnet, depths: Sequence[int], widths: Sequence[int], bits: Sequence[int] = ()) -> ElasticResnet:
    """A network of its own with the first blocks and channels of ``model``; a Mistake where ``model`` has fewer."""
    if len(depths) != len(model.depths) or any(a > b for a, b in zip((*depths, *widths), (*model.depths, *model.widths), strict=True)):
        raise Mistake(f"elastic-resnet: depths={tuple(depths)}, widths={tuple(widths)} are no part of a network of {model.depths} and {model.widths}")
    with torch.device("meta"):
        small = ElasticResnet(model.num_classes, model.in_chans, depths, widths, bits, model.stem)
    weight = model.conv1.weight
    small = small.to_empty(device=weight.device).to(weight.dtype)
    for module in small.modules():  # what to_empty left unset
        for name, buffer in module.named_buffers(recurse=False):
            buffer.fill_(1 if name == "running_var" else 0)
    small.load_state_dict(sliced(model.state_dict(), small), strict=False)
    return small.train(model.training)
