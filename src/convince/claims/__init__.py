"""Claims: one file a paper, a small experiment that must be able to fail; and the bench they run on.

A claim file ``claims/PAPER.py`` (hyphens written ``_``) defines

- ``SAYS``, ``SUPPORTED``, ``CONTRADICTED``: the claim and its two rules, in words, before any run;
- ``BUDGET``: data, images, epochs, seeds, arms, in words;
- ``measure(bench)``: calls ``bench.arm(name, seed, function)`` for every cell of the experiment;
- ``judge(numbers) -> (verdict, comparisons)``: from the stored numbers alone, one of
  "supported", "contradicted", "inconclusive", and what it was read from.

Cells are stored as they finish, so an interrupted proof repeats none.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convince.errors import Mistake, nearest
from convince.parts import PACKAGE

HERE = PACKAGE / "claims"
EVIDENCE = PACKAGE / "evidence"
VERDICTS = ("supported", "contradicted", "inconclusive")
Numbers = dict[str, dict[str, dict[str, float]]]  # arm -> seed -> metric -> value


@dataclass(frozen=True)
class Paired:
    """A paired difference with its 95 % t interval: mean of ``change - baseline`` over ``n`` seeds."""

    what: str
    mean: float
    low: float
    high: float
    n: int


def paired(what: str, change: list[float], baseline: list[float]) -> Paired:
    """The paired difference of two arms by seed. Equal differences give an interval of no width; one pair, an endless one."""
    from scipy.stats import t

    d = [a - b for a, b in zip(change, baseline, strict=True)]
    n, mean = len(d), statistics.fmean(d)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(d) / math.sqrt(n) if n > 1 else math.inf
    return Paired(what, mean, mean - half, mean + half, n)


def column(numbers: Numbers, arm: str, metric: str) -> list[float]:
    """One metric of one arm, by seed in order."""
    return [numbers[arm][seed][metric] for seed in sorted(numbers[arm], key=int)]


def said(supported: bool, contradicted: bool) -> str:
    """The verdict of one part of a claim by its two rules."""
    return "supported" if supported else "contradicted" if contradicted else "inconclusive"


def together(verdicts: Iterable[str]) -> str:
    """The verdict of a claim of several parts: contradicted where one is, supported where all are."""
    found = set(verdicts)
    return said(found == {"supported"}, "contradicted" in found)


def pooled(data: Any, by: int = 2) -> Any:
    """The same images with sides ``by`` times smaller, by means of ``by`` x ``by`` pixels."""
    import dataclasses

    import torch
    import torch.nn.functional as F

    from convince.data import MemoryStore

    whole = data.x.take(torch.arange(len(data.y))).float()
    small = F.avg_pool2d(whole, by).round().to(torch.uint8)
    preprocess = dataclasses.replace(data.preprocess, size=tuple(small.shape[-2:]))
    return dataclasses.replace(data, x=MemoryStore(small), preprocess=preprocess)


def padded(data: Any, side: int) -> Any:
    """The same images in the middle of black ones of ``side`` pixels."""
    import dataclasses

    import torch
    import torch.nn.functional as F

    from convince.data import MemoryStore

    whole = data.x.take(torch.arange(len(data.y)))
    down, right = (side - have for have in whole.shape[-2:])
    small = F.pad(whole, (right // 2, right - right // 2, down // 2, down - down // 2))
    return dataclasses.replace(data, x=MemoryStore(small), preprocess=dataclasses.replace(data.preprocess, size=(side, side)))


class Bench:
    """Runs the cells of a claim, stores each as it finishes, and gives claims data and training in one line."""

    def __init__(self, store: Path | None, scale: str = "small", say: Callable[[str], None] = print) -> None:
        self.store, self.scale, self.say = store, scale, say
        self.numbers: Numbers = {}
        self.seconds = 0.0
        if store is not None and store.exists():
            kept = json.loads(store.read_text(encoding="utf-8"))
            self.numbers, self.seconds = kept["numbers"], kept["seconds"]

    def arm(self, name: str, seed: int, cell: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The numbers of one arm at one seed: from the store, or by calling ``cell`` now."""
        row = self.numbers.setdefault(name, {})
        if str(seed) not in row:
            began = time.monotonic()
            row[str(seed)] = {key: float(value) for key, value in cell().items()}
            spent = time.monotonic() - began
            self.seconds += spent
            self.say(f"{name} seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in row[str(seed)].items()) + f" ({spent:.1f} s)")
            if self.store is not None:
                from convince.fit.state import write_atomic

                self.store.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.store, json.dumps({"numbers": self.numbers, "seconds": self.seconds}))
        return row[str(seed)]

    def data(self, name: str, *, train: int, test: int | None = None, val: int = 0, seed: int = 0) -> Any:
        """A stratified draw from a built-in set: ``train``, ``val`` rows of its training part, ``test`` of its test part."""
        return draw(name, train, val, test, seed)

    def train(self, data: Any, **settings: Any) -> Any:
        """Train on the data with these settings; returns :class:`convince.fit.train.Trained`."""
        from convince.fit.settings import settings as make
        from convince.fit.train import train

        return train(make(**{"augment": "none", **settings}), data)


_sets: dict[str, Any] = {}


def draw(name: str, train: int, val: int, test: int | None, seed: int) -> Any:
    """Rows drawn by (set, seed), classes in their natural shares; preprocessing from the drawn training rows."""
    import dataclasses

    import torch

    from convince.data import load
    from convince.data.split import in_shares
    from convince.fit.randomness import generator
    from convince.types import Split

    if name not in _sets:
        _sets[name] = load(name, val=0.0, seed=0)
    whole = _sets[name]

    def take(rows: torch.Tensor, count: int, who: str) -> torch.Tensor:
        rows = rows[torch.randperm(len(rows), generator=generator(seed, name, who))]
        if count >= len(rows):
            return rows
        return in_shares(rows, whole.y, count)

    pool = take(whole.split.train, train + val, "train")
    held = take(pool, val, "val") if val else pool[:0]
    kept = pool[~torch.isin(pool, held)]
    rows = take(whole.split.test, len(whole.split.test) if test is None else test, "test")
    return dataclasses.replace(whole.subset(kept), split=Split(kept, held, rows))


def known() -> list[str]:
    """Papers that have a claim."""
    return sorted(path.stem.replace("_", "-") for path in HERE.glob("*.py") if path.stem != "__init__")


def prove(paper: str, *, scale: str = "small", fresh: bool = False, say: Callable[[str], None] = print, write: bool = True) -> dict[str, Any]:
    """Run a paper's claim, store its evidence, and return it. Goes on where an interrupted proof stopped."""
    if paper not in known():
        raise Mistake(f"no claim is known for {paper!r}{nearest(paper, known())} Known: {', '.join(known())}")
    claim = importlib.import_module("convince.claims." + paper.replace("-", "_"))
    source = hashlib.sha256((HERE / f"{paper.replace('-', '_')}.py").read_bytes()).hexdigest()
    from convince.data.cache import cache_folder
    from convince.fit.folder import environment

    store = cache_folder() / "claims" / f"{paper}-{scale}-{source[:12]}.json"
    if fresh:
        store.unlink(missing_ok=True)
    bench = Bench(store, scale, say)
    claim.measure(bench)
    verdict, comparisons = claim.judge(bench.numbers)
    if verdict not in VERDICTS:
        raise ValueError(f"{paper}: judge returned {verdict!r}, not one of {VERDICTS}")
    facts = environment()
    evidence = {
        "paper": paper,
        "verdict": verdict,
        "says": claim.SAYS,
        "supported": claim.SUPPORTED,
        "contradicted": claim.CONTRADICTED,
        "budget": claim.BUDGET,
        "scale": scale,
        "comparisons": [asdict(c) if isinstance(c, Paired) else c for c in comparisons],
        "numbers": bench.numbers,
        "seconds": round(bench.seconds, 1),
        "hardware": {key: facts[key] for key in ("processor", "threads", "amx", "avx512_bf16")},
        "versions": facts["versions"],
        "source_sha256": source,
        "date": time.strftime("%Y-%m-%d"),
    }
    if write and scale != "smoke":
        from convince.fit.state import write_atomic

        EVIDENCE.mkdir(exist_ok=True)
        write_atomic(EVIDENCE / f"{paper}.json", json.dumps(evidence, indent=1))
    return evidence
