"""Eca: channel attention made of one tiny 1-D convolution over the pooled channel vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from convince.errors import Mistake
from convince.layers.places import channels, residual_blocks
from convince.layers.surgery import Surgery, attach, refuse_nothing
from convince.parts import Card

CARD = Card(
    part="eca",
    kind="layer",
    title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
    paper="eca-net",
    year=2019,
    url="https://arxiv.org/abs/1910.03151",
    departs=(
        "the adaptive kernel has at least 3 taps, as timm reads eq. 12; the rule itself gives 1 below 8 channels",
        "k='adaptive' (eq. 12) is the default; the released nets set k by hand, a stage each: RELEASED",
        "every block's gate comes after its last normalisation layer, found by the block's attributes and not by its class",
    ),
    expects=("images",),
    tiny={"k": 3},
)

RELEASED: dict[str, tuple[int, ...]] = {
    "resnet18": (3, 5, 7, 7),
    "resnet34": (3, 3, 5, 7),
    "resnet50": (3, 5, 5, 7),
    "resnet101": (3, 3, 5, 7),
    "resnet152": (3, 3, 5, 7),
    "mobilenet_v2": (1, 1, 1, 1, 3, 3, 3),
}
"""The kernel sizes of the paper's released ImageNet nets, for ``install(model, k=RELEASED[...])``."""


def kernel_size(channels: int, gamma: float = 2, b: float = 1) -> int:
    """The nearest odd number of ``|(log2 C + b) / gamma|`` (eq. 12), at least 3: 64 -> 3, 256 -> 5, 2048 -> 7."""
    t = int(abs((math.log2(channels) + b) / gamma))
    return max(t if t % 2 else t + 1, 3)


def gates(pooled: Float[Tensor, "n c"], weight: Float[Tensor, " k"]) -> Float[Tensor, "n c"]:
    """``sigmoid(C1D_k(y))`` (eq. 7): each channel's gate from its ``k`` neighbours, zeros beyond the ends."""
    y = F.conv1d(pooled[:, None], weight.view(1, 1, -1), padding=(weight.numel() - 1) // 2)
    return y[:, 0].sigmoid()


def eca(x: Float[Tensor, "n c h w"], weight: Float[Tensor, " k"]) -> Float[Tensor, "n c h w"]:
    """Each channel times its gate, made from the spatial means of its neighbours."""
    return x * gates(x.mean((2, 3)), weight)[:, :, None, None]


@final
class Eca(nn.Module):
    """:func:`eca` with a learned kernel of ``k`` taps; ``k="adaptive"`` asks :func:`kernel_size`.

    ``k=1`` scales each channel by itself: no interaction. Parameters: ``k``. ``install`` also takes a tuple, one ``k`` a stage.
    """

    def __init__(self, channels: int, k: int | str = "adaptive", gamma: float = 2, b: float = 1) -> None:
        super().__init__()
        size = kernel_size(channels, gamma, b) if k == "adaptive" else k
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2 == 0:
            raise Mistake(f"eca: k={k!r} must be 'adaptive' or an odd number of channels, such as 3")
        if not gamma > 0:
            raise Mistake(f"eca: gamma={gamma!r} must be positive; the paper uses 2")
        self.k = size
        self.conv = nn.Conv1d(1, 1, size, padding=(size - 1) // 2, bias=False)

    def gates(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c"]:
        """The gate of each channel, 0 to 1."""
        return self.conv(x.mean((2, 3))[:, None])[:, 0].sigmoid()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x * self.gates(x)[:, :, None, None]

    def extra_repr(self) -> str:
        return f"k={self.k}"


# -- where a gate goes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """The last normalisation layer of a residual branch, where a gate goes: its name, its stage from 0, its channels, itself."""

    name: str
    stage: int
    channels: int
    norm: nn.Module


def residual_ends(model: nn.Module) -> list[End]:
    """Where each residual branch ends, before the addition, in order; pre-activation blocks, which end in a convolution, have none."""
    return [End(block.end[0], block.stage, channels(block.end[1]), block.end[1]) for block in residual_blocks(model) if block.end is not None]


def gate(model: nn.Module, part: str, make: Callable[[End], nn.Module]) -> Surgery:
    """Put ``make(end)`` behind the norm at each residual branch's end, as its child ``part``. Raises Mistake where there is no such branch."""
    ends = {end.name: end for end in residual_ends(model)}
    refuse_nothing(ends, model, part, "residual blocks with normalisation", "choose a residual network such as resnet20")
    return attach(model, part, [(name, end.norm) for name, end in ends.items()], lambda name, norm: make(ends[name]))


def install(model: nn.Module, k: int | str | Sequence[int] = "adaptive", gamma: float = 2, b: float = 1) -> Surgery:
    """Gate each residual branch of ``model`` before its addition, in place.

    ``k``: "adaptive" by width, one odd number, or one for each stage (:data:`RELEASED`). Existing parameter names stay;
    the new ones are called ``layer1.0.bn2.eca.conv.weight``. Raises Mistake for a network without residual blocks.
    """
    if isinstance(k, (tuple, list)):
        count = len({end.stage for end in residual_ends(model)})
        if count and len(k) != count:
            raise Mistake(f"eca: k={tuple(k)} names {len(k)} stages, and {type(model).__name__} has {count}; give one odd number for each, or k='adaptive'")
    return gate(model, "eca", lambda end: Eca(end.channels, k[end.stage] if isinstance(k, (tuple, list)) else k, gamma, b))  # type: ignore[arg-type]


@torch.no_grad()
def attention_stats(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], k: int) -> dict[str, Tensor]:
    """The mean gates [k c] of each class at each gated layer (the paper's Fig. 4 to 6), in the model's present mode.

    ``batches`` gives inputs and class numbers [n], 0 to ``k - 1``; a class without images has NaN. Hooks are taken off again.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, Eca)}
    if not found:
        raise Mistake(f"attention_stats: {type(model).__name__} holds no eca layer; install(model) adds them")
    seen: dict[str, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, inputs, name=name: seen.__setitem__(name, m.gates(inputs[0]))) for name, m in found.items()]
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(k)
    try:
        for x, y in batches:
            model(x)
            one = F.one_hot(y, k).to(torch.float64)
            counts = counts + one.sum(0)
            for name, value in seen.items():
                sums[name] = sums.get(name, 0) + one.T @ value.to(torch.float64)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[:, None] for name, total in sums.items()}
