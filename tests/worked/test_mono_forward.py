"""Mono-Forward by hand: parameter counts, the local gradient, the answer, the control that is not local, reloading."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convince.checks.subject import bits, tiny_images
from convince.errors import Mistake
from convince.fit.answer import Answer
from convince.fit.loop import fit, start
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.training.bp_free_training import Dense
from convince.training.mono_forward import MonoForward, combine, flat, goodness


def made(*specs, hidden=(6, 5), **changes):
    chosen = {
        "model": "small-cnn:widths=(4,)",
        "parts": specs,
        "batch": 8,
        "epochs": 1,
        "lr": 0.05,
        "precision": "fp64",
        "augment": "none",
        "weight_decay": 0.0,
    }
    run = prepare(settings(**{**chosen, **changes}), tiny_images(), drop_off=False)
    run.build = lambda: Dense(64, 3, hidden)
    return run


def test_parameters_of_the_twins():
    net = Dense(784, 10, (500, 500))
    assert sum(p.numel() for p in net.parameters()) == 784 * 500 + 500 + 500 * 500 + 500 + 500 * 10 + 10 == 648_010
    MonoForward.rebuild(net, sizes=[500, 500], k=10)
    taught = sum(p.numel() for n, p in net.named_parameters() if not n.startswith("fc."))
    assert taught == 653_000


def test_goodness_is_a_linear_layer():
    a, weight = torch.randn(2, 3, 4, 4).double(), torch.randn(5, 48).double()
    torch.testing.assert_close(goodness(a, weight), a.flatten(1) @ weight.T)
    assert flat(a, 2).shape == (2, 12)
    torch.testing.assert_close(flat(a, 1), a.mean((2, 3)))
    assert torch.equal(flat(a, 9), a.flatten(1))


def test_one_step_by_hand():
    """Each layer and its M follow the cross-entropy of G = a M' alone."""
    run = made("mono-forward", steps=1)
    start(run)
    w = bits(run.model)
    run = made("mono-forward", steps=1)
    fit(run)
    x, y = run.normalise(run.batch.x).flatten(1), run.batch.y
    for i, name in enumerate(("hidden.1", "hidden.3")):
        z = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        a, m = z.relu(), w[f"mono_forward.{i}.weight"]
        error = ((a @ m.T).softmax(1) - y) / len(y)
        grads = dict(run.model.named_parameters())
        torch.testing.assert_close(grads[f"mono_forward.{i}.weight"].grad, error.T @ a)
        torch.testing.assert_close(grads[f"{name}.weight"].grad, ((error @ m) * (z > 0)).T @ x)
        x = a
    assert run.model.fc.weight.grad is None


def test_the_answer_is_the_last_classifiers():
    run = made("mono-forward")
    fit(run)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    a = run.model.hidden(run.normalise(x))
    torch.testing.assert_close(run.answer.eval()(x), F.linear(a, run.model.mono_forward[1].weight))
    mean = made("mono-forward:average=True")
    fit(mean)
    assert not torch.allclose(mean.answer.eval()(x), run.answer.eval()(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())


def test_combine_by_hand():
    scores = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
    assert torch.equal(combine(scores, "last"), scores[1])
    assert combine(scores, "mean").tolist() == [[1.0, 0.5]]
    torch.testing.assert_close(combine(scores, "softmax").exp(), scores.softmax(2).mean(0))


def test_the_control_sends_everything_back():
    run = made("mono-forward:local=False", steps=1)
    start(run)
    w = {n: t.clone().requires_grad_() for n, t in bits(run.model).items()}
    run = made("mono-forward:local=False", steps=1)
    fit(run)
    x, y = run.normalise(run.batch.x).flatten(1), run.batch.y
    a = (x @ w["hidden.1.weight"].T + w["hidden.1.bias"]).relu()
    b = (a @ w["hidden.3.weight"].T + w["hidden.3.bias"]).relu()
    logits = (b @ w["fc.weight"].T + w["fc.bias"], a @ w["mono_forward.0.weight"].T, b @ w["mono_forward.1.weight"].T)
    sum(F.cross_entropy(z, y) for z in logits).backward()
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad)
    assert isinstance(run.answer, Answer)


def test_refuses_in_words():
    with pytest.raises(Mistake, match="side"):
        MonoForward(side=0)
    run = made("mono-forward")
    run.build = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(Mistake, match="hidden layer"):
        start(run)
