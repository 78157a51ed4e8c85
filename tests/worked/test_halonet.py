"""HaloNet by hand: blocked attention against a brute-force window, strides and borders, costs, timm's H1, refusals."""

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn

from convince.backbones import builder
from convince.backbones.halonet import AnySide, Bottleneck, Cost, cost, halonet
from convince.claims.halonet import Walled, Windowed, convolved, pooled
from convince.errors import Mistake

SMALL = {"layers": (1, 1), "widths": (4, 8), "heads": (1, 2), "block": 2, "halo": 1, "stem": "small"}


def brute(layer, x):
    """Local attention one query at a time: the window of its block, zeros beyond the map, relative tables by offset from the first key."""
    n, _, h, w = x.shape
    heads, d, b, halo, s = layer.num_heads, layer.dim_head_qk, layer.block_size, layer.halo_size, layer.block_stride
    q = torch.einsum("oc,nchw->nohw", layer.q.weight[:, :, 0, 0], x)
    kv = torch.einsum("oc,nchw->nohw", layer.kv.weight[:, :, 0, 0], x).unflatten(1, (heads, -1))
    out = x.new_zeros(n, heads, layer.dim_head_v, -(-h // s), -(-w // s))
    window = b + 2 * halo
    for i in range(0, h, s):
        for j in range(0, w, s):
            top, left = i // b * b - halo, j // b * b - halo
            for head in range(heads):
                query = q[:, head * d : (head + 1) * d, i, j]
                logits, values = [], []
                for di in range(window):
                    for dj in range(window):
                        inside = 0 <= top + di < h and 0 <= left + dj < w
                        found = kv[:, head, :, top + di, left + dj] if inside else torch.zeros_like(kv[:, head, :, 0, 0])
                        table = layer.pos_embed.height_rel[di - (i % b) // s + window - 1] + layer.pos_embed.width_rel[dj - (j % b) // s + window - 1]
                        logits.append((query * (found[:, :d] * layer.scale + table)).sum(1))
                        values.append(found[:, d:])
                weights = torch.stack(logits, 1).softmax(1)
                out[:, head, :, i // s, j // s] = (weights[:, :, None] * torch.stack(values, 1)).sum(1)
    return out.flatten(1, 2)


@pytest.mark.parametrize(
    ("stride", "size", "block", "halo", "rv"), [(1, (8, 8), 4, 1, 1), (2, (8, 8), 4, 1, 2), (1, (5, 7), 2, 1, 1), (2, (5, 3), 4, 2, 1), (1, (4, 4), 2, 0, 1)]
)
def test_blocks_with_a_halo_are_windows_attended_by_force(stride, size, block, halo, rv):
    layer = HaloAttn(4, 4 * rv, stride=stride, num_heads=2, dim_head=2, block_size=block, halo_size=halo).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(AnySide(layer)(x), brute(layer, x), atol=1e-5, rtol=0)


def test_worked_cost():
    assert cost(32, 64, 8, 8, 3) == Cost(keys=196, copies=196 / 64, weights=1024 * 196 * 8, macs=2 * 1024 * 196 * 64)
    assert cost(32, 64, 8, 1, 3).copies == 49
    assert cost(32, 64, 8, 32, 0).keys == 1024, "one block and no halo: global"
    assert cost(30, 1, 1, 8, 3).weights == cost(32, 1, 1, 8, 3).weights, "sides are padded to whole blocks"


def test_our_h1_with_timms_heads_is_timms():
    """timm's H1 has 8 heads in every stage; with as many, ours takes its weights in order and gives equal scores."""
    ours, theirs = halonet(num_classes=5, heads=(8, 8, 8, 8)).eval(), timm.create_model("halonet_h1", num_classes=5).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias)
    names = {"stem.conv1.conv.": "stem.0.", "stem.conv1.bn.": "stem.1.", "head.fc.": "fc."}
    for i in range(4):
        for j in range((3, 3, 10, 3)[i]):
            new, old = f"layer{i + 1}.{j}.", f"stages.{i}.{j}."
            names |= {f"{old}self_attn.": f"{new}attn.attn.", f"{old}post_attn.": f"{new}norm."}
            for mine, timms in (("conv1", "conv1_1x1"), ("conv3", "conv3_1x1"), ("shortcut", "shortcut")):
                names |= {f"{old}{timms}.conv.": f"{new}{mine}.0.", f"{old}{timms}.bn.": f"{new}{mine}.1."}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        prefix = next(p for p in names if name.startswith(p))
        weights[names[prefix] + name.removeprefix(prefix)] = tensor
    ours.load_state_dict(weights)
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_hybrids_take_any_size_and_answer_as_timms():
    ours, theirs = halonet(num_classes=5, hybrid="halonet26t").eval(), timm.create_model("halonet26t", num_classes=5).eval()
    theirs.load_state_dict({name.replace("self_attn.attn.", "self_attn."): p for name, p in ours.state_dict().items()})
    with torch.no_grad():
        x = torch.randn(1, 3, 256, 256)
        assert torch.equal(ours(x), theirs(x))
        assert ours(torch.randn(1, 3, 60, 75)).shape == (1, 5)


def test_the_order_of_sizes_and_the_value_width():
    with torch.device("meta"):
        h7 = builder("halonet-h7", num_classes=1000, in_chans=3, size=(600, 600))()
        assert h7.forward_features(torch.empty(1, 3, 600, 600)).shape == (1, 2048, 19, 19)
        block = h7.layer4[0]
        assert (block.attn.attn.dim_out_v, block.attn.attn.dim_head_qk, block.conv3[0].out_channels) == (2048, 64, 1792)


def test_translation_is_kept_between_blocks_and_not_inside():
    layer = AnySide(HaloAttn(4, num_heads=1, dim_head=4, block_size=4, halo_size=1)).eval()
    torch.nn.init.normal_(layer.attn.pos_embed.width_rel)
    x = torch.zeros(1, 4, 16, 24)
    x[..., 4:8, 4:12] = torch.randn(1, 4, 4, 8)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(layer(x.roll(4, 3))[..., 8:20], y[..., 4:16])
        assert not torch.allclose(layer(x.roll(1, 3))[..., 5:17], y[..., 4:16], atol=1e-3)


def test_the_controls_of_the_claim():
    halo0 = HaloAttn(4, num_heads=2, dim_head=2, block_size=2, halo_size=0)
    x = torch.randn(2, 4, 6, 4)
    torch.testing.assert_close(Walled(halo0)(x), AnySide(halo0)(x))
    halo1 = HaloAttn(4, stride=2, num_heads=2, dim_head=2, block_size=2, halo_size=1)
    lonely = torch.zeros(2, 4, 6, 6)
    lonely[..., 2:4, 2:4] = torch.randn(2, 4, 2, 2)  # one block among zeros has zeros in its halo anyway
    torch.testing.assert_close(Walled(halo1)(lonely)[..., 1, 1], AnySide(halo1)(lonely)[..., 1, 1])
    whole = torch.randn(2, 4, 6, 6)
    assert not torch.allclose(Walled(halo1)(whole), AnySide(halo1)(whole), atol=1e-3)
    windows = Windowed(4, 2, 3)  # equals blocks of one pixel, whose tables have their middle at the query
    blocks = HaloAttn(4, num_heads=2, dim_head=2, block_size=1, halo_size=1)
    with torch.no_grad():
        windows.qkv.weight.copy_(torch.cat((blocks.q.weight, *(blocks.kv.weight.unflatten(0, (2, 2, 2))[:, i].flatten(0, 1) for i in (0, 1)))))
        windows.rows.copy_(blocks.pos_embed.height_rel[2:])
        windows.columns.copy_(blocks.pos_embed.width_rel[2:])
    torch.testing.assert_close(windows(x), AnySide(blocks)(x), atol=1e-5, rtol=1e-5)
    model = convolved(halonet(**SMALL))
    assert not any(isinstance(m, HaloAttn) for m in model.modules())
    assert sum(isinstance(m, Bottleneck) for m in model.modules()) == 2
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 10)


def test_pooling_keeps_the_means():
    from convince.data import load

    data = load("digits", val=0.0, seed=0)
    small = pooled(data)
    assert small.preprocess.size == (4, 4)
    first, half = data.x.take(torch.tensor([0])).float(), small.x.take(torch.tensor([0])).float()
    assert float((first.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) - half).abs().max()) <= 0.5


def test_wrong_settings_are_refused():
    for wrong, said in (
        ({"layers": (1,)}, "one number a stage each"),
        ({"layers": (0, 1)}, "at least one block"),
        ({"heads": (3, 2)}, "multiple of its heads"),
        ({"block": 3}, "even side"),
        ({"halo": -1}, "halo=-1"),
        ({"stem": "large"}, "stem='large' must be"),
        ({"hybrid": "halonet26t"}, "leave the other options out"),
    ):
        with pytest.raises(Mistake, match=f"^halonet: .*{said}"):
            halonet(**{**SMALL, **wrong})
    with pytest.raises(Mistake, match="hybrid='botnet26t' must be"):
        halonet(hybrid="botnet26t")
