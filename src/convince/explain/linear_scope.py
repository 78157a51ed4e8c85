"""Linear scope: freezes what every non-linear unit decided for one image, so that the network becomes a matrix to probe from both sides."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from convince.errors import Mistake
from convince.explain.passes import ROWS
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.kinds import Explainer, as_found, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="linear-scope",
    kind="explainer",
    paper="linear-scope",
    title="A Tour of Convolutional Networks Guided by Linear Interpreters",
    year=2019,
    url="https://arxiv.org/abs/1908.05168",
    departs=(
        "layer and group normalisation are frozen as the paper freezes instance normalisation: the scale stays, the mean is still subtracted",
        "the gate of a channel (squeeze and excitation) counts as decided, like a ReLU's; the paper's classifiers have none",
        "the normalisation of pixels is part of the network, so its mean is one of the biases",
    ),
)

SHARE = ROWS // 4  # rows at once: the graph of the frozen pass is larger than a gradient's


def words(text: str) -> frozenset[str]:
    """Names, spelt in one line."""
    return frozenset(text.split())


# Names of torch's functions, as name_of has them.
MOVES = words(
    "permute transpose movedim swapaxes flatten unflatten reshape view squeeze unsqueeze chunk split split_with_sizes unbind narrow select "
    "__getitem__ flip roll expand pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle T mT H mH expand_as view_as reshape_as"
)
COPIES = words(
    "contiguous clone to float double half bfloat16 type type_as detach data real dropout dropout1d dropout2d dropout3d alpha_dropout "
    "feature_alpha_dropout feature_dropout"
)
ACTIVATIONS = words(
    "relu relu6 leaky_relu rrelu prelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh hardshrink softshrink softplus softsign sigmoid "
    "logsigmoid tanh tanhshrink threshold clamp clamp_min clamp_max clip exp expm1 log log1p sqrt rsqrt square abs pow reciprocal __rdiv__ sin cos erf"
)
CONSTANTS = words("zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor")
SUMS = words("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum interpolate upsample")
CONVOLUTIONS = words("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear")
PRODUCTS = words("mul multiply div divide true_divide matmul bmm mm einsum __rmatmul__")


def name_of(func: Any) -> str:
    """A torch function's name; of one that works in place, the name of the other; of a property its own."""
    name: str = getattr(func, "__name__", str(func))
    if name == "__get__":
        return str(func.__self__.__name__)
    return name if name.startswith("__") else name.rstrip("_")


def tensors(args: Any) -> Iterator[Tensor]:
    """Tensors among arguments, also in lists."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors(arg)


@final
class frozen_gates(TorchFunctionMode):
    """While it is entered, a tensor may have a twin, and what torch computes from the tensor, the frozen network computes from the twin.

    A unit ``y = h(a)`` gives ``y' = s a'`` with ``s = h(a) / a`` of the tensor itself (0 where ``a = 0``); max-pooling takes what it took;
    biases, shifts and added constants are left out. So the twin is linear in where it began. Nothing is changed in any network.
    """

    def __init__(self, x: Tensor, twin: Tensor) -> None:
        super().__init__()
        self.twins = WeakTensorKeyDictionary()
        self.twins[x] = twin

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        if name_of(func).endswith("_as"):  # of the other tensor only the shape is read
            kwargs, args = {}, (args[0], next(tensors((*args[1:], *kwargs.values()))).detach())
        held = [self.twins[t] for t in tensors((*args, *kwargs.values())) if t in self.twins]
        if not held:
            return func(*args, **kwargs)
        if any(twin is None for twin in held):
            raise Mistake("linear-scope: this network changes a part of a tensor in place and reads the whole; it cannot be frozen, use 'integrated-gradients'")
        first, name = args[0], name_of(func)
        changed = getattr(func, "__name__", "") == name + "_" or any(v is True for v in (*args[1:], *kwargs.values()))
        before = first.clone() if changed and isinstance(first, Tensor) else first
        out = func(*args, **kwargs)
        outs = [o for o in tensors((out,)) if o.is_floating_point() or o.is_complex()]
        if not outs or name in CONSTANTS or (out is first and name in COPIES):
            return out
        if out is first and first._is_view():
            self.twins[first._base] = None  # has changed too, and its twin has not
        with torch.enable_grad():  # the reference needs no graph
            found = self._twin(func, name, (before, *args[1:]), kwargs, outs[0], self.twins.get(first) if isinstance(first, Tensor) else None)
        for o, twin in zip(outs, tensors((found,)), strict=False):
            self.twins[o] = twin
        return out

    def _twin(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Tensor, twin: Tensor | None) -> Any:
        """``args[0]`` as it was before the call, and its twin; the others hold theirs."""
        first = args[0]
        if twin is not None and not any(t in self.twins for t in tensors((*args[1:], *kwargs.values()))):
            if name in ("detach", "data"):
                return twin
            if name in MOVES or name in COPIES or name in SUMS:
                return func(twin, *args[1:], **kwargs)
            if name in ACTIVATIONS:
                return gate(first, out) * twin
            if name in CONVOLUTIONS:
                return func(twin, args[1] if len(args) > 1 else kwargs.pop("weight"), None, *args[3:], **{k: v for k, v in kwargs.items() if k != "bias"})
            if name in NORMS and func is getattr(F, name):
                return NORMS[name](first, twin, **_bound(func, args, kwargs))
            if "max_pool" in name:
                _, index = getattr(F, name.removesuffix("_with_indices"))(first, *args[1:], **{**kwargs, "return_indices": True})
                return twin.flatten(2).gather(2, index.flatten(2)).view_as(index)
            if name in ("amax", "max") and (len(args) > 1 or "dim" in kwargs):
                return _largest(first, twin, *args[1:], **kwargs)
            if name == "pad":
                return F.pad(twin, **{**_bound(F.pad, args, kwargs), "value": None})
            if name == "neg":
                return -twin
        if name in ("cat", "concat", "concatenate", "stack"):
            return func([self._or_zero(t) for t in first], *args[1:], **kwargs)
        if name in ("add", "sub", "subtract", "__rsub__", "rsub"):
            other = self._or_zero(args[1] if len(args) > 1 else kwargs.pop("other"))
            one = self._or_zero(first) if twin is None else twin
            return torch.add(one, other, **kwargs) if name == "add" else torch.sub(*((other, one) if "rsub" in name else (one, other)), **kwargs)
        if name in PRODUCTS:
            return self._product(func, name, args, kwargs, twin)
        raise Mistake(f"linear-scope: no rule says what {name!r} decides for an image (attention has none); use 'integrated-gradients' for this network")

    def _or_zero(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return 0
        found = self.twins.get(value)
        return torch.zeros_like(value) if found is None else found

    def _product(self, func: Any, name: str, args: Any, kwargs: Any, twin: Tensor | None) -> Tensor:
        """A product with weights is linear; of two that depend on the image, the one spread over the other is a decided gate."""
        plain: Callable[..., Tensor] = {"mul": torch.mul, "multiply": torch.mul}.get(name, torch.div if "div" in name else func)
        known = [twin if i == 0 and twin is not None else self.twins.get(t) if isinstance(t, Tensor) else None for i, t in enumerate(args)]
        moving = [i for i, t in enumerate(known) if t is not None]
        if len(moving) == 2 and plain is torch.mul and _entries(args[0]) != _entries(args[1]):
            moving = [max(moving, key=lambda i: _entries(args[i]))]
        if len(moving) != 1 or (plain is torch.div and moving != [0]):
            raise Mistake(f"linear-scope: {name!r} of two tensors that both depend on the image (attention) has no rule; use 'integrated-gradients'")
        return plain(*(known[i] if i in moving else t for i, t in enumerate(args)), **kwargs)


def gate(a: Tensor, y: Tensor) -> Tensor:
    """``s = h(a) / a``, what a unit decided; 0 where ``a = 0``."""
    return torch.where(a != 0, y / torch.where(a != 0, a, 1), 0)


def _entries(t: Tensor) -> int:
    """How many entries are not repeats of another along an expanded axis."""
    return math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)


def _bound(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return {k: v for k, v in bound.arguments.items() if k != "input"}


def _batch_norm(a: Tensor, twin: Tensor, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> Tensor:
    if training:
        raise Mistake("linear-scope: a batch norm here takes the statistics of its batch, so an image's scores depend on those beside it; keep running ones")
    return F.batch_norm(twin, torch.zeros_like(running_mean), running_var, weight, None, False, 0.0, eps)


def _standardised(a: Tensor, twin: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """``(a' - mean a') / std a``: the scale is the reference's."""
    return (twin - twin.mean(dims, keepdim=True)) / (a.var(dims, unbiased=False, keepdim=True) + eps).sqrt()


def _layer_norm(a: Tensor, twin: Tensor, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    found = _standardised(a, twin, tuple(range(-len(normalized_shape), 0)), eps)
    return found if weight is None else found * weight


def _group_norm(a: Tensor, twin: Tensor, num_groups: int, weight: Any, bias: Any, eps: float) -> Tensor:
    grouped = [t.reshape(len(t), num_groups, -1) for t in (a, twin)]
    found = _standardised(grouped[0], grouped[1], (2,), eps).view_as(a)
    return found if weight is None else found * weight.view(-1, *[1] * (a.dim() - 2))


def _instance_norm(
    a: Tensor, twin: Tensor, running_mean: Any, running_var: Any, weight: Any, bias: Any, use_input_stats: bool, momentum: float, eps: float
) -> Tensor:
    if use_input_stats:
        return _group_norm(a, twin, a.shape[1], weight, None, eps)
    return _batch_norm(a, twin, running_mean, running_var, weight, None, False, 0.0, eps)


NORMS: dict[str, Callable[..., Tensor]] = {"batch_norm": _batch_norm, "layer_norm": _layer_norm, "group_norm": _group_norm, "instance_norm": _instance_norm}


def _largest(a: Tensor, twin: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """The twin where ``a`` is largest, ties shared evenly."""
    best = (a == a.amax(dim, keepdim=True)).to(twin.dtype)
    return (twin * best / best.sum(dim, keepdim=True)).sum(dim, keepdim=keepdim)


def linear_pass(answer: nn.Module, x: Float[Tensor, "n ..."], v: Float[Tensor, "n ..."]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """``f(x)`` and ``F_x v``: each row of ``v`` through the network as it was decided for the same row of ``x``. Differentiable in ``v``, and linear."""
    x = x.detach()
    with as_found(answer), torch.no_grad(), frozen_gates(x, v) as scope:
        scores = answer(x)
    found = scope.twins.get(scores)
    if found is None:
        raise Mistake(f"linear-scope: the scores of this answer ({type(answer).__name__}) do not come from its input by torch functions; use 'occlusion'")
    return full(scores), full(found)


class LinearInterpreter:
    """The affine map that a network is for each image of ``x``: ``f(x) = F_x x + r_x``, exactly. Rows do not depend on each other.

    Memory: one graph of the network for all rows of ``x``.
    """

    def __init__(self, answer: nn.Module, x: Float[Tensor, "n ..."]) -> None:
        self.answer, self.x = answer, x.detach()
        self._from = self.x.clone().requires_grad_(True)
        self.scores, self._linear = linear_pass(answer, self.x, self._from)
        self.linear: Float[Tensor, "n k"] = self._linear.detach()
        """``F_x x``: the scores without any bias."""

    def forward(self, v: Float[Tensor, "n ..."]) -> Float[Tensor, "n k"]:
        """``F_x v``."""
        return linear_pass(self.answer, self.x, v.detach())[1].detach()

    def transpose(self, u: Float[Tensor, "n k"]) -> Float[Tensor, "n ..."]:
        """``F_x' u``: exact, as the gradient of what is linear."""
        if not self._linear.requires_grad:
            return torch.zeros_like(self.x)
        (found,) = torch.autograd.grad(self._linear, self._from, u, retain_graph=True)
        return found

    def row(self, k: Int[Tensor, " n"] | int) -> Float[Tensor, "n ..."]:
        """Row ``k`` of each F_x: what an output looks at; one class for all images, or one each."""
        k = torch.as_tensor(k, device=self.x.device).expand(len(self.x))
        return self.transpose(F.one_hot(k, self.linear.shape[1]).to(self.linear))

    def column(self, *place: int) -> Float[Tensor, "n k"]:
        """The column of each F_x at an input value, say (channel, row, column): what an impulse there does to the scores."""
        impulse = torch.zeros_like(self.x)
        impulse[(slice(None), *place)] = 1  # type: ignore[index]
        return self.forward(impulse)

    def residual(self) -> Float[Tensor, "n k"]:
        """``r_x = f(x) - F_x x``: every bias, carried to the scores by the same gates."""
        return self.scores - self.linear

    def bias_share(self) -> Float[Tensor, "n k"]:
        """``|r| / (|r| + |F x|)`` of each score, 0 to 1."""
        r, linear = self.residual().abs(), self.linear.abs()
        return r / (r + linear).clamp_min(1e-12)

    def svd(self, count: int, steps: int = 30, seed: int = 0) -> tuple[Float[Tensor, "n k q"], Float[Tensor, "n q"], Float[Tensor, "n q ..."]]:
        """The ``count`` largest singular values of each F_x with their score and image vectors, by power iteration on forward and transpose alone."""
        shape, d = self.x.shape[1:], self.x[0].numel()
        if not 1 <= count <= min(d, self.linear.shape[1]):
            raise Mistake(f"linear-scope: svd({count}): a map from {d} values to {self.linear.shape[1]} scores has 1 to {min(d, self.linear.shape[1])}")
        start = torch.randn(d, count, generator=generator("linear-scope", seed)).to(self.x)
        images = torch.linalg.qr(start).Q.expand(len(self.x), -1, -1)

        def through(images: Tensor) -> Tensor:
            return torch.stack([self.forward(v.view(-1, *shape)) for v in images.unbind(2)], 2)

        for _ in range(steps):
            back = [self.transpose(u).flatten(1) for u in torch.linalg.qr(through(images)).Q.unbind(2)]
            images = torch.linalg.qr(torch.stack(back, 2)).Q
        left, values, turn = torch.linalg.svd(through(images), full_matrices=False)
        return left, values, (images @ turn.mT).mT.unflatten(2, shape)


@final
@dataclass
class LinearScope(Explainer):
    """The map is the votes of pixels for the target, ``row_k * x`` summed over channels: they sum to its score less its bias ``r_k``.

    ``images["row"]`` is row k of F_x, what the score looks at. The table has the mean share of the bias in the target's score ("bias share")
    and the share of images whose class stays when the bias is left out ("class without bias").
    """

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "linear-scope")
        rows, shares, kept = [], [], []
        for pixels, wanted in zip(x.detach().split(SHARE), target.split(SHARE), strict=True):
            scope = LinearInterpreter(answer, pixels)
            rows.append(full(scope.row(wanted)))
            shares.append(scope.bias_share().gather(1, wanted[:, None]))
            kept.append(scope.scores.argmax(1) == scope.linear.argmax(1))
        row = torch.cat(rows)
        votes = row * x.detach()
        shown = votes if votes.dim() > 2 else votes[:, None]
        table = {"bias share": float(torch.cat(shares).mean()), "class without bias": float(torch.cat(kept).double().mean())}
        return Explanation(shown.sum(1, keepdim=True), {"row": row}, table)
