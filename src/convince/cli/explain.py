"""convince explain: a contact sheet of images with their maps and how faithful these are; or a ranking of the methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from convince.cli import emit, json_option, parts_option, trust_option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from convince.fit.folder import Loaded

MOST = 64  # images of a sheet
PATIENCE = 5.0  # seconds for one image, beyond which a ranking of all methods leaves one out


@click.command()
@click.argument("run")
@click.argument("files", nargs=-1, metavar="[FILE]... | [DATA]")
@click.option("--method", "methods", multiple=True, metavar="NAME", help="An explainer; repeatable [grad-cam; with --score all that give a map in 5 s].")
@click.option("--target", metavar="CLASS", help="The class to explain [the predicted one].")
@click.option("--like", metavar="FILE", default=None, help="Explain the likeness to this image in place of a class.")
@click.option("--score", is_flag=True, help="Rank the methods on DATA, or on the run's own test part.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="A metric of --score; repeatable [faithfulness insertion deletion entropy].")
@click.option("--against", metavar="RUN", default=None, help="With --score: how alike the maps of another run are, say one trained on shuffled labels.")
@click.option("--images", type=int, default=32, metavar="N", help="With --score: at most this many images [32].")
@click.option("--precision", type=click.Choice(["auto", "fp32"]), default="auto", help="auto takes bf16 where the map survives it [auto].")
@click.option("--out", metavar="PNG", default=None, help="The sheet, beside it a page of the same name [RUN/explain.png].")
@trust_option
@parts_option
@json_option
def command(
    run: str,
    files: tuple[str, ...],
    methods: tuple[str, ...],
    target: str | None,
    like: str | None,
    score: bool,
    metrics: tuple[str, ...],
    against: str | None,
    images: int,
    precision: str,
    out: str | None,
    trust: bool,
    as_json: bool,
) -> None:
    """Show where RUN looks in FILES (at most 64), or say with --score which methods tell the truth about it.

    \b
    convince explain runs/birds a.jpg b.jpg --method grad-cam --method rise
    convince explain runs/birds --score
    """
    from dataclasses import replace
    from pathlib import Path

    from convince.errors import Mistake, nearest
    from convince.fit.folder import open_run

    loaded = open_run(run, trust=trust)
    if loaded.preprocess.kind != "image":
        raise Mistake(f"{run}: learnt from a table of numbers; convince explain draws maps of images (Classifier.explain takes saliency on a table)")
    if target is not None and target not in loaded.classes:
        raise Mistake(f"--target {target}: the run has no such class{nearest(target, list(loaded.classes))} Classes: {', '.join(loaded.classes)}")
    if like is not None and target is not None:
        raise Mistake(f"--like {like} and --target {target}: one of them says what is explained; give one")
    if precision == "fp32":
        loaded.plan = replace(loaded.plan, precision="fp32")
    if score:
        if like is not None:
            raise Mistake("--score ranks maps of class scores; leave out --like")
        other = None if against is None else open_run(against, trust=trust)
        _rank(loaded, files, methods, target, metrics, other, images, Path(out) if out else Path(run) / "explain-score.html", as_json)
    else:
        if metrics or against is not None:
            raise Mistake("--metric and --against belong to --score; add it")
        _sheet(loaded, files, methods or ("grad-cam",), target, like, Path(out) if out else Path(run) / "explain.png", as_json)


def _sheet(loaded: Loaded, files: tuple[str, ...], methods: tuple[str, ...], target: str | None, like: str | None, path: Path, as_json: bool) -> None:
    from functools import partial

    import numpy as np

    from convince.cli.progress import Bar
    from convince.cli.runs import files_of, make_of_kind
    from convince.data import read_files
    from convince.errors import Mistake
    from convince.explain.faithfulness import deletion, insertion
    from convince.explain.many import explain_all
    from convince.explain.targets import Similarity
    from convince.kinds import as_found
    from convince.report.sheet import Line, Method, Shown, heat, picture, write_page, write_png

    if not files:
        raise Mistake("name at least one image to explain, or --score to rank the methods")
    made = [make_of_kind(spec, "explainer") for spec in methods]
    named = files_of(files)
    pixels, names, bad = read_files(named[:MOST], loaded.preprocess)
    for s in bad:
        click.echo(f"skipped {s.file}: {s.reason}", err=True)
    if len(named) > MOST:
        click.echo(f"the first {MOST} of {len(named)} files; name fewer for a sheet of others", err=True)
    if not len(pixels):
        raise Mistake("none of these files could be read")
    x = loaded.plan.pixels(pixels)
    probs = loaded.logits(pixels).softmax(1)
    best = probs.argmax(1)
    wanted = best if target is None else best.new_full((len(x),), loaded.classes.index(target))
    answer: Any = loaded.answer
    if like is not None:
        other, _, wrong = read_files([like], loaded.preprocess)
        if wrong:
            raise Mistake(f"--like {like}: {wrong[0].reason}")
        answer, wanted = Similarity(loaded.answer, loaded.plan.pixels(other)), best.new_zeros(len(x))
    columns: list[Method] = []
    shown: list[list[Shown]] = [[] for _ in names]
    said: dict[str, Any] = {}
    with Bar() as bar:
        for spec, (name, explainer) in zip(methods, made, strict=True):
            found = explain_all(explainer, answer, x, wanted, plan=loaded.plan, progress=partial(bar, text=name))
            said[spec] = {k: v for k, v in found.table.items() if isinstance(v, (str, int, float, list))}
            note = [f"layer {found.table['layer']}"] if "layer" in found.table else []
            columns.append(Method(spec, ", ".join([*note, found.table["precision"]])))
            if found.map is not None:
                with as_found(answer):
                    put_in, taken_out = (how(answer, x, found.map, wanted).tolist() for how in (insertion, deletion))
            for i, row in enumerate(shown):
                if found.map is not None:
                    drawn = heat(_picture(pixels[i]), found.map[i, 0].detach().float().cpu().numpy())
                    row.append(Shown(drawn, put_in[i] - taken_out[i], put_in[i], taken_out[i]))
                else:
                    first = next((v for v in found.images.values() if v.dim() == 4 and len(v) == len(x)), None)
                    row.append(Shown(None if first is None else picture(first[i].detach().float().cpu().numpy())))
    lines, rows = [], []
    for i, name in enumerate(names):
        label, what = loaded.classes[int(best[i])], "likeness to " + like if like is not None else loaded.classes[int(wanted[i])]
        lines.append(Line(np.ascontiguousarray(_picture(pixels[i])), name, label, float(probs[i, best[i]]), what, shown[i]))
        scores = {spec: {"faithfulness": c.faithfulness, "insertion": c.insertion, "deletion": c.deletion} for spec, c in zip(methods, shown[i], strict=True)}
        rows.append({"file": name, "label": label, "probability": float(probs[i, best[i]]), "explained": what, "scores": scores})
    write_png(path, columns, lines)
    page = write_page(path.with_suffix(".html"), str(loaded.folder), columns, lines)
    skipped = [{"file": s.file, "reason": s.reason} for s in bad]
    emit({"sheet": str(path), "page": str(page), "explained": rows, "methods": said, "skipped": skipped}, as_json, f"{path}\n{page}")


def _picture(pixels: Tensor) -> Any:
    """uint8 [c h w] -> [h w c]."""
    return pixels.permute(1, 2, 0).numpy()


def _rank(
    loaded: Loaded,
    data: tuple[str, ...],
    methods: tuple[str, ...],
    target: str | None,
    metrics: tuple[str, ...],
    other: Loaded | None,
    images: int,
    path: Path,
    as_json: bool,
) -> None:
    import math

    import torch

    from convince import parts
    from convince.cli.runs import data_of, make_of_kind
    from convince.errors import Mistake
    from convince.explain.ranking import rank
    from convince.report.sheet import write_page

    if len(data) > 1:
        raise Mistake(f"--score takes one DATA, got {', '.join(data)}; name a folder, or nothing for the run's own test part")
    if images < 2:
        raise Mistake(f"--images {images}: a ranking needs at least 2")
    if other is not None and (other.preprocess.size != loaded.preprocess.size or len(other.classes) != len(loaded.classes)):
        raise Mistake(f"--against {other.folder}: takes other images or other classes than {loaded.folder}; name a run of the same data")
    names = methods or tuple(p.name for p in parts.find() if isinstance(p, parts.Part) and p.card.kind == "explainer" and not p.own)
    made = dict(make_of_kind(spec, "explainer") for spec in names)
    pool, rows = data_of(loaded, data[0] if data else None)
    rows = rows[torch.linspace(0, len(rows) - 1, min(images, len(rows))).long()]  # evenly through the set, which may be sorted by class
    pixels = pool.x.take(rows)
    x = loaded.plan.pixels(pixels)
    wanted = loaded.logits(pixels).argmax(1).to(x.device) if target is None else torch.full((len(x),), loaded.classes.index(target), device=x.device)
    measured = metrics or ("faithfulness", "insertion", "deletion", "entropy")
    found = rank(
        made,
        loaded.answer,
        x,
        wanted,
        measured,
        plan=loaded.plan,
        other=None if other is None else other.answer,
        patience=math.inf if methods else PATIENCE,
        progress=lambda text: click.echo(f"scoring {text}", err=True),
    )
    columns = (*measured, "against") if other is not None else measured
    page = write_page(path, str(loaded.folder), ranking=found, metrics=columns, on=f"{len(x)} images of {pool.origin}")
    table = [
        {"method": r.method, "seconds": r.seconds, "error": r.error or None}
        | {name: {"mean": r.means[name], "half_width": r.half[name]} for name in columns if name in r.means}
        | ({} if r.over_random is None else {"over_random": {"mean": r.over_random[0], "half_width": r.over_random[1]}})
        for r in found
    ]
    emit({"run": str(loaded.folder), "images": len(x), "ranking": table, "page": str(page)}, as_json, _text(found, columns) + f"\n{page}")


def _text(found: list[Any], columns: tuple[str, ...]) -> str:
    lines = [f"{'method':<24}" + "".join(f"{name:>20}" for name in columns) + f"{'s an image':>12}"]
    for r in found:
        if r.error:
            lines.append(f"{r.method:<24}{r.error}")
        else:
            lines.append(f"{r.method:<24}" + "".join(f"{r.means[n]:>11.3f} ± {r.half[n]:<6.3f}" for n in columns) + f"{r.seconds:>12.3g}")
    return "\n".join(lines)
