"""Claim of halonet: blocks that look over their border beat walled ones and convolutions of equal size, and blocking is quick."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from convince.backbones.halonet import Bottleneck
from convince.claims import Bench, Numbers, Paired, column, paired, pooled
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve

TARGET = {"model": "halonet-mini", "data": "digits", "accuracy": 0.95}  # a convolution at its entry, attention after it
SAYS = (
    "1. A halo of one pixel around the blocks of local attention raises accuracy. 2. The network is more accurate than one with 3x3 convolutions of equal "
    "parameters. 3. Blocks with a halo are at least twice as quick as a window gathered for each pixel."
)
SUPPORTED = (
    "1. halo 1 - halo 0 is at least +0.5 points of test accuracy in the mean with its 95 % paired t interval above 0; 2. the interval of halo 1 - convolutions "
    "is above 0; and 3. the median time of the window a pixel is at least 2 times that of blocks."
)
CONTRADICTED = "1. or 2. has its interval below 0; or 3. blocks are slower."
BUDGET = (
    "cifar10 mean-pooled to 16x16, 2,000 training and 3,000 test images, halonet-mini (stem 3x3 24, stages of 1, 2, 1 blocks at 16, 8 and 4 px, blocks of 4); "
    "halo 0 has 384 numbers fewer in its relative tables (0.5 %). AdamW 0.002, weight decay 0.05, cosine, batch 64, 6 epochs (186 steps), fp32; 4 paired "
    "seeds of halo 0 and 1; 3 seeds of 3x3 convolutions, widths 17, 33, 65 (0.5 % fewer parameters); 2 seeds of the control, halo 1 filled with zeros instead "
    "of neighbours. 3: forward and backward of one layer, 8 maps of 32x32x32, 2 heads, blocks of 8 with halo 3 against 7x7 windows by unfold with relative "
    "tables too, 20 times in turn, medians. Against the catalogue: 2,000 of 3,000 training and 3,000 of 5,000 test images, 6 of 8 epochs, batch 64 for 128 "
    "(its 184 steps are kept); the control on 2 seeds."
)


@final
class Walled(nn.Module):
    """The control: each block attends alone, and its halo holds zeros where its neighbours were."""

    def __init__(self, attn: HaloAttn) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        (h, w), b, s = x.shape[2:], self.attn.block_size, self.attn.block_stride
        x = F.pad(x, (0, -w % b, 0, -h % b))
        blocks = x.unflatten(3, (-1, b)).unflatten(2, (-1, b)).permute(0, 2, 4, 1, 3, 5)
        y = self.attn(blocks.flatten(0, 2)).unflatten(0, blocks.shape[:3]).permute(0, 3, 1, 4, 2, 5)
        return y.flatten(4).flatten(2, 3)[:, :, : -(-h // s), : -(-w // s)]


def walled(model: nn.Module) -> nn.Module:
    """The network with :class:`Walled` attention, weights as they are."""
    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.attn = Walled(block.attn.attn)  # type: ignore[assignment]
    return model


def convolved(model: nn.Module) -> nn.Module:
    """The network with a 3x3 convolution in the place of each attention."""
    for block in model.modules():
        if isinstance(block, Bottleneck):
            attn: Any = block.attn.attn
            block.attn = nn.Conv2d(attn.q.in_channels, attn.dim_out_v, 3, attn.block_stride, 1, bias=False)  # type: ignore[assignment]
            nn.init.kaiming_normal_(block.attn.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    return model


@final
class Windowed(nn.Module):
    """Local attention as one would write it: the keys and values of each pixel's window gathered for it, relative tables as in the blocked one."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.rows = nn.Parameter(torch.randn(side, dim // heads) * (dim // heads) ** -0.5)
        self.columns = nn.Parameter(torch.randn(side, dim // heads) * (dim // heads) ** -0.5)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        q, k, v = self.qkv(x).chunk(3, 1)
        k, v = (F.unfold(t, self.side, padding=self.side // 2).unflatten(1, (self.heads, -1, self.side**2)) for t in (k, v))
        q = q.flatten(2).unflatten(1, (self.heads, -1))
        relative = (self.rows[:, None] + self.columns).flatten(0, 1)
        logits = torch.einsum("nhdp,nhdkp->nhkp", q, k) * q.shape[2] ** -0.5 + torch.einsum("nhdp,kd->nhkp", q, relative)
        return torch.einsum("nhkp,nhdkp->nhdp", logits.softmax(2), v).flatten(1, 2).view_as(x)


def race(repeats: int, n: int) -> dict[str, float]:
    """Median milliseconds of forward and backward, blocks and windows in turn."""
    x = torch.randn(n, 32, 32, 32, generator=generator("halonet", "race"))
    layers = {"blocks": HaloAttn(32, num_heads=2, dim_head=16, block_size=8, halo_size=3), "windows": Windowed(32, 2, 7)}
    spent: dict[str, list[float]] = {name: [] for name in layers}
    for i in range(repeats + 2):  # the first two warm up
        for name, layer in layers.items():
            began = time.perf_counter()
            layer(x.clone().requires_grad_()).square().sum().backward()
            if i > 1:
                spent[name].append(1000 * (time.perf_counter() - began))
    medians = {name: statistics.median(times) for name, times in spent.items()}
    return {**{f"{name}_ms": value for name, value in medians.items()}, "ratio": medians["windows"] / medians["blocks"]}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 1, 3) if small else ("cifar10", 2000, 3000, 6, 4)
    arms: dict[str, tuple[int, str, Callable[[nn.Module], nn.Module]]] = {
        "halo 0": (seeds, "halo=0", lambda model: model),
        "halo 1": (seeds, "halo=1", lambda model: model),
        "convolutions": (3, "widths=(17,33,65),heads=(1,1,1)", convolved),
        "halo of zeros": (2, "halo=1", walled),
    }
    for seed in range(seeds):
        data = pooled(bench.data(name, train=train, test=test, seed=seed))
        for arm, (count, options, change) in arms.items():
            if seed < count:
                bench.arm(arm, seed, partial(cell, data, seed, epochs, options, change))
    bench.arm("race", 0, partial(race, 3 if small else 20, 1 if small else 8))


def cell(data: Any, seed: int, epochs: int, options: str, change: Callable[[nn.Module], nn.Module]) -> dict[str, float]:
    """One training of the small network, changed."""
    how = settings(
        model=f"halonet-mini:{options}",
        parts=("adamw:lr=0.002,weight_decay=0.05",),
        epochs=epochs,
        batch=64,
        precision="fp32",
        augment="none",
        seed=seed,
    )
    run = prepare(resolve(how, data)[0], data)
    build = run.build
    run.build = lambda: change(build())
    fit(run)
    test = run.evaluate("test")
    return {"accuracy": test.accuracy, "log_loss": test.log_loss, "parameters": sum(p.numel() for p in run.model.parameters())}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(arm: str, base: str) -> Paired:
        mine, theirs = column(numbers, arm, "accuracy"), column(numbers, base, "accuracy")
        n = min(len(mine), len(theirs))
        return paired(f"accuracy, {arm} - {base}", mine[:n], theirs[:n])

    halo, conv, control = gain("halo 1", "halo 0"), gain("halo 1", "convolutions"), gain("halo of zeros", "halo 0")
    ratio = numbers["race"]["0"]["ratio"]
    facts: dict[str, float] = {"window a pixel / blocks, time": ratio, **{k: v for k, v in numbers["race"]["0"].items() if k != "ratio"}}
    facts |= {f"{arm}: parameters": column(numbers, arm, "parameters")[0] for arm in numbers if arm != "race"}
    comparisons = [halo, conv, control, facts]
    if halo.high < 0 or conv.high < 0 or ratio < 1:
        return "contradicted", comparisons
    if halo.mean >= 0.005 and halo.low > 0 and conv.low > 0 and ratio >= 2:
        return "supported", comparisons
    return "inconclusive", comparisons
