"""Checks of every part: the card tells the truth about the file."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import torch

from convince import parts
from convince.checks import Nothing
from convince.checks.subject import Subject
from convince.errors import Mistake


def check_card_is_whole(s: Subject) -> None:
    """A title; a paper has a year and an address; departures are sentences."""
    card = s.card
    assert card.title.strip(), "the card has no title"
    if card.paper:
        assert card.year, "the card names a paper and no year"
        assert card.url, "the card names a paper and no url"
    for sentence in card.departs:
        assert len(sentence.split()) >= 4, f"departs: {sentence!r} is not a sentence"


def check_file_opens_with_a_sentence(s: Subject) -> None:
    """The first line of the file says what the part is, and its object has a docstring."""
    first = (s.part.module().__doc__ or "").strip().splitlines()
    assert first and len(first[0].split()) >= 4, "the file does not open with a sentence"
    assert (inspect.getdoc(s.part.load()) or "").strip(), "the part's object has no docstring"


def check_options_have_defaults(s: Subject) -> None:
    """Every option but what the house gives (classes, channels, parameters) has a default; ``tiny`` and ``strength`` are options."""
    options = s.part.options()
    given = {"params"} if s.card.kind == "optimizer" else set()
    for name, p in options.items():
        assert name in given or p.default is not inspect.Parameter.empty, f"the option {name!r} has no default"
    for name in [*s.card.tiny, *([s.card.strength] if s.card.strength else [])]:
        assert name in options, f"the card names {name!r}, which is no option"
    for variant, values in s.card.variants.items():
        for name in values:
            assert name in options, f"the variant {variant!r} sets {name!r}, which is no option"


def check_wrong_option_is_named(s: Subject) -> None:
    """An option that does not exist is refused, naming the part and the option."""
    try:
        parts.check_options(s.part, {"no_such_option": 1})
    except Mistake as mistake:
        assert "no_such_option" in str(mistake), f"the error does not name the option: {mistake}"
        assert s.part.name in str(mistake), f"the error does not name the part: {mistake}"
        return
    raise AssertionError("an option that does not exist was accepted")


def check_constructor_only_stores(s: Subject) -> None:
    """Fields hold what was given, two are equal and print alike, and no random state moves."""
    made = s.part.load()
    if not dataclasses.is_dataclass(made):
        raise Nothing("not a dataclass: a module draws its weights when it is made")
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    a, b = s.make(), s.make()
    assert torch.equal(states[0], torch.get_rng_state()), "the constructor draws from torch's global state"
    assert (states[1] == np.random.get_state()[1]).all(), "the constructor draws from numpy's global state"  # type: ignore[index]
    for name, value in s.options.items():
        assert getattr(a, name) == value, f"the constructor changes {name}={value!r} to {getattr(a, name)!r}"
    assert a == b, "two parts with the same settings are not equal"
    assert repr(a) == repr(b), "two parts with the same settings print differently"
