"""Balanced mixture by hand: temperatures, the worked balancing, equal loads, draws, moving averages, sets of their own, the placement found, the budget."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convince import parts
from convince.backbones.pool_net import PoolNet
from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.search.balanced_mixture import BalancedMixture, rank_quality
from convince.search.balanced_supernets import MixtureSuperNet, assignment, balanced, from_even, halves, load, temperature
from convince.search.lab import LOOKED_AT, Lab

HOW = {"batch": 8, "precision": "fp32", "kernels": {}, "lr": 0.05, "augment": "none"}
MODEL = "pool-net:channels=(4,4,6),pools=(3,)"
W = torch.tensor([[0.6, 0.3], [0.6, 0.5], [0.4, 0.3]], dtype=torch.float64)
ZERO = torch.zeros(2, dtype=torch.float64)


def run_of(spec, **more):
    run = prepare(make(model=MODEL, parts=(spec,), **{"epochs": 1, **HOW, **more}), tiny_images())
    fit(run)
    return run


# -- formulas ----------------------------------------------------------------------------------------


def test_the_temperature_rises_linearly():
    assert [temperature(e, 4) for e in range(4)] == [1.0, 34.0, 67.0, 100.0]
    assert temperature(0, 1) == 1.0
    assert temperature(2, 5, 0.0, 0.0) == 0.0


def test_the_worked_balancing():
    first = assignment(W, 5, ZERO)
    torch.testing.assert_close(first, torch.tensor([[0.8176, 0.1824], [0.6225, 0.3775], [0.6225, 0.3775]], dtype=torch.float64), atol=5e-5, rtol=0)
    torch.testing.assert_close(load(first), torch.tensor([0.6875, 0.3125], dtype=torch.float64), atol=5e-5, rtol=0)
    assert from_even(load(first)) == pytest.approx(0.6875 * math.log(1.375) + 0.3125 * math.log(0.625), abs=1e-5)
    p = assignment(W, 5, balanced(W, 5, tolerance=1e-10))
    torch.testing.assert_close(p, torch.tensor([[0.6621, 0.3379], [0.4189, 0.5811], [0.4189, 0.5811]], dtype=torch.float64), atol=1e-4, rtol=0)
    assert load(p).tolist() == pytest.approx([0.5, 0.5], abs=1e-4)


def test_one_division_by_the_product_is_all_divisions_in_turn():
    p, product = assignment(W, 9, ZERO), ZERO
    for _ in range(4):
        q = load(p)
        p = p / q
        p = p / p.sum(1, keepdim=True)
        product = product + q.log()
        torch.testing.assert_close(assignment(W, 9, product), p)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(3, 36), st.sampled_from([1.0, 10.0, 100.0]))
def test_after_balancing_every_set_has_an_equal_load(seed, sets, places, heat):
    scores = 0.4 + 0.2 * torch.rand(places, sets, generator=generator(seed))
    p = assignment(scores, heat, balanced(scores, heat))
    assert load(p).tolist() == pytest.approx([1 / sets] * sets, abs=1e-2)
    assert p.sum(1).tolist() == pytest.approx([1.0] * places)


def test_a_set_that_lost_everything_gets_its_share_back():
    scores = torch.tensor([[1.0, 0.0]] * 6)  # exp(-100): a product of loads that no float holds
    p = assignment(scores, 100.0, balanced(scores, 100.0))
    torch.testing.assert_close(p, torch.full((6, 2), 0.5, dtype=torch.float64), atol=1e-2, rtol=0)


def test_tau_by_hand():
    assert rank_quality([0.1, 0.2, 0.3, 0.4], [1, 2, 4, 3]) == pytest.approx(4 / 6)  # 5 pairs agree, 1 does not
    assert rank_quality([0.1, 0.1, 0.1], [1, 2, 3]) == 0


# -- the super-networks ------------------------------------------------------------------------------


def test_placements_are_drawn_evenly_and_sets_by_their_shares():
    mixture, gen = MixtureSuperNet([PoolNet(3, 1, (4, 4, 6), (3,), shared=True) for _ in range(2)]), generator("draws")
    mixture.scores.copy_(W)
    counts = torch.zeros(3, 2)
    for _ in range(6000):
        counts[mixture.draw(5.0, gen)] += 1
    torch.testing.assert_close(counts.sum(1) / 6000, torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), assignment(W, 5, ZERO).float(), atol=0.05, rtol=0)


def test_halves_do_not_overlap_and_repeat():
    rows = torch.arange(100, 140)
    kept, held = halves(rows, 0.25, 3)
    assert (len(kept), len(held)) == (30, 10)
    assert sorted([*kept.tolist(), *held.tolist()]) == rows.tolist()
    assert all(torch.equal(a, b) for a, b in zip(halves(rows, 0.25, 3), (kept, held), strict=True))
    with pytest.raises(Mistake, match=r"balanced-supernets: held=0.1: of 2 images none is left"):
        halves(rows[:2], 0.1, 0)


def test_a_step_trains_one_set_and_scores_one_place(monkeypatch):
    steps = []
    draw = MixtureSuperNet.draw

    def watched(self, heat, gen):
        found = draw(self, heat, gen)
        steps.append((found, self.scores.clone(), [[p.detach().clone() for p in net.parameters()] for net in self.sets]))
        return found

    monkeypatch.setattr(MixtureSuperNet, "draw", watched)
    run = run_of("balanced-supernets:epochs=4,sets=2,look=16", pretrain_only=True)
    mixture = run.extra["balanced-supernets"]
    assert len(steps) == 2 * run.steps_done == 16  # 16 images of 32, by 8, 4 epochs; drawn for the step and again for its score
    monkeypatch.undo()
    ends = [*(s for s in steps[2::2]), (None, mixture.scores.clone(), [[p.detach().clone() for p in net.parameters()] for net in mixture.sets])]
    for ((c, m), scores, weights), after, again in zip(steps[::2], ends, steps[1::2], strict=True):
        assert again[0] == (c, m), "the step's placement and set are the ones that are scored"
        moved = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(weights, after[2], strict=True)]
        assert moved == [i == m for i in range(2)], "a set that is not drawn moves, by momentum or decay"
        changed = (after[1] != scores).nonzero().tolist()
        assert changed in ([[c, m]], [])
        seen = (float(after[1][c, m]) - 0.9 * float(scores[c, m])) / 0.1
        assert 8 * seen == pytest.approx(round(8 * seen), abs=1e-3), "an accuracy on a batch of 8"


def test_the_sets_differ_and_the_network_keeps_its_first_weights():
    run = run_of("balanced-supernets:epochs=1,sets=2,look=16", pretrain_only=True)
    plain = prepare(make(model=MODEL, epochs=0, **HOW), tiny_images())
    fit(plain)
    for (name, p), (_, q) in zip(run.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    mixture = run.extra["balanced-supernets"]
    a, b = (net.stem[0].weight for net in mixture.sets)
    assert not torch.equal(a, b)
    best = mixture.accuracies.amax(1)
    assert run.model.pools == mixture.placements[int(best.argmax())]
    assert run.edits == [{"part": "balanced-supernets", "spec": {"pools": list(run.model.pools)}}]


def test_at_temperature_zero_all_sets_are_even():
    assert assignment(W, 0.0, balanced(W, 0.0)).tolist() == [[0.5, 0.5]] * 3


def test_wrong_settings_are_refused():
    for bad in ("held=0", "sets=0", "epochs=-1", "look=0", "decay=1", "last=-1"):
        with pytest.raises(Mistake, match="balanced-supernets: "):
            parts.make(*parts.parse("balanced-supernets:" + bad)[:1], **parts.parse("x:" + bad)[1])
    with pytest.raises(Mistake, match="balanced-supernets moves the poolings of a pool-net"):
        fit(prepare(make(model="resnet:layers=(1,1),widths=(4,8)", parts=("balanced-supernets",), epochs=1, **HOW), tiny_images()))
    with pytest.raises(Mistake, match="balanced-supernets moves the poolings after 'mono-forward' has fitted classifiers"):
        fit(prepare(make(model=MODEL, parts=("balanced-supernets", "mono-forward"), epochs=1, **HOW), tiny_images()))


# -- the search --------------------------------------------------------------------------------------


def lab(budget, **more):
    return Lab("pool-net", tiny_images(), budget, 0, **{"batch": 8, "precision": "fp32", "kernels": {}, **more})


def test_the_search_spends_what_it_says_and_tells_every_placement():
    search = BalancedMixture(channels=(4, 4, 6), poolings=1, sets=2, look=6)
    judging, epoch = 3 * 2 * 6 * LOOKED_AT, 16 * (1 + LOOKED_AT)
    desk = lab(judging + 2.5 * epoch)
    found = search.find(desk)
    assert desk.spent == pytest.approx(judging + 2 * epoch)
    notes = search.notes()
    assert notes["supernet_epochs"] == 2
    assert sorted(row["pools"] for row in notes["placements"]) == [[1], [2], [3]]
    assert found == {"channels": [4, 4, 6], "pools": notes["placements"][0]["pools"]}
    assert notes["placements"][0]["accuracy"] == max(row["accuracy"] for row in notes["placements"])
    with pytest.raises(Mistake, match=r"balanced-mixture: 3 placements on 2 sets take 12 images to judge and 21 an epoch, and 20 are left"):
        search.find(lab(20.0))


def test_wrong_searches_are_refused():
    with pytest.raises(Mistake, match="balanced-mixture: poolings=3: must be at least 1 and fewer than the 3 blocks"):
        BalancedMixture(channels=(4, 4, 6), poolings=3)
    with pytest.raises(Mistake, match="balanced-mixture: 4 poolings need at least 16 pixels a side, and these images have 8"):
        BalancedMixture(poolings=4).space(tiny_images())
