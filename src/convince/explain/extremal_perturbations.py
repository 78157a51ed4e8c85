"""Extremal perturbations: the smooth mask of a given area that keeps (or destroys) a score the most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.blur import gaussian_blur
from convince.explain.layer import find_layer
from convince.explain.passes import ROWS, chances, must_reach, scores
from convince.fit.precision import full
from convince.kinds import Explainer, as_found, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="extremal-perturbations",
    kind="explainer",
    paper="extremal-perturbations",
    title="Understanding Deep Networks via Extremal Perturbations and Smooth Masks",
    year=2019,
    url="https://arxiv.org/abs/1910.08485",
    expects=("images",),
    departs=(
        "step, sigma and blur are given for 224 px in the released code; here they grow and shrink with the image's short side",
        "a blur repeats the edge pixels and fading goes to black; the released code pads and fades with zeros of the normalised image, its mean colour",
        "pixels of equal mask value share the area term evenly; the released code lets the sorting choose among them, so that rounding decides",
        "with several areas the map is the mean of their masks; the paper's pointing game adds them and blurs the sum, which is smooth=0.09",
    ),
    tiny={"iterations": 4, "levels": 3},
)

COLDNESS = 20  # of the smooth maximum
RATE, MOMENTUM = 0.01, 0.9
WEIGHT, GROWTH = 300.0, 1.0035  # of the area term: at the start, and its factor a step
TIED = 1e-5  # mask values nearer than this count as equal in the area term
SIDE = 224  # pixels, for which the released code's sizes are meant
STEP, SIGMA, BLUR = 7, 21, 20


def perturbation_pyramid(x: Float[Tensor, "n c h w"], kind: str = "blur", levels: int = 8) -> Float[Tensor, "n levels c h w"]:
    """``x`` from fully perturbed (level 0) to itself (the last): blurred by ``20 (1 - l/(L-1))`` px at 224, or faded to ``x l/(L-1)``."""
    shares = [level / (levels - 1) for level in range(levels)]
    widest = BLUR * min(x.shape[2:]) / SIDE
    return torch.stack([gaussian_blur(x, widest * (1 - share)) if kind == "blur" else x * share for share in shares], 1)


def perturb(pyramid: Float[Tensor, "n levels c h w"], mask: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n c h w"]:
    """Each pixel at the level ``m (L - 1)`` of its mask value, between two levels linearly: 1 keeps, 0 perturbs fully."""
    n, levels, c, h, w = pyramid.shape
    at = mask * (levels - 1)
    below = at.detach().floor().clamp(0, levels - 2)

    def level(of: Tensor) -> Tensor:
        return pyramid.gather(1, of.long()[:, :, None].expand(n, 1, c, h, w))[:, 0]

    share = at - below
    return (1 - share) * level(below) + share * level(below + 1)


@dataclass(frozen=True)
class Canvas:
    """Where the mask's parameters lie: a grid of spacing ``step`` over the image, kernels of width ``sigma``, and a margin around it [pixels]."""

    size: tuple[int, int]
    step: int
    sigma: float

    @property
    def margin(self) -> int:
        return round(self.sigma)

    @property
    def radius(self) -> int:
        """Grid points to each side that a pixel looks at."""
        return 1 + math.ceil(self.sigma / self.step)

    @property
    def padding(self) -> int:
        """Grid points, all zero, around the grid."""
        return 1 + math.ceil((self.margin + self.sigma) / self.step)

    @property
    def grid(self) -> tuple[int, int]:
        """Sides of the parameters."""
        h, w = (-(-side // self.step) for side in self.size)
        return h, w

    @property
    def cells(self) -> tuple[int, int]:
        """Blocks of ``step`` x ``step`` pixels on the canvas."""
        h, w = (side + 2 * self.padding - 2 * self.radius for side in self.grid)
        return h, w

    @property
    def sides(self) -> tuple[int, int]:
        """Of the uncropped mask, which the area term measures [pixels]."""
        h, w = (self.step * (side - 1) + 1 for side in self.cells)
        return h, w

    def weights(self) -> Float[Tensor, "near places"]:
        """``k(|u - u_i| / sigma)``, ``k(z) = exp(-2 max(z - 1/2, 0)^2)``, for each of the neighbours i and each place of u in its block."""
        away = torch.arange(self.step)[None] - self.margin - self.step * (torch.arange(2 * self.radius + 1)[:, None] - self.padding)
        distance = torch.hypot(away.double()[:, None, :, None], away.double()[None, :, None, :]) / self.sigma
        return torch.exp(-2 * (distance - 0.5).clamp_min(0) ** 2).flatten(2).flatten(0, 1)


class SmoothMax(torch.autograd.Function):
    """``sum_i v_i softmax(20 v)_i`` of ``v_i = weight_i value_i``, some neighbours at a time: the whole [near places m] is never held."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor) -> Tensor:
        """``values`` [near m], ``weights`` [near places] -> [places m]."""
        total = values.new_zeros(weights.shape[1], values.shape[1])
        weighted = torch.zeros_like(total)
        for some, weight in SmoothMax.parts(values, weights):
            v = weight[:, :, None] * some[:, None]
            e = torch.exp(COLDNESS * v)
            total += e.sum(0)
            weighted += v.mul_(e).sum(0)
        found = weighted / total
        ctx.save_for_backward(values, weights, total, found)
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """``d found / d v_i = softmax_i (1 + 20 (v_i - found))``."""
        values, weights, total, found = ctx.saved_tensors
        share, back = g / total, []
        offset = share * (1 - COLDNESS * found)
        for some, weight in SmoothMax.parts(values, weights):
            v = weight[:, :, None] * some[:, None]
            e = torch.exp(COLDNESS * v)
            back.append((weight[:, None] @ v.mul_(COLDNESS * share).add_(offset).mul_(e))[:, 0])
        return torch.cat(back), None

    @staticmethod
    def parts(values: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Neighbours together as long as their numbers fit the processor's cache."""
        some = max(1, 2**18 // (weights.shape[1] * values.shape[1]))
        return zip(values.split(some), weights.split(some), strict=True)


def smooth_max_mask(parameters: Float[Tensor, "n 1 a b"], canvas: Canvas) -> tuple[Float[Tensor, "n 1 h w"], Float[Tensor, "n 1 y x"]]:
    """The mask over the image and the uncropped one: at u the smooth maximum of ``k(|u - u_i|/sigma) m_i`` over the grid points i nearby, in [0, 1]."""
    n, (rows, columns), step, near = len(parameters), canvas.cells, canvas.step, 2 * canvas.radius + 1
    values = F.unfold(parameters, near, padding=canvas.padding).transpose(0, 1).flatten(1)
    found = SmoothMax.apply(values, canvas.weights().to(values)).view(step, step, n, rows, columns)
    high, wide = canvas.sides
    whole = found.permute(2, 3, 0, 4, 1).reshape(n, 1, rows * step, columns * step)[:, :, :high, :wide].clamp(0, 1)
    at = canvas.margin
    return whole[:, :, at : at + canvas.size[0], at : at + canvas.size[1]], whole


def area_gap(mask: Float[Tensor, "n ..."], area: Float[Tensor, " n"], power: int = 2) -> Float[Tensor, " n"]:
    """Eq. 5: ``mean |sort(m) - r_a|^power``, where ``r_a`` is 0 in the first ``1 - a`` of its places and 1 in the others.

    Values within 1e-5 of the one at the step of ``r_a`` share its ones and zeros evenly: else rounding would choose among equal pixels,
    as in the even mask at the start, and the map would depend on the images beside it.
    """
    m = mask.flatten(1)
    zeros = (m.shape[1] * (1 - area.double()) + 1e-3).long()[:, None]  # a share in float32 may round the other way
    step = m.detach().sort(dim=1).values.gather(1, zeros.clamp_max(m.shape[1] - 1))
    above, tied = m > step + TIED, (m - step).abs() <= TIED
    ones = (m.shape[1] - zeros - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    reference = torch.where(tied, ones.to(m), above.to(m))
    return ((1 - reference) * m.abs().pow(power) + reference * (1 - m).abs().pow(power)).mean(1)


def reward_of(found: Float[Tensor, "n k"], target: Int[Tensor, " n"], kind: str = "simple") -> Float[Tensor, " n"]:
    """The target's score ("simple"), or that less the best other score ("contrastive")."""
    own = found.gather(1, target[:, None])[:, 0]
    return own if kind == "simple" else own - found.scatter(1, target[:, None], -math.inf).amax(1)


def _ascend(parameters: Tensor, look: Callable[[Tensor, int], tuple[Tensor, Tensor]], iterations: int) -> tuple[Tensor, Float[Tensor, "n 2 t"]]:
    """Raise ``reward - weight * gap`` of each row by itself, ``look(parameters, t) -> (reward, gap)``; parameters stay in [0, 1].

    Returns the parameters of the last look, and reward and area term of every look.
    """
    history, weight = [], WEIGHT
    optimizer = torch.optim.SGD([parameters], lr=RATE, momentum=MOMENTUM, dampening=MOMENTUM, maximize=True)
    for t in range(iterations):
        parameters.requires_grad_(True)
        gain, gap = look(parameters, t)
        history.append(torch.stack([gain.detach(), -weight * gap.detach()], 1))
        if t + 1 < iterations:
            (parameters.grad,) = torch.autograd.grad((gain - weight * gap).sum(), parameters)
            optimizer.step()
            parameters.detach().clamp_(0, 1)
        weight *= GROWTH
    return parameters.detach(), torch.stack(history, 2)


def extremal_perturbation(
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: Int[Tensor, " n"],
    area: Float[Tensor, " n"] | float = 0.1,
    *,
    perturbation: str = "blur",
    iterations: int = 800,
    levels: int = 8,
    step: int | None = None,
    sigma: float | None = None,
    jitter: bool = True,
    variant: str = "preserve",
    reward: str = "simple",
    area_of: str = "canvas",
) -> tuple[Float[Tensor, "n 1 h w"], Float[Tensor, "n 2 t"]]:
    """Eq. 4: a mask a row, of about its own ``area`` (0 to 1), that keeps the score highest; and reward and area term of each iteration.

    "preserve" raises the score of what the mask keeps, "delete" lowers the score where it perturbs, "dual" does both. ``jitter`` looks at
    the mirror image in every other iteration. ``step`` and ``sigma`` [pixels]: None for 7 and 21 at a short side of 224, in proportion.
    The answer must be in eval mode.
    """
    differentiable(answer, "extremal-perturbations")
    side = min(x.shape[2:])
    step, sigma = step or max(1, round(STEP * side / SIDE)), sigma or SIGMA * side / SIDE
    canvas = Canvas((x.shape[2], x.shape[3]), step, sigma)
    areas = torch.as_tensor(area, dtype=torch.float64, device=x.device).expand(len(x))
    masks, histories = [], []
    for rows in torch.arange(len(x), device=x.device).split(ROWS // (8 if variant == "dual" else 4)):  # about 1.1 GB with a ResNet-18 at 224 px
        pyramid = perturbation_pyramid(x[rows].detach(), perturbation, levels)
        wanted, share = target[rows], areas[rows]

        def look(
            parameters: Tensor, t: int, pyramid: Tensor = pyramid, wanted: Tensor = wanted, share: Tensor = share
        ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
            mask, whole = smooth_max_mask(parameters, canvas)
            kept = perturb(pyramid, mask) if variant != "delete" else perturb(pyramid, 1 - mask)
            shown = torch.cat([kept, perturb(pyramid, 1 - mask)]) if variant == "dual" else kept
            found = full(answer(shown.flip(3) if jitter and t % 2 == 0 else shown))
            must_reach(found, "extremal-perturbations")
            gains = [reward_of(part, wanted, reward) for part in found.split(len(mask))]
            gain = gains[0] - gains[1] if variant == "dual" else -gains[0] if variant == "delete" else gains[0]
            return gain, area_gap(whole if area_of == "canvas" else mask, share)

        parameters, history = _ascend(torch.ones(len(rows), 1, *canvas.grid, dtype=x.dtype, device=x.device), look, iterations)
        masks.append(smooth_max_mask(parameters, canvas)[0])
        histories.append(history)
    return torch.cat(masks), torch.cat(histories)


def minimal_extremal_area(
    answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], areas: Sequence[float], threshold: float, **how: Any
) -> Float[Tensor, " n"]:
    """Section 3.1: for each row the smallest of the ``areas`` whose preserved score is at least ``threshold``; ``inf`` where none is.

    ``how``: arguments of :func:`extremal_perturbation`.
    """
    with as_found(answer):
        found = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        pyramid = perturbation_pyramid(x.detach(), how.get("perturbation", "blur"), how.get("levels", 8))
        for area in sorted(areas, reverse=True):
            mask, _ = extremal_perturbation(answer, x, target, area, **{**how, "variant": "preserve"})
            kept = scores(answer, perturb(pyramid, mask)).gather(1, target[:, None])[:, 0]
            found[kept >= threshold] = area
    return found


def channel_extremal(
    answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], keep: int, layer: str | None = None, *, iterations: int = 800
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 2 t"]]:
    """Section 4.1: for each row the ``keep`` channels of a layer that alone keep the score highest: a mask [0, 1] a channel, and the history.

    Channels are multiplied by their mask; the area term is an absolute distance. ``layer``: a module's name, None: found.
    Raises Mistake where the layer has fewer channels.
    """
    differentiable(answer, "extremal-perturbations")
    with as_found(answer):
        place = find_layer(answer, x, target, layer, "extremal-perturbations")
        axis = 1 if place.order == "nchw" else -1
        module, widths, now = answer.get_submodule(place.name), [], [torch.ones(1)]

        def dim(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            widths.append(output.shape[axis])
            shape = [len(output), *[1] * (output.dim() - 1)]
            shape[axis] = -1
            return output * now[0].view(shape).to(output.dtype) if len(widths) > 1 else output

        handle = module.register_forward_hook(dim)
        try:
            scores(answer, x[:1])
            if not 1 <= keep <= widths[0]:
                raise Mistake(f"extremal-perturbations: keep={keep}: layer {place.name!r} has {widths[0]} channels; keep 1 to {widths[0]}")
            found = []
            for pixels, wanted in zip(x.detach().split(ROWS // 2), target.split(ROWS // 2), strict=True):

                def look(mask: Tensor, t: int, pixels: Tensor = pixels, wanted: Tensor = wanted) -> tuple[Tensor, Tensor]:
                    now[0] = mask
                    return reward_of(full(answer(pixels)), wanted), area_gap(mask, torch.full((len(mask),), keep / widths[0], device=mask.device), power=1)

                found.append(_ascend(torch.ones(len(pixels), widths[0], dtype=x.dtype, device=x.device), look, iterations))
        finally:
            handle.remove()
    return torch.cat([mask for mask, _ in found]), torch.cat([history for _, history in found])


@final
@dataclass
class ExtremalPerturbations(Explainer):
    """The map is the mask of :func:`extremal_perturbation`, the mean of several ``areas``' masks; ``images["mask A"]`` is that of each area A.

    ``smooth`` blurs the map by that share of the image's short side. Areas are shares of the mask's canvas, which is larger than the
    image (``area_of="image"``: of the image). The table has for each area the mean share of the image that the mask reached, and the
    mean chance of the target in the perturbed picture (dual: the kept one).
    """

    areas: Sequence[float] | float = (0.1,)
    variant: str = "preserve"
    perturbation: str = "blur"
    iterations: int = 800
    levels: int = 8
    step: int | None = None
    sigma: float | None = None
    jitter: bool = True
    reward: str = "simple"
    area_of: str = "canvas"
    smooth: float = 0.0

    def __post_init__(self) -> None:
        self.areas = (float(self.areas),) if isinstance(self.areas, (int, float)) else tuple(self.areas)
        if not self.areas or not all(0 < area < 1 for area in self.areas) or len(set(self.areas)) < len(self.areas):
            raise Mistake(f"extremal-perturbations: areas={self.areas}: give at least one share of the image, above 0 and below 1, each once; 0.1 is usual")
        allowed = {"variant": ("preserve", "delete", "dual"), "perturbation": ("blur", "fade"), "reward": ("simple", "contrastive")}
        for name, words in {**allowed, "area_of": ("canvas", "image")}.items():
            if getattr(self, name) not in words:
                raise Mistake(f"extremal-perturbations: {name}={getattr(self, name)!r}: must be one of {', '.join(words)}")
        if self.iterations < 2 or self.levels < 2:
            raise Mistake(f"extremal-perturbations: iterations={self.iterations} and levels={self.levels} must be at least 2; 800 and 8 are usual")
        if (self.step is not None and self.step < 1) or (self.sigma is not None and not self.sigma > 0) or not self.smooth >= 0:
            raise Mistake(
                f"extremal-perturbations: step={self.step} must be at least 1 pixel, sigma={self.sigma} above 0 pixels, smooth={self.smooth} at least 0; "
                "leave step and sigma out to have them grow with the image"
            )

    def explain(self, answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"]) -> Explanation:
        if x.dim() != 4:
            raise Mistake(f"extremal-perturbations masks images [n c h w], and the input has shape {tuple(x.shape)}")
        with torch.no_grad():
            k = answer(x[:1]).shape[1]
        if self.reward == "contrastive" and k < 2:
            raise Mistake("extremal-perturbations: reward=contrastive compares with other classes, and this answer has one score; take reward=simple")
        assert isinstance(self.areas, tuple)
        n, x = len(x), x.detach()
        options = ("perturbation", "iterations", "levels", "step", "sigma", "jitter", "variant", "reward", "area_of")
        share = torch.tensor(self.areas, dtype=torch.float64, device=x.device).repeat_interleave(n)
        many = x.repeat(len(self.areas), 1, 1, 1), target.repeat(len(self.areas))
        found, _ = extremal_perturbation(answer, *many, share, **{name: getattr(self, name) for name in options})
        masks = dict(zip(self.areas, found.split(n), strict=True))
        pyramid = perturbation_pyramid(x, self.perturbation, self.levels)
        left = {}
        for area, mask in masks.items():
            shown = perturb(pyramid, 1 - mask if self.variant == "delete" else mask)
            left[area] = float(chances(answer, scores(answer, shown)).gather(1, target[:, None]).mean())
        whole = gaussian_blur(torch.stack(list(masks.values())).mean(0), self.smooth * min(x.shape[2:]))
        table = {"areas": list(self.areas), "reached": [float(mask.mean()) for mask in masks.values()], "chance": list(left.values())}
        return Explanation(whole, {f"mask {area:g}": mask for area, mask in masks.items()}, table)
