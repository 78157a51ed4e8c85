"""B-cos: layers that make a network its input times a matrix which depends on it, and the map of what each pixel adds to a score."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convince.errors import Mistake
from convince.explain.passes import must_reach
from convince.kinds import Explainer
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="b-cos",
    kind="explainer",
    paper="b-cosification",
    title="B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable",
    year=2024,
    url="https://arxiv.org/abs/2411.00715",
    expects=("images", "b-cosification"),
    departs=(
        "it explains runs trained with b-cosification and refuses all others, by name or because their contributions do not add up to the score",
        "the window that smooths the opacity of the colours is 15 pixels at 224 px, as in the released code, and as large a share of other images",
    ),
)
EPS = 1e-6
ROWS = 32  # images in one pass with gradients
GAP = 1e-3  # between the score and the sum of contributions, as a share of their size
ROUNDING = 1e-6  # of the scores themselves


# -- the layers ----------------------------------------------------------------------------------------


def bcos_scale(wx: Tensor, norm: Tensor, b: float) -> Tensor:
    """``|w.x| / |x|`` for B = 2, else ``(|w.x| / |x| + 1e-6)^(B - 1)``: what a B-cos unit multiplies ``w.x`` by. The weight keeps its own length."""
    aligned = wx.abs() / norm
    return aligned if b == 2 else (aligned + EPS) ** (b - 1)


def _units(wx: Tensor, norm: Tensor, b: float, steady: bool) -> Tensor:
    if b == 1:
        return wx
    scale = bcos_scale(wx, norm, b)
    return wx * (scale.detach() if steady else scale)


@final
class Encode(nn.Module):
    """``[x, -x]`` of normalised images: the six channels r, g, b, 1-r, 1-g, 1-b of the paper after normalisation by (mean, 1-mean) and (std, std)."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        return torch.cat([x, -x], 1)


def patch_norms(x: Float[Tensor, "n c h w"], conv: nn.Conv2d) -> Float[Tensor, "n g i j"]:
    """``|x| = sqrt(sum of squares + 1e-6)`` of each patch that the convolution sees, one for each of its groups."""
    squares = x.square().unflatten(1, (conv.groups, -1)).sum(2)
    ones = x.new_ones(1, 1, *conv.kernel_size)
    sums = F.conv2d(squares.flatten(0, 1)[:, None], ones, None, conv.stride, conv.padding, conv.dilation)
    return (sums[:, 0].unflatten(0, squares.shape[:2]) + EPS).sqrt()


@final
class BcosConv2d(nn.Conv2d):
    """``s * (w.x)`` with ``s`` of :func:`bcos_scale`; one that reads the image encodes it first. ``shift`` is added to class scores."""

    b: float
    steady = False  # the scale is a constant for gradients
    shift = 0.0
    encode: nn.Module | None

    @staticmethod
    def of(conv: nn.Conv2d, b: float, *, reads_image: bool = False, bias: bool = False) -> BcosConv2d:
        """Made from a convolution, with its own weight; for one that reads the image ``(w/2, -w/2)``, which gives ``w.x`` of the encoded image."""
        inputs = conv.in_channels * (2 if reads_image else 1)
        shape = (inputs, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        made = BcosConv2d(*shape, bias=False, device="meta")  # type: ignore[arg-type]
        made.weight = nn.Parameter(torch.cat([conv.weight, -conv.weight], 1).detach() / 2) if reads_image else conv.weight
        made.bias = conv.bias if bias else None
        made.b, made.encode = b, Encode() if reads_image else None
        return made

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        x = x if self.encode is None else self.encode(x)
        norm = patch_norms(x, self)
        if self.groups > 1:
            norm = norm.repeat_interleave(self.out_channels // self.groups, 1)
        y = _units(self._conv_forward(x, self.weight, None), norm, self.b, self.steady)
        return y + (self.shift if self.bias is None else self.bias.view(-1, 1, 1) + self.shift)


@final
class BcosLinear(nn.Linear):
    """:class:`BcosConv2d` on vectors, the last axis of its input."""

    b: float
    steady = False
    shift = 0.0

    @staticmethod
    def of(linear: nn.Linear, b: float, *, bias: bool = False) -> BcosLinear:
        """Made from a linear layer, with its own weight."""
        made = BcosLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight, made.bias, made.b = linear.weight, linear.bias if bias else None, b  # type: ignore[assignment]
        return made

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        norm = (x.square().sum(-1, keepdim=True) + EPS).sqrt()
        y = _units(F.linear(x, self.weight), norm, self.b, self.steady)
        return y + (self.shift if self.bias is None else self.bias + self.shift)


@final
class UncentredBatchNorm(nn.Module):
    """``gamma x / sqrt(var + eps)``: the ordinary variance over batch and plane (running in eval mode), and no mean subtracted. Any ``x`` [n c ...]."""

    running_var: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, channels: int, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.register_buffer("running_var", torch.ones(channels))
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    @staticmethod
    def of(norm: nn.modules.batchnorm._BatchNorm, *, bias: bool = False) -> UncentredBatchNorm:
        """Made from a batch norm; ``bias`` keeps ``beta - gamma mean / sqrt(var + eps)``, with which it computes the same in eval mode."""
        assert norm.running_var is not None
        assert norm.running_mean is not None
        made = UncentredBatchNorm(norm.num_features, norm.eps, 0.1 if norm.momentum is None else norm.momentum)
        made.running_var = norm.running_var.clone()
        made.weight = norm.weight
        made.drop, made.act = getattr(norm, "drop", made.drop), getattr(norm, "act", made.act)  # timm's BatchNormAct2d
        if bias:
            shift = norm.running_mean / (norm.running_var + norm.eps).sqrt()
            made.bias = nn.Parameter(-shift if norm.weight is None else (norm.bias - norm.weight * shift).detach())
        return made

    def forward(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n c *s"]:
        along = (1, -1, *[1] * (x.dim() - 2))
        var = self.running_var
        if self.training:
            var = x.to(var.dtype).var((0, *range(2, x.dim())), correction=0)
            count = x.numel() // x.shape[1]
            with torch.no_grad():
                self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)
        scale = (var + self.eps).rsqrt()
        y = x * (scale if self.weight is None else scale * self.weight).view(along).to(x.dtype)
        return self.act(self.drop(y if self.bias is None else y + self.bias.view(along).to(y.dtype)))


# -- the explanation -----------------------------------------------------------------------------------


def _layer_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """torch's, with its deviation as a constant; to centre is linear."""
    dims = tuple(range(input.dim() - len(normalized_shape), input.dim()))
    centred = input - input.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt().detach()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The same of groups of channels."""
    groups = input.unflatten(1, (num_groups, -1)).flatten(2)
    y = _layer_norm(groups, groups.shape[2:], eps=eps).view_as(input)
    along = (-1, *[1] * (input.dim() - 2))
    y = y if weight is None else y * weight.view(along)
    return y if bias is None else y + bias.view(along)


class _SteadyGates(TorchFunctionMode):
    """While it is entered, what multiplies a signal is a constant for gradients: ``f(x) = x (f(x) / x)`` of smooth units, sigmoids, the deviations of norms."""

    UNITS = (F.gelu, F.silu, F.mish, F.hardswish, F.elu, F.celu, F.selu, torch.tanh, Tensor.tanh)
    GATES = (torch.sigmoid, Tensor.sigmoid, F.hardsigmoid)
    NORMS: ClassVar[dict[Any, Any]] = {F.layer_norm: _layer_norm, F.group_norm: _group_norm}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.NORMS:
            return self.NORMS[func](*args, **kwargs)
        if func in self.GATES:
            return func(*args, **kwargs).detach()
        if func not in self.UNITS:
            return func(*args, **kwargs)
        x = args[0]
        y = func(x.detach().clone(), *args[1:], **kwargs)  # a clone, which may be changed in place
        return x * torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x)).detach()


@contextlib.contextmanager
def dynamic_linear(answer: nn.Module) -> Iterator[None]:
    """Explanation mode: B-cos scales and gates count as constants, so that gradients are rows of the matrix ``W(x)``. Values are as ever."""
    layers = [m for m in answer.modules() if isinstance(m, (BcosConv2d, BcosLinear))]
    try:
        for layer in layers:
            layer.steady = True
        with _SteadyGates():
            yield
    finally:
        for layer in layers:
            layer.steady = False


class Contributions(NamedTuple):
    """``weights``: each image's row of W(x) for its target; ``map``: weights times the encoded image, added over channels; ``score`` of the target, and
    what it is ``without`` any pixel (the logit bias): ``score = without + sum(map)``."""

    weights: Float[Tensor, "n d h w"]
    map: Float[Tensor, "n 1 h w"]
    score: Float[Tensor, " n"]
    without: Float[Tensor, " n"]


def contributions(answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], who: str = "b-cos") -> Contributions:
    """What each pixel adds to the score of ``target``, exactly. The answer must be in eval mode.

    Raises Mistake for an answer without B-cos layers, and where the contributions and the constant do not add up to the score: then something that
    comes from no pixel is added inside (a bias, a position embedding, a class token), or the network is no dynamic linear one.
    """
    encoders = [m for m in answer.modules() if isinstance(m, Encode)]
    if not encoders:
        raise Mistake(f"{who}: {type(answer).__name__} has no B-cos layers that read the image; train the run with --with b-cosification first")
    with torch.autocast(x.device.type, enabled=False), dynamic_linear(answer):
        found = [_explained(answer, encoders, part, wanted, who) for part, wanted in zip(x.split(ROWS), target.split(ROWS), strict=True)]
    whole = Contributions(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    total = whole.map.flatten(1).sum(1)
    gap = (whole.score - whole.without - total).abs()
    size = whole.map.flatten(1).abs().sum(1) + (whole.score - whole.without).abs()
    gap = gap - GAP * size - ROUNDING * (whole.score.abs() + whole.without.abs() + size)
    if bool((gap > 0).any()):
        worst = int(gap.argmax())
        raise Mistake(
            f"{who}: pixels add {float(total[worst]):.4g} to a score of {float(whole.score[worst]):.4g} (without pixels {float(whole.without[worst]):.4g}), so"
            f" something else adds to it: position embeddings, class tokens, a layer that is not B-cos; choose a convolutional --model such as resnet20"
        )
    return whole


def _explained(answer: nn.Module, encoders: Sequence[nn.Module], x: Tensor, target: Tensor, who: str) -> tuple[Tensor, ...]:
    leaves: list[Tensor] = []

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    with _hooked(encoders, begin):
        score = answer(x.detach()).gather(1, target[:, None])[:, 0]
    must_reach(score, who)
    if any(len(leaf) != len(x) or leaf.shape[2:] != x.shape[2:] for leaf in leaves):
        raise Mistake(
            f"{who}: the network sees {tuple(leaves[0].shape)} of images {tuple(x.shape)}: parts or copies of them; explain the run without that part"
        )
    with _hooked(encoders, lambda module, args, output: torch.zeros_like(output)), torch.no_grad():
        without = answer(x.detach()).gather(1, target[:, None])[:, 0]
    rows = torch.autograd.grad(score.sum(), leaves)
    found = sum((row * leaf.detach() for row, leaf in zip(rows, leaves, strict=True)), start=torch.zeros_like(rows[0]))
    return torch.stack(rows).sum(0), found.sum(1, keepdim=True), score.detach(), without


@contextlib.contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [m.register_forward_hook(hook) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def colours(weights: Float[Tensor, "n d h w"], found: Float[Tensor, "n 1 h w"], smooth: int = 15, percentile: float = 99.5) -> Float[Tensor, "n c h w"]:
    """The weights as a picture on white, 0 to 1: the colour ``w_c^+ / (w_c^+ + w_{1-c}^+)`` that each pixel is asked for, where it speaks for the class.

    The opacity is the length of the pixel's weights where its contribution ``found`` is positive, smoothed over ``smooth`` pixels (odd), and 1 at the
    image's ``percentile``. ``d`` is twice the number of colours.
    """
    plus = weights.clamp_min(0)
    colour, other = plus.chunk(2, 1)
    colour = colour / (colour + other + 1e-12)
    alpha = torch.where(found < 0, 0.0, weights.norm(dim=1, keepdim=True))
    alpha = F.avg_pool2d(alpha, smooth, 1, smooth // 2)
    top = alpha.flatten(1).quantile(percentile / 100, dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    alpha = (alpha / top).clamp(0, 1)
    return colour * alpha + (1 - alpha)


@final
@dataclass
class BCos(Explainer):
    """The map is what each pixel adds to the score; added up they are the score less a constant. ``images["colours"]``: :func:`colours` of W(x)."""

    def explain(self, answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"]) -> Explanation:
        if x.dim() != 4:
            raise Mistake(f"b-cos explains images [n c h w], and the input has shape {tuple(x.shape)}; take saliency")
        found = contributions(answer, x, target)
        window = 2 * (15 * min(x.shape[2:]) // 448) + 1
        return Explanation(found.map, {"colours": colours(found.weights, found.map, window)}, {"score without pixels": float(found.without[0])})
