"""Facts: everything a report can say about a run, each field with its meaning and unit.

A plain dictionary: text, numbers, lists, and uint8 pictures ([h w], [h w 1], [h w 3] or [h w 4]).
Every field but ``run`` may be left out or be None. Shares and probabilities are 0 to 1, times are
seconds, sizes are bytes, log loss is in nats. NaN and infinity are allowed wherever a number is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Required, TypedDict

import numpy as np

from convince.errors import Mistake, nearest

Image = np.ndarray  # uint8, [h w], [h w 1], [h w 3] or [h w 4]
Cell = str | int | float | bool | None


class Skipped(TypedDict, total=False):
    """A file that could not be used."""

    file: str
    reason: str


class Duplicate(TypedDict, total=False):
    """Files that are equal bit for bit: their names, and the part of the split each lies in."""

    files: list[str]
    parts: list[str]


class Fitting(TypedDict, total=False):
    """How a picture was brought to the network's input."""

    mode: str  # "letterbox", "crop", "stretch", "as is"
    size: int | list[int]  # pixels: a side, or [height, width]
    channels: int
    mean: list[float]  # per channel, of pixels in 0 to 1
    std: list[float]


class Item(TypedDict, total=False):
    """A picture with a line of text, and a number where there is one."""

    image: Image
    label: str
    value: float
    unit: str


class Data(TypedDict, total=False):
    """What came in."""

    origin: str  # folder, file or built-in name
    classes: list[str]
    counts: dict[str, list[int]]  # images per class: {"train": [...], "val": [...], "test": [...]}
    fitting: Fitting
    skipped: list[Skipped]
    duplicates: int | list[Duplicate]  # exact duplicates across the split: how many, or which
    duplicates_note: str  # what was done about them
    examples: list[Item]  # a few pictures as the network sees them


class Epoch(TypedDict, total=False):
    """One epoch, as metrics.jsonl has it."""

    epoch: Required[float]
    train_loss: float
    val_loss: float
    train_accuracy: float
    val_accuracy: float
    lr: float
    stage: str


class PartReading(TypedDict, total=False):
    """A number that a part reported; repeated names become a small curve."""

    part: str
    name: str
    value: float
    unit: str
    epoch: float


class Test(TypedDict, total=False):
    """What the run answered on pictures it never saw. Rows of ``confusion`` are given labels."""

    n: int
    accuracy: float
    accuracy_interval: list[float] | tuple[float, float]  # 95 %; Wilson's is used where it is missing
    interval_method: str  # "Wilson", "bootstrap"
    log_loss: float
    ece: float
    confusion: list[list[int]] | np.ndarray  # [given, answered], counts


class Bin(TypedDict, total=False):
    """One bar of the reliability diagram."""

    low: float
    high: float
    n: int
    confidence: float  # mean probability of the answer in this bin
    accuracy: float  # share of right answers in this bin


class Calibration(TypedDict, total=False):
    """Whether probabilities can be believed; :func:`convince.report.reckon.reliability_bins` makes it."""

    bins: list[Bin]
    ece: float
    log_loss: float
    method: str  # what was done about it, such as "temperature 1.31"


class Picture(TypedDict, total=False):
    """One test picture with its answer."""

    image: Image
    overlay: Image  # the picture under its explanation, from convince.report.overlay.overlay
    file: str
    given: str  # the label it came with
    answer: str  # the label the network chose
    probability: float  # of the answer
    given_probability: float  # of the given label


class Seconds(TypedDict, total=False):
    """Wall time, in seconds."""

    total: float
    train: float
    evaluate: float


class Cost(TypedDict, total=False):
    """What the run used."""

    seconds: Seconds
    samples_per_second: float  # in training
    images: int  # images through the network
    peak_bytes: int
    peak_share: float  # of the processor's measured peak, 0 to 1
    peak_flops: float  # that measured peak, operations a second
    parameters: int
    macs: int  # multiply-adds of one image
    precision: str  # "bf16", "fp32"
    layout: str  # "channels_last", "contiguous"


class Gallery(TypedDict, total=False):
    """Pictures that a part chose, such as the most forgotten ones."""

    part: str
    title: str
    caption: str
    items: list[Item]


class Table(TypedDict, total=False):
    """Rows that a part reports; the columns are the names of the first row, then any further ones."""

    part: str
    title: str
    caption: str
    rows: list[dict[str, Cell]]


class ProbeFound(TypedDict):
    """What a probe measured: its readings and figures, as :func:`convince.report.drawings.to_json` has them."""

    part: str
    title: str
    readings: list[dict[str, Any]]
    figures: list[dict[str, Any]]


class Facts(TypedDict, total=False):
    """All of it. ``absent`` maps a section's name to the sentence that says why it has no facts."""

    run: Required[str]
    model: str
    parts: list[str]  # as typed: "cutmix", "poly1:epsilon=1"
    date: str  # ISO 8601
    seed: int
    data: Data
    history: list[Epoch]
    readings: list[PartReading]
    test: Test
    calibration: Calibration
    mistakes: list[Picture]  # most confident first
    hits: list[Picture]  # most typical first
    explanation: str  # the method behind the overlays: "Grad-CAM"
    cost: Cost
    galleries: list[Gallery]
    tables: list[Table]
    probes: list[ProbeFound]
    environment: dict[str, Cell]
    command: str
    config: dict[str, Any] | str  # settings, or their YAML text
    weights_sha256: str
    absent: dict[str, str]


SECTIONS = {
    "data": "This run kept no account of its data.",
    "training": "This run kept no learning curves.",
    "test": "This run was not tested: there was no test part, or it was stopped before.",
    "calibration": "No probabilities were kept, so nothing can be said about calibration.",
    "pictures": "No pictures were kept.",
    "cost": "The cost of this run was not measured.",
    "samples": "No part reported readings on single samples.",
    "probes": "No probe has measured this run; convince probe RUN --with PART does, and writes here.",
    "repeat": "Neither the environment nor the command was kept.",
}
# control characters, halves of pairs, and marks that turn the direction of text: "a\\u202egpj.exe" would read as .jpg
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


def tidy(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy in plain types: no numpy scalars, no None fields, no character a page cannot hold."""
    if not isinstance(facts.get("run"), str) or not facts["run"]:
        raise Mistake(f"a report needs the run's name: facts['run'] must be text, got {facts.get('run')!r}")
    known = list(Facts.__annotations__)
    for name in facts:
        if name not in known:
            raise Mistake(f"a report knows no fact {name!r}{nearest(str(name), known)}; see convince.report.facts")
    for name in facts.get("absent") or {}:
        if name not in SECTIONS:
            raise Mistake(f"a report has no section {name!r}{nearest(str(name), list(SECTIONS))}")
    return _plain(facts)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_plain(str(k)): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def finite(value: Any) -> bool:
    """True for a number that is neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)
