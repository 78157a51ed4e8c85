"""Labs, spaces and the search beside a search: budgets are kept, nothing is done twice, finds are data."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from good_searches import SEARCH
from hypothesis import given, settings
from hypothesis import strategies as st

from convince import parts
from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.search.beside import at_random, beside, card_text
from convince.search.lab import LOOKED_AT, Lab, Spent
from convince.search.space import Space

USUAL = {"batch": 8, "precision": "fp32", "kernels": {}}


def space(**more):
    return Space({"a": (1, 2, 3), "b": ("x", "y")}, lambda genes: genes, **more)


def lab(budget=1000.0, folder=None, seed=0):
    return Lab("small-cnn", tiny_images(), budget, seed, folder, **USUAL)


def test_draws_are_even_repeat_and_keep_the_limits():
    def take(seed, n, **more):
        draws = space(**more).draws(seed)
        return [tuple(next(draws).values()) for _ in range(n)]

    assert take(0, 20) == take(0, 20) != take(1, 20)
    counts = Counter(take(3, 600))
    assert len(counts) == 6
    assert max(counts.values()) < 2 * min(counts.values())
    assert {a for a, _ in take(0, 50, fits=lambda genes: genes["a"] != 2)} == {1, 3}


def test_all_settings_that_fit():
    assert space().size == 6
    assert list(space(fits=lambda genes: genes["a"] > 1 and genes["b"] == "y").all()) == [{"a": 2, "b": "y"}, {"a": 3, "b": "y"}]


def test_an_empty_space_is_named():
    with pytest.raises(Mistake, match="none of 2000 random settings keeps the limits"):
        next(space(fits=lambda genes: False).draws(0))
    with pytest.raises(Mistake, match="the choice 'a' has no values"):
        Space({"a": ()}, lambda genes: genes)
    with pytest.raises(Mistake, match=r"a=9 is not among \[1, 2, 3\]"):
        space().change({"a": 1, "b": "x"}, "a", 9)


def test_images_are_counted_and_the_budget_holds():
    desk = lab()
    train, val = len(desk.data.split.train), len(desk.data.split.val)
    assert desk.of_training(3) == 3 * train + val * LOOKED_AT
    desk.train({"widths": [2, 4]}, 1)
    assert desk.spent == pytest.approx(train + val / 3)
    with pytest.raises(Spent, match="966 images are asked for, and 965 of 1,000 are left"):
        desk.charge(desk.left + 1)
    with pytest.raises(Spent):
        desk.train({"widths": [2, 4]}, 1000)
    assert len(desk.trials) == 1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(1, 400), max_size=12))
def test_a_lab_never_spends_more_than_it_has(asked):
    desk = lab()
    for images in asked:
        fits = images <= desk.left
        try:
            desk.charge(images)
            assert fits or images - desk.left < 0.01
        except Spent:
            assert not fits
    assert desk.spent <= 1000 * (1 + 1e-5)


def test_results_are_kept_and_charged_again(tmp_path):
    first = lab(folder=tmp_path)
    accuracy = first.train({"widths": [2, 4]}, 1)
    again = lab(folder=tmp_path)
    assert again.train({"widths": [2, 4]}, 1) == accuracy
    assert (again.worked, again.spent, again.trials) == (0, first.spent, first.trials)
    other = lab(folder=tmp_path, seed=1)
    other.train({"widths": [2, 4]}, 1)
    assert other.worked == 1, "another seed is another result"


def test_a_named_run_is_trained_once(tmp_path):
    a = lab(folder=tmp_path).run("small-cnn:widths=[2,4]", name="supernet", epochs=2)
    b = lab(folder=tmp_path).run("small-cnn:widths=[2,4]", name="supernet", epochs=2)
    assert b.steps_done == a.steps_done == 8
    assert not len(b.data.split.test)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_search_needs_validation_rows():
    data = tiny_images()
    bare = dataclasses.replace(data, split=dataclasses.replace(data.split, val=data.split.val[:0]))
    with pytest.raises(Mistake, match="a search judges on the validation part, and there is none"):
        Lab("small-cnn", bare, 100.0)
    with pytest.raises(Mistake, match="allows no single trial"):
        lab().best()


@pytest.fixture
def try_some(tmp_path):
    known = list(parts._own)
    (tmp_path / "try_some.py").write_text(SEARCH)
    parts.add_path(tmp_path / "try_some.py")
    yield tmp_path / "try_some.py"
    parts._own[:] = known
    parts.find.cache_clear()


def test_both_get_the_same_budget(try_some, tmp_path):
    search = parts.make("try-some")
    found, random = beside(search, tiny_images(), 4 * lab().of_training(1), folder=tmp_path / "s", **USUAL)
    assert found.images == random.images == pytest.approx(4 * lab().of_training(1))
    assert len(found.trials) == len(random.trials) == 4
    assert found.trials != random.trials, "the random search draws by a seed of its own"


def test_one_trial_is_always_granted_to_the_random_search(try_some):
    desk = lab(budget=lab().of_training(1))
    assert len(at_random(parts.make("try-some"), desk).trials) == 1


def test_a_find_is_data():
    text = card_text("mine", "small-cnn", "Mine", {"mine-1": {"widths": [2, 4], "x": "a'b"}})
    assert "import" not in text.replace("from convince.parts import Card", "")
    with pytest.raises(Mistake, match="'resnet8' is the name of a part already"):
        card_text("resnet8", "small-cnn", "Mine", {"mine-1": {}})
    with pytest.raises(Mistake, match="lower-case letters"):
        card_text("My Net", "small-cnn", "Mine", {"mine-1": {}})
    with pytest.raises(Mistake, match="cannot be written to a card"):
        card_text("mine", "small-cnn", "Mine", {"mine-1": {"widths": float("inf")}})


def command(*words, cwd):
    return [sys.executable, "-m", "convince", "search", *words], {"cwd": cwd, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def test_the_command_and_a_kill(try_some, tmp_path):
    """Killed with SIGKILL after two trials and started again, a search ends with what an undisturbed one finds; the find is trained by name."""
    words = ["--parts", str(try_some), "--with", "try-some", "--trials", "5", "--json", "--out"]
    line, how = command(*words, "whole", cwd=tmp_path)
    whole = json.loads(subprocess.run(line, capture_output=True, text=True, check=True, **how).stdout)
    line, how = command(*words, "killed", cwd=tmp_path)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    cells = tmp_path / "killed" / "search" / "cells.json"
    until = time.monotonic() + 120
    while time.monotonic() < until and (not cells.exists() or len(json.loads(cells.read_text())) < 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = json.loads(cells.read_text())
    assert len(kept) >= 2
    again = json.loads(subprocess.run(line, capture_output=True, text=True, check=True, **how).stdout)
    assert json.loads(cells.read_text()).items() >= kept.items(), "what was kept is not done again"
    for key in ("found", "random"):
        assert {k: v for k, v in again[key].items() if k != "seconds"} == {k: v for k, v in whole[key].items() if k != "seconds"}
    train = [sys.executable, "-m", "convince", "train", "--parts", whole["file"], "--model", "found-try-some-0", "--epochs", "1", "--out", "run", "--json"]
    done = json.loads(subprocess.run(train, capture_output=True, text=True, check=True, **how).stdout)
    assert done["model"] == "found-try-some-0"
    evaluate = [sys.executable, "-m", "convince", "evaluate", "run", "--json"]
    assert json.loads(subprocess.run(evaluate, capture_output=True, text=True, check=True, **how).stdout)["test"]["accuracy"] == done["test"]["accuracy"]
    assert (tmp_path / "run" / "parts" / "found.py").exists(), "the card is copied into the run, and being data needs no --trust"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--with", "cutmix"), "is of kind technique, not a search"),
        (("--with", "try-some", "--trials", "3", "--budget", "9"), "both name the budget"),
        (("--with", "try-some", "--seeds", "1"), "at least 2 for an interval"),
    ],
)
def test_mistakes_of_the_command(words, message, try_some, tmp_path):
    line, how = command("--parts", str(try_some), *words, cwd=tmp_path)
    done = subprocess.run(line, capture_output=True, text=True, **how)
    assert done.returncode == 2
    assert message in done.stderr
    assert not Path(tmp_path / "runs").exists()


def test_a_run_outside_of_keep_takes_seconds_too(tmp_path):
    """Inside of it they are counted once; a run that was kept brings its earlier seconds along."""
    lab = Lab("resnet", tiny_images(), 1e6, folder=tmp_path)
    lab.run("resnet8", name="one", epochs=1)
    alone = lab.seconds
    assert alone > 0
    kept = json.loads((tmp_path / "cells.json").read_text())
    assert kept == {"run one": {"seconds": alone}}
    lab.keep("two", 0, lambda: lab.run("resnet8", epochs=1).images)
    row = next(row for name, row in lab._kept.items() if name != "run one")
    assert lab.seconds == alone + row["seconds"]
    again = Lab("resnet", tiny_images(), 1e6, folder=tmp_path)
    again.run("resnet8", name="one", epochs=1)
    assert again.seconds > alone
