"""Every pair of techniques trains three steps together with bits that differ from each alone, or is refused in a sentence."""

import functools
import hashlib
import itertools
import os
import subprocess
from pathlib import Path

import pytest

from convince.checks.subject import Subject, bits, equal
from convince.errors import Mistake
from convince.fit.adapters import seat
from convince.fit.loop import fit
from convince.parts import Part, find

SWITCHABLE = ("technique", "loss", "optimizer", "augmentation", "layer")
PARTS = {row.name: row for row in find() if isinstance(row, Part) and row.card.kind in SWITCHABLE}


def changed() -> set[str]:
    """Parts whose file differs from the last commit."""
    root = Path(__file__).resolve().parents[2]
    try:
        out = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {name for name, part in PARTS.items() if str(part.path.relative_to(root)) in out}


def pairs():
    """A tenth of all pairs by a fixed hash, and every pair of a changed part; all with CONVINCE_ALL_PAIRS."""
    new, everything = changed(), bool(os.environ.get("CONVINCE_ALL_PAIRS"))
    for a, b in itertools.combinations(sorted(PARTS), 2):
        tenth = hashlib.sha256(f"{a}+{b}".encode()).digest()[0] < 26
        if everything or tenth or a in new or b in new:
            yield a, b


def spec(name: str) -> str:
    return Subject(PARTS[name]).spec


@functools.cache
def alone(name: str):
    run = Subject(PARTS[name]).run(spec(name), steps=3)
    fit(run)
    return run, bits(run.answer)


@pytest.mark.parametrize(("a", "b"), list(pairs()))
def test_pair(a, b):
    subject = Subject(PARTS[a])
    try:
        run = subject.run(spec(a), spec(b), steps=3)
        fit(run)
    except Mistake as refusal:
        assert a in str(refusal) or b in str(refusal), f"the refusal names neither part: {refusal}"
        assert len(str(refusal).split()) >= 6, f"not a sentence: {refusal}"
        return
    together = bits(run.answer)
    for one, other in ((a, b), (b, a)):
        measures = hasattr(seat(spec(other)).technique, "readings") and not PARTS[other].card.claims
        if not measures and "unused" not in PARTS[other].card.mutes:
            assert equal(together, alone(one)[1]), f"beside {one!r}, {other!r} changes nothing and is not refused"


@pytest.mark.parametrize(("a", "b"), [("flip-crop", "gradient-clipping")])
def test_order_of_naming_does_not_matter(a, b):
    if a not in PARTS or b not in PARTS:
        pytest.skip("one of the parts is not here")
    subject = Subject(PARTS[a])
    runs = [subject.run(*order, steps=3) for order in ((spec(a), spec(b)), (spec(b), spec(a)))]
    for run in runs:
        fit(run)
    assert not equal(bits(runs[0].model), bits(runs[1].model))
