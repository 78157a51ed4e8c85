"""Lab: where a search spends its budget. Every image through a network is counted, and every result is kept as it comes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from torch import nn

from convince import parts
from convince.data import Data
from convince.errors import Mistake
from convince.fit.answer import score
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.state import write_atomic
from convince.fit.train import prepare, resolve
from convince.types import Split

LOOKED_AT = 1 / 3  # what an image costs that is only looked at, in images that are trained on: a forward pass of three
Say = Callable[[str], None]


class Spent(Exception):
    """The budget is used up: what was asked for would go beyond it."""


@final
class Lab:
    """The data without their test part, a budget in images, and what has been learnt so far.

    ``network`` is the backbone part whose options are looked for. ``spent`` counts images: those trained on whole, those only
    looked at by a third (:data:`LOOKED_AT`). With ``folder`` everything is kept there, and a search that is started again comes to
    the same place without doing it twice, as long as it is a function of its settings and of the lab's answers.
    """

    def __init__(self, network: str, data: Data, budget: float, seed: int = 0, folder: Path | None = None, say: Say | None = None, **usual: Any) -> None:
        if not len(data.split.val):
            raise Mistake(f"{data.origin}: a search judges on the validation part, and there is none; give --val a share above 0")
        none = data.split.test[:0]
        self.data = dataclasses.replace(data, split=Split(data.split.train, data.split.val, none))
        self.network, self.budget, self.seed, self.folder, self.usual = network, float(budget), seed, folder, usual
        self.say: Say = say or (lambda line: None)
        self.spent, self.seconds, self.worked = 0.0, 0.0, 0  # worked: results that were not kept from before
        self.trials: list[tuple[dict[str, Any], float]] = []
        self._kept: dict[str, Any] = {}
        self._timing = False  # within keep, which counts the seconds of all that it calls
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "cells.json").exists():
                self._kept = json.loads((folder / "cells.json").read_text(encoding="utf-8"))

    # -- the budget --------------------------------------------------------------------------------

    @property
    def left(self) -> float:
        """Images that may still go through a network."""
        return self.budget - self.spent

    def afford(self, images: float) -> bool:
        """Whether so many images are left; a little is forgiven, so that a budget of whole trials is not lost to rounding."""
        return images <= self.left + 1e-6 * self.budget

    def charge(self, images: float) -> None:
        """Count images, before they are used; raises :class:`Spent` where they are not left."""
        if not self.afford(images):
            raise Spent(f"{images:,.0f} images are asked for, and {self.left:,.0f} of {self.budget:,.0f} are left")
        self.spent += images

    def of_training(self, epochs: int) -> float:
        """Images of one training for so many epochs, judged once on the validation part."""
        return epochs * len(self.data.split.train) + LOOKED_AT * len(self.data.split.val)

    # -- the work ----------------------------------------------------------------------------------

    def keep(self, key: Any, images: float, work: Callable[[], Any]) -> Any:
        """``work()``, a JSON value, charged with ``images``; from the store where it was done before (the charge stays)."""
        self.charge(images)
        name = hashlib.sha256(json.dumps([key, self.seed, self.network], sort_keys=True, default=list).encode()).hexdigest()[:20]
        if name not in self._kept:
            began, self._timing = time.monotonic(), True
            try:
                value = json.loads(json.dumps(work()))
            finally:
                self._timing = False
            self.worked += 1
            self._store(name, {"value": value, "seconds": time.monotonic() - began})
        self.seconds += self._kept[name]["seconds"]
        return self._kept[name]["value"]

    def _store(self, name: str, row: dict[str, Any]) -> None:
        self._kept[name] = row
        if self.folder is not None:
            write_atomic(self.folder / "cells.json", json.dumps(self._kept))

    def train(self, options: dict[str, Any], epochs: int, **other: Any) -> float:
        """Train the network with these options for ``epochs`` from scratch; its accuracy on the validation part, 0 to 1."""
        spec = parts.spell(self.network, options)

        def work() -> float:
            return self.run(spec, epochs=epochs, **other).evaluate("val").accuracy

        accuracy = float(self.keep(["train", spec, epochs, other], self.of_training(epochs), work))
        self.trials.append((options, accuracy))
        self.say(f"{spec}: {accuracy:.4f} on validation, {self.spent:,.0f} of {self.budget:,.0f} images")
        return accuracy

    def run(self, model: str, *, name: str | None = None, **other: Any) -> Run:
        """A finished run on the training part, not charged: a search that trains a super-network charges it itself.

        With ``name`` and a folder it is kept as a checkpoint, goes on where it was interrupted, and is not trained twice.
        """
        began = time.monotonic()
        how = {"epochs": 1, "augment": "none", "val": 0.0, "test": 0.0, **self.usual, **other}
        chosen, _ = resolve(settings(model=model, seed=self.seed, **how), self.data)
        made = prepare(chosen, dataclasses.replace(self.data, split=dataclasses.replace(self.data.split, val=self.data.split.val[:0])))
        fit(made, None if name is None or self.folder is None else self.folder / f"{name}.safetensors")
        made.data = self.data
        if not self._timing:
            seconds = time.monotonic() - began + self._kept.get(f"run {name}", {"seconds": 0.0})["seconds"]
            self.seconds += seconds
            if name is not None:
                self._store(f"run {name}", {"seconds": seconds})
        return made

    def accuracy(self, run: Run, answer: nn.Module | None = None, rows: int | None = None) -> float:
        """The accuracy of an answer (None: the run's own) on ``rows`` of the validation part (None: all), not charged."""
        index = self.data.split.val if rows is None else self.data.split.val[:rows]
        return score(run.answer if answer is None else answer, self.data, index, run.plan).accuracy

    def best(self) -> dict[str, Any]:
        """The options of the best trial so far; of equals the first."""
        if not self.trials:
            raise Mistake(f"the budget of {self.budget:,.0f} images allows no single trial; give more")
        return max(self.trials, key=lambda trial: trial[1])[0]
