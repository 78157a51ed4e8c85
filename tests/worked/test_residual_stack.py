"""ResidualStack by hand: the expansion in numbers, layouts that share weights, merged convolutions, the order of the error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.backbones.residual_stack import (
    ResidualStack,
    convert,
    layer_pair_test,
    merge,
    parallel,
    sequential,
    truncated,
    truncation_error,
)
from convince.backbones.shallow_parallel_study import ShallowParallelStudy, agreement, determination
from convince.errors import Mistake
from convince.types import Budget


def times(*factors):
    return [lambda v, a=a: a * v for a in factors]


def test_worked_scalars():
    one, layers = torch.tensor(1.0, dtype=torch.float64), times(0.1, 0.2)
    assert float(sequential(layers, one)) == pytest.approx(1.32)
    assert float(parallel(layers, one)) == pytest.approx(1.30)
    assert float(truncated(layers, one, 2)) == pytest.approx(1.32)
    eight = times(*[0.05] * 8)
    assert float(sequential(eight, one)) == pytest.approx(1.4775, abs=1e-4)
    assert float(parallel(eight, one)) == pytest.approx(1.40)
    assert float(truncated(eight, one, 2)) == pytest.approx(1.40 + 28 * 0.05**2)


@settings(deadline=None)
@given(st.lists(st.floats(-0.9, 0.9), min_size=1, max_size=5))
def test_the_whole_expansion_is_the_deep_stack(factors):
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(truncated(times(*factors), one, len(factors)), sequential(times(*factors), one))
    torch.testing.assert_close(truncated(times(*factors), one, 1), parallel(times(*factors), one))


def test_products_are_taken_in_order():
    add, double = (lambda v: v + 1), (lambda v: 2 * v)
    assert float(truncated([add, double], torch.tensor(3.0), 2)) == 3 + 4 + 6 + 8, "2 (x + 1), not 2 x + 1"


def test_the_error_grows_as_the_first_power_left_out():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, generator=gen, dtype=torch.float64)
    matrices = [torch.randn(16, 16, generator=gen, dtype=torch.float64) for _ in range(4)]
    unit = [m / torch.linalg.matrix_norm(m, 2) for m in matrices]
    for order in (1, 2, 3):
        errors = [truncation_error([a * m for m in unit], x, order) for a in (0.01, 0.02)]
        assert math.log2(errors[1] / errors[0]) == pytest.approx(order + 1, abs=0.05)
    assert truncation_error(unit, x, 4) < 1e-14


def test_layouts_share_weights_and_converting_leaves_the_original():
    model = ResidualStack(n=3, filters=4, img_size=(8, 8))
    x = torch.randn(2, 1, 8, 8)
    shallow = convert(model, "parallel")
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {k: v.tolist() for k, v in shallow.state_dict().items()}
    assert model.stack.mode == "sequential"
    h = model.stem(x)
    torch.testing.assert_close(shallow.forward_features(x), h + sum(layer(h) for layer in model.stack.layers))
    torch.testing.assert_close(convert(shallow, "sequential")(x), model(x))
    with torch.no_grad():
        next(shallow.parameters()).zero_()
    assert next(model.parameters()).any()


@pytest.mark.parametrize("act", ["relu", "tanh", "linear"])
def test_a_linear_stack_is_its_whole_expansion(act):
    model = ResidualStack(n=3, filters=3, act=act).double()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    same = torch.allclose(convert(model, "truncated", 3).forward_features(x), model.forward_features(x))
    assert same == (act == "linear")


@pytest.mark.parametrize(("kernel", "norm"), [(3, False), (5, True)])
def test_a_merged_layer_is_the_sum_of_its_layers(kernel, norm):
    model = ResidualStack(n=4, filters=5, kernel=kernel, norm=norm, mode="parallel", head="pool")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name or "norm" in name:
                p.normal_()
        for b in model.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 2)
    x = torch.randn(2, 1, 9, 7)
    merged = merge(model.eval())
    assert merged.stack.conv.out_channels == 20
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.train()(x), model.train()(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(Mistake, match="convert it before merge"):
        convert(merged, "sequential")
    with pytest.raises(Mistake, match=r"convert\(model, 'parallel'\) first"):
        merge(convert(model, "sequential"))


def test_pairs_that_do_not_see_each_other_lose_nothing():
    model = ResidualStack(n=3, filters=4)
    x = torch.rand(2, 1, 6, 6)
    with torch.no_grad():
        for p in model.stack.layers[0].parameters():
            p.zero_()
    lost = layer_pair_test(model, x)
    assert lost[0] == 0
    h = model.stem(x)
    second, third = model.stack.layers[1], model.stack.layers[2]
    by_hand = (third(h + second(h)) - third(h)).norm() / (second(h) + third(h + second(h))).norm()
    assert lost[1] == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_the_flat_head_reads_every_position():
    model = ResidualStack(n=1, filters=2, img_size=(5, 4), head="flatten")
    assert model.num_features == 40
    assert ResidualStack(n=1, filters=2, head="pool").num_features == 2
    assert model(torch.zeros(3, 1, 5, 4)).shape == (3, 10)
    with pytest.raises(Mistake, match="built for 5x4 pixels, given 4x5"):
        model(torch.zeros(3, 1, 4, 5))


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match=r"mode='paralel' must be one of .*; did you mean 'parallel'"):
        ResidualStack(mode="paralel")
    for options in ({"n": 0}, {"kernel": 4}, {"order": 0}):
        with pytest.raises(Mistake, match="must be at least 1, and the kernel odd"):
            ResidualStack(**options)
    with pytest.raises(Mistake, match="convert: order=0"):
        convert(ResidualStack(n=2), "truncated", 0)


def test_the_study_reads_pairs():
    assert determination(3000, 10, 15_000) == 2
    found = agreement([1.0, 2.0, 4.0], [1.02, 1.8, 4.4])
    assert found["within 5 %"] == pytest.approx(1 / 3)
    assert found["rank correlation"] == 1
    assert found["median d"] == pytest.approx(math.log(1.02))
    assert found["median |d|"] == pytest.approx(math.log(1.1))
    assert "rank correlation" not in agreement([1.0], [2.0])


def test_the_study_refuses_what_it_cannot_do():
    with pytest.raises(Mistake, match="a budget in seconds does not fit"):
        ShallowParallelStudy().run(Budget(1, "seconds"))
    with pytest.raises(Mistake, match="need a value each"):
        ShallowParallelStudy(layers=()).run(Budget(1, "steps"))
