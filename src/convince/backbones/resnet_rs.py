"""ResNet-RS: a plain ResNet with the ResNet-D stem and shortcuts and squeeze-and-excitation, in timm's sizes and in small ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.layers.se import Se
from convince.parts import Card

CARD = Card(
    part="resnet-rs",
    kind="backbone",
    paper="resnet-rs",
    title="Revisiting ResNets: Improved Training and Scaling Strategies",
    year=2021,
    url="https://arxiv.org/abs/2103.07579",
    departs=(
        "sizes named by a depth are timm's; those without are for images of about 28 to 64 pixels: basic blocks, a stem that keeps the side",
        "dropout before the head belongs to the part resnet-rs-training, so the network alone has none",
    ),
    accepts=("image",),
    tiny={"layers": (1, 1), "widths": (4, 8)},
    variants={
        "resnet-rs8": {"layers": (1, 1, 1)},
        "resnet-rs20": {"layers": (3, 3, 3)},
        "resnet-rs50": {"depth": 50},
        "resnet-rs101": {"depth": 101},
        "resnet-rs152": {"depth": 152},
        "resnet-rs200": {"depth": 200, "drop_path": 0.1},
        "resnet-rs270": {"depth": 270, "drop_path": 0.1},
        "resnet-rs350": {"depth": 350, "drop_path": 0.1},
        "resnet-rs420": {"depth": 420, "drop_path": 0.1},
    },
    small=("resnet-rs8", "resnet-rs20"),
)
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3), 270: (4, 29, 53, 4), 350: (4, 36, 72, 4), 420: (4, 44, 87, 4)}
SIZES = {50: (160,), 101: (160, 192), 152: (192, 224, 256), 200: (256,), 270: (256,), 350: (256, 320), 420: (320,)}  # depth -> pixels of the presets


def scale_rule(epochs: int) -> str:
    """Which to scale under a budget, "depth" or "width": depth where training is long enough to over-fit (section 6.1).

    The paper finds width better at 10 epochs and depth at 350; at 100 the two cross, and this rule still says width.
    The resolution is raised more slowly than in compound scaling, to 320 pixels at most (:data:`SIZES`).
    """
    return "depth" if epochs > 100 else "width"


@final
class Block(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN - SE, plus the input (2x2 mean, 1x1 conv, BN where the shape changes), ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.se = Se(c_out, r=4)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False) if stride != 1 else nn.Identity()
            self.downsample = nn.Sequential(pool, nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.se(self.bn2(self.conv2(y))) + self.downsample(x))


@final
class SmallResNetRs(Headed):
    """Three 3x3 convs as the stem, stages of :class:`Block`, mean over positions, a linear head.

    Each stage after the first halves the side; ``layers`` are blocks a stage, ``widths`` their channels.
    """

    def __init__(self, num_classes: int, in_chans: int, layers: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, widths[-1], in_chans
        half = max(widths[0] // 2, 1)
        stem: list[nn.Module] = []
        for a, b in ((in_chans, half), (half, half), (half, widths[0])):
            stem += [nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*stem)
        self.stages, c_in = len(layers), widths[0]
        for i, (count, c_out) in enumerate(zip(layers, widths, strict=True)):
            blocks = [Block(c_in if j == 0 else c_out, c_out, 2 if j == 0 and i else 1) for j in range(count)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = c_out
        self.fc = nn.Linear(c_in, num_classes)
        self.feature_info = maps(*((f"layer{i + 1}", width, 2**i) for i, width in enumerate(widths)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        x = self.stem(x)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """Pooled features."""
        return features.mean((2, 3))


def resnet_rs(
    num_classes: int = 10,
    in_chans: int = 3,
    depth: int | None = None,
    layers: Sequence[int] = (1, 1, 1),
    widths: Sequence[int] = (16, 32, 64),
    drop_path: float = 0.0,
) -> nn.Module:
    """timm's ``resnetrs{depth}`` for a depth of 50 to 420 (photographs, see :data:`SIZES`), else :class:`SmallResNetRs`.

    ``drop_path`` is the last block's chance to be skipped in training (stochastic depth); the paper has 0.1 from 200 layers on.
    """
    if depth is None:
        if len(layers) != len(widths) or not layers:
            raise Mistake(f"resnet-rs: layers={tuple(layers)} and widths={tuple(widths)} must have one number a stage each")
        if drop_path:
            raise Mistake(f"resnet-rs: drop_path={drop_path} needs one of timm's sizes; give depth=50 or more, or leave it 0")
        return SmallResNetRs(num_classes, in_chans, layers, widths)
    if depth not in BLOCKS:
        raise Mistake(f"resnet-rs: depth={depth}: must be one of {', '.join(map(str, BLOCKS))}; small images take --model resnet-rs20")
    import timm

    return timm.create_model(f"resnetrs{depth}", num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path)
