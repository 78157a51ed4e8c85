"""DBN by hand: probabilities and free energy of a tiny machine, contrastive divergence, what is copied, the stages."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.backbones.sigmoid_mlp import SigmoidMLP
from convince.checks.subject import bits, equal, tiny_images, tiny_table
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.pretrain.dbn import RBM, inputs, machines, stack_of, unrolled

CHOSEN = {"model": "sigmoid-mlp:hidden=(6,5)", "batch": 8, "epochs": 1, "lr": 0.05, "augment": "none", "precision": "fp64"}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def machine(v=4, h=3, visible="bernoulli", seed=0):
    made = RBM(v, h, visible).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=gen(seed), dtype=torch.float64))
    return made.requires_grad_(False)


def made(*specs, data=None, drop_off=True, **changes):
    return prepare(settings(**{**CHOSEN, **changes}, parts=specs), data or tiny_images(), drop_off=drop_off)


# -- one machine -----------------------------------------------------------------------------------


def test_the_worked_example():
    rbm = RBM(1, 1).double().requires_grad_(False)
    rbm.W.fill_(1.0)
    v = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert float(rbm(v)[1]) == pytest.approx(0.73105858, abs=1e-8)
    assert rbm.free_energy(v).tolist() == pytest.approx([-0.69314718, -1.31326169], abs=1e-8)


def test_sizes():
    assert sum(p.numel() for p in RBM(784, 500).parameters()) == 392_000 + 784 + 500 == 393_284
    assert sum(p.numel() for p in SigmoidMLP(10, 1, (256, 256)).parameters()) == 269_322


def test_weights_start_small_and_biases_at_nothing():
    rbm = RBM(300, 200).requires_grad_(False)
    assert float(rbm.W.std()) == pytest.approx(0.01, rel=0.03)
    assert not bool(rbm.b.any() or rbm.c.any())


@quick(max_examples=10, deadline=None)
@given(st.integers(0, 99))
def test_the_free_energy_sums_over_all_hidden_states(seed):
    """``exp(-F(v)) = sum_h exp(-E(v, h))`` with E written out, for both kinds of visible units."""
    for visible in ("bernoulli", "gaussian"):
        rbm, v = machine(visible=visible, seed=seed), torch.rand(2, 4, generator=gen(seed), dtype=torch.float64)
        total = torch.zeros(2, dtype=torch.float64)
        for state in itertools.product((0.0, 1.0), repeat=3):
            h = torch.tensor(state, dtype=torch.float64)
            own = -(v @ rbm.b) if visible == "bernoulli" else (v - rbm.b).square().sum(1) / 2
            total += (-(own - h @ rbm.c - (v @ rbm.W) @ h)).exp()
        torch.testing.assert_close(rbm.free_energy(v), -total.log())


@quick(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3))
def test_the_gradient_of_the_loss_is_contrastive_divergence(seed, k):
    rbm, v = machine(seed=seed), torch.rand(5, 4, generator=gen(seed), dtype=torch.float64)
    vk, p0 = rbm.gibbs(v, k, gen(7)), rbm(v)
    pk = rbm(vk)
    rbm.requires_grad_(True)
    rbm.cd_loss(v, k, gen(7)).backward()
    torch.testing.assert_close(rbm.W.grad, -(v.T @ p0 - vk.T @ pk) / 5)
    torch.testing.assert_close(rbm.b.grad, -(v - vk).mean(0))
    torch.testing.assert_close(rbm.c.grad, -(p0 - pk).mean(0))


def test_a_gaussian_machine_has_the_same_rule():
    rbm, v = machine(visible="gaussian"), torch.randn(5, 4, generator=gen(), dtype=torch.float64)
    vk = rbm.gibbs(v, 1, gen(7))
    expected = -(v.T @ rbm(v) - vk.T @ rbm(vk)) / 5, -(v - vk).mean(0)
    rbm.requires_grad_(True)
    rbm.cd_loss(v, 1, gen(7)).backward()
    torch.testing.assert_close(rbm.W.grad, expected[0])
    torch.testing.assert_close(rbm.b.grad, expected[1])


def test_the_chain_samples_hidden_units_by_their_probability():
    rbm = RBM(1, 1).requires_grad_(False)
    rbm.W.fill_(1.0)
    rbm.b.fill_(0.5)
    v = rbm.gibbs(torch.ones(4000, 1), 1, gen())
    up, down = 1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-0.5))
    assert sorted({round(value, 5) for value in v.flatten().tolist()}) == pytest.approx([round(down, 5), round(up, 5)], abs=1e-5)
    assert float((v > 0.7).float().mean()) == pytest.approx(0.73105858, abs=0.03)


def test_a_persistent_chain_starts_elsewhere():
    rbm, v = machine(), torch.rand(5, 4, generator=gen(), dtype=torch.float64)
    chain = torch.rand(5, 4, generator=gen(1), dtype=torch.float64)
    expected = rbm.free_energy(v).mean() - rbm.free_energy(rbm.gibbs(chain, 2, gen(3))).mean()
    torch.testing.assert_close(rbm.cd_loss(v, 2, gen(3), chain), expected)


def test_free_energy_agrees_with_sklearn():
    sklearn = pytest.importorskip("sklearn.neural_network")
    rbm, v = machine(), (torch.rand(6, 4, generator=gen(), dtype=torch.float64) > 0.5).double()
    other = sklearn.BernoulliRBM(n_components=3)
    other.components_, other.intercept_hidden_, other.intercept_visible_ = rbm.W.T.numpy(), rbm.c.numpy(), rbm.b.numpy()
    assert other._free_energy(v.numpy()).tolist() == pytest.approx(rbm.free_energy(v).tolist())


def test_reconstruction_of_digits_halves_in_ten_epochs():
    from sklearn.datasets import load_digits

    v = torch.tensor(load_digits().data / 16, dtype=torch.float32)[:1000]
    rbm = RBM(64, 64).requires_grad_(False)
    rbm.W.copy_(0.01 * torch.randn(64, 64, generator=gen()))
    rows = gen(1)
    first = float((v - rbm.reconstruct(v)).square().mean())
    for _ in range(10):
        for batch in v.split(20):
            rbm.cd_step(batch, rows, lr=0.1)
    assert float((v - rbm.reconstruct(v)).square().mean()) < 0.5 * first


def test_unrolled_starts_as_up_and_down():
    stack, v = [machine(4, 3), machine(3, 2, seed=1)], torch.rand(5, 4, generator=gen(), dtype=torch.float64)
    torch.testing.assert_close(unrolled(stack)(v), stack[0].down(stack[1].reconstruct(stack[0](v))))


# -- in a run --------------------------------------------------------------------------------------


def test_the_network_computes_what_the_machines_do():
    for data, changes in ((tiny_images(), {}), (tiny_images(), {"visible": "gaussian"}), (tiny_table(), {})):
        run = made(parts.spell("dbn", {"epochs": 2, **changes}), data=data, epochs=0)
        fit(run)
        run.model.eval()
        x = run.plan.pixels(data.x.take(torch.arange(10)))
        with torch.no_grad():
            expected = machines(run)[1](inputs(run, x, 1))
            torch.testing.assert_close(run.model.forward_features(run.normalise(x)), expected)
        assert machines(run)[0].visible == ("bernoulli" if data is tiny_images() and not changes else "gaussian")
        assert run.record.rows


def test_each_stage_moves_its_machine_only():
    run = made("dbn:epochs=1", epochs=0)
    seen = []

    def watch(done, total, text):
        seen.append([machine.W.detach().clone() for machine in machines(run)] + [run.model.fc.weight.detach().clone()])

    fit(run, None, watch)
    assert len(seen) == 8
    assert torch.equal(seen[0][1], seen[3][1])
    assert not torch.equal(seen[0][0], seen[3][0])
    assert torch.equal(seen[4][0], seen[7][0])
    assert not torch.equal(seen[4][1], seen[7][1])
    assert torch.equal(seen[0][2], seen[7][2])


def test_rows_without_labels_are_learnt_from():
    data = tiny_images()
    y = data.y.clone()
    y[data.split.train[8:]] = -1
    run = made("dbn:epochs=1", data=dataclasses.replace(data, y=y), epochs=1)
    fit(run)
    assert run.images == 2 * 32 + 8


def test_rectifiers_become_sigmoids_and_names_stay():
    run = made("dbn:epochs=1", data=tiny_table(), model="mlp:hidden=(6,)")
    fit(run)
    assert not [m for m in run.model.modules() if isinstance(m, nn.ReLU)]
    assert [name for name, _ in stack_of(run.model)] == ["hidden.0"]


def test_off_is_the_baseline():
    plain, off = made(), made("dbn:epochs=0", drop_off=False)
    fit(plain)
    fit(off)
    assert not equal(bits(plain.answer), bits(off.answer))


def test_other_networks_and_wrong_options_are_refused():
    with pytest.raises(Mistake, match="sigmoid-mlp"):
        fit(made("dbn", model="small-cnn:widths=(4,)"))
    with pytest.raises(Mistake, match="gaussian"):
        fit(made("dbn:visible=bernoulli", data=tiny_table()))
    for options in ({"epochs": -1}, {"k": 0}, {"visible": "poisson"}, {"lr": 0.0}):
        with pytest.raises(Mistake, match=next(iter(options))):
            parts.make("dbn", **options)
