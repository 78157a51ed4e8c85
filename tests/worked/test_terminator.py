"""Terminator by hand: widths, the operators against loops, slow nets, no way around a bottleneck, the slow feedback loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from convince.backbones.terminator import (
    FastMultiBranch,
    GroupStandardise,
    HyperChannel,
    HyperZZWLocal,
    Rgu,
    Sines,
    SlowNet,
    Terminator,
    hyperzzw_global,
    score,
    standardise,
    tile,
)
from convince.errors import Mistake
from convince.training.slow_feedback import SlowFeedback, norm_penalty, slow_feedback_loss


def small(**options):
    return Terminator(**{"num_classes": 3, "in_chans": 1, "img_size": (8, 8), "channels": (4, 8), "hidden": 8, **options})


def test_widths_and_earlier_inputs_are_the_papers():
    model = Terminator()
    assert [block.norm.norm.num_features for block in model.blocks] == [12, 36, 72, 144, 288]
    assert model.earlier == [0, 0, 1, 1, 2]
    assert [block.branch.bottleneck.in_channels for block in model.blocks] == [30, 120, 36 * 11, 72 * 11, 144 * 12]
    assert [len(block.branch.kernel.slow.mixers) for block in model.blocks] == [3, 2, 2, 2, 2]
    assert [local.slow.size for local in model.blocks[0].branch.local] == [(3, 3), (9, 9), (5, 5), (7, 7)]
    assert [block.drop.p for block in model.blocks] == [0.0, 0.05, 0.05, 0.05, 0.05]
    assert [k.shape[1] for k in model.global_kernels()] == [3, 12, 36, 72, 144]


def test_the_global_operator_is_a_product_of_matrices():
    w, z = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    got = hyperzzw_global(w, z)
    for n, c, i, j in ((0, 0, 0, 0), (1, 2, 3, 1), (0, 1, 2, 3)):
        assert float(got[n, c, i, j]) == pytest.approx(sum(float(w[n, c, i, k] * z[n, c, k, j]) for k in range(4)), abs=1e-5)


def test_the_context_kernel_depends_on_the_input_element_by_element():
    model = small().eval()
    kernel = model.blocks[0].branch.kernel
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(kernel(x), kernel.kernel() * x)
    assert kernel.kernel().shape == (1, 1, 8, 8)


def test_the_local_operator_is_a_depthwise_convolution_with_a_generated_kernel():
    layer = HyperZZWLocal(3, 5, 8, 1.0).eval()
    x, z = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    kernel = layer.slow(x)
    slid = torch.cat([F.conv2d(z[:, c : c + 1], kernel[None, c : c + 1], padding=2) for c in range(3)], 1)
    torch.testing.assert_close(layer(x, z), F.gelu(layer.norm(layer.mix(slid))) + layer.bias)
    layer.train()
    assert not torch.allclose(layer.slow(x), layer.slow(z)), "in training the kernel follows the batch"
    layer.eval()
    assert torch.equal(layer.slow(x), layer.slow(z)), "in eval mode it is that of the batches seen"


def test_a_slow_net_by_hand():
    net = SlowNet((3, 4), 2, 5, layers=1).double()
    with torch.no_grad():
        net.offset.normal_()
    rows = [(r, c) for r in (-1, 0, 1) for c in (-1, -1 / 3, 1 / 3, 1)]
    torch.testing.assert_close(net.points, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-6)
    p = net.points[7]
    h0 = (net.sines.maps[0].weight @ p).sin()
    h1 = (net.sines.maps[1].weight @ p).sin() * (net.mixers[0].weight @ h0 + 1) + net.offset[7]
    torch.testing.assert_close(net()[:, 1, 3], net.output.weight @ h1)


def test_the_sines_slow_down_with_depth():
    torch.manual_seed(0)
    sines = Sines(2, 4000, 2, omega0=1.0)
    for i, made in enumerate(sines.maps):
        # |W| has the mean of |uniform(-1/sqrt 2, 1/sqrt 2)| times 2 pi times that of Gamma(6 / (i + 1))
        assert float(made.weight.detach().abs().mean()) == pytest.approx(2 * math.pi * 6 / (i + 1) * 0.5 / math.sqrt(2), rel=0.05)
        assert not made.bias.any()
    net = SlowNet((16, 16), 500, 64)
    bound = math.sqrt(3 / 64) / 16  # Kaiming uniform with gain 1, over the root of the number of points
    assert float(net.output.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)


def test_a_kernel_with_context_is_renormalised_without_its_own_gradient():
    net = SlowNet((3, 3), 2, 4, layers=1, context=2).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    g = F.gelu(net.mix(F.adaptive_avg_pool2d(net.reduce(x), 3).mean(0, keepdim=True)))[0].flatten(1).T
    h = net.sines(net.points, 1) * net.mixers[0](net.sines(net.points, 0))
    h = (h + 0.1 * h / h.norm(dim=0)) * net.gates[0](g)
    torch.testing.assert_close(net(x), net.output(h).T.reshape(2, 3, 3))
    net.beta[0].data.zero_()
    net(x).sum().backward()
    assert not net.mixers[0].weight.grad.any(), "the part times alpha passes no gradient"


def test_gates_and_standardisation():
    assert float(score(torch.tensor(3.0), torch.tensor(-0.5))) == -4.5
    x = torch.randn(2, 4, 6, 6)
    channel = HyperChannel(4, 8, 1.0)
    torch.testing.assert_close(channel(x), x * (x.mean((2, 3)).square() * channel.slow()[0])[:, :, None, None].sigmoid())
    unit = Rgu(4, 6)
    q = F.gelu(standardise(unit.k(x) * unit.q(unit.v(x)))) + unit.offset
    torch.testing.assert_close(unit(x), unit.y(q))
    torch.testing.assert_close(standardise(x).mean((2, 3)), torch.zeros(2, 4), rtol=0, atol=1e-6)


def test_g_ibs_takes_twelve_groups_in_turn():
    norm = GroupStandardise(24)
    assert norm.batch.tolist() == [True, True, False, False] * 6
    x = torch.randn(5, 24, 4, 4) * 3 + torch.randn(5, 1, 1, 1)
    out = norm(x)
    torch.testing.assert_close(out[:, 2], standardise(x)[:, 2])
    assert float(out[:, 0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(out[:, 0].mean((1, 2)).abs().max()) > 0.01, "a batch standardised channel keeps what sets an image apart"


def test_nothing_goes_around_a_bottleneck():
    model = small(channels=(4, 8, 8, 8, 8)).eval()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        model.blocks[2].branch.bottleneck.weight.zero_()
        model.blocks[2].bias.fill_(0.25)
        y = model.blocks[1](model.blocks[0](x))
        out = model.blocks[2](y, model.blocks[0](x))
    torch.testing.assert_close(out, torch.full_like(out, 0.25))


def test_earlier_maps_are_repeated():
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert tile(x, 6).flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert tile(x, 4).flatten().tolist() == [0, 1, 2, 0]
    branch = FastMultiBranch(6, 4, 8, 8, 1, (3,), 1, 1.0)
    assert branch(torch.randn(2, 6, 8, 8), torch.randn(2, 3, 8, 8)).shape == (2, 4, 8, 8)


def test_slow_feedback_loss_by_hand():
    a, b, c = torch.full((1, 1, 2, 2), 1.0), torch.full((1, 2, 2, 2), 2.0), torch.full((1, 4, 2, 2), 5.0)
    assert float(slow_feedback_loss([a, b, c])) == 1 + 16 + 9
    assert float(slow_feedback_loss([a])) == 0
    two = torch.cat([torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), 3.0)], 1)
    assert float(slow_feedback_loss([two, two.repeat(1, 2, 1, 1)])) == 0, "tiled as a whole: 1 3 1 3"
    model = small()
    loss = slow_feedback_loss(model.global_kernels())
    torch.testing.assert_close(loss, (tile(model.global_kernels()[0], 4) - model.global_kernels()[1]).square().mean())


def test_the_norm_penalty_tells_slow_from_fast():
    model = small()
    before = float(norm_penalty(model).detach())
    with torch.no_grad():
        model.blocks[0].branch.kernel.slow.output.weight.add_(100)
    assert float(norm_penalty(model).detach()) == pytest.approx(before, rel=1e-2), "slow weights hardly count"
    with torch.no_grad():
        model.blocks[0].branch.mix.weight.mul_(0)
    assert float(norm_penalty(model).detach()) < before


def test_wrong_settings_are_refused():
    for size in ((8, 9), (1, 1)):
        with pytest.raises(Mistake, match=r"terminator: an image of .* must be square"):
            small(img_size=size)
    with pytest.raises(Mistake, match=r"kernels=\(4,\)"):
        small(kernels=(4,))
    with pytest.raises(Mistake, match="built for 8x8 pixels"):
        small()(torch.zeros(1, 1, 9, 9))
    with pytest.raises(Mistake, match="slow-feedback: weight=-1"):
        SlowFeedback(weight=-1)
