"""Checks of searches: within their budget, repeatable, kept as they go, beside a random search, and saved for anyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convince import parts
from convince.backbones import builder
from convince.checks.subject import Subject
from convince.search.beside import Find, at_random, card_text, look
from convince.search.lab import Lab

TRIALS = 6  # trainings of a candidate that the budget of a check allows


def _lab(s: Subject, folder: Path | None = None, seed: int = 0) -> Lab:
    search = s.make()
    empty = Lab(search.network, s.data, 1.0)
    usual: dict[str, Any] = {"batch": 8, "precision": "fp32", "kernels": {}}
    return Lab(search.network, s.data, TRIALS * empty.of_training(search.trial_epochs), seed, folder, **usual)


def _found(s: Subject) -> tuple[Find, Lab]:
    """One search, kept for the checks that look at it."""
    if "find" not in vars(s):
        lab = _lab(s, s.folder / "search")
        vars(s)["find"] = look(s.make(), lab), lab
    return vars(s)["find"]


def check_search_stays_in_its_budget(s: Subject) -> None:
    """No more images than the budget, and the lab's count is the find's."""
    find, lab = _found(s)
    assert find.images == lab.spent, "the find names another number of images than the lab counted"
    assert lab.spent <= lab.budget * (1 + 1e-6), f"{lab.spent:,.0f} images of a budget of {lab.budget:,.0f}"


def check_search_finds_a_network(s: Subject) -> None:
    """What is found are JSON options that the network takes, and it runs on the data."""
    find, _ = _found(s)
    assert json.loads(json.dumps(find.options)) == find.options, f"{find.options} does not survive JSON; use lists, numbers and strings"
    assert json.loads(json.dumps(find.notes)) == find.notes, "the notes do not survive JSON"
    d = s.data
    net = builder(parts.spell(s.make().network, find.options), num_classes=d.k, in_chans=d.preprocess.channels, size=d.preprocess.size)().eval()
    with torch.no_grad():
        assert net(torch.zeros(2, d.preprocess.channels, *d.preprocess.size)).shape == (2, d.k), "the found network does not answer the data"


def check_search_repeats(s: Subject) -> None:
    """The same seed finds the same, and leaves the global random state as it was."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    again = look(s.make(), _lab(s))
    assert torch.equal(states[0], torch.get_rng_state()), "torch's global random state moved"
    assert (states[1] == np.random.get_state()[1]).all(), "numpy's global random state moved"  # type: ignore[index]
    assert again.options == _found(s)[0].options, f"one seed finds {_found(s)[0].options} and then {again.options}"


def check_search_goes_on_where_it_stopped(s: Subject) -> None:
    """Started again in its folder it finds the same, charges the same, and does no work twice."""
    find, lab = _found(s)
    again = _lab(s, lab.folder)
    found = look(s.make(), again)
    assert again.worked == 0, f"{again.worked} results were worked out a second time"
    assert (found.options, found.images) == (find.options, find.images), "started again, the search comes to another end"


def check_random_search_stands_beside(s: Subject) -> None:
    """The random search draws from the search's own space, keeps the budget, and trains as long a trial."""
    search, lab = s.make(), _lab(s)
    find = at_random(search, lab)
    assert 1 <= len(find.trials) <= TRIALS, f"{len(find.trials)} trials in a budget of {TRIALS}"
    assert lab.spent <= lab.budget * (1 + 1e-6), "the random search spends more than its budget"
    parts.check_options(parts.get(search.network), find.options)


def check_test_part_is_never_seen(s: Subject) -> None:
    """A lab holds no test rows, so that what is found can be tested on them."""
    _, lab = _found(s)
    assert not len(lab.data.split.test), "the lab holds test rows"
    kept = s.data.split
    seen = torch.cat([lab.data.split.train, lab.data.split.val])
    assert not bool(torch.isin(seen, kept.test).any()), "test rows are among those that the search sees"


def check_find_is_a_card(s: Subject) -> None:
    """Saved as a card, the find is a size by name with the same weights, and nothing in the file runs."""
    find, _ = _found(s)
    network = s.make().network
    path = s.folder / "found.py"
    path.write_text(card_text("found-in-a-check", network, "Found in a check", {"found-in-a-check-1": find.options}), encoding="utf-8")
    card = parts.read(path)
    assert isinstance(card, parts.Part), f"the saved card cannot be read: {card}"
    options = card.card.variants["found-in-a-check-1"]
    size = s.data.preprocess.size
    a, b = (builder(parts.spell(network, o), num_classes=3, in_chans=1, size=size)() for o in (options, find.options))
    assert [(n, p.shape) for n, p in a.named_parameters()] == [(n, p.shape) for n, p in b.named_parameters()], "the saved options build another network"
