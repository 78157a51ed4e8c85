"""Local complexity: how many units of each layer switch within a small neighbourhood of an image, and where on a slice of images they do."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.kinds import Probe, as_found
from convince.parts import Card
from convince.types import Curves, Findings, Plane, Reading

CARD = Card(
    part="local-complexity",
    kind="probe",
    paper="local-complexity-grokking",
    title="Deep Networks Always Grok and Here is Why",
    year=2024,
    url="https://arxiv.org/abs/2402.15555",
    tiny={"images": 4, "vertices": 8, "side": 5},
    departs=(
        "the radius is a length in pixel values, 0.05 as the paper's smallest for MNIST; its CIFAR networks have 0.005 after normalisation",
        "32 of the images given are looked at; the paper takes 1,024",
        "an input of few numbers has fewer vertices, at most two for each number",
        "of smooth activations and of ReLU6 the sign of the input is watched, as the authors' code does; a ReLU6 also bends at 6",
    ),
)
KINKED = {
    *(F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    *(F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu, F.rrelu, F.relu6, F.elu, F.elu_, F.celu, F.selu),
    *(F.gelu, F.silu, F.mish, F.hardswish),
}
ROWS = 256  # of one pass


# -- watching the units ------------------------------------------------------------------------------


@final
class _Watch(TorchFunctionMode):
    """Hands the input of every ReLU-like function to ``look`` before it may be changed in place."""

    def __init__(self, look: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KINKED or (func is F.hardtanh and kwargs.get("min_val") == 0):  # the latter is how torch's ReLU6 calls
            self.look(args[0])
        return func(*args, **kwargs)


def watched(answer: nn.Module, x: Tensor, reduce: Callable[[Float[Tensor, "n u"]], Tensor], layers: Sequence[str] = ()) -> dict[str, tuple[Tensor, int]]:
    """One pass of ``x`` [n ...]: of each ReLU-like layer ``reduce`` of its pre-activations [n u], and u, the number of its units.

    A layer is called like the module that it runs in; a second use within it has "#2" behind its name. Functions count as well as modules. Inputs that
    do not have a row for each row of ``x`` belong to no image and are left out. ``layers``: names or patterns, such as "layer3.*". Raises Mistake
    where nothing is left. The answer must be in eval mode.
    """
    found: dict[str, tuple[Tensor, int]] = {}
    stack: list[str] = []

    def look(z: Tensor) -> None:
        stem = name = stack[-1] if stack and stack[-1] else "network"
        uses = 1
        while name in found:
            uses += 1
            name = f"{stem}#{uses}"
        if z.dim() > 1 and len(z) == len(x):
            found[name] = reduce(z.flatten(1)), z[0].numel()

    def enter(name: str) -> Any:
        return lambda module, inputs: stack.append(name)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop()

    handles = []
    try:
        for name, module in answer.named_modules():
            handles += [module.register_forward_pre_hook(enter(name.removeprefix("model.")), prepend=True), module.register_forward_hook(leave)]
        with _Watch(look), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            answer(x)
    finally:
        for handle in handles:
            handle.remove()
    kept = {name: value for name, value in found.items() if not layers or any(fnmatch.fnmatchcase(name, p) for p in layers)}
    if not kept:
        have = f"it has {', '.join(list(found)[:8])}" if found else "choose a network such as resnet20"
        named = f" named {', '.join(layers)}" if layers else ""
        raise Mistake(f"local-complexity: {type(answer).__name__} has no ReLU-like layer{named}; {have}")
    return kept


# -- local complexity --------------------------------------------------------------------------------


def directions(d: int, count: int, gen: Generator) -> Float[Tensor, "p d"]:
    """``count`` random orthonormal directions of a space of ``d`` numbers, at most ``d``: the QR decomposition of a Gaussian matrix."""
    if not 1 <= count <= d:
        raise Mistake(f"local-complexity: {2 * count} vertices need {count} directions, and an input of {d} numbers has 1 to {d}; ask for at most {2 * d}")
    return torch.linalg.qr(torch.randn(d, count, generator=gen, dtype=torch.float64)).Q.T


def vertices(x: Float[Tensor, "n ..."], v: Float[Tensor, "p d"], radius: float) -> Float[Tensor, "n q ..."]:
    """The corners ``x +- radius v_p`` of the cross-polytope around each row, 2p of them; the row itself is none."""
    steps = radius * torch.cat([v, -v]).to(x).view(1, -1, *x.shape[1:])
    return x[:, None] + steps


@dataclass(frozen=True)
class Complexity:
    """``cut`` [n l]: units of each layer whose sign is not the same at all corners; ``names`` of the layers and their ``units``."""

    names: tuple[str, ...]
    units: tuple[int, ...]
    cut: Int[Tensor, "n l"]

    @property
    def total(self) -> Int[Tensor, " n"]:
        """Cut units of all layers: the paper's LC of each row."""
        return self.cut.sum(1)

    @property
    def shares(self) -> Float[Tensor, " l"]:
        """Cut units over the units of each layer, mean over rows, 0 to 1."""
        return self.cut.double().mean(0) / torch.tensor(self.units, dtype=torch.float64, device=self.cut.device)


def local_complexity(
    answer: nn.Module, x: Float[Tensor, "n ..."], radius: float, n_vertices: int = 50, *, gen: Generator, layers: Sequence[str] = ()
) -> Complexity:
    """Units whose hyperplanes cut the hull of ``n_vertices`` points at a distance of ``radius`` [units of x] around each row (section 3 of the paper).

    A unit is cut where its pre-activation has not one sign at all corners; 0 is a sign of its own. All rows share the directions that ``gen`` draws.
    For the first layer this is exact; deeper ones see the image of the hull at its corners alone. The answer is in eval mode meanwhile.
    """
    if not radius > 0 or n_vertices < 2 or n_vertices % 2 or not x.is_floating_point() or not len(x):
        given = f"radius={radius}, n_vertices={n_vertices} and an input of {tuple(x.shape)} {x.dtype}"
        raise Mistake(f"local-complexity: {given}: needs a radius above 0, an even number of vertices and at least one row of floating-point numbers")
    v = directions(x[0].numel(), n_vertices // 2, gen)
    parts: list[dict[str, tuple[Tensor, int]]] = []

    def count(z: Float[Tensor, "m u"]) -> Int[Tensor, " n"]:
        low, high = z.unflatten(0, (-1, n_vertices)).aminmax(dim=1)
        return (low.sign() != high.sign()).sum(1)

    with as_found(answer), torch.no_grad():
        for part in x.split(max(ROWS // n_vertices, 1)):
            parts.append(watched(answer, vertices(part, v, radius).flatten(0, 1), count, layers))
    names = tuple(parts[0])
    return Complexity(names, tuple(parts[0][n][1] for n in names), torch.stack([torch.cat([part[n][0] for part in parts]) for n in names], 1))


class Phases(NamedTuple):
    """Steps and values of the trough and of the peak behind it, and ``drop``, the share of the peak that is lost by the end."""

    trough_at: float
    trough: float
    peak_at: float
    peak: float
    drop: float


def phases(steps: Sequence[float], values: Sequence[float]) -> Phases:
    """Where the ascent of a curve over training lies, between its first and its last descent (the paper's three phases).

    The ascent is the largest rise from one value to a later one, so a high start is no peak; a curve that never rises has both at its start.
    """
    if len(steps) != len(values) or not len(values):
        raise Mistake(f"phases: {len(steps)} steps and {len(values)} values: needs as many of each, at least one")
    low = trough = peak = 0
    for i, value in enumerate(values):
        if value < values[low]:
            low = i
        if value - values[low] > values[peak] - values[trough]:
            trough, peak = low, i
    drop = 1 - values[-1] / values[peak] if values[peak] else 0.0
    return Phases(steps[trough], values[trough], steps[peak], values[peak], drop)


def partition_slice(
    answer: nn.Module, corners: Float[Tensor, "3 ..."], side: int = 24, margin: float = 0.25, layers: Sequence[str] = ()
) -> Int[Tensor, "side side"]:
    """The plane through three inputs, cut into ``side`` x ``side`` cells: units that switch between a cell and its neighbours below and to the right.

    The first input stands at the upper left, the second to its right, the third below it, each ``margin`` of their distance from the edge.
    """
    if len(corners) != 3 or side < 2:
        raise Mistake(f"partition_slice: {len(corners)} corners, side={side}: needs three inputs, one for each corner, and a side of at least 2")
    a, right, down = corners[0], corners[1] - corners[0], corners[2] - corners[0]
    at = torch.linspace(-margin, 1 + margin, side + 1).to(corners)
    along = at.view(-1, *[1] * a.dim())

    def changes(z: Float[Tensor, "m u"]) -> Int[Tensor, "h w"]:
        sign = z.unflatten(0, (-1, side + 1)).sign()
        here = sign[:-1, :-1]
        return ((here != sign[1:, :-1]) | (here != sign[:-1, 1:])).sum(2)

    rows = []
    with as_found(answer), torch.no_grad():
        for row in range(side):  # two lines of the grid at a time
            points = torch.stack([a + along * right + v * down for v in at[row : row + 2]])
            rows.append(sum(cut for cut, _ in watched(answer, points.flatten(0, 1), changes, layers).values()))
    return torch.cat(rows)  # type: ignore[arg-type]


# -- the probe ---------------------------------------------------------------------------------------


@final
@dataclass
class LocalComplexity(Probe):
    """Cut units of each layer at ``images`` images and as many random points; ``radius`` [pixel value], corners of each hull: ``vertices``.

    Random points are uniform in [0, 1] for images, between the least and the largest value of each number for tables. ``layers`` are names or patterns
    such as "layer3.*"; ``side`` cells a side has the map of a slice through three images.
    """

    radius: float = 0.05
    vertices: int = 50
    images: int = 32
    side: int = 24
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.radius > 0 or self.vertices < 2 or self.vertices % 2 or self.images < 1 or self.side < 2:
            given = f"radius={self.radius}, vertices={self.vertices}, images={self.images}, side={self.side}"
            raise Mistake(f"local-complexity: {given}: radius above 0, an even number of vertices, at least one image, side at least 2")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        if x.dim() < 2 or not len(x) or not x.is_floating_point():
            raise Mistake(f"local-complexity moves inputs a little, so they are rows of floating-point numbers, and the input is {tuple(x.shape)} {x.dtype}")
        only = (self.layers,) if isinstance(self.layers, str) else self.layers
        x = x.detach()[torch.linspace(0, len(x) - 1, min(self.images, len(x))).long()]
        low, high = (0, 1) if x.dim() == 4 else (x.amin(0), x.amax(0))
        random = low + (high - low) * torch.rand(x.shape, generator=generator("local-complexity", "points")).to(x)
        count = min(self.vertices, 2 * x[0].numel())
        found = {}
        for where, points in (("images", x), ("random points", random)):
            found[where] = local_complexity(answer, points, self.radius, count, gen=generator("local-complexity", "directions"), layers=only)
        readings, curves = [], {}
        for where, seen in found.items():
            readings.append(Reading(f"cut units, {where}", float(seen.total.double().mean()), f"of {sum(seen.units)}"))
            for name, share in zip(seen.names, seen.shares.tolist(), strict=True):
                readings.append(Reading(f"{name}: cut units, {where}", share, "share of units"))
            curves[where] = [(float(i), share) for i, share in enumerate(seen.shares.tolist(), 1)]
        figures: list[Any] = [Curves(f"Units cut within {self.radius:g} by layer", "layer", "share of units", curves)]
        if len(x) >= 3:
            cells = partition_slice(answer, x[torch.linspace(0, len(x) - 1, 3).long()], self.side, layers=only)
            figures.append(Plane("Units that switch, on a slice through three images", "to the third", "to the second", cells.double().tolist()))
        return Findings(readings, figures)
