"""Occlusion: how much the chance of a class falls as a grey square slides over the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.maskers import check_masker, masked_scores
from convince.explain.passes import chances, scores
from convince.kinds import Explainer
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="occlusion",
    kind="explainer",
    title="Visualizing and Understanding Convolutional Networks",
    year=2013,
    url="https://arxiv.org/abs/1311.2901",
    expects=("images",),
    departs=(
        "the map is the fall of the chance, the mean over all windows on a pixel; the paper draws the chance itself at each place of the window",
        "the window is a sixth of the shorter side and moves by half of itself, where the paper names no size for all images",
    ),
    tiny={"window": 2, "stride": 2},
)


def places(side: int, window: int, stride: int) -> Bool[Tensor, "m side"]:
    """Where a window of ``window`` pixels that moves by ``stride`` lies on a side, true inside; the last may stand out over the edge."""
    starts = torch.arange(-(-max(side - window, 0) // stride) + 1)[:, None] * stride
    at = torch.arange(side)
    return (at >= starts) & (at < starts + window)


def occlusion(
    answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], window: int, stride: int, masker: str = "grey"
) -> Float[Tensor, "n 1 h w"]:
    """``Y(x) - Y(x without the window)``, for each pixel the mean over the windows that cover it; Y the target's chance. The answer must be in eval mode."""
    rows, columns = (places(side, window, stride).to(x.device) for side in x.shape[2:])
    whole = chances(answer, scores(answer, x)).gather(1, target[:, None])
    total, covered = torch.zeros_like(x[:, 0]), torch.zeros_like(x[0, 0])
    for at in torch.arange(len(rows) * len(columns), device=x.device).split(256):
        inside = rows[at // len(columns)][:, :, None] & columns[at % len(columns)][:, None]
        found = masked_scores(answer, x, ~inside[None, :, None].expand(len(x), -1, -1, -1, -1), masker)
        fall = whole - chances(answer, found.flatten(0, 1)).gather(1, target.repeat_interleave(len(at))[:, None]).view(len(x), -1)
        total += torch.einsum("nm,mhw->nhw", fall.to(x.dtype), inside.to(x.dtype))
        covered += inside.sum(0)
    return (total / covered)[:, None]


@final
@dataclass
class Occlusion(Explainer):
    """The map of :func:`occlusion`.

    ``window`` and ``stride`` in pixels (None: a sixth of the shorter side, at least 2; half the window). ``masker``: what the square shows,
    one of :mod:`convince.explain.maskers`. For an answer with ``logits = False`` the score itself is watched.
    """

    window: int | None = None
    stride: int | None = None
    masker: str = "grey"

    def __post_init__(self) -> None:
        check_masker(self.masker, "occlusion")
        for name in ("window", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Mistake(f"occlusion: {name}={value} must be at least 1 [pixels]")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        if x.dim() != 4:
            raise Mistake(f"occlusion hides squares of images [n c h w], and the input has shape {tuple(x.shape)}")
        side = min(x.shape[2:])
        window = self.window if self.window is not None else min(side, max(2, round(side / 6)))
        stride = self.stride if self.stride is not None else max(1, window // 2)
        if window > side:
            raise Mistake(f"occlusion: window={window} is larger than images of {x.shape[2]}x{x.shape[3]} pixels; a sixth of the side is usual")
        if stride > window:
            raise Mistake(
                f"occlusion: stride={stride} is larger than the window ({window}), so pixels between windows would have no value; take at most {window}"
            )
        return Explanation(
            occlusion(answer, x.detach(), target, window, stride, self.masker), table={"window": window, "stride": stride, "masker": self.masker}
        )
