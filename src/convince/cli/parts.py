"""convince parts: every part, with its room, kind, year and verdict; broken files too."""

from __future__ import annotations

import json

import click

from convince.cli import emit, json_option, parts_option


@click.command()
@click.argument("words", nargs=-1)
@click.option("--kind", metavar="K", help="Only this kind.")
@click.option("--room", metavar="R", help="Only this room.")
@parts_option
@json_option
def command(words: tuple[str, ...], kind: str | None, room: str | None, as_json: bool) -> None:
    """List the parts, those that match all WORDS in name, title or paper."""
    from convince.errors import Mistake, nearest
    from convince.parts import KINDS, Broken, Part, find

    if kind is not None and kind not in KINDS:
        raise Mistake(f"--kind {kind}: no such kind{nearest(kind, KINDS)} Kinds: {', '.join(KINDS)}")
    rows = [row for row in find() if isinstance(row, Part)]
    rooms = sorted({row.room for row in rows})
    if room is not None and room not in rooms:
        raise Mistake(f"--room {room}: no such room{nearest(room, rooms)} Rooms: {', '.join(rooms)}")
    chosen = [
        row
        for row in rows
        if (kind is None or row.card.kind == kind)
        and (room is None or row.room == room)
        and all(word.lower() in f"{row.name} {row.card.title} {row.card.paper} {' '.join(row.card.variants)}".lower() for word in words)
    ]
    table = [
        {
            "part": row.name,
            "kind": row.card.kind,
            "room": row.room,
            "paper": row.card.paper,
            "title": row.card.title,
            "year": row.card.year,
            "file": str(row.path),
            "verdict": verdict(row.card.paper),
        }
        for row in sorted(chosen, key=lambda row: (row.room, row.name))
    ]
    broken = [row for row in find() if isinstance(row, Broken)]
    for row in broken:
        click.echo(f"broken: {row}", err=True)
    lines = [f"{r['room']:<14} {r['part']:<22} {r['kind']:<12} {r['year'] or '':<5} {r['verdict'] or '':<13} {r['title']}" for r in table]
    emit([*table, *({"part": None, "file": str(b.path), "line": b.line, "broken": b.reason} for b in broken)], as_json, "\n".join(lines) or "no part matches")


def verdict(paper: str | None) -> str | None:
    """The verdict of the paper's stored evidence, or None."""
    from convince.parts import PACKAGE

    path = PACKAGE / "evidence" / f"{paper}.json"
    return json.loads(path.read_text(encoding="utf-8"))["verdict"] if paper and path.exists() else None
