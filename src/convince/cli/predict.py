"""convince predict: labels and probabilities for new files, with the preprocessing stored in the run."""

from __future__ import annotations

import click

from convince.cli import emit, json_option, parts_option, trust_option


@click.command()
@click.argument("run")
@click.argument("files", nargs=-1, required=True)
@click.option("--csv", "csv_path", metavar="OUT", help="Also write a CSV table.")
@trust_option
@parts_option
@json_option
def command(run: str, files: tuple[str, ...], csv_path: str | None, trust: bool, as_json: bool) -> None:
    """Answer for FILES (images, or folders of them) with RUN. Unreadable files are listed with their reason."""
    from convince.cli.runs import files_of
    from convince.data import read_files
    from convince.fit.folder import open_run

    loaded = open_run(run, trust=trust)
    rows: list[dict] = []
    skipped: list[dict[str, str]] = []
    paths = files_of(files)
    for start in range(0, len(paths), 256):
        x, names, bad = read_files(paths[start : start + 256], loaded.preprocess)
        skipped += [{"file": s.file, "reason": s.reason} for s in bad]
        if not len(x):
            continue
        probs = loaded.logits(x).softmax(1)
        for name, p in zip(names, probs, strict=True):
            best = int(p.argmax())
            rows.append(
                {
                    "file": name,
                    "label": loaded.classes[best],
                    "probability": float(p[best]),
                    "probabilities": dict(zip(loaded.classes, p.tolist(), strict=True)),
                }
            )
    if csv_path is not None:
        write_csv(csv_path, rows, loaded.classes)
    for row in skipped:
        click.echo(f"skipped {row['file']}: {row['reason']}", err=True)
    emit({"predictions": rows, "skipped": skipped}, as_json, "\n".join(f"{r['file']}\t{r['label']}\t{r['probability']:.3f}" for r in rows))
    if not rows:
        raise click.exceptions.Exit(2)


def write_csv(path: str, rows: list[dict], classes: tuple[str, ...]) -> None:
    """file, label, probability, then one column a class; written whole or not at all."""
    import csv
    import io
    from pathlib import Path

    from convince.fit.state import write_atomic

    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["file", "label", "probability", *classes])
    for r in rows:
        table.writerow([r["file"], r["label"], r["probability"], *r["probabilities"].values()])
    write_atomic(Path(path), text.getvalue())
