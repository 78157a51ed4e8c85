"""convince probe: named numbers with units, read from a run."""

from __future__ import annotations

import click

from convince.cli import emit, json_option, parts_option, trust_option


@click.command()
@click.argument("run")
@click.argument("data", required=False)
@click.option("--with", "spec", required=True, metavar="PART", help="A probe, or a part that measured while the run trained.")
@click.option("--images", type=int, default=1000, metavar="N", help="At most this many images [1000].")
@trust_option
@parts_option
@json_option
def command(run: str, data: str | None, spec: str, images: int, trust: bool, as_json: bool) -> None:
    """Measure RUN with PART on DATA, or on its own test part."""
    from convince import parts
    from convince.cli.runs import data_of, make_of_kind
    from convince.errors import Mistake
    from convince.fit.folder import open_run

    loaded = open_run(run, trust=trust)
    name, _ = parts.parse(spec)
    part = parts.get(name)
    if part.card.kind == "technique":
        seat = next((s for s in loaded.run.team.seats if s.name == part.name), None)
        if seat is None or not hasattr(seat.technique, "readings"):
            raise Mistake(f"{name!r} measures while a network trains, and this run was trained without it; use 'convince train --with {name}'")
        readings = seat.technique.readings(loaded.run)
    else:
        name, probe = make_of_kind(spec, "probe")
        found, rows = data_of(loaded, data)
        rows = rows[found.y[rows] >= 0][:images]
        x = found.float_batch(found.x.take(rows)).to(loaded.plan.device)
        readings = probe.probe(loaded.answer, x, found.y[rows].to(loaded.plan.device))
    table = [{"name": r.name, "value": r.value, "unit": r.unit} for r in readings]
    emit({"run": run, "part": name, "readings": table}, as_json, "\n".join(f"{r.name:<40} {r.value:.5g} {r.unit}" for r in readings))
