"""Scaled residual: every residual branch times a small number, so that a deep network needs no normalisation."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convince.errors import Mistake
from convince.layers.places import residual_blocks
from convince.layers.surgery import Surgery, attach, find, refuse_nothing, swap
from convince.parts import Card

CARD = Card(
    part="scaled-residual",
    kind="layer",
    paper="residual-expansion",
    title="On residual network depth",
    year=2025,
    url="https://arxiv.org/abs/2510.03470",
    strength="lam",
    off=1.0,
    departs=(
        "n counts the residual branches of the whole network, also of stages that a projection parts; a transformer block has two",
        "networks keep their normalisation unless norms=false; the paper studies networks without",
        "where norms are taken away, their learned scale and shift by channel stay, so that biases are not lost",
    ),
)
WORDS = {"1/n": lambda n: 1 / n, "1/sqrt(n)": lambda n: 1 / math.sqrt(n)}
_LAST = ("drop_path", "drop_path1", "drop_path2")  # timm's, at the end of a branch, an Identity where nothing is dropped


def scale(lam: float | str, n: int) -> float:
    """The number that ``lam`` means for ``n`` branches: "1/n", "1/sqrt(n)", or itself."""
    if isinstance(lam, str) and lam in WORDS:
        return WORDS[lam](n)
    if isinstance(lam, (str, bool)) or not math.isfinite(lam) or lam < 0:
        raise Mistake(f"scaled-residual: lam={lam!r} must be '1/n', '1/sqrt(n)', or a number of at least 0 (1 is off)")
    return float(lam)


@final
class ScaledResidual(nn.Module):
    """``lam`` times what a residual branch hands on; ``learn`` makes lam a parameter, which with lam=0 is SkipInit."""

    def __init__(self, lam: float = 1.0, learn: bool = False) -> None:
        super().__init__()
        self.learn = learn
        self.lam: float | nn.Parameter = nn.Parameter(torch.full((), lam)) if learn else lam

    def forward(self, x: Tensor) -> Tensor:
        return self.lam * x

    def extra_repr(self) -> str:
        lam = self.lam.item() if isinstance(self.lam, nn.Parameter) else self.lam
        return f"lam={lam:g}" + (", learned" if self.learn else "")


@final
class Unnormalised(nn.Module):
    """What is left of a batch norm without its statistics: scale and shift by channel, and the activation that timm puts inside."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight  # type: ignore[assignment]
        self.bias: nn.Parameter = norm.bias  # type: ignore[assignment]
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return self.act(self.drop(x * self.weight.view(shape) + self.bias.view(shape)))


def branch_ends(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The last module of each residual branch, before its addition, in order.

    In timm's blocks that is the place of drop-path, of which a transformer block has two; in others the last norm. Blocks that add nothing, since a
    stride or a change of width forbids it, have none, nor have pre-activation blocks without drop-path.
    """
    alone = {name for name, m in model.named_modules() if getattr(m, "has_skip", True) is False or getattr(m, "use_res_connect", True) is False}
    ends = {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in _LAST and name.rpartition(".")[0] not in alone}
    parents = {name.rpartition(".")[0] for name in ends}
    for block in residual_blocks(model):
        if block.name not in alone and block.end is not None and not any(p == block.name or p.startswith(block.name + ".") for p in parents):
            ends[block.end[0]] = block.end[1]
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    return sorted(ends.items(), key=lambda row: order[row[0]])


def install(model: nn.Module, lam: float | str = "1/n", learn: bool = False, norms: bool = True) -> Surgery:
    """Multiply every residual branch by ``lam`` before its addition, in place: "1/n" or "1/sqrt(n)" for n branches, or a number; 1 is off.

    ``learn``: lam becomes a parameter of each branch, from there (lam=0 is SkipInit). ``norms=False`` takes all batch normalisation away,
    after which the rates made for it are too high: try adamw:lr=0.001. Raises Mistake for a network without residual branches, and for branches that
    would stay silent.
    """
    ends = branch_ends(model)
    refuse_nothing(ends, model, "scaled-residual", "residual branches that it knows the end of", "choose a network such as resnet20 or timm/test_vit")
    value = scale(lam, len(ends))
    if value == 0 and not learn:
        raise Mistake("scaled-residual: lam=0 silences every branch for good; give learn=true with it (SkipInit), or a lam above 0")
    done = Surgery()
    if not norms:
        known = find(model, types=(_BatchNorm,))
        refuse_nothing(known, model, "scaled-residual", "batch normalisation to take away", "leave norms=true")
        if any(not m.affine for _, m in known):
            raise Mistake(f"scaled-residual: {type(model).__name__} has batch norms without scale and shift, which norms=false cannot replace")
        done = swap(model, known, lambda name, norm: Unnormalised(norm))
        now = dict(model.named_modules())
        ends = [(name, now[name]) for name, _ in ends]
    return done + attach(model, "scaled_residual", ends, lambda name, module: ScaledResidual(value, learn))
