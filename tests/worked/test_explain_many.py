"""Many images: folding, the fast format and its check, similarity, and the metrics of maps by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.faithfulness import deletion, insertion
from convince.explain.grad_cam import GradCam
from convince.explain.integrated_gradients import IntegratedGradients, points
from convince.explain.many import explain_all, folded, rank_correlation
from convince.explain.metrics import METRICS, entropy, file_size, max_sensitivity, metric, randomisation, shuffled
from convince.explain.ranking import rank
from convince.explain.rise import Rise, random_masks
from convince.explain.saliency import Saliency
from convince.explain.targets import Similarity
from convince.fit.answer import Answer, Normalise
from convince.fit.precision import Plan
from convince.kinds import Explainer
from convince.types import Explanation

BF16 = Plan("cpu", "bf16", channels_last=True, reason="a test")


class Residual(nn.Module):
    """conv - norm - ReLU - conv - norm - add - ReLU - pool - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(a)) + a).mean((2, 3)))


@pytest.fixture
def answer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Residual()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean = torch.randn(8) * 0.3
                m.running_var = torch.rand(8) + 0.5
                nn.init.normal_(m.weight)
        return Answer(Normalise([0.4] * 3, [0.2] * 3), net).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(10, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_batch_norms_are_folded_and_the_original_is_left(answer: nn.Module, x: Tensor) -> None:
    before = {name: p.clone() for name, p in answer.state_dict().items()}
    fast = folded(answer, x[:1])
    assert [type(m).__name__ for m in fast.modules()].count("BatchNorm2d") == 0
    torch.testing.assert_close(fast(x), answer(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], p) for name, p in answer.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in answer.modules())


def test_a_convolution_that_is_read_twice_is_not_folded(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
            self.bn.running_var = torch.full((4,), 9.0)

        def forward(self, x: Tensor) -> Tensor:
            a = self.conv(x)
            return self.fc((self.bn(a) + a).mean((2, 3)))

    net = Twice().eval()
    fast = folded(net, x[:1])
    torch.testing.assert_close(fast(x), net(x))


def test_batches_are_joined_and_the_format_is_said(answer: nn.Module, x: Tensor) -> None:
    plain = GradCam()(answer, x)
    seen: list[tuple[int, int]] = []
    whole = explain_all(GradCam(), answer, x, progress=lambda done, n: seen.append((done, n)))
    assert torch.equal(whole.map, plain.map)
    assert whole.table["precision"] == "fp32"
    assert seen == [(10, 10)]
    fast = explain_all(GradCam(), answer, x, plan=BF16)
    assert fast.table["precision"] == "bf16"
    assert fast.table["agreement"] >= 0.99
    assert fast.map.dtype == torch.float32
    assert float(rank_correlation(fast.map, plain.map).min()) > 0.95
    assert not torch.equal(fast.map, plain.map)
    few = explain_all(GradCam(), answer, x[:3], plan=BF16)
    assert few.table["precision"] == "fp32"


def test_a_map_that_bf16_would_change_stays_in_full_precision(answer: nn.Module, x: Tensor) -> None:
    @dataclass
    class Last(Explainer):
        """The last bits of a score, spread over the plane."""

        def explain(self, answer: nn.Module, x: Tensor, target: Tensor) -> Explanation:
            found = (answer(x).detach().sum(1) * 1e4).frac().view(-1, 1, 1, 1) + 1.0
            return Explanation((torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * found * 997).frac())

    found = explain_all(Last(), answer, x, plan=BF16)
    assert found.table["precision"] == "fp32"
    assert found.table["agreement"] < 0.99


def test_rank_correlation_by_hand() -> None:
    a = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [5, 5, 5, 5], [5, 5, 5, 5], [1, 1, 2, 3]])
    b = torch.tensor([[10.0, 20, 25, 90], [4, 3, 2, 1], [1, 2, 3, 4], [7, 7, 7, 7], [1, 2, 2, 3]])
    assert rank_correlation(a, b).tolist() == pytest.approx([1, -1, 0, 1, 5 / 6], abs=1e-6)


def test_integrated_gradients_is_complete_and_exact_on_a_linear_model(answer: nn.Module, x: Tensor) -> None:
    at, weights = points(5)
    assert float(weights.sum()) == pytest.approx(1)
    assert float((weights * at**9).sum()) == pytest.approx(0.1)  # Gauss: exact up to degree 2 n - 1
    linear = nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).double()
    found = IntegratedGradients(steps=1, baseline=0.25)(linear, x.double(), 2)
    wanted = (x.double() - 0.25) * linear[1].weight[2].view(1, 3, 12, 12)
    torch.testing.assert_close(found.map, wanted.sum(1, keepdim=True))
    many = IntegratedGradients(steps=300)(answer.double(), x.double(), 1)
    rise = (answer(x.double()) - answer(torch.zeros_like(x).double()))[:, 1]
    torch.testing.assert_close(many.map.sum((1, 2, 3)), rise.detach(), rtol=1e-2, atol=1e-3)
    assert many.table["completeness gap"] < 1e-2


def test_captum_integrates_to_the_same(answer: nn.Module, x: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    theirs = attr.IntegratedGradients(answer).attribute(x, target=1, n_steps=50, method="gausslegendre")
    ours = IntegratedGradients(steps=50)(answer, x, 1).images["attribution"]
    torch.testing.assert_close(ours, theirs.detach().float(), rtol=1e-4, atol=1e-5)


def test_rise_by_hand_and_its_masks() -> None:
    gen = torch.Generator().manual_seed(0)
    masks = random_masks(400, (9, 7), 3, 0.5, gen)
    assert masks.shape == (400, 1, 9, 7)
    assert float(masks.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(masks.min()) >= 0
    assert float(masks.max()) <= 1

    class First(nn.Module):
        """Class 1 is certain where the first pixel is bright, else class 0."""

        def forward(self, x: Tensor) -> Tensor:
            on = x[:, 0, 0, 0]
            return torch.stack([1 - on, on], 1) * 50

    found = Rise(masks=300, cells=4)(First(), torch.ones(2, 1, 8, 8), 1).map
    assert torch.equal(found[0], found[1])
    assert int(found[0].flatten().argmax()) == 0
    with pytest.raises(Mistake, match="share=1"):
        Rise(share=1)


def test_similarity_is_explained_like_a_class(answer: nn.Module, x: Tensor) -> None:
    like = Similarity(answer, x[3:4])
    found = like(x).detach()
    assert found.shape == (10, 1)
    assert float(found[3]) == pytest.approx(1)
    whole = GradCam(relu=False)(like, x)
    assert whole.map.shape == (10, 1, 12, 12)
    assert Saliency()(like, x).map.shape == (10, 1, 12, 12)
    assert Rise(masks=4, cells=2)(like, x).map.shape == (10, 1, 12, 12)
    scores = insertion(like, x, whole.map, torch.zeros(10, dtype=torch.int64))
    assert float(scores.std()) > 0  # the cosine itself, not the softmax of one score
    with pytest.raises(Mistake, match="no linear layer"):
        Similarity(nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), x[:1])


def test_a_regression_output_is_explained(x: Tensor) -> None:
    height = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    assert GradCam()(height, x).map.shape == (10, 1, 12, 12)  # one output: the only target


def test_refusals_of_the_kind(answer: nn.Module, x: Tensor) -> None:
    with pytest.raises(Mistake, match="images have 1 channels, and the answer takes 3"):
        GradCam()(answer, x[:, :1])
    with pytest.raises(Mistake, match="at least one image"):
        GradCam()(answer, x[:0])
    with pytest.raises(Mistake, match="not finite; pixels are"):
        GradCam()(answer, x * math.nan)
    with pytest.raises(Mistake, match=r"saliency: target=\[9"):
        Saliency()(answer, x[:1], 9)

    class Broken(Explainer):
        def explain(self, answer: nn.Module, x: Tensor, target: Tensor) -> Explanation:
            found = torch.zeros(len(x), 1, 12, 12)
            found[2] = math.inf
            return Explanation(found)

    with pytest.raises(Mistake, match=r"the map of image 2 is not finite \(1 of 10\)"):
        Broken()(answer, x)


# -- metrics ---------------------------------------------------------------------------------------------


def test_entropy_and_file_size_by_hand() -> None:
    found = torch.zeros(3, 1, 2, 2)
    found[0, 0, 0, 0] = 5  # all in one place
    found[1] = -2.0  # even
    assert entropy(found).tolist() == pytest.approx([0, math.log(4), math.log(4)])
    noise = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    sizes = file_size(torch.cat([noise, torch.zeros_like(noise), torch.ones_like(noise)]))
    assert sizes[0] > 4000
    assert float(sizes[1]) == float(sizes[2]) < 200


def test_sensitivity_by_hand(answer: nn.Module, x: Tensor) -> None:
    target = torch.zeros(10, dtype=torch.int64)

    def still(model: nn.Module, pixels: Tensor, wanted: Tensor) -> Tensor:
        return torch.ones(len(pixels), 1, 12, 12)

    def pixels_themselves(model: nn.Module, pixels: Tensor, wanted: Tensor) -> Tensor:
        return pixels[:, :1]

    assert max_sensitivity(still, still(answer, x, target), answer, x, target).tolist() == [0.0] * 10
    found = max_sensitivity(pixels_themselves, x[:, :1], answer, x, target, samples=4, radius=0.05)
    assert float(found.max()) < 2 * 0.05 * 12 / float(x[:, :1].flatten(1).norm(dim=1).min())
    assert float(found.min()) > 0


def test_shuffled_weights_are_the_same_numbers_elsewhere(answer: nn.Module, x: Tensor) -> None:
    other = shuffled(answer)
    for (name, a), (_, b) in zip(answer.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values), name
    assert not torch.equal(other(x), answer(x))
    assert torch.equal(shuffled(answer)(x), other(x))
    target = torch.zeros(10, dtype=torch.int64)

    def edges(model: nn.Module, pixels: Tensor, wanted: Tensor) -> Tensor:
        return pixels.mean(1, keepdim=True)

    assert randomisation(edges, edges(answer, x, target), answer, x, target).tolist() == pytest.approx([1.0] * 10)


def test_a_map_that_knows_ranks_above_one_that_does_not() -> None:
    """Class 1 is told by the left half alone: a map of that half is faithful, its opposite is not."""

    class Left(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            on = x[:, 0, :, :4].mean((1, 2))
            return torch.stack([0.5 - on, on - 0.5], 1) * 20

    @dataclass
    class Half(Explainer):
        left: bool

        def explain(self, answer: nn.Module, x: Tensor, target: Tensor) -> Explanation:
            found = torch.zeros(len(x), 1, 8, 8)
            found[..., :4] = 1.0
            return Explanation(found if self.left else 1 - found)

    x = torch.zeros(6, 1, 8, 8)
    x[..., :4] = torch.linspace(0.8, 1, 6).view(6, 1, 1, 1)
    rows = rank({"knows": Half(True), "opposite": Half(False), "cam": GradCam()}, Left(), x, torch.ones(6, dtype=torch.int64), tuple(METRICS))
    assert rows[0].method == "knows"
    assert [r.method for r in rows][-2:] == ["opposite", "cam"]
    assert "no layer of this answer" in rows[-1].error
    best = rows[0]
    assert best.over_random is not None
    assert best.over_random[0] - best.over_random[1] > 0
    assert best.means["faithfulness"] == pytest.approx(best.means["insertion"] - best.means["deletion"])
    assert best.means["sensitivity"] == 0
    rows = rank({"knows": Half(True)}, Left(), x, torch.ones(6, dtype=torch.int64), ("entropy",), patience=0.0)
    assert [(r.method, "more than 0 s; name it by --method" in r.error) for r in rows] == [("knows", True), ("random", True), ("centre", True)]
    with pytest.raises(Mistake, match="did you mean 'insertion'"):
        metric("insertoin")


def test_deletion_of_the_whole_and_insertion_of_nothing() -> None:
    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            on = x.mean((1, 2, 3))
            return torch.stack([torch.zeros_like(on), on * 4], 1)

    x, target = torch.ones(1, 1, 4, 4), torch.tensor([1])
    ramp = torch.arange(16.0).view(1, 1, 4, 4)
    steps = torch.linspace(1, 0, 17)
    area = torch.trapezoid(torch.sigmoid(4 * steps)) / 16
    assert float(deletion(Bright(), x, ramp, target)) == pytest.approx(float(area))
