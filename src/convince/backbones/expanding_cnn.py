"""Expanding CNN: a small network of blocks between poolings, whose blocks can be made deeper or wider without a change of its answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="expanding-cnn",
    kind="backbone",
    paper="self-expanding-cnn",
    title="Self Expanding Convolutional Neural Networks",
    year=2024,
    url="https://arxiv.org/abs/2401.05686",
    accepts=("image",),
    departs=(
        "the slope of each leaky ReLU is learnt, from 0.2 on, one number a layer; a new layer's is 1 at first, so that it hands on what it reads",
        "a new layer is the identity; the kernel that the authors' code calls so holds it at all nine places, and sums them",
        "a widened network keeps its batch norms and the order of its channels; the authors' code sets the norms back and mixes up the skip's channels",
        "the new channels' weights into the 1x1 convolution are small and random like all others; the authors' code has zeros there",
    ),
    tiny={"layers": (1, 2), "widths": (4, 6), "hidden": 8},
    variants={
        "expanding-cnn-start": {"layers": (1, 1, 1), "widths": (16, 16, 16)},
        "expanding-cnn-deeper1": {"layers": (1, 2, 1), "widths": (16, 16, 16)},
        "expanding-cnn-deeper2": {"layers": (1, 2, 2), "widths": (16, 16, 16)},
        "expanding-cnn-mini": {"layers": (2, 2, 2), "widths": (16, 32, 48), "hidden": 64},
    },
    small=("expanding-cnn-mini", "expanding-cnn-start"),
    published={
        "expanding-cnn-start": {"size": 32, "classes": 10, "parameters": 9024},
        "expanding-cnn-deeper1": {"size": 32, "classes": 10, "parameters": 11360},
        "expanding-cnn-deeper2": {"size": 32, "classes": 10, "parameters": 13696},
    },
    optimizer="adamw:lr=0.002,weight_decay=0.0",
)
SLOPE = 0.2


@final
class Unit(nn.Module):
    """conv3x3, dropout of whole maps, batch norm, leaky ReLU with a learnt slope. Only the first of a block has a bias and dropout."""

    def __init__(self, c_in: int, c_out: int, drop: float, first: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=first)
        self.drop = nn.Dropout2d(drop) if first else nn.Identity()
        self.bn = nn.BatchNorm2d(c_out)
        self.act = nn.PReLU(init=SLOPE)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        return self.act(self.bn(self.drop(self.conv(x))))


@final
class ExpandingCnn(Headed):
    """Blocks of :class:`Unit`, each followed by a 2x2 max-pool; the first block's output, pooled on, joins the last one's.

    Both go through a 1x1 convolution to a channel a class, are laid flat and read by a layer of ``hidden`` units, then by ``fc``. ``layers``
    and ``widths`` are units and channels of each block; ``drop`` is the share of maps that is dropped, half of it of hidden units. ``img_size``
    is rows and columns of the images. Raises Mistake.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        layers: Sequence[int] = (1, 1, 1),
        widths: Sequence[int] = (16, 16, 16),
        hidden: int = 20,
        drop: float = 0.1,
        img_size: Sequence[int] = (32, 32),
    ) -> None:
        super().__init__()
        self.grid = checked(layers, widths, hidden, drop, img_size)
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, hidden
        c_in = in_chans
        for b, (count, width) in enumerate(zip(layers, widths, strict=True)):
            setattr(self, f"layer{b + 1}", nn.Sequential(*(Unit(width if j else c_in, width, drop, not j) for j in range(count))))
            c_in = width
        self.blocks = len(layers)
        self.feature_info = maps(*((f"layer{b + 1}", width, 2**b) for b, width in enumerate(widths)))
        self.squeeze = nn.Conv2d(widths[-1] + widths[0], num_classes, 1)
        self.act = nn.LeakyReLU(SLOPE)
        flat = num_classes * math.prod(self.grid)
        self.hidden = nn.Sequential(nn.Linear(flat, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(SLOPE), nn.Dropout(drop / 2), nn.BatchNorm1d(hidden))
        self.fc = nn.Linear(hidden, num_classes)

    def block(self, b: int) -> nn.Sequential:
        """A block, from 0."""
        return getattr(self, f"layer{b + 1}")

    def units(self, b: int) -> list[Unit]:
        """The units of a block."""
        return list(self.block(b))  # type: ignore[arg-type]

    @property
    def layers(self) -> tuple[int, ...]:
        """Units of each block, as they are now."""
        return tuple(len(self.block(b)) for b in range(self.blocks))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each block, as they are now."""
        return tuple(self.units(b)[0].conv.out_channels for b in range(self.blocks))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k i j"]:
        """A map a class, of the last block and the skip."""
        x = skip = F.max_pool2d(self.block(0)(x), 2)
        for b in range(1, self.blocks):
            x, skip = F.max_pool2d(self.block(b)(x), 2), F.max_pool2d(skip, 2)
        return self.act(self.squeeze(torch.cat([x, skip], 1)))

    def pool(self, features: Float[Tensor, "n k i j"]) -> Float[Tensor, "n d"]:
        """The hidden layer over all places of all maps."""
        if features.shape[-2:] != self.grid:
            raise Mistake(f"expanding-cnn: maps of {tuple(features.shape[-2:])} places come, and it was made for {self.grid}; build it with img_size")
        return self.hidden(features.flatten(1))


def checked(layers: Sequence[int], widths: Sequence[int], hidden: int, drop: float, img_size: Sequence[int]) -> tuple[int, ...]:
    """Rows and columns of the last maps, or a Mistake that names the setting."""
    if not layers or len(layers) != len(widths) or min(*layers, *widths, hidden) < 1:
        raise Mistake(f"expanding-cnn: layers={tuple(layers)}, widths={tuple(widths)}, hidden={hidden}: one number of each a block, all at least 1")
    if not 0 <= drop < 1:
        raise Mistake(f"expanding-cnn: drop={drop}: a share of maps from 0 (none) to below 1; 0.1 is the paper's")
    grid = tuple(side // 2 ** len(layers) for side in img_size)
    if min(grid) < 1:
        raise Mistake(f"expanding-cnn: {len(layers)} blocks halve the sides of {tuple(img_size)} pixels below 1; give larger images or fewer blocks")
    return grid


def parameters(
    layers: Sequence[int], widths: Sequence[int], num_classes: int = 10, in_chans: int = 3, img_size: Sequence[int] = (32, 32), hidden: int = 20
) -> int:
    """How many numbers the network learns."""
    total, c_in = 0, in_chans
    for count, width in zip(layers, widths, strict=True):
        total += 9 * c_in * width + width + 9 * width**2 * (count - 1) + count * (2 * width + 1)
        c_in = width
    flat = num_classes * math.prod(side // 2 ** len(layers) for side in img_size)
    return total + num_classes * (widths[-1] + widths[0] + 1) + hidden * (flat + 1) + 4 * hidden + num_classes * (hidden + 1)


# -- growing ----------------------------------------------------------------------------------------


@torch.no_grad()
def grow(model: ExpandingCnn, kind: str, block: int, channels: int = 2, noise: float = 1e-4, seed: int = 0) -> None:
    """Make a block deeper by an identity layer (``kind`` "layer") or wider by ``channels`` ("channels"), in place.

    All that is new is ``noise`` times N(0, 1), drawn from ``seed``, beside the identity; at ``noise`` 0 the network computes the same as before.
    """
    gen = generator(seed, "expanding-cnn", kind, block)
    if kind == "layer":
        deepen(model, block, noise, gen)
    else:
        for name, axis, at in widened(model, block, channels):
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            old = getattr(module, leaf)
            value = noise * drawn(old, axis, channels, gen) if old.dim() == 4 else {"running_var": 1.0}.get(leaf, 1.0 * (leaf == "weight"))
            new = inserted(old, axis, at, channels, value)
            setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.out_channels, module.in_channels = module.weight.shape[:2]
            elif isinstance(module, nn.BatchNorm2d):
                module.num_features = len(module.weight)
    model.feature_info = maps(*((f"layer{b + 1}", width, 2**b) for b, width in enumerate(model.widths)))


def deepen(model: ExpandingCnn, block: int, noise: float, gen: Generator) -> None:
    """One more unit at the block's end: centre of the kernel the identity, slope 1."""
    width, like = model.widths[block], model.units(block)[0].conv.weight
    unit = Unit(width, width, 0.0, first=False)
    nn.init.dirac_(unit.conv.weight)
    unit.to(like.device, like.dtype).train(model.training)
    unit.conv.weight += noise * drawn(unit.conv.weight, 0, width, gen)
    unit.act.weight.fill_(1.0)
    model.block(block).append(unit)


def widened(model: ExpandingCnn, block: int, channels: int) -> list[tuple[str, int, int]]:
    """Where ``channels`` more channels of a block need room: the tensor's name, the axis, and the place on it, one after the other."""
    width, last, rows = model.widths[block], model.blocks - 1, list[tuple[str, int, int]]()
    for j, unit in enumerate(model.units(block)):
        path = f"layer{block + 1}.{j}."
        rows += [(path + "conv.weight", 0, width), *([(path + "conv.bias", 0, width)] if unit.conv.bias is not None else [])]
        rows += [(path + "conv.weight", 1, width)] if j else []
        rows += [(f"{path}bn.{leaf}", 0, width) for leaf in ("weight", "bias", "running_mean", "running_var")]
    if block < last:
        rows.append((f"layer{block + 2}.0.conv.weight", 1, width))
    at = 0
    for reads in (last, 0):  # what the 1x1 convolution reads, in this order
        at += model.widths[reads]
        if reads == block:
            rows.append(("squeeze.weight", 1, at))
            at += channels
    return rows


def inserted(tensor: Tensor, axis: int, at: int, count: int, value: Any) -> Tensor:
    """``tensor`` with ``count`` more places on ``axis`` from ``at`` on, filled with ``value``, a number or a tensor of their shape."""
    shape = [count if i == axis else n for i, n in enumerate(tensor.shape)]
    new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device).copy_(torch.as_tensor(value))
    return torch.cat([tensor.narrow(axis, 0, at), new, tensor.narrow(axis, at, tensor.shape[axis] - at)], axis)


def drawn(like: Tensor, axis: int, count: int, gen: Generator) -> Tensor:
    """N(0, 1) of the shape of ``like`` but for ``count`` places on ``axis``."""
    shape = [count if i == axis else n for i, n in enumerate(like.shape)]
    return torch.randn(shape, generator=gen).to(like.device, like.dtype)


@torch.no_grad()
def settle(model: ExpandingCnn, kind: str, block: int, channels: int, x: Float[Tensor, "n c h w"]) -> None:
    """Give what :func:`grow` has added the batch statistics of its own input on ``x``, in eval mode, so that it does in training what it does in use.

    A new layer's norm gives its input back: ``gamma = sqrt(var + eps)``, ``beta = mean``. New channels are normalised.
    """
    units = model.units(block)[-1:] if kind == "layer" else model.units(block)
    new = slice(None) if kind == "layer" else slice(-channels, None)

    def look(norm: Any, inputs: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        norm.running_mean[new], norm.running_var[new] = mean[new], var[new]
        if kind == "layer":
            norm.weight.copy_((var + norm.eps).sqrt())
            norm.bias.copy_(mean)

    modes = [(m, m.training) for m in model.modules()]
    hooks = [unit.bn.register_forward_pre_hook(look) for unit in units]
    try:
        model.eval()
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
