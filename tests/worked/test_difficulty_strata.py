"""Difficulty strata by hand: counts, levels, tables, error consistency, files, and the stand-in panel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.claims.cifar10_humans_vs_dnn import judge, people
from convince.diagnose.difficulty_strata import (
    DifficultyStrata,
    accuracy_by_level,
    answer_counts,
    compare_to_humans,
    difficulty_levels,
    error_consistency,
    generalisation_gap,
    halves,
    human_panel,
    read_answers,
    stand_in_panel,
)
from convince.errors import Mistake
from convince.fit.answer import Scores


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def flags(text):
    return torch.tensor([c == "1" for c in text])


def test_worked_error_consistency():
    """The row's ten items: c_obs = 0.8, c_exp = 0.58, kappa = 0.52381."""
    model, human = flags("1101011101"), flags("1100111101")
    assert error_consistency(model, human) == pytest.approx(0.22 / 0.42)
    assert error_consistency(model, model) == pytest.approx(1)
    assert math.isnan(error_consistency(flags("111"), flags("111")))


def test_a_share_stands_for_an_annotator_at_random():
    """With equal accuracies, kappa with the share is the mean of the kappas with each."""
    model, one, two = flags("110100"), flags("110010"), flags("011100")
    both = error_consistency(model, (one.double() + two.double()) / 2)
    assert both == pytest.approx((error_consistency(model, one) + error_consistency(model, two)) / 2)


def test_worked_panel():
    answers = torch.tensor([[0, 1, -1, 2], [0, 2, -1, 2], [0, 1, -1, 0]])
    counts = answer_counts(answers, 3)
    assert counts.tolist() == [[3, 0, 0], [0, 2, 1], [0, 0, 0], [1, 0, 2]]
    panel = human_panel(counts, torch.tensor([0, 1, 0, 0]), gen())
    assert panel.right[[0, 1, 3]].tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert math.isnan(panel.right[2])
    assert panel.majority.tolist() == [0, 1, -1, 2]
    assert panel.entropy[0] == 0
    assert float(panel.entropy[1]) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert panel.accuracy == pytest.approx(2 / 3)
    assert panel.low < 2 / 3 < panel.high
    with pytest.raises(Mistake, match=r"classes lie in 0\.\.1"):
        answer_counts(answers, 2)
    with pytest.raises(Mistake, match="no image has an answer"):
        human_panel(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), gen())


def test_levels_of_six_answers():
    right = torch.tensor([6, 5, 4, 3, 2, 1, 0]) / 6
    assert difficulty_levels(right).tolist() == [1, 2, 3, 4, 5, 6, 6]
    assert difficulty_levels(right, edges=(1.0, 0.8, 0.5)).tolist() == [1, 2, 3, 3, 4, 4, 4]
    assert difficulty_levels(torch.tensor([math.nan, 1.0])).tolist() == [0, 1]
    assert difficulty_levels(torch.tensor([math.nan, 1.0]), edges=(1.0,)).tolist() == [0, 1]
    with pytest.raises(Mistake, match="must fall"):
        difficulty_levels(right, edges=(0.5, 1.0))
    with pytest.raises(Mistake, match="n_levels=1"):
        difficulty_levels(right, 1)


@given(st.integers(2, 9), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_levels_fall_with_the_share_and_only_unanimity_is_level_one(n_levels, answers):
    right = torch.arange(answers + 1) / answers
    levels = difficulty_levels(right, n_levels)
    assert levels[-1] == 1
    assert bool((levels[:-1] > 1).all())
    assert bool((levels.diff() <= 0).all())
    assert levels[0] == n_levels


def test_tables_by_level():
    right, levels = flags("111010"), torch.tensor([1, 1, 2, 2, 3, 0])
    rows = accuracy_by_level(right, levels)
    assert [(r.level, r.n, r.accuracy) for r in rows] == [(1, 2, 1.0), (2, 2, 0.5), (3, 1, 1.0)]
    assert rows[1].low < 0.5 < rows[1].high
    assert generalisation_gap(right, flags("100010"), levels) == {1: 0.5, 2: 0.5, 3: 0.0}


def test_models_beside_people():
    y = torch.tensor([0, 1, 0, 1])
    panel = human_panel(torch.tensor([[4, 0], [0, 4], [4, 0], [2, 2]]), y, gen())
    found = compare_to_humans({"a": torch.tensor([0, 0, 0, 1]), "b": torch.tensor([1, 0, 0, 1])}, y, panel)
    assert found.easy.tolist() == [0, 1, 2]
    assert found.hard_for_nets.tolist() == [1]
    assert found.models["a"]["accuracy"] == 0.75
    assert found.models["a"]["accuracy_easy"] == pytest.approx(2 / 3)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_halves_deal_every_answer_once(seed):
    counts = torch.randint(0, 4, (7, 3), generator=gen(seed))
    a, b = halves(counts, gen(seed + 1))
    assert torch.equal(a + b, counts)
    assert torch.equal(a.sum(1), counts.sum(1) // 2)


def test_half_a_panel_is_a_fair_draw():
    counts = torch.tensor([[6, 2]]).repeat(4000, 1)
    a, _ = halves(counts, gen())
    assert float(a[:, 0].double().mean()) == pytest.approx(3, abs=0.05)


def test_files_of_answers(tmp_path):
    np.save(tmp_path / "c.npy", np.array([[2.0, 1], [0, 3]]))
    assert read_answers(tmp_path / "c.npy", 2, 2).tolist() == [[2, 1], [0, 3]]
    (tmp_path / "a.csv").write_text("image,annotator,answer\n0,ann,1\n0,bob,1\n1,ann,0\n")
    assert read_answers(tmp_path / "a.csv", 3, 2).tolist() == [[0, 2], [1, 0], [0, 0]]
    with pytest.raises(Mistake, match=r"tells of 2 images and 2 classes, and 5 images of 2 classes .* --images 2"):
        read_answers(tmp_path / "c.npy", 5, 2)
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(Mistake, match="columns image, annotator, answer"):
        read_answers(tmp_path / "b.csv", 3, 2)
    np.save(tmp_path / "d.npy", np.array([[0.5, 0.5]]))
    with pytest.raises(Mistake, match="whole numbers"):
        read_answers(tmp_path / "d.npy", 1, 2)
    with pytest.raises(Mistake, match="not readable"):
        read_answers(tmp_path / "none.npy", 1, 2)


def blobs(n=200, noise=0.3):
    y = torch.arange(n) % 3
    x = torch.zeros(n, 1, 4, 4)
    x[torch.arange(n), 0, y] = 1
    return x + noise * torch.randn(x.shape, generator=gen()), y


def test_the_stand_in_panel_finds_noisy_images_hard():
    x, y = blobs()
    x[:50] += 3 * torch.randn(50, 1, 4, 4, generator=gen(1))
    counts = stand_in_panel(x, y, 3)
    assert bool((counts.sum(1) == 6).all())
    right = human_panel(counts, y, gen()).right
    assert float(right[50:].mean()) > 0.9
    assert float(right[:50].mean()) < 0.7
    assert torch.equal(counts, stand_in_panel(x, y, 3))


class Fixed(nn.Module):
    """Answers class 0 for the first image and the right one elsewhere."""

    def __init__(self, y):
        super().__init__()
        self.y = y

    def forward(self, x):
        return nn.functional.one_hot(self.y[: len(x)], 3).float()


def test_probe_reads_a_file_of_people(tmp_path):
    x, y = blobs(20)
    said = y.clone()
    said[0] = (y[0] + 1) % 3
    counts = 4 * nn.functional.one_hot(y, 3)
    counts[1] = torch.tensor([1, 2, 1])
    np.save(tmp_path / "c.npy", counts.numpy())
    found = DifficultyStrata(answers=str(tmp_path / "c.npy")).probe(Fixed(said), x, y)
    named = {r.name: r.value for r in found.readings}
    assert named["accuracy"] == pytest.approx(0.95)
    assert named["accuracy of people"] == pytest.approx((19 + 0.5) / 20)
    assert named["accuracy, level 1 of 6 by people"] == pytest.approx(18 / 19)
    assert named["wrong where all people are right"] == pytest.approx(1 / 19)
    assert named["accuracy of other people, level 1"] > 0.9


def test_probe_without_people_and_on_tables():
    x, y = blobs(60)
    for images in (x, x.flatten(1)):
        found = DifficultyStrata().probe(Fixed(y), images, y)
        assert any("stand-in learners" in r.name for r in found.readings)
        assert found == DifficultyStrata().probe(Fixed(y), images, y)


def test_errors_name_the_part(tmp_path):
    x, y = blobs(20)
    with pytest.raises(Mistake, match="difficulty-strata: levels=1"):
        DifficultyStrata(levels=1)
    with pytest.raises(Mistake, match="difficulty-strata: 3 images"):
        DifficultyStrata().probe(Fixed(y), x[:3], y[:3])
    np.save(tmp_path / "one.npy", nn.functional.one_hot(y, 3).numpy())
    with pytest.raises(Mistake, match="no image has two answers"):
        DifficultyStrata(answers=str(tmp_path / "one.npy")).probe(Fixed(y), x, y)


def panel_numbers(sign=1.0):
    levels = {f"level {i}": 0.95 - 0.1 * i for i in range(1, 7)}
    row = {"spearman": 0.85 * sign, "shuffled": 0.01, **(levels if sign > 0 else dict(zip(levels, reversed(levels.values()), strict=True)))}
    return {"panel": {str(seed): {**row, "kappa_self": 1.0, "kappa_random": 0.01} for seed in range(5)}}


def test_the_claim_fails_when_the_sorting_is_reversed():
    verdict, (facts, _) = judge(panel_numbers())
    assert verdict == "inconclusive", "no people were asked"
    assert facts["part 1"] == "supported"
    assert judge(panel_numbers(-1.0))[0] == "contradicted"


def test_the_claim_with_people():
    y = torch.arange(400) % 2
    right = torch.arange(400) % 10 > 0
    counts = 4 * nn.functional.one_hot(y, 2)
    counts[:80] = torch.tensor([2, 2])
    wrong = torch.where(right, y, 1 - y)
    found = people(Scores(nn.functional.one_hot(wrong, 2).float(), y, torch.arange(400)), counts, 0)
    assert found["accuracy"] == 0.9
    assert found["panel"] == pytest.approx(0.9)
    assert found["error"] == pytest.approx(0.1, abs=0.02)
    assert 0 < found["error_low"] < found["error"]
    above = {"people": {"0": {**found, "panel": 0.85, "panel_error": 0.0}}}
    assert judge({**panel_numbers(), **above})[0] == "supported"
    below = {"people": {"0": {**found, "panel": 0.95, "panel_error": 0.0}}}
    assert judge({**panel_numbers(), **below})[0] == "inconclusive", "the network is below the panel"
    none = {"people": {"0": {**found, "error": 0.0, "error_low": 0.0}}}
    assert judge({**panel_numbers(), **none})[0] == "contradicted"
