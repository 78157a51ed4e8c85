"""Checks of recipes: a schema, a generated sample, settings that train."""

from __future__ import annotations

from convince.checks.subject import Subject
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve


def check_schema_names_its_fields(s: Subject) -> None:
    """At least two fields, each with a name and a meaning."""
    fields = s.make().schema.fields
    assert len(fields) >= 2, "the schema has fewer than two fields"
    assert all(f.name and f.meaning for f in fields), "a field has no name or no meaning"


def check_sample_repeats(s: Subject) -> None:
    """Equal generators give equal samples."""
    a, b = (s.make().sample(generator(1)) for _ in range(2))
    rows = a.split.train
    assert bool((a.y == b.y).all()) and bool((a.x.take(rows) == b.x.take(rows)).all()), "equal generators give different samples"


def check_sample_trains(s: Subject) -> None:
    """``build`` gives settings that train a step on the sample."""
    recipe = s.make()
    data = recipe.sample(generator(1))
    chosen, _ = resolve(settings(**{"batch": 8, **recipe.build(data).settings, "epochs": 1, "steps": 1}), data)
    run = prepare(chosen, data)
    fit(run)
    assert run.steps_done == 1, f"{run.steps_done} steps were done, not one"
