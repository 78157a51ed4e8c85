"""Residual expansion: a residual network as a sum over paths through its blocks, how much each length carries, and how the signal grows."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.kinds import Probe, as_found, differentiable
from convince.layers.places import residual_blocks
from convince.parts import Card
from convince.types import Bars, Curves, Findings, Reading

CARD = Card(
    part="residual-expansion",
    kind="probe",
    paper="residual-expansion",
    title="On residual network depth",
    year=2025,
    url="https://arxiv.org/abs/2510.03470",
    host="resnet:layers=(2,1),widths=(4,8)",
    tiny={"images": 4},
    departs=(
        "the expansion is of a trunk, the longest run of blocks that keep their shape; what follows it is left out",
        "a block's branch is its output less its input, so an activation behind the addition belongs to it",
        "terms up to the third come by forward differentiation at the trunk's input; where branches bend sharply they need not add up to the output",
        "paths are those of the derivative along the blocks' own inputs, for which the sum over lengths is exact; the paper's are of the signal",
    ),
)
Branch = Callable[[Tensor], Tensor]
_SIGNS = ("downsample", "shortcut", "use_res_connect", "has_skip", "drop_path", "drop_path1", "skipinit_gain")  # of a block with an addition


# -- expansion ---------------------------------------------------------------------------------------


def tower(branches: Sequence[Branch], x: Tensor, lam: float = 1.0) -> list[Tensor]:
    """``x_i = x_{i-1} + lam F_i(x_{i-1})``: the input and what each of the n blocks hands on."""
    states = [x]
    for branch in branches:
        states.append(states[-1] + lam * branch(states[-1]))
    return states


def residual_expansion(branches: Sequence[Branch], x: Tensor, order: int = 2, lam: float = 1.0) -> list[Tensor]:
    """Terms 0 to ``order`` of the tower in powers of ``lam``, at ``x``: x, lam sum_i F_i(x), lam^2 sum_{i<j} F_j'(x) F_i(x), and the third.

    Their sum misses the tower by O(lam^(order + 1)) where branches are smooth, by about lam^2.5 at order 2 where they are made of ReLUs. ``order`` is
    0 to 3. Each term is carried from block to block, so order 2 takes n forward derivatives, not n^2 / 2. The third holds ``F_k'`` of the second term
    so far and half of ``F_k''`` along the first, twice.
    """
    if order not in (0, 1, 2, 3):
        raise Mistake(f"residual-expansion: order={order} must be 0, 1, 2 or 3; path_terms gives all orders of a linear network")
    one = two = three = torch.zeros_like(x)
    for branch in branches:
        if order == 3:
            three = three + lam * (_along(branch, x, two) + _twice_along(branch, x, one) / 2)
        if order >= 2:
            two = two + lam * _along(branch, x, one)
        if order >= 1:
            one = one + lam * branch(x)
    return [x, one, two, three][: order + 1]


def _along(branch: Branch, x: Tensor, v: Tensor) -> Tensor:
    """``F'(x) v``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # torch's own, where it first differentiates forward
        slope: Tensor = jvp(branch, (x,), (v,))[1]
    return slope


def _twice_along(branch: Branch, x: Tensor, v: Tensor) -> Tensor:
    """``F''(x)[v, v]``."""
    return _along(lambda z: _along(branch, z, v), x, v)


def path_terms(branches: Sequence[Branch], states: Sequence[Tensor], v: Tensor, longest: int | None = None, lam: float = 1.0) -> list[Tensor]:
    """The tower's derivative along ``v`` by length of path: ``lam^k sum_{i1<...<ik} F_ik' ... F_i1' v`` for k = 0 to n, or to ``longest``.

    ``states`` are of :func:`tower`: each derivative is taken at its block's own input, so all terms add up to the derivative exactly. Of linear
    branches and ``v = x`` they are the expansion of the output itself: binomial(n, k) paths of length k.
    """
    if len(states) < len(branches):
        raise Mistake(f"path_terms: {len(states)} states for {len(branches)} branches; give what tower returns")
    n = len(branches)
    terms = [v]
    for i, (branch, x) in enumerate(zip(branches, states, strict=False), 1):
        rows = torch.stack(terms)
        slopes = _along(branch, torch.cat([x] * len(rows)), rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        grown = [terms[0], *(terms[k] + lam * slopes[k - 1] for k in range(1, len(terms)))]
        if len(grown) <= min(i, n if longest is None else longest):
            grown.append(lam * slopes[-1])
        terms = grown
    return terms


def signal_growth(states: Sequence[Tensor]) -> list[float]:
    """Root mean square of each state over that of the input. At most ``(1 + lam c)^n`` for branches that lengthen by ``c``; e^c for lam = 1/n."""
    first = float(states[0].double().square().mean().sqrt())
    if not first > 0:
        raise Mistake("signal_growth: the trunk's input is zero, so nothing grows; give inputs that differ from zero")
    return [float(s.double().square().mean().sqrt()) / first for s in states]


def jacobian_norm(answer: Callable[[Tensor], Tensor], x: Float[Tensor, "n ..."], gen: Generator | None = None, draws: int = 16) -> float:
    """Geometric complexity: the mean over rows of the squared Frobenius norm of d scores / d input [scores per unit of input, squared].

    Exact for at most ``draws`` scores; for more an unbiased estimate from as many random signs, which ``gen`` draws.
    """
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        scores = answer(x)
        k = scores.shape[1]
        if k > draws and gen is None:
            raise Mistake(f"jacobian_norm: {k} scores are more than draws={draws}; give a generator for the estimate, or draws={k}")
        rows = torch.eye(k) if k <= draws else torch.randint(0, 2, (draws, k), generator=gen) * 2.0 - 1
        total = 0.0
        for i, row in enumerate(rows.to(scores)):
            (gradient,) = torch.autograd.grad((scores * row).sum(), x, retain_graph=i + 1 < len(rows))
            total += float(gradient.double().square().sum())
    return total / len(x) / (1 if k <= draws else draws)


# -- the trunk of a network --------------------------------------------------------------------------


class Trunk(NamedTuple):
    """Blocks in a row that keep their shape: their names, the branch of each (its output less its input), and the input of the first."""

    names: list[str]
    branches: list[Branch]
    x: Tensor


def trunk(answer: nn.Module, x: Tensor, blocks: Sequence[str] = ()) -> Trunk:
    """The longest run of residual blocks, each fed with the output of the one before, in a pass of ``x``; the first of equally long ones.

    Blocks are known by attributes that only they have; ``blocks`` names others, or patterns such as "layer2.*". Raises Mistake where there is none.
    """
    every = {name.removeprefix("model."): m for name, m in answer.named_modules()}
    if blocks:
        known = {name for name in every if name and any(fnmatch.fnmatchcase(name, p) for p in blocks)}
        known -= {name for name in known if any(name.startswith(other + ".") for other in known)}  # layers inside a block
    else:
        known = {name for name, m in every.items() if any(hasattr(m, word) for word in _SIGNS)}
        known |= {block.name.removeprefix("model.") for block in residual_blocks(answer)}
        known -= {name for name in known if not _adds(every[name])}
        known -= {name for name in known if any(other.startswith(name + ".") for other in known)}  # stages around blocks
    runs: list[Trunk] = []
    before: list[Any] = [None]  # what the last block of the last run handed on

    def enter(module: nn.Module, inputs: Any, options: Any) -> None:
        if inputs and inputs[0] is not before[0]:
            runs.append(Trunk([], [], inputs[0].detach().clone()))

    def leave(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, options: Any, output: Any) -> None:
            if inputs and isinstance(output, Tensor) and output.shape == inputs[0].shape:
                runs[-1].names.append(name)
                runs[-1].branches.append(_branch(module, inputs[1:], options))
                before[0] = output
            else:
                before[0] = None

        return hook

    handles = []
    try:
        for name in known:
            handles += [every[name].register_forward_pre_hook(enter, with_kwargs=True), every[name].register_forward_hook(leave(name), with_kwargs=True)]
        with torch.no_grad():
            answer(x)
    finally:
        for handle in handles:
            handle.remove()
    best = max(runs, key=lambda run: len(run.names), default=None)
    if best is None or not best.names:
        named = f"residual blocks named {', '.join(blocks)}" if blocks else "residual blocks that it knows"
        raise Mistake(
            f"residual-expansion: {type(answer).__name__} has no {named} whose output is shaped like their input; choose a network such as resnet20, "
            f"or name its blocks: blocks=('blocks.*',)"
        )
    return best


def _adds(block: nn.Module) -> bool:
    return getattr(block, "has_skip", True) is not False and getattr(block, "use_res_connect", True) is not False


def _branch(block: nn.Module, rest: tuple[Any, ...], options: dict[str, Any]) -> Branch:
    def branch(x: Tensor) -> Tensor:
        found: Tensor = block(x.clone(), *rest, **options) - x  # a copy, since a block may begin by changing its input in place
        return found

    return branch


# -- the probe ---------------------------------------------------------------------------------------


@final
@dataclass
class ResidualExpansion(Probe):
    """Growth along the trunk, terms of the expansion up to ``order`` and what they miss, and the derivative by length of path up to ``longest``.

    ``images`` are looked at, evenly from those given. ``blocks`` names the blocks, where a network's are not known. Lengths are of the trunk's features.
    """

    order: int = 2
    longest: int = 12
    images: int = 16
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3) or self.longest < 1 or self.images < 1:
            raise Mistake(f"residual-expansion: order={self.order}, longest={self.longest}, images={self.images}: order 1 to 3, the others at least 1")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        differentiable(answer, "residual-expansion")
        if x.dim() < 2 or not len(x):
            raise Mistake(f"residual-expansion looks at a batch with at least one row, and the input has shape {tuple(x.shape)}")
        only = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
        x = x.detach()[torch.linspace(0, len(x) - 1, min(self.images, len(x))).long()]
        with as_found(answer), torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):  # the fused one has no forward derivative
            complexity = jacobian_norm(answer, x, generator("residual-expansion", "signs"))
            with torch.no_grad():
                names, branches, z = trunk(answer, x, only)
                states = tower(branches, z)
                terms = residual_expansion(branches, z, self.order)
                v = torch.randn(z.shape, generator=generator("residual-expansion", "direction")).to(z)
                paths = path_terms(branches, states, v, self.longest)
        growth = signal_growth(states)
        size = states[-1].double().norm()
        sums = [torch.stack(terms[: k + 1]).double().sum(0) for k in range(len(terms))]
        misses = [float((states[-1].double() - total).norm() / size) for total in sums] if float(size) > 0 else [0.0] * len(sums)
        carried = [float(term.double().norm() / v.double().norm()) for term in paths]
        readings = [
            Reading("blocks of the trunk", float(len(names)), f"from {names[0]} to {names[-1]}"),
            Reading("growth of the signal", growth[-1], "of the trunk's input"),
            Reading("mean length of paths", sum(k * c for k, c in enumerate(carried)) / sum(carried), "blocks, weighed by what they carry"),
            Reading("squared Jacobian of the scores", complexity, "mean over images"),
        ]
        for k, (term, miss) in enumerate(zip(terms, misses, strict=True)):
            if k:
                readings.append(Reading(f"term {k} of the expansion", float(term.double().norm() / z.double().norm()), "of the trunk's input"))
            readings.append(Reading(f"missed by terms up to {k}", miss, "of the trunk's output"))
        along = {"signal": [(float(i), value) for i, value in enumerate(growth)]}
        figures: list[Any] = [
            Curves("Growth of the signal along the trunk", "block", "of the trunk's input", along),
            Bars("Derivative by length of path", "of the direction's length", {f"{k} blocks": value for k, value in enumerate(carried)}),
        ]
        return Findings(readings, figures)
