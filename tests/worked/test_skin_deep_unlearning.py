"""Skin Deep Unlearning by hand: the terms, the weights, the reversal, both phases of a step; and runs with a nuisance."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from convince.checks.subject import bits, equal, tiny_images
from convince.data_quality.skin_deep_unlearning import bias_probe, confusion_loss, grad_reverse, inverse_frequency, negative_entropy
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare


def scores(*p):
    return torch.tensor([p], dtype=torch.float64).log()


def test_the_terms_by_hand():
    assert float(negative_entropy(scores(0.9, 0.1))) == pytest.approx(-0.32508297, abs=1e-8)
    assert float(negative_entropy(scores(0.5, 0.5))) == pytest.approx(-0.69314718, abs=1e-8)
    assert float(confusion_loss(scores(0.9, 0.1))) == pytest.approx(1.20397280, abs=1e-8)
    assert float(confusion_loss(scores(0.5, 0.5))) == pytest.approx(0.69314718, abs=1e-8)
    target = torch.tensor([[0.2, 0.6]], dtype=torch.float64)
    assert float(confusion_loss(scores(0.9, 0.1), target)) == pytest.approx(-0.2 * math.log(0.9) - 0.6 * math.log(0.1))


@quick(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_both_terms_are_lowest_at_equal_probabilities(values):
    s = torch.tensor([values], dtype=torch.float64)
    k = len(values)
    assert float(negative_entropy(s)) >= -math.log(k) - 1e-12
    assert float(confusion_loss(s)) >= math.log(k) - 1e-12


def test_weights_by_hand():
    b = torch.tensor([0] * 90 + [1] * 10 + [-1] * 7)
    assert torch.allclose(inverse_frequency(b, 2), torch.tensor([0.1, 0.9]))
    assert inverse_frequency(b, 3)[2] == 0


def test_the_gradient_is_reversed():
    x = torch.tensor([2.0, -1.0], requires_grad=True)
    y = grad_reverse(x, 0.1)
    assert torch.equal(y, x)
    (y * torch.tensor([3.0, 5.0])).sum().backward()
    assert torch.allclose(x.grad, torch.tensor([-0.3, -0.5]))


def test_the_probe_finds_what_is_there():
    gen = torch.Generator().manual_seed(0)
    b = torch.arange(200) % 2
    noise = torch.randn(200, 3, generator=gen)
    assert bias_probe(noise[:100] + 6 * b[:100, None], b[:100], noise[100:] + 6 * b[100:, None], b[100:]) > 0.97
    assert bias_probe(noise[:100], b[:100], noise[100:], b[100:]) < 0.7


def marked(columns=1):
    data = tiny_images()
    b = (data.y == 0).long()
    b[::7] = 1 - b[::7]
    return dataclasses.replace(data, extra={"nuisance": b if columns == 1 else torch.stack([b, torch.arange(48) % 3], 1)})


def made(*parts, data=None, **changes):
    chosen = settings(
        **{"model": "resnet:layers=(1,1),widths=(4,8)", "parts": parts, "batch": 8, "epochs": 2, "lr": 0.05, "precision": "fp32", "augment": "none", **changes}
    )
    return prepare(chosen, data or marked())


def trained(*parts, **changes):
    run = made(*parts, **changes)
    fit(run)
    return run


def moved(method, **options):
    """Which of encoder, head and auxiliary head differ from a start with the same bits, after one step."""
    spec = "skin-deep-unlearning:method=" + ",".join([method, *(f"{k}={v}" for k, v in options.items())])
    run, start = trained(spec, steps=1, epochs=1), made(spec)
    from convince.fit.loop import start as begin
    from convince.fit.randomness import preserved

    with preserved():
        begin(start)
    now, before = dict(run.model.named_parameters()), dict(start.model.named_parameters())
    aux = any(not torch.equal(a, b) for a, b in zip(run.extra.parameters(), start.extra.parameters(), strict=True))
    return any(not torch.equal(now[n], before[n]) for n in now if not n.startswith("fc.")), aux, run


def test_at_weight_and_reversal_zero_the_network_is_the_baseline():
    base = trained()
    for extra in ("", ",hidden=0"):
        run = trained(f"skin-deep-unlearning:method=tabe,weight=0.0,confusion_lr=0.0,aux_lr=0.05{extra}")
        assert not equal(bits(base.model), bits(run.model))


@pytest.mark.parametrize("method", ["lntl", "tabe", "clgr"])
def test_each_method_moves_encoder_and_auxiliary_head(method):
    encoder, aux, run = moved(method, aux_lr=0.05)
    assert encoder
    assert aux
    plain = trained(steps=1, epochs=1)
    assert equal(bits(plain.model), bits(run.model))


def test_phase_one_moves_no_auxiliary_head():
    _, aux, _ = moved("lntl", aux_lr=0.0)
    assert not aux


def test_faithful_tabe_lets_the_encoder_learn_the_nuisance():
    calm, faithful = (trained(f"skin-deep-unlearning:method=tabe,faithful={f}", steps=1, epochs=1) for f in (False, True))
    assert equal(bits(calm.model), bits(faithful.model))


def test_the_step_of_lntl_by_hand():
    """One SGD step of a linear network: phase 1 on the sum of both terms, phase 2 on the reversed gradient at the new weights."""
    from convince.fit.loop import start as begin
    from convince.fit.randomness import preserved

    spec = "skin-deep-unlearning:method=lntl,hidden=0,weight=0.5,reversal=0.3,aux_lr=0.2"
    how = {"precision": "fp64", "steps": 1, "epochs": 1, "batch": 32, "schedule": "constant", "weight_decay": 0.0, "model": "small-cnn:widths=(4,)"}
    run, hand = trained(spec, **how), made(spec, **how)
    with preserved():
        begin(hand)
    net, head = hand.model, hand.extra["unlearn"][0]
    rows = hand.data.split.train
    x = hand.normalise(hand.plan.pixels(hand.data.x.take(rows)))
    y, b = hand.data.y[rows], hand.data.extra["nuisance"][rows]

    def features():
        return net.forward_head(net.forward_features(x), pre_logits=True)

    params = list(net.parameters())
    f = features()
    loss = torch.nn.functional.cross_entropy(net.fc(f), y) + 0.5 * negative_entropy(head(f))
    grads = torch.autograd.grad(loss, params)
    with torch.no_grad():
        velocity = [g.clone() for g in grads]
        for p, g, v in zip(params, grads, velocity, strict=True):
            p -= 0.05 * (g + 0.9 * v)
    f = features()
    loss = torch.nn.functional.cross_entropy(head(grad_reverse(f, 0.3)), b, weight=inverse_frequency(b, 2).double())
    grads = torch.autograd.grad(loss, [*params, *head.parameters()], allow_unused=True)
    with torch.no_grad():
        for p, g, v in zip(params, grads, velocity, strict=False):
            if g is not None:
                v.mul_(0.9).add_(g)
                p -= 0.05 * (g + 0.9 * v)
        for p, g in zip(head.parameters(), grads[len(params) :], strict=True):
            p -= 0.2 * g
    for (name, mine), theirs in zip(net.named_parameters(), run.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12), name
    assert torch.allclose(head.weight, run.extra["unlearn"][0].weight, rtol=1e-9, atol=1e-12)


def test_the_second_pass_moves_no_batch_statistics():
    run = trained("skin-deep-unlearning")
    counts = [t for n, t in run.model.named_buffers() if n.endswith("num_batches_tracked")]
    assert {int(c) for c in counts} == {8}


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["lntl", "clgr+lntl"])
def test_a_resumed_run_has_the_same_bits(tmp_path, method):
    spec = f"skin-deep-unlearning:method={method},target=random"
    how = {"data": marked(2), "checkpoint_seconds": 0} if "+" in method else {"checkpoint_seconds": 0}
    whole = trained(spec, **how)

    def kill(done, total, text):
        if done == 6:
            raise Killed

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        fit(made(spec, **how), path, kill)
    again = made(spec, **how)
    fit(again, path)
    assert not equal(bits(whole.model), bits(again.model))
    assert not equal(bits(whole.extra), bits(again.extra))


def test_what_cannot_work_is_said():
    with pytest.raises(Mistake, match="nuisance"):
        made("skin-deep-unlearning", data=tiny_images())
    for bad in ("method=grl", "weight=-1.0", "reversal=-1.0", "target=half"):
        with pytest.raises(Mistake, match=bad.split("=")[0]):
            made(f"skin-deep-unlearning:{bad}")
    with pytest.raises(Mistake, match="a method a column"):
        trained("skin-deep-unlearning:method=clgr+lntl")
