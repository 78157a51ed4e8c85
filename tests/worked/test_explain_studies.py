"""The three studies of explanations by hand: what is removed, how areas are normalised, scenes and clutter, two batch norms, who ranks where."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.explain import explain_benchmark as eb
from convince.explain import explainability_study as es
from convince.explain.roar import Roar, damaged, ranking, remove, signed_estimate, sobel
from convince.explain.saliency import Saliency
from convince.explain.smoothgrad import Smoothgrad
from convince.fit.answer import Answer, Normalise
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.robust.adversarial_training import AdversarialTraining
from convince.robust.pgd import pgd
from convince.types import Budget

# -- roar ----------------------------------------------------------------------------------------------

E = torch.tensor([[[[3.0, -4.0], [0.5, 1.0]]]])
X = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
FILL = torch.zeros(1, 1, 1)


def test_three_rankings_remove_three_things() -> None:
    """Of (3, -4, 0.5, 1) the signed ranking removes 3 and 1 at a half, the absolute and the square one -4 and 3."""
    assert remove(X, ranking(E), 0.5, FILL).flatten().tolist() == pytest.approx([0, 0.2, 0.3, 0])
    for rank in ("abs", "square"):
        assert remove(X, ranking(E, rank), 0.5, FILL).flatten().tolist() == pytest.approx([0, 0, 0.3, 0.4])
    assert remove(X, ranking(E), 0.5, FILL, keep=True).flatten().tolist() == pytest.approx([0.1, 0, 0, 0.4])  # KAR keeps what ROAR removes
    with pytest.raises(Mistake, match="rank='cubed' must be one of signed, abs, square"):
        ranking(E, "cubed")
    with pytest.raises(Mistake, match=r"fraction=1\.5 must be from 0 to 1"):
        remove(X, E, 1.5, FILL)


def test_pixels_go_with_all_their_channels() -> None:
    two = torch.tensor([[[[1.0, 0.0]], [[-3.0, 0.5]]]])  # by channel sums -2 and 0.5
    assert remove(torch.ones(1, 2, 1, 2), ranking(two, per="pixel"), 0.5, torch.zeros(2, 1, 1)).flatten().tolist() == [1, 0, 1, 0]
    assert remove(torch.ones(1, 2, 1, 2), ranking(two), 0.5, torch.zeros(2, 1, 1)).flatten().tolist() == [0, 1, 1, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_roar_and_kar_share_the_picture_between_them(seed: int, fraction: float) -> None:
    """What ROAR removes at t, KAR keeps at 1 - t, but for one number where t of 24 is no whole one; equal ranks go in reading order."""
    x = torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(seed)) + 1
    gone = (remove(x, x, fraction, torch.zeros(2, 1, 1)) == 0).flatten(1).sum(1)
    assert gone.tolist() == [round(fraction * 24)] * 2
    if (24 * fraction) % 1 == 0:
        roar, kar = remove(x, x, fraction, torch.zeros(2, 1, 1)), remove(x, x, 1 - fraction, torch.zeros(2, 1, 1), keep=True)
        torch.testing.assert_close(roar + kar, x)
    even = remove(torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0.5, FILL)
    assert even.flatten().tolist() == [0, 0, 1, 1]


def test_sobel_finds_a_step() -> None:
    step = torch.zeros(1, 1, 4, 6)
    step[..., 3:] = 1.0
    found = sobel(step)
    assert found[0, 0, 1].tolist() == [0, 0, 4, 4, 0, 0]
    assert torch.equal(sobel(step.transpose(2, 3)), found.transpose(2, 3))
    assert sobel(torch.full((1, 2, 3, 3), 0.7)).abs().max() < 1e-6


def test_damaged_data_are_filled_with_the_training_mean() -> None:
    data = tiny_images()
    whole = data.float_batch(data.x.take(torch.arange(48)))
    mean = whole[data.split.train].mean()
    order = torch.zeros_like(whole)
    order[:, :, 0, 0] = 1.0
    found = damaged(data, order, 1 / 64)
    after = found.float_batch(found.x.take(torch.arange(48)))
    torch.testing.assert_close(after[:, 0, 0, 0], (mean * 255).round().expand(48) / 255)
    assert torch.equal(after.flatten(1)[:, 1:], whole.flatten(1)[:, 1:])
    assert torch.equal(found.y, data.y)


def test_estimates_are_signed_where_the_explainer_has_them() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    net[1].weight.data = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, 0.0, 0.0, 0.0]])
    net.requires_grad_(False)
    x = torch.tensor([[[[0.9, 0.1], [0.9, 0.1]]]])
    assert signed_estimate(Smoothgrad(1, 0.0), net, x).flatten().tolist() == [1, -2, 3, -4]
    assert signed_estimate(Saliency(), net, x).flatten().tolist() == [1, 2, 3, 4]
    with pytest.raises(Mistake, match="give whole epochs"):
        Roar().run(Budget(10, "steps"))


# -- explain-benchmark ---------------------------------------------------------------------------------


class Sum(nn.Module):
    """The chance of label 0 is a fixed function of the pixels that are left."""

    logits = False

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,hw->n", x, self.weight)[:, None]


def test_area_by_hand() -> None:
    """0.8, 0.4, 0.2 -> (1 + 0.5) / 2 + (0.5 + 0.25) / 2 = 1.125, over 2 steps 0.5625."""
    curves = torch.tensor([[0.8, 0.4, 0.2], [0.3, 0.3, 0.3], [0.5, 0.0, 0.0]])
    assert eb.normalised_area(curves).tolist() == pytest.approx([0.5625, 1.0, 0.25])


def test_patches_go_by_their_mean() -> None:
    found = torch.zeros(1, 1, 4, 5)  # patches of 2: 2x2, 2x2, 2x1 in each of two rows
    found[0, 0, 0, 4] = 1.0  # mean 0.5 in the narrow patch
    found[0, 0, 2:, 0:2] = 0.4
    found[0, 0, 3, 3] = -1.0
    place = eb.patch_order(found, 2)
    assert place[0, 0, ::2, ::2].tolist() == [[2, 3, 0], [1, 5, 4]]
    assert torch.equal(place[0, 0, 0], place[0, 0, 1])
    assert sorted(eb.patch_order(torch.rand(1, 1, 3, 3), 1).flatten().tolist()) == list(range(9))


def test_auc_morf_of_a_linear_chance() -> None:
    """Chance 0.5, 0.3, 0.2, 0 for the four patches of 1: the right order loses most at once, the wrong one least, and the two sum to what symmetry says."""
    weight = torch.tensor([[0.5, 0.3], [0.2, 0.0]])
    x, target, fill = torch.ones(1, 1, 2, 2), torch.tensor([0]), torch.zeros(1, 1, 1)
    best = eb.auc_morf(Sum(weight), x, weight[None, None], target, fill, 1)
    worst = eb.auc_morf(Sum(weight), x, -weight[None, None], target, fill, 1)
    assert best.item() == pytest.approx((0.5 + 0.5 + 0.2 + 0.0 + 0.0) / 4)  # 1, 0.5, 0.2, 0, 0
    assert worst.item() == pytest.approx((0.5 + 1.0 + 0.8 + 0.5 + 0.0) / 4)
    assert eb.auc_morf(Sum(weight), x, weight[None, None], target, torch.ones(1, 1, 1), 1).item() == pytest.approx(1.0)  # nothing is taken away
    assert eb.auc_morf(Sum(weight), x, weight[None, None], target, fill, 1, steps=2).item() == pytest.approx((0.5 + 0.2 + 0.0) / 2)
    with pytest.raises(Mistake, match="patch=0 and steps=None must be at least 1"):
        eb.auc_morf(Sum(weight), x, weight[None, None], target, fill, 0)


def test_labels_have_chances_of_their_own() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    answer, x = eb.MultiLabel(Normalise([0.2], [0.5]), net), torch.rand(2, 1, 2, 2)
    torch.testing.assert_close(eb.label_chances(answer, x), net((x - 0.2) / 0.5).sigmoid().detach())
    torch.testing.assert_close(eb.label_chances(Answer(Normalise([0.2], [0.5]), net), x), net((x - 0.2) / 0.5).softmax(1).detach())


def test_scenes_hold_what_their_labels_say() -> None:
    """Things of one brightness a class: every label's brightness is there, no other's, and nothing overlaps."""
    labels = torch.arange(40) % 4
    images = torch.zeros(40, 1, 5, 5, dtype=torch.uint8) + (120 + 40 * labels[:, None, None, None]).to(torch.uint8)
    x, y = eb.scenes(images, labels, 50, 3, torch.Generator().manual_seed(0))
    assert x.shape == (50, 1, 12, 12)
    assert set(y.sum(1).tolist()) == {1.0, 2.0, 3.0}
    for k in range(3):
        pixels = ((x - (120 + 40 * k) / 255).abs() < 1e-6).flatten(1).sum(1)
        assert torch.equal(pixels, (25 * y[:, k]).long())
    again = eb.scenes(images, labels, 50, 3, torch.Generator().manual_seed(0))
    assert torch.equal(x, again[0])


def test_input_times_gradient_is_captums_and_exact_for_a_linear_score() -> None:
    x, target = torch.rand(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 1])
    linear = nn.Sequential(nn.Flatten(), nn.Linear(32, 2, bias=False)).double().requires_grad_(False)
    found = eb.InputXGradient()(linear, x, target)
    torch.testing.assert_close(found.map.flatten(1).sum(1), linear(x).gather(1, target[:, None])[:, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attr = pytest.importorskip("captum.attr")
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).double()
        theirs = attr.InputXGradient(net).attribute(x.clone().requires_grad_(), target)
    torch.testing.assert_close(eb.InputXGradient()(net, x, target).images["attribution"], theirs.detach())


def test_ranks_and_cases() -> None:
    values = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([0.3, 0.2]), "c": torch.tensor([0.2, 0.9])}
    assert eb.mean_ranks(values) == {"a": 1.25, "b": 2.25, "c": 2.5}  # ties share 1.5
    assert eb.mean_ranks(values, torch.tensor([False, True])) == {"a": 1.5, "b": 1.5, "c": 3.0}
    cases = eb.case_of(torch.tensor([0.9, 0.9, 0.1]), torch.tensor([1, 2, 1]))
    assert {name: inside.tolist() for name, inside in cases.items()} == {
        "one label": [True, False, False], "several labels": [False, True, False], "missed": [False, False, True],
    }  # fmt: skip
    with pytest.raises(Mistake, match="no picture has a label"):
        eb.explain_benchmark({}, Sum(torch.ones(2, 2)), torch.ones(1, 1, 2, 2), torch.zeros(1, 1), torch.zeros(1, 1, 1), 1, 1)
    with pytest.raises(Mistake, match="give whole epochs"):
        eb.ExplainBenchmark().run(Budget(10, "steps"))


# -- explainability-study ------------------------------------------------------------------------------


def net_with_norms() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def test_two_batch_norms_learn_apart_and_one_is_left() -> None:
    net, x = net_with_norms(), torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    names, norm = {n: p.shape for n, p in net.named_parameters()}, net[1]
    before = net.eval()(x)
    surgery = es.pair_norms(net)
    assert surgery.added == 8  # another weight and bias of 4
    assert torch.equal(net(x), before)
    net.train()
    es.use_norms(net, True)
    net(x + 5)
    assert float(norm.running_mean.abs().max()) == 0.0, "adversarial pictures moved the clean statistics"
    es.use_norms(net, False)
    net(x)
    mean = F.conv2d(x, net[0].weight, net[0].bias).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    assert not torch.allclose(net[1].auxiliary.running_mean, norm.running_mean)
    surgery.undo()
    assert {n: p.shape for n, p in net.named_parameters()} == names
    assert net[1] is norm
    with pytest.raises(Mistake, match="has no batch norm"):
        es.pair_norms(nn.Sequential(nn.Linear(2, 2)))


def test_losses_of_the_three_arms() -> None:
    """With an attack that adds 0.1: L(x), L(x + 0.1), and their sum, the second half by the auxiliary norms."""
    net, gen = net_with_norms(), torch.Generator().manual_seed(1)
    x, y = torch.rand(8, 1, 6, 6, generator=gen), torch.randint(2, (8,), generator=gen)
    answer = Answer(Normalise([0.0], [1.0]), net).train()
    seen: list[bool] = []

    def attack(model: nn.Module, pixels: Tensor, wanted: Tensor) -> Tensor:
        seen.append(model.training)
        return pixels + 0.1

    loss = {arm: es.loss_of(arm, answer, x, y, attack).item() for arm in ("vanilla", "pgd")}
    assert loss["vanilla"] == pytest.approx(F.cross_entropy(net(x), y).item())
    assert loss["pgd"] == pytest.approx(F.cross_entropy(net(x + 0.1), y).item())
    es.pair_norms(net)
    both = es.loss_of("advprop", answer, x, y, attack)
    assert both.item() == pytest.approx(loss["vanilla"] + loss["pgd"])  # in training mode norms see the batch, and both have the same weights
    both.backward()
    assert all(p.grad is not None for p in net.parameters())
    assert seen == [False, False]
    assert answer.training


def test_clutter_knows_where_its_thing_is() -> None:
    images = torch.full((6, 1, 10, 10), 255, dtype=torch.uint8)
    images[:, :, :, :2] = 0  # the thing fills columns 2 to 9
    x, y, mask, boxes = es.clutter(images, torch.arange(6), 20, torch.Generator().manual_seed(0))
    assert x.shape == (20, 1, 20, 20)
    assert mask.flatten(1).sum(1).tolist() == [80] * 20
    assert ((boxes[:, 2:] - boxes[:, :2]) == torch.tensor([8.0, 10.0])).all()
    assert bool((x[mask] == 1).all())
    assert bool(((x > 0) & ~mask).flatten(1).any(1).any()), "no scrap is seen"
    assert y.min() >= 0
    assert len(set(boxes[:, 0].tolist())) > 3


def test_thresholds_are_chosen_by_overlap() -> None:
    """A bright core in a faint halo of 0.5: the box of the halo is right, so any threshold up to a half; the smallest is told."""
    found = torch.zeros(2, 1, 12, 12)
    found[:, :, 2:10, 2:10] = 0.5
    found[:, :, 5:7, 5:7] = 1.0
    halo, core = torch.tensor([[2.0, 2.0, 10.0, 10.0]] * 2), torch.tensor([[5.0, 5.0, 7.0, 7.0]] * 2)
    assert es.best_threshold(found, halo) == 0.05
    assert es.best_threshold(found, core) == 0.55


def test_correlations_over_networks() -> None:
    networks = {arm: {"accuracy": a, "under noise": 0.5, "confidence": c} for arm, a, c in (("vanilla", 0.9, 0.9), ("pgd", 0.7, 0.5), ("advprop", 0.8, 0.8))}
    table = [
        {"method": "rise", "network": arm, "pointing": p, "localisation": 0.1, "insertion": row["confidence"], "deletion": -row["confidence"]}
        for (arm, row), p in zip(networks.items(), (0.1, 0.3, 0.2), strict=True)
    ]
    found = es.correlations(networks, table)
    assert found["accuracy and pointing"] == pytest.approx(-1)
    assert found["under noise and pointing"] is None
    assert found["confidence and insertion"] == pytest.approx(1)
    assert found["confidence and deletion"] == pytest.approx(-1)
    with pytest.raises(Mistake, match="give whole epochs"):
        es.ExplainabilityStudy().run(Budget(10, "steps"))
    with pytest.raises(Mistake, match="arm='plain' must be one of vanilla, pgd, advprop"):
        es.train_arm("plain", net_with_norms, torch.ones(2, 1, 6, 6), torch.zeros(2, dtype=torch.int64), 1, 0, 0.1, 1, 0.1)


# -- adversarial-training ------------------------------------------------------------------------------


def test_a_batch_becomes_its_adversaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures trained on are those of pgd against the network as it stands; buffers stay, and the passes are counted."""
    from convince.checks.subject import Subject
    from convince.parts import get

    seen: list[tuple[Tensor, Tensor]] = []
    hook = AdversarialTraining.on_batch

    def watched(self: AdversarialTraining, run: Run) -> None:
        x, images, kept = run.batch.x, run.images, {n: b.clone() for n, b in run.model.named_buffers()}
        hook(self, run)
        if not seen:
            with run.aside(), run.plan.autocast():
                y = run.batch.y.argmax(1)
                by_hand = pgd(Answer(run.normalise, run.model), x, y, run.gen("adversarial-training"), eps=0.1, steps=2, step=0.025)
            assert torch.equal(run.batch.x, by_hand)
            assert run.images == images + 2 * len(x)
            assert all(torch.equal(b, kept[n]) for n, b in run.model.named_buffers())
            assert run.model.training
        seen.append((x, run.batch.x))

    monkeypatch.setattr(AdversarialTraining, "on_batch", watched)
    subject = Subject(get("adversarial-training"))
    fit(subject.run("adversarial-training:eps=0.1,steps=2", epochs=1))
    assert seen
    for clean, changed in seen:
        away = (changed - clean).abs()
        assert 0 < float(away.max()) <= 0.1 + 1e-6
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1


def test_wrong_settings_are_named() -> None:
    for options, words in (
        ({"eps": 8}, "eps=8 must be from 0"), ({"eps": -0.1}, "eps=-0.1"), ({"steps": 0}, "steps=0 must be at least 1"),
        ({"step": 0.0}, "step=0.0 above 0"), ({"norm": "1"}, "norm='1' must be 'inf' or '2'"),
    ):  # fmt: skip
        with pytest.raises(Mistake, match=words):
            AdversarialTraining(**options)
    assert AdversarialTraining(eps=3.0, norm="2").eps == 3.0  # an L2 ball may be wide
