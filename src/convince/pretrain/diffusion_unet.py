"""A small U-Net that tells the noise in a noisy image, its blocks named, and the noise schedules it is trained with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake

STEPS = 1000  # T, the noise levels
SCHEDULES = ("linear", "cosine")


def kept_signal(schedule: str = "linear", steps: int = STEPS) -> Float[Tensor, " t"]:
    """``abar_t``, the share of the image's variance that is left at noise level t, in double precision.

    "linear": the product of ``1 - beta``, beta from 1e-4 to 0.02 (Ho et al. 2020); "cosine": ``cos^2`` of
    ``(t / T + 0.008) / 1.008 * pi / 2``, beta at most 0.999 (Nichol and Dhariwal 2021).
    """
    if schedule not in SCHEDULES:
        raise Mistake(f"schedule={schedule!r}: the noise grows as one of {', '.join(SCHEDULES)}")
    if schedule == "linear":
        return (1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0)
    f = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).square()
    return (f[1:] / f[:-1]).clamp_min(0.001).cumprod(0)


def q_sample(x: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], kept: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` (section 3)."""
    kept = kept.view(-1, 1, 1, 1)
    return kept.sqrt().to(x) * x + (1 - kept).sqrt().to(x) * noise


def groups(channels: int) -> nn.GroupNorm:
    """GroupNorm of up to eight groups, each of four channels or more: in a group of one, the time that is added would vanish."""
    return nn.GroupNorm(math.gcd(8, max(channels // 4, 1)), channels)


def rest(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution that begins at 0, so that its block begins as the identity."""
    with torch.no_grad():
        for p in conv.parameters():
            p.zero_()
    return conv


@final
class Residual(nn.Module):
    """GN - SiLU - conv3x3, plus the time, GN - SiLU - conv3x3, plus the input."""

    def __init__(self, a: int, b: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1, self.time = groups(a), nn.Conv2d(a, b, 3, padding=1), nn.Linear(time, b)
        self.norm2, self.conv2 = groups(b), rest(nn.Conv2d(b, b, 3, padding=1))
        self.skip: nn.Module = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

    def forward(self, x: Float[Tensor, "n a h w"], time: Float[Tensor, "n e"]) -> Float[Tensor, "n b h w"]:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


@final
class Attention(nn.Module):
    """Self-attention over all places of a map, added to it; heads of up to 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // math.gcd(64, channels)
        self.norm, self.qkv, self.out = groups(channels), nn.Conv2d(channels, 3 * channels, 1), rest(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n d h w"]:
        n, d, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.heads, d // self.heads, h * w).transpose(3, 4).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, d, h, w)
        return x + self.out(mixed)


@final
class Block(nn.Module):
    """One numbered block: a residual block, attention where asked for, then half or double the side."""

    def __init__(self, a: int, b: int, time: int, attention: bool = False, doubles: bool = False) -> None:
        super().__init__()
        self.residual = Residual(a, b, time)
        self.attention: nn.Module = Attention(b) if attention else nn.Identity()
        self.up: nn.Module = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(b, b, 3, padding=1)) if doubles else nn.Identity()

    def forward(self, x: Float[Tensor, "n a h w"], time: Float[Tensor, "n e"]) -> Tensor:
        return self.up(self.attention(self.residual(x, time)))


@final
class DiffusionUNet(nn.Module):
    """The noise in ``x_t`` at level ``t``. Blocks are named in the order they run: ``in.0`` (a convolution) ..., ``mid``, ``out.0`` ...

    A level has ``mult`` times ``width`` channels and ``depth`` residual blocks on the way in, one more on the way out; a
    convolution of stride 2 ends each level but the last. The last ``attention`` levels attend. With width 256, mult
    (1, 1, 2, 2, 4, 4), depth 2 and attention 3 the blocks are the 37 of the paper's network.
    """

    def __init__(self, in_chans: int = 3, width: int = 32, mult: Sequence[int] = (1, 2, 2), depth: int = 1, attention: int = 1) -> None:
        super().__init__()
        self.width, self.levels = width, len(mult)
        time = 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        first = nn.Conv2d(in_chans, width, 3, padding=1)
        ins: list[nn.Module] = [first]
        left, d = [width], width  # channels that wait for their way out
        shapes = [(width, 0)]
        for level, m in enumerate(mult):
            for _ in range(depth):
                ins.append(Block(d, m * width, time, level >= len(mult) - attention))
                d = m * width
                left.append(d)
                shapes.append((d, level))
            if level < len(mult) - 1:
                ins.append(nn.Conv2d(d, d, 3, stride=2, padding=1))
                left.append(d)
                shapes.append((d, level + 1))
        outs: list[nn.Module] = []
        middle = d
        shapes.append((middle, len(mult) - 1))
        for level, m in reversed(list(enumerate(mult))):
            for i in range(depth + 1):
                outs.append(Block(d + left.pop(), m * width, time, level >= len(mult) - attention, doubles=level > 0 and i == depth))
                d = m * width
                shapes.append((d, level - int(level > 0 and i == depth)))
        self.ins, self.mid, self.outs = (
            nn.ModuleList(ins),
            nn.ModuleList([Block(middle, middle, time, True), Residual(middle, middle, time)]),
            nn.ModuleList(outs),
        )
        self.noise = nn.Sequential(groups(d), nn.SiLU(), rest(nn.Conv2d(d, in_chans, 3, padding=1)))
        self.shapes = dict(zip(self.names, shapes, strict=True))  # of each block: channels, and how often its map was halved

    @property
    def names(self) -> list[str]:
        """All blocks, first to last."""
        return [*(f"in.{i}" for i in range(len(self.ins))), "mid", *(f"out.{j}" for j in range(len(self.outs)))]

    def check(self, block: str) -> None:
        """Refuse a name that is no block's."""
        if block not in self.names:
            raise Mistake(f"block={block!r}: this U-Net has in.0 to in.{len(self.ins) - 1}, mid, and out.0 to out.{len(self.outs) - 1}")

    def walk(self, x: Float[Tensor, "n c h w"], t: Int[Tensor, " n"]) -> Iterator[tuple[str, Float[Tensor, "n d i j"]]]:
        """Each block's name and map, as they run."""
        time = F.silu(self.time(time_embedding(t, self.width).to(x)))
        left = []
        for i, block in enumerate(self.ins):
            x = block(x) if isinstance(block, nn.Conv2d) else block(x, time)
            left.append(x)
            yield f"in.{i}", x
        for part in self.mid:
            x = part(x, time)
        yield "mid", x
        for j, block in enumerate(self.outs):
            x = block(torch.cat([x, left.pop()], 1), time)
            yield f"out.{j}", x

    def features(self, x: Float[Tensor, "n c h w"], t: Int[Tensor, " n"], block: str) -> Float[Tensor, "n d i j"]:
        """The map of one block; what comes after it does not run."""
        self.check(block)
        return next(found for name, found in self.walk(x, t) if name == block)

    def forward(self, x: Float[Tensor, "n c h w"], t: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        for _, found in self.walk(x, t):
            last = found
        return self.noise(last)


def time_embedding(t: Int[Tensor, " n"], d: int) -> Float[Tensor, "n d"]:
    """Cosines, then sines, of t at ``d / 2`` frequencies from 1 down to 1/10,000."""
    rates = torch.exp(-math.log(10_000) * torch.arange(d // 2, device=t.device) / (d // 2))
    angle = t[:, None].double() * rates
    return torch.cat([angle.cos(), angle.sin()], 1)


def fitting(size: Sequence[int], step: int, most: int) -> tuple[int, int]:
    """Sides [px] no larger than ``size`` that divide by ``step``, the longer at most ``most``."""
    scale = min(most / max(size), 1)
    rows, columns = (max(round(side * scale) // step, 1) * step for side in size)
    return rows, columns
