"""Forward-Forward by hand: goodness, its loss, labels on images, wrong labels, one layer's gradient, the answer's passes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from convince.checks.subject import bits, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit, start
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.training.bp_free_training import Dense
from convince.training.forward_forward import ForwardForward, ff_loss, goodness, unit_length, write_pattern, write_pixels, wrong_labels


def made(spec="forward-forward", dense=True, **changes):
    chosen = {"model": "small-cnn:widths=(4,)", "parts": (spec,), "batch": 8, "epochs": 1, "lr": 0.05, "precision": "fp64", "augment": "none"}
    run = prepare(settings(**{**chosen, **changes}), tiny_images(), drop_off=False)
    if dense:
        run.build = lambda: Dense(64, 3, (6, 5))
    return run


def test_goodness_and_loss_by_hand():
    g = goodness(torch.tensor([[1.0, 2.0, -3.0, 0.0]]))
    assert g.tolist() == [1.25]
    at = torch.tensor([2.0])
    assert float(ff_loss(at, at, 2.0)) == pytest.approx(2 * math.log(2))
    assert float(ff_loss(torch.tensor([5.0]), torch.tensor([1.0]), 2.0)) == pytest.approx(math.log1p(math.exp(-3)) + math.log1p(math.exp(-1)))


def test_inputs_have_length_one():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(unit_length(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]), atol=1e-4, rtol=0)


def test_labels_on_images():
    x, y = torch.full((2, 1, 4, 4), 0.5), F.one_hot(torch.tensor([1, 0]), 3).float()
    written = write_pixels(x, y)
    assert written[0].flatten().tolist() == [0, 1, 0] + [0.5] * 13
    assert x.unique().tolist() == [0.5], "the image itself is left alone"
    large = write_pattern(x, y, 0)
    assert set(large.unique().tolist()) == {0.25, 0.75}
    assert torch.equal(large, write_pattern(x, y, 0))
    assert not torch.equal(large[0], large[1])


@quick(deadline=None, max_examples=20)
@given(st.integers(2, 9), st.integers(0, 99))
def test_wrong_labels_are_wrong(k, seed):
    y = F.one_hot(torch.arange(60) % k, k).double()
    wrong = wrong_labels(y, torch.Generator().manual_seed(seed))
    assert bool((wrong.sum(1) == 1).all())
    assert float((wrong * y).sum()) == 0
    assert k > 4 or len(set(wrong.argmax(1).tolist())) == k


def test_one_step_by_hand():
    run = made(steps=1)
    start(run)
    w = {n: t.clone().requires_grad_() for n, t in bits(run.model).items()}
    run = made(steps=1)
    fit(run)
    assert len(run.batch.x) == 16
    x = run.normalise(run.batch.x).flatten(1)
    for name in ("hidden.1", "hidden.3"):
        a = (unit_length(x) @ w[f"{name}.weight"].T + w[f"{name}.bias"]).relu()
        g = a.square().mean(1)
        (F.softplus(2 - g[::2]) + F.softplus(g[1::2] - 2)).mean().backward()
        torch.testing.assert_close(dict(run.model.named_parameters())[f"{name}.weight"].grad, w[f"{name}.weight"].grad)
        x = a.detach()
    assert run.model.fc.weight.grad is None


def test_the_answer_sums_goodness_from_layer_2_on():
    run = made()
    fit(run)
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    scores = run.answer.eval()(x)
    for c in range(3):
        h = run.normalise(write_pixels(x, F.one_hot(torch.full((4,), c), 3).double())).flatten(1)
        h = run.model.hidden[1:3](unit_length(h))
        h = run.model.hidden[3:](unit_length(h))
        torch.testing.assert_close(scores[:, c], h.square().mean(1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())


def test_a_convolution_sees_a_pattern():
    assert made(dense=False).team.seats[0].technique.write == "auto"
    run = made(dense=False, model="small-cnn:widths=(4,8)")
    start(run)
    assert run.team.seats[0].technique.writer(run).pattern
    dense = made()
    start(dense)
    assert not dense.team.seats[0].technique.writer(dense).pattern


@pytest.mark.parametrize("options", [{"theta": 0.0}, {"lr": 0.0}, {"write": "corner"}])
def test_wrong_values_are_named(options):
    with pytest.raises(Mistake, match=next(iter(options))):
        ForwardForward(**options)
