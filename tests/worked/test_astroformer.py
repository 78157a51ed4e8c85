"""Astroformer: parity with timm's MaxxVit, the printed counts and what they are, relative positions, odd sides, error sentences."""

import pytest
import torch
from timm.models.maxxvit import MaxxVit, MaxxVitCfg

from convince.backbones import builder
from convince.backbones.astroformer import Astroformer
from convince.errors import Mistake

DIMS, DEPTHS = (8, 16, 32, 64), (1, 2, 1, 2)


@pytest.mark.parametrize("stages", ["CCCT", "CCTT", "CCCC"])
def test_the_network_is_timms_with_other_stages(stages):
    torch.manual_seed(0)
    cfg = MaxxVitCfg(embed_dim=DIMS, depths=DEPTHS, block_type=tuple(stages), stem_width=8, head_hidden_size=64)
    theirs = MaxxVit(cfg, img_size=64, num_classes=5).eval()
    ours = Astroformer(5, img_size=(64, 64), dims=DIMS, depths=DEPTHS, stages=stages, stem=8).eval()
    names = {"norm.": "head.norm.", "hidden.0.": "head.pre_logits.fc.", "fc.": "head.fc."}
    weights = theirs.state_dict()
    for mine, other in names.items():
        weights |= {mine + name.removeprefix(other): weights.pop(name) for name in list(weights) if name.startswith(other)}
    ours.load_state_dict(weights)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x))


def built(name: str, side: int) -> tuple[int, int]:
    """Parameters with ten classes, and the last width."""
    with torch.device("meta"):
        model = builder(name, num_classes=10, in_chans=3, size=(side, side))()
    return sum(p.numel() for p in model.parameters()), model.num_features


def test_ten_classes_do_not_make_the_count_printed_for_cifar10():
    """Size 3 has 148,886,986 parameters with the position table of 224 px; 161.75 million are printed, and no table makes up for it."""
    small, large = built("astroformer-3", 32)[0], built("astroformer-3", 224)[0]
    assert large == 148_886_986
    assert large - small == 2 * 48 * (13**2 - 1**2), "the tables of two blocks of 48 heads, for maps of 7x7 and of 1x1"
    assert large < 0.93 * 161.75e6


@pytest.mark.parametrize(("name", "printed"), [("astroformer-4", 271.54), ("astroformer-5", 681.25)])
def test_two_printed_counts_are_those_of_coatnets_layout(name, printed):
    """CCTT at 224 px with ten classes, less the hidden layer of width d: d (d + 1) parameters."""
    counted, d = built(f"{name}:stages=CCTT", 224)
    assert round((counted - d * (d + 1)) / 1e6, 2) == printed


def test_attention_weighs_by_where_things_lie():
    """A table entry for 'one to the right' adds to the scores of exactly those pairs; without positions moving the map's rows moves the answer alone."""
    model = Astroformer(img_size=(8, 8), dims=(32,), depths=(1,), stages="T", stem=4, stem_stride=1).eval()
    table = model.stages[0].blocks[0].attn.rel_pos
    with torch.no_grad():
        table.relative_position_bias_table.zero_()
        entry = int(table.relative_position_index.view(16, 16)[0, 1])
        table.relative_position_bias_table[entry, 0] = 1.0
        bias = table.get_bias()[0, 0]
    pairs = {(int(a), int(b)) for a, b in bias.nonzero()}
    assert pairs == {(4 * r + c, 4 * r + c + 1) for r in range(4) for c in range(3)}
    free = Astroformer(img_size=(8, 8), dims=(32,), depths=(1,), stages="T", stem=4, stem_stride=1, positions=False).eval()
    x = torch.randn(1, 4, 8, 8)
    turned = x.view(1, 4, 4, 2, 8).flip(2).reshape(1, 4, 8, 8)  # pairs of rows in another order
    with torch.no_grad():
        torch.testing.assert_close(free.stages(turned), free.stages(x).flip(2))
        assert not torch.allclose(model.stages(turned), model.stages(x).flip(2))


def test_drop_path_rises_over_all_stages():
    model = Astroformer(img_size=(32, 32), dims=DIMS, depths=DEPTHS, stem=8, drop_path=0.5)
    rates = [getattr(m.drop_path if hasattr(m, "drop_path") else m.drop_path1, "drop_prob", 0.0) for stage in model.stages for m in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("size", [(28, 28), (33, 47), (1, 1)])
def test_odd_sides_go_through(size):
    model = Astroformer(img_size=size, dims=(8, 8, 32, 32), depths=(1, 1, 1, 1), stages="CCTT", stem=8, stem_stride=1).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, *size)).shape == (2, 10)


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="needs a letter C or T a stage"):
        Astroformer(stages="CCX")
    with pytest.raises(Mistake, match="a T stage's is a multiple of 32"):
        Astroformer(dims=(96, 192, 384, 700))
