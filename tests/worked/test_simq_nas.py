"""SimQ-NAS by hand: sorting, crowding, hypervolume, NSGA-II against the true front, codes, predictors, the loop, sub-networks as deployed."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.backbones.elastic_resnet import ElasticResnet, stored_bytes, sub_network
from convince.checks.subject import tiny_images
from convince.compress.qat import QatConv2d
from convince.errors import Mistake
from convince.fit.answer import Normalise
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.search.lab import Lab
from convince.search.nsga2 import best, children, crowding, fronts, hypervolume, nsga2, polynomial, sbx
from convince.search.sandwich_rule import distillation, draw, forward_as, smallest, width_choices
from convince.search.simq_nas import Seen, Shapes, front, linas, measured, predictor

SHAPES = Shapes(((1, 2), (1, 2, 3)), ((4, 6, 8), (8, 12, 16)), (8, 32), 4)
HOW = {"batch": 8, "precision": "fp32", "kernels": {}, "lr": 0.05, "augment": "none"}


# -- NSGA-II -----------------------------------------------------------------------------------------


def test_twenty_points_in_fronts():
    first = [(0, 9), (1, 7), (2, 5), (4, 3), (7, 1), (9, 0)]
    second = [(1, 9), (2, 7), (3, 5), (5, 3), (8, 1), (10, 0.5)]
    third = [(3, 8), (4, 6), (6, 4), (9, 2)]
    last = [(9, 9), (9.5, 8), (10, 7), (11, 2)]  # (11, 2) is dominated by (9, 2) only through the third front
    points = np.array([*last, *first, *third, *second], dtype=float)
    groups = [sorted(tuple(points[i]) for i in rows) for rows in fronts(points)]
    assert groups == [sorted(first), sorted(second), sorted(third), sorted(last)]


def test_equal_points_do_not_dominate_each_other():
    assert fronts(np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 2.0]])) == [[0, 1], [2]]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25))
def test_fronts_by_definition(rows):
    points = np.array(rows, dtype=float)
    groups = fronts(points)
    assert sorted(i for rows in groups for i in rows) == list(range(len(points)))
    for at, group in enumerate(groups):
        for i in group:
            above = [j for j in range(len(points)) if (points[j] <= points[i]).all() and (points[j] < points[i]).any()]
            assert all(any(j in groups[b] for b in range(at)) for j in above)
            assert at == 0 or any(j in groups[at - 1] for j in above)


def test_crowding_by_hand():
    # ranges 4 and 4; the middle point's neighbours are (0, 4) and (4, 0): 4/4 + 4/4
    assert crowding(np.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0]])).tolist() == [np.inf, 2.0, np.inf]
    found = crowding(np.array([[0.0, 4.0], [1.0, 3.0], [2.0, 1.0], [4.0, 0.0]]))
    assert found.tolist() == [np.inf, 2 / 4 + 3 / 4, 3 / 4 + 3 / 4, np.inf]
    assert list(best(np.array([[0.0, 4.0], [1.0, 3.0], [2.0, 1.0], [4.0, 0.0], [5.0, 5.0]]), 3)) == [0, 3, 2]


def test_crossover_and_mutation_by_hand():
    a, b, half = np.array([[1.0]]), np.array([[3.0]]), np.array([[0.5]])
    assert [x.tolist() for x in sbx(a, b, half, 15)] == [[[1.0]], [[3.0]]]  # beta 1: the parents
    low, high = sbx(a, b, np.array([[0.25]]), 1)  # beta = 0.5 ** 0.5
    assert low[0, 0] == pytest.approx(2 - 0.5**0.5)
    assert low + high == pytest.approx(4), "the mean stays"
    assert polynomial(np.array([[0.0, 0.5, 0.125, 0.875]]), 1).tolist() == [[-1.0, 0.0, -0.5, 0.5]]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_children_keep_to_their_choices(seed):
    gen, most = generator(seed), np.array([0, 1, 2, 5])
    parents = np.stack([torch.randint(m + 1, (12,), generator=gen).numpy() for m in most], 1)
    made = children(parents, most, gen, crossover=0.9, crossover_eta=15.0, mutation_eta=3.0)
    assert made.shape == parents.shape
    assert (made >= 0).all()
    assert (made <= most).all()


def test_nsga2_finds_the_true_front():
    """Two objectives that disagree on the first gene and agree on the others, 3,125 settings enumerated; random rows find far less of the front."""

    def judge(rows):
        x = np.asarray(rows, dtype=float) / 4
        others = 1 + 9 * x[:, 1:].mean(1)
        return np.stack([x[:, 0], others * (1 - np.sqrt(x[:, 0] / others))], 1)  # ZDT1

    every = np.array(list(itertools.product(range(5), repeat=5)))
    truth = {tuple(map(int, every[i])) for i in fronts(judge(every))[0]}
    gen = generator("zdt1")
    first = torch.randint(5, (20, 5), generator=gen).numpy()
    found = nsga2(judge, [4] * 5, first, 800, gen)
    assert truth <= {tuple(map(int, row)) for row in found}
    drawn = torch.randint(5, (800, 5), generator=gen).numpy()
    assert not truth <= {tuple(map(int, row)) for row in drawn}


def test_nsga2_spends_what_it_may():
    calls = []

    def judge(rows):
        calls.append(len(rows))
        return np.stack([rows.sum(1), -rows.sum(1)], 1).astype(float)

    nsga2(judge, [9, 9, 9], np.zeros((10, 3), dtype=int), 47, generator(0))
    assert sum(calls) == 47
    nsga2(judge, [1], np.zeros((4, 1), dtype=int), 1000, generator(0))  # a space of two ends by itself


def test_the_front_is_optunas():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    gen = generator("optuna")
    points = torch.randint(20, (40, 2), generator=gen).double().numpy()
    study = optuna.create_study(directions=["minimize", "minimize"])
    place = {"i": optuna.distributions.IntDistribution(0, 39)}
    for i, row in enumerate(points.tolist()):
        study.add_trial(optuna.trial.create_trial(params={"i": i}, distributions=place, values=row))
    assert sorted(fronts(points)[0]) == sorted(trial.params["i"] for trial in study.best_trials)


def test_worked_hypervolume():
    """Maximise accuracy, minimise size, reference accuracy 0 and size 10: 0.8 (10 - 4) + (0.9 - 0.8)(10 - 7) = 5.1."""
    assert hypervolume([(-0.8, 4), (-0.9, 7)], (0, 10)) == pytest.approx(5.1)
    assert hypervolume([(-0.9, 7), (-0.8, 4), (-0.7, 5), (0.1, 1), (-1, 11)], (0, 10)) == pytest.approx(5.1), "dominated points and those beyond add nothing"
    assert hypervolume([], (0, 10)) == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_hypervolume_counts_cells(points):
    cells = sum(any(x <= i and y <= j for x, y in points) for i in range(8) for j in range(8))
    assert hypervolume(points, (8, 8)) == cells


# -- the space and its codes ---------------------------------------------------------------------------


def test_choices_and_options():
    assert list(SHAPES.choices) == ["depth1", "depth2", "width1", "width2", "bits1.1", "bits1.2", "bits2.1", "bits2.2", "bits2.3"]
    genes = SHAPES.genes([0, 1, 0, 2, 1, 1, 0, 1, 1])
    assert SHAPES.options(genes) == {"depths": [1, 2], "widths": [4, 16], "bits": [32, 8, 32], "stem": 4}
    assert SHAPES.most == [1, 2, 2, 2, 1, 1, 1, 1, 1]


def test_bits_of_absent_blocks_are_one_value():
    rows = np.array([[0, 1, 0, 2, 1, 0, 0, 1, 0], [0, 1, 0, 2, 1, 1, 0, 1, 1]])
    assert SHAPES.plain(rows)[0] == SHAPES.plain(rows)[1] == (0, 1, 0, 2, 1, 0, 0, 1, 0)
    codes = SHAPES.encoded(rows)
    assert codes.shape == (2, 2 + 3 + 3 + 3 + 5 * 2)
    assert (codes[0] == codes[1]).all()
    assert codes[0].sum() == 4 + 3, "four shapes and the three blocks that there are"


def test_draws_are_even():
    rows = SHAPES.drawn(3000, generator(0))
    assert [int(v) for v in rows.max(0)] == SHAPES.most
    assert abs(rows[:, 1].mean() - 1) < 0.06


# -- predictors and the loop -----------------------------------------------------------------------------


def quality(options):
    """A made-up accuracy: depth, width and bits all help, less and less."""
    depth, width = sum(options["depths"]), sum(options["widths"])
    return 0.9 - 0.25 / depth - 0.8 / width - 0.02 * sum(b == 8 for b in options["bits"]) / depth


def test_a_predictor_ranks_what_it_has_not_seen():
    rows = SHAPES.drawn(160, generator("predict"))
    y = np.array([quality(SHAPES.options(SHAPES.genes(row.tolist()))) for row in rows])
    guess = predictor(SHAPES.encoded(rows[:100]), y[:100])(SHAPES.encoded(rows[100:]))
    assert np.corrcoef(guess.argsort().argsort(), y[100:].argsort().argsort())[0, 1] > 0.9
    assert np.abs(guess - y[100:]).mean() < 0.02
    same = predictor(np.ones((5, 3)), np.full(5, 0.4))
    assert same(np.ones((2, 3))) == pytest.approx([0.4, 0.4])


def test_the_loop_measures_each_once_and_beats_random():
    calls = []

    def measure(options):
        calls.append(parts.spell("elastic-resnet", options))
        return quality(options)

    def cost(options):
        return stored_bytes(**options)

    seen = linas(SHAPES, measure, cost, 36, 12, generator(1), predicted=400)
    assert len(seen) == len(calls) == len(set(calls)) == 36
    assert seen[0].genome == (0,) * 9, "the very smallest is always measured"
    assert sum(np.isnan(one.predicted) for one in seen) == 12
    rows = SHAPES.plain(SHAPES.drawn(36, generator(2)))
    drawn = [Seen(row, quality(o := SHAPES.options(SHAPES.genes(row))), cost(o), 0.0) for row in rows]
    top = max(one.cost for one in [*seen, *drawn])
    areas = [hypervolume([(-one.accuracy, one.cost / top) for one in front(many)], (0, 1)) for many in (seen, drawn)]
    assert areas[0] > areas[1]


def test_a_space_that_is_used_up_ends_the_loop():
    few = Shapes(((1,),), ((2, 4),), (8, 32), 4)
    seen = linas(few, quality, lambda options: stored_bytes(**options), 50, 4, generator(0), predicted=20)
    assert len(seen) == 4
    assert [one.cost for one in front(seen)] == sorted(one.cost for one in front(seen))


# -- the super-network -----------------------------------------------------------------------------------


def test_widths_and_draws():
    assert width_choices(24, (0.5, 0.75, 1.0)) == [12, 18, 24]
    assert smallest(((3, 2), (24, 8)), (0.5, 1.0)) == ((1, 1), (12, 4))
    shapes = {draw(((2, 1), (4, 8)), (0.5, 1.0), generator(i)) for i in range(100)}
    assert len(shapes) == 2 * 1 * 2 * 2


def test_distillation_by_hand():
    teacher, student = torch.tensor([[0.0, 0.0]]).requires_grad_(), torch.tensor([[np.log(3.0), 0.0]])
    loss = distillation(student, teacher)
    assert float(loss) == pytest.approx(-(np.log(0.75) + np.log(0.25)) / 2)
    assert not loss.requires_grad, "the teacher gets no gradient from it"


def test_a_shared_pass_is_the_sub_networks_own():
    torch.manual_seed(0)
    model = ElasticResnet(3, 1, (2, 2), (4, 8), stem=4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 1, 8, 8)
    scores = forward_as(model, ((1, 2), (2, 6)), x)
    torch.testing.assert_close(scores, sub_network(model, (1, 2), (2, 6))(x))
    scores.sum().backward()
    assert model.layer1[1].conv1.weight.grad is None, "a block that is left out"
    assert model.layer2[1].conv2.weight.grad[:6, :6].any()
    assert not model.layer2[1].conv2.weight.grad[6:].any()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def supernet(**more):
    run = prepare(make(model="elastic-resnet:depths=(2,2),widths=(4,8),stem=4", epochs=2, parts=("sandwich-rule",), **HOW, **more), tiny_images())
    fit(run)
    return run


def test_a_deployed_sub_network():
    run = supernet()
    options = {"depths": [2, 1], "widths": [4, 8], "bits": [8, 32, 4]}
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    answer = measured(run, options, look=32, calibrate=16)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
    net = answer.model
    assert torch.equal(net.layer1[0].conv1.weight, run.model.layer1[0].conv1.weight)
    rows = run.data.split.train[torch.randperm(32, generator=generator(run.seed, "simq-nas", "rows"))]
    x = run.normalise(run.plan.pixels(run.data.x.take(rows)))
    mean = net.conv1(x).mean((0, 2, 3))
    torch.testing.assert_close(net.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)
    first = net.layer1[0].conv1
    stem = net.relu(net.bn1(net.conv1(x[:16])))
    assert float(first.inputs.high) == pytest.approx(float(stem.detach().max()), rel=1e-5), "the largest value of the calibration images"
    assert not any(m.training for m in answer.modules())
    assert all(m.on for m in answer.modules() if isinstance(m, QatConv2d))
    assert isinstance(answer.normalise, Normalise)
    whole = {"depths": [2, 2], "widths": [4, 8], "bits": [32] * 4}
    plain, again = (measured(run, whole, look=32)(run.plan.pixels(run.data.x.take(rows))) for _ in range(2))
    assert torch.equal(plain, again)


def test_sub_networks_learn_with_the_largest():
    """Trained without the rule a small sub-network answers no better than by chance; with it, it has learnt."""
    losses = {}
    for weight in (0.0, 1.0):
        how = {**HOW, "epochs": 10, "parts": (f"sandwich-rule:weight={weight}",)}
        run = prepare(make(model="elastic-resnet:depths=(2,2),widths=(6,8),stem=4", **how), tiny_images())
        fit(run)
        answer = measured(run, {"depths": [1, 1], "widths": [3, 4], "bits": [32, 32]}, look=32)
        x = run.plan.pixels(run.data.x.take(run.data.split.train))
        with torch.no_grad():
            losses[weight] = float(nn.functional.cross_entropy(answer(x), run.data.y[run.data.split.train]))
    assert losses[1.0] < 0.5 * losses[0.0]


def test_the_find_keeps_its_size():
    search = parts.make("simq-nas", trial_epochs=1, depths=(2, 1), widths=(4, 6), stem=4, size=0.6, predicted=40, look=8, calibrate=8)
    desk = Lab("elastic-resnet", tiny_images(), 220.0, **{k: v for k, v in HOW.items() if k != "augment"})
    found, data = search.find(desk), tiny_images()
    largest = stored_bytes((2, 1), (4, 6), stem=4, num_classes=data.k, in_chans=1)
    allowed = [row for row in search.notes()["front"] if row["bytes"] <= 0.6 * largest]
    best_row = max(allowed, key=lambda row: row["accuracy"])
    assert found == {name: best_row[name] for name in ("depths", "widths", "bits", "stem")}
    assert search.notes()["largest_bytes"] == largest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0.0}, "shares of the largest network's bytes and of the budget"),
        ({"look": 1}, "look and calibrate must be at least 2"),
        ({"bits": (8, 16)}, "each must be one of 4, 8, 32"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(Mistake, match=message):
        parts.make("simq-nas", **options).space(tiny_images())


def test_too_small_a_size_and_another_network_are_refused():
    with pytest.raises(Mistake, match=r"the smallest network takes .* bytes, more than"):
        parts.make("simq-nas", size=0.001).space(tiny_images())
    with pytest.raises(Mistake, match="the network is 'resnet8'; use --model elastic-resnet-largest"):
        fit(prepare(make(model="resnet8", parts=("sandwich-rule",), epochs=1, **HOW), tiny_images()))
    with pytest.raises(Mistake, match="'eca' has changed the network; leave one of them out"):
        fit(prepare(make(model="elastic-resnet:depths=(1,),widths=(4,),stem=4", parts=("sandwich-rule", "eca"), epochs=1, **HOW), tiny_images()))


def test_fixed_shapes_leave_bits_alone_to_choose():
    fixed = Shapes(((2,), (1,)), ((6,), (12,)), (32, 4, 8), 4)
    assert fixed.most == [0, 0, 0, 0, 2, 2, 2]
    assert fixed.used(np.zeros((1, 7), dtype=int)).all()
    assert fixed.options(fixed.genes([0, 0, 0, 0, 0, 1, 2])) == {"depths": [2, 1], "widths": [6, 12], "bits": [4, 8, 32], "stem": 4}
