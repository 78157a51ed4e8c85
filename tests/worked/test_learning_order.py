"""Learning order by hand: agreement, accessibility, bimodality and its null, collections, and a run that is left alone."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.checks.subject import bits, equal, tiny_images
from convince.diagnose.learning_order import (
    LearningOrder,
    accessibility,
    agreement,
    at_equal_accuracy,
    bimodality,
    half_learned,
    independent,
    mean_correlation,
    order_correlation,
    reliability,
    tp_agreement,
)
from convince.errors import Mistake
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.report.drawings import draw


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def run_of(*specs, **changes):
    how = {"model": "resnet:layers=(1,1),widths=(4,8)", "batch": 8, "epochs": 3, "lr": 0.05, "precision": "fp32", "augment": "none", "kernels": {}}
    run = prepare(make(**{**how, "parts": specs, **changes}), tiny_images())
    fit(run)
    return run


def technique(run):
    return next(seat.technique for seat in run.team.seats if seat.name == "learning-order")


def test_worked_bimodality():
    """tp = 0, 0, 1, 1, 0.5: p = 0.5, variance 0.2, index 0.8."""
    assert bimodality(torch.tensor([0, 0, 1, 1, 0.5], dtype=torch.float64)) == pytest.approx(0.8)
    assert bimodality(torch.tensor([0.0, 1, 1], dtype=torch.float64)) == pytest.approx(1)
    assert math.isnan(bimodality(torch.ones(3, dtype=torch.float64)))


def test_worked_collection():
    """Two networks, two looks, three samples of class 0: labels by hand."""
    labels = torch.tensor([[[0, 1, 2], [0, 0, 2]], [[0, 2, 2], [0, 1, 0]]])
    tp = tp_agreement(labels == 0)
    assert tp.tolist() == [[1, 0, 0], [1, 0.5, 0.5]]
    assert agreement(labels).tolist() == [[1, 0.5, 1], [1, 0.5, 0.5]]
    assert accessibility(tp).tolist() == [1, 0.25, 0.25]
    assert half_learned(torch.tensor([[0.0, 0.0], [1.0, 0.5], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)) == 2, "the first of two"


def test_agreement_counts_the_largest_group():
    labels = torch.tensor([3, 3, 1, 3, 2]).view(5, 1, 1)
    assert agreement(labels).item() == pytest.approx(3 / 5)


def test_correlations_of_collections():
    a = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert order_correlation(a, 2 * a + 1) == pytest.approx(1)
    assert order_correlation(a, -a) == pytest.approx(-1)
    assert math.isnan(order_correlation(a, torch.ones_like(a)))
    with pytest.raises(Mistake, match="the same samples; they have 3 and 2"):
        order_correlation(a, a[:2])
    same = (torch.rand(1, 4, 30, generator=gen()) < 0.5).expand(4, 4, 30)
    assert reliability(same) == pytest.approx(1)
    assert mean_correlation(same) == pytest.approx(1)
    with pytest.raises(Mistake, match="needs at least 2"):
        reliability(same[:1])
    assert math.isnan(mean_correlation(same[:1]))


def test_looks_are_matched_by_accuracy():
    fast = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.float64)
    slow = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.float64)
    assert at_equal_accuracy(fast, slow).tolist() == [1, 3, 3]


@given(st.integers(2, 6), st.floats(0.2, 0.8))
@settings(max_examples=15, deadline=None)
def test_independent_networks_have_index_one_over_m(m, p):
    correct = torch.rand(m, 1, 4000, generator=gen(m)) < p
    index = bimodality(tp_agreement(correct)[0])
    assert index == pytest.approx(1 / m, abs=0.05)
    assert independent(correct[:, 0], gen(1)) == pytest.approx(1 / m, abs=0.03)
    shared = correct[:1].expand(m, 1, 4000)
    assert bimodality(tp_agreement(shared)[0]) == pytest.approx(1)


def test_a_run_is_left_alone_and_a_collection_is_read():
    run = run_of("learning-order:nets=3")
    assert not equal(bits(run_of().answer), bits(run.answer))
    part = technique(run)
    assert part.predictions("train").shape == (3, 3, 32)
    assert part.predictions("val").shape == (3, 3, 8)
    assert not torch.equal(part.predictions("train")[0], part.predictions("train")[1]), "another seed is another network"
    named = {r.name: r.value for r in part.readings(run)}
    tp = tp_agreement(part.correct("train"))
    assert named["accessibility, training"] == pytest.approx(float(tp.mean()))
    assert "bimodality of independent networks, training" in named
    assert all(math.isfinite(value) for value in named.values())
    assert part.readings(run) == part.readings(run)
    assert all(draw(figure).startswith("<svg") for figure in part.figures(run))
    last = run.evaluate("train").correct.double().mean()
    assert float(part.correct("train")[0, -1].double().mean()) == pytest.approx(float(last))


def test_gallery_names_rows_of_the_pool_latest_learnt_first():
    run = run_of("learning-order:nets=1")
    part = technique(run)
    found = part.gallery(run)
    assert sorted(row for row, _ in found) == sorted(run.data.split.train.tolist())
    assert [value for _, value in found] == sorted(value for _, value in found)
    row, value = found[0]
    at = part.rows["train"].tolist().index(row)
    assert value == pytest.approx(float(part.correct("train")[0, :, at].double().mean()))


def test_networks_of_an_ensemble_are_the_collection():
    run = run_of("learning-order:nets=1", "deep-ensemble:members=2", epochs=1)
    assert len(run.children) == 1
    assert technique(run).predictions("train").shape == (2, 1, 32)
    with pytest.raises(Mistake, match="learning-order: nets=4 beside deep-ensemble, which trains networks of its own: use nets=1"):
        run_of("learning-order:nets=4", "deep-ensemble:members=2", epochs=1)


def test_at_most_so_many_images_and_unlabelled_rows_are_left_out():
    data = tiny_images()
    y = data.y.clone()
    y[data.split.train[:5]] = -1
    how = make(
        model="resnet:layers=(1,1),widths=(4,8)", batch=8, epochs=1, precision="fp32", augment="none", kernels={}, parts=("learning-order:nets=1,images=10",)
    )
    run = prepare(how, dataclasses.replace(data, y=y))
    fit(run)
    rows = technique(run).rows["train"]
    assert len(rows) == 10
    assert bool((run.data.y[rows] >= 0).all())


def test_a_reopened_run_gives_the_same_readings(tmp_path):
    run = run_of("learning-order:nets=2", epochs=2)
    write_config(tmp_path, run.settings)
    write_model(tmp_path, run)
    part = technique(open_run(tmp_path).run)
    opened = open_run(tmp_path).run
    assert torch.equal(part.predictions("train"), technique(run).predictions("train"))
    assert part.readings(opened) == technique(run).readings(run), "without the data"
    assert part.gallery(opened) == technique(run).gallery(run)


def test_errors_name_the_part():
    with pytest.raises(Mistake, match="learning-order: nets=0: at least 1"):
        LearningOrder(nets=0)
    with pytest.raises(Mistake, match="learning-order: images=0"):
        LearningOrder(images=0)
    with pytest.raises(Mistake, match="learning-order has looked at no train image yet"):
        LearningOrder().predictions("train")
