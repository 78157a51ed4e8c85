"""One test: every part that can be found, times the checks of its kind. Checks of one part share its fits."""

import functools
import os

import pytest

from convince.checks import backbone, checks_of, run_check
from convince.checks.subject import Subject
from convince.parts import Broken, Part, find

if os.environ.get("CONVINCE_ALL_PAIRS"):  # CI builds larger networks in memory
    backbone.IN_MEMORY = 100_000_000

PARTS = {row.name: row for row in find() if isinstance(row, Part)}

# part/check -> reason. Strict: one that starts to pass fails the run.
KNOWN_FAILURES: dict[str, str] = {}


@functools.lru_cache(maxsize=2)
def subject(name: str) -> Subject:
    return Subject(PARTS[name])


def cases():
    for name, part in PARTS.items():
        for check in checks_of(part.card.kind):
            reason = KNOWN_FAILURES.get(f"{name}/{check}")
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            yield pytest.param(name, check, id=f"{name}/{check.replace(' ', '-')}", marks=[*marks, pytest.mark.xdist_group(name)])


@pytest.mark.parametrize(("name", "check"), list(cases()))
def test_part(name, check):
    outcome = run_check(subject(name), check)
    if outcome.outcome == "skipped":
        pytest.skip(f"{name}: {outcome.reason}")
    assert outcome.outcome == "passed", f"{name}, {check}: {outcome.reason}"


def test_no_part_is_broken():
    assert [str(row) for row in find() if isinstance(row, Broken)] == []


def test_known_failures_exist():
    known = {f"{name}/{check}" for name, part in PARTS.items() for check in checks_of(part.card.kind)}
    assert set(KNOWN_FAILURES) <= known
