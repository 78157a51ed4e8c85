"""Network inversion: the image that gives a layer the same features, and so what of a picture is still there at that depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.activation_maximisation import centre, feature_maps, total_variation
from convince.explain.dgn_am import Generator, feature_inverter
from convince.explain.layer import Layer, find_layer
from convince.explain.passes import ROWS
from convince.fit.randomness import generator
from convince.kinds import Explainer, as_found, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="network-inversion",
    kind="explainer",
    paper="cnn-visualization-survey",
    title="How convolutional neural network see the world - A survey of convolutional neural network visualization methods",
    year=2018,
    url="https://arxiv.org/abs/1804.11191",
    expects=("images",),
    departs=(
        "each step is Adam's; the survey's source, Mahendran and Vedaldi 2015, has gradient descent with momentum",
        "the weights of both priors are 1e-4 for pixels of 0 to 1 at every layer; the source sets them by layer for pixels of 0 to 255",
    ),
    tiny={"steps": 3},
)


def relative_error(found: Float[Tensor, "n ..."], wanted: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """``|found - wanted|^2 / |wanted|^2`` of each row."""
    return (found - wanted).square().flatten(1).sum(1) / wanted.square().flatten(1).sum(1).clamp_min(1e-12)


def network_inversion(
    features: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n c h w"],
    start: Float[Tensor, "n c h w"],
    *,
    origin: Tensor | float = 0.5,
    alpha: float = 6.0,
    beta: float = 2.0,
    lam_alpha: float = 1e-4,
    lam_tv: float = 1e-4,
    steps: int = 500,
    lr: float = 0.05,
) -> Float[Tensor, "n c h w"]:
    """Minimise ``|phi(z) - phi(x)|^2 / |phi(x)|^2 + lam_alpha sum |z - origin|^alpha + lam_tv TV_beta(z)`` from ``start``, each row by itself.

    ``features`` is phi, images [n c h w] -> features [n ...]; ``lr`` [pixel values a step]. Pixels may leave [0, 1].
    """
    with torch.no_grad():
        wanted = features(x)
    z = start.detach().clone()
    optimizer = torch.optim.Adam([z], lr=lr)
    for _ in range(steps):
        z.requires_grad_(True)
        size = (z - origin).abs().pow(alpha).flatten(1).sum(1)
        loss = relative_error(features(z), wanted) + lam_alpha * size + lam_tv * total_variation(z, beta)
        (z.grad,) = torch.autograd.grad(loss.sum(), z)
        optimizer.step()
    return z.detach()


def upconv_inversion(
    answer: nn.Module, x: Float[Tensor, "n c h w"], layer: str | None = None, *, epochs: int = 5, lr: float = 2e-4, seed: int = 0
) -> tuple[Generator, Layer]:
    """A small up-convolutional network that is taught to give ``x`` back from the features of a layer, with the squared error (Dosovitskiy & Brox 2016).

    It takes ``feature_maps(answer, x, layer).flatten(1)``, with the layer that is returned beside it.
    """
    with as_found(answer):
        for p in answer.parameters():
            p.requires_grad_(False)
        found = find_layer(answer, x, torch.zeros(len(x), dtype=torch.int64, device=x.device), layer, "network-inversion")
        how = {"weights": (1.0, 0.0, 0.0), "epochs": epochs, "lr": lr, "seed": seed}
        decoder = feature_inverter(lambda pixels: feature_maps(answer, pixels, found).flatten(1), x, **how)  # type: ignore[arg-type]
    return decoder, found


@final
@dataclass
class NetworkInversion(Explainer):
    """No map: ``images["inverted"]`` is an image with nearly the features that each image has at a layer, whatever its class.

    ``layer``: a module's name, None: found (see :func:`~convince.explain.layer.find_layer`). The table has the mean relative error of the
    features and of the image about its mean colour. Other options: :func:`network_inversion`.
    """

    layer: str | None = None
    alpha: float = 6.0
    beta: float = 2.0
    lam_alpha: float = 1e-4
    lam_tv: float = 1e-4
    steps: int = 500
    lr: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0:
            raise Mistake(f"network-inversion: steps={self.steps} must be at least 1 and lr={self.lr} above 0; 500 and 0.05 are usual")
        if self.alpha < 1 or self.beta < 1 or min(self.lam_alpha, self.lam_tv) < 0:
            raise Mistake(
                f"network-inversion: alpha={self.alpha} and beta={self.beta} must be at least 1, lam_alpha={self.lam_alpha} and lam_tv={self.lam_tv} at least 0"
            )

    def explain(self, answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "network-inversion")
        layer = find_layer(answer, x, target, self.layer, "network-inversion")
        x, origin = x.detach(), centre(answer, x)
        noise = torch.randn(origin.shape, generator=generator("network-inversion", self.seed))
        begin = origin + 0.1 * noise.to(x)
        options = {name: getattr(self, name) for name in ("alpha", "beta", "lam_alpha", "lam_tv", "steps", "lr")}

        def features(pixels: Tensor) -> Tensor:
            return feature_maps(answer, pixels, layer)

        found, errors = [], []
        for some in x.split(ROWS // 2):
            found.append(network_inversion(features, some, begin.expand(len(some), -1, -1, -1), origin=origin, **options))
            with torch.no_grad():
                errors.append(relative_error(features(found[-1]), features(some)))
        inverted = torch.cat(found)
        image = relative_error(inverted - x.mean((2, 3), keepdim=True), x - x.mean((2, 3), keepdim=True))
        table = {"layer": layer.name, "plane": list(layer.plane), "feature error": float(torch.cat(errors).mean()), "image error": float(image.mean())}
        return Explanation(None, {"inverted": inverted}, table)
