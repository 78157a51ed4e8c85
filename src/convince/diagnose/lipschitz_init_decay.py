"""Lipschitz init decay: how much of signal and gradient each layer passes on, now and at a fresh start."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.randomness import preserved, seed_global
from convince.kinds import Probe, as_found, differentiable
from convince.layers.one_lipschitz import predicted_gain
from convince.parts import Card
from convince.types import Curves, Findings, Reading

CARD = Card(
    part="lipschitz-init-decay",
    kind="probe",
    paper="lipschitz-init-decay",
    title="1-Lipschitz Network Initialization for Certifiably Robust Classification Applications: A Decay Problem",
    year=2025,
    url="https://arxiv.org/abs/2503.00240",
    expects=("labels",),
    departs=(
        "the predicted shares are our own formulas for wide layers with normal weights; the paper has exact ones and upper bounds",
        "the fresh start redraws each layer of a copy by the law of its own type; a law that a network lays over its layers when it is built is not known",
        "variances are mean squares over units and images, which for zero biases and weights of mean zero is the same in expectation",
        "q of SLL begins at 1 and biases at 0; the released SLL draws both",
    ),
)
FLOOR = 1e-6  # a mean square below this is taken for a lost signal


# -- the measurement ---------------------------------------------------------------------------------


class Profile(NamedTuple):
    """Mean squares of what each layer is given, in the order of calls, then of the output: ``signal``, and ``gradient`` of the objective in it.

    ``names`` and ``gains`` (output over input of the layer alone) have one entry less.
    """

    names: list[str]
    signal: list[float]
    gradient: list[float]
    gains: list[float]


def profile(net: nn.Module, layers: Mapping[str, nn.Module], x: Tensor, objective: Callable[[Tensor], Tensor]) -> Profile:
    """One pass forward and one backward. A layer that is called twice counts twice; one that is not called, or not with numbers, is left out."""
    names: list[str] = []
    inputs: list[Tensor] = []
    signal: list[float] = []
    gains: list[float] = []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            after = output[0] if isinstance(output, tuple) else output
            if args and torch.is_tensor(args[0]) and args[0].is_floating_point() and torch.is_tensor(after):
                again = sum(n.partition(", call ")[0] == name for n in names)
                names.append(f"{name}, call {again + 1}" if again else name)
                inputs.append(args[0])
                signal.append(mean_square(args[0]))
                gains.append(mean_square(after) / max(signal[-1], 1e-300))

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        output = net(x.detach().clone().requires_grad_(True))
    finally:
        for handle in handles:
            handle.remove()
    if not names or not output.requires_grad:
        what = "has no layer with a matrix of weights that is given numbers" if not names else "passes no gradient from its output to its input"
        raise Mistake(f"lipschitz-init-decay: {type(net).__name__} {what}; choose a network of linear or convolutional layers")
    reaching = [i for i in inputs if i.requires_grad]
    found = dict(zip(map(id, [*reaching, output]), torch.autograd.grad(objective(output), [*reaching, output], allow_unused=True), strict=True))
    gradient = [0.0 if (g := found.get(id(i))) is None else mean_square(g) for i in (*inputs, output)]
    return Profile(names, [*signal, mean_square(output)], gradient, gains)


def mean_square(x: Tensor) -> float:
    """Over all elements, in float64."""
    return float(x.detach().double().square().mean())


def decay_rate(values: list[float]) -> float:
    """``exp`` of the mean log ratio of neighbours: 0.1 loses nine tenths a layer, 1 keeps all."""
    return math.exp((math.log(max(values[-1], 1e-300)) - math.log(max(values[0], 1e-300))) / (len(values) - 1))


def layers_until(rate: float, floor: float = FLOOR) -> int | None:
    """Layers of this rate that bring a mean square from 1 to below ``floor``; None where it does not fall."""
    return math.floor(math.log(floor) / math.log(rate)) + 1 if rate < 1 else None


def depth_profile(make: Callable[[], nn.Module], depth: int, x: Float[Tensor, "n d"], gen: Generator) -> Profile:
    """Of ``depth`` layers in a row, each fresh from ``make``; the gradient is that of the output's product with normal numbers."""
    net = nn.Sequential(*(make() for _ in range(depth)))
    return profile(net, dict(net.named_children()), x, lambda out: (out * torch.randn(out.shape, generator=gen, dtype=out.dtype)).sum())


def layers_of(net: nn.Module) -> dict[str, nn.Module]:
    """By name the innermost modules that own a parameter of two axes or more: linear layers, convolutions, AOL, SLL ..."""
    owners = {
        name: m
        for name, m in net.named_modules()
        if ".parametrizations" not in name and (is_parametrized(m) or any(p.dim() >= 2 for p in m.parameters(recurse=False)))
    }
    return {name: m for name, m in owners.items() if not any(other.startswith(f"{name}." if name else "") for other in owners if other != name)}


def redraw(net: nn.Module) -> int:
    """Draw every layer's weights anew by its own law, inner modules first; how many of :func:`layers_of` have one. Reads the global random state."""
    redrawn: set[int] = set()
    for m in reversed(list(net.modules())):
        reset = getattr(m, "reset_parameters", getattr(m, "_reset_parameters", None))
        if callable(reset) and not is_parametrized(m):
            reset()
            redrawn.update(map(id, m.modules()))
    return sum(id(m) in redrawn for m in layers_of(net).values())


# -- the probe ---------------------------------------------------------------------------------------


@final
@dataclass
class LipschitzInitDecay(Probe):
    """Mean square of what each layer is given and of the loss's gradient in it, by depth: of the answer as it stands, and of a copy drawn afresh.

    The answer is read in eval mode, the fresh copy as a first training step would see it. Where the signal falls layer by layer at the fresh start,
    rescaling the weights of 1-Lipschitz layers does not help; orthogonal weights do, residual layers (SLL) slow it, and biases away from 0 keep a
    signal, if not that of the image. ``images``: how many, evenly through those given.
    """

    images: int = 32

    def __post_init__(self) -> None:
        if self.images < 2:
            raise Mistake(f"lipschitz-init-decay: images={self.images} must be at least 2, since batch norm takes its scale from them")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        differentiable(answer, "lipschitz-init-decay")
        if len(x) < 2:
            raise Mistake(f"lipschitz-init-decay needs at least 2 labelled images, and got {len(x)}")
        rows = torch.linspace(0, len(x) - 1, min(self.images, len(x))).long().to(x.device)
        x, y = x[rows], y[rows]

        def loss(scores: Tensor) -> Tensor:
            return F.cross_entropy(full(scores), y, reduction="sum")

        with as_found(answer), torch.autocast(x.device.type, enabled=False), preserved():
            layers = layers_of(answer)
            profiles = {"now": profile(answer, layers, x, loss)}
            fresh = copy.deepcopy(answer)
            seed_global("lipschitz-init-decay")
            redrawn = redraw(fresh)
            if redrawn:
                profiles["fresh"] = profile(fresh.train(), layers_of(fresh), x, loss)
        readings = [Reading("layers drawn anew for the fresh start", float(redrawn), f"of {len(layers)}")]
        for when, found in profiles.items():
            rate = decay_rate(found.signal)
            readings.append(Reading(f"{when}: signal passed on by a layer", rate, "ratio of mean squares"))
            readings.append(Reading(f"{when}: gradient passed back by a layer", decay_rate(found.gradient[::-1]), "ratio of mean squares"))
            if (until := layers_until(rate)) is not None:
                readings.append(Reading(f"{when}: depth at which a signal of 1 falls below {FLOOR:g}", float(until), "layers"))
            places = [*(f"what {name} is given" for name in found.names), "scores"]
            for place, signal, gradient in zip(places, found.signal, found.gradient, strict=True):
                readings.append(Reading(f"{when}: {place}, signal", signal, "mean square"))
                readings.append(Reading(f"{when}: {place}, gradient", gradient, "mean square"))
        for name, gain in zip(profiles["fresh"].names, profiles["fresh"].gains, strict=True) if redrawn else ():
            if (predicted := predicted_gain(layers[name.partition(", call ")[0]])) is not None:
                readings.append(Reading(f"fresh: passed on by {name} alone", gain, "ratio of mean squares"))
                readings.append(Reading(f"fresh: passed on by {name} alone, predicted", predicted, "ratio of mean squares"))
        figures = []
        for title, field in (("Signal by depth", "signal"), ("Gradient by depth", "gradient")):
            series = {when: [(float(i), v) for i, v in enumerate(getattr(found, field)) if v > 0] for when, found in profiles.items()}
            figures.append(Curves(title, "layer", "mean square", series, log=True))
        return Findings(readings, figures)
