"""I-GOS: a coarse mask that destroys a class score, found in few steps along integrated gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.blur import gaussian_blur
from convince.explain.faithfulness import area
from convince.explain.passes import ROWS, chances, must_reach, scores
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="i-gos",
    kind="explainer",
    paper="i-gos",
    title="Visualizing Deep Networks by Optimizing with Integrated Gradients",
    year=2019,
    url="https://arxiv.org/abs/1905.00954",
    expects=("images",),
    departs=(
        "the blur of the baseline is given for 224 px in the released code; here it grows and shrinks with the image's short side",
        "the mask is 28x28, and half the short side where that is less",
        "the same noise is drawn for all images of a batch, so that a map does not depend on the images beside it",
        "the noise is in units of the normalised image where the answer knows its normalisation, else in pixel values",
        "l1 stays as it is; the released code divides it by 10 and by 5 on the way where the score has hardly moved",
    ),
    tiny={"iterations": 2, "ig_steps": 3},
)

ARMIJO, SHRINK, LEAST = 1e-4, 0.2, 1e-5  # of the line search: share of the expected fall, factor a trial, step at which it ends
SIDE, RADIUS, SIGMA = 224, 25, 50  # pixels: the image that the baseline's blur is meant for, and that blur


def baseline_of(x: Float[Tensor, "n c h w"], kind: str = "blur") -> Float[Tensor, "n c h w"]:
    """The picture without its content: blurred (51x51 pixels, deviation 50, at 224; in proportion elsewhere) or black."""
    if kind == "black":
        return torch.zeros_like(x)
    scale = min(x.shape[2:]) / SIDE
    return gaussian_blur(x, SIGMA * scale, max(1, round(RADIUS * scale)))


def enlarge(mask: Float[Tensor, "n 1 a b"], size: tuple[int, int]) -> Float[Tensor, "n 1 h w"]:
    """``up``: bilinear, corners on corners."""
    return F.interpolate(mask, size=size, mode="bilinear", align_corners=True)


def masked(x: Float[Tensor, "n c h w"], baseline: Float[Tensor, "n c h w"], mask: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n c h w"]:
    """``phi(x, b, m) = x m + b (1 - m)``: 1 keeps a pixel, 0 puts the baseline there."""
    return x * mask + baseline * (1 - mask)


def regulariser(mask: Float[Tensor, "n 1 a b"], l1: float, tv: float) -> Float[Tensor, " n"]:
    """``l1 mean|1 - m| + tv (mean |d_y m|^2 + mean |d_x m|^2)``."""
    rough = mask.diff(dim=2).square().mean((1, 2, 3)) + mask.diff(dim=3).square().mean((1, 2, 3))
    return l1 * (1 - mask).abs().mean((1, 2, 3)) + tv * rough


@dataclass(frozen=True)
class Removal:
    """The task for a batch: the least and smoothest mask under which the target's chance is gone."""

    answer: nn.Module
    x: Float[Tensor, "n c h w"]
    baseline: Float[Tensor, "n c h w"]
    target: Int[Tensor, " n"]
    l1: float
    tv: float

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[2], self.x.shape[3]

    def objective(self, mask: Float[Tensor, "m 1 a b"], rows: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """``F(m) = softmax_c(phi(x, b, up(m))) + reg(m)`` of these rows: no noise, no path."""
        shown = masked(self.x[rows], self.baseline[rows], enlarge(mask, self.size))
        chance = chances(self.answer, scores(self.answer, shown)).gather(1, self.target[rows, None])[:, 0]
        return chance + regulariser(mask, self.l1, self.tv)

    def direction(self, mask: Float[Tensor, "n 1 a b"], noise: Float[Tensor, "s c h w"]) -> Float[Tensor, "n 1 a b"]:
        """dP/dm, ``P(m) = 1/S sum_{s=1..S} softmax_c(phi(x, b, s/S up(m)) + noise_s) + reg(m)``. One step without noise gives dF/dm."""
        n, steps = len(mask), len(noise)
        leaf = mask.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(regulariser(leaf, self.l1, self.tv).sum(), leaf)
        for pairs in torch.arange(n * steps, device=mask.device).split(ROWS // 2):
            row, step = pairs // steps, pairs % steps
            share = ((step + 1) / steps).to(mask)[:, None, None, None]
            small = mask[row].detach().requires_grad_(True)
            found = full(self.answer(masked(self.x[row], self.baseline[row], share * enlarge(small, self.size)) + noise[step]))
            must_reach(found, "i-gos")
            (part,) = torch.autograd.grad(chances(self.answer, found).gather(1, self.target[row, None]).sum() / steps, small)
            gradient = gradient.index_add(0, row, part)
        return gradient

    def descend(
        self, mask: Float[Tensor, "n 1 a b"], direction: Float[Tensor, "n 1 a b"], before: Float[Tensor, " n"], alpha0: float
    ) -> Float[Tensor, "n 1 a b"]:
        """``clamp(m - a g, 0, 1)`` with the first ``a`` of ``alpha0 * 0.2^i`` for which F falls by ``1e-4 a |g|^2``, each row its own.

        Where none above 1e-5 does, the step below that is taken all the same.
        """
        slope, step = ARMIJO * direction.square().sum((1, 2, 3)), alpha0
        moved, open_rows = mask.clone(), torch.arange(len(mask), device=mask.device)
        while len(open_rows) and step >= LEAST:
            moved[open_rows] = (mask[open_rows] - step * direction[open_rows]).clamp(0, 1)
            falls = self.objective(moved[open_rows], open_rows) <= before[open_rows] - step * slope[open_rows]
            open_rows, step = open_rows[~falls], step * SHRINK
        moved[open_rows] = (mask[open_rows] - step * direction[open_rows]).clamp(0, 1)
        return moved

    def solve(
        self, cells: int, iterations: int, alpha0: float, noise: float, steps: int, seed: int = 0
    ) -> tuple[Float[Tensor, "n 1 a a"], Float[Tensor, "n t"]]:
        """The mask [cells x cells] after ``iterations`` descents from 1, and F before each and at the end. ``noise``: in units of the normalised image."""
        gen, spread = generator("i-gos", seed), self.spread() * noise
        mask = torch.ones(len(self.x), 1, cells, cells, dtype=self.x.dtype, device=self.x.device)
        rows = torch.arange(len(mask), device=mask.device)
        values = [self.objective(mask, rows)]
        for _ in range(iterations):
            drawn = torch.randn(steps, *self.x.shape[1:], generator=gen) if noise else torch.zeros(steps, *self.x.shape[1:])
            mask = self.descend(mask, self.direction(mask, drawn.to(mask) * spread), values[-1], alpha0)
            values.append(self.objective(mask, rows))
        return mask, torch.stack(values, 1)

    def spread(self) -> Tensor:
        """One unit of the normalised image in pixel values, by channel; 1 where the answer does not say how it normalises."""
        std = getattr(getattr(self.answer, "normalise", None), "std", None)
        return torch.ones((), dtype=self.x.dtype, device=self.x.device) if std is None else std.to(self.x)


def cells_of(x: Float[Tensor, "n c h w"], size: int | None) -> int:
    """The mask's side: ``size``, or 28, or half the image's short side where that is less."""
    return size or max(2, min(28, min(x.shape[2:]) // 2))


def i_gos(
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: Int[Tensor, " n"],
    *,
    size: int | None = None,
    l1: float = 1.0,
    tv: float = 20.0,
    ig_steps: int = 20,
    iterations: int = 15,
    alpha0: float = 200.0,
    baseline: str = "blur",
    noise: float = 0.2,
    seed: int = 0,
) -> tuple[Float[Tensor, "n 1 a a"], Float[Tensor, "n t"]]:
    """The mask of each image (1 keeps, 0 removes), and F before each iteration and at the end.

    A descent costs ``ig_steps`` passes forward and back, and up to 12 forward of its line search. The answer must be in eval mode.
    """
    task = Removal(answer, x.detach(), baseline_of(x.detach(), baseline), target, l1, tv)
    return task.solve(cells_of(x, size), iterations, alpha0, noise, ig_steps, seed)


def mask_opt_plain(
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: Int[Tensor, " n"],
    *,
    size: int | None = None,
    l1: float = 1.0,
    tv: float = 20.0,
    iterations: int = 300,
    alpha0: float = 200.0,
    baseline: str = "blur",
) -> tuple[Float[Tensor, "n 1 a a"], Float[Tensor, "n t"]]:
    """The same with the ordinary gradient of F, after Fong and Vedaldi 2017: what the path is measured against.

    300 steps cost as many passes back as 15 of :func:`i_gos` with 20 each.
    """
    task = Removal(answer, x.detach(), baseline_of(x.detach(), baseline), target, l1, tv)
    return task.solve(cells_of(x, size), iterations, alpha0, 0.0, 1)


def deletion(
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    heat: Float[Tensor, "n 1 h w"],
    target: Int[Tensor, " n"],
    baseline: Float[Tensor, "n c h w"],
    steps: int = 50,
) -> Float[Tensor, " n"]:
    """Area under the target's chance, as a share of that in ``x``, as pixels get the baseline's values, hottest first; low is good."""
    return area(answer, x, baseline, heat, target, steps) / _chance(answer, x, target)


def insertion(
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    heat: Float[Tensor, "n 1 h w"],
    target: Int[Tensor, " n"],
    baseline: Float[Tensor, "n c h w"],
    steps: int = 50,
) -> Float[Tensor, " n"]:
    """The same from the baseline, as pixels of ``x`` are put in, hottest first; high is good."""
    return area(answer, baseline, x, heat, target, steps) / _chance(answer, x, target)


def _chance(answer: nn.Module, x: Tensor, target: Tensor) -> Float[Tensor, " n"]:
    return chances(answer, scores(answer, x)).gather(1, target[:, None])[:, 0]


@final
@dataclass
class IGos(Explainer):
    """The map is ``1 - m`` of :func:`i_gos`, enlarged to the image: how much of each pixel is taken away. ``images["mask"]`` is m itself.

    ``size``: the mask's side, None for 28 or half the image's short side. ``noise`` is in units of the normalised image. The table has the
    mean F at the start and at the end, and the mean chance of the target left under the mask.
    """

    size: int | None = None
    l1: float = 1.0
    tv: float = 20.0
    ig_steps: int = 20
    iterations: int = 15
    alpha0: float = 200.0
    baseline: str = "blur"
    noise: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.baseline not in ("blur", "black"):
            raise Mistake(f"i-gos: baseline={self.baseline!r}: must be 'blur' or 'black'")
        if self.size is not None and self.size < 2:
            raise Mistake(f"i-gos: size={self.size}: the mask's side must be at least 2; leave it out for 28, or half the image where that is less")
        if self.ig_steps < 1 or self.iterations < 1 or not self.alpha0 > 0:
            raise Mistake(
                f"i-gos: ig_steps={self.ig_steps} and iterations={self.iterations} must be at least 1, alpha0={self.alpha0} above 0; usual: 20, 15, 200"
            )
        if not min(self.l1, self.tv, self.noise) >= 0:
            raise Mistake(f"i-gos: l1={self.l1}, tv={self.tv} and noise={self.noise} must be at least 0; 1, 20 and 0.2 are usual for a mask of 28x28")

    def explain(self, answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "i-gos")
        if x.dim() != 4:
            raise Mistake(f"i-gos masks images [n c h w], and the input has shape {tuple(x.shape)}")
        x = x.detach()
        task = Removal(answer, x, baseline_of(x, self.baseline), target, self.l1, self.tv)
        mask, values = task.solve(cells_of(x, self.size), self.iterations, self.alpha0, self.noise, self.ig_steps, self.seed)
        large = enlarge(mask, task.size)
        left = _chance(answer, masked(x, task.baseline, large), target)
        table = {"mask": list(mask.shape[2:]), "F": [float(values[:, 0].mean()), float(values[:, -1].mean())], "chance left": float(left.mean())}
        return Explanation(1 - large, {"mask": mask}, table)
