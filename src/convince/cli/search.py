"""convince search: look for a network on your data within a budget, beside a random search of the same budget."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click

from convince.cli import emit, json_option, parts_option
from convince.errors import Mistake


@click.command()
@click.argument("data", required=False)
@click.option("--with", "part", required=True, metavar="PART", help="The search: --with nasnet-search, --with deepmad:macs=8e6.")
@click.option("--trials", type=int, metavar="N", help="The budget, as so many trainings of a candidate [16].")
@click.option("--budget", type=float, metavar="IMAGES", help="The budget, as images through networks in training.")
@click.option(
    "--seeds", type=int, default=0, metavar="N", help="Then train the find and the random search's in full, in so many pairs, and compare them [0: not]."
)
@click.option("--epochs", type=int, metavar="N", help="Length of those full trainings.")
@click.option("--batch", type=int, metavar="N", help="Samples a step.")
@click.option("--size", type=int, metavar="PX", help="Side that images are fitted to.")
@click.option("--lr", type=float, metavar="X", help="Learning rate; the optimiser's own if left out.")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32", "fp64"]), help="Number format of the forward pass [auto].")
@click.option("--val", type=float, default=0.2, metavar="SHARE", help="Share that the search judges on [0.2].")
@click.option("--seed", type=int, default=0, metavar="S", help="Seed of the split, the draws and the weights [0].")
@click.option("--name", metavar="NAME", help="What the find is called, for --model NAME [found-PART-SEED].")
@click.option("--out", metavar="DIR", help="Where the search goes [runs/search-DATA-...]; the same one again goes on there.")
@parts_option
@json_option
def command(
    data: str | None,
    part: str,
    trials: int | None,
    budget: float | None,
    seeds: int,
    epochs: int | None,
    name: str | None,
    out: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Look for a network on DATA, and save what is found as a size that anyone can train.

    The test part is never looked at. A random search over the same choices gets the same budget. Without DATA the embedded digits are used.
    """
    from convince import parts
    from convince.cli.progress import Bar
    from convince.data import load
    from convince.fit.state import write_atomic
    from convince.search.beside import beside, save_found
    from convince.search.lab import Lab

    spec_name, options = parts.parse(part)
    found_part = parts.get(spec_name)
    if found_part.card.kind != "search":
        known = ", ".join(row.name for row in parts.find() if isinstance(row, parts.Part) and row.card.kind == "search")
        raise Mistake(f"--with {part}: {found_part.name!r} is of kind {found_part.card.kind}, not a search; searches: {known or 'none'}")
    if trials is not None and budget is not None:
        raise Mistake("--trials and --budget both name the budget; give one of them")
    if (trials or 1) < 1 or (budget or 1) <= 0 or seeds == 1 or seeds < 0:
        raise Mistake(f"--trials {trials}, --budget {budget}, --seeds {seeds}: trials and budget must be above 0, and seeds 0, or at least 2 for an interval")
    search = parts.make(spec_name, **options)
    source = data or "digits"
    given = {key: value for key, value in asked.items() if value is not None and key not in ("val", "seed")}
    digest = hashlib.sha256(json.dumps([source, part, trials, budget, sorted(asked.items(), key=str)], default=str).encode()).hexdigest()[:8]
    folder = Path(out) if out is not None else Path("runs") / f"search-{Path(source.rstrip('/')).stem or 'data'}-{digest}"
    called = name or f"found-{found_part.name}-{asked['seed']}"

    def say(line: str) -> None:
        click.echo(line, err=True)

    with Bar() as bar:
        found = load(source, size=asked["size"], val=asked["val"], seed=asked["seed"], progress=lambda done, total: bar(done, total, "reading"))
    whole = budget if budget is not None else (trials or 16) * Lab(search.network, found, 1.0).of_training(search.trial_epochs)
    best, random = beside(search, found, whole, seed=asked["seed"], folder=folder, say=say, **{k: v for k, v in given.items() if k != "size"})
    path = folder / "found.py"
    path.unlink(missing_ok=True)
    save_found(path, called, search, best, random)
    parts.add_path(path)
    result: dict[str, Any] = {
        "search": found_part.name,
        "network": search.network,
        "budget": {"images": whole},
        "found": told(called, search.network, best, found),
        "random": told(f"{called}-random", search.network, random, found),
        "notes": best.notes,
        "file": str(path),
        "comparison": None,
    }
    if seeds and best.options != random.options:
        result["comparison"] = in_full(source, called, folder, seeds, epochs, asked, given, say)
    write_atomic(folder / "search.json", json.dumps(result, indent=1))
    emit(result, as_json, sentences(result, source))


def told(name: str, network: str, find: Any, data: Any) -> dict[str, Any]:
    """A find for JSON: its name, options, counts, cost, and the trials behind it."""
    from convince.models.counting import count_named
    from convince.parts import spell

    size, channels = data.preprocess.size, data.preprocess.channels
    counts = count_named(spell(network, find.options), num_classes=data.k, size=size, in_chans=channels)
    return {
        "name": name,
        "options": find.options,
        "parameters": counts.parameters,
        "macs": counts.macs,
        "images": find.images,
        "seconds": round(find.seconds, 1),
        "trials": [{"options": options, "accuracy": accuracy} for options, accuracy in find.trials],
    }


def in_full(source: str, called: str, folder: Path, seeds: int, epochs: int | None, asked: dict[str, Any], given: dict[str, Any], say: Any) -> dict[str, Any]:
    """Both finds trained in full in pairs, the random search's as the baseline."""
    from convince.comparison.engine import compare, write
    from convince.report.compare import write_comparison

    more = {**given, **({"epochs": epochs} if epochs else {})}
    seen = compare(source, called, model=f"{called}-random", seeds=seeds, seed=asked["seed"], folder=folder / "compare", say=say, **more)
    write(folder / "compare" / "compare.json", seen.to_json())
    write_comparison(folder / "compare" / "compare.html", seen)
    return seen.to_json() | {"sentences": seen.sentences(), "report": str(folder / "compare" / "compare.html")}


def sentences(result: dict[str, Any], source: str) -> str:
    """The result in words."""
    lines = []
    for key, who in (("found", result["search"]), ("random", "random search")):
        row = result[key]
        best = max((trial["accuracy"] for trial in row["trials"]), default=None)
        seen = "" if best is None else f", {best:.1%} on validation in {len(row['trials'])} trials"
        size = f"{row['parameters']:,} parameters, {row['macs'] / 1e6:.1f} M multiply-adds"
        lines.append(f"{who}: {row['name']}, {size}{seen}; {row['images']:,.0f} images, {row['seconds']:.0f} s")
    if result["found"]["options"] == result["random"]["options"]:
        lines.append("both found the same network")
    if result["comparison"]:
        lines += [*result["comparison"]["sentences"], f"report: {result['comparison']['report']}"]
    lines.append(f"train it: convince train {source} --parts {result['file']} --model {result['found']['name']}")
    return "\n".join(lines)
