"""convince check: the conformance checks on a part, also on a file of your own."""

from __future__ import annotations

from pathlib import Path

import click

from convince.cli import emit, json_option, parts_option


@click.command()
@click.argument("part")
@parts_option
@json_option
def command(part: str, as_json: bool) -> None:
    """Check PART, a name or a Python file. Exit code 2 where a check fails."""
    from convince import parts
    from convince.checks import run_checks
    from convince.errors import Mistake

    if part.endswith(".py") or Path(part).exists():
        parts.add_path(part)
        found = parts.read(Path(part).resolve())
        if isinstance(found, parts.Broken):
            raise Mistake(str(found))
        if found is None:
            raise Mistake(f"{part}: no CARD = Card(...) stands in this file")
    else:
        found = parts.get(part)
    outcomes = run_checks(found)
    marks = {"passed": "ok  ", "failed": "FAIL", "skipped": "skip"}
    lines = [f"{marks[o.outcome]} {o.check}" + (f": {o.reason}" if o.reason else "") for o in outcomes]
    failed = sum(o.outcome == "failed" for o in outcomes)
    lines.append(f"{found.name}: {len(outcomes) - failed} of {len(outcomes)} checks passed or had nothing to compare")
    emit({"part": found.name, "failed": failed, "checks": [vars(o) for o in outcomes]}, as_json, "\n".join(lines))
    if failed:
        raise click.exceptions.Exit(2)
