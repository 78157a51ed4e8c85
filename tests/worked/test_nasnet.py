"""NASNet by hand: operations and their sides, genotypes in words, a cell put together by hand, timm's network with the same weights, published counts."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pool2d_same import AvgPool2dSame
from torch import nn

from convince.backbones import builder
from convince.backbones.nasnet import NORMAL_A, OPS, REDUCTION_A, Block, Cell, Halve, NASNet, Pool, Same, drop_path, genotype, unread
from convince.errors import Mistake


@pytest.mark.parametrize("op", OPS)
def test_an_operation_keeps_the_side_or_halves_it_and_gives_the_cells_width(op):
    for side in (1, 2, 5, 8):
        for c_in in (3, 4):
            for stride in (1, 2):
                made = nn.Sequential(*OPS[op](c_in, 4, stride, 1e-5)).eval()
                out = made(torch.randn(2, c_in, side, side + 1))
                assert out.shape == (2, 4, -(-side // stride), -(-(side + 1) // stride)), (op, side, stride)


def test_pools_do_not_count_what_lies_outside():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert Pool("max", 3, 2)(x).tolist() == [[[[10, 11], [14, 15]]]]
    assert Pool("avg", 3, 2)(x).tolist() == [[[[5, 6.5], [11, 12.5]]]]  # rows and columns 0 to 2, then 2 to 3
    assert Pool("avg", 3, 1)(torch.ones(1, 1, 3, 5)).eq(1).all()
    assert Pool("max", 7, 2)(-torch.ones(1, 1, 2, 3)).eq(-1).all()


def test_padding_is_tensorflows_same():
    assert Same((5, 5))(torch.ones(1, 1, 8, 7))[0, 0].shape == (11, 11)
    padded = Same((7, 1))(torch.ones(1, 1, 8, 8))[0, 0]
    assert padded[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "the odd zero is at the end"


def test_halving_reads_even_pixels_in_one_half_and_odd_ones_in_the_other():
    made = Halve(1, 2, 0.0).eval()
    with torch.no_grad():
        made.even.weight.fill_(1)
        made.odd.weight.fill_(1)
    even, odd = made(torch.arange(16.0).view(1, 1, 4, 4))[0]
    assert (even.tolist(), odd.tolist()) == ([[0, 2], [8, 10]], [[5, 7], [13, 15]])
    assert made(torch.ones(1, 1, 3, 3))[0].tolist() == [[[1, 1], [1, 1]], [[1, 0], [0, 0]]], "beyond an odd side stand zeros"


def test_genotypes_in_words():
    found = genotype("sep5(0)+sep3(1) avg3(0)|identity(2)")
    assert found.blocks == (Block("sep5", 0, "+", "sep3", 1), Block("avg3", 0, "|", "identity", 2))
    assert found.out == (3,)
    assert genotype("sep5(0)+sep3(0)").out == (1, 2), "a state that nobody reads is handed on"
    assert genotype("sep5(0)+sep3(1) avg3(0)|identity(2) -> 3 2").out == (2, 3)
    assert " ".join(map(str, genotype(NORMAL_A).blocks)) == NORMAL_A.split(" ->")[0]
    assert (genotype(NORMAL_A).out, genotype(REDUCTION_A).out) == ((1, 2, 3, 4, 5, 6), (3, 4, 5, 6))
    assert unread(genotype(REDUCTION_A).blocks) == (4, 5, 6), "b2 is handed on although b4 reads it"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no block"),
        ("sep5(0)", "'sep5\\(0\\)' is no block"),
        ("sep4(0)+sep3(1)", "no operation 'sep4'; did you mean 'sep"),
        ("sep3(0)+sep3(2)", "block 1 reads the states 0 to 1"),
        ("sep3(0)+sep3(1) -> 9", "of 0 to 2"),
        ("sep3(0)+sep3(1) ->", "of 0 to 2"),
        ("sep3(0)+sep3(0) -> 2", "the state 1 is read by no block"),
    ],
)
def test_wrong_genotypes_are_refused(text, words):
    with pytest.raises(Mistake, match="nasnet: .*" + words):
        genotype(text)


def test_a_cell_by_hand():
    cell = Cell("conv1(0)|avg3(1) max3(2)+identity(0)", 3, 5, 4, stride=1, halve=True, first=False, eps=1e-5).eval()
    x, before = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 7, 8)
    h, g = cell.here(x), cell.before(before)
    one = torch.cat([cell.ops[0](h.relu()), Pool("avg", 3, 1)(g)], 1)
    assert one.shape == (2, 8, 4, 4)
    wide, bring, norm = cell.ops[2]
    two = norm(bring(wide(one))) + h
    torch.testing.assert_close(cell(x, before), two.relu())
    reduced = Cell("conv1(0)+avg3(0)", 3, 5, 4, stride=2, halve=False, first=False, eps=1e-5).eval()
    assert reduced(x, torch.rand(2, 5, 4, 4)).shape == (2, 8, 2, 2), "the unread h_i-1 is halved and handed on"


ops = st.sampled_from(sorted(OPS))


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(ops, st.integers(0, 9), st.sampled_from("+|"), ops, st.integers(0, 9)), min_size=1, max_size=3), st.integers(4, 9))
def test_any_genotype_makes_a_network_whose_every_weight_learns(rows, side):
    text = " ".join(f"{a}({i % (k + 2)}){joined}{b}({j % (k + 2)})" for k, (a, i, joined, b, j) in enumerate(rows))
    net = NASNet(3, 1, text, text, cells=1, filters=2)
    net(torch.randn(4, 1, side, side)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def pairs(theirs: nn.Module, ours: NASNet):
    """timm's modules and ours that hold the same weights in the same order."""
    yield [theirs.conv0], [ours.stem]
    yield [theirs.last_linear], [ours.fc]
    stages = [[f"cell_{i}" for i in range(at, at + 6)] for at in (0, 6, 12)]
    names = ["cell_stem_0", "cell_stem_1", *stages[0], "reduction_cell_0", *stages[1], "reduction_cell_1", *stages[2]]
    for name, cell in zip(names, ours.cells, strict=True):
        there = getattr(theirs, name)
        yield [there.conv_1x1], [cell.here]
        if hasattr(there, "conv_prev_1x1"):
            yield [there.conv_prev_1x1], [cell.before]
        elif hasattr(there, "path_1"):
            yield [there.path_1, there.path_2, there.final_path_bn], [cell.before]
        for i, op in enumerate(cell.ops):
            if hasattr(there, branch := f"comb_iter_{i // 2}_{('left', 'right')[i % 2]}"):
                yield [getattr(there, branch)], [op]


def test_equal_to_timms_network_with_its_weights():
    """timm's strided average pools count the zeros around the image, which the paper's do not: they are replaced here, and no more."""
    torch.manual_seed(0)
    theirs = timm.create_model("nasnetalarge", num_classes=5, num_features=192, stem_size=16).eval()
    ours = NASNet(5, cells=6, filters=8, stem="photo", stem_channels=16, skip=True).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for source, target in pairs(theirs, ours):
        a, b = ([t for m in side for t in m.state_dict().values()] for side in (source, target))
        assert [t.shape for t in a] == [t.shape for t in b]
        for x, y in zip(a, b, strict=True):
            y.copy_(x)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    mended = copy.deepcopy(theirs)
    for name, module in theirs.named_modules():
        if isinstance(module, AvgPool2dSame):
            mended.set_submodule(name, Pool("avg", 3, 2))
    for side in (64, 75):
        x = torch.randn(2, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), mended(x), rtol=0, atol=1e-5)
            assert not torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-5), "timm has mended its pools: compare with it as it is"


def test_the_published_network_to_the_parameter():
    with torch.device("meta"):
        large = builder("nasnet-a-large", num_classes=1000, in_chans=3, size=(331, 331))()
        assert sum(p.numel() for p in large.parameters()) == 88_753_150
        assert [row["reduction"] for row in large.feature_info] == [2, 4, 8, 16, 32]
        assert large.num_features == 4032
        assert large.back.count(3) == 2, "behind each reduction cell h_i-1 is skipped"
        assert large.forward_features(torch.empty(1, 3, 331, 331)).shape == (1, 4032, 11, 11)
        assert builder("nasnet-a-mobile", num_classes=1000, in_chans=3, size=(224, 224))().num_features == 1056


def test_dropped_rows_are_zero_and_the_others_scaled_up():
    x = torch.ones(4000, 2, 1, 1)
    torch.manual_seed(0)
    out = drop_path(x, 0.25)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(out[:, 0], out[:, 1]), "a row is dropped whole"
    assert float(out.mean()) == pytest.approx(1, abs=0.03)


def test_identities_are_never_dropped_and_nothing_is_in_eval_mode():
    x, before = torch.rand(8, 4, 3, 3), torch.rand(8, 4, 3, 3)
    for text, safe in (("identity(0)+identity(1)", True), ("avg3(0)+identity(1)", False)):
        cell = Cell(text, 4, 4, 4, stride=1, halve=False, first=False, eps=1e-5)
        whole = cell(x, before)
        cell.drop_path = 0.9
        assert torch.equal(cell(x, before), whole) == safe
        cell.eval()
        rest = cell(x, before)
        cell.drop_path = 0.0
        assert torch.equal(rest, cell(x, before))


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="at least 1 cell a stage and 8 filters \\(photo stem\\)"):
        NASNet(filters=4, stem="photo")
    with pytest.raises(Mistake, match="must be 'small'"):
        NASNet(stem="large")
    with pytest.raises(Mistake, match="must be at least 3 pixels; it has 2x9"):
        NASNet(filters=8, cells=1, stem="photo", img_size=(2, 9))
