"""ScaleKD and logit KD by hand: views, projectors, the teacher in two pieces, equations, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn, idctn
from torch import nn

from convince.backbones import builder
from convince.checks.subject import bits, equal, tiny_images
from convince.distill.logit_kd import LogitKD, is_folder, kd_loss
from convince.distill.scalekd import (
    AttentionProjector,
    ScaleKD,
    as_map,
    default_teacher,
    dual_view,
    frozen,
    heads_for,
    no_mean,
    pieces,
    student_stages,
    view_loss,
)
from convince.errors import Mistake
from convince.fit.folder import open_run
from convince.fit.loop import fit
from convince.fit.settings import settings as make
from convince.fit.train import prepare, train

VIT = "timm/vit_tiny_patch16_224:patch_size=4,embed_dim=8,depth=3,num_heads=1"
SWIN = "timm/swin_tiny_patch4_window7_224:patch_size=1,embed_dim=8,depths=(1,1),num_heads=(1,2),window_size=4"
CHOSEN = {"model": "resnet:layers=(1,1),widths=(4,8)", "batch": 8, "epochs": 1, "lr": 0.05, "precision": "fp32", "augment": "none"}


def net(spec, side=8, channels=1, k=3):
    torch.manual_seed(0)
    return builder(spec, num_classes=k, in_chans=channels, size=(side, side))().eval()


def run(*parts, **changes):
    made = prepare(make(**{**CHOSEN, "parts": parts, **changes}), tiny_images(), drop_off=False)
    fit(made)
    return made


def test_frequency_view_by_hand():
    z = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1)
    assert no_mean(z).flatten().tolist() == [-1.5, -0.5, 0.5, 1.5]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6))
def test_frequency_view_is_the_dct_route(h, w, c, seed):
    z = torch.randn(1, h * w, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for i in range(c):
        spectrum = dctn(z[0, :, i].view(h, w).numpy(), type=2)
        spectrum[0, 0] = 0
        torch.testing.assert_close(no_mean(z)[0, :, i].view(h, w), torch.from_numpy(idctn(spectrum, type=2)), atol=1e-6, rtol=0)


def test_view_loss_by_hand():
    """(3, 4) / 5 against (1, 0), and (0, 2) against (0, 7): 0.16 + 0.64 + 0, one image of two."""
    student = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]).expand(2, 2, 2)
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 7.0]]]).expand(2, 2, 2)
    assert float(view_loss(student, teacher)) == pytest.approx(0.8)
    views = (student, teacher * 3 + 1)
    assert float(dual_view(views, teacher, 0.5, 2.0)) == pytest.approx(0.4, abs=1e-6), "the frequency view does not see the mean, nor scale"


def test_kd_loss_is_the_divergence_and_an_entropy():
    a, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    p = (b / 3).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    divergence = F.kl_div((a / 3).log_softmax(1), p, reduction="batchmean")
    assert float(kd_loss(a, b, 3.0)) == pytest.approx(9 * float(divergence + entropy))
    assert float(kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), 1.0)) == pytest.approx(math.log(2))


def test_projector_count_and_shape():
    """conv and BN on c_s; k, v from c_s; q, 1x1, out, on c_t; norm; MLP of 4 c_t; positions; queries."""
    c_s, c_t, t = 6, 96, 9
    made = AttentionProjector(c_s, c_t, (3, 3), own_queries=True)
    expected = 9 * c_s * c_s + c_s + 2 * c_s + c_s * t + c_t * t
    expected += 2 * (c_s * c_t + c_t) + 3 * (c_t * c_t + c_t) + 2 * c_t + (4 * c_t * c_t + 4 * c_t) + (4 * c_t * c_t + c_t)
    assert sum(p.numel() for p in made.parameters()) == expected
    assert made.heads == 2
    assert made(torch.randn(5, c_s, 7, 4)).shape == (5, t, c_t)
    given_queries = AttentionProjector(c_s, c_t, (2, 2), own_queries=False)
    assert given_queries.queries is None
    assert given_queries(torch.randn(5, c_s, 2, 2), torch.randn(5, 4, c_t)).shape == (5, 4, c_t)


def test_projector_is_its_formula():
    made = AttentionProjector(2, 3, (1, 2), own_queries=True).double().eval()
    x = torch.randn(1, 2, 1, 2, dtype=torch.float64)
    tokens = (F.relu(made.bn(made.conv(x))) + made.position)[0].flatten(1).T
    q = made.q(F.relu(made.mix(made.queries[0])))
    weights = (5 * q @ made.k(tokens).T / math.sqrt(3)).softmax(1)
    t = made.norm(made.out(weights @ made.v(tokens)))
    torch.testing.assert_close(made(x)[0], t + made.mlp(t))


def test_heads():
    assert [heads_for(c) for c in (8, 48, 96, 192, 768)] == [1, 1, 2, 4, 16]


@pytest.mark.parametrize("spec", [VIT, SWIN])
def test_the_tail_on_the_teachers_own_tokens_is_its_own_end(spec):
    answer = frozen(nn.Sequential(net(spec)))
    cut = pieces(answer)
    x = torch.rand(2, 1, 8, 8)
    three, four, scores = cut.look(answer, x)
    assert torch.equal(scores, answer(x))
    assert not any(m._forward_hooks for m in answer.modules())
    torch.testing.assert_close(cut.tail(cut.tokens(three), three), cut.tokens(four))
    rows, columns = cut.grid(four)
    assert rows * columns == cut.tokens(four).shape[1]
    assert cut.tokens(four).shape[1] == (4 if spec == VIT else 16)


def test_gradients_flow_through_the_frozen_tail():
    answer = frozen(nn.Sequential(net(VIT)))
    cut = pieces(answer)
    three, _, _ = cut.look(answer, torch.rand(2, 1, 8, 8))
    tokens = cut.tokens(three).detach().requires_grad_(True)
    cut.tail(tokens, three).square().sum().backward()
    assert tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in answer.parameters())


def test_student_stages():
    found = {}
    for spec, side in (("resnet20", 32), ("resnet18-slim", 64), ("small-cnn", 16), (VIT, 8)):
        model = net(spec, side)
        found[spec] = student_stages(model, lambda model=model, side=side: model(torch.rand(2, 1, side, side)))
        assert not any(m._forward_hooks for m in model.modules())
    assert found["resnet20"] == ("layer2", "layer3")
    assert found["resnet18-slim"] == ("layer3", "layer4")
    assert found["small-cnn"][1] == "features"
    assert as_map(torch.randn(2, 5, 8)).shape == (2, 8, 2, 2)


def test_default_teacher_suits_the_size():
    assert [default_teacher(size).split(":")[1].split(",")[0] for size in ((28, 28), (32, 32), (64, 64), (224, 224), (28, 56))] == [
        "patch_size=4",
        "patch_size=4",
        "patch_size=8",
        "patch_size=16",
        "patch_size=4",
    ]


@pytest.mark.parametrize("teacher", [VIT, SWIN])
@pytest.mark.parametrize("perception", [True, False])
def test_loss_is_what_the_paper_says(teacher, perception):
    """alpha = 1 and stage weights 0 leave KD alone; the stages add."""
    spec = f"scalekd:teacher='{teacher}',train_teacher=0,perception={perception}"
    whole = run(spec, steps=1)
    part = whole.team.seats[0].technique
    plain = run(steps=1)
    alone = run(spec + ",third=(0.0,0.0),fourth=(0.0,0.0)", steps=1)
    x = alone.batch.x
    scores = alone.team.seats[0].technique._teacher(x)
    assert torch.equal(alone.out.logits, plain.out.logits), "the first step starts from the same weights"
    expected = 0.5 * plain.loss + 0.5 * kd_loss(plain.out.logits, scores, 1.0)
    torch.testing.assert_close(alone.loss, expected)
    assert float(whole.loss.detach()) > float(alone.loss.detach())
    assert set(whole.extra) == {f"scalekd-{i}-{view}" for i in (3, 4) for view in ("spatial", "frequency")}
    assert (whole.extra["scalekd-4-spatial"].queries is None) == perception
    assert not any(p.requires_grad for p in part._teacher.parameters())
    assert set(whole.answer.state_dict()) == set(plain.answer.state_dict()), "the student's size is unchanged"


def test_a_finished_run_is_a_teacher(tmp_path):
    train(make(**{**CHOSEN, "model": VIT}), tiny_images(), folder=tmp_path / "teacher")
    loaded = open_run(tmp_path / "teacher")
    for part in ("scalekd", "logit-kd"):
        done = run(f"{part}:teacher='{tmp_path / 'teacher'}'")
        assert not equal(bits(done.team.seats[0].technique._teacher), bits(loaded.answer))
        assert not done.children
        assert equal(bits(done.answer), bits(run().answer))


def test_logit_kd_by_its_equation():
    done, plain = run("logit-kd:teacher='small-cnn:widths=(4,)',train_teacher=0,alpha=0.25,temperature=2.0", steps=1), run(steps=1)
    scores = done.team.seats[0].technique._teacher(done.batch.x)
    expected = 0.75 * plain.loss + 0.25 * kd_loss(plain.out.logits, scores, 2.0)
    torch.testing.assert_close(done.loss, expected)


def test_a_trained_teacher_is_the_run_of_its_own_settings():
    done = run("logit-kd:teacher='small-cnn:widths=(4,)',train_teacher=2")
    assert len(done.children) == 1
    assert done.images == 3 * 32
    assert done.children[0].seed != done.seed


@pytest.mark.parametrize(
    ("text", "folder"),
    [(None, False), ("resnet20", False), ("timm/vit_tiny_patch16_224:patch_size=4", False), ("runs/teacher", True), ("./teacher", True)],
)
def test_folder_or_network(text, folder):
    assert is_folder(text) == folder


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ScaleKD(weight=-1.0), "weight=-1.0"),
        (lambda: ScaleKD(weight=4.0), "alpha times weight"),
        (lambda: ScaleKD(third=(-0.1, 0.0)), "third="),
        (lambda: ScaleKD(train_teacher=-1), "train_teacher=-1"),
        (lambda: LogitKD(alpha=2.0), "alpha=2.0"),
        (lambda: LogitKD(temperature=0.0), "temperature=0.0"),
        (lambda: run("scalekd:teacher=resnet8,train_teacher=0"), "must be a vision transformer"),
        (lambda: run(f"scalekd:teacher='{VIT}',stages=('layer1','nowhere')"), "no module 'nowhere'"),
        (lambda: run("scalekd:teacher=runs/nowhere"), "no such run"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(Mistake, match=words):
        call()
