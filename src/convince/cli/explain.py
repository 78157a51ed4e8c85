"""convince explain: a contact sheet of images with their maps."""

from __future__ import annotations

import click

from convince.cli import emit, json_option, parts_option, trust_option


@click.command()
@click.argument("run")
@click.argument("files", nargs=-1, required=True)
@click.option("--method", "methods", multiple=True, default=("grad-cam",), metavar="NAME", help="An explainer; repeatable [grad-cam].")
@click.option("--target", metavar="CLASS", help="The class to explain [the predicted one].")
@click.option("--out", metavar="PNG", default=None, help="The sheet [RUN/explain.png].")
@trust_option
@parts_option
@json_option
def command(run: str, files: tuple[str, ...], methods: tuple[str, ...], target: str | None, out: str | None, trust: bool, as_json: bool) -> None:
    """Show where RUN looks in FILES (at most 64)."""
    from pathlib import Path

    import numpy as np

    from convince.cli.runs import files_of, make_of_kind
    from convince.data import read_files
    from convince.errors import Mistake, nearest
    from convince.fit.folder import open_run
    from convince.report.sheet import write_sheet

    loaded = open_run(run, trust=trust)
    if target is not None and target not in loaded.classes:
        raise Mistake(f"--target {target}: the run has no such class{nearest(target, list(loaded.classes))} Classes: {', '.join(loaded.classes)}")
    made = [make_of_kind(spec, "explainer") for spec in methods]
    pixels, names, bad = read_files(files_of(files)[:64], loaded.preprocess)
    for s in bad:
        click.echo(f"skipped {s.file}: {s.reason}", err=True)
    if not len(pixels):
        raise Mistake("none of these files could be read")
    x = loaded.plan.pixels(pixels)
    probs = loaded.answer(x).detach().softmax(1).cpu()
    wanted = None if target is None else loaded.classes.index(target)
    maps = {name: explainer(loaded.answer, x, wanted) for name, explainer in made}
    rows = []
    for i, name in enumerate(names):
        best = int(probs[i].argmax())
        rows.append({"file": name, "label": loaded.classes[best], "probability": float(probs[i, best])})
    path = Path(out) if out else Path(run) / "explain.png"
    images = [np.ascontiguousarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    write_sheet(path, images, rows, {n: e.map[:, 0].detach().float().cpu().numpy() for n, e in maps.items() if e.map is not None})
    said = {n: {k: v for k, v in e.table.items() if isinstance(v, (str, int, float, list))} for n, e in maps.items()}
    emit({"sheet": str(path), "explained": rows, "methods": said, "skipped": [{"file": s.file, "reason": s.reason} for s in bad]}, as_json, str(path))
