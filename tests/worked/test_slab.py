"""SLAB by hand: the worked examples, both orders of the products, what folding keeps, the schedule, what is replaced and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from convince.checks.subject import Subject
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.layers.slab import Affine, PRepBN, RepBN, SimplifiedLinearAttention, Slab, fold_repbn, lam_at, linear_attention, set_lam, slabify
from convince.parts import get


def vit(**how):
    torch.manual_seed(0)
    how = {"img_size": 8, "patch_size": 2, "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2, **how}
    return VisionTransformer(**how)


def images(n=6, side=8):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def numbers(model):
    return sum(p.numel() for p in model.parameters())


def lived(model):
    """With running statistics and affine weights other than those of the start, the schedule at its end."""
    gen = torch.Generator().manual_seed(2)
    set_lam(model, 0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, RepBN):
                m.eta.fill_(0.7)
                for t in (m.bn.weight, m.bn.running_var):
                    t.copy_(0.5 + torch.rand(len(t), generator=gen))
                for t in (m.bn.bias, m.bn.running_mean):
                    t.copy_(torch.randn(len(t), generator=gen))
    return model.eval()


# -- attention -------------------------------------------------------------------------------------


def test_worked_attention():
    q, k, v = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 1], [0, 2]]), torch.tensor([[1.0, 2], [3, 4]])
    torch.testing.assert_close(linear_attention(q, k, v), torch.tensor([[1.0, 2], [2, 3]]), rtol=0, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
def test_both_orders_are_a_weighted_mean_of_values(seed, n, m, c, d):
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.rand(2, a, b, generator=gen, dtype=torch.float64) for a, b in ((n, c), (m, c), (m, d)))
    weight = torch.einsum("bic,bjc->bij", q, k)
    torch.testing.assert_close(linear_attention(q, k, v), weight / (weight.sum(-1, keepdim=True) + 1e-6) @ v)


def test_tokens_that_ask_for_nothing_get_nothing():
    q = torch.zeros(1, 3, 2, requires_grad=True)
    y = linear_attention(q, torch.rand(1, 4, 2), torch.rand(1, 4, 5))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 3, 5))
    assert bool(q.grad.isfinite().all())


@pytest.mark.parametrize("prefix", [0, 2])
def test_layer_is_the_formula_a_head_at_a_time(prefix):
    """Against loops over heads; the convolution reads and writes the grid alone, row by row."""
    torch.manual_seed(0)
    layer = SimplifiedLinearAttention(8, 2, (2, 3), kernel=3, prefix=prefix).double()
    nn.init.normal_(layer.positions)
    x = torch.randn(2, prefix + 6, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, -1)
    k = torch.cat([k[:, :prefix], k[:, prefix:] + layer.positions], 1)
    heads = []
    for at in (slice(0, 4), slice(4, 8)):
        y = linear_attention(q[..., at].relu(), k[..., at].relu(), v[..., at])
        grid = v[:, prefix:, at].reshape(2, 2, 3, 4).permute(0, 3, 1, 2)
        y[:, prefix:] += layer.dwc(grid).permute(0, 2, 3, 1).reshape(2, 6, 4)
        heads.append(y)
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -1)))


def test_attention_counts_and_says_what_it_cannot():
    layer = SimplifiedLinearAttention(8, 2, (2, 3))
    assert numbers(layer) == 8 * 24 + 24 + 8 * 8 + 8 + 6 * 8 + 4 * (25 + 1)
    with pytest.raises(Mistake, match=r"slab: got 5 tokens, this attention was made for 0 \+ 2 x 3"):
        layer(torch.rand(1, 5, 8))
    with pytest.raises(Mistake, match="slab: linear attention has no masks"):
        layer(torch.rand(1, 6, 8), is_causal=True)
    with pytest.raises(Mistake, match="slab: dim=8, heads=3"):
        SimplifiedLinearAttention(8, 3, (2, 3))
    with pytest.raises(Mistake, match="slab: kernel=4 must be an odd"):
        SimplifiedLinearAttention(8, 2, (2, 3), kernel=4)


def test_products_are_made_in_full_precision():
    layer = SimplifiedLinearAttention(16, 2, (4, 4)).eval()
    seen = []
    layer.proj_drop.register_forward_hook(lambda m, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        exact = layer(torch.ones(1, 16, 16) * 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            near = layer(torch.ones(1, 16, 16) * 0.5)
    assert seen == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(near.float(), exact, rtol=0.05, atol=0.05)


# -- norms -----------------------------------------------------------------------------------------


def test_worked_norm_and_its_affine():
    """x=2, mu=1, var=3, gamma=2, beta=0.5, eta=1: 2 (2 - 1) / sqrt(3.00001) + 0.5 + 2."""
    norm = RepBN(1).eval()
    norm.load_state_dict(
        {
            **norm.state_dict(),
            "bn.running_mean": torch.ones(1),
            "bn.running_var": 3 * torch.ones(1),
            "bn.weight": 2 * torch.ones(1),
            "bn.bias": torch.tensor([0.5]),
        }
    )
    weight, bias = norm.affine()
    assert norm(torch.tensor([[2.0]])).item() == pytest.approx(3.65469861, abs=1e-6)
    assert (2 * weight + bias).item() == pytest.approx(3.65469861, abs=1e-6)


def test_statistics_are_over_rows_and_tokens():
    norm, x = RepBN(4), torch.randn(3, 5, 4)
    y = norm(x)
    torch.testing.assert_close(y - x, (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-5).sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.bn.running_mean, 0.1 * x.mean((0, 1)))


@pytest.mark.parametrize("lam", [1.0, 0.25, 0.0])
def test_training_mixes_and_evaluation_does_not(lam):
    norm, x = PRepBN(4), torch.randn(6, 5, 4)
    set_lam(norm, lam)
    rep = copy.deepcopy(norm.rep)
    torch.testing.assert_close(norm(x), lam * norm.ln(x) + (1 - lam) * rep(x))
    assert norm.rep.bn.num_batches_tracked.item() == (lam < 1)  # while LayerNorm has the whole share, the batch norm rests
    norm.eval(), rep.eval()
    torch.testing.assert_close(norm(x), norm.rep(x), rtol=0, atol=0)


def test_share_of_layernorm():
    assert [lam_at(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [lam_at(step, 2, warmup=2, r0=0.5) for step in range(5)] == [1, 1, 0.5, 0.25, 0]


# -- putting it in, folding it away ----------------------------------------------------------------

HOSTS = {
    "tokens": lambda: vit(class_token=False, global_pool="avg", fc_norm=False),
    "vectors": lambda: vit(class_token=False, global_pool="avg"),
    "class token": lambda: vit(),
    "no bias": lambda: vit(qkv_bias=False),
}


@pytest.mark.parametrize("attn", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_folded_network_gives_the_same_scores(host, attn):
    net = HOSTS[host]()
    slabify(net, attn=attn)
    lived(net)
    kept = {name: t.clone() for name, t in net.state_dict().items()}
    folded = fold_repbn(net, images(2))
    with torch.no_grad():
        torch.testing.assert_close(folded(images()), net(images()), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, (PRepBN, nn.LayerNorm, nn.BatchNorm1d)) for m in folded.modules())
    # a norm in front of a mean over tokens, or of the choice of one, has no linear reader of its own
    assert sum(isinstance(m, Affine) for m in folded.modules()) == (host != "vectors")
    assert all(torch.equal(t, kept[name]) for name, t in net.state_dict().items())


def test_folding_waits_for_the_end_of_the_schedule():
    net = vit()
    with pytest.raises(Mistake, match="VisionTransformer has no PRepBN"):
        fold_repbn(net, images(2))
    slabify(net, attn=False)
    set_lam(net, 0.5)
    with pytest.raises(Mistake, match=r"still has a share of 0.5 in blocks.0.norm1"):
        fold_repbn(net, images(2))


def test_put_in_and_taken_out():
    net = vit()
    before, state, weight = net.eval()(images()), net.state_dict(), net.blocks[0].attn.qkv.weight
    with slabify(net) as done:
        assert done.places == ["blocks.0.attn", "blocks.1.attn", "blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
        assert net.blocks[0].attn.qkv.weight is weight
        assert net.blocks[0].attn.prefix == 1
        assert done.added == 2 * (16 * 16 + 8 * 26) + 5 * (2 * 16 + 1)  # positions and convolutions; gamma, beta and eta
        assert net.train()(images()).shape == (6, 3)
    net.eval()
    assert net.state_dict().keys() == state.keys()
    assert torch.equal(net(images()), before)


def test_norm_alone_changes_nothing_at_first():
    net = vit().train()
    before = net(images())
    slabify(net, attn=False)
    torch.testing.assert_close(net(images()), before, rtol=0, atol=0)


def test_swin_takes_the_norm():
    net = SwinTransformer(img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3)
    with pytest.raises(Mistake, match=r"slab: SwinTransformer has no plain attention of timm's; set attn=false"):
        slabify(net)
    slabify(net, attn=False)
    lived(net)
    x = images(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(fold_repbn(net, x)(x), net(x), rtol=1e-4, atol=1e-4)


def test_refusals_leave_the_network_whole():
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(Mistake, match="slab: Sequential has no LayerNorm"):
        slabify(conv, attn=False)
    with pytest.raises(Mistake, match="slab: norm=false and attn=false leave nothing"):
        slabify(vit(), norm=False, attn=False)
    net = vit(qk_norm=True)
    names = list(net.state_dict())
    with pytest.raises(Mistake, match="slab: attention with norms, gates"):
        slabify(net)
    assert list(net.state_dict()) == names
    slabify(net, attn=False)
    assert type(net.blocks[0].attn.q_norm) is not PRepBN


# -- the part --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0.0}, "share=0.0, warmup=0.0"),
        ({"share": 0.8, "warmup": 0.3}, "share=0.8, warmup=0.3: .* together at most 1"),
        ({"r0": 2.0}, "r0=2.0: LayerNorm's first share"),
        ({"kernel": 2}, "kernel=2 must be an odd number"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(Mistake, match="slab: " + words):
        Slab(**options)


@pytest.mark.parametrize("how", [{"epochs": 2}, {"steps": 8}])
def test_a_run_ends_with_the_batch_norm_alone(how):
    """8 steps: LayerNorm alone for 2 of them, then its share falls in 4 (int(0.5 * 8))."""
    run = Subject(get("slab")).run("slab:share=0.5,warmup=0.25", **how)
    seen = []
    fit(run, None, lambda done, total, text: seen.append(shares(run.model)))
    assert seen == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def shares(model):
    (lam,) = {float(m.lam) for m in model.modules() if isinstance(m, PRepBN)}
    return lam
