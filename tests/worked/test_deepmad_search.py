"""DeepMAD's design by hand: the worked DeepMAD-R18, costs against the built network, limits, evolution, the exact optimum against all settings."""

import dataclasses
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convince import parts
from convince.backbones.deepmad import Stage
from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.models.counting import count_named
from convince.search.deepmad_entropy import Spec, effectiveness, ends, entropy, flops_params, log_width, objective, shaped, uneven, weights
from convince.search.deepmad_exact import Program, optimum
from convince.search.deepmad_search import CHANNELS, DeepmadSearch, Problem, evolve, mutate, nearest, picked
from convince.search.lab import Lab
from convince.search.space import Space

CARD = parts.get("deepmad").card
R18 = Spec(32, tuple(Stage(*row) for row in ((1, 40, 96, 5, 2), (6, 40, 384, 5, 2), (9, 64, 384, 5, 2), (10, 104, 1024, 3, 1), (12, 104, 672, 5, 2))))
SMALL = Problem(size=12, classes=4, in_chans=1, macs=2e6, parameters=3e4)
SPACE = SMALL.space()


def spec_of(name, **other):
    options = {**R18.options(), **CARD.variants[name]}
    return dataclasses.replace(Spec(**{**options, "stages": tuple(Stage(*row) for row in options["stages"])}), **other)


# -- formulas ----------------------------------------------------------------------------------------


def test_worked_r18():
    found = list(ends(R18, 224))
    assert [depth for depth, *_ in found] == [1, 4, 22, 79, 115]
    assert [(c, side) for *_, c, side in found] == [(32, 112), (96, 56), (384, 28), (1024, 14), (672, 7)]
    assert entropy(R18, 224) == pytest.approx([21.26, 109.49, 726.98, 2782.78, 3559.96], abs=0.01)
    rho = [depth / math.exp(total / depth) for depth, total, *_ in found]
    assert rho == pytest.approx([0.037, 0.052, 0.117, 0.246, 0.299], abs=0.001)
    assert effectiveness(R18, 224) == max(rho) < 0.3
    assert 10 * uneven((1, 6, 9, 10, 12), "bottleneck") == pytest.approx(34.8, abs=0.05)
    assert objective(R18, 224, beta=0) == pytest.approx(32_120.2, abs=0.1)
    assert objective(R18, 224) == pytest.approx(32_120.2 - 34.8, abs=0.15)


def test_widths_by_hand():
    stage = Stage(blocks=2, bottleneck=3, out=8, kernel=5, stride=2)
    assert log_width(4, stage, "bottleneck") == pytest.approx(math.log(4 * (3 * 25) * 3 * 8 * (3 * 25) * 3))
    assert log_width(4, stage, "depthwise") == pytest.approx(math.log(4 * 25 * 3 * 8 * 25 * 3))


def test_depths_that_are_left_out():
    assert uneven((9, 1, 4, 4, 4), "bottleneck") == 1
    assert uneven((9, 4, 4), "bottleneck") == 1
    assert uneven((2, 4), "depthwise") == pytest.approx(math.e)
    assert (weights(5), weights(1)) == ((1, 1, 1, 1, 8), (8,))


def test_form_by_hand():
    stage = Stage(1, 8, 40, 5, 1)
    assert shaped(10, stage, "bottleneck", 8)
    assert not shaped(9, stage, "bottleneck", 8), "more than four times the channels"
    assert not shaped(10, stage, "bottleneck", 7), "a kernel of 5 on 7 pixels"
    assert not shaped(40, stage._replace(bottleneck=3), "bottleneck", 8)
    assert not shaped(40, stage._replace(bottleneck=48), "bottleneck", 8)
    assert shaped(40, stage._replace(bottleneck=60), "depthwise", 8)
    assert not shaped(40, stage._replace(bottleneck=56), "depthwise", 8)


# -- costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepmad-r18", "deepmad-29m-224", "deepmad-mini"])
def test_costs_are_those_of_the_built_network(name):
    size = 32 if name == "deepmad-mini" else 224
    built = count_named(name, num_classes=100, size=(size, size))
    assert flops_params(spec_of(name), size, 100) == (built.macs, built.parameters)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 12), st.sampled_from([3, 5]), st.integers(1, 2)), min_size=1, max_size=3),
    st.integers(5, 12),
    st.sampled_from(["bottleneck", "depthwise"]),
    st.sampled_from([0, 10]),
)
def test_costs_of_any_network(rows, size, block, head):
    spec = Spec(4, tuple(Stage(*row) for row in rows), 1, block, head, 2)
    built = count_named(parts.spell("deepmad", spec.options()), num_classes=3, size=(size, size), in_chans=2)
    assert flops_params(spec, size, 3) == (built.macs, built.parameters)


# -- the design --------------------------------------------------------------------------------------


def test_settings_that_fit_keep_the_limits():
    space = SMALL.space()
    for genes in itertools.islice(space.draws(0), 4):
        options = space.options(genes)
        spec = Spec(**{**options, "stages": tuple(Stage(*row) for row in options["stages"])}, in_chans=1)
        built = count_named(parts.spell("deepmad", options), num_classes=4, size=(12, 12), in_chans=1)
        assert built.macs <= SMALL.macs
        assert built.parameters <= SMALL.parameters
        assert effectiveness(spec, 12) <= SMALL.rho
        widths = [stage.bottleneck for stage in spec.stages]
        assert widths == sorted(widths)


def test_settings_that_keep_the_limits_are_left_alone():
    space = SMALL.space()
    genes = evolve(SMALL, space, 0, 20)
    assert SMALL.repaired(genes, space.choices) == genes
    assert space.options(genes) == SMALL.spec(genes).options()


def test_values_by_hand():
    assert picked(9, 3) == [0, 4, 8]
    assert picked(2, 5) == [0, 1]
    assert picked(1, 5) == [0]
    assert nearest((8, 16, 32), 20) == 16
    assert nearest((8, 16, 32), 20, low=17) == 32
    assert nearest((8, 16, 32), 20, low=33) == 16, "where none is in the bounds, the nearest of all"
    assert all(c % 8 == 0 for c in CHANNELS)
    assert max(CHANNELS) == 2048


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_a_change_is_of_one_choice(seed):
    space = SPACE
    genes = {name: values[len(values) // 2] for name, values in space.choices.items()}
    child = mutate(space, genes, random.Random(seed))
    assert sum(child[name] != genes[name] for name in genes) <= 1
    assert all(child[name] in values for name, values in space.choices.items())


def test_evolution_keeps_the_limits_repeats_and_improves():
    space = SMALL.space()
    first, some, more = (evolve(SMALL, space, 3, steps) for steps in (0, 50, 300))
    assert all(SMALL.fits(SMALL.spec(genes)) for genes in (first, some, more))
    assert SMALL.score(first) < SMALL.score(some) <= SMALL.score(more)
    assert evolve(SMALL, space, 3, 50) == some


def test_without_the_bound_the_design_is_deeper_and_breaks_it():
    free = dataclasses.replace(SMALL, rho=math.inf)
    bounded, deep = (p.spec(evolve(p, p.space(), 0, 400)) for p in (SMALL, free))
    assert effectiveness(bounded, 12) <= 0.3 < effectiveness(deep, 12)
    assert sum(stage.blocks for stage in deep.stages) > sum(stage.blocks for stage in bounded.stages)
    assert objective(deep, 12) > objective(bounded, 12)


GRID = {
    "stem": (16,),
    **{"blocks1": (1,), "bottleneck1": (8,), "out1": (8, 32), "kernel1": (3, 5)},
    **{"blocks2": (1, 2), "bottleneck2": (8, 16), "out2": (16, 64), "kernel2": (3,)},
    **{"blocks3": (1, 3), "bottleneck3": (8, 24), "out3": (24, 80), "kernel3": (3,)},
}
WIDE = {**GRID, "kernel1": (3,), "bottleneck1": (16, 32), "bottleneck2": (24, 64), "bottleneck3": (40, 96), "out1": (8, 16), "out2": (16, 24), "out3": (16, 40)}


@pytest.mark.parametrize(("block", "grid", "rho", "fit"), [("bottleneck", GRID, 0.3, 4), ("bottleneck", GRID, 0.5, 46), ("depthwise", WIDE, 0.8, 27)])
def test_the_exact_optimum_is_that_of_all_settings(block, grid, rho, fit):
    problem = dataclasses.replace(SMALL, block=block, rho=rho)
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    scores = [problem.score(genes) for genes in every if problem.fits(problem.spec(genes))]
    assert (len(every), len(scores)) == (256, fit), "the limits bind"
    found = optimum(problem, Space(grid, dict))
    assert problem.fits(problem.spec(found))
    assert problem.score(found) == pytest.approx(max(scores), rel=1e-6)


def test_no_network_no_optimum():
    space = SMALL.space(2)
    assert optimum(dataclasses.replace(SMALL, rho=1e-9), space) is None


def test_evolution_comes_close_to_the_exact_optimum():
    space = SMALL.space(4)
    exact, evolved = SMALL.score(optimum(SMALL, space)), SMALL.score(evolve(SMALL, space, 0, 1000))
    assert 0.95 * exact <= evolved <= exact * (1 + 1e-6)


def test_a_program_by_hand():
    """A knapsack: of gains 3, 4, 5 and weights 2, 3, 4 within 5, the first two; and 2.5 of a fourth variable that is not whole."""
    program = Program()
    items = [program.variable(gain) for gain in (3.0, 4.0, 5.0)]
    free = program.variable(1.0, whole=False, top=2.5)
    program.row(dict(zip(items, (2.0, 3.0, 4.0), strict=True)), high=5)
    assert program.solve().tolist() == pytest.approx([1, 1, 0, 2.5])
    program.row({free: 1.0}, low=3)
    assert program.solve() is None


# -- the search --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["evolution", "exact"])
def test_the_search_trains_nothing_and_says_how_far_it_is_from_the_optimum(strategy):
    lab = Lab("deepmad", tiny_images(), 10.0)
    search = DeepmadSearch(macs=2e6, parameters=3e4, iterations=100, grid=3, strategy=strategy)
    options, notes = search.find(lab), search.notes()
    side = lab.data.preprocess.size[0]
    built = count_named(parts.spell("deepmad", options), num_classes=lab.data.k, size=(side, side), in_chans=lab.data.preprocess.channels)
    assert (lab.spent, lab.trials) == (0, [])
    assert (notes["macs"], notes["parameters"]) == (built.macs, built.parameters)
    assert built.macs <= 2e6
    assert built.parameters <= 3e4
    assert notes["rho"] <= 0.3
    assert notes["evolution below exact on the grid"] >= -1e-6
    if strategy == "exact":
        assert notes["objective"] == notes["objective, exact on the grid"]


def test_wrong_settings_and_budgets_are_refused():
    with pytest.raises(Mistake, match="strategy='luck'"):
        DeepmadSearch(strategy="luck")
    with pytest.raises(Mistake, match="grid=1"):
        DeepmadSearch(grid=1)
    with pytest.raises(Mistake, match="rho=0"):
        DeepmadSearch(rho=0)
    with pytest.raises(Mistake, match=r"macs=10, parameters=10: the smallest network for 12 pixels and 4 classes takes .* give larger budgets"):
        dataclasses.replace(SMALL, macs=10, parameters=10).space()
    with pytest.raises(Mistake, match=r"no network on the grid of 2 values a choice keeps macs=2e\+06, parameters=30000, rho=1e-09; loosen them"):
        DeepmadSearch(macs=2e6, parameters=3e4, rho=1e-9, grid=2, strategy="exact").find(Lab("deepmad", tiny_images(), 10.0))
