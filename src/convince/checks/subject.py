"""Subject: a part under test, with a tiny set, tiny settings, and fits that its checks share."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convince.backbones import builder
from convince.data import Data, MemoryStore, Preprocess
from convince.fit.adapters import seat
from convince.fit.answer import Answer, Normalise
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import Settings, settings
from convince.fit.train import prepare
from convince.fit.weights import build_by_name
from convince.parts import Part, find, spell
from convince.types import Split

MODEL = "resnet:layers=(1,1),widths=(4,8)"
TABLE_MODEL = "mlp:hidden=(8,)"


@functools.cache
def tiny_images(side: int = 8, channels: int = 1) -> Data:
    """48 grey images of 3 unequal classes: a bright bar at a class's height, and noise. 32 train, 8 val, 8 test."""
    gen = generator("tiny images")
    y = torch.tensor([0, 1, 0, 2, 0, 1, 1, 0] * 6)
    x = torch.randint(0, 90, (48, channels, side, side), generator=gen)
    for i, c in enumerate(y.tolist()):
        x[i, :, 1 + 2 * c : 3 + 2 * c, :] += 120
    rows = torch.randperm(48, generator=gen)
    return Data(
        MemoryStore(x.to(torch.uint8)),
        y,
        Split(rows[:32], rows[32:40], rows[40:]),
        ("a", "b", "c"),
        Preprocess("image", channels, (side, side), "letterbox", (0.3,) * channels, (0.2,) * channels),
        origin="tiny images",
    )


@functools.cache
def tiny_table() -> Data:
    """48 rows of 5 numbers in 3 unequal classes."""
    gen = generator("tiny table")
    y = torch.tensor([0, 1, 0, 2, 0, 1, 1, 0] * 6)
    x = torch.randn(48, 5, generator=gen) + y[:, None]
    rows = torch.randperm(48, generator=gen)
    preprocess = Preprocess("table", 5, (), "", (1.0,) * 5, (1.0,) * 5)
    return Data(MemoryStore(x), y, Split(rows[:32], rows[32:40], rows[40:]), ("a", "b", "c"), preprocess, origin="tiny table")


def with_extras(data: Data) -> Data:
    """The same with three annotators (right; often wrong; at random, a third missing) and a nuisance of two values."""
    at = torch.arange(len(data.y))
    annotators = torch.stack([data.y, torch.where(at % 4 == 0, (data.y + 1) % 3, data.y), torch.where(at % 3 == 0, -1, at % 3)], 1)
    return dataclasses.replace(data, extra={"annotators": annotators, "nuisance": at % 5 % 2})


class Subject:
    """A part, its tiny options, and lazily its fits and a trained answer to work on."""

    def __init__(self, part: Part) -> None:
        self.part, self.card = part, part.card
        self.options = dict(self.card.tiny)
        self._runs: dict[Any, Run] = {}

    @property
    def spec(self) -> str:
        """The part as ``--with`` has it, with its tiny options."""
        return spell(self.part.name, self.options)

    @functools.cached_property
    def data(self) -> Data:
        return with_extras(tiny_table() if self.table else tiny_images())

    @property
    def table(self) -> bool:
        """True for a part that is made for tables of numbers."""
        return "table" in (*self.card.expects, *self.card.accepts)

    def settings(self, **changes: Any) -> Settings:
        """Two epochs of four steps on one thread's worth of images, fp32."""
        return settings(
            **{
                "model": TABLE_MODEL if self.table else self.card.host or MODEL,
                "batch": 8,
                "epochs": 2,
                "lr": 0.05,
                "precision": "fp32",
                "augment": "none",
                "kernels": {},
                "checkpoint_seconds": 0,
                **changes,
            }
        )

    def make(self, **options: Any) -> Any:
        return self.part.load()(**{**self.options, **options})

    def run(self, *specs: str, drop_off: bool = True, **changes: Any) -> Run:
        """A run that has not started, with these parts."""
        return prepare(self.settings(parts=specs, **changes), self.data, drop_off=drop_off)

    def fitted(self, *specs: str, drop_off: bool = True, **changes: Any) -> Run:
        """A finished run with these parts; kept, so that checks share it."""
        key = (specs, drop_off, tuple(sorted(changes.items())))
        if key not in self._runs:
            run = self.run(*specs, drop_off=drop_off, **changes)
            fit(run)
            self._runs[key] = run
        return self._runs[key]

    @property
    def baseline(self) -> Run:
        return self.fitted()

    @property
    def trained(self) -> Run:
        return self.fitted(self.spec)

    @functools.cached_property
    def folder(self) -> Path:
        """A folder that is removed with the subject."""
        path = tempfile.mkdtemp(prefix="convince-check-")
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        return Path(path)

    def answer(self) -> nn.Module:
        """A trained plain answer on the tiny images, in eval mode; the same object for all checks."""
        return self._answer

    @functools.cached_property
    def _answer(self) -> nn.Module:
        return self.fitted(*self.beside, epochs=12).answer.eval()

    @property
    def beside(self) -> tuple[str, ...]:
        """Parts that a run must have been trained with for this one to work on its answer: those among what the card expects."""
        names = {row.name for row in find() if isinstance(row, Part)}
        return tuple(word for word in self.card.expects if word in names and self.card.kind in ("explainer", "probe"))

    def pixels(self, n: int = 6) -> tuple[Tensor, Tensor]:
        """[0, 1] pixels and class numbers."""
        rows = torch.arange(n)
        return self.data.float_batch(self.data.x.take(rows)), self.data.y[rows]

    def linear(self) -> nn.Module:
        """An untrained answer with random weights, for what needs none trained."""
        if self.beside:
            return self.fitted(*self.beside, epochs=0, seed=1).answer.eval()
        d = self.data
        build = builder(MODEL, num_classes=d.k, in_chans=d.preprocess.channels, size=d.preprocess.size)
        return Answer(Normalise(d.preprocess.mean, d.preprocess.std), build_by_name(build, 0)).eval()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """An empty string where two states have equal bits, else the first name that differs."""
    if a.keys() != b.keys():
        return f"names differ: {sorted(a.keys() ^ b.keys())[0]}"
    return next((name for name in a if not torch.equal(a[name], b[name])), "")


def same_seat(spec: str) -> Any:
    """The seat of a spec (for checks that look at hooks and claims)."""
    return seat(spec)
