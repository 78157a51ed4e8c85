"""The layer that a map is read from: found in one pass, for convolutions and tokens alike, and said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.explain.passes import must_reach
from convince.fit.precision import full

PREFIX = 16  # the most class and register tokens a transformer is thought to carry before its patches


@dataclass(frozen=True)
class Layer:
    """A module with a spatial output: its name, how the plane lies in that output, and the plane's sides.

    ``order``: "nchw", "nhwc" or "tokens" [n prefix+h*w c].
    """

    name: str
    order: str
    plane: tuple[int, int]
    prefix: int = 0

    def fold(self, output: Tensor) -> Float[Tensor, "n c h w"]:
        """The output as a channels-first map; tokens before the patches are left out."""
        if self.order == "nchw":
            return output
        if self.order == "nhwc":
            return output.permute(0, 3, 1, 2)
        return output[:, self.prefix :].transpose(1, 2).unflatten(2, self.plane)


class _Seen:
    """Spatial outputs of one pass, in the order in which modules finish."""

    def __init__(self, rows: int, size: tuple[int, int]) -> None:
        self.rows, self.size = rows, size
        self.found: list[tuple[Layer, Tensor]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.embedded: dict[int, tuple[int, int]] = {}  # channels -> plane of the latest 4-D map with that many
        self.tokens: set[int] = set()
        self.weighed = False  # has a weight been met? normalised pixels are no feature map

    def look(self, name: str, module: nn.Module, output: Any) -> None:
        self.weighed = self.weighed or next(module.parameters(recurse=False), None) is not None
        if not isinstance(output, Tensor):
            return
        self.shapes[name] = tuple(output.shape)
        if not self.weighed or output.dim() not in (3, 4) or len(output) != self.rows:
            return
        layer = self._map(name, output.shape) if output.dim() == 4 else self._tokens(name, output.shape)
        if layer is not None:
            self.found.append((layer, output))

    def _map(self, name: str, shape: Sequence[int]) -> Layer | None:
        if self.tokens & set(shape[2:]):  # one map a head: [n heads tokens width]
            return None
        first, last = self._skew(shape[2], shape[3]), self._skew(shape[1], shape[2])
        if min(first, last) > math.log(2):
            return None
        order, plane, c = ("nchw", (shape[2], shape[3]), shape[1]) if first <= last else ("nhwc", (shape[1], shape[2]), shape[3])
        self.embedded[c] = plane
        return Layer(name, order, plane)

    def _tokens(self, name: str, shape: Sequence[int]) -> Layer | None:
        t, c = shape[1], shape[2]
        plane = self.embedded.get(c)
        if plane is None and not self.embedded:  # patches cut without a convolution: only an exact fit is believed
            height, width = self.size
            for count in (t, t - 1):
                h = math.isqrt(max(count * height // width, 0))
                if h > 1 and count % h == 0 and h * width == (count // h) * height:
                    plane = (h, count // h)
                    break
        if plane is None or not 0 <= t - plane[0] * plane[1] <= PREFIX:
            return None
        self.tokens.add(t)
        return Layer(name, "tokens", plane, t - plane[0] * plane[1])

    def _skew(self, h: int, w: int) -> float:
        """How far the plane's form is from the image's (0: the same); endless where it is no plane of it."""
        height, width = self.size
        if h * w <= 1 or h > height or w > width:
            return math.inf
        return abs(math.log(height / h) - math.log(width / w))


def find_layer(answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"], layer: str | None = None, who: str = "explain") -> Layer:
    """The layer called ``layer`` (the end of its name is enough), or the last spatial one that the score depends on.

    Looks at one pass of one image. Where patches have a class token before them, a layer whose
    patches no longer reach the score (the last block of a transformer with a class token) is passed over.
    Raises Mistake where there is none, or where the named one has no spatial output.
    """
    if x.dim() != 4:
        raise Mistake(f"{who} explains images [n c h w], and the input has shape {tuple(x.shape)}; there is no plane to draw a map on")
    turned = next((type(m).__name__ for m in answer.modules() if getattr(m, "aligned", True) is False), None)
    if turned is not None:
        raise Mistake(f"{who}: {turned} hands the network a part of the image, so feature maps do not lie on the image; explain the run without it")
    names = {name: module for name, module in answer.named_modules() if name}
    wanted = None if layer is None else _named(layer, list(names), who)
    seen = _Seen(len(x[:1]), (x.shape[2], x.shape[3]))
    handles = [m.register_forward_hook(lambda m, _, out, name=name: seen.look(name, m, out)) for name, m in names.items()]
    try:
        scores = answer(x[:1].detach().requires_grad_(True))
    finally:
        for handle in handles:
            handle.remove()
    must_reach(scores, who)
    if wanted is not None:
        for found, _ in reversed(seen.found):
            if found.name == wanted:
                return found
        shape = seen.shapes.get(wanted)
        said = "gave no tensor" if shape is None else f"gave {list(shape)}"
        raise Mistake(f"{who}: layer {wanted!r} has no spatial output ({said}); layers that have one: {_some([f.name for f, _ in seen.found])}")
    live = [(found, out) for found, out in seen.found if out.requires_grad]
    reached = torch.autograd.grad(scores[0, target[0]], [out for _, out in live], allow_unused=True) if live else ()
    for (found, _), gradient in zip(reversed(live), reversed(reached), strict=True):
        if gradient is not None and (found.prefix == 0 or bool((found.fold(gradient) != 0).any())):
            return found
    raise Mistake(f"{who}: no layer of this answer ({type(answer).__name__}) has a spatial output beyond 1x1 that reaches the score; take a network with one")


def _named(layer: str, names: list[str], who: str) -> str:
    if layer in names:
        return layer
    ends = [name for name in names if name.endswith("." + layer)]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise Mistake(f"{who}: layer={layer!r} is the end of several names: {_some(ends)}; give the whole name")
    raise Mistake(f"{who}: layer={layer!r} is no module of the answer{nearest(layer, names)} Its modules: {_some(names)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[-8:]) + (f" and {len(names) - 8} before" if len(names) > 8 else "") if names else "none"


def maps_and_gradients(
    answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], layer: Layer, who: str = "explain"
) -> tuple[Float[Tensor, "n d i j"], Float[Tensor, "n d i j"]]:
    """``A`` and ``dY/dA`` of one layer, Y the score of ``target``; in fp32 where the pass was in less. The answer must be in eval mode.

    The graph begins at the layer: what comes before it costs a plain forward pass, in time and in memory.
    """
    taken: list[Tensor] = []

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        taken.append(output.detach().requires_grad_(True))
        return taken[-1].clone()  # what follows may change its input in place (ReLU)

    handle = answer.get_submodule(layer.name).register_forward_hook(begin)
    try:
        scores = answer(x.detach())
    finally:
        handle.remove()
    if len(taken[-1]) != len(x):
        raise Mistake(f"{who}: layer {layer.name!r} saw {len(taken[-1])} rows for {len(x)} images; name a layer that sees each image once")
    must_reach(scores, who)
    (gradient,) = torch.autograd.grad(scores.gather(1, target[:, None]).sum(), taken[-1])
    return full(layer.fold(taken[-1].detach())), full(layer.fold(gradient))
