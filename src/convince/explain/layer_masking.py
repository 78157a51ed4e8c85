"""Layer masking: takes a region out of every layer of a convolutional network, so that no grey patch stands where it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from convince.errors import Mistake, nearest
from convince.explain.lime import grid_segments, lime, must_hold_grid, samples_of
from convince.explain.linear_scope import ACTIVATIONS, CONSTANTS, COPIES, MOVES, name_of, tensors, words
from convince.fit.randomness import generator
from convince.kinds import Explainer
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="layer-masking",
    kind="explainer",
    paper="layer-masking",
    title="Towards Improved Input Masking for Convolutional Neural Networks",
    year=2023,
    url="https://arxiv.org/abs/2211.14646",
    expects=("images",),
    departs=(
        "the explainer is LIME on a grid of cells with this masker; the paper masks for LIME on superpixels among other uses",
        "an average over positions divides by the share that is visible, not by that share plus 1e-8, so that a mask of ones changes no bit",
        "an average pool that leaves one position counts as the global one, whichever function computes it",
        "maps put side by side keep the region that all of them see, as sums do; dense networks are not in the paper's equations",
        "hidden positions of a map that is flattened for a linear layer enter it as zeros",
    ),
    tiny={"samples": 24, "cells": 3},
)

MODES = ("neighbours", "zeros", "partial")
SPREAD = words(  # position by position
    "batch_norm add sub subtract __rsub__ rsub mul multiply div divide true_divide neg maximum minimum"
)
ZERO_STAYS = words("relu relu6 leaky_relu prelu elu selu celu gelu silu mish hardswish tanh neg mul multiply")


def neighbour_fill(x: Float[Tensor, "n c h w"], keep: Float[Tensor, "n 1 h w"], rounds: int) -> Float[Tensor, "n c h w"]:
    """Neighbour padding: hidden positions take the mean of the visible ones among the 3x3 around them, ``rounds`` times, each further in.

    ``keep`` is 1 or 0. What is filled carries no gradient. A map that is all visible is returned as it is.
    """
    x = x * keep
    for _ in range(rounds):
        if bool(keep.all()):
            break
        near = 9 * F.avg_pool2d(keep, 3, 1, 1)
        filled = 9 * F.avg_pool2d(x.detach(), 3, 1, 1) / (near + 1e-5)
        x = x + (1 - keep) * filled
        keep = (keep + near.round()).clamp(0, 1)
    return x


@final
class carried_masks(TorchFunctionMode):
    """While it is entered, a mask travels with each tensor that comes from a marked one, and every layer leaves hidden positions out.

    Masks have the shape of their tensor, true where it is visible; along axes where they do not vary (channels) they are expanded, not stored.
    Nothing is changed in any network. What has no rule is refused by name.
    """

    def __init__(self, mode: str = "neighbours") -> None:
        super().__init__()
        self.mode = mode
        self.convolutions = 0
        self.masks = WeakTensorKeyDictionary()

    def mark(self, x: Float[Tensor, "n c h w"], keep: Bool[Tensor, "n 1 h w"]) -> Float[Tensor, "n c h w"]:
        """A copy of ``x`` that carries the mask; hidden pixels are 0, whatever they were."""
        x = torch.where(keep, x, 0)
        self.masks[x] = keep.expand_as(x)
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        if name_of(func).endswith("_as"):  # of the other tensor only the shape is read
            kwargs, args = {}, (args[0], next(tensors((*args[1:], *kwargs.values()))).detach())
        if not any(t in self.masks for t in tensors((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        name, mask = name_of(func), None
        if name == "conv2d":
            out, mask = self._conv(func, *args, **kwargs)
        else:
            out = func(*args, **kwargs)
            outs = [o for o in tensors((out,)) if o.is_floating_point() or o.is_complex()]
            if not outs or name in CONSTANTS or (out is args[0] and name in COPIES):
                return out
            if name in MOVES:
                moved = (torch.reshape if name == "view" else func)(self.masks[args[0]], *_sizes(name, args[1:]), **kwargs)
                for o, mask in zip(outs, tensors((moved,)), strict=True):
                    self.masks[o] = mask
                return out
            out, mask = self._layer(name, args, kwargs, out)
        if mask is not None:
            self.masks[out] = mask
        return out

    def _conv(self, func: Any, x: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if x not in self.masks or x.dim() != 4:
            raise Mistake("layer-masking: a convolution with a kernel made from the image has no rule; hide pixels with masker=mean or blur")
        how = {**dict(zip(("bias", "stride", "padding", "dilation", "groups"), rest, strict=False)), **kwargs}
        self.convolutions += 1
        bias, (kernel, stride, dilation) = how.get("bias"), (weight.shape[2:], _pair(how.get("stride", 1)), _pair(how.get("dilation", 1)))
        sides = _sides(how.get("padding", 0), kernel, dilation)
        keep = self._plane(x).to(x.dtype)
        if self.mode == "neighbours":  # farther than this no window that keeps its output can look; 1x1 needs none
            x = neighbour_fill(x, keep, max(min(k, d * (k - 1)) for k, d in zip(kernel, dilation, strict=True)))
        out = func(x, weight, *rest, **kwargs)
        if self.mode == "partial":  # Liu et al. 2018: what a window does not see is made up for by what it sees
            ones = torch.full((1, 1, *kernel), 1 / kernel.numel(), dtype=x.dtype, device=x.device)
            seen = (F.conv2d(F.pad(keep, sides), ones, None, stride, 0, dilation) + 1e-8).to(out.dtype)
            out = out / seen if bias is None else (out - bias[:, None, None]) / seen + bias[:, None, None]
        return self._hide(out, F.max_pool2d(F.pad(keep, sides), kernel, stride, 0, dilation) > 0)

    def _plane(self, x: Tensor) -> Bool[Tensor, "n 1 h w"]:
        mask = self.masks[x]
        if mask.shape[1] > 1 and mask.stride(1):
            mask = mask.all(1, keepdim=True)
        return mask[:, :1]

    @staticmethod
    def _hide(out: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = mask.expand_as(out)
        return torch.where(mask, out, 0), mask

    def _layer(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> tuple[Any, Tensor | None]:
        """The output of a layer, hidden positions at 0, and its mask (None: all of it is visible)."""
        x = args[0]
        mask = self.masks.get(x) if isinstance(x, Tensor) else None
        if name in ACTIVATIONS or name in SPREAD:
            return self._positions(name, [*args, *kwargs.values()], out)
        if name in ("cat", "concat", "concatenate"):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            each = [self.masks[t] if t in self.masks else torch.ones((), dtype=torch.bool, device=t.device).expand_as(t) for t in x]
            if all(_even(m, dim) for m in each):
                return self._hide(out, torch.stack([m.narrow(dim, 0, 1) for m in each]).all(0))
            return out, torch.cat(each, dim)
        if mask is None:
            raise self._refusal(name)
        if name in COPIES:
            return out, mask
        if name == "linear" and (_even(mask, -1) or x.dim() == 2):  # channels last, or a map that was flattened
            return self._hide(out, mask[..., :1]) if _even(mask, -1) else (out, None)
        if name == "layer_norm" and all(_even(mask, -i) for i in range(1, 1 + len(args[1] if len(args) > 1 else kwargs["normalized_shape"]))):
            return self._hide(out, mask)
        if name in ("max_pool2d", "adaptive_max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"):
            return self._pool(name, args[1:], kwargs, out, self._plane(x).to(x.dtype))
        if name == "pad":
            how = dict(zip(("pad", "mode", "value"), args[1:], strict=False)) | kwargs
            mode = how.get("mode") or "constant"
            sides = [*how["pad"][:4]] if mask.dim() == 4 else [1]
            if any(side < 0 for side in sides) or mask.dim() != 4:
                raise self._refusal("pad by less than 0, or of other than [n c h w]")
            grown = F.pad(self._plane(x).to(x.dtype), sides, "replicate" if mode == "constant" else mode) > 0
            return (out, grown.expand_as(out)) if mode == "constant" else self._hide(out, grown)
        if name in ("mean", "amax"):
            dims = args[1] if len(args) > 1 else kwargs.get("dim")
            dims = tuple(range(x.dim())) if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)
            keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
            seen = _thin(mask, x).to(out.dtype).mean(dims, keepdim)
            if name == "mean":
                out = out / seen.clamp_min(1e-8)
            left = [i for i in range(1, x.dim()) if i not in {d % x.dim() for d in dims}]
            return (out, None) if all(_even(mask, i) for i in left) else self._hide(out, seen > 0)
        raise self._refusal(name)

    def _positions(self, name: str, args: list[Any], out: Tensor) -> tuple[Tensor, Tensor]:
        """Position by position: of several masks, what all of them see (a residual sum keeps the shortcut's region)."""
        held = [self.masks[t] for t in tensors(args) if t in self.masks]
        mask = held[0].expand_as(out) if len(held) == 1 else torch.stack([_thin(m, out) for m in held]).all(0).expand_as(out)
        if len(held) == 1 and name in ZERO_STAYS:
            return out, mask
        if out is args[0]:
            return out.masked_fill_(~mask, 0), mask
        return torch.where(mask, out, 0), mask

    def _pool(self, name: str, rest: Any, kwargs: dict[str, Any], out: Any, keep: Tensor) -> tuple[Any, Tensor | None]:
        if isinstance(out, tuple):
            raise self._refusal("max-pooling that returns its indices")
        pool = getattr(F, name)
        seen = pool(keep, *rest, **kwargs)
        whole = out.shape[2:].numel() == 1 < keep.shape[2:].numel()
        if name == "adaptive_avg_pool2d" or (name == "avg_pool2d" and whole):
            share = seen / pool(torch.ones_like(keep), *rest, **kwargs)
            out = out / share.clamp_min(1e-8).to(out.dtype)
        return (out, None) if whole else self._hide(out, seen > 0)

    @staticmethod
    def _refusal(name: str) -> Mistake:
        return Mistake(
            f"layer-masking: no rule says how a mask passes through {name!r}; it is for convolutional networks. Hide pixels instead: 'lime' with masker=mean"
        )


def _even(mask: Tensor, dim: int) -> bool:
    """Does the mask not vary along this axis?"""
    return mask.shape[dim] == 1 or mask.stride(dim) == 0


def _thin(mask: Tensor, out: Tensor) -> Tensor:
    """The mask with one entry where it does not vary: small, and it broadcasts."""
    mask = mask.expand_as(out)
    for dim in range(1, mask.dim()):
        mask = mask.narrow(dim, 0, 1) if _even(mask, dim) else mask
    return mask


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _sides(padding: Any, kernel: Any, dilation: tuple[int, int]) -> list[int]:
    """Padding as F.pad has it: left, right, top, bottom."""
    if isinstance(padding, str):
        whole = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        return [whole[1] // 2, whole[1] - whole[1] // 2, whole[0] // 2, whole[0] - whole[0] // 2]
    up, left = _pair(padding)
    return [left, left, up, up]


def _sizes(name: str, rest: Any) -> Any:
    """``view(2, -1)`` as ``reshape`` takes it."""
    return rest if name != "view" or not rest or not isinstance(rest[0], int) else (rest,)


def masked_forward(answer: nn.Module, x: Float[Tensor, "n c h w"], keep: Bool[Tensor, "n 1 h w"], mode: str = "neighbours") -> Float[Tensor, "n k"]:
    """Scores of ``x`` without its hidden pixels (``keep`` false): they do not depend on what those show. The answer must be in eval mode.

    ``mode`` "neighbours": before a convolution hidden positions are filled from visible ones, a mask of ones changes no bit; "zeros": not filled;
    "partial": what a window sees is scaled up, at the borders of the picture too. Raises Mistake where the network is no convolutional one.
    """
    if mode not in MODES:
        raise Mistake(f"layer-masking: mode={mode!r} is none{nearest(str(mode), list(MODES))} Modes: {', '.join(MODES)}")
    with carried_masks(mode) as masks:
        scores: Tensor = answer(masks.mark(x, keep))
    if not masks.convolutions:
        raise Mistake("layer-masking: no convolution of this answer sees its input; it is for convolutional networks. Hide pixels: 'lime' with masker=mean")
    return scores


@final
@dataclass
class LayerMasking(Explainer):
    """LIME with layer masking: each pixel has its cell's weight, what showing the cell adds to the target's chance.

    ``samples`` pictures with random cells of a ``cells`` x ``cells`` grid hidden, the same cells for every image. The same as
    ``lime:masker=layer``; for occlusion take ``occlusion:masker=layer``. Convolutional networks only. The table has the mean R^2 ("fit").
    """

    samples: int = 1000
    cells: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 2 or self.cells < 2:
            raise Mistake(f"layer-masking: samples={self.samples} and cells={self.cells} must be at least 2")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        must_hold_grid(x, self.cells, "layer-masking")
        segments = grid_segments((x.shape[2], x.shape[3]), self.cells)
        shown = samples_of(self.samples, self.cells**2, generator("lime", self.seed))
        w, r2 = lime(answer, x.detach(), target, segments, shown, "layer")
        return Explanation(w[:, segments][:, None], table={"samples": self.samples, "cells": self.cells**2, "fit": float(r2.mean())})
