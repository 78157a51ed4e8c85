"""convince models: every network by name: what it costs, how fast it is, and what it reaches under one common budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from convince.cli import emit, json_option, parts_option


@click.command()
@click.argument("words", nargs=-1)
@click.option("--small", is_flag=True, help="Only sizes for pictures of 28 to 64 pixels.")
@click.option("--max-parameters", type=float, metavar="N", help="At most so many: 1e6.")
@click.option("--max-macs", type=float, metavar="N", help="At most so many multiply-adds an image: 5e7.")
@click.option("--sort", metavar="COLUMN", help="name, year, parameters, macs, speed, accuracy, fashion-mnist or cifar10.")
@click.option("--measure", is_flag=True, help="Measure what the table lacks on this machine; goes on where it was stopped. Needs $CONVINCE_DATA.")
@click.option("--only", multiple=True, metavar="NAME", help="With --measure: only these sizes, also patterns such as 'resnet*'. Repeatable.")
@click.option("--what", type=click.Choice(["all", "speed", "accuracy"]), default="all", help="With --measure: only this.")
@click.option("--table", type=click.Path(dir_okay=False), metavar="FILE", help="The table to read and measure into [this machine's, else the package's].")
@parts_option
@json_option
def command(
    words: tuple[str, ...],
    small: bool,
    max_parameters: float | None,
    max_macs: float | None,
    sort: str | None,
    measure: bool,
    only: tuple[str, ...],
    what: str,
    table: str | None,
    as_json: bool,
) -> None:
    """List the networks, those that match all WORDS in name, title or paper."""
    from convince.data.cache import cache_folder
    from convince.models import table as t

    path = Path(table) if table is not None else cache_folder() / "models.json" if measure else t.store_path()
    if measure:
        from convince.models.measure import measure as measure_all

        measure_all(path, only, lambda line: click.echo(line, err=True), accuracy=what != "speed", speed=what != "accuracy")
    store = t.read_store(path)
    found = t.chosen(t.rows(store), words, small, max_parameters, max_macs, sort)
    emit({"machine": store.get("machine"), "budget": store.get("budget"), "models": [row.to_json() for row in found]}, as_json, text(found, store))


def text(found: list[Any], store: dict[str, Any]) -> str:
    """The table in columns, and under what it was measured."""
    from convince.models.table import HEAD, cells

    if not found:
        return "no network matches"
    lines = [list(HEAD), *(cells(row) for row in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    machine, budget = store.get("machine"), store.get("budget")
    if machine and budget:
        out += ["", f"measured on {machine['processor']}, {machine['threads']} threads, torch {machine['versions']['torch']}; {recipe(budget)}"]
    if any(row.stale for row in found):
        out.append("* measured before its file was last changed")
    return "\n".join(out)


def recipe(budget: dict[str, Any]) -> str:
    """The common budget in words."""
    parts = ", ".join(budget["parts"])
    n = len(budget["seeds"])
    epochs = f"{budget['epochs']} epoch{'s' * (budget['epochs'] > 1)}"
    seen = f"{budget['images']:,} training and {budget['tested']:,} test images"
    return f"accuracy [%]: {seen}, {epochs}, batch {budget['batch']}, {parts}, {n} seeds: mean ± deviation"
