"""DeepFool, FGSM and PGD: closed forms on linear networks, the worked example, and ART as an oracle."""

from __future__ import annotations

import contextlib
import io
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.errors import Mistake
from convince.robust.deepfool import DeepFool, adversarial_finetune, deepfool, rho_adv
from convince.robust.fgsm import Fgsm, fgsm, fgsm_min, loss_gradient, steepest
from convince.robust.pgd import Pgd, pgd


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_() if bias is None else layer.bias.copy_(bias)
    return layer.eval()


def smooth(seed: int = 0, classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, classes)).eval()


def pixels(n: int = 8, seed: int = 0) -> Tensor:
    return 0.2 + 0.6 * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]).double()
X = torch.tensor([[2.0, 1.0]]).double()


def test_worked_example() -> None:
    """f = (2, 1, -3): class 1 at 0.707107 with r = (-0.5, 0.5), class 2 at 2.236068."""
    assert linear(W)(X).tolist() == [[2.0, 1.0, -3.0]]
    x_adv, r, iterations, label = deepfool(linear(W), X, guard=0.0)
    assert x_adv.tolist()[0] == pytest.approx([1.49, 1.51])
    assert (r / 1.02).tolist()[0] == pytest.approx([-0.5, 0.5])
    assert float((r / 1.02).norm()) == pytest.approx(0.707107, abs=1e-6)
    assert iterations.tolist() == [1]
    assert label.tolist() == [1]
    x_adv, r, _, label = deepfool(linear(W), X, guard=0.0, norm="inf")
    assert (r / 1.02).tolist()[0] == pytest.approx([-0.5, 0.5])
    assert label.tolist() == [1]
    two = linear(W[[0, 2]])  # class 2 alone: f' = -5, w = (-2, -1)
    assert float(deepfool(two, X, guard=0.0)[1].norm()) / 1.02 == pytest.approx(2.236068, abs=1e-6)


def test_guard_lengthens_each_step() -> None:
    r = deepfool(linear(W), X)[1]
    assert float(r.norm()) / 1.02 == pytest.approx(0.5**0.5 + 1e-4)
    assert float(deepfool(linear(W), X, norm="inf")[1].abs().max()) / 1.02 == pytest.approx(0.5 + 1e-4)


def test_binary_case() -> None:
    """r = -f(x) / |grad f|^2 grad f, for f = f_0 - f_1."""
    weight, x = torch.tensor([[0.3, -1.2, 0.5], [0.1, 0.4, -0.2]]).double(), torch.tensor([[1.0, -0.5, 2.0]]).double()
    grad = weight[0] - weight[1]
    by_hand = -float(grad @ x[0]) / float(grad @ grad) * grad
    torch.testing.assert_close(deepfool(linear(weight), x, guard=0.0, overshoot=1e-9)[1][0], by_hand, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100_000), k=st.integers(2, 12), d=st.integers(1, 9), norm=st.sampled_from(["2", "inf"]))
def test_linear_networks_have_a_closed_form(seed: int, k: int, d: int, norm: str) -> None:
    """The perturbation is the distance to the nearest boundary, to 1 % (l2 and l-inf), in one iteration."""
    gen = torch.Generator().manual_seed(seed)
    weight, bias, x = (torch.randn(*s, generator=gen).double() for s in ((k, d), (k,), (4, d)))
    f = x @ weight.T + bias
    own = f.argmax(1)
    w = weight[None] - weight[own][:, None]
    size = w.norm(dim=2) if norm == "2" else w.abs().sum(2)
    distance = ((f - f.gather(1, own[:, None])).abs() / size).scatter(1, own[:, None], torch.inf).amin(1)
    _, r, iterations, label = deepfool(linear(weight, bias), x, candidates=k, guard=0.0, overshoot=1e-6, norm=norm)  # type: ignore[arg-type]
    measured = r.flatten(1).norm(dim=1, p=2 if norm == "2" else torch.inf)
    torch.testing.assert_close(measured, distance, rtol=0.01, atol=1e-9)
    assert bool((label != own).all())
    assert iterations.tolist() == [1] * 4


def test_candidates_are_the_highest_scores() -> None:
    """Class 2 has the nearest boundary but the lowest score: with two candidates it is not tried."""
    weight = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.0, 40.0]]).double()
    net, x = linear(weight, torch.tensor([0.0, 0.0, -2.0]).double()), torch.tensor([[1.0, 0.0]]).double()
    assert deepfool(net, x, guard=0.0)[3].tolist() == [2]
    assert deepfool(net, x, guard=0.0, candidates=2)[3].tolist() == [1]


def test_wrong_images_stay_and_rows_are_independent() -> None:
    net, x = smooth().double(), pixels().double()
    own = net(x).argmax(1)
    y = own.clone()
    y[::2] = (y[::2] + 1) % 4
    x_adv, r, iterations, label = deepfool(net, x, y)
    assert torch.equal(x_adv[::2], x[::2])
    assert not bool(r[::2].any())
    assert iterations[::2].tolist() == [0] * 4
    assert bool((label[1::2] != own[1::2]).all())
    assert torch.equal(label, net(x_adv).argmax(1))
    for i in range(8):
        alone = deepfool(net, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone[1], r[i : i + 1])
        assert int(alone[2]) == int(iterations[i])


def test_equal_scores_everywhere_stay_finite() -> None:
    """No gradient, no boundary: the image stays, and nothing is divided by zero."""
    x_adv, r, iterations, _ = deepfool(linear(torch.zeros(3, 2), torch.tensor([1.0, 0.0, 0.0])), torch.ones(2, 2))
    assert torch.equal(x_adv, torch.ones(2, 2))
    assert not bool(r.any())
    assert iterations.tolist() == [0, 0]


def test_the_iterates_stop_at_max_iter() -> None:
    net, x = smooth(), pixels()
    assert int(deepfool(net, x, max_iter=1, overshoot=0.0, guard=0.0)[2].max()) == 1


@pytest.mark.parametrize("norm", ["2", "inf"])
def test_the_part_fools_inside_the_pixel_range(norm: str) -> None:
    net, x = smooth(), pixels()
    x = x.where(x > 0.3, torch.zeros(()))  # many pixels at the edge of the range
    y = net(x).argmax(1)
    changed = DeepFool()(net, x, y, norm=norm)  # type: ignore[arg-type]
    assert bool((net(changed).argmax(1) != y).all())
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    free = deepfool(net, x, y, norm=norm)[1]  # type: ignore[arg-type]
    order = 2 if norm == "2" else torch.inf
    assert float((changed - x).flatten(1).norm(dim=1, p=order).mean()) >= float(free.flatten(1).norm(dim=1, p=order).mean())


def test_deepfool_is_smaller_than_the_fast_gradient_sign() -> None:
    net, x = smooth(), pixels(32)
    y = net(x).argmax(1)
    _, r, _, label = deepfool(net, x, y)
    eps, step = fgsm_min(net, x, y)
    assert bool((label != y).all())
    assert bool(eps.isfinite().all())
    assert rho_adv(x, r) < rho_adv(x, step)
    inf = deepfool(net, x, y, norm="inf")[1].flatten(1).abs().amax(1)
    assert float(inf.mean()) <= float(eps.mean())


def test_rho_adv_by_hand() -> None:
    x, r = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [9.0, 9.0]])
    assert rho_adv(x, r) == pytest.approx((0.2 + 0.5) / 2)


def test_mistakes_name_the_value() -> None:
    with pytest.raises(Mistake, match="candidates=1"):
        DeepFool(candidates=1)
    with pytest.raises(Mistake, match="overshoot=-1"):
        DeepFool(overshoot=-1)
    with pytest.raises(Mistake, match="max_iter=0"):
        DeepFool(max_iter=0)
    with pytest.raises(Mistake, match="at least 2 classes"):
        deepfool(linear(torch.ones(1, 2)), torch.ones(1, 2))
    with pytest.raises(Mistake, match=r"eps=-0\.1"):
        Fgsm(eps=-0.1)
    with pytest.raises(Mistake, match="steps=0"):
        Pgd(steps=0)
    with pytest.raises(Mistake, match="extra=3"):
        adversarial_finetune(nn.Linear(2, 2), torch.ones(2, 2), torch.zeros(2).long(), torch.Generator(), lr=0.1, extra=3)


def test_finetuning_makes_a_network_harder_to_fool() -> None:
    """Two Gaussian heaps told apart by a network that leans on a weak second feature: training on perturbed images mends it."""
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    x = torch.randn(80, 2, generator=gen) * 0.1 + torch.stack([(y * 2.0 - 1), (y * 2.0 - 1) * 0.1], 1)
    net = linear(torch.tensor([[-0.1, -3.0], [0.1, 3.0]]))
    before = rho_adv(x, deepfool(net, x, y)[1])
    adversarial_finetune(net, x, y, gen, lr=0.05, epochs=3, batch=16)
    assert rho_adv(x, deepfool(net, x, y)[1]) > 1.5 * before
    assert not net.training


def test_adversarial_robustness_toolbox_agrees() -> None:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        attacks = pytest.importorskip("art.attacks.evasion.deepfool")
        estimators = pytest.importorskip("art.estimators.classification.pytorch")
        net, x = smooth(3), pixels(6, seed=5)
        classifier = estimators.PyTorchClassifier(net, nn.CrossEntropyLoss(), (1, 6, 6), 4, device_type="cpu")
        theirs = torch.from_numpy(attacks.DeepFool(classifier, max_iter=50, epsilon=1e-3, nb_grads=4, batch_size=6, verbose=False).generate(x.numpy())) - x
    _, ours, _, label = deepfool(net, x, guard=0.0, overshoot=1e-3)
    assert bool((label != net(x).argmax(1)).all())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * float(theirs.abs().max()))


# -- FGSM and PGD ------------------------------------------------------------------------------------


def test_fgsm_by_hand() -> None:
    """One logit difference: the loss gradient is a positive multiple of w_1 - w_0 for label 0."""
    net = linear(torch.tensor([[1.0, -2.0, 0.0], [0.0, 1.0, 0.0]]))
    x, y = torch.full((1, 3), 0.5), torch.tensor([0])
    torch.testing.assert_close(fgsm(net, x, y, 0.25), torch.tensor([[0.25, 0.75, 0.5]]))
    unit = torch.tensor([[-1.0, 3.0, 0.0]]) / 10**0.5
    torch.testing.assert_close(fgsm(net, x, y, 0.25, "2"), x + 0.25 * unit)
    assert torch.equal(Fgsm(eps=0.0)(net, x, y), x)
    torch.testing.assert_close(Fgsm()(net, x, y, norm="inf"), x + 8 / 255 * torch.tensor([[-1.0, 1.0, 0.0]]))
    torch.testing.assert_close(Fgsm()(net, x, y, eps=0.1, norm="inf"), x + 0.1 * torch.tensor([[-1.0, 1.0, 0.0]]))  # the call's ball wins
    assert not bool(steepest(torch.zeros(1, 3), "2").any())
    tiny = steepest(torch.tensor([[3e-30, 4e-30]]), "2")
    torch.testing.assert_close(tiny, torch.tensor([[0.6, 0.8]]))


def test_fgsm_min_finds_the_first_eps_of_the_grid() -> None:
    """f_0 - f_1 = x_0 - x_1: it changes sign at eps = (x_0 - x_1) / 2 = 0.1, 0.03; the third is wrong already."""
    net = linear(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x, y = torch.tensor([[0.6, 0.4], [0.53, 0.47], [0.2, 0.8]]), torch.tensor([0, 0, 0])
    eps, r = fgsm_min(net, x, y, steps=200)
    assert eps.tolist() == pytest.approx([0.105, 0.035, 0.0], abs=0.0051)
    assert bool((net(x + r).argmax(1) == 1).all())
    shorter = (eps[:2] - 1 / 200)[:, None] * torch.tensor([[-1.0, 1.0]])
    assert net(x[:2] + shorter * 0.98).argmax(1).tolist() == [0, 0]
    eps, r = fgsm_min(net, x, y, steps=10, largest=0.05)
    assert eps.tolist()[0] == torch.inf
    assert float(r[0].abs().max()) == pytest.approx(0.05)


@pytest.mark.parametrize(("norm", "order"), [("2", 2.0), ("inf", float("inf"))])
def test_pgd_stays_in_the_ball_and_beats_one_step(norm: str, order: float) -> None:
    net, x = smooth(), pixels(16)
    y = net(x).argmax(1)
    eps = 0.05 if norm == "inf" else 0.4
    loss = nn.CrossEntropyLoss()
    many, one = Pgd(eps=eps)(net, x, y, norm=norm), Fgsm(eps=eps)(net, x, y, norm=norm)  # type: ignore[arg-type]
    assert float((many - x).flatten(1).norm(order, dim=1).max()) <= eps + 1e-6
    with torch.no_grad():
        unmoved = Pgd(eps=eps, start=False)(net, x, y, norm=norm)  # type: ignore[arg-type]
        assert float(loss(net(unmoved), y)) > float(loss(net(one), y))
        assert float(loss(net(many), y)) > float(loss(net(x), y))
    assert torch.equal(many, Pgd(eps=eps)(net, x, y, norm=norm))  # type: ignore[arg-type]
    assert not torch.equal(many, Pgd(eps=eps, seed=1, steps=1)(net, x, y, norm=norm))  # type: ignore[arg-type]


def test_pgd_on_a_linear_network_reaches_the_corner() -> None:
    """The loss rises along one direction: PGD ends at x + eps sign(w), whatever its start."""
    net, x, y = linear(torch.tensor([[1.0, -2.0], [0.0, 1.0]])), torch.full((3, 2), 0.5), torch.zeros(3).long()
    wanted = x + 0.1 * torch.tensor([-1.0, 1.0])
    for seed in range(3):
        torch.testing.assert_close(Pgd(eps=0.1, seed=seed)(net, x, y, norm="inf"), wanted)
    assert torch.equal(Pgd(eps=0.0)(net, x, y), x)
    one = pgd(net, x, y, None, eps=0.1, steps=1, step=0.02)
    torch.testing.assert_close(one, x + 0.02 * torch.tensor([-1.0, 1.0]))


def test_loss_gradient_is_each_images_own() -> None:
    net, x = smooth().double(), pixels(4).double()
    y = torch.tensor([0, 1, 2, 3])
    whole = loss_gradient(net, x, y)
    for i in range(4):
        torch.testing.assert_close(loss_gradient(net, x[i : i + 1], y[i : i + 1]), whole[i : i + 1])
