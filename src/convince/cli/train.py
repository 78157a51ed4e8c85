"""convince train: data in, a trained run with its report out."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from convince.cli import emit, free_folder, json_option, parts_option
from convince.errors import Mistake


@click.command()
@click.argument("data", required=False)
@click.option("--model", metavar="NAME", help="A network: resnet20, timm/NAME, name:key=value. Chosen from the data if left out.")
@click.option("--with", "parts", multiple=True, metavar="PART", help="Switch a part on: --with cutmix --with poly1:epsilon=2. Repeatable.")
@click.option("--pretrain-only", is_flag=True, default=None, help="Stop after the stages before the main one (rotnet, spark ...); unlabelled pictures will do.")
@click.option("--start", metavar="RUN", help="Begin with the weights of another run, where names and shapes agree.")
@click.option("--epochs", type=int, metavar="N", help="Passes over the training part.")
@click.option("--minutes", type=float, metavar="M", help="Train for about this long; turned into steps before the first one.")
@click.option("--steps", type=int, metavar="N", help="Steps of the main stage, in place of epochs.")
@click.option("--batch", type=int, metavar="N", help="Samples a step (over all processes).")
@click.option("--size", type=int, metavar="PX", help="Side that images are fitted to.")
@click.option("--fit", type=click.Choice(["letterbox", "crop", "stretch"]), help="How an image is fitted to that side [letterbox].")
@click.option("--augment", type=click.Choice(["auto", "none", "crop", "flip-crop"]), help="Standard augmentation [auto].")
@click.option("--lr", type=float, metavar="X", help="Learning rate; the optimiser's own if left out.")
@click.option("--weight-decay", type=float, metavar="X", help="Of the plain SGD [0.0005].")
@click.option("--schedule", type=click.Choice(["cosine", "constant"]), help="Of the learning rate [cosine].")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32", "fp64"]), help="Number format of the forward pass [auto].")
@click.option("--val", type=float, metavar="SHARE", help="Share kept for validation [0.1].")
@click.option("--test", type=float, metavar="SHARE", help="Share kept for the test [0.2].")
@click.option("--group", metavar="COLUMN", help="Column of a table whose equal values stay on one side (a patient, a recording).")
@click.option("--workers", type=int, metavar="N", help="Processes that decode images which do not fit in memory [0].")
@click.option("--seed", type=int, metavar="S", help="Seed of the split, the weights and the order [0].")
@click.option("--strict", is_flag=True, default=None, help="Make a damaged or foreign file an error.")
@click.option("--checkpoint-seconds", type=float, metavar="S", help="At most this much work is lost by a kill [30].")
@click.option("--out", metavar="DIR", help="Where the run goes [runs/NAME-N].")
@click.option("--resume", metavar="RUN", help="Go on with an interrupted run, with equal bits.")
@parts_option
@json_option
def command(data: str | None, out: str | None, resume: str | None, as_json: bool, **asked: Any) -> None:
    """Train a classifier on DATA: a folder of class folders, a CSV or Parquet table, an .npz file, or a built-in name.

    Without DATA the embedded digits are used.
    """
    import time
    from pathlib import Path

    began = time.monotonic()
    from convince.cli.progress import Bar
    from convince.data import load
    from convince.fit.folder import from_yaml
    from convince.fit.settings import settings
    from convince.fit.train import CHECKPOINT, train
    from convince.report.run import write_run_report

    given = {name: value for name, value in asked.items() if value is not None and value != ()}
    if resume is not None:
        folder = Path(resume)
        if not (folder / "config.yaml").exists():
            raise Mistake(f"--resume {resume}: no run starts there; leave --resume out to begin one")
        if data is not None or given:
            raise Mistake("--resume takes every setting from the run; leave the others out")
        if (folder / "structure.json").exists() and not (folder / CHECKPOINT).exists():
            raise Mistake(f"--resume {resume}: this run is finished; see {folder / 'report.html'}")
        asked_for = from_yaml(folder / "config.yaml")
    else:
        asked_for = settings(data=data or "digits", **given)
        if int(os.environ.get("RANK", "0")) == 0:
            folder = free_folder(out, Path(asked_for.data.rstrip("/")).stem or "run")
        else:  # the first process writes; the others never touch it
            folder = Path(out or "runs")
    with Bar() as bar:
        s = asked_for
        found = load(
            s.data, size=s.size, fit=s.fit, val=s.val, test=s.test, seed=s.seed, strict=s.strict, group=s.group, workers=s.workers,
            unlabelled=s.pretrain_only, progress=lambda done, total: bar(done, total, "reading"),
        )  # fmt: skip
        tell(found)
        result = train(asked_for, found, folder=folder, progress=bar, began=began)
    result.run.processes.wait()
    if result.run.rank == 0:
        report = write_run_report(result)
        result.seconds["total"] = time.monotonic() - began
        for checkpoint in folder.glob(f"*{CHECKPOINT}"):
            checkpoint.unlink()
        emit(result.summary(), as_json, sentence(result) + f"\nreport: {report}")
    if result.run.world > 1:  # taking gloo's threads down can abort the process; all that matters is on disk
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def tell(data: Any) -> None:
    """Say on stderr, before training, what was skipped and what stands on both sides of the split."""
    if data.skipped:
        click.echo(f"skipped {len(data.skipped)} files, e.g. {data.skipped[0].file}: {data.skipped[0].reason}", err=True)
    if data.duplicates:
        a, b = data.duplicates[0]
        click.echo(f"{len(data.duplicates)} exact duplicates stand on both sides of the split, e.g. {a} and {b}", err=True)


def sentence(result: Any) -> str:
    """The result in words."""
    lines = list(result.notes)
    if result.test is None:
        why = f"go on with --start {result.folder} on labelled data" if result.settings.pretrain_only else "no test part; nothing to score"
        return "\n".join([*lines, why])
    low, high = result.test.accuracy_interval
    s = result.settings
    lines.append(
        f"{s.model} answers {result.test.accuracy:.1%} of {result.test.n} test samples correctly (95 % interval {low:.1%} to {high:.1%}),"
        f" {result.seconds['total']:.1f} s"
    )
    return "\n".join(lines)
