"""DeepLIFT: what each pixel adds to a score by its difference from a reference; differences are passed back through every unit (rescale rule)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.explain.passes import must_reach
from convince.explain.relevance import CONVS, MAXES, MEANS, MOVES, UNITS, Reread
from convince.fit.precision import full
from convince.kinds import Explainer, as_found, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="deep-lift",
    kind="explainer",
    title="Learning Important Features Through Propagating Activation Differences",
    year=2017,
    url="https://arxiv.org/abs/1704.02685",
    gradient="surrogate",
    departs=(
        "the rescale rule only; positive and negative contributions are not told apart (RevealCancel)",
        "a product of two computed maps (a gate) gives each factor its difference times the other's mean, the paper has no rule for it",
        "a max pool shares out the rise over the reference's maximum to the image's, and the fall to the reference's winner",
    ),
)

NEAR = 1e-7  # differences below this are none: the unit's own derivative is taken


class _Rescale(torch.autograd.Function):
    """A unit; backward, ``m = delta out / delta in`` for the first half of the rows, their references being the second (section 3.5.2)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
        out = value(a)
        (x, ref), (y, y_ref) = a.chunk(2), out.chunk(2)
        apart = (x - ref).abs() > NEAR
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(value(leaf).sum(), leaf)
        ctx.save_for_backward(torch.where(apart, (y - y_ref) / (x - ref).where(apart, torch.ones_like(x)), slope))
        return out

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[Tensor, None]:
        upper = m.chunk(2)[0] * ctx.saved_tensors[0]
        return torch.cat([upper, torch.zeros_like(upper)]), None


class _Max(torch.autograd.Function):
    """A pool by maximum; backward, ``max(y, y') - y'`` goes to the winners in x and ``y - max(y, y')`` to those in x', over the difference there."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(a)
        ctx.value = value
        return value(a)

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[Tensor, None]:
        (a,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = a.detach().requires_grad_(True)
            out = ctx.value(leaf)
        y, y_ref = out.detach().chunk(2)
        upper, most = m.chunk(2)[0], torch.maximum(y, y_ref)
        (found,) = torch.autograd.grad(out, leaf, torch.cat([upper * (most - y_ref), upper * (y - most)]))
        (x, ref), given = a.chunk(2), sum(found.chunk(2))
        apart = (x - ref).abs() > NEAR
        return torch.cat([torch.where(apart, given / (x - ref).where(apart, torch.ones_like(x)), 0), torch.zeros_like(x)]), None


class _Product(torch.autograd.Function):
    """``u v``; backward, ``(v + v') / 2`` for u and ``(u + u') / 2`` for v, whose parts sum to ``u v - u' v'``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(u, v)
        return u * v

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[Tensor, ...]:
        upper, found = m.chunk(2)[0], []
        for own, other in zip(ctx.saved_tensors, reversed(ctx.saved_tensors), strict=True):
            half = (upper * sum(other.chunk(2)) / 2).sum_to_size(own.chunk(2)[0].shape)
            found.append(torch.cat([half, torch.zeros_like(half)]))
        return tuple(found)


@final
class multiplying(Reread):
    """While it is entered, the backward pass carries DeepLIFT's multipliers; rows come in two halves, images and their references."""

    GATES = frozenset({"sigmoid", "hardsigmoid", "softplus", "exp", "square", "sqrt", "abs", "tanhshrink", "softsign", "logsigmoid"})
    LINEAR = frozenset({"add", "sub", "__rsub__", "rsub", "neg", "div", "true_divide"}) | (MOVES - {"where", "masked_fill", "maximum"})  # those choose by value

    def __init__(self, rows: int) -> None:
        super().__init__("deep-lift")
        self.rows = rows

    def read(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        carries = [isinstance(t, Tensor) and t.requires_grad for t in args]
        if name in UNITS | self.GATES:
            return self.mark(_Rescale.apply(self.halves(args[0]), lambda v: func(v.clone(), *args[1:], **kwargs)))
        if name in MAXES:
            return self.mark(_Max.apply(self.halves(args[0]), lambda v: self.first(func(v, *args[1:], **kwargs))))
        if name == "mul" and carries == [True, True]:
            return self.mark(_Product.apply(self.halves(args[0]), self.halves(args[1])))
        if name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"):
            return args[0]
        if name == "batch_norm" and (kwargs.get("training") or kwargs.get("running_mean", args[1:2]) is None):
            raise self.refusal("batch norm by the statistics of the batch itself")
        weighed = name in CONVS or name in ("linear", "matmul", "mul", "batch_norm")
        if weighed and (sum(carries) > 1 or not carries[0]) and name != "mul":
            raise self.refusal("a product of two computed tensors (attention, weights made from the image)")
        if name == "__rdiv__" or (name in ("div", "true_divide") and carries[1:] == [True]):
            raise self.refusal("division by a computed map")
        if weighed or name in MEANS or name in self.LINEAR:
            return self.mark(func(*args, **kwargs))  # linear: the gradient is the multiplier
        return NotImplemented

    def halves(self, a: Tensor) -> Tensor:
        """``a``, whose rows must still be images and then references."""
        if a.dim() == 0 or len(a) % (2 * self.rows):
            raise self.refusal(f"a unit on {tuple(a.shape)}, whose rows are no images any more")
        return a

    @staticmethod
    def first(out: Any) -> Tensor:
        """The maxima, where a function gives their places too."""
        return out if isinstance(out, Tensor) else out[0]


def deep_lift(
    answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"], baseline: Tensor | float = 0.0, rows: int = 16
) -> Float[Tensor, "n ..."]:
    """``C_i = m_i (x_i - x'_i)``, multipliers by the rescale rule and the chain rule (eqs 1 to 3); sums over a row to ``Y(x) - Y(x')``.

    ``baseline`` x' [pixels 0 to 1]: a number, or a tensor that broadcasts to ``x``. The answer must be in eval mode.
    Raises Mistake for functions without a multiplier (softmax, attention, layer norm).
    """
    differentiable(answer, "deep-lift")
    found = []
    with as_found(answer), torch.autocast(x.device.type, enabled=False):
        for p in answer.parameters():
            p.requires_grad_(False)
        x = full(x.detach())
        references = (torch.zeros_like(x) + baseline).detach()
        for pixels, ref, wanted in zip(x.split(rows), references.split(rows), target.split(rows), strict=True):
            mode = multiplying(len(pixels))
            both = mode.mark(torch.cat([pixels, ref]).requires_grad_(True))
            with mode:
                scores = answer(both)
            must_reach(scores, "deep-lift")
            mode.seen(scores)
            start = torch.zeros_like(scores)
            start[: len(pixels)].scatter_(1, wanted[:, None], 1.0)
            (m,) = torch.autograd.grad(scores, both, start)
            found.append(m[: len(pixels)] * (pixels - ref))
    return torch.cat(found)


@final
@dataclass
class DeepLift(Explainer):
    """The map is the sum over channels of :func:`deep_lift`; values of one image sum to the score less the reference's.

    ``baseline`` [pixel value, 0 to 1]: an even reference image of that value. The table has the mean gap of that sum ("completeness gap").
    """

    fast = False

    baseline: float = 0.0

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        x = x.detach()
        found = deep_lift(answer, x, target, self.baseline)
        with torch.no_grad():
            rise = [answer(pixels).gather(1, target[:, None])[:, 0] for pixels in (x, torch.full_like(x, self.baseline))]
        gap = (found.flatten(1).sum(1) - (rise[0] - rise[1])).abs().mean()
        return Explanation((found if found.dim() > 2 else found[:, None]).sum(1, keepdim=True), {"contribution": found}, {"completeness gap": float(gap)})
