"""Tversky by hand: the worked example, every reduction against loops, asymmetry, exact counts, explanations that add up, what is replaced."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones.conv_stem_vit import ConvStemVit
from convince.backbones.resnet import ResNet
from convince.errors import Mistake
from convince.layers.tversky_layer import DIFF, INTER, SIMILARITY, TverskyProjection, TverskySimilarity, install, prototypes, tversky, tversky_layer

F = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
A, B = torch.tensor([[1.0, -2]]), torch.tensor([[2.0, 1]])


def small():
    return ResNet(num_classes=4, in_chans=3, layers=(1, 1), widths=(4, 8))


def numbers(model):
    return sum(p.numel() for p in model.parameters())


def test_worked_example():
    """s_a = (1, -2, -1), s_b = (2, 1, 3): product 2, d(a, b) = 0, d(b, a) = 4; subtractmatch adds u - v = 1 - 2 the other way."""
    assert tversky(A, B, F).item() == 0
    assert tversky(A, B, F, diff="subtractmatch").item() == -0.5
    assert tversky(A, B, F, alpha=1, beta=0).item() == 2
    assert tversky(B, A, F, alpha=1, beta=0).item() == -2
    assert tversky(A, B, F, similarity="ratio").item() == pytest.approx(2 / (2 + 0.5 * 4 + 1))


@pytest.mark.parametrize(("inter", "value"), [("product", 2), ("min", 1), ("max", 2), ("mean", 1.5), ("gmean", math.sqrt(2)), ("softmin", 0.68673831)])
def test_worked_intersections(inter, value):
    """u = 1 (a's salience of what both have), v = 2 (b's); softmin -log(e^-1 + e^-2)."""
    assert tversky(A, B, F, alpha=0, beta=0, inter=inter).item() == pytest.approx(value)


def by_loops(a, b, f, theta, alpha, beta, inter, diff, similarity):
    """One pair, feature by feature."""
    sa, sb = (f @ a).tolist(), (f @ b).tolist()
    both = [k for k in range(len(f)) if sa[k] > 0 and sb[k] > 0]
    u, v = sum(sa[k] for k in both), sum(sb[k] for k in both)
    shared = {
        "product": sum(sa[k] * sb[k] for k in both),
        "min": min(u, v),
        "max": max(u, v),
        "mean": (u + v) / 2,
        "gmean": math.sqrt(max(u, 1e-12) * max(v, 1e-12)),
        "softmin": -math.log(math.exp(-u) + math.exp(-v)),
    }[inter]
    ab = sum(sa[k] for k in range(len(f)) if sa[k] > 0 and not sb[k] > 0)
    ba = sum(sb[k] for k in range(len(f)) if sb[k] > 0 and not sa[k] > 0)
    if diff == "subtractmatch":
        ab, ba = ab + max(0, u - v), ba + max(0, v - u)
    apart = alpha * ab + beta * ba
    return theta * shared - apart if similarity == "contrast" else shared / (shared + apart + 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(INTER), st.sampled_from(DIFF), st.sampled_from(SIMILARITY))
def test_loops_agree(seed, inter, diff, similarity):
    gen = torch.Generator().manual_seed(seed)
    a, b, f = (torch.randn(n, 4, generator=gen, dtype=torch.float64) for n in (3, 2, 5))
    got = tversky(a, b, f, 1.3, 0.7, 0.2, inter, diff, similarity)
    wanted = [[by_loops(x, y, f, 1.3, 0.7, 0.2, inter, diff, similarity) for y in b] for x in a]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DIFF))
def test_symmetric_only_where_alpha_is_beta(seed, diff):
    gen = torch.Generator().manual_seed(seed)
    a, b, f = (torch.randn(n, 4, generator=gen, dtype=torch.float64) for n in (3, 2, 5))
    torch.testing.assert_close(tversky(a, b, f, diff=diff), tversky(b, a, f, diff=diff).T)
    there, back = tversky(a, b, f, alpha=0.9, beta=0.1, diff=diff), tversky(b, a, f, alpha=0.9, beta=0.1, diff=diff).T
    torch.testing.assert_close(there, tversky(b, a, f, alpha=0.1, beta=0.9, diff=diff).T)
    assert not torch.allclose(there, back)


def test_gradients_are_right_and_finite_where_nothing_is_shared():
    layer = TverskyProjection(3, 2, 5, diff="subtractmatch", init="balanced").double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    for inter, similarity in itertools.product(INTER, SIMILARITY):
        alone = TverskyProjection(2, 2, 3, inter=inter, similarity=similarity)
        alone(-torch.ones(1, 2)).sum().backward()  # has none of the features, which are positive
        assert all(bool(p.grad.isfinite().all()) for p in alone.parameters()), inter


@pytest.mark.parametrize(("similarity", "extra"), [("contrast", 3), ("ratio", 2)])
def test_parameters(similarity, extra):
    """(p + m) d + 3: the released MNIST example, d = m = 36 and p = 10, has 1,659."""
    assert numbers(TverskyProjection(36, 10, 36, similarity=similarity)) == 46 * 36 + extra
    assert numbers(TverskySimilarity(36, 36, similarity=similarity)) == 36 * 36 + extra


def test_released_start():
    layer = TverskyProjection(30, 20, 10)
    for p in (layer.P, layer.F):
        assert 0 <= p.min() < 0.1
        assert 0.9 < p.max() <= 1
    assert (layer.theta.item(), layer.alpha.item(), layer.beta.item()) == (1, 0.5, 0.5)


@pytest.mark.parametrize(("d", "m"), [(16, 8), (64, 64), (200, 128)])
def test_balanced_start_gives_scores_of_one_size(d, m):
    torch.manual_seed(0)
    layer = TverskyProjection(d, 500, m, normalize=True, init="balanced")
    with torch.no_grad():
        spread = layer(torch.randn(50, d)).std(1).mean().item()
    assert 0.4 < spread < 1.5


def test_any_number_of_axes_and_lengths():
    layer = TverskyProjection(4, 3, 5, normalize=True).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[1], layer(x[1]))
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))
    assert layer(x[:0]).shape == (0, 6, 3)
    torch.testing.assert_close(layer(x), layer(7 * x))
    similar = TverskySimilarity(4, 5).double()
    assert similar(x[0], x[1]).shape == (6, 6)
    torch.testing.assert_close(similar.salience(x), (x @ similar.F.T).relu().sum(-1))


def test_computes_in_full_precision():
    layer = TverskyProjection(40, 3, 50)
    x = torch.rand(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), layer(x.clone()), rtol=0, atol=0)
        assert layer(x).dtype == torch.float32


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_explanations_add_up_to_the_score(seed):
    torch.manual_seed(seed)
    layer = TverskyProjection(4, 3, 8, init="balanced").double()
    a = torch.randn(4, dtype=torch.float64)
    told = layer.explain(a, 1)
    sums = {word: sum(amount for _, amount in rows) for word, rows in told.items()}
    assert layer(a[None])[0, 1].item() == pytest.approx(sums["common"] - 0.5 * sums["only here"] - 0.5 * sums["only prototype"])
    for rows in told.values():
        assert [amount for _, amount in rows] == sorted((amount for _, amount in rows), reverse=True)
    names = [k for rows in told.values() for k, _ in rows]
    assert len(names) == len(set(names))


def test_explains_the_worked_example():
    layer = TverskyProjection(2, 1, 3)
    layer.load_state_dict({**layer.state_dict(), "F": F, "P": B})
    assert layer.explain(A[0], 0) == {"common": [(0, 2.0)], "only here": [], "only prototype": [(2, 3.0), (1, 1.0)]}


def test_prototypes_of_both_layers():
    linear = nn.Linear(6, 2)
    assert torch.equal(prototypes(linear, (1, 2, 3)), linear.weight.detach().view(2, 1, 2, 3))
    layer = tversky_layer(linear)
    assert torch.equal(prototypes(layer), layer.P)
    with pytest.raises(Mistake, match="ReLU has no prototypes"):
        prototypes(nn.ReLU())


def test_classifier_is_replaced_and_put_back():
    net = small()
    before, fc = numbers(net), net.fc
    with install(net, features=5) as done:
        assert done.places == ["fc"]
        assert isinstance(net.fc, TverskyProjection)
        assert done.added == numbers(net) - before == (4 + 5) * 8 + 3 - (4 * 8 + 4)
        assert net(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    assert net.fc is fc


def test_named_layers_and_one_bank_for_all():
    def vit():
        return ConvStemVit(num_classes=3, in_chans=1, img_size=(8, 8), dim=16, depth=2, heads=2)

    net = vit()
    before = numbers(net)
    done = install(net, layers=["blocks.*.mlp.fc1", "blocks.*.attn.qkv"], features=6, share=True)
    assert len(done.places) == 4
    banks = {id(m.F) for m in net.modules() if isinstance(m, TverskyProjection)}
    assert len(banks) == 1
    assert done.added == numbers(net) - before
    net(torch.rand(2, 1, 8, 8)).sum().backward()
    done.undo()
    assert numbers(net) == before
    apart = vit()
    install(apart, layers=["blocks.*.mlp.fc1", "blocks.*.attn.qkv"], features=6)
    assert len({id(m.F) for m in apart.modules() if isinstance(m, TverskyProjection)}) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inter": "sum"}, "inter='sum' must be one of 'product'"),
        ({"similarity": "cosine"}, "similarity='cosine' must be one of 'contrast', 'ratio'"),
        ({"init": "zero"}, "init='zero' must be one of"),
        ({"features": 0}, "features=0: at least one feature is needed"),
        ({"layers": ["nothing"]}, "no linear layer named"),
    ],
)
def test_refusals_leave_the_network_whole(options, words):
    net = small()
    fc = net.fc
    with pytest.raises(Mistake, match="tversky-layer: .*" + words):
        install(net, **options)
    assert net.fc is fc


def test_no_linear_classifier_and_features_of_another_size():
    with pytest.raises(Mistake, match="has no linear classifier"):
        install(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(Mistake, match="no plain linear layer"):
        tversky_layer(nn.Conv2d(1, 1, 1))
    with pytest.raises(Mistake, match=r"shape \(5, 4\), this layer needs \(5, 3\)"):
        TverskyProjection(3, 2, 5, share_features=TverskyProjection(4, 2, 5).F)
