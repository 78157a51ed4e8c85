"""DeepMAD search: widths and depths from an entropy formula under budgets of work and size, with no data and no training."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, final

from convince.backbones.deepmad import BLOCKS, Stage
from convince.errors import Mistake
from convince.fit.randomness import key
from convince.kinds import Search
from convince.parts import Card
from convince.search.deepmad_entropy import RATIO, Spec, effectiveness, flops_params, objective, shaped
from convince.search.deepmad_exact import optimum
from convince.search.lab import Lab
from convince.search.space import Genes, Space

CARD = Card(
    part="deepmad-search",
    kind="search",
    paper="deepmad",
    title="DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural Network",
    year=2023,
    url="https://arxiv.org/abs/2303.02165",
    departs=(
        "100,000 steps of evolution; the authors run 500,000",
        "channels come from one list, multiples of 8 and from 64 on eight an octave, so that the random search beside it can draw from it",
        "the depth penalty is the released code's, the exponential of the standard deviation; the paper prints the variance",
        "the penalty leaves out the first two stages of five, as the code does, and of a small network's three only the first",
        "the last stage is changed like any other; the released code's draw never reaches it",
        "bottlenecks never narrow from stage to stage, as in all published networks; the code asks this of the channels out, which those networks break",
        "pictures up to 64 pixels get three stages after a stem of stride 1; the paper designs for 224 pixels and five",
        "the budgets are those of a small network for small pictures; the authors give those of ResNet-18, -34 and -50",
        "depthwise networks get no 1x1 convolution before the mean, and change by the same factors as the others; the code draws their ratios",
        "a random setting that breaks a limit is narrowed and made shallower until it keeps it, so that the random search finds networks at all",
        "a kernel of 5 needs a map of at least 8 pixels, and 3 is the least; the code goes down to 1",
    ),
    tiny={"macs": 2e6, "parameters": 3e4, "iterations": 200, "grid": 2},
    needs=("optuna",),
)

CHANNELS = (*range(8, 128, 8), *range(128, 256, 16), *range(256, 512, 32), *range(512, 1024, 64), *range(1024, 2049, 128))
FACTORS = (1.5, 1.25, 0.8, 0.6, 0.5)  # by which channels change
RHO = {"bottleneck": 0.3, "depthwise": 0.5}


@dataclass(frozen=True)
class Problem:
    """What is to be designed: a network for images of ``size`` pixels and so many ``classes``, within ``macs``, ``parameters`` and ``rho``.

    Images that are not square are reckoned as squares of their longer side.
    """

    size: int
    classes: int
    in_chans: int = 3
    macs: float = 20e6
    parameters: float = 0.3e6
    rho: float = 0.3
    block: str = "bottleneck"

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the stem, then of each stage."""
        return (1, 1, 2, 2) if self.size <= 64 else (2, 2, 2, 2, 1, 2)

    def spec(self, genes: Genes) -> Spec:
        """The choices as a specification."""
        stem, *strides = self.strides
        rows = ((*(genes[f"{what}{i}"] for what in ("blocks", "bottleneck", "out", "kernel")), stride) for i, stride in enumerate(strides, 1))
        return Spec(genes["stem"], tuple(Stage(*row) for row in rows), stem, self.block, 0, self.in_chans)

    def fits(self, spec: Spec) -> bool:
        """Whether a network keeps its form and all limits."""
        side, c, narrow = math.ceil(self.size / spec.stem_stride), spec.stem, 0
        for stage in spec.stages:
            if stage.bottleneck < narrow or not shaped(c, stage, self.block, side):
                return False
            side, c, narrow = math.ceil(side / stage.stride), stage.out, stage.bottleneck
        macs, parameters = flops_params(spec, self.size, self.classes)
        return macs <= self.macs and parameters <= self.parameters and effectiveness(spec, self.size) <= self.rho

    def space(self, thin: int | None = None) -> Space:
        """All choices that some network within the budgets can have; with ``thin`` only so many values of each, evenly picked."""
        least: Genes = {"stem": 8}
        wide: dict[str, Sequence[int]] = {"stem": [c for c in CHANNELS if c <= 64]}
        for i in range(1, len(self.strides)):
            least |= {f"blocks{i}": 1, f"bottleneck{i}": 8, f"out{i}": 8, f"kernel{i}": 3}
            wide |= {f"blocks{i}": range(1, 4 if i == 1 else 17), f"bottleneck{i}": CHANNELS, f"out{i}": CHANNELS, f"kernel{i}": (3, 5)}
        choices = {name: [v for v in values if self._may(least, name, v)] for name, values in wide.items()}
        if not all(choices.values()):
            low, _ = RATIO[self.block]
            least |= {name: math.ceil(8 * max(low, 1)) for name in least if name.startswith("bottleneck")}
            macs, parameters = flops_params(self.spec(least), self.size, self.classes)
            raise Mistake(
                f"deepmad-search: macs={self.macs:g}, parameters={self.parameters:g}: the smallest network for {self.size} pixels and {self.classes}"
                f" classes takes {macs:,} multiply-adds and {parameters:,} parameters; give larger budgets"
            )
        if thin is not None:
            choices = {name: [values[i] for i in picked(len(values), thin)] for name, values in choices.items()}
        return Space(
            choices,
            lambda genes: self.spec(self.repaired(genes, choices)).options(),
            lambda genes: self.fits(self.spec(self.repaired(genes, choices))),
        )

    def _may(self, least: Genes, name: str, value: int) -> bool:
        """Whether the smallest network with this one choice, and what its form asks of the others then, keeps macs and parameters."""
        genes, n, (low, high) = {**least, name: value}, len(self.strides) - 1, RATIO[self.block]
        for _ in range(n + 1):
            for i in range(1, n + 1):
                b, o = f"bottleneck{i}", f"out{i}"
                genes[b] = max(genes[b], math.ceil(low * genes[o]), genes.get(f"bottleneck{i - 1}", 0))
                genes[o] = max(genes[o], math.ceil(genes[b] / high))
                before = f"out{i - 1}" if i > 1 else "stem"
                genes[before] = max(genes[before], math.ceil(genes[o] / 4))
        macs, parameters = flops_params(self.spec(genes), self.size, self.classes)
        return genes["stem"] <= 64 and macs <= self.macs and parameters <= self.parameters

    def repaired(self, genes: Genes, choices: Mapping[str, Sequence[int]]) -> Genes:
        """The choices themselves where they keep the limits; else narrowed in steps, then made shallower, until they do or cannot."""
        for step in range(40):
            made = self.formed({name: v if name.startswith(("blocks", "kernel")) else v * 0.9**step for name, v in genes.items()}, choices)
            macs, parameters = flops_params(self.spec(made), self.size, self.classes)
            if macs <= self.macs and parameters <= self.parameters:
                break
        while not self.fits(self.spec(made)):
            deepest = max((name for name in made if name.startswith("blocks")), key=lambda name: made[name])
            shallower = [v for v in choices[deepest] if v < made[deepest]]
            if not shallower:
                break
            made[deepest] = shallower[-1]
        return made

    def formed(self, genes: Genes, choices: Mapping[str, Sequence[int]]) -> Genes:
        """The values of ``choices`` nearest to these that give the network its form (:func:`shaped`, and bottlenecks that never narrow)."""
        (low, high), side, narrow = RATIO[self.block], math.ceil(self.size / self.strides[0]), 0.0
        made = {name: nearest(choices[name], value) for name, value in genes.items()}
        c = made["stem"]
        for i, stride in enumerate(self.strides[1:], 1):
            made[f"out{i}"] = nearest(choices[f"out{i}"], made[f"out{i}"], narrow / high, 4 * c)
            c = made[f"out{i}"]
            narrow = made[f"bottleneck{i}"] = nearest(choices[f"bottleneck{i}"], made[f"bottleneck{i}"], max(narrow, low * c), high * c)
            made[f"kernel{i}"] = nearest(choices[f"kernel{i}"], made[f"kernel{i}"], 3, max(3, side / 1.5))
            side = math.ceil(side / stride)
        return made

    def score(self, genes: Genes) -> float:
        """The objective of a design."""
        return objective(self.spec(genes), self.size)


def nearest(values: Sequence[int], wanted: float, low: float = 0, high: float = math.inf) -> int:
    """The value nearest to what is wanted, of those from ``low`` to ``high`` where there are any."""
    return min([v for v in values if low <= v <= high] or values, key=lambda v: abs(v - wanted))


def picked(n: int, thin: int) -> list[int]:
    """Up to ``thin`` of the places 0 to n-1, evenly, the first and the last among them."""
    return sorted({round(i * (n - 1) / max(min(thin, n) - 1, 1)) for i in range(min(thin, n))})


def mutate(space: Space, genes: Genes, draw: random.Random) -> Genes:
    """Change the stem's channels, or of one stage the channels out, the bottleneck, the kernel or the depth (algorithm 1)."""
    stages = sum(name.startswith("blocks") for name in space.choices)
    at = draw.randrange(stages + 1)
    name = "stem" if at == 0 else f"{draw.choice(('out', 'bottleneck', 'kernel', 'blocks'))}{at}"
    values, now = space.choices[name], genes[name]
    if name.startswith("kernel"):
        return space.change(genes, name, draw.choice(values))
    wanted = now + draw.choice((-2, -1, 1, 2)) if name.startswith("blocks") else now * draw.choice(FACTORS)
    further = [v for v in values if (v > now) == (wanted > now) and v != now]  # on a coarse grid the nearest value may be the present one
    return space.change(genes, name, nearest(further, wanted)) if further else genes


def evolve(problem: Problem, space: Space, seed: int, iterations: int = 100_000, population: int = 256) -> Genes | None:
    """The best of a population that grows from one network by changes of a random member; the worst beyond its size are dropped.

    None where a thousand random choices give no network to start from.
    """
    draw = random.Random(seed)
    drawn = (problem.repaired({name: draw.choice(values) for name, values in space.choices.items()}, space.choices) for _ in range(1000))
    first = next((genes for genes in drawn if problem.fits(problem.spec(genes))), None)
    if first is None:
        return None
    members, seen = [(problem.score(first), first)], {tuple(first.values())}
    for _ in range(iterations):
        child = mutate(space, mutate(space, draw.choice(members)[1], draw), draw)
        code = tuple(child.values())
        if code in seen or not problem.fits(problem.spec(child)):
            continue
        seen.add(code)
        members.append((problem.score(child), child))
        if len(members) > population:
            members.remove(min(members, key=lambda member: member[0]))
    return max(members, key=lambda member: member[0])[1]


@final
@dataclass
class DeepmadSearch(Search):
    """Designs a network for at most ``macs`` multiply-adds and ``parameters``; nothing is trained, so it costs no images.

    ``rho`` None is 0.3 for ``block`` "bottleneck" and 0.5 for "depthwise". ``strategy`` "evolution" is the authors'; "exact" solves an
    integer program over ``grid`` values of each choice. With either the notes say how far evolution stays below the exact optimum on
    that grid. ``trial_epochs`` is how long the random search beside it trains.
    """

    network: ClassVar[str] = "deepmad"
    macs: float = 20e6
    parameters: float = 0.3e6
    rho: float | None = None
    block: str = "bottleneck"
    strategy: str = "evolution"
    iterations: int = 100_000
    population: int = 256
    grid: int = 5
    trial_epochs: int = 4
    found: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.block not in BLOCKS or self.strategy not in ("evolution", "exact"):
            raise Mistake(f"deepmad-search: block={self.block!r}, strategy={self.strategy!r}: {' or '.join(BLOCKS)}, and evolution or exact")
        if min(self.iterations, self.population) < 1 or self.grid < 2 or (self.rho is not None and self.rho <= 0):
            raise Mistake(
                f"deepmad-search: iterations={self.iterations}, population={self.population}, grid={self.grid}, rho={self.rho}: from 1, 1 and 2, and above 0"
            )

    def problem(self, data: Any) -> Problem:
        """The design problem of these budgets and this data."""
        rho = RHO[self.block] if self.rho is None else self.rho
        return Problem(max(data.preprocess.size), data.k, data.preprocess.channels, self.macs, self.parameters, rho, self.block)

    def space(self, data: Any) -> Space:
        return self.problem(data).space()

    def find(self, lab: Lab) -> dict[str, Any]:
        problem = self.problem(lab.data)
        settings = {name: value for name, value in asdict(self).items() if name != "found"}
        self.found = lab.keep(["deepmad-search", settings, asdict(problem)], 0.0, lambda: self.design(problem, lab.seed))
        return self.found["options"]

    def design(self, problem: Problem, seed: int) -> dict[str, Any]:
        """The options of the best network, and numbers about it."""
        number, coarse = key(seed, "deepmad-search"), problem.space(self.grid)
        exact = optimum(problem, coarse)
        steps = (self.iterations, self.population)
        best = exact if self.strategy == "exact" else evolve(problem, problem.space(), number, *steps)
        if best is None:
            where = f"on the grid of {self.grid} values a choice" if self.strategy == "exact" else "of a thousand"
            raise Mistake(f"deepmad-search: no network {where} keeps macs={self.macs:g}, parameters={self.parameters:g}, rho={problem.rho:g}; loosen them")
        spec = problem.spec(best)
        macs, parameters = flops_params(spec, problem.size, problem.classes)
        notes = {"objective": problem.score(best), "rho": effectiveness(spec, problem.size), "macs": macs, "parameters": parameters}
        if exact is not None:
            notes["objective, exact on the grid"] = problem.score(exact)
            evolved = evolve(problem, coarse, number, *steps)
            if evolved is not None:
                notes["objective, evolution on the grid"] = problem.score(evolved)
                notes["evolution below exact on the grid"] = 1 - problem.score(evolved) / problem.score(exact)
        return {"options": spec.options(), "notes": notes}

    def notes(self) -> dict[str, Any]:
        return dict(self.found.get("notes", {}))
