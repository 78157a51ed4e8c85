"""FractalNet by hand: the scalar example, the fractal rule, exact counts, columns, drop-path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones import fractalnet as module
from convince.backbones.fractalnet import FractalNet, anytime_predict, extract_column, fractal, local_draw
from convince.errors import Mistake


def everything(depth, ending):
    return ending


def times(factor):
    return lambda z: factor * z


def small(**options):
    return FractalNet(**{"num_classes": 4, "in_chans": 1, "widths": (4, 6, 8), "columns": 3, **options})


def test_worked_scalar():
    columns = [[times(2), times(2)], [times(3)]]
    one = torch.ones(())
    assert fractal(one, columns, everything) == 3.5
    assert fractal(one, columns, lambda depth, ending: [1]) == 4
    assert fractal(one, columns, lambda depth, ending: [2]) == 3


def test_three_columns_by_hand():
    """Joins at depths 2 (columns 1, 2) and 4 (all three), as drawn in the paper's Fig. 1."""
    a, b, c = [2.0, 3.0, 5.0, 7.0], [11.0, 13.0], [17.0]
    columns = [[times(f) for f in row] for row in (a, b, c)]
    middle = (2 * 3 + 11) / 2
    assert fractal(torch.ones((), dtype=torch.float64), columns, everything).item() == pytest.approx((middle * 5 * 7 + middle * 13 + 17) / 3)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_recursion_of_the_paper_without_branches_dropped(columns, seed):
    """With all joins kept and equal factors the longest path has 2^(C-1) units and a column alone multiplies its own."""
    factors = torch.rand(columns, 2 ** (columns - 1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    calls = []

    def unit(c, i):
        def call(z):
            calls.append((c, i))
            return z * factors[c - 1, i]

        return call

    made = [[unit(c, i) for i in range(2 ** (columns - c))] for c in range(1, columns + 1)]
    fractal(torch.ones((), dtype=torch.float64), made, everything)
    assert sorted(calls) == [(c, i) for c in range(1, columns + 1) for i in range(2 ** (columns - c))]
    assert len(calls) == 2**columns - 1
    for c in range(1, columns + 1):
        alone = fractal(torch.ones((), dtype=torch.float64), made, lambda depth, ending, c=c: [c])
        torch.testing.assert_close(alone, factors[c - 1, : 2 ** (columns - c)].prod())


@pytest.mark.parametrize(("columns", "count"), [(3, 33_724_618), (4, 76_106_634)])
def test_parameter_count(columns, count):
    with torch.device("meta"):
        model = FractalNet(columns=columns)
    assert sum(p.numel() for p in model.parameters()) == count
    convs = sum(p.numel() for n, p in model.named_parameters() if n.endswith("conv.weight"))
    pairs = zip((3, 64, 128, 256, 512), (64, 128, 256, 512, 512), strict=True)
    assert convs == sum(9 * (columns * a * b + (2**columns - 1 - columns) * b * b) for a, b in pairs)


def test_depth_and_names():
    model = small()
    assert (
        sum(isinstance(m, nn.Conv2d) for m in extract_column(model, 1)) + sum(isinstance(m, nn.Conv2d) for u in extract_column(model, 1) for m in u.children())
        == 3 * 4
    )
    assert "blocks.2.columns.0.3.conv.weight" in model.state_dict()
    with torch.device("meta"):
        assert len([1 for m in FractalNet().blocks for _ in m.columns[0]]) == 20
        assert len([1 for m in FractalNet(columns=4).blocks for _ in m.columns[0]]) == 40


def test_column_equals_global_drop_path(monkeypatch):
    model = small().eval()
    x = torch.randn(2, 1, 8, 8)
    for column in (1, 2, 3):
        chain = extract_column(model, column)
        assert torch.equal(chain(x), model.forward_column(x, column))
        model.train()
        monkeypatch.setattr(model, "_draw", lambda column=column: lambda block, depth, ending: [column])
        for m in model.modules():  # batch statistics as in eval, so that the two are comparable
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        torch.testing.assert_close(model(x), chain(x))
        model.eval()
    chain[0].conv.weight.data.zero_()
    assert not model.blocks[0].columns[2][0].conv.weight.any(), "weights are shared"


def test_a_global_step_trains_one_column_and_a_local_one_keeps_each_join_alive():
    model = small(drop_path=0.5)
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        model(torch.randn(4, 1, 8, 8)).sum().backward()
        used = {name.split(".")[3] + name.split(".")[1] for name, p in model.named_parameters() if p.grad.any() and "columns" in name}
        columns = frozenset(word[0] for word in used)
        seen.add(columns)
        assert all(any(word[1] == str(b) for word in used) for b in range(3)), "every block is on the path"
    assert {frozenset("0"), frozenset("1"), frozenset("2")} <= seen
    assert frozenset("012") in seen


def test_half_of_the_steps_are_global(monkeypatch):
    model = small()
    count = []
    monkeypatch.setattr(module, "local_draw", lambda sizes, p: count.append(1) or local_draw(sizes, p))
    torch.manual_seed(0)
    for _ in range(2000):
        model._draw()
    assert abs(len(count) - 1000) < 4 * 22.4  # four standard deviations of a fair coin


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.floats(0, 0.99), st.integers(0, 10**6))
def test_a_join_keeps_at_least_one(sizes, p, seed):
    torch.manual_seed(seed)
    rows = local_draw(sizes, p)
    assert [len(row) for row in rows] == sizes
    assert all(any(row) for row in rows)


def test_inputs_drop_at_the_stated_rate():
    torch.manual_seed(1)
    rows = torch.tensor(local_draw([5] * 4000, 0.15))
    assert (~rows).double().mean().item() == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / 20000) ** 0.5)
    rows = torch.tensor(local_draw([2] * 4000, 0.999))
    assert rows[:, 0].double().mean().item() == pytest.approx(0.5, abs=0.035)  # the one that is kept is drawn evenly


def test_training_draws_follow_the_global_seed_and_eval_draws_nothing():
    model = small(drop_path=0.5)
    model.train()
    x = torch.randn(4, 1, 8, 8)
    outs = []
    for seed in (3, 3, 4, 5, 6):
        torch.manual_seed(seed)
        outs.append(model(x).detach())
    assert torch.equal(outs[0], outs[1])
    assert any(not torch.equal(outs[0], other) for other in outs[2:])
    model.eval()
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_rises_over_the_blocks():
    with torch.device("meta"):
        model = FractalNet(dropout=0.4)
    rates = [block.columns[0][0].dropout.p for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(("shape", "widths"), [((1, 8, 8), (4, 8, 8)), ((2, 17, 33), (4, 4)), ((3, 32, 32), (4,) * 5), ((5, 64, 40), (4,) * 5)])
def test_sizes_and_channels(shape, widths):
    model = FractalNet(num_classes=3, in_chans=shape[0], widths=widths, columns=2)
    assert model(torch.randn(2, *shape)).shape == (2, 3)
    f = model.forward_features(torch.randn(2, *shape))
    assert f.shape[:2] == (2, widths[-1])


def test_anytime_goes_from_shallow_to_all_and_leaves_the_mode():
    model = small().train()
    x = torch.randn(2, 1, 8, 8)
    got = dict(anytime_predict(model, x))
    assert list(got) == [3, 2, 1, "all"]
    assert model.training
    assert model.blocks[0].columns[0][0].bn.num_batches_tracked == 0
    model.eval()
    assert torch.equal(got["all"], model(x))
    assert torch.equal(got[2], model.forward_column(x, 2))


def test_exports_and_matches():
    model = small(columns=2).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: builder("fractalnet20", num_classes=10, in_chans=1, size=(28, 28))(), "at least 32 pixels; it has 28x28"),
        (lambda: small()(torch.zeros(1, 1, 8, 7)), "at least 8 pixels; it has 8x7"),
        (lambda: small(drop_path=1.0), "drop_path=1.0"),
        (lambda: small(dropout=-0.1), "dropout=-0.1"),
        (lambda: small(columns=0), "at least one"),
        (lambda: extract_column(small(), 4), "column=4"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(Mistake, match=words):
        call()


def test_fit_with_drop_path_resumes_with_equal_bits(tmp_path):
    from convince.data import load
    from convince.fit import folder as disk
    from convince.fit.loop import fit
    from convince.fit.settings import settings as make
    from convince.fit.train import prepare

    data = load("digits", seed=0)
    data = data.subset(data.split.train[:48])
    wanted = make(
        model="fractalnet:widths=(4,6),columns=2,drop_path=0.3,dropout=0.2", augment="none", epochs=1, batch=8, lr=0.02, precision="fp32", checkpoint_seconds=0
    )
    whole, broken = prepare(wanted, data), prepare(wanted, data)
    fit(whole)

    class Stop(Exception):
        pass

    def stop(done, total, line):
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        fit(broken, tmp_path / "checkpoint.safetensors", stop)
    again = prepare(wanted, data)
    fit(again, tmp_path / "checkpoint.safetensors")
    a, b = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    disk.write_config(tmp_path, wanted)
    disk.write_model(tmp_path, whole)
    x = data.x.take(data.split.test[:16])
    torch.testing.assert_close(disk.open_run(tmp_path).logits(x), whole.answer.eval()(x.float() / 255).detach(), rtol=0, atol=0)
