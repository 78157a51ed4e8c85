"""TrAct by hand: the worked gradient, the definition on patches, both forms, its limit, which layer is first, runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.checks.subject import MODEL, bits, equal, tiny_images, tiny_table
from convince.errors import Mistake
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.optim import tract as part
from convince.optim.tract import TrAct, first_layer, gram, in_pieces, rows, tract, tract_of_few

X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
G = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator("tract", seed, *shape), dtype=torch.float64)


def test_worked_example():
    torch.testing.assert_close(X.T @ X / 3, torch.tensor([[2 / 3, 1 / 3], [1 / 3, 5 / 3]], dtype=torch.float64))
    assert (G.T @ X).tolist() == [[0.0, -1.0]]
    found = tract(G.T @ X, X.T @ X / 3, 0.1)
    torch.testing.assert_close(found, torch.tensor([[0.26809651, -0.61662198]], dtype=torch.float64), rtol=0, atol=5e-9)
    torch.testing.assert_close(tract_of_few(G.T @ X, X, 0.1), found)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.floats(0.01, 10), st.integers(0, 2**30))
@settings(max_examples=50, deadline=None)
def test_both_forms_are_the_formula(b, n, m, l, seed):  # noqa: E741
    x, g = normal(b, n, seed=seed), normal(b, m, seed=seed)
    expected = g.T @ x @ torch.linalg.inv(x.T @ x / b + l * torch.eye(n, dtype=x.dtype))
    torch.testing.assert_close(tract(g.T @ x, x.T @ x / b, l), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(tract_of_few(g.T @ x, x, l), expected, rtol=1e-8, atol=1e-10)


def test_it_is_the_step_that_serves_the_activations():
    """The weights nearest to ``z - G`` under the ridge, by a solver that knows nothing of the formula."""
    x, g = normal(20, 4), normal(20, 3)
    tall = torch.cat([x / math.sqrt(20), math.sqrt(0.1) * torch.eye(4, dtype=x.dtype)])
    wanted = torch.cat([-g / math.sqrt(20), torch.zeros(4, 3, dtype=x.dtype)])  # |x d^T + g|^2 / b + 0.1 |d|^2
    best = torch.linalg.lstsq(tall, wanted).solution.T
    torch.testing.assert_close(tract(g.T @ x, x.T @ x / 20, 0.1) / 20, -best)


def test_a_large_l_gives_the_plain_gradient():
    plain, moment = normal(3, 4), normal(9, 4).T @ normal(9, 4) / 9
    found = 1e4 * tract(plain, moment, 1e4)
    assert float((found - plain).norm() / plain.norm()) < 1e-3


LAYERS = [
    nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1), bias=False), nn.Conv2d(1, 2, 3, dilation=2),
    nn.Conv2d(3, 2, 4, stride=4), nn.Conv2d(2, 2, (4, 3), padding="same"), nn.Conv2d(2, 2, 2, padding="valid"), nn.Linear(5, 3),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_are_what_the_weights_multiply(layer):
    """rows @ W^T + bias is the layer's output, so G^T rows is its gradient."""
    layer = copy.deepcopy(layer).double()
    x = normal(2, 4, 5) if isinstance(layer, nn.Linear) else normal(2, layer.in_channels, 9, 8)
    found = rows(layer, x) @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)
    out = layer(x)
    expected = out.reshape(-1, out.shape[-1]) if isinstance(layer, nn.Linear) else out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
    torch.testing.assert_close(found, expected)


def test_gram_in_pieces(monkeypatch):
    layer, x = nn.Conv2d(2, 3, 3, padding=1).double(), normal(5, 2, 6, 6)
    whole = rows(layer, x)
    monkeypatch.setattr(part, "ROWS", 80)  # two images of 36 patches at a time
    pieces = list(in_pieces(layer, x))
    assert [len(p) for p in pieces] == [72, 72, 36]
    total, count = gram(pieces)
    assert count == 180
    torch.testing.assert_close(total, whole.T @ whole)


@pytest.mark.parametrize(("spec", "name"), [("resnet8", "conv1"), ("small-cnn", "features.0"), ("nin-mini", None)])
def test_the_first_layer_is_the_one_that_runs_first(spec, name):
    model = builder(spec, num_classes=3, in_chans=1, size=(16, 16))().eval()
    found, layer = first_layer(model, torch.zeros(1, 1, 16, 16))
    assert name in (found, None)
    assert layer.in_channels == 1
    assert not layer._forward_pre_hooks


def test_order_of_execution_not_of_definition():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.stem = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(self.stem(x))

    assert first_layer(Late(), torch.zeros(1, 3))[0] == "stem"


@pytest.mark.parametrize("model", [
    nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.ConvTranspose2d(2, 2, 3), nn.Identity(),
], ids=str)  # fmt: skip
def test_other_first_layers_are_refused(model):
    with pytest.raises(Mistake, match="tract: "):
        first_layer(model, torch.zeros(1, 2, 8, 8))


def run(*parts, data=None, **changes):
    chosen = {"model": MODEL, "batch": 8, "epochs": 2, "lr": 0.05, "precision": "fp64", "checkpoint_seconds": 0, "augment": "none", "parts": parts, **changes}
    return prepare(make(**chosen), data or tiny_images())


def by_definition(gradients, layer, x, g):
    """G^T X (X^T X / b + 0.1 I)^-1 with G the gradient of the layer's output."""
    x, g = rows(layer, x), g.permute(0, 2, 3, 1).reshape(-1, g.shape[1])
    expected = g.T @ x @ torch.linalg.inv(x.T @ x / len(x) + 0.1 * torch.eye(x.shape[1], dtype=x.dtype))
    torch.testing.assert_close(gradients["conv1.weight"].flatten(1), expected, rtol=1e-7, atol=1e-12)


def test_only_the_first_weight_differs_in_a_run():
    plain, changed = run(), run("tract")
    kept = {}
    for name, one in (("plain", plain), ("tract", changed)):
        fit(one, None, lambda *_, one=one, name=name: kept.setdefault(name, {n: p.grad.clone() for n, p in one.model.named_parameters()}))
    different = [n for n in kept["plain"] if not torch.equal(kept["plain"][n], kept["tract"][n])]
    assert different == ["conv1.weight"]
    again = run("tract", epochs=1)
    seen = []

    def before(loop):
        seen.append(loop.model.conv1.weight.grad.clone())

    inner = again.team.seats[0].technique
    own = inner.on_grad

    def both(loop):
        x, before = inner.seen[0].clone(), loop.model.conv1.weight.grad.clone()
        own(loop)
        moment, count = gram([rows(loop.model.conv1, x)])
        torch.testing.assert_close(loop.model.conv1.weight.grad, tract(before, moment / count, 0.1))
        seen.append(len(inner.seen))

    inner.on_grad = both
    fit(again)
    assert seen == [0] * 4


def test_the_definition_holds_through_the_network():
    """With the real G of the pre-activations, taken by autograd."""
    one = run("tract", steps=1)
    caught = {}

    def watch(module, inputs, output):
        if module.training and torch.is_grad_enabled():
            caught["x"] = inputs[0].detach()
            output.register_hook(lambda g: caught.__setitem__("g", g.clone()))

    inner = one.team.seats[0].technique
    start = inner.on_start

    def on_start(loop):
        start(loop)
        loop.model.conv1.register_forward_hook(watch)

    inner.on_start = on_start
    fit(one, None, lambda *_: caught.update(grads={n: p.grad.clone() for n, p in one.model.named_parameters()}))
    by_definition(caught["grads"], one.model.conv1, caught["x"], caught["g"])


def test_a_table_with_fewer_rows_than_features():
    data = tiny_table()
    changed = run("tract", model="mlp:hidden=(8,)", data=data, batch=3, epochs=1)
    plain = run(model="mlp:hidden=(8,)", data=data, batch=3, epochs=1)
    fit(changed)
    fit(plain)
    assert equal(bits(plain.model), bits(changed.model)) == "hidden.0.weight"


def test_network_is_left_as_found_and_answers_alike(tmp_path):
    one = run("tract", precision="fp32")
    fit(one)
    assert not one.model.conv1._forward_hooks
    write_config(tmp_path, one.settings)
    write_model(tmp_path, one)
    x = one.data.x.take(one.data.split.test)
    assert torch.equal(open_run(tmp_path).logits(x), one.answer.eval()(x.float() / 255))


def test_interrupted_and_resumed(tmp_path):
    whole = run("tract")
    fit(whole)

    def stop(done, total, text):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(run("tract"), tmp_path / "c", stop)
    again = run("tract")
    fit(again, tmp_path / "c")
    assert not equal(bits(whole.model), bits(again.model))


def test_a_frozen_first_layer_is_left_alone():
    from convince.fit import loop as house

    one = run("tract", epochs=1)
    stage = house.Stage("train", 1, trainable=lambda name: name != "conv1.weight")
    original = house._stage
    house._stage = lambda run, ahead: stage if run.stage_number == 0 else None
    try:
        fit(one)
    finally:
        house._stage = original
    assert one.model.conv1.weight.grad is None


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
def test_bad_l_is_named(value):
    with pytest.raises(Mistake, match=f"tract: l={value}"):
        TrAct(l=value)


def test_gram_joins_the_passes_of_a_step():
    """Two passes on halves of a batch give the Gram matrix of the whole."""
    x = normal(6, 4)
    total, count = gram([x[:2], x[2:]])
    assert count == 6
    torch.testing.assert_close(total, x.T @ x)
