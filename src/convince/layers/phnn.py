"""Phnn: convolutions and linear layers whose weights are learned sums of Kronecker products, with about 1/n of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convince.errors import Mistake
from convince.layers.surgery import Surgery, find, refuse_nothing, swap
from convince.parts import Card

CARD = Card(
    part="phnn",
    kind="layer",
    paper="phnn",
    title="PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions",
    year=2022,
    url="https://arxiv.org/abs/2110.04176",
    swaps=("Conv2d", "Linear"),
    departs=(
        "a bias is added where the replaced layer had one; the released convolution makes one and never adds it",
        "the first layer and the classifier stay real unless skip=() is given; the paper's own networks are the part phresnet",
        "grouped convolutions and layers of other types stay as they are",
        "the blocks of F lie along the output channels of one tensor; the released code gives them an axis of their own",
    ),
    tiny={"n": 2},
)

ALGEBRAS: dict[str, list[list[list[int]]]] = {
    "complex": [[[1, 0], [0, 1]], [[0, -1], [1, 0]]],
    "quaternion": [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]],
        [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]],
        [[0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
    ],
}
"""A of the known algebras: A_s is the matrix by which the s-th unit multiplies from the left (Hamilton's rule for quaternions)."""


def ph_weight(A: Float[Tensor, "n n n"], F: Float[Tensor, "n o i *k"]) -> Float[Tensor, "p q *k"]:
    """``W = sum_s A_s (x) F_s`` (eq. 6), a Kronecker product over output and input channels at each tap: W is [n o, n i, ...]."""
    n, o, i = F.shape[:3]
    return torch.einsum("sab,soi...->aobi...", A, F).reshape(n * o, n * i, *F.shape[3:])


class PHLayer(nn.Module):
    """What both layers share: the rule ``A`` [n n n], learned or fixed, and the filters ``F`` [n (out / n), in / n, ...].

    ``init`` "released" draws both by Xavier's uniform law on their raw shapes, as the released code does, which makes W small: fit for
    networks with normalisation. "fan" scales F so that W has the variance 2 / fan_in. ``algebra`` fixes A: "complex" (n=2) or "quaternion" (n=4).
    """

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, ...], n: int, bias: bool, init: str, algebra: str | None) -> None:
        super().__init__()
        if n < 1 or c_in % n or c_out % n:
            raise Mistake(f"phnn: n={n} must divide the {c_in} input and the {c_out} output channels of every layer; take another n, or name the layer in skip")
        if init not in ("released", "fan"):
            raise Mistake(f"phnn: init={init!r} must be 'released' or 'fan'")
        if algebra is not None and (algebra not in ALGEBRAS or len(ALGEBRAS[algebra]) != n):
            raise Mistake(f"phnn: algebra={algebra!r} with n={n}: must be None, 'complex' with n=2, or 'quaternion' with n=4")
        self.n = n
        if algebra is None:
            self.A = nn.Parameter(torch.empty(n, n, n))
            nn.init.xavier_uniform_(self.A)
        else:
            self.register_buffer("A", torch.tensor(ALGEBRAS[algebra], dtype=torch.get_default_dtype()))
        # one axis for blocks and outputs: a layout for images (channels last) is defined for tensors of four axes only
        self.F = nn.Parameter(torch.empty(c_out, c_in // n, *kernel))
        fan_in = c_in * math.prod(kernel)
        with torch.no_grad():
            if init == "released":
                nn.init.xavier_uniform_(self.F.unflatten(0, (n, -1)))
            else:
                nn.init.normal_(self.F)
                self.F.mul_((2 / fan_in / (n * self.A.square().mean())).sqrt())
        self.bias = nn.Parameter(torch.empty(c_out)) if bias else None
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5)

    @property
    def weight(self) -> Tensor:
        """W as an ordinary layer would hold it, made anew at each call."""
        return ph_weight(self.A, self.F.unflatten(0, (self.n, -1)))

    def extra_repr(self) -> str:
        return f"{self.F.shape[1] * self.n}, {self.F.shape[0]}, kernel={tuple(self.F.shape[2:])}, n={self.n}, bias={self.bias is not None}"


@final
class PHConv2d(PHLayer):
    """A 2-D convolution with :func:`ph_weight` as its weight: ``in out k k / n + n^3`` parameters, as many multiply-adds as ever."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        n: int = 4,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        init: str = "released",
        algebra: str | None = None,
    ) -> None:
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__(in_channels, out_channels, kernel, n, bias, init, algebra)
        self.geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return functional.conv2d(x, self.weight, self.bias, **self.geometry)


@final
class PHLinear(PHLayer):
    """A linear layer with :func:`ph_weight` as its weight: ``in out / n + n^3`` parameters."""

    def __init__(self, in_features: int, out_features: int, n: int = 4, bias: bool = True, init: str = "released", algebra: str | None = None) -> None:
        super().__init__(in_features, out_features, (), n, bias, init, algebra)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        return functional.linear(x, self.weight, self.bias)


def phnn(layer: nn.Module, n: int = 4, init: str = "released", algebra: str | None = None) -> PHLayer:
    """The layer with parameterised weights that stands for one of torch's own, a Conv2d of one group or a Linear; its weights are drawn anew."""
    if type(layer) is nn.Linear:
        return PHLinear(layer.in_features, layer.out_features, n, layer.bias is not None, init, algebra)
    if type(layer) is nn.Conv2d and _plain(layer):
        kernel, stride, padding, dilation = (_pair(value) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation))
        return PHConv2d(layer.in_channels, layer.out_channels, kernel, n, stride, padding, dilation, layer.bias is not None, init, algebra)
    raise Mistake(f"phnn: {layer} is no Conv2d of one group with zero padding and no Linear; leave it as it is")


def _pair(value: Any) -> Any:
    return value if isinstance(value, str) else (int(value[0]), int(value[1]))


def _plain(m: nn.Module) -> bool:
    """True for torch's own layers: a subclass may do more with its weight than we would."""
    return type(m) is nn.Linear or (type(m) is nn.Conv2d and m.groups == 1 and m.padding_mode == "zeros")


def install(model: nn.Module, n: int = 4, skip: Sequence[str] | None = None, init: str = "released", algebra: str | None = None) -> Surgery:
    """Put :class:`PHConv2d` and :class:`PHLinear` in the place of a network's convolutions and linear layers, with fresh weights.

    ``skip`` names layers (or patterns such as ``"layer1.*"``) that stay; None: the first layer and the classifier. ``init`` and ``algebra`` as
    in :class:`PHLayer`. Names: ``conv1.weight`` becomes ``conv1.A`` and ``conv1.F``. Raises Mistake where n does not divide a layer's channels.
    """
    found = [(name, m) for name, m in find(model, types=(nn.Conv2d, nn.Linear), skip=skip or ()) if _plain(m)]
    if skip is None:
        head = model.get_classifier() if hasattr(model, "get_classifier") else found[-1][1] if found else nn.Identity()  # type: ignore[operator]
        inside = {id(m) for m in head.modules()}
        found = [(name, m) for name, m in found[1:] if id(m) not in inside]
    refuse_nothing(found, model, "phnn", "plain convolution or linear layer to replace", "give a shorter skip or another network")

    def make(name: str, old: nn.Module) -> nn.Module:
        if old._forward_hooks or list(old.children()):
            raise Mistake(f"phnn: something is attached to {name} of {type(model).__name__} and would be lost; install phnn first, or name {name} in skip")
        try:
            return phnn(old, n, init, algebra)
        except Mistake as refusal:
            raise Mistake(f"{refusal} (here {name} of {type(model).__name__})") from None

    return swap(model, found, make)


def param_report(model: nn.Module) -> list[dict[str, Any]]:
    """A row for each hypercomplex layer: its name, its n, its parameters, and those of the real layer in its place."""
    rows = []
    for name, m in model.named_modules():
        if isinstance(m, PHLayer):
            bias = 0 if m.bias is None else m.bias.numel()
            rows.append({"layer": name, "n": m.n, "parameters": sum(p.numel() for p in m.parameters()), "real": m.F.numel() * m.n + bias})
    return rows
