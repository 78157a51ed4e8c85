"""Conformance: what every part of a kind must do, as small checks that run on any part, also your own.

A check is a function of a :class:`~convince.checks.subject.Subject`. It passes by returning, fails by
AssertionError with a sentence, and skips visibly by raising :class:`Nothing` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convince.parts import Part

if TYPE_CHECKING:
    from convince.checks.subject import Subject


class Nothing(Exception):
    """There is nothing to compare for this part; the reason is shown."""


@dataclass(frozen=True)
class Outcome:
    """What a check found: "passed", "failed" or "skipped", and the reason."""

    check: str
    outcome: str
    reason: str = ""


def checks_of(kind: str) -> dict[str, Callable[[Subject], None]]:
    """The checks of a kind by name: the common ones, then its own."""
    from convince.checks import (
        attack,
        augmentation,
        backbone,
        common,
        compressor,
        explainer,
        layer,
        loss,
        predictor,
        probe,
        recipe,
        search,
        study,
        training,
    )

    own: dict[str, list] = {
        "backbone": [backbone],
        "loss": [training, loss],
        "augmentation": [training, augmentation],
        "optimizer": [training],
        "layer": [training, layer],
        "technique": [training],
        "predictor": [predictor],
        "explainer": [explainer],
        "attack": [attack],
        "compressor": [compressor],
        "probe": [probe],
        "recipe": [recipe],
        "study": [study],
        "search": [search],
    }
    found = {}
    for module in [common, *own.get(kind, [])]:
        for name, check in vars(module).items():
            if name.startswith("check_"):
                found[name.removeprefix("check_").replace("_", " ")] = check
    return found


def run_check(subject: Subject, name: str) -> Outcome:
    """Run one check on a part."""
    try:
        checks_of(subject.part.card.kind)[name](subject)
    except Nothing as nothing:
        return Outcome(name, "skipped", str(nothing))
    except AssertionError as failure:
        return Outcome(name, "failed", str(failure) or "a check failed without saying why")
    except Exception as error:
        return Outcome(name, "failed", f"{type(error).__name__}: {error}")
    return Outcome(name, "passed")


def run_checks(part: Part) -> list[Outcome]:
    """Run every check of the part's kind; they share the fits they need."""
    from convince.checks.subject import Subject

    subject = Subject(part)
    return [run_check(subject, name) for name in checks_of(part.card.kind)]
