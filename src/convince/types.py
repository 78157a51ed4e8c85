"""What passes between the rooms: Batch, Out, Stage, Budget, Split, Schema, and the axis letters.

Axis letters, everywhere: ``n`` samples of a batch, ``N`` of a set, ``c`` channels, ``h`` rows,
``w`` columns, ``t`` time, ``d`` features of a table, ``k`` classes. Pixels are [0, 1] outside
the store, uint8 inside it. Scores are logits: their softmax is the probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

Unit = Literal["images", "steps", "epochs", "seconds", "bytes", "macs"]


@dataclass
class Batch:
    """One global batch. ``y`` rows are class weights [n k], or None without labels."""

    x: Tensor
    y: Float[Tensor, "n k"] | None
    index: Int[Tensor, " n"]
    weight: Float[Tensor, " n"] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    group: int = 1  # rows that stay together (3 for triplets)


@dataclass
class Out:
    """One pass of the network: fp32 logits [n k], and the last feature map or token list."""

    logits: Float[Tensor, "n k"] | None
    features: Tensor | None = None


@dataclass
class Stage:
    """Everything that changes what is trained on what. ``guests=False``: only its owner's hooks run.

    ``index``: rows of the pool to train on (None: the training part); ``targets`` [N k] replace
    the labels; ``objective(run, out, batch)`` the loss; ``trainable(name)`` says which
    parameters move; ``steps`` ends the stage early, counted over all its epochs; ``lr`` and
    ``schedule`` ("cosine", "constant") replace the optimiser's and the settings' in this stage.
    """

    name: str
    epochs: int
    index: Int[Tensor, " m"] | None = None
    targets: Float[Tensor, "N k"] | None = None
    objective: Callable[..., Tensor] | None = None
    trainable: Callable[[str], bool] | None = None
    guests: bool = True
    steps: int | None = None
    lr: float | None = None
    schedule: str | None = None
    owner: Any = None  # filled in by the loop


@dataclass
class StageCost:
    """What a stage cost in this session: steps planned and done, rows through the network in training, seconds.

    ``main`` is False for stages that parts put before the main ones; ``marks`` is what a survey's meter read after each step.
    """

    name: str
    main: bool
    planned: int = 0
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    marks: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunSpec:
    """A further run inside a fit: the settings that differ from the run's own, by name (``{"model": ..., "seed": ...}``)."""

    settings: dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """An amount and what it counts: ``Budget(20, "epochs")``, ``Budget(0.25, "bytes")``."""

    value: float
    unit: Unit


@dataclass(frozen=True)
class Split:
    """Rows of the pool in each part; the three never overlap. ``val`` and ``test`` may be empty."""

    train: Int[Tensor, " a"]
    val: Int[Tensor, " b"]
    test: Int[Tensor, " c"]

    def __getitem__(self, name: str) -> Tensor:
        return {"train": self.train, "val": self.val, "test": self.test}[name]


@dataclass(frozen=True)
class Field:
    """One column of a recipe's schema: its name, meaning, unit and shape."""

    name: str
    meaning: str
    unit: str = ""
    shape: str = ""


@dataclass(frozen=True)
class Schema:
    """What a recipe reads: its fields."""

    fields: tuple[Field, ...]


@dataclass
class Explanation:
    """What an explainer returns: a map [n 1 *spatial] or None, further images, and a table."""

    map: Tensor | None
    images: dict[str, Tensor] = field(default_factory=dict)
    table: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """A named number with its unit, as a probe or a technique that measures reports it."""

    name: str
    value: float
    unit: str = ""


@dataclass(frozen=True)
class Curves:
    """A figure: named lines (or points, unjoined) over one pair of axes; ``log``: the y axis in powers of ten."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    log: bool = False
    points: bool = False


@dataclass(frozen=True)
class Bars:
    """A figure: one bar a name, from zero."""

    title: str
    unit: str
    values: dict[str, float]


@dataclass(frozen=True)
class Plane:
    """A figure: a heat map of ``values[row][column]``, with a name for each axis."""

    title: str
    rows: str
    columns: str
    values: list[list[float]]


Figure = Curves | Bars | Plane


@dataclass
class Findings:
    """What a probe returns: named numbers, and figures as data, which the report draws."""

    readings: list[Reading]
    figures: Sequence[Figure] = ()
