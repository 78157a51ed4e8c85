"""ViT-ResNAS search by hand: the paper's choices, dealing them to groups, gradients of groups, warm-up, evolution, the search's limits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.backbones.vit_resnas import VitResnas, macs
from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.search.lab import Lab
from convince.search.multi_arch_sampling import Elastic, assigned, open_choices, shares_of, steps_to
from convince.search.vit_resnas_search import crossed, drawn, evolution, mutated, shrunk

HOW = {"batch": 8, "precision": "fp32", "kernels": {}, "augment": "none"}
HOST = "vit-resnas:widths=(12,24),heads=((2,),(2,)),hidden=((24,),(48,)),head_dims=(6,12),patch=2,stem=patch,drop_path=0.0"
LARGEST = {"widths": (4, 8), "heads": ((2, 2), (2, 2)), "hidden": ((8, 8), (8, 8)), "head_dims": (2, 2), "patch": 2, "stem": "patch", "stem_width": 2}


def test_the_papers_choices():
    assert shares_of(256, (1, 0.875, 0.75, 0.6875, 0.625)) == [256, 224, 192, 176, 160]
    assert shares_of(1280, (1, 0.875, 0.75, 0.6875, 0.625)) == [1280, 1120, 960, 880, 800]
    assert steps_to(6, 0.5, 4) == [6, 5, 4, 3]
    assert steps_to(12, 0.5, 4) == [12, 10, 8, 6]
    assert steps_to(16, 0.625, 4) == [16, 14, 12, 10]  # small space
    assert steps_to(768, 0.5, 7) == [768, 704, 640, 576, 512, 448, 384]
    assert steps_to(4, 1.0, 4) == [4]


def test_the_tiny_space_holds_the_published_network_and_the_limit_is_the_default():
    found = parts.make("vit-resnas-search", widths=(256, 512, 1024), blocks=(6, 6, 6), heads=(6, 12, 12), head_dims=(32, 48, 64), patch=14)
    elastic = Elastic(found.largest(224))
    assert len(elastic.choices) == 3 + 2 * 18 + 9
    tiny = next(row for row in parts.find() if isinstance(row, parts.Part) and row.name == "vit-resnas").card.variants["vit-resnas-tiny"]
    for i, width in enumerate(tiny["widths"], 1):
        assert width in elastic.choices[f"width{i}"]
        assert set(tiny["heads"][i - 1]) <= set(elastic.choices[f"heads{i}.1"])
        assert set(tiny["hidden"][i - 1]) <= set(elastic.choices[f"hidden{i}.1"])
    share = 1794.4e6 / macs(elastic.largest, (224, 224), 1000)
    assert found.limit == pytest.approx(share, abs=5e-4)


def test_options_of_genes():
    elastic = Elastic(LARGEST, widths=(1.0, 0.5))
    assert elastic.choices["width2"] == [8, 4]
    assert elastic.choices["block1.2"] == [1, 0]
    genes = {**{name: values[0] for name, values in elastic.choices.items()}, "width1": 2, "block1.2": 0, "heads2.2": 1}
    found = elastic.options(genes)
    assert (found["widths"], found["heads"], found["hidden"]) == ([2, 8], [[2], [2, 1]], [[8], [8, 8]])
    assert elastic.here(genes) == [[0], [0, 1]]
    other = {**genes, "hidden1.2": 4}
    assert elastic.plain(genes) == elastic.plain(other), "what a left-out block would have had"
    assert elastic.plain(genes) != elastic.plain({**genes, "hidden1.1": 4})
    with pytest.raises(Mistake, match="none of a stage may be below one of the stage before"):
        _ = Elastic({**LARGEST, "widths": (4, 6)}, widths=(1.0, 0.5)).choices


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
def test_choices_are_dealt_evenly(values, groups, seed):
    rows = assigned(list(range(values)), 2 * groups, groups, generator(seed))
    assert torch.equal(rows[:groups], rows[groups:]), "row r is of group r modulo groups"
    if groups % values == 0:
        assert torch.bincount(rows[:groups], minlength=values).tolist() == [groups // values] * values
    assert int(torch.bincount(rows[:groups]).max()) <= -(-groups // values)


def test_warm_up_by_hand():
    """Five choices over 15 epochs: one more every 3.75 epochs."""
    five = [256, 224, 192, 176, 160]
    assert [len(open_choices(five, epoch, 15)) for epoch in (0, 3, 4, 7, 8, 11, 12, 14, 15, 99)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert open_choices(five, 0, 0) == five


def test_gradients_of_groups_are_the_mean_of_separate_passes():
    elastic = Elastic({**LARGEST, "drop_path": 0.0}, widths=(1.0, 0.5))
    torch.manual_seed(0)
    net = VitResnas(3, 1, (8, 8), **elastic.largest).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.4)
    x, y = torch.randn(6, 1, 8, 8).double(), torch.arange(6) % 3
    networks = [drawn(elastic.choices, generator(i)) for i in range(3)]
    net.kept = {name: torch.tensor([networks[r % 3][name] for r in range(6)]) for name in elastic.choices}
    F.cross_entropy(net(x), y).backward()
    together = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    for i, genes in enumerate(networks):
        net.kept = {name: torch.tensor([value]) for name, value in genes.items()}
        (F.cross_entropy(net(x[i::3]), y[i::3]) / 3).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(together[name], p.grad, rtol=1e-9, atol=1e-12)


def supernet(model, groups, epochs):
    sampling = f"multi-arch-sampling:groups={groups},widths=(1.0,0.5),warmup=0.0"
    run = prepare(settings(model=model, epochs=epochs, parts=("adamw:lr=0.01", sampling), **HOW), tiny_images())
    fit(run)
    return run


def test_sub_networks_learn_with_the_largest():
    losses = {}
    for groups in (0, 4):
        run = supernet(HOST, groups, 10)
        assert run.model.kept == {}, "what a pass kept is put back"
        elastic = Elastic(run.model.options, widths=(1.0, 0.5))
        small = elastic.sub_network(run.model, {name: values[-1] for name, values in elastic.choices.items()}).eval()
        rows = run.data.split.train
        with torch.no_grad():
            losses[groups] = float(F.cross_entropy(small(run.normalise(run.plan.pixels(run.data.x.take(rows)))), run.data.y[rows]))
    assert losses[4] < 0.7 * losses[0]


def test_other_networks_are_refused():
    with pytest.raises(Mistake, match="trains a vit-resnas, and the network is 'resnet8'; use --model vit-resnas-mini"):
        supernet("resnet8", 4, 1)
    with pytest.raises(Mistake, match="shares of the largest width"):
        parts.make("multi-arch-sampling", widths=(0.5,))


# -- evolution -------------------------------------------------------------------------------------


CHOICES = {f"g{i}": [0, 1, 2, 3, 4] for i in range(8)}


def quality(genes):
    return sum(genes.values()) / 32


def cheap(genes):
    return sum(genes.values()) <= 30


def run_evolution(count, **more):
    calls = []

    def evaluate(genes):
        calls.append(tuple(genes.values()))
        return quality(genes)

    seen = evolution(CHOICES, cheap, lambda genes: tuple(genes.values()), evaluate, count, generator(0), **more)
    assert [tuple(genes.values()) for genes, _ in seen] == calls
    assert len(set(calls)) == len(calls), "none is evaluated twice"
    assert all(cheap(genes) for genes, _ in seen)
    return seen


def test_evolution_climbs_to_the_limit_where_random_draws_do_not():
    seen = run_evolution(200, first=40, parents=10)
    assert len(seen) == 200
    assert max(row[1] for row in seen) == pytest.approx(30 / 32)
    assert max(quality(g) for g in (drawn(CHOICES, generator("random", i)) for i in range(200)) if cheap(g)) < 30 / 32


def test_a_space_that_is_used_up_ends_the_evolution():
    few = {"a": [0, 1], "b": [0, 1]}
    seen = evolution(few, lambda genes: genes["a"] == 1, lambda genes: tuple(genes.values()), lambda genes: 0.5, 50, generator(0), first=10, parents=2)
    assert sorted(tuple(genes.values()) for genes, _ in seen) == [(1, 0), (1, 1)]
    assert evolution(few, lambda genes: False, str, lambda genes: 0.5, 50, generator(0)) == []


def test_children_by_hand():
    a, b = dict.fromkeys(CHOICES, 0), dict.fromkeys(CHOICES, 4)
    gen = generator("children")
    children = [crossed(a, b, gen) for _ in range(500)]
    assert sum(child["g3"] == 4 for child in children) / 500 == pytest.approx(0.5, abs=0.08)
    assert mutated(CHOICES, a, 1e-9, gen) == a
    changed = [mutated(CHOICES, a, 0.3, gen) for _ in range(500)]
    assert sum(child["g0"] != 0 for child in changed) / 500 == pytest.approx(0.3 * 4 / 5, abs=0.06), "a redrawn gene may come out the same"


def test_populations_shrink_in_proportion():
    assert shrunk(3500, 500, 75, 20) == (500, 75)
    assert shrunk(9999, 500, 75, 20) == (500, 75)
    assert shrunk(350, 500, 75, 20) == (50, 8)
    assert shrunk(3, 500, 75, 20) == (3, 2)


def test_the_find_keeps_the_limit_and_is_the_best_seen():
    search = parts.make(
        "vit-resnas-search", trial_epochs=1, widths=(6, 12), blocks=(2, 2), heads=(2, 2), head_dims=(2, 2), stem_width=2, patch=2, least=0.6, limit=0.8
    )
    desk = Lab("vit-resnas", tiny_images(), 300.0, **{k: v for k, v in HOW.items() if k != "augment"})
    found, notes = search.find(desk), search.notes()
    assert 0.6 * 0.8 * notes["largest_macs"] <= notes["macs"] <= 0.8 * notes["largest_macs"]
    assert macs(found, (8, 8), 3, 1) == notes["macs"]
    assert notes["best"] >= notes["best_of_the_random"]
    assert desk.spent <= 300
    assert notes["supernet_epochs"] == 4  # half of 300 images, 32 an epoch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0.0}, "shares of the largest network's multiply-adds"),
        ({"parents": 0}, "groups, first, parents and rounds must be at least 1"),
        ({"heads": (6, 6)}, "one number a stage in each"),
        ({"patch": 3}, "'convs' with an even patch"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(Mistake, match=message):
        parts.make("vit-resnas-search", **options)


def test_a_limit_that_none_keeps_is_refused_before_anything_is_spent(monkeypatch):
    monkeypatch.setattr("convince.search.vit_resnas_search.TRIES", 50)
    search = parts.make("vit-resnas-search", widths=(6, 12), blocks=(2, 2), heads=(2, 2), head_dims=(2, 2), stem_width=2, patch=2, limit=0.05)
    lab = Lab("vit-resnas", tiny_images(), 300.0, **{k: v for k, v in HOW.items() if k != "augment"})
    with pytest.raises(Mistake, match=r"limit=0\.05, least=0\.975: none of 50 random networks keeps them; loosen them"):
        search.find(lab)
    assert lab.spent == 0
