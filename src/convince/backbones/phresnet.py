"""PhResNet: a residual network whose convolutions are all parameterised hypercomplex ones; norms and the head are real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.layers.phnn import PHConv2d
from convince.parts import Card

CARD = Card(
    part="phresnet",
    kind="backbone",
    paper="phnn",
    title="PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions",
    year=2022,
    url="https://arxiv.org/abs/2110.04176",
    accepts=("image",),
    departs=(
        "convolutions have no bias, since a norm follows; the released ones hold biases that they never add",
        "the input is padded with zero channels until n divides it; the paper's data loader pads RGB to four",
        "features are averaged over all positions; the released network averages 4x4 of them, which is the same for 32 pixels",
    ),
    tiny={"layers": (1, 1), "widths": (4, 8), "n": 2},
    variants={
        "phresnet-mini": {"layers": (1, 1, 1), "widths": (24, 48, 96), "n": 4},
        "phresnet-mini-n2": {"layers": (1, 1, 1), "widths": (24, 48, 96), "n": 2},
        "phresnet-mini-n3": {"layers": (1, 1, 1), "widths": (24, 48, 96), "n": 3},
        "phresnet18-n2": {"n": 2},
        "phresnet18-n3": {"n": 3, "widths": (60, 120, 240, 516)},
        "phresnet18-n4": {"n": 4},
        "phresnet50-n2": {"n": 2, "layers": (3, 4, 6, 3), "unit": "bottleneck"},
        "phresnet50-n3": {"n": 3, "layers": (3, 4, 6, 3), "unit": "bottleneck", "widths": (60, 120, 240, 516)},
        "phresnet50-n4": {"n": 4, "layers": (3, 4, 6, 3), "unit": "bottleneck"},
        "phresnet152-n2": {"n": 2, "layers": (3, 8, 36, 3), "unit": "bottleneck"},
        "phresnet152-n3": {"n": 3, "layers": (3, 8, 36, 3), "unit": "bottleneck", "widths": (60, 120, 240, 516)},
        "phresnet152-n4": {"n": 4, "layers": (3, 8, 36, 3), "unit": "bottleneck"},
    },
    small=("phresnet-mini", "phresnet-mini-n2", "phresnet-mini-n3"),
    published={
        "phresnet18-n2": {"size": 32, "classes": 10, "parameters": 5594794},
        "phresnet18-n3": {"size": 32, "classes": 10, "parameters": 3635914},
        "phresnet18-n4": {"size": 32, "classes": 10, "parameters": 2805962},
        "phresnet50-n2": {"size": 32, "classes": 10, "parameters": 11797938},
        "phresnet50-n3": {"size": 32, "classes": 10, "parameters": 7562149},
        "phresnet50-n4": {"size": 32, "classes": 10, "parameters": 5938954},
    },
)


def pad_channels(x: Float[Tensor, "b c h w"], n: int) -> Float[Tensor, "b d h w"]:
    """Zero channels at the end until ``n`` divides their number: RGB becomes four channels for n = 2 and 4."""
    return functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % n))


def conv(c_in: int, c_out: int, kernel: int, stride: int, n: int, algebra: str | None) -> nn.Module:
    """A convolution that keeps the side (or halves it, with stride 2), without bias; n=1 is an ordinary one."""
    if n == 1:
        return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return PHConv2d(c_in, c_out, kernel, n, stride, kernel // 2, bias=False, algebra=algebra)


@final
class Block(nn.Module):
    """conv3x3, BN, ReLU, conv3x3, BN; or 1x1, BN, ReLU, 3x3, BN, ReLU, 1x1 to four times the width, BN; plus the input, ReLU."""

    def __init__(self, c_in: int, width: int, stride: int, bottleneck: bool, n: int, algebra: str | None) -> None:
        super().__init__()
        self.channels = 4 * width if bottleneck else width
        rows = ((width, 1, 1), (width, 3, stride), (self.channels, 1, 1)) if bottleneck else ((width, 3, stride), (width, 3, 1))
        branch: list[nn.Module] = []
        before = c_in
        for c_out, kernel, step in rows:
            branch += [conv(before, c_out, kernel, step, n, algebra), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            before = c_out
        self.branch, self.act = nn.Sequential(*branch[:-1]), branch[-1]
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != self.channels:
            self.downsample = nn.Sequential(conv(c_in, self.channels, 1, stride, n, algebra), nn.BatchNorm2d(self.channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return self.act(self.branch(x) + self.downsample(x))


@final
class PhResNet(Headed):
    """A 3x3 stem without pooling, stages of :class:`Block`, mean over positions, a real linear head: for images of about 28 to 64 pixels.

    ``n`` is the order of the algebra (1: real numbers), which must divide every width; ``algebra`` "complex" (n=2) or "quaternion" (n=4) fixes it,
    None lets it be learned. ``layers`` are blocks a stage, ``widths`` their channels; each stage after the first halves the side.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        layers: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        unit: Literal["basic", "bottleneck"] = "basic",
        n: int = 4,
        algebra: Literal["complex", "quaternion"] | None = None,
    ) -> None:
        super().__init__()
        if len(layers) != len(widths) or not layers or min(layers) < 1:
            raise Mistake(f"phresnet: layers={tuple(layers)} and widths={tuple(widths)} must name the same stages, each with at least one block")
        if n < 1 or any(width % n for width in widths):
            raise Mistake(f"phresnet: n={n} must divide every width of {tuple(widths)}; take other widths, such as multiples of 12 for n = 2, 3 and 4")
        if unit not in ("basic", "bottleneck"):
            raise Mistake(f"phresnet: unit={unit!r} must be 'basic' or 'bottleneck'")
        self.num_classes, self.in_chans, self.n, self.stages = num_classes, in_chans, n, len(layers)
        c_in = widths[0]
        self.conv1 = conv(in_chans + -in_chans % n, c_in, 3, 1, n, algebra)
        self.bn1, self.act = nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)
        rows = []
        for s, (count, width) in enumerate(zip(layers, widths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(count):
                made = Block(c_in, width, 2 if j == 0 and s else 1, unit == "bottleneck", n, algebra)
                blocks.append(made)
                c_in = made.channels
            setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))
            rows.append((f"layer{s + 1}", c_in, 2**s))
        self.feature_info, self.num_features = maps(*rows), c_in
        self.fc = nn.Linear(c_in, num_classes)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """The last feature map."""
        x = self.act(self.bn1(self.conv1(pad_channels(x, self.n))))
        for s in range(self.stages):
            x = getattr(self, f"layer{s + 1}")(x)
        return x

    def pool(self, features: Float[Tensor, "b d i j"]) -> Float[Tensor, "b d"]:
        """The mean over positions."""
        return features.mean((2, 3))
