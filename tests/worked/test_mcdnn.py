"""MCDNN by hand: the column's size, the forms of an image, the distortions, the mean of the columns and their report."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from convince import parts
from convince.augment.simard_distortion import SimardDistortion, simard_distort, smoothed
from convince.backbones.mcdnn_column import McdnnColumn, scaled_tanh
from convince.checks.subject import equal, tiny_images
from convince.ensemble.deep_ensemble import MeanAnswer, mean_scores
from convince.ensemble.fixed_view import conorm, histeq, imadjust, view, width_normalise
from convince.ensemble.mcdnn import column_probs, column_report, default_views
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare

CHOSEN = {"model": "small-cnn:widths=(4,)", "batch": 8, "epochs": 1, "augment": "none", "precision": "fp32", "checkpoint_seconds": 0}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# -- the column ------------------------------------------------------------------------------------


def test_size_of_one_column_and_of_35():
    net = McdnnColumn(img_size=(28, 28))
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in net.named_children()}
    assert sizes == {"conv1": 340, "conv2": 20_040, "hidden": 54_150, "fc": 1_510}
    assert sum(sizes.values()) == 76_040
    assert 35 * 76_040 == 2_661_400


def test_maps_are_26_13_9_3():
    net = McdnnColumn(img_size=(28, 28))
    seen = []
    net.conv1.register_forward_hook(lambda m, i, o: seen.append(o.shape[-1]))
    net.conv2.register_forward_hook(lambda m, i, o: seen.extend([i[0].shape[-1], o.shape[-1]]))
    assert net.forward_features(torch.rand(2, 1, 28, 28)).shape == (2, 40, 3, 3)
    assert seen == [26, 13, 9]


def test_weights_are_uniform_within_a_twentieth():
    weights = torch.cat([p.flatten() for p in McdnnColumn().parameters()]).detach()
    assert float(weights.abs().max()) <= 0.05
    assert float(weights.std()) == pytest.approx(0.05 / math.sqrt(3), rel=0.02)


def test_scaled_tanh_by_hand():
    assert float(scaled_tanh(torch.tensor(1.0))) == pytest.approx(1.7159 * math.tanh(0.6666))
    assert float(scaled_tanh(torch.tensor(1.0))) == pytest.approx(1.0, abs=2e-4)  # made so that f(1) is about 1


def test_only_the_winner_of_a_pool_gets_a_gradient():
    a = torch.rand(1, 1, 2, 2, requires_grad=True)
    torch.nn.functional.max_pool2d(a, 2).sum().backward()
    assert int((a.grad != 0).sum()) == 1


# -- forms -----------------------------------------------------------------------------------------


def block(rows, columns, side=28, ground=0.0, ink=1.0):
    x = torch.full((1, 1, side, side), ground)
    x[..., rows[0] : rows[1], columns[0] : columns[1]] = ink
    return x


def spans(x, ground=0.0, level=0.5):
    ink = (x[0, 0] - ground).abs() > level
    rows, columns = ink.any(1).nonzero()[:, 0], ink.any(0).nonzero()[:, 0]
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@pytest.mark.parametrize(("width", "expected"), [(10, (4, 24, 9, 19)), (20, (4, 24, 4, 24)), (16, (4, 24, 6, 22))])
def test_width_is_normalised_height_kept_and_centred(width, expected):
    assert spans(width_normalise(block((1, 21), (3, 17)), width)) == expected


def test_dark_ink_on_light_paper_is_the_negative():
    dark, light = block((1, 21), (3, 17), ground=1.0, ink=0.0), block((1, 21), (3, 17))
    torch.testing.assert_close(width_normalise(dark, 10), 1 - width_normalise(light, 10))


def test_an_image_without_ink_stays():
    x = torch.full((2, 1, 9, 9), 0.3)
    torch.testing.assert_close(width_normalise(x, 4), x)


def test_ink_of_the_right_width_in_the_middle_stays():
    x = block((4, 24), (9, 19)) * torch.rand(28, 28, generator=gen()).clamp_min(0.5)
    torch.testing.assert_close(width_normalise(x, 10), x)


def test_histeq_by_hand():
    """Four values, each a quarter of the pixels: shares 1/4, 2/4, 3/4, 4/4, read where the value lies between bin middles."""
    x = torch.tensor([[0.125, 0.375], [0.625, 0.875]])[None, None]
    assert histeq(x, bins=4).flatten().tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_one_tile_and_many_agree_where_tiles_are_alike():
    x = torch.rand(1, 1, 4, 4, generator=gen()).repeat(1, 1, 2, 2)
    torch.testing.assert_close(histeq(x, tiles=2), histeq(x, tiles=1))


def test_imadjust_fills_the_range():
    x = 0.4 + 0.2 * torch.linspace(0, 1, 400).view(1, 1, 20, 20)
    y = imadjust(x)
    assert (float(y.min()), float(y.max())) == (0.0, 1.0)
    assert int((y == 0).sum()) == pytest.approx(5, abs=1)
    torch.testing.assert_close(imadjust(torch.full((1, 3, 4, 4), 0.3)), torch.full((1, 3, 4, 4), 0.3))


def test_conorm_is_grey_where_flat_and_strongest_at_the_edge():
    y = conorm(block((0, 28), (14, 28)))
    torch.testing.assert_close(y[..., :10], torch.full((1, 1, 28, 10), 0.5))
    assert int((y - 0.5).abs()[0, 0, 14].argmax()) in (13, 14)


@quick(max_examples=15, deadline=None)
@given(st.sampled_from(["original", "imadjust", "histeq", "adapthisteq", "conorm", "width-5"]), st.sampled_from([1, 3]), st.integers(7, 17), st.integers(0, 99))
def test_every_form_keeps_shape_range_and_input(how, channels, side, seed):
    x = torch.rand(3, channels, side, side + 2, generator=gen(seed), dtype=torch.float64)
    kept = x.clone()
    y = view(x, how)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert bool((y >= -1e-9).all() and (y <= 1 + 1e-9).all())
    assert torch.equal(x, kept)
    torch.testing.assert_close(view(x[1:2], how), y[1:2])


def test_unknown_forms_are_named():
    for make in (
        lambda: parts.make("fixed-view", how="histeqq"),
        lambda: parts.make("mcdnn", views=("width-0",)),
        lambda: parts.make("fixed-view", how="width-a"),
    ):
        with pytest.raises(Mistake, match=r"histeqq|width-"):
            make()
    with pytest.raises(Mistake, match="nets"):
        parts.make("mcdnn", nets=0)


# -- distortions -----------------------------------------------------------------------------------


def test_the_mean_size_of_the_bending_is_that_of_simards_field():
    """Uniform noise has deviation 1/sqrt 3; a Gaussian of 6 pixels leaves 1/(2 sqrt(pi) 6) of it: 36 times that is 0.98 pixels."""
    noise = 2 * torch.rand(400, 1, 29, 29, generator=gen()) - 1
    middle = 36 * smoothed(noise, 6.0)[..., 14, 14]
    assert 36 / math.sqrt(3) / (2 * math.sqrt(math.pi) * 6) == pytest.approx(0.977, abs=1e-3)
    assert float(middle.std()) == pytest.approx(0.977, rel=0.12)


def test_a_shift_alone_moves_by_at_most_the_share():
    x = block((12, 16), (12, 16)).repeat(64, 1, 1, 1)
    y = simard_distort(x, gen(), translate=0.1, rotate=0, scale=0, alpha=0, sigma=6)
    at = torch.arange(28.0) + 0.5
    middle = (y[:, 0].sum(1) * at).sum(1) / y[:, 0].sum((1, 2))
    assert float((middle - 14).abs().max()) <= 2.8 + 1e-3
    assert float((middle - 14).abs().max()) > 2.0


def test_nothing_to_do_leaves_pixels_and_amount_zero_the_object():
    x = torch.rand(3, 1, 9, 9, generator=gen())
    torch.testing.assert_close(simard_distort(x, gen(), translate=0, rotate=0, scale=0, alpha=0, sigma=6), x)
    assert SimardDistortion(0.0)(x, None, gen())[0] is x
    with pytest.raises(Mistake, match="sigma"):
        SimardDistortion(sigma=0)


def test_a_turn_is_rigid():
    """Turning alone keeps distances on wide images too: the corner of a square stays as far from the middle."""
    x = torch.zeros(40, 1, 28, 28)
    x[..., 13:15, 22:24] = 1
    y = simard_distort(x, gen(), translate=0, rotate=15, scale=0, alpha=0, sigma=6)
    at = torch.arange(28.0) + 0.5 - 14
    across, down = (y[:, 0].sum(axis) @ at / y[:, 0].sum((1, 2)) for axis in (1, 2))
    torch.testing.assert_close((across.square() + down.square()).sqrt(), torch.full((40,), 9.0), atol=0.1, rtol=0)
    assert float(torch.atan2(down, across).abs().max()) <= math.radians(15) + 0.01


# -- the mean and its report -----------------------------------------------------------------------


def test_mean_scores_are_the_log_of_the_mean_probability():
    p = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]]], dtype=torch.float64)
    assert mean_scores(p.log() + 3).softmax(1)[0].tolist() == pytest.approx([0.6, 0.4])
    one = torch.randn(1, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(mean_scores(one).softmax(1), one[0].softmax(1))


def test_report_by_hand():
    """Rows of class 0; column 0 errs on rows 2 and 3, column 1 on row 3; together row 3 only, whose second guess is right."""
    probs = torch.tensor([[[0.9, 0.1, 0], [0.9, 0.1, 0], [0.4, 0.6, 0], [0.3, 0.7, 0]], [[0.8, 0.2, 0], [0.8, 0.2, 0], [0.9, 0.1, 0], [0.2, 0.7, 0.1]]])
    found = column_report(probs, torch.zeros(4, dtype=torch.int64))
    assert found == {"column_0": 0.5, "column_1": 0.25, "mean": 0.375, "best": 0.25, "ensemble": 0.25, "shared": 0.5, "second_guess": 1.0}


def test_default_views_follow_the_images():
    assert default_views(28, 1) == ("width-10", "width-12", "width-14", "width-16", "width-18", "width-20")
    assert default_views(8, 1)[0] == "width-2.9"
    assert default_views(28, 3) == default_views(224, 1) == ("imadjust", "histeq", "adapthisteq", "conorm")


# -- in a run --------------------------------------------------------------------------------------


def made(*specs, **changes):
    return prepare(settings(**{**CHOSEN, **changes}, parts=specs), tiny_images())


def test_columns_are_runs_of_their_own_form():
    run = made("mcdnn:views=('width-3',),nets=2")
    fit(run)
    assert len(run.children) == 3
    assert [[s.technique.how for s in child.team.seats if s.name == "fixed-view"] for child in run.children] == [[], ["width-3"], ["width-3"]]
    assert len({child.seed for child in (run, *run.children)}) == 4
    answer, x = run.answer.eval(), tiny_images().float_batch(tiny_images().x.take(torch.arange(6)))
    assert isinstance(answer, MeanAnswer)
    probs = answer.each(x).softmax(2)
    torch.testing.assert_close(answer(x).softmax(1), probs.mean(0))
    torch.testing.assert_close(probs[3], run.children[2].answer(x).softmax(1))
    readings = {row["name"] for row in run.record.rows if str(row.get("name", "")).startswith("columns_")}
    assert {"columns_ensemble", "columns_mean", "columns_column_3", "columns_shared"} <= readings
    found, y = column_probs(run, "test")
    assert found.shape == (4, len(y), 3)


def test_members_keep_the_other_parts_and_share_members_with_none():
    run = made("deep-ensemble:members=3", "label-smoothing")
    fit(run)
    assert [[s.name for s in child.team.seats] for child in run.children] == [["label-smoothing"]] * 2
    assert equal(dict(run.children[0].model.state_dict()), dict(run.children[1].model.state_dict()))


def test_a_deep_ensemble_keeps_this_network():
    plain, run = made(), made("deep-ensemble:members=2")
    fit(plain)
    fit(run)
    assert not equal(dict(plain.model.state_dict()), dict(run.model.state_dict()))
    with pytest.raises(Mistake, match="members"):
        parts.make("deep-ensemble", members=0)


def test_its_pieces_beside_it_are_refused():
    with pytest.raises(Mistake, match="mcdnn"):
        made("mcdnn", "fixed-view")
