"""Changes: what is tried against the baseline, and whether it needs a training of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from convince import parts
from convince.errors import Mistake

TRAINED = ("technique", "loss", "optimizer", "augmentation", "layer")
AFTER = ("predictor", "compressor")


@dataclass(frozen=True)
class Change:
    """One change: ``text`` as typed, and what it does.

    ``train``: parts switched on and perhaps another network, in a training of its own; ``after``: predictors or
    compressors on the baseline's answer; ``explain``: an explainer of that answer.
    """

    text: str
    kind: Literal["train", "after", "explain"]
    specs: tuple[str, ...]
    model: str | None = None


def split(text: str) -> list[str]:
    """The parts of ``"cutmix+poly1:epsilon=1e+2"``: cut at a plus that begins a name outside brackets and quotes."""
    depth, start, out = 0, 0, []
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "+" and depth == 0 and re.match(r"[A-Za-z]", text[at + 1 : at + 2]):
            out.append(text[start:at])
            start = at + 1
    return [*out, text[start:]]


def change(text: str) -> Change:
    """Read one ``--with``: parts that exist, with options they have, of kinds that go together; else a Mistake."""
    specs = [spec.strip() for spec in split(text)]
    kinds = [kind_of(spec) for spec in specs]
    models = [spec for spec, kind in zip(specs, kinds, strict=True) if kind == "backbone"]
    if len(models) > 1:
        raise Mistake(f"--with {text}: names two networks; a change has at most one")
    rest = [(spec, kind) for spec, kind in zip(specs, kinds, strict=True) if kind != "backbone"]
    if kinds == ["explainer"]:
        return Change(text, "explain", tuple(specs))
    if all(kind in AFTER for kind in kinds):
        return Change(text, "after", tuple(specs))
    for spec, kind in rest:
        if kind not in (*TRAINED, "predictor"):
            raise Mistake(f"--with {text}: {spec!r} is of kind {kind} and works on a trained model; compare it by itself: --with {spec}")
    return Change(text, "train", tuple(spec for spec, _ in rest), models[0] if models else None)


def kind_of(spec: str) -> str:
    """The kind of a part that a comparison can try."""
    if spec.startswith("timm/"):
        return "backbone"
    name, _ = parts.parse(spec)  # its options are checked where the part is imported: in the survey, before any run
    part = next((row for row in parts.find() if isinstance(row, parts.Part) and name in row.card.variants), None) or parts.get(name)
    if part.card.kind not in (*TRAINED, *AFTER, "explainer", "backbone"):
        raise Mistake(f"{name!r} is of kind {part.card.kind}, which is nothing to compare; 'convince show {part.name}' says how to use it")
    return part.card.kind


def with_parts(base: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    """The baseline's parts and the change's; one named again replaces the baseline's."""
    again = {parts.plain(parts.parse(spec)[0]) for spec in more}
    return (*(spec for spec in base if parts.plain(parts.parse(spec)[0]) not in again), *more)


def room(name: str) -> list[str]:
    """Names of the parts of a room that a comparison can try; a Mistake that lists the rooms."""
    found = [row for row in parts.find() if isinstance(row, parts.Part)]
    rooms = sorted({row.room for row in found if row.card.kind in (*TRAINED, *AFTER, "explainer", "backbone")})
    if name not in rooms:
        raise Mistake(f"--all {name}: no such room{parts.nearest(name, rooms)} Rooms: {', '.join(rooms)}")
    return sorted(row.name for row in found if row.room == name and row.card.kind in (*TRAINED, *AFTER, "explainer", "backbone"))
