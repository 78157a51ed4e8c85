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
    """Measure RUN with PART on DATA, or on its own test part; numbers and figures go into the run's report."""
    import torch

    from convince import parts
    from convince.cli.runs import data_of, make_of_kind
    from convince.errors import Mistake
    from convince.fit.folder import open_run
    from convince.report.probes import keep, renew
    from convince.types import Findings

    if images < 1:
        raise Mistake(f"--images {images}: must be at least 1")
    loaded = open_run(run, trust=trust)
    name, _ = parts.parse(spec)
    part = parts.get(name)
    if part.card.kind == "technique":
        seat = next((s for s in loaded.run.team.seats if s.name == part.name), None)
        if seat is None or not hasattr(seat.technique, "readings"):
            raise Mistake(f"{name!r} measures while a network trains, and this run was trained without it; use 'convince train --with {name}'")
        figures = seat.technique.figures(loaded.run) if hasattr(seat.technique, "figures") else ()
        found = Findings(seat.technique.readings(loaded.run), figures)
    else:
        name, probe = make_of_kind(spec, "probe")
        pool, rows = data_of(loaded, data)
        rows = rows[pool.y[rows] >= 0]
        rows = rows[torch.linspace(0, len(rows) - 1, min(images, len(rows))).long()]  # evenly through the set, which may be sorted by class
        x = pool.float_batch(pool.x.take(rows)).to(loaded.plan.device)
        found = probe.probe(loaded.answer, x, pool.y[rows].to(loaded.plan.device))
    path = keep(loaded.folder, part.name, part.card.title, found)
    report = renew(loaded.folder)
    table = [{"name": r.name, "value": r.value, "unit": r.unit} for r in found.readings]
    said = {"run": run, "part": name, "readings": table, "file": str(path), "report": None if report is None else str(report)}
    where = f"{report}#probes" if report is not None else str(path)
    emit(said, as_json, "\n".join(f"{r.name:<44} {r.value:.5g} {r.unit}".rstrip() for r in found.readings) + f"\n{where}")
