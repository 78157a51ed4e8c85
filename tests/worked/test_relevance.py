"""LRP, deep Taylor, salient relevance and DeepLIFT: numbers by hand, sums that are kept, parity with captum, refusals in words."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from convince.errors import Mistake
from convince.explain.deep_lift import DeepLift, deep_lift
from convince.explain.deep_taylor import DeepTaylor, deep_taylor, nonpositive_bias_
from convince.explain.lrp import Lrp
from convince.explain.relevance import Rules, Tally, alpha_beta, epsilon_rule, relevance, w_square, z_box, z_plus
from convince.explain.salient_relevance import SalientRelevance, context_aware_saliency, dissimilarity, distances, lrp_stage, top_regions
from convince.fit.answer import Answer, Normalise


class Residual(nn.Module):
    """conv - BN - ReLU, a residual block with a 1x1 shortcut, max-pool, GAP, linear; in place or functional."""

    def __init__(self, inplace: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.inplace = inplace
        self.stem, self.bn0 = nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6)
        self.short, self.bn2 = nn.Conv2d(4, 6, 1, bias=bias), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3, bias=bias)
        for bn in (self.bn0, self.bn1, self.bn2):
            bn.running_mean.normal_(0, 0.2)
            bn.running_var.uniform_(0.5, 2)
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias, 0, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)), inplace=self.inplace)
        y = self.bn1(self.conv1(x))
        if self.inplace:
            y += self.bn2(self.short(x))
            y = y.relu_()
        else:
            y = torch.relu(y + self.bn2(self.short(x)))
        return self.fc(F.max_pool2d(y, 2).mean((2, 3)))


def plain(bias: bool = True, pool: type[nn.Module] = nn.MaxPool2d) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias),
        nn.ReLU(),
        pool(2),
        nn.Conv2d(4, 6, 3, bias=bias),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 5, bias=bias),
        nn.ReLU(),
        nn.Linear(5, 3, bias=bias),
    )


def seeded(make, seed: int = 0):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double().eval()


def best(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()


# -- by hand -----------------------------------------------------------------------------------------

A = torch.tensor([[1.0, 2.0]])
W = torch.tensor([[1.0, 0.5], [-1.0, 1.0]])  # torch's [out in]: rows (1, 0.5) and (-1, 1)
R = torch.tensor([[1.5, 0.0]])
BOX = (torch.zeros(1, 2), torch.full((1, 2), 2.0))


def two_layers() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(W)
        net[2].weight.copy_(torch.tensor([[1.0, -0.5]]))
    return net.eval()


def test_the_rules_on_one_layer() -> None:
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor([b]), rtol=1e-6, atol=1e-7)  # noqa: E731
    close(z_plus(F.linear, A, W, R), [0.75, 0.75])
    close(z_box(F.linear, A, W, R, BOX), [0.75, 0.75])
    close(w_square(F.linear, A, W, R, BOX), [1.2, 0.3])
    close(epsilon_rule(F.linear, A, W, None, R, 0.0), [0.75, 0.75])
    close(epsilon_rule(F.linear, A, W, torch.tensor([[1.0, 0.0]]), R, 0.0), [0.5, 0.5])  # the bias takes a third
    close(epsilon_rule(F.linear, A, W, None, R, 1.0), [0.5, 0.5])
    second = torch.tensor([[0.0, 1.0]])  # z = -1 + 2: alpha 2 times (0, 1), less beta 1 times (1, 0)
    close(alpha_beta(F.linear, A, W, None, second, 2.0, 1.0), [-1.0, 2.0])
    close(z_box(F.linear, A, W, second, BOX), [1 / 3, 2 / 3])  # z = (-1 + 2, 2): both speak for the unit
    close(w_square(F.linear, A, W, second, (torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 1.0]]))), [0.8, 0.2])  # weights of pixels: -2 and 1


def test_the_worked_network() -> None:
    """x = (1, 2), hidden (2, 1), score 1.5: hidden relevance (1.5, 0), and the same input relevance as above."""
    net, target = two_layers(), torch.tensor([0])
    for rule, wanted in (("zB", [[0.75, 0.75]]), ("w2", [[1.2, 0.3]])):
        found = deep_taylor(net, A, target, rule, 0.0, 2.0)
        torch.testing.assert_close(found.pixels, torch.tensor(wanted))
        assert found.start.tolist() == [1.5]
        assert found.dead == 0
    torch.testing.assert_close(Lrp("z+", high=2.0)(net, A, 0).images["relevance"], torch.tensor([[0.75, 0.75]]))


def test_units_without_a_positive_input_are_counted() -> None:
    """A unit that only its bias raises has nobody to give its relevance to: it is lost, and the table says so."""
    net = two_layers()
    with torch.no_grad():
        net[0] = nn.Linear(2, 2)
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 5.0]))
        net[2].weight.fill_(1.0)
    found = DeepTaylor(high=2.0)(net, A, 0)  # zB: z = 3 and 1 * (2 - 1) + 1 * (2 - 2)
    torch.testing.assert_close(found.images["relevance"], torch.tensor([[1.0 + 2.0, 2.0]]))
    found = Lrp("z+")(net, A, 0)  # hidden (3, 2); the second has no input that raises it
    torch.testing.assert_close(found.images["relevance"], torch.tensor([[1.0, 2.0]]))
    assert found.table["dead units"] == 1
    assert found.table["conservation gap"] == pytest.approx(0.4)
    tally = Tally()
    assert z_plus(F.linear, A, -W.abs(), R, tally).tolist() == [[0.0, 0.0]]
    assert tally.dead == 1


def test_a_value_below_zero_is_put_down_to_what_lowered_it() -> None:
    below = torch.tensor([[True, False]])
    w = torch.tensor([[1.0, -1.0], [1.0, 1.0]])  # the first output is 1 - 2
    found = z_plus(F.linear, A, w, torch.tensor([[3.0, 3.0]]), below=below)
    torch.testing.assert_close(found, torch.tensor([[0.0 + 1.0, 3.0 + 2.0]]))


# -- sums and signs ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(["zB", "w2"]))
def test_deep_taylor_keeps_the_sum_and_the_sign(seed: int, residual: bool, rule: str) -> None:
    net = seeded(Residual if residual else plain, seed)
    x = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    found = deep_taylor(net, x, best(net, x), rule)
    assert float(found.pixels.min()) >= 0
    if found.dead == 0:
        assert float(found.gap.max()) < 1e-9


def test_without_biases_every_rule_keeps_the_sum(x: Tensor) -> None:
    net = seeded(lambda: plain(bias=False))
    target = best(net, x)
    start = net(x).gather(1, target[:, None])[:, 0].detach()
    for rules in (
        Rules("z", "z"),
        Rules("z", "z+"),
        Rules("epsilon", "epsilon", epsilon=1e-12),
        Rules("z+", "z+", "w2"),
        Rules("alpha-beta", "alpha-beta", alpha=1, beta=0),
    ):
        found = relevance(net, x, target, rules, "lrp")
        torch.testing.assert_close(found.pixels.flatten(1).sum(1), start, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(lrp_stage(net, x, target).pixels, relevance(net, x, target, Rules("z", "z+"), "lrp").pixels)


def test_a_score_below_zero_has_nothing_to_decompose(x: Tensor) -> None:
    net = seeded(plain)
    with torch.no_grad():
        net[-1].bias[1] = -100.0
    found = DeepTaylor()(net, x, 1)
    assert float(found.map.abs().max()) == 0
    assert found.table["images without relevance"] == 5


def test_nonpositive_biases() -> None:
    net = seeded(plain)
    nonpositive_bias_(net)
    assert all(float(m.bias.detach().max()) <= 0 for m in net if hasattr(m, "bias"))
    assert bool((net(torch.zeros(1, 2, 8, 8).double()) <= 0).all())
    with pytest.raises(Mistake, match="bn0 is a batch norm"):
        nonpositive_bias_(Residual())


# -- any network -------------------------------------------------------------------------------------


def test_batch_norms_count_as_part_of_the_layer_before(x: Tensor) -> None:
    net = seeded(Residual)
    folded = copy.deepcopy(net)
    for conv, bn in (("stem", "bn0"), ("conv1", "bn1"), ("short", "bn2")):
        setattr(folded, conv, fuse_conv_bn_eval(getattr(net, conv), getattr(net, bn)))
        setattr(folded, bn, nn.Identity())
    target = torch.tensor([0, 1, 2, 1, 0])
    for part in (DeepTaylor(), DeepTaylor("w2"), Lrp("epsilon"), Lrp("alpha-beta"), Lrp("z+", first="zB")):
        torch.testing.assert_close(part(net, x, target).map, part(folded, x, target).map, rtol=1e-8, atol=1e-10)


def test_scales_and_shifts_fold_too(x: Tensor) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.gamma = nn.Conv2d(2, 4, 3), nn.Linear(4, 3), nn.Parameter(torch.tensor([1.0, -1, 2, 0.5]).view(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(0.1 - (self.conv(x) * self.gamma - 0.2) / 0.5)
            return 2 * self.fc(x.mean((2, 3))) + 1

    net = seeded(Frozen)
    conv, fc = nn.Conv2d(2, 4, 3).double(), nn.Linear(4, 3).double()
    with torch.no_grad():
        conv.weight.copy_(net.conv.weight * net.gamma[..., None] * -2)
        conv.bias.copy_(net.conv.bias * net.gamma.flatten() * -2 + 0.5)
        fc.weight.copy_(2 * net.fc.weight)
        fc.bias.copy_(2 * net.fc.bias + 1)
    same = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc).eval()
    torch.testing.assert_close(net(x), same(x))
    for part in (DeepTaylor(), Lrp("epsilon"), Lrp("alpha-beta", alpha=3.0)):
        torch.testing.assert_close(part(net, x, 1).map, part(same, x, 1).map)
    assert isinstance(net.gamma, nn.Parameter)
    assert net.gamma.requires_grad


def test_in_place_and_functional_networks_are_read_alike(x: Tensor) -> None:
    a, b = seeded(Residual), seeded(lambda: Residual(inplace=True))
    torch.testing.assert_close(a(x), b(x))
    for part in (DeepTaylor(), Lrp(), Lrp("alpha-beta"), DeepLift()):
        assert torch.equal(part(a, x, 1).map, part(b, x, 1).map)


def test_a_sum_of_branches_is_shared_out_by_what_each_gives(x: Tensor) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(2 * x[:, 0] + x[:, 1]).sum((1, 2)), x.mean((1, 2, 3)) - x.amax((1, 2, 3))], 1)

    found = Lrp("z")(Two(), x, 0).images["relevance"]
    torch.testing.assert_close(found, x * torch.tensor([2.0, 1.0]).double().view(1, 2, 1, 1))
    found = Lrp("z")(Two(), x, 1).images["relevance"]  # the mean goes to all, the maximum to the winner
    most = x == x.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, x / 128 - x * most)


def test_normalised_pixels_keep_their_range(x: Tensor) -> None:
    """Without padding, zB and w^2 behind a normalisation are those of the network with the normalisation folded into its first layer."""
    first = seeded(lambda: nn.Conv2d(2, 4, 3))
    rest = seeded(lambda: nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    normalise = Normalise([0.3, 0.6], [0.2, 0.5]).double()
    folded = copy.deepcopy(first)
    with torch.no_grad():
        folded.weight.div_(normalise.std)
        folded.bias.sub_((folded.weight * normalise.mean).sum((1, 2, 3)))
    a, b = Answer(normalise, nn.Sequential(first, rest)), nn.Sequential(folded, rest)
    torch.testing.assert_close(a(x), b(x))
    for rule in ("zB", "w2"):
        torch.testing.assert_close(DeepTaylor(rule)(a, x, 1).map, DeepTaylor(rule)(b, x, 1).map)


def test_the_border_of_zeros_has_no_range(x: Tensor) -> None:
    """Padding is 0 whatever the image: zB leaves all relevance on the pixels."""
    net = Answer(Normalise([0.5], [0.25]).double(), seeded(lambda: plain(bias=False)))
    found = deep_taylor(net, x, best(net, x))
    assert found.dead == 0
    assert float(found.gap.max()) < 1e-9


def test_rows_do_not_depend_on_their_batch(x: Tensor) -> None:
    net, target = seeded(Residual), torch.tensor([0, 1, 2, 1, 0])
    for part in (DeepTaylor(), Lrp(), SalientRelevance(), DeepLift()):
        whole = part(net, x, target).map
        for i in (0, 3):
            torch.testing.assert_close(part(net, x[i : i + 1], int(target[i])).map, whole[i : i + 1])
    many = x.repeat(8, 1, 1, 1)[:35]
    torch.testing.assert_close(Lrp()(net, many, 1).map[30:35], Lrp()(net, x, 1).map)


def test_relevance_is_reckoned_in_full_precision(x: Tensor) -> None:
    net = seeded(Residual).float()
    wanted = DeepTaylor()(net, x.float(), 1).map
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DeepTaylor()(net, x.float(), 1).map, wanted)
    with torch.inference_mode():
        assert torch.equal(DeepTaylor()(net, x.float(), 1).map, wanted)


def test_tables_and_plain_linear_models() -> None:
    net = seeded(lambda: nn.Linear(4, 3))
    x = torch.rand(2, 4).double()
    found = Lrp("z")(net, x, 1)
    assert found.map.shape == (2, 1, 4)
    torch.testing.assert_close(found.map[:, 0], x * net.weight[1], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(DeepLift(0.5)(net, x, 1).map[:, 0], (x - 0.5) * net.weight[1])


def test_timm_networks() -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet10t", "mobilenetv2_035"):
        net = seeded(lambda name=name: timm.create_model(name, num_classes=3))
        x = torch.rand(2, 3, 32, 32).double()
        target = best(net, x)
        assert deep_taylor(net, x, target).pixels.shape == x.shape
        assert float(deep_taylor(net, x, target).gap.max()) < 1e-6
        with torch.no_grad():
            rise = (net(x) - net(torch.zeros_like(x))).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(deep_lift(net, x, target).sum((1, 2, 3)), rise)


# -- captum ------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """captum has no rule for a Flatten module, so the same layers with a function between."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = net[:6], net[7:]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def test_captum_lrp_gives_the_same(x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attr = pytest.importorskip("captum.attr")
        rules = pytest.importorskip("captum.attr._utils.lrp_rules")
        target = torch.tensor([0, 1, 2, 1, 0])
        for ours, theirs, pool, bias in (
            (Lrp("z"), lambda: rules.EpsilonRule(1e-9), 1e-9, True),
            (Lrp("epsilon", epsilon=0.05), lambda: rules.EpsilonRule(0.05), 0.05, True),
            (Lrp("alpha-beta", alpha=1.0), rules.Alpha1_Beta0_Rule, 1e-30, False),  # captum's keeps biases of either sign, the paper's b^+ alone
        ):
            net = seeded(lambda bias=bias: plain(bias))
            other = Flat(copy.deepcopy(net))
            for module in other.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.rule = theirs()
                elif isinstance(module, nn.AvgPool2d | nn.MaxPool2d):
                    module.rule = rules.EpsilonRule(pool if isinstance(module, nn.AvgPool2d) else 1e-30)
            wanted = attr.LRP(other).attribute(x, target).detach()
            torch.testing.assert_close(ours(net, x, target).images["relevance"], wanted, rtol=1e-6, atol=1e-8)


def test_captum_deep_lift_gives_the_same(x: Tensor) -> None:
    """Beside ReLUs captum's max pools do not keep the sum (ours do, see the next test), so max pools are compared alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attr = pytest.importorskip("captum.attr")
        one = lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))  # noqa: E731
        for net in (seeded(lambda: plain(pool=nn.AvgPool2d)), seeded(one)):
            target = torch.tensor([0, 1, 2, 1, 0])
            for baseline in (0.0, 0.4):
                theirs = attr.DeepLift(copy.deepcopy(net)).attribute(x, torch.full_like(x, baseline), target).detach()
                torch.testing.assert_close(DeepLift(baseline)(net, x, target).images["contribution"], theirs, rtol=1e-6, atol=1e-12)


# -- DeepLIFT ----------------------------------------------------------------------------------------


def test_deep_lift_by_hand() -> None:
    """y = relu(x1 - x2) + 3 relu(x2 - 2): from 0 to (4, 1) the first unit rises by 3 over 3, the second stays at 0."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, -2.0]))
        net[2].weight.copy_(torch.tensor([[1.0, 3.0]]))
    x, target = torch.tensor([[4.0, 1.0], [1.0, 4.0]]), torch.tensor([0, 0])
    # second row: unit 1 stays at 0 (multiplier 0), unit 2 rises by 2 over a change of 4, so x2 gets 4 * 0.5 * 3
    assert deep_lift(net, x, target).tolist() == [[4.0, -1.0], [0.0, 6.0]]


def test_max_pools_between_relus_keep_the_sum(x: Tensor) -> None:
    net, target = seeded(plain), torch.tensor([0, 1, 2, 1, 0])
    for baseline in (0.0, 0.4):
        rise = (net(x) - net(torch.full_like(x, baseline))).gather(1, target[:, None])[:, 0].detach()
        torch.testing.assert_close(deep_lift(net, x, target, baseline).sum((1, 2, 3)), rise, rtol=1e-9, atol=1e-12)


def test_gates_share_by_means_and_the_sum_is_kept(x: Tensor) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.conv(x), inplace=True)
            x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[..., None, None]
            return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1))

    net, target = seeded(Gated), torch.tensor([0, 1, 2, 1, 0])
    rise = (net(x) - net(torch.zeros_like(x))).gather(1, target[:, None])[:, 0].detach()
    torch.testing.assert_close(deep_lift(net, x, target).sum((1, 2, 3)), rise)
    assert DeepLift()(net, x, target).table["completeness gap"] < 1e-12
    with pytest.raises(Mistake, match="lrp: no rule for 'sigmoid'"):
        Lrp()(net, x, target)


# -- context-aware saliency --------------------------------------------------------------------------


def test_distances_and_dissimilarity_by_hand() -> None:
    value, other = torch.tensor([[[0.0, 0.0, 0.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]]])
    place, there = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.3, 0.4]])
    d = distances(value, other, place, there, 3.0)
    torch.testing.assert_close(d, torch.tensor([[[1.0, 0.5 / 2.5]]]))
    torch.testing.assert_close(dissimilarity(d, 1), torch.tensor([[1 - math.exp(-0.2)]]))
    torch.testing.assert_close(dissimilarity(d, 64), torch.tensor([[1 - math.exp(-0.6)]]))


@pytest.mark.parametrize("side", [(64, 64), (28, 28), (40, 96), (8, 8)])
def test_a_region_stands_out_and_nothing_gives_nothing(side: tuple[int, int]) -> None:
    h, w = side
    m = torch.zeros(3, 1, h, w)
    speckles = (torch.rand(h // 4, w // 4, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    m[0, 0, : h // 4, : w // 4] = speckles
    m[1] = 1.0
    found = context_aware_saliency(m)
    assert found.shape == m.shape
    assert float(found.min()) >= 0
    assert float(found.max()) < 1
    assert float(found[1].abs().max()) < 1e-3  # an even map has no place that differs
    assert float(found[2].abs().max()) == 0
    inside, outside = found[0, 0, : h // 4, : w // 4], found[0, 0, h // 2 :, w // 2 :]
    assert float(inside.mean()) > 2 * float(outside.mean())
    torch.testing.assert_close(context_aware_saliency(3 * m[:1]), found[:1])  # values count as shares of the largest


def test_top_regions_and_the_parts_images(x: Tensor) -> None:
    m = torch.tensor([[[[0.1, 0.9], [0.5, 0.5]]]])
    assert top_regions(m, 0.5).tolist() == [[[[False, True], [True, False]]]]
    net = seeded(Residual)
    found = SalientRelevance(share=0.25)(net, x, 1)
    assert int((found.images["regions"] != 0).any(1).sum()) == 5 * 16
    torch.testing.assert_close(found.images["relevance"], lrp_stage(net, x, torch.ones(5, dtype=torch.int64)).pixels.sum(1, keepdim=True))
    assert not torch.equal(found.map, SalientRelevance(part="abs")(net, x, 1).map)


# -- refusals ----------------------------------------------------------------------------------------


def _network(forward) -> nn.Module:  # type: ignore[no-untyped-def]
    net = nn.Module()
    net.forward = forward  # type: ignore[method-assign]
    return net


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return 2 * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return 2 * g


REFUSED = {
    "softmax": lambda x: x.flatten(1).softmax(1),
    "layer_norm": lambda x: F.layer_norm(x.flatten(1), (128,)),
    "two computed tensors": lambda x: x.flatten(1) @ x.flatten(1).T,
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x).flatten(1),
    "statistics of the batch itself": lambda x: F.batch_norm(x, None, None, training=True).flatten(1),
    "runs unseen": lambda x: _Double.apply(x).flatten(1) + 1,
    "division by a computed map": lambda x: (1 / (x + 1)).flatten(1),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_rule_is_refused(x: Tensor, words: str) -> None:
    for part in (Lrp(), DeepTaylor(), SalientRelevance(), DeepLift()):
        with pytest.raises(Mistake, match=f"(?s){words}.*integrated-gradients"):
            part(_network(REFUSED[words]), x, 0)


def test_writing_and_gates_are_refused(x: Tensor) -> None:
    def write(x: Tensor) -> Tensor:
        y = x + 0
        y[:, 0] = 1.0
        return y.flatten(1)

    with pytest.raises(Mistake, match="writing into a part of a tensor"):
        Lrp()(_network(write), x, 0)
    with pytest.raises(Mistake, match="a gate"):
        Lrp()(_network(lambda x: (x * x).flatten(1)), x, 0)
    with pytest.raises(Mistake, match=r"deep-taylor is derived for ReLU networks, and this one has 'gelu'; use 'lrp'"):
        DeepTaylor()(nn.Sequential(nn.Flatten(), nn.GELU()), x, 0)
    with pytest.raises(Mistake, match="'hardtanh'"):
        DeepTaylor()(nn.Sequential(nn.Flatten(), nn.Hardtanh()), x, 0)
    assert DeepTaylor()(nn.Sequential(nn.Flatten(), nn.ReLU6()), x, 0).map is not None
    chosen = _network(lambda x: torch.where(x > 0.5, x, 0.1 * x).flatten(1))  # relevance goes to what was chosen; its multiplier is no gradient
    torch.testing.assert_close(Lrp("z")(chosen, x, 0).map.sum((1, 2, 3)), chosen(x)[:, 0])
    with pytest.raises(Mistake, match="deep-lift: no rule for 'where'"):
        DeepLift()(chosen, x, 0)


def test_settings_are_checked(x: Tensor) -> None:
    for make, words in (
        (lambda: Lrp("zplus"), r"lrp: rule='zplus': must be one of epsilon, z, z\+, alpha-beta"),
        (lambda: Lrp(alpha=0.5), "alpha=0.5 must be at least 1"),
        (lambda: Lrp(epsilon=-1.0), "epsilon=-1.0"),
        (lambda: DeepTaylor("zb"), "input_rule='zb'"),
        (lambda: DeepTaylor(low=1.0), "low=1.0 must be below"),
        (lambda: SalientRelevance(part="all"), "part='all'"),
        (lambda: SalientRelevance(patch=4), "patch=4 must be odd"),
        (lambda: SalientRelevance(scales=()), "one or more shares"),
    ):
        with pytest.raises(Mistake, match=words):
            make()
    with pytest.raises(Mistake, match=r"deep-taylor: the input has values from .* outside low=0.0 to high=1.0"):
        DeepTaylor()(seeded(plain), 2 * x, 0)
    assert DeepTaylor("w2")(seeded(plain), 2 * x, 0).map is not None
    with pytest.raises(Mistake, match="'lrp' explains tables"):
        SalientRelevance()(nn.Linear(4, 3), torch.rand(2, 4), 0)
