"""convince compress: a smaller run from a finished one, with what it cost in accuracy."""

from __future__ import annotations

import re
from typing import Any

import click

from convince.cli import emit, free_folder, json_option, parts_option, trust_option
from convince.errors import Mistake


@click.command()
@click.argument("run")
@click.argument("data", required=False)
@click.option("--with", "specs", multiple=True, required=True, metavar="PART", help="A compressor: --with int8 --with int8:w_bits=4. Repeatable, in order.")
@click.option("--budget", metavar="AMOUNT", help="What to get down to: 0.25 or 25% (of the bytes), 300000bytes, 0.5macs.")
@click.option("--images", type=int, default=3200, metavar="N", help="Training images to calibrate on, at most [3200].")
@click.option("--out", metavar="DIR", help="Where the smaller run goes [runs/NAME-PART-N].")
@trust_option
@parts_option
@json_option
def command(run: str, data: str | None, specs: tuple[str, ...], budget: str | None, images: int, out: str | None, trust: bool, as_json: bool) -> None:
    """Compress RUN without training, calibrated on training images of its own data or of DATA, and write a new run.

    Both are scored on the run's own test part, or on DATA.
    """
    import copy
    import json
    from pathlib import Path

    from convince.cli.runs import data_of, make_of_kind
    from convince.compress.measuring import measure
    from convince.fit.answer import Answer
    from convince.fit.folder import open_run, write_config, write_model
    from convince.fit.randomness import generator
    from convince.fit.state import write_atomic

    allowed = None if budget is None else amount(budget)
    if images < 1:
        raise Mistake(f"--images {images}: must be at least 1")
    made = [make_of_kind(spec, "compressor") for spec in specs]
    folder = free_folder(out, "-".join([Path(run).name, *(name for name, _ in made)]))
    loaded = open_run(run, trust=trust)
    inner = loaded.run
    owner = inner.team.owner("answer")
    if owner is not None:
        raise Mistake(f"{run}: answers by {inner.team.seat(owner).name!r}, not by one network, and cannot be compressed; train one without it")
    found, rows = data_of(loaded, data)
    train = found.split.train if len(found.split.train) else rows
    chosen = train[torch_order(len(train), generator(loaded.settings.seed, "calibration"))][:images]
    x = found.float_batch(found.x.take(chosen)).to(device=loaded.plan.device, dtype=loaded.plan.dtype)
    before = copy.deepcopy(loaded.answer)
    for name, compressor in made:
        cut = compressor.plan(Answer(inner.normalise, inner.model).eval(), x, allowed)
        compressor.apply(inner.model, cut)
        inner.edits.append({"part": name, "spec": cut.spec})
    inner.plan.place(inner.model)
    measured = measure(before, inner.answer.eval(), found, rows, loaded.plan)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, loaded.settings)
    write_model(folder, inner)
    result: dict[str, Any] = {"run": str(folder), "from": run, "parts": list(specs), "calibrated_on": len(chosen), "n": len(rows), **measured}
    write_atomic(folder / "compress.json", json.dumps(result, indent=1))
    emit(result, as_json, sentence(result))


def torch_order(n: int, gen: Any) -> Any:
    """A random order of ``n`` rows."""
    import torch

    return torch.randperm(n, generator=gen)


def amount(text: str) -> Any:
    """``"25%"``, ``"0.25"``, ``"300000bytes"``, ``"0.5macs"`` -> a Budget; a number alone counts bytes, as a share up to 1."""
    from convince.types import Budget

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(%?)\s*(bytes|macs|)\s*", text)
    if match is None:
        raise Mistake(f"--budget {text}: write a share such as 0.25 or 25%, or an amount such as 300000bytes or 0.5macs")
    value = float(match[1]) / (100 if match[2] else 1)
    if value <= 0 or (match[2] and value > 1):
        raise Mistake(f"--budget {text}: must be above 0, and a share at most 100%")
    return Budget(value, match[3] or "bytes")  # type: ignore[arg-type]


def sentence(result: dict[str, Any]) -> str:
    """Before and after, in words."""
    before, after = result["before"], result["after"]
    lines = [f"{'':<8}{'accuracy':>9}{'95 % interval':>18}{'bytes':>12}{'macs':>14}{'us an image':>13}"]
    for name, row in (("before", before), ("after", after)):
        low, high = row["accuracy_interval"]
        lines.append(f"{name:<8}{row['accuracy']:>9.1%}{f'{low:.1%} to {high:.1%}':>18}{row['bytes']:>12,}{row['macs']:>14,}{row['seconds'] * 1e6:>13.1f}")
    lines.append(f"{before['bytes'] / after['bytes']:.1f} times smaller, {before['seconds'] / after['seconds']:.2f} times as fast, on {result['n']} images")
    return "\n".join([*lines, f"run: {result['run']}"])
