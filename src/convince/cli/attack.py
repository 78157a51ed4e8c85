"""convince attack: how small a change fools a run."""

from __future__ import annotations

import click

from convince.cli import emit, json_option, parts_option, trust_option


@click.command()
@click.argument("run")
@click.argument("data", required=False)
@click.option("--with", "spec", required=True, metavar="PART", help="An attack: deepfool, fgsm:eps=8/255.")
@click.option("--eps", type=str, metavar="E", help="Radius of the ball in pixel values 0 to 1, such as 8/255; none: the smallest change found.")
@click.option("--norm", type=click.Choice(["2", "inf"]), default=None, help="The norm of the ball [2; inf with --eps].")
@click.option("--images", type=int, default=256, metavar="N", help="At most this many images [256].")
@trust_option
@parts_option
@json_option
def command(run: str, data: str | None, spec: str, eps: str | None, norm: str | None, images: int, trust: bool, as_json: bool) -> None:
    """Attack RUN on DATA, or on its own test part. Only images that it answers rightly are attacked."""
    import time

    from convince import parts
    from convince.cli.runs import data_of, make_of_kind
    from convince.errors import Mistake
    from convince.fit.folder import open_run

    radius = None
    if eps is not None:
        _, read = parts.parse(f"eps:value={eps}")
        radius = read["value"]
        if not isinstance(radius, (int, float)):
            raise Mistake(f"--eps {eps}: must be a number such as 0.03 or 8/255")
    loaded = open_run(run, trust=trust)
    name, attack = make_of_kind(spec, "attack")
    found, rows = data_of(loaded, data)
    rows = rows[found.y[rows] >= 0][:images]
    x, y = found.float_batch(found.x.take(rows)).to(loaded.plan.device), found.y[rows].to(loaded.plan.device)
    right = loaded.answer(x).argmax(1) == y
    x, y = x[right], y[right]
    start = time.monotonic()
    changed = attack(loaded.answer, x, y, eps=radius, norm=norm or ("inf" if radius is not None else "2"))
    spent = time.monotonic() - start
    fooled = loaded.answer(changed).argmax(1) != y
    size = (changed - x).flatten(1)
    relative = size.norm(dim=1) / x.flatten(1).norm(dim=1).clamp_min(1e-12)
    readings = [
        {"name": "attacked", "value": len(y), "unit": "images"},
        {"name": "clean accuracy", "value": float(right.double().mean()), "unit": "share"},
        {"name": "robust accuracy", "value": float((~fooled).sum() / max(len(right), 1)), "unit": "share"},
        {"name": "fooled", "value": float(fooled.double().mean()) if len(y) else 0.0, "unit": "share of those answered rightly"},
        {"name": "median l2 change", "value": float(size.norm(dim=1).median()) if len(y) else 0.0, "unit": "pixel value"},
        {"name": "median linf change", "value": float(size.abs().amax(1).median()) if len(y) else 0.0, "unit": "pixel value"},
        {"name": "mean relative l2 change", "value": float(relative.mean()) if len(y) else 0.0, "unit": "|r|/|x|"},
    ]
    result = {"run": run, "part": name, "eps": radius, "norm": norm, "readings": readings, "seconds": spent}
    emit(result, as_json, "\n".join(f"{r['name']:<26} {r['value']:.4g} {r['unit']}" for r in readings))
