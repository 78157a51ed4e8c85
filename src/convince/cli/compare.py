"""convince compare: does it help on your data? Pairs of runs, an interval, a verdict, and what it costs."""

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
@click.option("--with", "changes", multiple=True, metavar="PART", help="A change to try: --with cutmix --with poly1; --with cutmix+poly1 for both. Repeatable.")
@click.option("--all", "room", metavar="ROOM", help="Try every part of a room that fits the data, and race them.")
@click.option("--seeds", type=int, metavar="N", help="Pairs of runs [8, or what --minutes allow].")
@click.option("--margin", type=float, metavar="X", help="Differences inside it are as good as none [the larger of 0.005 and what the pairs can detect].")
@click.option("--metric", metavar="NAME", help="accuracy, error, log-loss, ece, f1, auroc, robust-accuracy, bytes, milliseconds, insertion-auc ... [accuracy].")
@click.option("--minutes", type=float, metavar="M", help="For the whole comparison.")
@click.option("--budget", metavar="UNIT=X", help="Of each run, the same for both arms: images=24000, epochs=5, steps=500 or seconds=30 [images].")
@click.option("--baseline", multiple=True, metavar="PART", help="Switched on in both arms; an explainer is what others are compared with. Repeatable.")
@click.option("--stop-early", is_flag=True, help="Look at half and three quarters of the pairs too, and stop where the verdict stands.")
@click.option("--samples", type=int, metavar="N", help="At most this many training samples.")
@click.option("--model", metavar="NAME", help="The network of both arms. Chosen from the data if left out.")
@click.option("--epochs", type=int, metavar="N", help="Length of the baseline's training, which sets the budget of images.")
@click.option("--batch", type=int, metavar="N", help="Samples a step.")
@click.option("--size", type=int, metavar="PX", help="Side that images are fitted to.")
@click.option("--fit", type=click.Choice(["letterbox", "crop", "stretch"]), help="How an image is fitted to that side [letterbox].")
@click.option("--augment", type=click.Choice(["auto", "none", "crop", "flip-crop"]), help="Standard augmentation of both arms [auto].")
@click.option("--lr", type=float, metavar="X", help="Learning rate of both arms; the optimiser's own if left out.")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32", "fp64"]), help="Number format of the forward pass [auto].")
@click.option("--val", type=float, metavar="SHARE", help="Share kept for validation [0.1].")
@click.option("--test", type=float, metavar="SHARE", help="Share kept for the test [0.2].")
@click.option("--group", metavar="COLUMN", help="Column of a table whose equal values stay on one side.")
@click.option("--seed", type=int, metavar="S", help="The first seed [0].")
@click.option("--workers", type=int, metavar="N", help="Processes that train arms [measured]; 0: this one.")
@click.option("--cluster", metavar="ADDRESS", help="Spread the runs over a Ray cluster: auto, ray://HOST:10001, local.")
@click.option("--out", metavar="DIR", help="Where the comparison goes [runs/compare-DATA-...]; the same one again goes on there.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier start of this comparison has done.")
@parts_option
@json_option
def command(
    data: str | None,
    changes: tuple[str, ...],
    room: str | None,
    minutes: float | None,
    budget: str | None,
    baseline: tuple[str, ...],
    out: str | None,
    fresh: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Compare changes with a baseline on DATA, pair by pair of runs, and write compare.html.

    Both arms of a pair share split, initial weights and order, and see the same number of images. Without DATA the embedded digits are used.
    """
    from convince.cli.progress import Bar
    from convince.comparison.change import room as parts_of
    from convince.comparison.engine import compare, write
    from convince.report.compare import write_comparison

    if (room is None) == (not changes):
        raise Mistake("name changes by --with PART, or a room by --all ROOM")
    texts = list(changes) if room is None else parts_of(room)
    given = {name: value for name, value in asked.items() if value is not None and value is not False}
    given |= {"race": True} if room is not None else {}
    source = data or "digits"
    folder = Path(out) if out is not None else default_folder(source, [texts, minutes, budget, baseline, {k: v for k, v in given.items() if k != "workers"}])
    if folder.exists() and not (folder / "plan.json").exists() and any(folder.iterdir()):
        raise Mistake(f"--out {folder}: exists already and holds no comparison; choose another name")
    if fresh:
        forget(folder)
    with Bar() as bar:
        found = compare(
            source,
            texts,
            minutes=minutes,
            budget=None if budget is None else amount(budget),
            baseline=baseline,
            folder=folder,
            say=lambda line: click.echo(line, err=True),
            progress=bar,
            **given,
        )
    from dataclasses import replace

    found = replace(found, command=spelt(source, texts if room is None else [], room, given, minutes, budget, baseline))
    write(folder / "compare.json", found.to_json())
    page = write_comparison(folder / "compare.html", found)
    emit(found.to_json() | {"report": str(page)}, as_json, "\n".join([*found.sentences(), f"report: {page}"]))


def default_folder(source: str, words: list[Any]) -> Path:
    """The folder of this very comparison, so that the same command goes on where it was stopped."""
    digest = hashlib.sha256(json.dumps([source, words], sort_keys=True, default=str).encode()).hexdigest()[:8]
    return Path("runs") / f"compare-{Path(source.rstrip('/')).stem or 'data'}-{digest}"


def forget(folder: Path) -> None:
    """Remove the plan and the arms of a comparison, and nothing else."""
    for path in [folder / "plan.json", *(folder / "arms").glob("*.json")]:
        path.unlink(missing_ok=True)


def amount(text: str) -> Any:
    """``"images=24000"`` -> a Budget."""
    from convince.comparison.plan import UNITS
    from convince.types import Budget

    unit, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if unit not in UNITS or not equals or not number > 0:
        raise Mistake(f"--budget {text}: write UNIT=NUMBER with one of {', '.join(UNITS)}, such as images=24000")
    return Budget(number, unit)  # type: ignore[arg-type]


def spelt(source: str, texts: list[str], room: str | None, given: dict[str, Any], minutes: Any, budget: Any, baseline: tuple[str, ...]) -> str:
    """The command line that repeats this comparison."""
    import shlex

    words = ["convince", "compare", source, *(word for text in texts for word in ("--with", text))]
    words += ["--all", room] if room else []
    words += [word for spec in baseline for word in ("--baseline", spec)]
    for name, value in {"minutes": minutes, "budget": budget, **given}.items():
        if value is not None and name != "race":
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)
