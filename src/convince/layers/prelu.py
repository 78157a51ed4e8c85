"""Prelu: rectifiers with a learned slope for negative inputs, one for each channel or one for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.surgery import Surgery, find, refuse_nothing, swap
from convince.parts import Card

CARD = Card(
    part="prelu",
    kind="layer",
    paper="prelu-he-init",
    title="Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification",
    year=2015,
    url="https://arxiv.org/abs/1502.01852",
    departs=(
        "slopes are free of weight decay, as the paper asks, under the run's own SGD, which decays matrices and kernels only; other optimizers decay all",
        "a rectifier that a network runs at several places, as torchvision's blocks do, has one slope for all of them",
        "only rectifiers that are modules are replaced; those inside a network's own forward are not seen",
    ),
    tiny={},
)
REMEDY = "give channelwise=false"
SIDES = (32, 224, 64, 28, 8, 16, 96, 128, 160, 192, 256)  # pixels of the images that are tried to see channels


def prelu(x: Float[Tensor, "n c *s"], a: Float[Tensor, " k"]) -> Float[Tensor, "n c *s"]:
    """``max(0, x) + a min(0, x)`` (eq. 1) with a slope for each channel, or one for all."""
    slope = a.view(1, -1, *[1] * (x.dim() - 2))
    return x.clamp_min(0) + slope * x.clamp_max(0)


def install(model: nn.Module, channelwise: bool = True, init: float = 0.25, skip: Sequence[str] = ()) -> Surgery:
    """Put torch's ``nn.PReLU``, slopes ``init``, in the place of each ``nn.ReLU`` module.

    ``channelwise``: a slope for each channel, else one for each layer; ``skip`` names rectifiers (or patterns) that stay. To see the channels the
    network answers one image of zeros, in evaluation mode. New names: ``layer1.0.act1.weight``. Raises Mistake where there is no such module, or
    where its channels cannot be seen.
    """
    places = [(name, m) for name, m in find(model, types=(nn.ReLU,), skip=skip) if type(m) is nn.ReLU]
    refuse_nothing(places, model, "prelu", "nn.ReLU module", "choose a network such as resnet20")
    seen = channels(model, places) if channelwise else {}
    return swap(model, places, lambda name, act: nn.PReLU(seen.get(name, 1), init=init))


@torch.no_grad()
def channels(model: nn.Module, places: Sequence[tuple[str, nn.Module]]) -> dict[str, int]:
    """The channels that each of these modules reads, seen in a pass. Modes and hooks are put back."""
    seen: dict[str, set[tuple[int, int]]] = {name: set() for name, _ in places}

    def look(name: str) -> Any:
        return lambda m, inputs: seen[name].add((inputs[0].dim(), inputs[0].shape[1]))

    modes = [(m, m.training) for m in model.modules()]
    hooks = [m.register_forward_pre_hook(look(name)) for name, m in places]
    try:
        model.eval()
        if not any(_passes(model, x) for x in _inputs(model)):
            raise Mistake(f"prelu: {type(model).__name__} takes no square image of {min(SIDES)} to {max(SIDES)} pixels, so its channels are not seen; {REMEDY}")
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    for name, found in seen.items():
        if len(found) != 1 or min(found)[0] not in (2, 4):
            what = "is not used" if not found else f"reads inputs of (axes, channels) {', '.join(map(str, sorted(found)))}"
            raise Mistake(f"prelu: {name} of {type(model).__name__} {what}; a slope a channel needs one number of channels, [n c] or [n c h w]; {REMEDY}")
    return {name: min(found)[1] for name, found in seen.items()}


def _inputs(model: nn.Module) -> list[Tensor]:
    """Inputs that the network may take: a row of numbers where a linear layer comes first, else images of usual sides."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    like = next(iter(model.parameters()), torch.empty(0))
    deep = getattr(model, "in_chans", None) or (first.in_channels if isinstance(first, nn.Conv2d) else 3)
    images = [like.new_zeros(1, int(deep), side, side) for side in SIDES]
    return [like.new_zeros(1, first.in_features), *images] if isinstance(first, nn.Linear) else images


def _passes(model: nn.Module, x: Tensor) -> bool:
    try:
        model(x)
    except Exception:  # whatever a network says to an input of the wrong shape
        return False
    return True
