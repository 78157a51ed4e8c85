"""Activation maximisation: the image that a class score, or a channel of a layer, answers to most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.blur import gaussian_blur
from convince.explain.layer import Layer, find_layer
from convince.explain.passes import ROWS, chances, must_reach, scores
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="activation-maximisation",
    kind="explainer",
    paper="cnn-visualization-survey",
    title="How convolutional neural network see the world - A survey of convolutional neural network visualization methods",
    year=2018,
    url="https://arxiv.org/abs/1804.11191",
    expects=("images",),
    departs=(
        "each step is Adam's, in pixel values; the survey has plain gradient ascent, whose step depends on the size of the scores",
        "pixels stay between 0 and 1, where the answer was taught; bounded=false lets them go as in the survey",
        "the L2 term measures the distance from the mean image, which is the zero of a normalised input",
    ),
    tiny={"steps": 3},
)

Activation = Callable[[Tensor], Tensor]  # images [m c h w] -> the number of each that is raised [m]


# -- what is raised -----------------------------------------------------------------------------------


class _Enough(Exception):
    """The layer has been read: the rest of the pass is not needed."""


def feature_maps(answer: nn.Module, x: Float[Tensor, "n c h w"], layer: Layer) -> Float[Tensor, "n d i j"]:
    """A layer's maps with their gradient to the pixels; the pass ends there."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: Any, output: Tensor) -> None:
        taken.append(output)
        raise _Enough

    handle = answer.get_submodule(layer.name).register_forward_hook(take)
    try:
        answer(x)
    except _Enough:
        pass
    finally:
        handle.remove()
    return full(layer.fold(taken[0]))


def unit_activation(answer: nn.Module, unit: Int[Tensor, " m"], layer: Layer | None = None) -> Activation:
    """``a_unit`` of each row's own unit: its score, or the mean over the plane of a channel of ``layer``."""

    def activation(x: Tensor) -> Tensor:
        found = full(answer(x)) if layer is None else feature_maps(answer, x, layer).mean((2, 3))
        return found.gather(1, unit[:, None])[:, 0]

    return activation


def channel_of(answer: nn.Module, x: Float[Tensor, "n c h w"], layer: Layer, unit: int | None, who: str) -> int:
    """The number of a channel of ``layer``, refused where the layer has none of it."""
    with torch.no_grad():
        width = feature_maps(answer, x[:1], layer).shape[1]
    if unit is None or not 0 <= unit < width:
        raise Mistake(f"{who}: channel {unit} of layer {layer.name!r}: it has channels 0 to {width - 1}")
    return unit


# -- priors -------------------------------------------------------------------------------------------


def total_variation(x: Float[Tensor, "n c h w"], beta: float = 2.0) -> Float[Tensor, " n"]:
    """``sum (dx^2 + dy^2)^(beta/2)``, differences to the right and to below; there is none beyond the edge (Mahendran & Vedaldi 2015)."""
    squares = F.pad(x.diff(dim=3), (0, 1)).square() + F.pad(x.diff(dim=2), (0, 0, 0, 1)).square()
    if beta != 2:
        squares = squares.clamp_min(1e-12).pow(beta / 2)  # the slope at 0 is endless below 2
    return squares.flatten(1).sum(1)


def centre(answer: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "1 c h w"]:
    """The image that the answer's normalisation sends to zero: an even one of the training mean; mid-grey where the answer has none."""
    mean = getattr(getattr(answer, "normalise", None), "mean", None)
    even = torch.full((1, 1, 1, 1), 0.5) if mean is None else mean
    return even.to(x).expand(1, *x.shape[1:])


# -- ascent -------------------------------------------------------------------------------------------


def activation_maximisation(
    activation: Activation,
    start: Float[Tensor, "m c h w"],
    *,
    steps: int = 256,
    lr: float = 0.05,
    l2: float = 1e-4,
    tv: float = 1e-2,
    blur_every: int = 4,
    blur_sigma: float = 0.5,
    jitter: int = 2,
    origin: Tensor | float = 0.5,
    bounded: bool = True,
    seed: int = 0,
) -> Float[Tensor, "m c h w"]:
    """Ascend ``a(x) - l2 |x - origin|^2 - tv TV(x)`` from ``start``, each row by itself.

    ``lr`` [pixel values a step]. Each step looks at the image shifted by up to ``jitter`` pixels, around the edge; every ``blur_every`` steps
    (0: never) the image is blurred by ``blur_sigma`` [pixels]. ``bounded`` keeps pixels in [0, 1].
    """
    x = start.detach().clone()
    gen = generator("activation-maximisation", seed)
    optimizer = torch.optim.Adam([x], lr=lr, maximize=True)
    for t in range(steps):
        down, right = torch.randint(-jitter, jitter + 1, (2,), generator=gen).tolist()
        x.requires_grad_(True)
        raised = activation(x.roll((down, right), (2, 3)))
        must_reach(raised, "activation-maximisation")
        goal = raised - l2 * (x - origin).square().flatten(1).sum(1) - tv * total_variation(x)
        (x.grad,) = torch.autograd.grad(goal.sum(), x)
        optimizer.step()
        with torch.no_grad():
            if blur_every and (t + 1) % blur_every == 0:
                x.copy_(gaussian_blur(x, blur_sigma))
            if bounded:
                x.clamp_(0, 1)
    return x.detach()


def class_image(
    answer: nn.Module, target: Int[Tensor, " m"], shape: tuple[int, int, int], lam: float = 0.1, steps: int = 500, lr: float = 0.05
) -> Float[Tensor, "m c h w"]:
    """``arg max S_c(I) - lam |I|^2`` (eq. 1 of Simonyan, Vedaldi & Zisserman 2013), ``I`` from zero, the mean image added: pixels may leave [0, 1].

    ``shape``: (channels, rows, columns). ``S_c`` is the score before the softmax. The answer must be in eval mode.
    """
    p = next(answer.parameters(), torch.zeros(1))
    origin = centre(answer, torch.empty(1, *shape, dtype=p.dtype, device=p.device)).expand(len(target), -1, -1, -1)
    free: dict[str, Any] = {"tv": 0.0, "blur_every": 0, "jitter": 0, "bounded": False}
    return activation_maximisation(unit_activation(answer, target), origin, steps=steps, lr=lr, l2=lam, origin=origin, **free)


@final
@dataclass
class ActivationMaximisation(Explainer):
    """No map: ``images["image"]`` is what the target class answers to most, the same whatever image is explained.

    ``layer`` and ``unit``: a channel of that layer in place of the class. ``jitter`` [pixels], None: a sixteenth of the short side.
    ``start``: "noise" around the mean image, the same for all, or "mean". The table has the value that each image reached, and for classes
    its chance: both under the answer that it was made for, so that they prove nothing. Other options: :func:`activation_maximisation`.

    ``activation-maximisation:start=mean,tv=0,blur_every=0,jitter=0,bounded=false,l2=0.1,steps=500`` is the class image of Simonyan et al. 2013.
    """

    layer: str | None = None
    unit: int | None = None
    steps: int = 256
    lr: float = 0.05
    l2: float = 1e-4
    tv: float = 1e-2
    blur_every: int = 4
    blur_sigma: float = 0.5
    jitter: int | None = None
    start: str = "noise"
    bounded: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0:
            raise Mistake(f"activation-maximisation: steps={self.steps} must be at least 1 and lr={self.lr} above 0; 256 and 0.05 are usual")
        if min(self.l2, self.tv, self.blur_every, self.blur_sigma, self.jitter or 0) < 0:
            raise Mistake("activation-maximisation: l2, tv, blur_every, blur_sigma and jitter must be at least 0 (0 is without)")
        if self.start not in ("noise", "mean"):
            raise Mistake(f"activation-maximisation: start={self.start!r}: must be 'noise' or 'mean'")
        if (self.layer is None) != (self.unit is None):
            raise Mistake(f"activation-maximisation: layer={self.layer!r}, unit={self.unit}: give both (a channel of a layer) or neither (the class)")

    def explain(self, answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"]) -> Explanation:
        if x.dim() != 4:
            raise Mistake(f"activation-maximisation makes images [n c h w], and the input has shape {tuple(x.shape)}")
        differentiable(answer, "activation-maximisation")
        layer = None if self.layer is None else find_layer(answer, x, target, self.layer, "activation-maximisation")
        wanted = target if layer is None else torch.full_like(target, channel_of(answer, x, layer, self.unit, "activation-maximisation"))
        units, back = wanted.unique(return_inverse=True)
        origin = centre(answer, x)
        begin = origin
        if self.start == "noise":
            noise = torch.randn(origin.shape, generator=generator("activation-maximisation", self.seed, "start"))
            begin = origin + 0.1 * noise.to(x)
        options = {name: getattr(self, name) for name in ("steps", "lr", "l2", "tv", "blur_every", "blur_sigma", "bounded", "seed")}
        jitter = min(x.shape[2:]) // 16 if self.jitter is None else self.jitter
        made, reached = [], []
        for some in units.split(ROWS // 2):
            activation = unit_activation(answer, some, layer)
            made.append(activation_maximisation(activation, begin.expand(len(some), -1, -1, -1), origin=origin, jitter=jitter, **options))
            with torch.no_grad():
                reached.append(activation(made[-1]))
        found = torch.cat(made)
        table: dict[str, Any] = {"layer": "scores" if layer is None else layer.name, "units": units.tolist(), "reached": torch.cat(reached).tolist()}
        if layer is None:
            table["chance"] = chances(answer, scores(answer, found)).gather(1, units[:, None])[:, 0].tolist()
        return Explanation(None, {"image": found[back]}, table)
