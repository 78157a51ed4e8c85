"""convince show: all that is known of a part: its card, options, departures, claim and evidence."""

from __future__ import annotations

import inspect
import json
from typing import Any

import click

from convince.cli import emit, json_option, parts_option


@click.command()
@click.argument("part")
@parts_option
@json_option
def command(part: str, as_json: bool) -> None:
    """Tell all about PART (or a network's variant)."""
    from dataclasses import asdict

    from convince import parts
    from convince.backbones import named

    try:
        found = parts.get(part)
    except parts.Mistake as mistake:
        try:
            found = named(part)[0]
        except parts.Mistake:
            raise mistake from None
    card = found.card
    options = {n: None if p.default is inspect.Parameter.empty else p.default for n, p in found.options().items()}
    doc = inspect.getdoc(found.load()) or ""
    proof = evidence(card.paper)
    facts: dict[str, Any] = {**asdict(card), "room": found.room, "file": str(found.path), "options": options, "doc": doc, "evidence": proof}
    emit(facts, as_json, text(facts, found.module().__doc__ or ""))


def evidence(paper: str | None) -> dict[str, Any] | None:
    """The stored evidence of a paper, or None."""
    from convince.parts import PACKAGE

    path = PACKAGE / "evidence" / f"{paper}.json"
    return json.loads(path.read_text(encoding="utf-8")) if paper and path.exists() else None


def text(facts: dict[str, Any], first: str) -> str:
    """The facts for a person."""
    lines = [f"{facts['part']} ({facts['kind']}, room {facts['room']})", first.strip().splitlines()[0] if first.strip() else "", ""]
    lines += [f"{facts['title']}, {facts['year'] or 'no year'}{', ' + facts['url'] if facts['url'] else ''}", ""]
    lines += [facts["doc"], "", "options:"]
    lines += [f"  {name} = {value!r}" for name, value in facts["options"].items()] or ["  none"]
    if facts["variants"]:
        lines += ["variants: " + ", ".join(facts["variants"])]
    if facts["strength"]:
        lines += [f"off: {facts['strength']}={facts['off']!r}"]
    for word in ("claims", "mutes", "expects", "needs"):
        if facts[word]:
            lines += [f"{word}: " + ", ".join(facts[word])]
    lines += ["", "departs from the paper:"] + ([f"  - {d}" for d in facts["departs"]] or ["  in nothing we know of"])
    proof = facts["evidence"]
    if proof is None:
        lines += ["", "evidence: none stored" if facts["paper"] else "evidence: no paper, no claim"]
    else:
        lines += ["", f"evidence: {proof['verdict']} ({proof['date']}, {proof['seconds']} s on {proof['hardware']['processor']})", f"  {proof['says']}"]
        for c in proof["comparisons"]:
            if "mean" in c:
                lines += [f"  {c['what']}: {c['mean']:+.4g} (95 % interval {c['low']:+.4g} to {c['high']:+.4g}, n = {c['n']})"]
            else:
                lines += ["  " + ", ".join(f"{k} {v}" for k, v in c.items())]
    return "\n".join(lines)
