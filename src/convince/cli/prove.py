"""convince prove: run a paper's claim, store the evidence, print the verdict."""

from __future__ import annotations

import click

from convince.cli import emit, json_option


@click.command()
@click.argument("paper", required=False)
@click.option("--room", metavar="R", help="Every paper of this room that has a claim; stored evidence is not repeated.")
@click.option("--scale", type=click.Choice(["small", "smoke", "paper"]), default="small", help="smoke: seconds, and no evidence is stored.")
@click.option("--fresh", is_flag=True, help="Forget cells of an interrupted proof.")
@json_option
def command(paper: str | None, room: str | None, scale: str, fresh: bool, as_json: bool) -> None:
    """Run the claim of PAPER. An interrupted proof goes on where it stopped."""
    from convince.claims import EVIDENCE, known, prove
    from convince.errors import Mistake
    from convince.parts import Part, find

    if (paper is None) == (room is None):
        raise Mistake(f"name one paper or --room; papers with a claim: {', '.join(known())}")
    if paper is not None:
        papers = [paper]
    else:
        of_room = {row.card.paper for row in find() if isinstance(row, Part) and row.room == room}
        papers = [p for p in known() if p in of_room and not (EVIDENCE / f"{p}.json").exists()]
        if not of_room:
            raise Mistake(f"--room {room}: no such room, or no part in it")
    results = [prove(p, scale=scale, fresh=fresh, say=lambda line: click.echo(line, err=True)) for p in papers]
    lines = []
    for r in results:
        lines.append(f"{r['paper']}: {r['verdict']} in {r['seconds']} s. {r['says']}")
        for c in r["comparisons"]:
            if "mean" in c:
                lines.append(f"  {c['what']}: {c['mean']:+.4g} (95 % interval {c['low']:+.4g} to {c['high']:+.4g}, n = {c['n']})")
            else:
                lines.append("  " + ", ".join(f"{k} {v}" for k, v in c.items()))
    emit(results[0] if paper is not None else results, as_json, "\n".join(lines) or "nothing left to prove")
