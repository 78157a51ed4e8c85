"""NASNet search by hand: the space, mutation, who dies, PPO's objective, a controller that learns, no candidate trained twice."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.backbones.nasnet import OPS, genotype
from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.search.lab import Lab
from convince.search.nasnet_search import Controller, NasnetSearch, at_random, cell_space, clipped, controller, evolution, mutated
from convince.search.space import Space


def toy(genes=6, values=4):
    """Settings whose reward is the share of genes that are 0."""
    space = Space({f"g{i}": tuple(range(values)) for i in range(genes)}, dict)
    return space, lambda found: sum(value == 0 for value in found.values()) / genes


def test_the_space_has_the_papers_choices():
    space = cell_space(tuple(OPS), 5, ("+", "|"), cells=1)
    assert len(space.choices) == 2 * 5 * 5
    assert len(OPS) == 13
    assert space.choices["normal 1 from"] == (0, 1)
    assert space.choices["reduction 5 and"] == (0, 1, 2, 3, 4, 5)
    per_cell = [(k + 1) ** 2 * 13**2 * 2 for k in range(1, 6)]
    assert space.size == (per_cell[0] * per_cell[1] * per_cell[2] * per_cell[3] * per_cell[4]) ** 2


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_every_setting_is_a_genotype(seed):
    space = cell_space(("sep3", "identity"), 3, ("+", "|"), cells=1, filters=8)
    options = space.options(next(space.draws(seed)))
    assert {**options, "normal": "", "reduction": ""} == {"normal": "", "reduction": "", "cells": 1, "filters": 8}
    assert [len(genotype(options[cell]).blocks) for cell in ("normal", "reduction")] == [3, 3]


def test_a_setting_in_words():
    space = cell_space(("sep3", "avg3"), 2, ("+", "|"))
    genes = {name: values[-1] for name, values in space.choices.items()} | {"normal 1 left": "sep3", "normal 1 joined": "+"}
    assert space.options(genes) == {"normal": "sep3(1)+avg3(1) avg3(2)|avg3(2)", "reduction": "avg3(1)|avg3(1) avg3(2)|avg3(2)"}


@given(st.integers(0, 1000))
def test_a_mutation_changes_one_gene(seed):
    space, _ = toy()
    genes = {f"g{i}": 1 for i in range(6)}
    child = mutated(space, genes, generator(seed))
    assert sum(child[name] != genes[name] for name in genes) == 1
    assert mutated(Space({"a": (1,)}, dict), {"a": 1}, generator(seed)) == {"a": 1}, "where nothing can change, nothing does"
    narrow = Space({"a": (0, 1, 2), "b": (0, 1, 2)}, dict, lambda found: found["a"] + found["b"] <= 1)
    assert mutated(narrow, {"a": 0, "b": 0}, generator(seed)) in ({"a": 1, "b": 0}, {"a": 0, "b": 1})


@pytest.mark.parametrize("strategy", [at_random, evolution, controller])
@pytest.mark.parametrize("budget", [1, 7, 30])
def test_a_strategy_asks_as_often_as_it_may_and_repeats(strategy, budget):
    space, reward = toy()

    def asked(seed):
        found = []
        strategy(space, lambda genes: found.append(genes) or reward(genes), budget, seed)
        return found

    assert len(asked(0)) == budget
    assert asked(0) == asked(0) != asked(1)


def test_the_oldest_dies_and_parents_are_alive():
    space, reward = toy()
    asked = []
    evolution(space, lambda genes: asked.append(genes) or reward(genes), 40, 0, population=5, sample=5)

    def distance(a, b):
        return sum(a[name] != b[name] for name in a)

    for at in range(5, 40):
        alive = asked[at - 5 : at]
        best = max(alive, key=reward)  # with sample = population the parent is the best alive, of equals one of them
        assert any(distance(asked[at], parent) == 1 for parent in alive if reward(parent) == reward(best))


def test_evolution_finds_more_than_random_search():
    space, reward = toy(genes=10, values=5)

    def best(strategy, seed):
        found = []
        strategy(space, lambda genes: found.append(reward(genes)) or found[-1], 150, seed)
        return max(found)

    gains = [best(evolution, seed) - best(at_random, seed) for seed in range(5)]
    assert min(gains) > 0


def test_worked_objective():
    old = torch.zeros(4)
    log_p = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert float(clipped(log_p, old, advantage)) == pytest.approx((1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert float(clipped(log_p, log_p, advantage + 2)) == pytest.approx(2), "at ratio 1 it is the mean advantage"


def test_a_controllers_probabilities_are_a_distribution():
    net = Controller((2, 3, 2), hidden=8)
    everything = torch.tensor(list(itertools.product(range(2), range(3), range(2))))
    with torch.no_grad():
        log_p, entropy = net(everything)
    p = log_p.exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert float((p * entropy).sum()) == pytest.approx(float(-(p * log_p).sum()), abs=1e-5), "the chain rule of entropy"
    drawn = net.draw(2000, generator(0))
    shares = torch.stack([(drawn == row).all(1).float().mean() for row in everything])
    assert float((shares - p).abs().max()) < 0.04


def test_a_controller_learns():
    space, reward = toy()
    found = []
    controller(space, lambda genes: found.append(reward(genes)) or found[-1], 120, 0)
    assert sum(found[:8]) / 8 < 0.45, "settings drawn evenly have 0.25"
    assert sum(found[-20:]) / 20 > 0.7


@pytest.mark.parametrize("strategy", ["evolution", "random", "controller"])
def test_no_candidate_is_trained_twice(monkeypatch, strategy):
    """Of two cells with one block, one operation and two states there are 16 pairs; more than half of 24 settings come up again."""
    trained = []

    def train(lab, options, epochs):
        trained.append((options["normal"], options["reduction"]))
        lab.charge(lab.of_training(epochs))
        accuracy = sum(cell.count("1") for cell in trained[-1]) / 4
        lab.trials.append((options, accuracy))
        return accuracy

    monkeypatch.setattr(Lab, "train", train)
    lab = Lab("nasnet", tiny_images(), 1.0)
    lab.budget = 24 * lab.of_training(1)
    search = NasnetSearch(strategy=strategy, trial_epochs=1, ops=("avg3",), blocks=1, joined=("+",), filters=2)
    found = search.find(lab)
    assert len(trained) == len(set(trained)) <= 16
    assert found == max(lab.trials, key=lambda trial: trial[1])[0]
    assert search.notes()["candidates"] == len(trained)
    assert {key: found[key] for key in ("cells", "filters")} == {"cells": 1, "filters": 2}
    assert "stem" not in found


def test_large_images_get_the_photo_stem():
    assert NasnetSearch().space(tiny_images(side=65)).options(next(NasnetSearch().space(tiny_images(side=65)).draws(0)))["stem"] == "photo"


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="strategy='bayes' must be evolution, random or controller"):
        NasnetSearch(strategy="bayes")
    with pytest.raises(Mistake, match="blocks=0: must be at least 1"):
        NasnetSearch(blocks=0)
    with pytest.raises(Mistake, match=r"no operation 'sep9'.*Operations: identity"):
        NasnetSearch(ops=("sep9",))
    with pytest.raises(Mistake, match="joined=\\(\\): at least one operation"):
        NasnetSearch(joined=())
