"""Self-expanding by hand: the score of a toy, the rule, the optimiser's slots, runs that are killed and go on."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convince.backbones.expanding_cnn import ExpandingCnn, parameters
from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.state import named
from convince.fit.train import prepare
from convince.search.lab import Lab
from convince.search.self_expanding_search import SelfExpandingSearch
from convince.training import self_expanding
from convince.training.self_expanding import (
    SelfExpanding,
    choose,
    moments,
    natural_expansion_score,
    padded,
    proposals,
    regularised,
)

MODEL = "expanding-cnn:layers=(1,1),widths=(4,4),hidden=4"


def run_of(part, epochs=3, model=MODEL, parts=()):
    chosen = settings(model=model, parts=(part, *parts), batch=8, epochs=epochs, lr=0.05, precision="fp32", augment="none", kernels={}, checkpoint_seconds=0)
    return prepare(chosen, tiny_images())


def test_the_score_of_a_two_parameter_toy():
    """Gradients (1, 1) and (0, -1) of two examples: g = (1/2, 0), F = (1/2, 1), eta = (1/4) / (1/2)."""
    each = torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    assert natural_expansion_score(each.mean(0), each.square().mean(0), 0.0) == 0.5
    assert natural_expansion_score(each.mean(0), each.square().mean(0), 0.5) == 0.25
    assert natural_expansion_score(torch.zeros(2), torch.zeros(2)) == 0.0


def test_the_papers_first_layer_is_damped_by_about_half():
    assert regularised(1.0, 0) == 1.0
    assert regularised(2.0, 2336) == pytest.approx(2 * math.exp(-0.5456896))


def test_moments_are_those_of_single_examples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU(), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    first, second = moments(model, x, y, chunk=2)
    assert model.training
    model.eval()
    each = []
    for i in range(5):
        found = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        each.append(torch.cat([g.flatten() for g in found]))
    each = torch.stack(each)
    torch.testing.assert_close(first, each.mean(0))
    torch.testing.assert_close(second, each.square().mean(0))


def test_the_rule():
    scores = {("layer", 0): 3.0, ("layer", 1): 5.0, ("channels", 0): 4.0}
    assert choose(2.0, scores, 2.0) == ("layer", 1)
    assert choose(2.5, scores, 2.0) is None, "twice the score is not above twice the score"
    assert choose(1.0, {}, 0.0) is None
    model = ExpandingCnn(layers=(1, 3, 2), img_size=(8, 8))
    assert proposals(model, 3) == [("layer", 0), ("layer", 2), ("channels", 0), ("channels", 1), ("channels", 2)], "a full block can only be widened"


def test_an_optimisers_slots_are_made_longer():
    state = {
        "w": {"step": torch.tensor(7.0), "exp_avg": torch.tensor([[1.0, -1.0]]), "exp_avg_sq": torch.tensor([[1.0, 3.0]])},
        "f": {"rows": torch.ones(3)},
        "other": {"exp_avg": torch.ones(2)},
    }
    shapes = {"w": torch.Size([1, 2]), "f": torch.Size([1, 2]), "other": torch.Size([2])}
    found = padded(state, shapes, [("w", 0, 1), ("w", 1, 1), ("f", 1, 2), ("none", 0, 0)], 1)
    assert float(found["w"]["step"]) == 7.0
    assert found["w"]["exp_avg"].tolist() == [[1, 0, -1], [0, 0, 0]]
    assert found["w"]["exp_avg_sq"].tolist() == [[1, 2, 3], [2, 2, 2]]
    assert "f" not in found, "state of another shape than the parameter's starts anew"
    assert found["other"]["exp_avg"].tolist() == [1, 1]
    assert state["w"]["exp_avg"].shape == (1, 2), "what was given is not changed"


@pytest.mark.parametrize(("kind", "optimizer"), [("layer", ()), ("channels", ("adamw:lr=0.01",))])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, kind, optimizer):
    part = "self-expanding:tau=0,cooldown=1,images=8"
    monkeypatch.setattr(self_expanding, "proposals", lambda model, most_layers: [(kind, 0), (kind, 1)])

    class Killed(Exception):
        pass

    whole = run_of(part, parts=optimizer)
    fit(whole)
    grown = whole.team.seats[-1].technique.grown
    assert [row["kind"] for row in grown] == [kind, kind]
    for at in (4, 10):
        steps, path = 0, tmp_path / f"{at}.safetensors"

        def stop(done, total, text, at=at):
            nonlocal steps
            steps += 1
            if steps == at:
                raise Killed

        with contextlib.suppress(Killed):
            fit(run_of(part, parts=optimizer), path, stop)
        again = run_of(part, parts=optimizer)
        fit(again, path)
        assert again.team.seats[-1].technique.grown == grown
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, again.model.state_dict()[name]), (at, name)


def test_every_parameter_is_in_the_optimiser_once_and_keeps_its_slots():
    run = run_of("self-expanding:tau=0,cooldown=1,images=8", epochs=2, parts=("adamw:lr=0.01",))
    technique, kept = run.team.seats[-1].technique, {}
    plain = type(technique).on_epoch

    def watched(run):
        before = {name: run.optimizer.state[p]["exp_avg"].clone() for name, p in named(run) if p in run.optimizer.state}
        plain(technique, run)
        if technique.grown and not kept:
            kept.update(before)
            held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
            assert sorted(held) == sorted(id(p) for _, p in named(run))
            for name, p in named(run):
                if name in before:
                    slot, old = run.optimizer.state[p]["exp_avg"], before[name]
                    assert slot.shape == p.shape
                    assert float(slot.abs().sum()) == pytest.approx(float(old.abs().sum()), rel=1e-5)
                    assert slot.shape != old.shape or torch.equal(slot, old)
                else:
                    assert p not in run.optimizer.state, "a new layer's moments start anew"

    technique.on_epoch = watched
    fit(run)
    assert kept


def test_the_limits_are_kept():
    size = parameters((1, 1), (4, 4), 3, 1, (8, 8), 4)
    run = run_of(f"self-expanding:tau=0,cooldown=1,images=8,most_parameters={size + 100}", epochs=4)
    fit(run)
    assert size < sum(p.numel() for p in run.model.parameters()) <= size + 100
    run = run_of("self-expanding:tau=0,cooldown=1,images=8,most=1", epochs=4)
    fit(run)
    assert len(run.team.seats[-1].technique.grown) == 1
    run = run_of("self-expanding:tau=0,cooldown=3,images=8", epochs=5)
    fit(run)
    assert [row["epoch"] for row in run.team.seats[-1].technique.grown] == [1, 4]


def test_random_proposals_are_of_the_scores_kind():
    run = run_of("self-expanding:tau=0,cooldown=1,images=8,choice=random,most_layers=1", epochs=4)
    fit(run)
    assert {row["kind"] for row in run.team.seats[-1].technique.grown} == {"channels"}


def test_what_cannot_grow_is_refused():
    with pytest.raises(Mistake, match=r"grows an expanding-cnn, and the network is 'resnet20'"):
        fit(run_of("self-expanding", model="resnet20"))
    with pytest.raises(Mistake, match="'phnn' has changed the network"):
        fit(run_of("self-expanding", parts=("phnn:n=1",)))
    for options, words in (
        ({"tau": -1}, "tau=-1"),
        ({"noise": 0.0}, "never learn"),
        ({"choice": "best"}, "'score' or 'random'"),
        ({"cooldown": 0}, "cooldown=0"),
    ):
        with pytest.raises(Mistake, match=words):
            SelfExpanding(**options)


def test_the_search_spends_its_budget_on_one_run_and_finds_its_size(tmp_path):
    search = SelfExpandingSearch(trial_epochs=1, layers=(1, 1), widths=(4, 4), hidden=4, drop=0.0, tau=0.0, cooldown=1, images=8, most=3, most_parameters=1200)
    lab = Lab("expanding-cnn", tiny_images(), 32 * 4 + 40 * 3 + 8 / 3 + 20, 0, tmp_path, batch=8, precision="fp32", kernels={})
    found = search.find(lab)
    assert lab.spent == pytest.approx(32 * 4 + 40 * 3 + 8 / 3), "4 epochs, 3 scorings of 5 networks on 8 images, and one look at the validation part"
    assert [row["epoch"] for row in search.notes()["growths"]] == [1, 2, 3]
    assert (found["layers"], found["widths"]) == (search.notes()["growths"][-1]["layers"], search.notes()["growths"][-1]["widths"])
    space = search.space(lab.data)
    fits = [space.options(genes) for genes in space.all()]
    assert {"layers": found["layers"], "widths": found["widths"], "hidden": 4, "drop": 0.0} in fits
    assert all(parameters(row["layers"], row["widths"], 3, 1, (8, 8), 4) <= 1200 for row in fits)


def test_searches_that_cannot_begin_are_refused():
    with pytest.raises(Mistake, match="begins with more than most_layers=2"):
        SelfExpandingSearch(layers=(3, 1, 1), most_layers=2)
    with pytest.raises(Mistake, match="most_parameters=100"):
        SelfExpandingSearch(layers=(1,), widths=(4,), most_parameters=100).space(tiny_images())
    with pytest.raises(Mistake, match="pays for 1 epochs"):
        SelfExpandingSearch(layers=(1,), widths=(4,), images=8).find(Lab("expanding-cnn", tiny_images(), 40.0))
