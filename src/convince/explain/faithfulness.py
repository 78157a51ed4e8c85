"""Faithfulness of a map: what happens to the score of a class as the marked pixels are put in or taken out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from convince.explain.passes import chances, scores

STEPS = 16


def blurred(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """A picture from which little can be told: box means over a quarter of the side, twice."""
    side = max(3, min(x.shape[-2:]) // 4 | 1)
    for _ in range(2):
        x = avg_pool2d(pad(x, [side // 2] * 4, mode="replicate"), side, 1)
    return x


@torch.no_grad()
def insertion(
    answer: nn.Module, x: Float[Tensor, "n c h w"], maps: Float[Tensor, "n 1 h w"], target: Int[Tensor, " n"], steps: int = STEPS
) -> Float[Tensor, " n"]:
    """Area under the probability of ``target`` as pixels are put into a blurred picture, most marked first (Petsiuk et al. 2018); 0 to 1, higher is better."""
    return area(answer, blurred(x), x, maps, target, steps)


@torch.no_grad()
def deletion(
    answer: nn.Module, x: Float[Tensor, "n c h w"], maps: Float[Tensor, "n 1 h w"], target: Int[Tensor, " n"], steps: int = STEPS
) -> Float[Tensor, " n"]:
    """Area under the probability of ``target`` as pixels are set to 0, most marked first (Petsiuk et al. 2018); 0 to 1, lower is better."""
    return area(answer, x, torch.zeros_like(x), maps, target, steps)


def area(
    answer: nn.Module, start: Float[Tensor, "n c h w"], end: Float[Tensor, "n c h w"], maps: Float[Tensor, "n 1 h w"], target: Int[Tensor, " n"], steps: int
) -> Float[Tensor, " n"]:
    """Area under the chance of ``target`` on the way from ``start`` to ``end``, pixels changed most marked first; ties by place."""
    n, pixels = len(start), maps[0].numel()
    rank = torch.empty_like(maps.reshape(n, -1), dtype=torch.int64)
    order = maps.reshape(n, -1).argsort(dim=1, descending=True, stable=True)
    rank.scatter_(1, order, torch.arange(pixels, device=maps.device).expand(n, -1))
    rank = rank.view(n, 1, *maps.shape[-2:])
    curve = []
    for step in range(steps + 1):
        moved = rank < round(pixels * step / steps)
        found = chances(answer, scores(answer, torch.where(moved, end, start)))
        curve.append(found.gather(1, target[:, None])[:, 0])
    return torch.trapezoid(torch.stack(curve), dim=0) / steps
