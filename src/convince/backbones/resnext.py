"""ResNeXt: a residual network whose 3x3 convolution is split into many equal paths; their number is a size like depth and width."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="resnext",
    kind="backbone",
    paper="resnext",
    title="Aggregated Residual Transformations for Deep Neural Networks",
    year=2017,
    url="https://arxiv.org/abs/1611.05431",
    accepts=("image",),
    departs=(
        "sizes 50 and 101 are timm's with the last norm of a block started at one, as in the paper; timm itself starts it at zero",
        "the paper's training recipe is not part of the network: SGD 0.1, divided by ten twice or thrice, weight decay 1e-4 or 5e-4",
    ),
    tiny={"depth": 11, "cardinality": 2, "width": 2, "outputs": (8, 12)},
    variants={
        "resnext-mini": {"depth": 11, "cardinality": 8, "width": 4, "outputs": (64, 128, 256)},
        "resnext29-1x64d": {"depth": 29, "cardinality": 1, "width": 64},
        "resnext29-8x64d": {"depth": 29, "cardinality": 8, "width": 64},
        "resnext29-16x64d": {"depth": 29, "cardinality": 16, "width": 64},
        "resnext50-32x4d": {"depth": 50, "cardinality": 32, "width": 4, "stem": "photo"},
        "resnext101-32x4d": {"depth": 101, "cardinality": 32, "width": 4, "stem": "photo"},
        "resnext101-64x4d": {"depth": 101, "cardinality": 64, "width": 4, "stem": "photo"},
    },
    small=("resnext-mini",),
    published={
        "resnext29-1x64d": {"size": 32, "classes": 10, "parameters": 4914250, "macs": 0.75e9},
        "resnext29-8x64d": {"size": 32, "classes": 10, "parameters": 34426698, "macs": 5.39e9},
        "resnext29-16x64d": {"size": 32, "classes": 10, "parameters": 68155210, "macs": 10.69e9},
        "resnext50-32x4d": {"size": 224, "classes": 1000, "parameters": 25028904, "macs": 4.23e9},
        "resnext101-32x4d": {"size": 224, "classes": 1000, "parameters": 44177704, "macs": 7.97e9},
        "resnext101-64x4d": {"size": 224, "classes": 1000, "parameters": 83455272, "macs": 15.46e9},
    },
)
OUTPUTS = (256, 512, 1024)
PHOTO = (50, 101)


def path_weights(cardinality: int, width: int, channels: int = 256) -> int:
    """The weights of a block's ``cardinality`` paths of ``width`` channels between ``channels`` in and out: ``C (c d + 9 d d + d c)`` (eq. 4)."""
    return cardinality * (2 * channels * width + 9 * width * width)


def match_width(cardinality: int, budget: int, channels: int = 256) -> int:
    """The largest width whose :func:`path_weights` exceed ``budget`` by at most 3 %: 4 for 32 paths at the cost of one of 64 (Table 2).

    Raises Mistake where even a width of 1 costs more.
    """
    width = 0
    while path_weights(cardinality, width + 1, channels) <= 1.03 * budget:
        width += 1
    if width == 0:
        raise Mistake(
            f"match_width: {cardinality} paths of width 1 between {channels} channels take {path_weights(cardinality, 1, channels):,} weights, more than "
            f"3 % above the budget of {budget:,}; take fewer paths"
        )
    return width


@final
class Block(nn.Module):
    """Conv1x1, BN, ReLU, 3x3 in ``cardinality`` groups, BN, ReLU, 1x1, BN, plus the input (projected where the shape changes), ReLU (Fig. 3c).

    Takes [n c_in h w], gives [n c_out i j]; the stride stands in the 3x3. ``width`` are the channels of one path.
    """

    def __init__(self, c_in: int, width: int, cardinality: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        d = width * cardinality
        self.conv1 = nn.Conv2d(c_in, d, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(d)
        self.conv2 = nn.Conv2d(d, d, 3, stride, 1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(d)
        self.conv3 = nn.Conv2d(d, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.act1, self.act2, self.act3 = nn.ReLU(inplace=True), nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return self.act3(self.bn3(self.conv3(y)) + self.downsample(x))


@final
class Paths(nn.Module):
    """A block written out as separate paths, with that block's weights: the same function, slower, for reading and tests.

    ``form`` "a": each path has its own last 1x1, and their outputs are added (Fig. 3a); "b": the paths are joined after the
    3x3 and one 1x1 follows (Fig. 3b). ``block`` is ours or timm's ``Bottleneck``; it is not changed.
    """

    def __init__(self, block: Any, form: Literal["a", "b"]) -> None:
        super().__init__()
        self.form, c = form, block.conv2.groups
        d = block.conv2.out_channels // c
        self.paths, self.merge = nn.ModuleList(), nn.ModuleList()
        for rows in (slice(i * d, (i + 1) * d) for i in range(c)):
            first = (_conv(block.conv1, block.conv1.weight[rows]), _norm(block.bn1, rows), nn.ReLU())
            self.paths.append(nn.Sequential(*first, _conv(block.conv2, block.conv2.weight[rows]), _norm(block.bn2, rows), nn.ReLU()))
            if form == "a":
                self.merge.append(_conv(block.conv3, block.conv3.weight[:, rows]))
        if form == "b":
            self.merge.append(copy.deepcopy(block.conv3))
        self.bn3, self.act3 = copy.deepcopy(block.bn3), nn.ReLU()
        self.downsample: nn.Module = nn.Identity() if block.downsample is None else copy.deepcopy(block.downsample)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        ys = [path(x) for path in self.paths]
        ys = ys if self.form == "a" else [torch.cat(ys, 1)]
        y = torch.stack([last(y) for last, y in zip(self.merge, ys, strict=True)]).sum(0)
        return self.act3(self.bn3(y) + self.downsample(x))


def _conv(like: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    """A convolution as ``like`` with a copy of these weights, in one group."""
    conv = skip_init(nn.Conv2d, weight.shape[1], weight.shape[0], like.kernel_size, like.stride, like.padding, bias=False)
    conv.weight = nn.Parameter(weight.detach().clone())
    return conv


def _norm(like: nn.BatchNorm2d, rows: slice) -> nn.BatchNorm2d:
    """The batch norm of these channels of ``like``: statistics and weights are per channel, so it may be cut."""
    norm = nn.BatchNorm2d(rows.stop - rows.start, like.eps).to(like.weight)
    norm.load_state_dict({name: value[rows] if value.dim() else value for name, value in like.state_dict().items()})
    return norm.train(like.training)


def as_form(model: nn.Module, form: Literal["a", "b"]) -> nn.Module:
    """A copy of a ResNeXt, ours or timm's, with every block written out in ``form`` (:class:`Paths`): equal scores, in training mode too.

    Raises Mistake for a network without grouped 3x3 blocks, and for another form; "c", grouped convolutions, is the network as it is.
    """
    if form not in ("a", "b"):
        raise Mistake(f"as_form: form={form!r} must be 'a' (paths added at their ends) or 'b' (joined before the last 1x1)")
    made = copy.deepcopy(model)
    found = [name for name, m in made.named_modules() if all(hasattr(m, word) for word in ("conv1", "bn2", "conv3", "downsample")) and m.conv2.groups > 1]
    if not found:
        raise Mistake(f"as_form: {type(model).__name__} has no blocks of grouped convolutions; build it by --model resnext-mini")
    for name in found:
        made.set_submodule(name, Paths(made.get_submodule(name), form))
    return made


@final
class SmallResNeXt(Headed):
    """A 3x3 stem that keeps the side, three stages of :class:`Block`, mean over positions, a linear head (section 5.3).

    ``blocks`` a stage; ``outputs`` are the stages' channels; the paths' width doubles and the side halves in each after the first.
    """

    def __init__(self, num_classes: int, in_chans: int, blocks: int, cardinality: int, width: int, outputs: Sequence[int], stem: int = 64) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.num_features, self.stages = num_classes, in_chans, outputs[-1], len(outputs)
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = nn.ReLU(inplace=True)
        c_in = stem
        for i, c_out in enumerate(outputs):
            units = [Block(c_out if j else c_in, width * 2**i, cardinality, c_out, 2 if i and not j else 1) for j in range(blocks)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*units))
            c_in = c_out
        self.fc = nn.Linear(c_in, num_classes)
        self.feature_info = maps(*((f"layer{i + 1}", c, 2**i) for i, c in enumerate(outputs)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        x = self.act1(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))


def resnext(
    num_classes: int = 10,
    in_chans: int = 3,
    depth: int = 29,
    cardinality: int = 8,
    width: int = 64,
    outputs: Sequence[int] = OUTPUTS,
    stem: Literal["small", "photo"] = "small",
) -> nn.Module:
    """:class:`SmallResNeXt` for images up to about 64 px, or with ``stem="photo"`` timm's ResNeXt of depth 50 or 101.

    ``depth`` of a small network is 9 a block and stage, and 2: 11, 20, 29 ...; ``cardinality`` paths of ``width`` channels each;
    ``outputs``: channels of the small network's stages (a photograph network has 256, 512, 1024, 2048).
    """
    if cardinality < 1 or width < 1:
        raise Mistake(f"resnext: cardinality={cardinality}, width={width}: a block needs at least one path of one channel")
    if stem == "photo":
        if depth not in PHOTO or tuple(outputs) != OUTPUTS:
            raise Mistake(f"resnext: depth={depth}, outputs={tuple(outputs)}: with stem=photo the depth is 50 or 101 and outputs are fixed; leave them out")
        import timm

        how: dict[str, Any] = {"cardinality": cardinality, "base_width": width, "zero_init_last": False}
        return timm.create_model(f"resnext{depth}_32x4d", num_classes=num_classes, in_chans=in_chans, **how)
    if depth < 11 or (depth - 2) % 9 or not outputs:
        raise Mistake(f"resnext: depth={depth}, outputs={tuple(outputs)}: depth is 9 a block and 2 (11, 20, 29 ...); 50 and 101 need stem=photo")
    return SmallResNeXt(num_classes, in_chans, (depth - 2) // 9, cardinality, width, outputs)
