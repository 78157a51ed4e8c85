"""NetAug: train a tiny network as a part of randomly widened versions of itself, and keep only the tiny one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="netaug",
    kind="technique",
    paper="netaug",
    title="Network Augmentation for Tiny Deep Learning",
    year=2021,
    url="https://arxiv.org/abs/2110.08890",
    departs=(
        "the widened networks normalise by their own batch and move no running statistics, so the base's never need to be estimated anew",
        "the released code sorts middle channels by weight norm before each epoch of the first half; here channels keep their places,"
        " so that averages of weights stay meaningful",
        "widths are drawn for channels of any network whose operations are understood, and what is not understood keeps its width;"
        " the paper widens inverted residual blocks. Where no block has middle channels, the second half trains the base alone",
        "new weights are drawn normally with the spread of the base's own; learning rate, weight decay and label smoothing are the run's",
    ),
    strength="alpha",
    off=0.0,
    tiny={"width_mults": (1.0, 2.0), "expand_mults": (1.0, 2.0)},
    mutes=("gradient",),
    expects=("logits", "network"),
)
CONVS = {F.conv2d, torch.conv2d}
KEEP = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "hardswish", "hardsigmoid", "silu", "gelu", "leaky_relu", "elu", "sigmoid", "tanh", "clone"}
KEEP |= {"dropout", "feature_dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "flatten"}
KEEP |= {"contiguous", "to", "float"}
JOIN = {"add", "add_", "__add__", "__iadd__", "__radd__", "iadd", "sub", "mul", "mul_", "__mul__", "__rmul__", "__imul__"}


# -- which channels go together --------------------------------------------------------------------


@dataclass
class Space:
    """Channels that must have one width: of a tensor, and of all that is added to it. ``size`` is the base's."""

    size: int
    fixed: bool = False
    middle: bool = False  # begins and ends inside one block: its width is an expansion
    source: Space | None = None  # the channels that its first layer reads
    touched: list[str] = field(default_factory=list)  # layers that write or read it
    joined: Space | None = None

    def root(self) -> Space:
        return self if self.joined is None else self.joined.root()


@dataclass
class Layer:
    """A convolution, linear layer or batch norm: the names of its parameters and the channels it reads and writes."""

    weight: str
    bias: str | None
    reads: Space | None
    writes: Space | None


class Follow(TorchFunctionMode):
    """Watches one pass and finds out which channels go together; what it does not know keeps its width."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.layers: dict[str, Layer] = {}
        self.spaces: list[Space] = []
        self.at: dict[int, tuple[Tensor, Space]] = {}  # tensors are held, so that no address is used twice

    def space(self, x: Any) -> Space | None:
        return self.at[id(x)][1].root() if isinstance(x, Tensor) and id(x) in self.at else None

    def new(self, size: int, source: Space | None) -> Space:
        self.spaces.append(Space(size, source=source))
        return self.spaces[-1]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            if isinstance(result, (tuple, list)) and any(isinstance(part, Tensor) for part in result):  # chunks: their widths are fixed
                for x in args:
                    self._fix(x)
            return result
        space = self._space_after(func, getattr(func, "__name__", ""), args, kwargs, result)
        if space is not None:
            self.at[id(result)] = (result, space)
        return result

    def _space_after(self, func: Any, name: str, args: tuple, kwargs: dict, result: Tensor) -> Space | None:
        flat = [x for a in (*args, *kwargs.values()) for x in (a if isinstance(a, (tuple, list)) else (a,))]
        found = [space for x in flat if (space := self.space(x)) is not None]
        weight = self.names.get(id(args[1])) if len(args) > 1 else None
        bias = self.names.get(id(args[2])) if len(args) > 2 else None
        if (func in CONVS or func is F.linear) and weight is not None and weight not in self.layers:
            reads = self.space(args[0])
            groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
            if groups == 1 and (func in CONVS or result.dim() == 2):
                writes = self.new(result.shape[1], reads)
                self.layers[weight] = Layer(weight, bias, reads, writes)
                for space in (reads, writes):
                    if space is not None:
                        space.touched.append(weight)
                return writes
            if reads is not None and groups == result.shape[1] == reads.size:  # depthwise: writes what it reads
                self.layers[weight] = Layer(weight, bias, None, reads)
                reads.touched.append(weight)
                return reads
        elif func is F.batch_norm and found:
            scale, shift = (self.names.get(id(args[i] if len(args) > i else kwargs.get(key))) for i, key in ((3, "weight"), (4, "bias")))
            if scale is not None and scale not in self.layers:
                self.layers[scale] = Layer(scale, shift, None, found[0])
                return found[0]
        elif name in JOIN and found:
            others = [x for x in flat if isinstance(x, Tensor) and self.space(x) is None and x.dim() > 1 and x.shape[1] != 1]
            if not others and len({space.size for space in found}) == 1:
                for space in found[1:]:
                    self._join(found[0], space)
                return found[0].root()
        elif name in KEEP and len(found) == 1 and result.dim() > 1 and result.shape[1] == found[0].size:
            axes = kwargs.get("dim", args[1] if len(args) > 1 else ()) if name == "mean" else ()
            if not {1, -3} & set(axes if isinstance(axes, (tuple, list)) else (axes,)):
                return found[0]
        again = self.layers.get(weight or "")  # weights that are used twice keep their shape
        for space in [*found, *([s for s in (again.reads, again.writes) if s is not None] if again is not None else [])]:
            space.root().fixed = True
        return None

    def _fix(self, x: Any) -> None:
        space = self.space(x)
        if space is not None:
            space.fixed = True

    def _join(self, a: Space, b: Space) -> None:
        a, b = a.root(), b.root()
        if a is not b:
            b.joined, a.fixed = a, a.fixed or b.fixed
            a.touched += b.touched


@dataclass(frozen=True)
class Plan:
    """The layers to widen, by the name of their weight, and the channels whose width is drawn, in order."""

    layers: dict[str, Layer]
    spaces: list[Space]


def plan_of(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Plan:
    """Find the channels that can be widened in ``forward(x)`` (a pass of ``model``); those of the input and the scores keep their width.

    Middle channels are those that only layers of one block touch, a block being the innermost module around
    them that is no mere container and not the whole network.
    """
    follow = Follow(model)
    with torch.no_grad(), follow:
        scores = forward(x)
    follow._fix(scores)
    spaces = [space for space in follow.spaces if space.joined is None and not space.fixed]
    modules = dict(model.named_modules())
    for space in spaces:
        paths = [name.split(".")[:-2] for name in space.touched]
        shared: list[str] = []
        for column in zip(*paths, strict=False):
            if len(set(column)) > 1:
                break
            shared.append(column[0])
        while shared and isinstance(modules[".".join(shared)], (nn.Sequential, nn.ModuleList)):
            shared.pop()
        space.middle = bool(shared)
    return Plan({n: a for n, a in follow.layers.items() if _free(a.reads) or _free(a.writes)}, spaces)


def _free(space: Space | None) -> bool:
    return space is not None and not space.root().fixed


# -- widths and weights ----------------------------------------------------------------------------


def draw_widths(plan: Plan, width_mults: Sequence[float], expand_mults: Sequence[float], gen: Generator, *, middle_only: bool = False) -> dict[int, int]:
    """A width for each of the plan's channels, by ``id``: ``round(size * m)``.

    A block's output draws ``m`` from ``width_mults`` (1 with ``middle_only``); middle channels draw from ``expand_mults``,
    times the ``m`` of the block's input. Draws happen in the plan's order, one for each.
    """
    drawn = [float(torch.rand((), generator=gen)) for _ in plan.spaces]
    mults = {}
    for space, u in zip(plan.spaces, drawn, strict=True):
        choices = expand_mults if space.middle else (1.0,) if middle_only else width_mults
        mults[id(space)] = choices[int(u * len(choices))]
    return {id(space): round(space.size * mults[id(space)] * _of_input(space, mults)) for space in plan.spaces}


def _of_input(space: Space, mults: dict[int, float]) -> float:
    """The multiplier of the input of a middle channel's block; 1 for all others."""
    if not space.middle:
        return 1.0
    source = space.source
    while source is not None and source.root().middle:
        source = source.root().source
    return 1.0 if source is None else mults.get(id(source.root()), 1.0)


def base_widths(plan: Plan) -> dict[int, int]:
    """The base network's own widths."""
    return {id(space): space.size for space in plan.spaces}


def largest_widths(plan: Plan, width_mults: Sequence[float], expand_mults: Sequence[float]) -> dict[int, int]:
    """The widths of the largest network that :func:`draw_widths` can give."""
    mults = {id(space): max(expand_mults if space.middle else width_mults) for space in plan.spaces}
    return {id(space): round(space.size * mults[id(space)] * _of_input(space, mults)) for space in plan.spaces}


def widened(base: Float[Tensor, "o i ..."], right: Tensor, below: Tensor, rows: int, columns: int) -> Float[Tensor, "rows columns ..."]:
    """``[[base, right], below]`` cut to its first ``rows`` and ``columns``: the base is always the first slice."""
    o, i = base.shape[:2]
    top = base if columns == i else torch.cat([base, right[:, : columns - i]], 1)
    return top if rows == o else torch.cat([top, below[: rows - o, :columns]], 0)


def extra_weights(model: nn.Module, plan: Plan, largest: dict[int, int]) -> nn.ParameterDict:
    """What the largest network has beyond the base: ``right`` and ``below`` of each matrix or kernel, ``below`` of each vector.

    Drawn from the global state: normal with the standard deviation of the base's own entries; of vectors also with their mean.
    """
    params = dict(model.named_parameters())
    extra = nn.ParameterDict()
    for layer in plan.layers.values():
        p = params[layer.weight]
        rows, columns = _width(layer.writes, largest, p.shape[0]), _width(layer.reads, largest, p.shape[1]) if p.dim() > 1 else 0
        spread = float(p.detach().std(unbiased=False))
        if p.dim() > 1 and columns > p.shape[1]:
            extra[_key(layer.weight, "right")] = nn.Parameter(torch.randn(p.shape[0], columns - p.shape[1], *p.shape[2:]).to(p) * spread)
        if p.dim() > 1 and rows > p.shape[0]:
            extra[_key(layer.weight, "below")] = nn.Parameter(torch.randn(rows - p.shape[0], columns, *p.shape[2:]).to(p) * spread)
        for name in (layer.bias, layer.weight if p.dim() == 1 else None):
            if name is not None and rows > p.shape[0]:
                v = params[name].detach()
                extra[_key(name, "below")] = nn.Parameter(torch.randn(rows - len(v)).to(v) * v.std(unbiased=False) + v.mean())
    return extra


def _width(space: Space | None, widths: dict[int, int], size: int) -> int:
    return size if space is None else widths.get(id(space.root()), size)


def _key(name: str, which: str) -> str:
    return f"{name.replace('.', '-')}-{which}"


class _Widen(TorchFunctionMode):
    """Performs a pass with the plan's layers at other widths."""

    def __init__(self, model: nn.Module, plan: Plan, extra: nn.ParameterDict, widths: dict[int, int]) -> None:
        super().__init__()
        names = {name: p for name, p in model.named_parameters()}
        self.params, self.plan, self.extra, self.widths = names, plan, extra, widths
        self.layers = {id(names[name]): layer for name, layer in plan.layers.items() if name in names}

    def _vector(self, name: str | None, width: int) -> Tensor | None:
        if name is None:
            return None
        base = self.params[name]
        return base if width == len(base) else torch.cat([base, self.extra[_key(name, "below")][: width - len(base)]])

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            layer = self.layers.get(id(args[3] if len(args) > 3 else kwargs.get("weight")))
            if layer is not None:  # by its own batch: the running statistics are the base's
                width = _width(layer.writes, self.widths, len(self.params[layer.weight]))
                eps = args[7] if len(args) > 7 else kwargs.get("eps", 1e-5)
                return func(args[0], None, None, self._vector(layer.weight, width), self._vector(layer.bias, width), True, 0.0, eps)
        elif (func in CONVS or func is F.linear) and (layer := self.layers.get(id(args[1]))) is not None:
            base = self.params[layer.weight]
            rows, columns = _width(layer.writes, self.widths, base.shape[0]), _width(layer.reads, self.widths, base.shape[1])
            right, below = (self.extra[key] if (key := _key(layer.weight, which)) in self.extra else base for which in ("right", "below"))
            changed = [args[0], widened(base, right, below, rows, columns), self._vector(layer.bias, rows), *args[3:]]
            if layer.reads is None and func in CONVS and len(args) > 6 and args[6] > 1:
                changed[6] = rows  # depthwise
            return func(*changed, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def augmented(model: nn.Module, plan: Plan, extra: nn.ParameterDict, widths: dict[int, int]) -> Iterator[None]:
    """Passes of ``model`` inside run at ``widths``; its parameters are the first slice of every tensor, and get gradients."""
    with _Widen(model, plan, extra, widths):
        yield


@final
@dataclass
class NetAug(Technique):
    """Add ``alpha`` times the loss of one widened network a step, drawn by :func:`draw_widths`: L(W) + alpha L([W, W_i]) (eq. 2).

    In the first ``full`` share of a stage's epochs all widths are drawn, afterwards only those of middle channels.
    The new weights live in ``run.extra`` and never ship: the answer is the plain network. For networks too
    small to fit their data; one that over-fits is hurt, and a step costs two to twenty times as much. ``alpha=0`` is off.
    """

    alpha: float = 1.0
    width_mults: Sequence[float] = (1.0, 1.8, 2.6)
    expand_mults: Sequence[float] = (1.0, 1.6, 2.2, 2.8)
    full: float = 0.5
    plan: Plan | None = field(default=None, init=False, repr=False, compare=False)
    rank = 95  # after all edits

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise Mistake(f"netaug: alpha={self.alpha}: the weight of the widened network's loss must be at least 0 (off); 1 is usual")
        for name in ("width_mults", "expand_mults"):
            mults = getattr(self, name)
            if not isinstance(mults, (tuple, list)) or not mults or not all(m >= 1 for m in mults):
                raise Mistake(f"netaug: {name}={mults!r}: multiples of the base's widths, each at least 1, written {name}=(1.0,2.0)")
        if not 0 <= self.full <= 1:
            raise Mistake(f"netaug: full={self.full}: a share of the epochs, 0 to 1; 0.5 is the paper's")

    def on_start(self, run: Run) -> None:
        if self.alpha == 0:
            return
        shape = (2, run.data.preprocess.channels, *run.data.preprocess.size)
        x = run.plan.pixels(torch.rand(shape))
        with run.aside():
            self.plan = plan_of(run.model, lambda x: run.forward(x).logits, x)  # type: ignore[arg-type, return-value]
        largest = largest_widths(self.plan, self.width_mults, self.expand_mults)
        if largest == base_widths(self.plan):
            raise Mistake(
                f"netaug finds no channels to widen in the network {run.settings.model!r} with width_mults={self.width_mults} and "
                f"expand_mults={self.expand_mults}; choose a network of convolutions, such as --model resnet20 or timm/mobilenetv2_035"
            )
        extra = extra_weights(run.model, self.plan, largest)
        run.extra["netaug"] = extra
        images = run.images
        try:
            with torch.no_grad(), run.still(), augmented(run.model, self.plan, extra, largest):
                run.forward(x)
        except RuntimeError as error:
            raise Mistake(f"netaug cannot widen the network {run.settings.model!r} ({error}); choose another --model, such as resnet20") from error
        run.images = images
        run.report("netaug, largest network", sum(p.numel() for p in [*run.model.parameters(), *extra.parameters()]), "parameters")

    def on_loss(self, run: Run) -> None:
        if self.plan is None or self.alpha == 0:
            return
        middle_only = run.epoch >= math.ceil(self.full * run.stage.epochs)
        widths = draw_widths(self.plan, self.width_mults, self.expand_mults, run.gen("netaug"), middle_only=middle_only)
        if middle_only and not any(space.middle for space in self.plan.spaces):
            return
        params = dict(run.model.named_parameters())
        for layer in self.plan.layers.values():
            p = params.get(layer.weight)
            if p is None or (layer.writes is not None and p.shape[0] != layer.writes.root().size):
                raise Mistake(f"netaug widens the network as it stood at the start, and another part has changed {layer.weight!r} since; leave one of them out")
        from convince.fit.loop import soft_cross_entropy

        objective: Any = run.stage.objective or getattr(run.team.owner("objective", run.stage), "objective", soft_cross_entropy)
        try:
            with run.still(), augmented(run.model, self.plan, run.extra["netaug"], widths):  # type: ignore[arg-type]
                out = run.forward(run.batch.x)
        except RuntimeError as error:  # a network that takes another way in training than it took at the start
            raise Mistake(f"netaug cannot widen this network while another part changes it ({str(error).splitlines()[0]}); leave one of them out") from error
        run.loss = run.loss + self.alpha * objective(run, out, run.batch)
