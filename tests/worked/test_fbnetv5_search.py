"""FBNetV5's search by hand: odds, ratios and the shared estimate of the gradient; masks and targets of lane sampling; what a search returns."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convince import parts
from convince.backbones.lane_net import LaneNet, Topology, macs, whole
from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.search.fbnetv5_search import MultiTaskSearch, estimate, log_odds, ratio, reward, score
from convince.search.lab import Lab
from convince.search.lane_sampling import NAME, TaskHeads, by_contrast, cell_of, drawn, further, otsu, places, task_losses, topology

HOW = {"batch": 8, "precision": "fp32", "kernels": {}, "lr": 0.05, "augment": "none"}
MODEL = "lane-net:widths=(4,6),blocks=['11','11'],fusions=['11','11'],expansion=2"


def logit(p):
    return math.log(p / (1 - p))


# -- odds and their gradient -------------------------------------------------------------------------


def test_worked_update():
    """p_t = 0.8, p_s = 0.5. a = 1: ratio 1.6, gradient 0.2, update 0.32; a = 0: ratio 0.4, gradient -0.8, update -0.32; their mean under s is 0."""
    own, source, one = torch.tensor([[logit(0.8)]]).double(), torch.tensor([0.0]).double(), torch.ones(1).double()
    updates = []
    for a, wanted in ((1.0, (1.6, 0.2, 0.32)), (0.0, (0.4, -0.8, -0.32))):
        mask = torch.tensor([a]).double()
        updates.append(float(estimate(own, source, mask, one)))
        assert (float(ratio(own, source, mask)), float(score(own, mask)), updates[-1]) == pytest.approx(wanted)
    assert 0.5 * sum(updates) == pytest.approx(0)


def test_worked_reward():
    assert reward(0.5, cost=120, target=100, penalty=2) == pytest.approx(-0.9)
    assert reward(0.5, cost=80, target=100, penalty=2) == -0.5


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_odds_of_all_masks_sum_to_one(logits):
    logits = torch.tensor(logits).double()
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).double()
    assert float(sum(log_odds(logits, mask).exp() for mask in masks)) == pytest.approx(1)
    p = logits.sigmoid()
    assert float(log_odds(logits, masks[5]).exp()) == pytest.approx(float((1 - p[0]) * p[1] * (1 - p[2]) * p[3])), "0101"


def toy():
    gen = generator("toy of four choices")
    logits, rewards = torch.randn(3, 4, generator=gen).double(), torch.randn(16, 3, generator=gen).double()
    return logits, rewards, torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).double(), gen


def test_the_shared_estimate_has_no_bias():
    """Rewards of 16 masks, enumerated: the mean of 20,000 draws from one task's odds is every task's gradient, within 3 standard errors."""
    logits, rewards, masks, gen = toy()
    own = logits.clone().requires_grad_()
    odds = torch.stack([log_odds(own, mask).exp() for mask in masks])
    (truth,) = torch.autograd.grad((odds * rewards).sum(), own)
    each = torch.stack([estimate(logits, logits[1], mask, row, None) for mask, row in zip(masks, rewards, strict=True)])
    torch.testing.assert_close((odds.detach()[:, 1, None, None] * each).sum(0), truth)
    rows = each[torch.multinomial(odds.detach()[:, 1], 20_000, replacement=True, generator=gen)]
    assert ((rows.mean(0) - truth).abs() <= 3 * rows.std(0) / 20_000**0.5).all()


def test_the_clipped_estimate_has_some():
    logits, rewards, masks, _ = toy()
    odds = torch.stack([log_odds(logits, mask).exp() for mask in masks])
    each = {clip: torch.stack([estimate(logits, logits[1], mask, row, clip) for mask, row in zip(masks, rewards, strict=True)]) for clip in (None, 10.0, 1.0)}
    mean = {clip: (odds[:, 1, None, None] * values).sum(0) for clip, values in each.items()}
    bias = {clip: float((mean[clip] - mean[None]).abs().max()) for clip in (10.0, 1.0)}
    assert 0 < bias[10.0] < bias[1.0], "a ratio of 1 throughout is the worst"
    assert mean[1.0][1].tolist() == pytest.approx(mean[None][1].tolist()), "for the task that was drawn from it is exact"


def test_odds_move_by_the_formula():
    """The first two masks set the averages: rewards 1 and 3 give baseline 2, spread 2; the third, 4, moves by step * (4 - 2) / 2 * (a - p)."""
    odds = MultiTaskSearch(1, 2, step=0.5)
    masks = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()
    for mask, found in zip(masks, (1.0, 3.0, 4.0), strict=True):
        assert odds.logits.tolist() == [[0, 0]]
        odds.tell(0, mask, [found])
    assert odds.logits.tolist() == [[0.25, 0.25]]
    assert float(odds.baseline) == pytest.approx(8 / 3)
    assert float(odds.spread) == pytest.approx(2), "the mean of |3 - 1| and |4 - 2|"


def test_one_search_serves_tasks_that_disagree():
    """Task 0 wants all choices on, task 1 all off, task 2 the first half."""
    odds, gen = MultiTaskSearch(3, 6), generator("disagree")
    wants = torch.tensor([[1.0] * 6, [0.0] * 6, [1.0] * 3 + [0.0] * 3]).double()
    for _ in range(600):
        task, mask = odds.draw(gen)
        odds.tell(task, mask, (-(mask - wants).abs().sum(1)).tolist())
    assert [odds.best(task, [], lambda mask: True) for task in range(3)] == wants.long().tolist()


def test_what_is_returned_keeps_the_limit():
    odds = MultiTaskSearch(1, 3)
    odds.logits = torch.tensor([[3.0, 1.0, -1.0]]).double()

    def fits(mask):
        return sum(mask) <= 1

    assert odds.best(0, [], lambda mask: True) == [1, 1, 0]
    assert odds.best(0, [(1, 1, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)], fits) == [1, 0, 0]
    assert odds.best(0, [(1, 1, 0)], fits) is None


# -- lane sampling -------------------------------------------------------------------------------------


def test_choices_of_a_super_network():
    assert places(2, 2) == ["block 0.0", "block 0.1", "block 1.1", "join 0.0>1", "join 1.0>1", "join 1.1>0"]
    assert len(places(3, 2)) == 12
    assert len(places(3, 4)) == 30
    assert topology(set(places(2, 2)), 2, 2) == whole(2, 2).pruned() == Topology(("11", "01"), ("10", "11"))
    assert topology({"block 1.1", "join 1.1>0", "join 1.0>1"}, 2, 2) == Topology(("00", "00"), ("00", "10")), "what reads an empty lane goes"
    assert drawn(2, 2, 0.0, generator(0)) == whole(2, 2).pruned()
    shares = [sum(map(int, "".join(drawn(1, 8, 0.25, generator(i)).blocks))) / 8 for i in range(300)]
    assert abs(sum(shares) / 300 - 0.75) < 0.03


def test_thresholds_and_masks_by_hand():
    assert float(otsu(torch.tensor([[0.1, 0.1, 0.15, 0.9, 0.95, 0.9]]))) == pytest.approx(5 / 32), "the first that splits the two groups"
    x = torch.full((2, 1, 6, 6), 0.2)
    x[0, :, 1, 2:4] = 0.9
    mask = by_contrast(x)
    wanted = torch.zeros(6, 6, dtype=torch.bool)
    wanted[1, 2:4] = True
    assert torch.equal(mask[0], wanted)
    assert not mask[1].any(), "a picture of one colour has nothing in it"
    assert cell_of(mask, 3).tolist() == [0 * 3 + 1, 1 * 3 + 1], "centre at 1.5 rows and 3 columns of 6; the middle where there is none"


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 7))
def test_the_cell_of_a_pixel(row, column, grid):
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[0, row, column] = True
    assert int(cell_of(mask, grid)) == int((row + 0.5) * grid / 7) * grid + int((column + 0.5) * grid / 7)


def test_heads_sum_over_lanes():
    torch.manual_seed(0)
    heads = TaskHeads({0: 3, 1: 2}, 2)
    lanes = {0: torch.randn(2, 3, 4, 4), 1: torch.randn(2, 2, 2, 2)}
    centre, mask = heads(lanes)
    torch.testing.assert_close(centre, (F.avg_pool2d(heads.centre["0"](lanes[0]), 2) + heads.centre["1"](lanes[1])).flatten(1))
    up = heads.mask["1"](lanes[1]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(mask, (heads.mask["0"](lanes[0]) + up)[:, 0])
    target = torch.rand(2, 4, 4) > 0.5
    losses = further(heads, lanes, target)
    torch.testing.assert_close(losses[0], -centre.log_softmax(1).gather(1, cell_of(target, 2)[:, None])[:, 0])
    p = mask.sigmoid()
    torch.testing.assert_close(losses[1], -torch.where(target, p.log(), (1 - p).log()).mean((1, 2)))
    alone = heads({0: lanes[0]})
    torch.testing.assert_close(alone[1], heads.mask["0"](lanes[0])[:, 0])


def test_a_judged_part_leaves_the_super_network_alone():
    run = prepare(make(model=MODEL, epochs=1, parts=("lane-sampling:grid=3",), **HOW), tiny_images())
    fit(run)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    rows = run.data.split.train
    full, part = whole(2, 2).pruned(), Topology(("10", "00"), ("00", "00"))
    found = [task_losses(run, one, rows) for one in (full, part, full)]
    assert found[0] == found[2] != found[1]
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
    assert run.model.now is None
    x = run.normalise(run.plan.pixels(run.data.x.take(rows)))
    with run.still(), torch.no_grad():
        wanted = F.cross_entropy(run.model.train()(x), run.data.y[rows])
    assert found[0][0] == pytest.approx(float(wanted), rel=1e-5), "the whole network, normalised by the batch itself"


def test_own_masks_are_learnt():
    """The data's masks, where they have some, are the target: all of the picture is learnt to be inside."""
    data = tiny_images()
    data.extra["mask"] = torch.ones(48, 8, 8, dtype=torch.bool)
    run = prepare(make(model=MODEL, epochs=6, parts=("lane-sampling:grid=3",), **HOW), data)
    fit(run)
    label, centre, mask = task_losses(run, whole(2, 2).pruned(), data.split.train)
    assert centre < 0.75 * math.log(9), "always the middle cell"
    assert mask < 0.75 * math.log(2)
    assert label < math.log(3)
    assert isinstance(run.extra[NAME], TaskHeads)
    assert isinstance(run.model, LaneNet)


# -- the search ------------------------------------------------------------------------------------------


def test_the_find_keeps_its_limit_and_the_notes_tell_each_task():
    search = parts.make("fbnetv5-search", trial_epochs=1, widths=(4, 6), columns=2, expansion=2, limit=0.7, look=8, grid=3, samples=30)
    lab = Lab("lane-net", tiny_images(), 220.0, **{k: v for k, v in HOW.items() if k != "augment"})
    found = search.find(lab)
    notes = search.notes()
    assert found == notes["tasks"]["label"]["options"]
    assert set(notes["tasks"]) <= {"label", "centre", "mask"}
    most = 0.7 * macs(whole(2, 2), (4, 6), 2, (8, 8), 3, 1)
    assert all(row["macs"] <= most and 0 < row["odds"] <= 1 for row in notes["tasks"].values())
    assert notes["looked_at"] <= notes["drawn"] <= 30
    epochs = notes["supernet_epochs"]
    assert lab.spent == pytest.approx(32 * epochs + notes["looked_at"] * 8 / 3), "a part that is drawn again costs nothing"


def test_the_space_keeps_the_limit():
    search = parts.make("fbnetv5-search", widths=(4, 6), columns=2, expansion=2, limit=0.7)
    space = search.space(tiny_images())
    assert space.size == 2**6
    kept = list(space.all())
    assert 0 < len(kept) < 64
    most = 0.7 * macs(whole(2, 2), (4, 6), 2, (8, 8), 3, 1)
    for genes in kept:
        options = space.options(genes)
        assert macs(Topology(tuple(options["blocks"]), tuple(options["fusions"])), (4, 6), 2, (8, 8), 3, 1) <= most


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0.0}, "shares of the whole network's multiply-adds"),
        ({"samples": 1}, "samples and look must be at least 2"),
        ({"clip": 0.5}, "columns and clip at least 1"),
        ({"widths": (0, 4)}, "all at least 1"),
        ({"limit": 0.01}, "stem and head alone take .* give a larger limit"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(Mistake, match=message):
        parts.make("fbnetv5-search", **options).space(tiny_images())


def test_networks_that_cannot_be_sampled_are_refused():
    with pytest.raises(Mistake, match="the network is 'resnet8'; use --model lane-net-largest"):
        fit(prepare(make(model="resnet8", parts=("lane-sampling",), epochs=1, **HOW), tiny_images()))
    with pytest.raises(Mistake, match="'lane-net-mini' leaves some out"):
        fit(prepare(make(model="lane-net-mini", parts=("lane-sampling",), epochs=1, **HOW), tiny_images()))
    with pytest.raises(Mistake, match="chance from 0"):
        parts.make("lane-sampling", chance=1.0)
    data = tiny_images()
    data.extra["mask"] = torch.ones(48, 8, 8)
    with pytest.raises(Mistake, match="masks do not move with the pictures under --augment"):
        fit(prepare(make(model=MODEL, parts=("lane-sampling",), epochs=1, **{**HOW, "augment": "crop"}), data))
