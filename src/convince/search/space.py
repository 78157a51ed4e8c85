"""Space: the choices that a search has, by name, and the random draws that every search is held against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convince.errors import Mistake

Genes = dict[str, Any]
TRIES = 2000  # draws that do not fit, one after the other, before a space is called empty


@dataclass(frozen=True)
class Space:
    """``choices``: what may be chosen, by name; ``options``: the choices as options of the network; ``fits``: whether they keep the limits."""

    choices: Mapping[str, Sequence[Any]]
    options: Callable[[Genes], dict[str, Any]]
    fits: Callable[[Genes], bool] = lambda genes: True

    def __post_init__(self) -> None:
        for name, values in self.choices.items():
            if not len(values):
                raise Mistake(f"the choice {name!r} has no values")

    @property
    def size(self) -> int:
        """How many settings there are, those that do not fit among them."""
        return math.prod(len(values) for values in self.choices.values())

    def all(self) -> Iterator[Genes]:
        """Every setting that fits, in the order of the choices."""
        for values in itertools.product(*self.choices.values()):
            genes = dict(zip(self.choices, values, strict=True))
            if self.fits(genes):
                yield genes

    def draws(self, seed: int) -> Iterator[Genes]:
        """Settings that fit, drawn evenly and without end by Optuna's random sampler; a Mistake where none fits."""
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise Mistake("a search needs the package optuna; pip install 'convince[search]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        places: dict[str, Any] = {name: optuna.distributions.CategoricalDistribution(range(len(values))) for name, values in self.choices.items()}
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        missed = 0
        while True:
            at = study.ask(places).params
            genes = {name: values[at[name]] for name, values in self.choices.items()}
            missed = 0 if self.fits(genes) else missed + 1
            if missed > TRIES:
                raise Mistake(f"none of {TRIES} random settings keeps the limits; loosen them")
            if not missed:
                yield genes

    def change(self, genes: Genes, name: str, to: Any) -> Genes:
        """A copy with one choice changed."""
        if to not in self.choices[name]:
            raise Mistake(f"{name}={to!r} is not among {list(self.choices[name])}")
        return {**genes, name: to}
