"""Relevance: what each pixel adds to a score, carried back layer by layer by chosen rules, through any network that the rules know.

While :class:`carrying` is entered, every function that a tensor computed from the pixels goes through is read anew: its value is the same,
and its backward pass takes relevance of outputs to relevance of inputs. So one backward pass explains networks of modules and of functions
alike, with branches (relevance adds up where a tensor was read twice), and no module is touched. What has no rule is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.passes import must_reach
from convince.explain.reread import CONVS, MAXES, MEANS, MOVES, RELUS, UNITS, Box, Reread
from convince.fit.precision import full
from convince.kinds import as_found, differentiable

Linear = Callable[[Tensor, Tensor], Tensor]  # (inputs, weights) -> sums, linear in both, without a bias
Hidden = Literal["z+", "z", "epsilon", "alpha-beta"]
First = Literal["zB", "w2"]

LEAST = 1e-30  # a sum smaller than this is none: nothing is divided by it


# -- the rules, on one layer --------------------------------------------------------------------------


@dataclass
class Tally:
    """``dead`` counts units whose relevance found no input to go to: it is lost, and the sum with it."""

    dead: int = 0


def share(
    linear: Linear, terms: list[tuple[Tensor, Tensor]], r: Tensor, *, shift: Tensor | None = None, epsilon: float = 0.0, tally: Tally | None = None
) -> Tensor:
    """``R_i = sum_j z_ij / z_j R_j`` with ``z_ij = sum_k a_i^k w_ij^k`` over ``terms`` (a^k, w^k), and ``z_j`` their sum over i, plus ``shift``.

    ``epsilon`` is added to ``z_j`` away from 0. Where ``z_j`` is 0 the relevance is lost, and counted.
    """
    with torch.enable_grad():
        inputs = [a.detach().requires_grad_(True) for a, _ in terms]
        z = sum((linear(a, w) for a, (_, w) in zip(inputs, terms, strict=True)), start=torch.zeros((), dtype=r.dtype, device=r.device))
    total = z.detach() if shift is None else z.detach() + shift
    total = torch.where(total < 0, total - epsilon, total + epsilon)
    some = total.abs() > LEAST
    if tally is not None:
        tally.dead += int((~some & (r != 0)).sum())
    parts = torch.autograd.grad(z, inputs, torch.where(some, r / total.where(some, torch.ones_like(total)), 0))
    return torch.stack([a.detach() * part for a, part in zip(inputs, parts, strict=True)]).sum(0)


def _signed(a: Tensor, w: Tensor, sign: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The terms of ``(a w)^+``, or for ``sign=-1`` of ``(a w)^-``; inputs that are nowhere negative need only the first."""
    up, down = w.clamp(min=0), w.clamp(max=0)
    if sign < 0:
        up, down = down, up
    return [(a.clamp(min=0), up)] + ([(a.clamp(max=0), down)] if bool((a < 0).any()) else [])


def z_plus(linear: Linear, a: Tensor, w: Tensor, r: Tensor, tally: Tally | None = None, below: Tensor | None = None) -> Tensor:
    """z+ (deep Taylor, section 4): ``R_i = sum_j a_i w_ij^+ / sum_i' a_i' w_i'j^+ R_j``; an input below 0 counts with its negative weights.

    ``below`` marks outputs that are below 0 and have relevance all the same, for want of a ReLU behind them: that goes to what lowered them, ``z_ij^-``.
    """
    if below is None or not bool((below & (r != 0)).any()):
        return share(linear, _signed(a, w), r, tally=tally)
    return share(linear, _signed(a, w), r.masked_fill(below, 0), tally=tally) + share(linear, _signed(a, w, -1), r.masked_fill(~below, 0), tally=tally)


def z_box(linear: Linear, a: Tensor, w: Tensor, r: Tensor, box: Box, tally: Tally | None = None) -> Tensor:
    """zB (deep Taylor, section 4), inputs in ``[l, h]``: ``z_ij = a_i w_ij - l_i w_ij^+ - h_i w_ij^-``, in two terms that are never negative."""
    low, high = box
    return share(linear, [(a - low, w.clamp(min=0)), (a - high, w.clamp(max=0))], r, tally=tally)


def w_square(linear: Linear, a: Tensor, w: Tensor, r: Tensor, box: Box, tally: Tally | None = None) -> Tensor:
    """w^2 (deep Taylor, section 4): ``z_ij = w_ij^2``, the weight being that of the pixel: times ``(h_i - l_i)``, its scale in the normalised input."""
    low, high = box
    return share(linear, [((high - low).expand_as(a) ** 2, w**2)], r, tally=tally)


def epsilon_rule(linear: Linear, a: Tensor, w: Tensor, b: Tensor | None, r: Tensor, epsilon: float, tally: Tally | None = None) -> Tensor:
    """LRP-epsilon (Bach et al. 2015, eq. 58): ``z_ij = a_i w_ij``, ``z_j`` with the bias, which takes its share; ``epsilon=0`` is the z rule."""
    return share(linear, [(a, w)], r, shift=b, epsilon=epsilon, tally=tally)


def alpha_beta(linear: Linear, a: Tensor, w: Tensor, b: Tensor | None, r: Tensor, alpha: float, beta: float, tally: Tally | None = None) -> Tensor:
    """LRP-alpha-beta (Bach et al. 2015, eq. 60): ``R_i = sum_j (alpha z_ij^+ / z_j^+ - beta z_ij^- / z_j^-) R_j``, ``alpha - beta = 1``."""
    up, down = (None, None) if b is None else (b.clamp(min=0), b.clamp(max=0))
    found = alpha * share(linear, _signed(a, w), r, shift=up, tally=tally)
    return found - beta * share(linear, _signed(a, w, -1), r, shift=down) if beta else found


# -- which rule where ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """A layer that sums: ``linear(a, weight) + bias``. The bias has the shape of the output, 1 along every axis but ``axis``."""

    kind: Literal["conv", "linear", "constant"]
    linear: Linear
    weight: Tensor
    bias: Tensor | None = None
    axis: int = 1  # the channels of the output
    out: int = 0  # and of the weight

    def scaled(self, scale: Tensor, shift: Tensor, dims: int) -> Op | None:
        """This layer with ``y * scale + shift`` folded into it; None where they are not by channel."""
        k = self.weight.shape[self.out]
        by: list[Tensor] = []
        for value in (scale, shift):
            shape = [1] * (dims - value.dim()) + list(value.shape)
            side = shape.pop(self.axis)
            if len(shape) != dims - 1 or math.prod(shape) != 1 or side not in (1, k):
                return None
            by.append(value.reshape(-1).expand(k))
        weight, across = [1] * self.weight.dim(), [1] * dims
        weight[self.out], across[self.axis] = k, k
        bias = by[1].reshape(across) + (0 if self.bias is None else self.bias * by[0].reshape(across))
        return Op(self.kind, self.linear, self.weight * by[0].reshape(weight), bias, self.axis, self.out)


@final
@dataclass(frozen=True)
class Rules:
    """Rules by the kind of layer. ``first`` is that of layers which read the pixels; None: as the others.

    Pools, means and sums of branches are layers of equal weights: z+ where ``conv`` is z+ or alpha-beta, else as ``conv``.
    ``only_relu`` refuses units that are not a ReLU's.
    """

    conv: Hidden = "z+"
    linear: Hidden = "z+"
    first: First | None = None
    epsilon: float = 0.01
    alpha: float = 2.0
    beta: float = 1.0
    only_relu: bool = False

    def of(self, op: Op) -> Hidden:
        if op.kind == "linear":
            return self.linear
        return "z+" if op.kind == "constant" and self.positive else self.conv

    @property
    def positive(self) -> bool:
        return self.conv in ("z+", "alpha-beta")

    def back(self, op: Op, a: Tensor, r: Tensor, box: Box | None, below: Tensor | None, tally: Tally) -> Tensor:
        """Relevance of the inputs ``a`` of a layer, given that of its outputs, and which of them are ``below`` 0."""
        if box is not None and self.first is not None:
            return (z_box if self.first == "zB" else w_square)(op.linear, a, op.weight, r, box, tally)
        rule = self.of(op)
        if rule == "z+":
            return z_plus(op.linear, a, op.weight, r, tally, below)
        if rule == "alpha-beta":
            return alpha_beta(op.linear, a, op.weight, op.bias, r, self.alpha, self.beta, tally)
        return epsilon_rule(op.linear, a, op.weight, op.bias, r, self.epsilon if rule == "epsilon" else 1e-9, tally)


class _Weigh(torch.autograd.Function):
    """The value of a layer; backward, its rule."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, op: Op, box: Box | None, rules: Rules, tally: Tally) -> Tensor:
        y = op.linear(a, op.weight)
        y = y if op.bias is None else y + op.bias
        ctx.save_for_backward(a, y < 0 if rules.of(op) == "z+" else None)
        ctx.rest = op, box, rules, tally
        return y

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:
        a, below = ctx.saved_tensors
        op, box, rules, tally = ctx.rest
        return rules.back(op, a, r, box, below, tally), None, None, None, None


class _Keep(torch.autograd.Function):
    """``value(a)``, of one input each; backward, relevance as it is."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.shape = a.shape
        return value(a)

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor, None]:
        return r.sum_to_size(ctx.shape), None


# -- the pass over a network ---------------------------------------------------------------------------


@final
class carrying(Reread):
    """While it is entered, the backward pass of what the answer computes carries relevance by ``rules``.

    Begin with :meth:`begin` on the pixels. Batch norms, and other scales and shifts by channel, count as part of the layer before them.
    """

    def __init__(self, rules: Rules, who: str) -> None:
        super().__init__(who)
        self.rules, self.tally = rules, Tally()

    def begin(self, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """The pixels, of which each lies between ``low`` and ``high``."""
        x = x.detach().requires_grad_(True)
        return self.mark(x, (torch.full_like(x, low), torch.full_like(x, high)))

    def read(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in ("add", "sub", "__rsub__", "rsub", "mul", "div", "true_divide", "__rdiv__", "neg"):
            return self._arithmetic(name, *args, **kwargs)
        if name == "batch_norm":
            return self._batch_norm(*args, **kwargs)
        if name in CONVS:
            return self._conv(func, *args, **kwargs)
        if name in ("linear", "matmul"):
            return self._linear(func, *args, **kwargs)
        if name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"):
            return args[0]  # the answer is in eval mode
        if name in MEANS:
            if kwargs.get("mode") == "bicubic":
                raise self.refusal("bicubic interpolation")
            return self.weigh(
                args[0], Op("constant", lambda a, w: func(a, *args[1:], **kwargs) * w, torch.ones((), dtype=args[0].dtype, device=args[0].device))
            )
        if name in UNITS:
            return self._unit(name, func, *args, **kwargs)
        if name in MOVES or name in MAXES:
            return self.move(func, args, kwargs)
        return NotImplemented

    def weigh(self, a: Tensor, op: Op) -> Tensor:
        """The output of a layer."""
        box = self.seen(a).box
        out = _Weigh.apply(a, op, box, self.rules, self.tally)
        if op.kind != "constant":
            return self.mark(out, None, (a, a._version, op))
        if box is not None:
            box = (op.linear(box[0], op.weight), op.linear(box[1], op.weight))
        return self.mark(out, box)

    def affine(self, a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``a * scale + shift`` with constants: folded into the layer that made ``a`` where that can be, else a layer of one input a unit.

        Of one input, all relevance goes to it; under the rules in which a bias takes its share, the shift takes it. Normalised pixels stay pixels.
        """
        known = self.seen(a)
        if known.source is not None:
            source, version, op = known.source
            folded = op.scaled(scale, shift, a.dim())
            if folded is not None and source._version == version:
                return self.weigh(source, folded)
        if known.box is None and not self.rules.positive:
            return self.weigh(a, Op("constant", torch.mul, scale, shift))
        box = known.box
        if box is not None:
            ends = [end * scale + shift for end in box]
            box = (torch.minimum(*ends), torch.maximum(*ends))
        return self.mark(_Keep.apply(a, lambda v: v * scale + shift), box)

    def _arithmetic(self, name: str, a: Any, b: Any = None, *, alpha: float = 1, rounding_mode: str | None = None, **kwargs: Any) -> Tensor:
        if rounding_mode is not None or kwargs.get("out") is not None:
            raise self.refusal(f"{name} with rounding_mode or out")
        if name in ("__rsub__", "rsub"):
            name, a, b = "sub", b, a
        carries = [isinstance(t, Tensor) and t.requires_grad for t in (a, b)]
        like = a if carries[0] else b

        def constant(value: Any) -> Tensor:
            return torch.as_tensor(value, dtype=like.dtype, device=like.device)

        one, none = constant(1), constant(0)
        if name == "neg":
            return self.affine(a, -one, none)
        if name == "mul":
            if all(carries):
                raise self.refusal("the product of two computed maps (a gate)")
            return self.affine(like, constant(b if carries[0] else a), none)
        if name in ("div", "true_divide", "__rdiv__"):
            if carries[1] or name == "__rdiv__":
                raise self.refusal("division by a computed map")
            return self.affine(a, 1 / constant(b), none)
        sign = alpha if name == "add" else -alpha
        if not carries[0]:
            return self.affine(b, sign * one, constant(a))
        if not carries[1]:
            return self.affine(a, one, sign * constant(b))
        if sign != 1:
            b = self.affine(b, sign * one, none)
        both = self.move(torch.stack, (list(self.move(torch.broadcast_tensors, (a, b), {})),), {})
        return self.weigh(both, Op("constant", lambda v, w: v.sum(0) * w, one))

    def _batch_norm(
        self,
        a: Tensor,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if training or mean is None or var is None:
            raise self.refusal("batch norm by the statistics of the batch itself")
        scale = (var + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        across = [1, -1] + [1] * (a.dim() - 2)
        return self.affine(a, scale.view(across), shift.view(across))

    def _conv(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **kwargs: Any) -> Tensor:
        self._fixed(weight, bias)
        if bias is not None:
            bias = bias.view(1, -1, *[1] * (weight.dim() - 2))
        return self.weigh(input, Op("conv", lambda a, w: func(a, w, None, *rest, **kwargs), weight, bias))

    def _linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._fixed(weight, bias)
        if not input.requires_grad or (func is not F.linear and weight.dim() != 2):
            raise self.refusal("a matrix product other than of features with fixed weights [in out]")
        if bias is not None:
            bias = bias.view(*[1] * (input.dim() - 1), -1)
        return self.weigh(input, Op("linear", func, weight, bias, axis=-1, out=0 if func is F.linear else -1))

    def _fixed(self, *weights: Tensor | None) -> None:
        if any(w is not None and w.requires_grad for w in weights):
            raise self.refusal("a product of two computed tensors (attention, weights made from the image)")

    def _unit(self, name: str, func: Any, a: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        def value(v: Tensor) -> Tensor:  # on a copy: the function may be asked to write over its input
            return func(v.detach().clone(), *rest, **kwargs)

        if self.rules.only_relu and (name not in RELUS or bool(value(a.new_full((1,), -1.0)) != 0)):
            raise Mistake(f"{self.who} is derived for ReLU networks, and this one has {name!r}; use 'lrp', whose rules take it, or 'integrated-gradients'")
        box = self.seen(a).box
        return self.mark(_Keep.apply(a, value), None if box is None or name not in RELUS else (value(box[0]), value(box[1])))


# -- relevance of pixels ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relevance:
    """``pixels`` [n ...]; the relevance that was put in at the scores [n]; and how many units lost theirs."""

    pixels: Tensor
    start: Float[Tensor, " n"]
    dead: int

    @property
    def gap(self) -> Float[Tensor, " n"]:
        """``|sum R - f| / |f|``, 0 where nothing was put in (deep Taylor: conservation)."""
        off = (self.pixels.flatten(1).sum(1) - self.start).abs()
        return torch.where(self.start != 0, off / self.start.abs().clamp_min(1e-12), off)

    def table(self) -> dict[str, Any]:
        """Plain numbers of a batch: whether the sum was kept, and why not."""
        return {"conservation gap": float(self.gap.mean()), "dead units": self.dead, "images without relevance": int((self.start == 0).sum())}


def relevance(
    answer: nn.Module,
    x: Float[Tensor, "n ..."],
    target: Int[Tensor, " n"],
    rules: Rules,
    who: str,
    *,
    low: float = 0.0,
    high: float = 1.0,
    positive: bool = False,
    rows: int = 32,
) -> Relevance:
    """Relevance of each pixel for the target's score, which is put in whole at the output; ``positive``: only where it is above 0.

    Under zB values of ``x`` lie in ``[low, high]``. In fp32 or more, also under autocast: relevance is made of quotients. Raises Mistake for what has no rule.
    """
    differentiable(answer, who)
    slack = 1e-4 * (high - low)  # resized pixels may overshoot by rounding
    if rules.first == "zB" and bool((x < low - slack).any() or (x > high + slack).any()):
        least, most = (float(end) for end in x.detach().aminmax())
        raise Mistake(
            f"{who}: the input has values from {least:.3g} to {most:.3g}, outside {low=} to {high=}; set those to their range, or take 'w2' for the first layer"
        )
    found: list[Tensor] = []
    starts: list[Tensor] = []
    dead = 0
    with as_found(answer), torch.autocast(x.device.type, enabled=False):
        for p in answer.parameters():
            p.requires_grad_(False)
        for pixels, wanted in zip(full(x.detach()).split(rows), target.split(rows), strict=True):
            mode = carrying(rules, who)
            part = mode.begin(pixels, low, high)
            with mode:
                scores = answer(part)
            must_reach(scores, who)
            mode.seen(scores)
            start = scores.detach().gather(1, wanted[:, None])
            start = start.clamp(min=0) if positive else start
            (r,) = torch.autograd.grad(scores, part, torch.zeros_like(scores).scatter_(1, wanted[:, None], start))
            found.append(r)
            starts.append(start[:, 0])
            dead += mode.tally.dead
    return Relevance(torch.cat(found), torch.cat(starts), dead)


def named(values: Iterable[str], value: str, what: str) -> None:
    """Refuse a rule that is none of ``values``."""
    values = list(values)
    if value not in values:
        raise Mistake(f"{what}={value!r}: must be one of {', '.join(values)}")
