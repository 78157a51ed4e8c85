"""convince evaluate: a run's scores on its own test part, or on other labelled data."""

from __future__ import annotations

import click

from convince.cli import emit, json_option, parts_option, trust_option


@click.command()
@click.argument("run")
@click.argument("data", required=False)
@trust_option
@parts_option
@json_option
def command(run: str, data: str | None, trust: bool, as_json: bool) -> None:
    """Score RUN on DATA: all of it, or its test part where DATA brings one or is what RUN was trained on (the default)."""
    import time

    from convince.cli.runs import data_of
    from convince.fit.answer import score
    from convince.fit.folder import open_run, weights_sha256

    began = time.monotonic()
    loaded = open_run(run, trust=trust)
    found, rows = data_of(loaded, data)
    start = time.monotonic()
    scores = score(loaded.answer, found, rows, loaded.plan)
    spent = time.monotonic() - start
    result = {
        "run": run,
        "model": loaded.settings.model,
        "parts": list(loaded.settings.parts),
        "test": scores.summary(),
        "seconds": {"total": time.monotonic() - began, "evaluate": spent},
        "samples_per_second": scores.n / spent,
        "precision": loaded.plan.precision,
        "skipped": [{"file": s.file, "reason": s.reason} for s in found.skipped],
        "duplicates": len(found.duplicates),
        "weights_sha256": weights_sha256(loaded.answer),
    }
    low, high = scores.accuracy_interval
    emit(
        result,
        as_json,
        f"{scores.accuracy:.1%} of {scores.n} right (95 % interval {low:.1%} to {high:.1%}), log loss {scores.log_loss:.3f} nats, ECE {scores.ece:.3f}",
    )
