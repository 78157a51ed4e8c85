"""tpSGD by hand: the worked deltas, one layer's gradient, targets, the cut between layers, recurrent layers, memory, refusals."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince.checks.subject import bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit, start
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Technique
from convince.fit.train import prepare
from convince.training.tpsgd import TPSGD, layers_of, local_delta, one_step, peak_saved, projection


class Net(nn.Module):
    def __init__(self, *body: nn.Module, width: int = 6):
        super().__init__()
        self.body, self.fc = nn.Sequential(*body), nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.body(x))


def dense(depth=2, width=6):
    return Net(nn.Flatten(), *(m for i in range(depth) for m in (nn.Linear(64 if i == 0 else width, width), nn.Tanh())), width=width)


def made(*specs, build=dense, **changes) -> Run:
    chosen = {"model": "small-cnn:widths=(4,)", "parts": specs, "batch": 8, "epochs": 1, "lr": 0.05, "precision": "fp64", "augment": "none"}
    run = prepare(settings(**{**chosen, **changes}), tiny_images(), drop_off=False)
    if build is not None:
        run.build = build
    return run


def test_worked_example():
    h, target = torch.tensor([[0.2, 0.9]]), torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(local_delta(h, target), torch.tensor([[-1.6, 1.8]]))
    assert local_delta(h, target, "l1").tolist() == [[-1, 1]]
    assert torch.equal(local_delta(h, target, drtp=True), target)


@quick(deadline=None, max_examples=20)
@given(st.sampled_from(["uniform", "gaussian", "sign"]), st.booleans(), st.integers(0, 99))
def test_projections_lie_in_their_range(law, positive, seed):
    drawn = projection(40, 3, law, positive, torch.Generator().manual_seed(seed))
    assert drawn.shape == (40, 3)
    assert not positive or bool((drawn >= 0).all())
    assert law == "gaussian" or float(drawn.abs().max()) <= 1
    assert law != "sign" or set(drawn.unique().tolist()) == ({0, 1} if positive else {-1, 1})


def test_one_step_is_the_local_gradient_and_the_heads():
    """dW_1 = scale / (n d) sum_rows 2 (h - P y) (1 - h^2) x', and the head's is that of the cross-entropy on detached input."""
    run, seen = made("tpsgd"), {}

    class Watch(Technique):
        def on_grad(self, run):
            if not seen:
                seen.update(x=run.normalise(run.batch.x).clone(), y=run.batch.y.clone(), weights=bits(run.model))
                seen["grads"] = {n: p.grad.clone() for n, p in run.model.named_parameters()}

    run.team.seats.append(dataclasses.replace(run.team.seats[0], technique=Watch()))
    run.team._hooks["on_grad"].append(run.team.seats[-1])
    fit(run)
    part = run.team.seats[0].technique
    x, y, w, grads = seen["x"].flatten(1), seen["y"], seen["weights"], seen["grads"]
    h1 = (x @ w["body.1.weight"].T + w["body.1.bias"]).tanh()
    h2 = (h1 @ w["body.3.weight"].T + w["body.3.bias"]).tanh()
    for i, (below, h, name) in enumerate([(x, h1, "body.1"), (h1, h2, "body.3")]):
        dz = part.scale / h.numel() * 2 * (h - y @ part.matrices[i].T) * (1 - h.square())
        torch.testing.assert_close(grads[f"{name}.weight"], dz.T @ below)
        torch.testing.assert_close(grads[f"{name}.bias"], dz.sum(0))
    error = ((h2 @ w["fc.weight"].T + w["fc.bias"]).softmax(1) - y) / len(y)
    torch.testing.assert_close(grads["fc.weight"], error.T @ h2)


def test_scale_0_leaves_hidden_layers_as_drawn():
    run = made("tpsgd:scale=0.0", weight_decay=0.0)
    start(run)
    before = bits(run.model)
    run = made("tpsgd:scale=0.0", weight_decay=0.0)
    fit(run)
    moved = {n for n, t in run.model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"fc.weight", "fc.bias"}


def test_no_gradient_spans_layers():
    """The head's loss, changed at will, leaves the hidden layers' bits alone; backpropagation would not."""
    plain = made("tpsgd", steps=1)
    fit(plain)
    plain_head = plain.model.fc.weight.clone()

    class Louder(Technique):
        def on_loss(self, run):
            run.loss = 100 * run.loss

    loud = made("tpsgd", steps=1)
    loud.team._hooks["on_loss"].append(dataclasses.replace(loud.team.seats[0], technique=Louder()))
    fit(loud)
    a, b = plain.model.state_dict(), loud.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a if n.startswith("body."))
    assert not torch.equal(plain_head, loud.model.fc.weight)


def test_layers_of_a_residual_network():
    run = made(build=None, model="resnet:layers=(1,1),widths=(4,8)")
    start(run)
    found = [layer.modules for layer in layers_of(run, "tpsgd")]
    assert found == [
        ("conv1", "bn1", "relu", "maxpool"),
        ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.act1"),
        ("layer1.0.conv2", "layer1.0.bn2"),
        ("layer2.0.conv1", "layer2.0.bn1", "layer2.0.act1"),
        ("layer2.0.conv2", "layer2.0.bn2"),
        ("layer2.0.downsample.0", "layer2.0.downsample.1"),
        ("fc",),
    ]


def test_hooks_do_not_stay():
    run = made("tpsgd")
    fit(run)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_layer_is_cut_at_each_step(batch_first):
    torch.manual_seed(0)
    rnn = nn.RNN(3, 4, batch_first=batch_first).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64) if batch_first else torch.randn(5, 2, 3, dtype=torch.float64)
    h = rnn(x)[0]
    again = one_step(rnn, x, h)
    torch.testing.assert_close(again, h)
    last = again.select(1 if batch_first else 0, -1).sum()
    (grad,) = torch.autograd.grad(last, rnn.weight_hh_l0)
    steps = h.detach() if batch_first else h.detach().transpose(0, 1)
    torch.testing.assert_close(grad, (1 - steps[:, -1].square()).T @ steps[:, -2])


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.RNN(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.rnn(x[:, 0])[0][:, -1])


@pytest.mark.parametrize("option", ["last_step=False", "last_step=True"])
def test_a_recurrent_network_trains(option):
    run = made(f"tpsgd:{option}", build=Rows)
    start(run)
    before = bits(run.model)
    run = made(f"tpsgd:{option}", build=Rows)
    fit(run)
    assert all(not torch.equal(t, before[n]) for n, t in run.model.state_dict().items())


def test_layers_take_turns():
    moved = []
    run = made("tpsgd:turns=True", epochs=2, weight_decay=0.0, schedule="constant")
    fit(run, None, lambda *_: moved.append([n for n, p in run.model.named_parameters() if p.grad is not None and n.startswith("body.")]))
    assert all(names == ["body.1.weight", "body.1.bias"] for names in moved[:4])
    assert all(names == ["body.3.weight", "body.3.bias"] for names in moved[4:])
    with pytest.raises(Mistake, match="turns=True"):
        fit(made("tpsgd:turns=True", epochs=1))


def test_memory_is_that_of_one_layer():
    """6 hidden layers of 64: tanh keeps its output [8 64]; the layer keeps its input, of the same size."""

    def held(*specs):
        build = lambda: dense(6, 64)  # noqa: E731
        run = made(*specs, build=build, steps=1, precision="fp32")
        return peak_saved(lambda: fit(run), build())

    bp, local = held(), held("tpsgd")
    assert bp >= 7 * 8 * 64 * 4
    assert local <= 0.6 * bp


def test_peak_saved_by_hand():
    layer = nn.Linear(4, 4, bias=False)
    x = torch.ones(10, 4)
    assert peak_saved(lambda: layer(x).sum().backward(), layer) == x.numel() * 4
    assert peak_saved(lambda: [layer(torch.ones(10, 4)).tanh().sum().backward() for _ in range(3)], layer) <= 3 * 160


def test_targets_by_hand():
    run = made("tpsgd:maps=channel", build=lambda: Net(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), width=8))
    fit(run)
    part = run.team.seats[0].technique
    assert part.layers[0].positive
    assert part.layers[0].shape == (8,)
    y = F.one_hot(torch.tensor([1, 0]), 3).double()
    h = torch.zeros(2, 8, dtype=torch.float64)
    torch.testing.assert_close(part._target(run, 0, part.layers[0], y, h), part.matrices[0].T[[1, 0]])
    assert bool((part.matrices[0] >= 0).all())


@pytest.mark.parametrize("option", ["loss=l3", "law=cauchy", "maps=all", "scale=-1.0"])
def test_wrong_values_are_named(option):
    with pytest.raises(Mistake, match=option.split("=")[0]):
        made(f"tpsgd:{option}")


class Token(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.fc = nn.Parameter(torch.zeros(1)), nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(x.flatten(1)) + self.token


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Token, "'the network'"),
        (lambda: Net(nn.Flatten(), nn.Linear(64, 6), nn.PReLU()), "PReLU"),
        (lambda: Net(nn.Flatten(), width=64), "hidden layer"),
        (lambda: Net(nn.RNN(8, 6, num_layers=2)), "several layers"),
    ],
)
def test_refuses_in_words(build, words):
    with pytest.raises(Mistake, match=words):
        start(made("tpsgd", build=build))


def test_off_it_is_not_the_baseline():
    plain, local = made(), made("tpsgd")
    fit(plain)
    fit(local)
    assert equal(bits(plain.model), bits(local.model))
    assert TPSGD() == TPSGD()
