"""The linear interpreter: the paper's map by hand, exact identities, rows against columns, and what cannot be frozen."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.backbones import builder
from convince.errors import Mistake
from convince.explain.linear_scope import LinearInterpreter, LinearScope, linear_pass
from convince.fit.answer import Answer, Normalise


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """In float64 and eval mode, batch norms with statistics and shifts of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().double().eval()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                nn.init.normal_(m.bias)
                nn.init.normal_(m.weight)
        return net


def small(act: Callable[[], nn.Module], norm: Callable[[int], nn.Module] = nn.BatchNorm2d, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1, bias=bias), norm(6), act(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1, bias=bias), norm(8), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3, bias=bias)),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: small(nn.ReLU),
    "relu in place": lambda: small(lambda: nn.ReLU(inplace=True)),
    "leaky": lambda: small(nn.LeakyReLU),
    "gelu": lambda: small(nn.GELU),
    "silu": lambda: small(nn.SiLU),
    "prelu": lambda: small(nn.PReLU),
    "tanh": lambda: small(nn.Tanh),
    "sigmoid": lambda: small(nn.Sigmoid),
    "instance norm": lambda: small(nn.ReLU, lambda c: nn.InstanceNorm2d(c, affine=True)),
    "group norm": lambda: small(nn.ReLU, lambda c: nn.GroupNorm(2, c)),
    "resnet": builder("resnet:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=2, size=(8, 8)),
    "convnext": builder("convnext-mini", num_classes=3, in_chans=2, size=(8, 8)),
}


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()


class Unit(nn.Module):
    """relu(2 x1 - x2 + 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, torch.tensor([[2.0, -1.0]]), torch.tensor([1.0])))


class Lambda(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def test_worked_example() -> None:
    scope = LinearInterpreter(Unit(), torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
    assert scope.row(0).tolist() == [[2.0, -1.0], [0.0, 0.0]]
    assert scope.linear.tolist() == [[1.0], [0.0]]
    assert scope.residual().tolist() == [[1.0], [0.0]]
    assert scope.scores.tolist() == [[2.0], [0.0]]
    assert scope.bias_share().tolist() == [[0.5], [0.0]]
    assert scope.column(1).tolist() == [[-1.0], [0.0]]


def test_gates_by_hand() -> None:
    """s = h(a) / a, 0 where a = 0; the maximum is taken where the reference has it; constants are dropped."""
    a = torch.tensor([[-2.0, 0.0, 4.0]])
    v = torch.tensor([[10.0, 10.0, 10.0]])
    assert linear_pass(nn.LeakyReLU(0.1), a, v)[1].tolist() == [[1.0, 0.0, 10.0]]
    assert linear_pass(nn.Sigmoid(), a, v)[1].tolist()[0] == pytest.approx([10 * 0.1192029 / -2, 0.0, 10 * 0.9820138 / 4])
    plane, other = torch.tensor([[[[1.0, 5], [2, 3]]]]), torch.tensor([[[[1.0, -7], [9, 9]]]])
    for pool in (nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(1), Lambda(lambda t: t.amax((2, 3)))):
        assert linear_pass(nn.Sequential(pool, nn.Flatten()), plane, other)[1].tolist() == [[-7.0]]

    for f, wanted in (
        (lambda t: 3 - 2 * t, [-20.0] * 3),
        (lambda t: (t + 1) / 2 - t, [-5.0] * 3),
        (lambda t: t.square(), [-20.0, 0.0, 40.0]),
        (lambda t: t.clone().mul_(2).add_(1).relu_(), [0.0, 20.0, 20.0]),  # the gates of -3, 1 and 9
        (lambda t: torch.cat([t[:, :1], t.amax(1, keepdim=True)], 1), [10.0, 10.0]),
        (lambda t: F.pad(t, (1, 0), value=7.0), [0.0, 10.0, 10.0, 10.0]),
        (lambda t: t * torch.sigmoid(t.mean(1, keepdim=True) * 0), [5.0] * 3),  # a gate for all channels is decided
    ):
        assert linear_pass(Lambda(f), a, v)[1].tolist()[0] == pytest.approx(wanted)


@pytest.mark.parametrize("name", NETS)
def test_the_map_is_exact_linear_and_transposed(x: Tensor, name: str) -> None:
    net = seeded(NETS[name])
    scope = LinearInterpreter(net, x)
    torch.testing.assert_close(scope.scores, net(x).detach())
    torch.testing.assert_close(scope.linear + scope.residual(), scope.scores, rtol=0, atol=1e-12)
    torch.testing.assert_close(scope.forward(x), scope.linear)
    gen = torch.Generator().manual_seed(2)
    a, b = (torch.randn(x.shape, generator=gen).double() for _ in range(2))
    torch.testing.assert_close(scope.forward(3 * a - b), 3 * scope.forward(a) - scope.forward(b), rtol=1e-8, atol=1e-8)
    rows = torch.stack([scope.row(k) for k in range(3)], 1)
    torch.testing.assert_close(torch.einsum("nkchw,nchw->nk", rows, a), scope.forward(a), rtol=1e-8, atol=1e-8)
    for c, i, j in torch.randint(0, 2, (20, 3), generator=gen).mul(torch.tensor([1, 5, 6])).tolist():
        torch.testing.assert_close(scope.column(c, i, j), rows[:, :, c, i, j], rtol=1e-8, atol=1e-8)


def test_a_relu_net_is_its_gradient(x: Tensor) -> None:
    """For ReLU, max-pool and batch norm the map is the Jacobian; captum's input times gradient is the votes."""
    net = seeded(NETS["relu"])
    votes = LinearScope()(net, x, torch.tensor([0, 1, 2, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attr = pytest.importorskip("captum.attr")
        theirs = attr.InputXGradient(net).attribute(x.clone().requires_grad_(), torch.tensor([0, 1, 2, 1])).detach()
    torch.testing.assert_close(votes.map, theirs.sum(1, keepdim=True))
    torch.testing.assert_close(votes.images["row"] * x, theirs)
    gelu = seeded(NETS["gelu"])
    wide = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gelu(wide)[:, 0].sum(), wide)
    assert not torch.allclose(LinearInterpreter(gelu, x).row(0), gradient)  # a GELU's gate is not its slope


def test_without_biases_nothing_is_left(x: Tensor) -> None:
    bare = seeded(lambda: small(nn.ReLU, lambda c: nn.Identity(), bias=False))
    assert float(LinearInterpreter(bare, x).residual().abs().max()) < 1e-12
    assert LinearScope()(bare, x).table == {"bias share": pytest.approx(0, abs=1e-9), "class without bias": 1.0}
    # a batch norm's shift is beta - gamma mu / sigma, and nothing else
    norm = seeded(lambda: nn.Sequential(nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    shift = norm[0].bias - norm[0].weight * norm[0].running_mean / (norm[0].running_var + 1e-5).sqrt()
    torch.testing.assert_close(LinearInterpreter(norm, x).residual(), shift.expand(4, 2).detach())
    # the answer's own normalisation is a bias too
    answer = Answer(Normalise([0.5, 0.5], [0.25, 0.25]), bare).double()
    assert float(LinearInterpreter(answer, x).residual().abs().max()) > 1e-3


def test_votes_and_biases_sum_to_the_score(x: Tensor) -> None:
    net, target = seeded(NETS["silu"]), torch.tensor([2, 0, 1, 1])
    found = LinearScope()(net, x, target)
    scope = LinearInterpreter(net, x)
    score, residual = (t.gather(1, target[:, None])[:, 0] for t in (scope.scores, scope.residual()))
    torch.testing.assert_close(found.map.sum((1, 2, 3)) + residual, score)
    share = residual.abs() / (residual.abs() + (score - residual).abs())
    assert found.table["bias share"] == pytest.approx(float(share.mean()))
    for i in range(4):
        alone = LinearScope()(net, x[i : i + 1], int(target[i]))
        torch.testing.assert_close(alone.map, found.map[i : i + 1])
    table = LinearScope()(seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))), torch.rand(2, 5).double(), 0)
    assert table.map.shape == (2, 1, 5)


def test_works_in_autocast_and_inference_mode(x: Tensor) -> None:
    net = seeded(NETS["resnet"]).float()
    wanted = LinearScope()(net, x.float(), 0).map
    with torch.inference_mode():
        torch.testing.assert_close(LinearScope()(net, x.float().clone(), 0).map, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        half = LinearScope()(net, x.float(), 0).map
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wanted, rtol=0.2, atol=0.05 * float(wanted.abs().max()))


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10_000))
def test_svd_is_that_of_the_rows(seed: int) -> None:
    net, x = seeded(NETS["leaky"], seed), torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    scope = LinearInterpreter(net, x)
    matrix = torch.stack([scope.row(k) for k in range(3)], 1).flatten(2)
    left, values, images = scope.svd(3, steps=2)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix))
    torch.testing.assert_close((left * values[:, None]) @ images.flatten(2), matrix)
    torch.testing.assert_close(scope.svd(1)[1][:, 0], values[:, 0], rtol=0.02, atol=1e-9)
    with pytest.raises(Mistake, match=r"svd\(4\): a map from 128 values to 3 scores has 1 to 3"):
        scope.svd(4)


def test_a_part_changed_in_place_is_followed_or_refused(x: Tensor) -> None:
    def part(x: Tensor, whole: bool) -> Tensor:
        wide = torch.cat([x, -x], 1)
        half = wide[:, :2]
        half += 1
        return (wide if whole else half.relu()).mean((2, 3))

    torch.testing.assert_close(LinearInterpreter(Lambda(lambda x: part(x, False)), x).linear, x.mean((2, 3)))
    with pytest.raises(Mistake, match="changes a part of a tensor in place and reads the whole"):
        LinearInterpreter(Lambda(lambda x: part(x, True)), x)


def test_refusals_say_why(x: Tensor) -> None:
    for net, said in (
        (Lambda(lambda x: x.mean((2, 3)).softmax(1)), "no rule says what 'softmax' decides"),
        (Lambda(lambda x: torch.matmul(x, x.mT).mean((2, 3))), "'matmul' of two tensors that both depend on the image"),
        (Lambda(lambda x: (x * x).mean((2, 3))), "'mul' of two tensors that both depend"),
        (Lambda(lambda x: torch.fft.fft2(x).abs().mean((2, 3))), "no rule says what 'fft_fft2' decides"),
        (Lambda(lambda x: torch.from_numpy(x.numpy()).mean((2, 3))), "do not come from its input by torch functions"),
        (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()).double(), "takes the statistics of its batch"),
    ):
        with pytest.raises(Mistake, match=said):
            LinearInterpreter(net.eval(), x)
    net = seeded(NETS["relu"])
    net.differentiable = False
    with pytest.raises(Mistake, match="needs gradients"):
        LinearScope()(net, x)
