"""Reread: sees every function that a network calls on what was computed from the pixels, so that each can be read anew."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from convince.errors import Mistake

Box = tuple[Tensor, Tensor]  # the least and the largest value that each input can have
ELSE = "use 'integrated-gradients' or 'rise', which need no rules"

MAXES = {"max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax", "max"}
MEANS = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum", "interpolate"}
CONVS = {"conv1d", "conv2d", "conv3d"}
RELUS = {"relu", "relu6", "clamp", "clip", "clamp_min", "threshold", "hardtanh"}
UNITS = RELUS | {"leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "hardswish", "mish", "tanh"}  # all send 0 to 0
_MOVES = """view view_as reshape reshape_as flatten unflatten ravel permute transpose swapaxes movedim t squeeze unsqueeze contiguous clone to float double
type_as cat concat concatenate stack hstack vstack split chunk tensor_split unbind narrow select index_select gather take_along_dim __getitem__ expand expand_as
broadcast_tensors broadcast_to repeat repeat_interleave tile roll flip pad pixel_shuffle pixel_unshuffle channel_shuffle unfold where masked_fill maximum
diagonal __get__"""
MOVES = frozenset(_MOVES.split())  # values are moved, chosen or repeated: their gradient carries relevance as it is


@dataclass
class Seen:
    """What is known of a tensor that was computed from the pixels, as long as it is not written over."""

    by: Any
    version: int
    box: Box | None = None  # still a pixel, normalised, moved or pooled: between these values
    source: Any = None  # whatever the reader keeps of how it was made


class Reread(TorchFunctionMode, abc.ABC):
    """Sees every function that the network calls on what was computed from the pixels; :meth:`read` says what becomes of each.

    Weights need no gradient while it is entered (:func:`as_found` puts that back), so a tensor that does was computed from the pixels.
    """

    def __init__(self, who: str) -> None:
        super().__init__()
        self.who = who

    @abc.abstractmethod
    def read(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a function, its backward pass changed; NotImplemented where there is no rule. ``name`` has no trailing underscore."""

    def mark(self, out: Any, box: Box | None = None, source: Any = None) -> Any:
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.requires_grad:
                t.seen = Seen(self, t._version, box, source)  # type: ignore[attr-defined]
        return out

    def seen(self, t: Tensor) -> Seen:
        """What is known of ``t``; refuses a tensor that came from where no function was seen."""
        found = getattr(t, "seen", None)
        if found is None or found.by is not self:
            raise Mistake(f"{self.who}: a part of this network runs unseen (a compiled or scripted module, an autograd function of its own); {ELSE}")
        return found if found.version == t._version else Seen(self, t._version)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        carriers = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if not carriers:
            return func(*args, **kwargs)
        name = func.__name__
        if name == "__setitem__":
            raise self.refusal("writing into a part of a tensor")
        for t in carriers:
            self.seen(t)
        written = name.endswith("_") and not name.endswith("__")
        # activations have no other switch than the one that asks to write over the input
        within = written or kwargs.get("inplace", False) or (name in UNITS and any(flag is True for flag in args[1:]))
        out = self.read(name[:-1] if written else name, func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(out)):
                raise self.refusal(name)
            return out
        if within and out is not args[0]:
            args[0].copy_(out)
            return self.mark(args[0])
        return out

    def refusal(self, what: str) -> Mistake:
        return Mistake(f"{self.who}: no rule for {what!r}, which this network computes on the way from the image to the score; {ELSE}")

    def move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function that moves values; what is a pixel stays one."""
        out = func(*args, **kwargs)
        boxes = [self.seen(t).box for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if not any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(out)) or None in boxes:
            return self.mark(out)
        low, high = (func(*self._ends(args, end), **self._ends(kwargs, end)) for end in (0, 1))
        for t, least, most in zip(tree_leaves(out), tree_leaves(low), tree_leaves(high), strict=True):
            self.mark(t, (least, most))
        return out

    def _ends(self, tree: Any, end: int) -> Any:
        return tree_map(lambda t: self.seen(t).box[end] if isinstance(t, Tensor) and t.requires_grad else t, tree)  # type: ignore[index]
