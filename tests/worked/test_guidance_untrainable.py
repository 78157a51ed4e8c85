"""Guidance by hand: CKA of the worked example and its invariances, the layer map, the loss, where a guide comes from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.plain_cnn import PlainCNN
from convince.checks.subject import bits, equal, tiny_images, tiny_table
from convince.distill.guidance_untrainable import (
    OWN_SEED,
    GuidanceUntrainable,
    alignment,
    gram,
    guidance_loss,
    layer_map,
    linear_cka,
    observe,
)
from convince.errors import Mistake
from convince.fit.folder import open_run
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare, train

CHOSEN = {"model": "plain-cnn:layers=(2,2),widths=(4,4)", "batch": 8, "epochs": 2, "augment": "none", "precision": "fp32", "lr": 0.05, "checkpoint_seconds": 0}
GUIDE = "guide=small-cnn:widths=(4,)"
PART = "guidance-untrainable"


def drawn(*shape, who=0):
    return torch.randn(*shape, generator=generator("guidance", who), dtype=torch.float64)


def spec(*options):
    return f"{PART}:" + ",".join(("guide='small-cnn:widths=(4,)'", *options))


def run_with(*options, data=None, **changes):
    run = prepare(settings(**{**CHOSEN, "parts": (spec(*options),), **changes}), data or tiny_images(), drop_off=False)
    fit(run)
    return run


# -- CKA -------------------------------------------------------------------------------------------


def test_cka_of_the_worked_example():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 1.0], [2.0, 0.0], [-3.0, -1.0]], dtype=torch.float64)
    assert float(linear_cka(x, y)) == pytest.approx(0.95502302, abs=5e-9)
    # by hand: X'Y = [[4, 2], [5, 1]], X'X = [[2, 1], [1, 2]], Y'Y = [[14, 4], [4, 2]]
    assert float(linear_cka(x, y)) == pytest.approx(46 / (10 * 232) ** 0.5, rel=1e-12)


def test_the_gram_form_is_the_feature_form():
    x, y = drawn(9, 5), drawn(9, 30, who=1)
    a, b = x - x.mean(0), y - y.mean(0)
    direct = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert float(linear_cka(x, y)) == pytest.approx(float(direct), rel=1e-12)


@quick(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.integers(1, 6), st.floats(0.1, 1e3), st.integers(0, 99))
def test_cka_does_not_see_scale_rotation_or_shift(n, d, c, who):
    x = drawn(n, d, who=who)
    rotation = torch.linalg.qr(drawn(d, d, who=who + 1))[0]
    assert float(linear_cka(x, c * x @ rotation + 3 * c)) == pytest.approx(1, abs=1e-6)
    y = drawn(n, 4, who=who + 2)
    assert -1e-12 <= float(linear_cka(x, y)) <= 1 + 1e-12
    assert float(linear_cka(x, y)) == pytest.approx(float(linear_cka(y, x)), rel=1e-9)


def test_a_layer_without_signal_gets_no_endless_gradient():
    y = drawn(8, 6, who=1)
    sizes = []
    for scale in (1e-2, 1e-6, 1e-12):
        x = (scale * drawn(8, 5)).requires_grad_(True)
        (gradient,) = torch.autograd.grad(linear_cka(x, y), x)
        sizes.append(float(gradient.norm()))
    assert sizes[0] > 1
    assert sizes[2] < sizes[1] < 1e3


def test_constant_features_give_zero_and_finite_gradients():
    x = torch.ones(4, 3, requires_grad=True)
    value = linear_cka(x, drawn(4, 3).float())
    value.backward()
    assert float(value.detach()) == 0
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_the_gradient_is_that_of_the_feature_form():
    x, y = drawn(5, 3).requires_grad_(True), drawn(5, 4, who=1)
    a, b = x - x.mean(0), y - y.mean(0)
    direct = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    (expected,) = torch.autograd.grad(direct, x)
    (found,) = torch.autograd.grad(linear_cka(x, y), x)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_loss_is_the_sum_over_pairs():
    a, b, c = (gram(drawn(6, 3, who=i)) for i in range(3))
    expected = (1 - alignment(a, b)) + (1 - alignment(a, c))
    assert float(guidance_loss([a, a], [b, c])) == pytest.approx(float(expected), rel=1e-12)
    assert float(guidance_loss([a, b], [a, b])) == pytest.approx(0, abs=1e-12)


# -- layers ----------------------------------------------------------------------------------------


def test_layer_map_as_released():
    assert layer_map(3, 3) == {0: 0, 1: 1, 2: 2}
    assert layer_map(5, 3) == {0: 0, 2: 1, 4: 2}, "a short guide leads some layers"
    assert layer_map(3, 5) == {0: 1, 1: 2, 2: 4}, "0, 0.5, 1, 1.5, 2 round to 0, 0, 1, 2, 2 (half to even); the last guide layer wins"
    assert layer_map(4, 1) == {3: 0}
    assert layer_map(1, 4) == {0: 3}
    with pytest.raises(Mistake, match="at least one layer"):
        layer_map(0, 3)


@given(st.integers(1, 60), st.integers(2, 60))
def test_the_last_layers_meet(targets, guides):
    pairs = layer_map(targets, guides)
    assert pairs[targets - 1] == guides - 1
    assert len(pairs) <= min(targets, guides) or guides > targets
    assert list(pairs.values()) == sorted(pairs.values())


def test_layers_are_seen_in_order_of_execution_and_before_the_activation():
    net = PlainCNN(3, 1, (2, 2), (4, 4))
    x = torch.rand(5, 1, 8, 8)
    seen = observe(net, lambda: net(x), lambda output: output)
    assert list(seen) == ["convs.0", "convs.1", "convs.2", "convs.3", "fc"]
    assert float(seen["convs.0"].detach().min()) < 0
    assert all(not module._forward_hooks for module in net.modules())
    with pytest.raises(RuntimeError):
        observe(net, lambda: net(x.repeat(1, 2, 1, 1)), len)
    assert all(not module._forward_hooks for module in net.modules()), "a hook stayed behind after an error"


def test_attention_and_recurrent_layers_count():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 4, batch_first=True)
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            h = self.rnn(x)[0]
            return self.norm(self.attend(h, h, h)[0])

    net = Mixed()
    seen = observe(net, lambda: net(torch.rand(5, 6, 3)), lambda output: tuple(output.shape))
    assert next(iter(seen.items())) == ("rnn", (5, 6, 4))
    assert list(seen)[-2:] == ["attend", "norm"]


# -- the network it is for -------------------------------------------------------------------------


def test_the_residual_twin_has_the_same_parameters():
    plain, twin = (PlainCNN(10, 1, (4, 4, 4, 4), (12, 12, 12, 12), skip=skip) for skip in (False, True))
    assert sum(p.numel() for p in plain.parameters()) == 120 + 15 * 1308 + 130
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in twin.named_parameters()}
    twin.load_state_dict(plain.state_dict())
    x = torch.rand(2, 1, 14, 14)
    assert plain.forward_features(x).shape == twin.forward_features(x).shape == (2, 12, 2, 2)
    assert not torch.equal(plain(x), twin(x))


def test_skips_pass_the_input_where_convolutions_are_zero():
    twin = PlainCNN(3, 1, (2, 3), (2, 4), skip=True)
    for p in twin.convs.parameters():
        nn.init.zeros_(p)
    x = torch.rand(2, 1, 6, 6)
    features = twin.forward_features(x).detach()
    assert torch.allclose(features[:, :1], nn.functional.avg_pool2d(x, 2))
    assert float(features[:, 1:].abs().max()) == 0


def test_he_weights_keep_the_signal_that_the_default_loses():
    x = torch.rand(16, 1, 8, 8)
    spread = {}
    for init in ("default", "he"):
        torch.manual_seed(0)
        net = PlainCNN(3, 1, (16,), (16,), init=init)
        spread[init] = float(net.forward_features(x).std(0).mean().detach())
    assert spread["he"] > 1e3 * spread["default"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": (4,)}, "same number"),
        ({"layers": (2, 2), "widths": (8, 4), "skip": True}, "must not fall"),
        ({"layers": (0,), "widths": (4,)}, "at least one"),
    ],
)
def test_a_wrong_shape_is_named(options, words):
    with pytest.raises(Mistake, match=words):
        PlainCNN(3, 1, **options)


# -- runs ------------------------------------------------------------------------------------------


def test_an_untrained_guide_has_random_weights_of_its_own():
    run = run_with("train_guide=0")
    (child,) = run.children
    assert child.steps_done == 0
    assert child.seed == run.seed + OWN_SEED
    plain = prepare(settings(**CHOSEN), tiny_images())
    fit(plain)
    assert equal(bits(run.model), bits(plain.model)), "the guide changes nothing"
    assert run.images == plain.images, "passes of the guide were counted as the network's"


def test_the_guide_is_trained_first_by_the_same_optimiser_and_stays_as_it_is():
    run = run_with("train_guide=1", parts=(spec("train_guide=1"), "adamw"), lr=1e-3)
    (child,) = run.children
    alone = prepare(settings(**{**CHOSEN, "model": "small-cnn:widths=(4,)", "epochs": 1, "parts": ("adamw",), "lr": 1e-3, "seed": OWN_SEED}), tiny_images())
    fit(alone)
    assert not equal(bits(child.model), bits(alone.model))
    as_long = run_with()
    assert as_long.children[0].steps_done == as_long.steps_done


def test_alignment_alone_is_learnt_without_labels():
    data = tiny_images()
    hidden = dataclasses.replace(data, y=torch.where(torch.isin(torch.arange(len(data.y)), data.split.train), -1, data.y))
    run = prepare(settings(**{**CHOSEN, "epochs": 0, "parts": (spec("train_guide=0", "align=20"),)}), hidden)
    fit(run)
    losses = [row["loss"] for row in run.record.rows if row.get("stage") == "guidance"]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert sum(row.get("name") == "CKA with the guide" for row in run.record.rows) == 20


def test_a_trained_guide_needs_labels():
    data = tiny_images()
    hidden = dataclasses.replace(data, y=torch.full_like(data.y, -1))
    run = prepare(settings(**{**CHOSEN, "parts": (spec("align=1"),)}), hidden)
    with pytest.raises(Mistake, match="train_guide=0"):
        fit(run)


def test_until_ends_the_guidance():
    plain = prepare(settings(**CHOSEN), tiny_images())
    fit(plain)
    assert not equal(bits(run_with("train_guide=0", "until=0").model), bits(plain.model))
    assert equal(bits(run_with("train_guide=0", "until=1").model), bits(run_with("train_guide=0").model))


def test_noise_is_another_guide_input_and_off_is_off():
    seen, noise = run_with("train_guide=0"), run_with("train_guide=0", "noise=true")
    assert equal(bits(seen.model), bits(noise.model))
    assert not equal(bits(noise.model), bits(run_with("train_guide=0", "noise=true").model))
    plain = prepare(settings(**CHOSEN), tiny_images())
    fit(plain)
    off = run_with("weight=0.0", "align=3")
    assert not equal(bits(off.model), bits(plain.model))
    assert off.children == []


def test_a_finished_run_is_a_guide(tmp_path):
    train(settings(**{**CHOSEN, "model": "small-cnn:widths=(4,)", "epochs": 1}), tiny_images(), folder=tmp_path / "guide")
    done = train(settings(**CHOSEN, parts=(f"{PART}:guide={tmp_path / 'guide'}",)), tiny_images(), folder=tmp_path / "run")
    assert done.run.children == []
    x = tiny_images().x.take(torch.arange(4))
    assert torch.equal(open_run(tmp_path / "run").logits(x), done.answer(x.float() / 255))
    wide = prepare(settings(**CHOSEN, parts=(f"{PART}:guide={tmp_path / 'guide'}",)), tiny_images(side=10))
    with pytest.raises(Mistake, match="same --size"):
        fit(wide)
    with pytest.raises(Mistake, match="no such run"):
        fit(prepare(settings(**CHOSEN, parts=(f"{PART}:guide={tmp_path / 'nothing'}",)), tiny_images()))


def test_resumed_in_the_alignment_and_in_the_main_stage_the_bits_are_equal(tmp_path):
    chosen = settings(**{**CHOSEN, "parts": (spec("train_guide=1", "align=1", "noise=true"),)})
    whole = prepare(chosen, tiny_images())
    fit(whole)
    for at in (2, 6, 9):  # in the guide, in the stage before, in the main stage

        class Stop:
            steps = 0

            def __call__(self, done, total, text, at=at):
                self.steps += 1
                if self.steps == at:
                    raise KeyboardInterrupt

        path = tmp_path / f"{at}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            fit(prepare(chosen, tiny_images()), path, Stop())
        again = prepare(chosen, tiny_images())
        fit(again, path)
        assert not equal(bits(whole.model), bits(again.model))


def test_defaults_suit_the_input():
    def spec_of(data, model):
        run = prepare(settings(**{**CHOSEN, "model": model, "parts": (PART,)}), data)
        return run.team.seats[0].technique._spec(run).settings

    assert spec_of(tiny_images(), CHOSEN["model"])["model"] == "resnet20"
    assert spec_of(tiny_images(side=64), CHOSEN["model"])["model"] == "resnet18-slim"
    wide = spec_of(tiny_table(), "mlp:hidden=(8,)")["model"]
    assert isinstance(builder(wide, num_classes=3, in_chans=5, size=())(), nn.Module)
    assert run_with("train_guide=0", data=tiny_images()).children


def test_a_table_is_guided_too():
    run = prepare(settings(**{**CHOSEN, "model": "mlp:hidden=(8,8)", "parts": (f"{PART}:train_guide=0",)}), tiny_table())
    fit(run)
    assert [name for name, _, _ in run.team.seats[0].technique._pairs] == ["hidden.0", "hidden.2", "fc"]


def test_a_layer_without_weights_is_no_guide():
    with pytest.raises(Mistake, match=PART):
        fit(prepare(settings(**{**CHOSEN, "parts": (f"{PART}:guide=resnot20",)}), tiny_images()))
    with pytest.raises(Mistake, match="batch of 1 rows"):
        fit(prepare(settings(**{**CHOSEN, "batch": 1, "parts": (spec("train_guide=0"),)}), tiny_images()))


@pytest.mark.parametrize(("options", "words"), [({"weight": -1.0}, "weight=-1"), ({"until": -1}, "until=-1"), ({"align": -2}, "align=-2")])
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(Mistake, match=words):
        GuidanceUntrainable(**options)
