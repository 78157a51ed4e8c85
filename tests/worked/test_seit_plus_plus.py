"""SeiT++ by hand: bytes of tokens, codes that move, ColorAdapt, the masks, the loss of hidden tokens, what answers and what rests."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.checks.subject import bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.answer import logits_of
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit, start
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.pretrain.seit_plus_plus import MaskedTokens, TokenNet, color_adapt, crop_tokens, mask_ratio, masked_token_loss
from convince.pretrain.token_store import Codebook, Tokenizer, decoder, pack, quantise, token_bytes, unpack

TINY = "epochs=1,token_epochs=1,codes=8,dim=4,width=8,depth=1"


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def made(*specs, data=None, **changes):
    chosen = {"model": "resnet:layers=(1,1),widths=(4,8)", "parts": specs, "batch": 8, "epochs": 1, "precision": "fp32", "augment": "none"}
    return prepare(settings(**{**chosen, **changes}), data or tiny_images(), drop_off=False)


# -- storage ---------------------------------------------------------------------------------------


def test_bytes_of_the_paper_and_of_the_check():
    """32x32 tokens of 391 codes: 1,102 bytes; 8x8 of 256: 64 bytes, with a codebook of 1.6 bytes an image 2.1 % of 3,072."""
    assert token_bytes(32 * 32, 391) == pytest.approx(1024 * math.log2(391) / 8)
    assert round(token_bytes(32 * 32, 391)) == 1102
    assert token_bytes(8 * 8, 256) == 64
    assert round(100 * (64 + 1.6) / 3072, 1) == 2.1


def test_the_stem_of_the_paper():
    """A stem of 2x2 tokens of 32 numbers to 768 has 99,072 parameters; 16x16 RGB pixels need 590,592."""
    assert [sum(p.numel() for p in nn.Conv2d(c, 768, k).parameters()) for c, k in ((32, 2), (3, 16))] == [99072, 590592]
    net = TokenNet(1, (8, 8), 3, 8, 32, 2, 2, 768, 0)
    assert sum(p.numel() for p in net.trunk.stem.parameters()) == 99072


@quick(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([2, 256, 257, 391]))
def test_tokens_survive_storage(seed, codes):
    tokens = torch.randint(0, codes, (3, 2, 4), generator=gen(seed))
    assert torch.equal(unpack(pack(tokens, codes), (3, 2, 4), codes), tokens)


def test_storage_of_another_shape_is_refused():
    with pytest.raises(Mistake, match="24 tokens"):
        unpack(pack(torch.zeros(3, 2, 4, dtype=torch.int64), 256), (3, 2, 5), 256)


# -- codes -----------------------------------------------------------------------------------------


def test_the_nearest_code_by_hand():
    book = Codebook(2, 2)
    book.codes.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    assert book.nearest(torch.tensor([[1.0, 1.0], [2.0, 3.0], [3.0, 4.0]])).tolist() == [0, 1, 1]


def test_codes_move_to_what_they_win():
    """Codes 0 and 10; 1, 1, 12 arrive, decay 0.9: counts 0.9 + 0.2 and 0.9 + 0.1, sums 0.2 and 9 + 1.2; codes 2/11 and 10.2."""
    book = Codebook(2, 1)
    book.codes.copy_(torch.tensor([[0.0], [10.0]]))
    book.sums.copy_(book.codes)
    book.placed.fill_(True)
    book.move(torch.tensor([[1.0], [1.0], [12.0]]), 0.9, gen())
    assert book.counts.tolist() == pytest.approx([1.1, 1.0])
    assert book.codes.flatten().tolist() == pytest.approx([2 / 11, 10.2])


def test_the_first_batch_places_codes_and_a_dead_code_is_put_on_an_encoding():
    book, z = Codebook(4, 2), torch.randn(50, 2, generator=gen())
    book.move(z, 1.0, gen())
    assert all((z == code).all(1).any() for code in book.codes)
    book.codes[3] = book.sums[3] = 1e6
    book.counts[3] = 1e-9
    book.move(z, 1.0, gen(1))
    assert (z == book.codes[3]).all(1).any()


def test_codes_let_the_slope_through():
    z = torch.tensor([[[[0.2, 0.9]]]], requires_grad=True)
    codes = torch.tensor([[[[0.0, 1.0]]]])
    q, commitment = quantise(z, codes)
    assert torch.allclose(q, codes)
    assert float(commitment.detach()) == pytest.approx((0.04 + 0.01) / 2)
    (3 * q).sum().backward()
    assert z.grad.tolist() == [[[[3, 3]]]]


def test_tokens_are_4_times_smaller_and_rows_do_not_mix():
    tokenizer, x = Tokenizer(3, 16, 4), torch.rand(2, 3, 16, 8)
    tokens = tokenizer(x)
    assert tokens.shape == (2, 4, 2)
    assert torch.equal(tokens[1:], tokenizer(x[1:]))
    assert decoder(3, 4)(tokenizer.vectors(tokens)).shape == x.shape


# -- changing and hiding tokens --------------------------------------------------------------------


def test_color_adapt_by_hand():
    """(0, 2) has mean 1 and deviation 1, (10, 30) 20 and 10: row 0 becomes (10, 30), row 1 would become (0, 2)."""
    z = torch.tensor([[[[0.0, 2.0]]], [[[10.0, 30.0]]]])
    found = color_adapt(z, torch.tensor([True, False]))
    assert torch.allclose(found, torch.tensor([[[[10.0, 30.0]]], [[[10.0, 30.0]]]]), atol=1e-3)
    assert torch.equal(color_adapt(z, torch.tensor([False, False])), z)


@quick(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_color_adapt_gives_the_partners_moments(seed):
    z = torch.randn(4, 3, 5, 5, generator=gen(seed), dtype=torch.float64)
    found = color_adapt(z, torch.ones(4, dtype=torch.bool))
    assert torch.allclose(found.mean((2, 3)), z.flip(0).mean((2, 3)))
    assert torch.allclose(found.std((2, 3)), z.flip(0).std((2, 3)), atol=1e-4)


def test_a_crop_of_everything_is_the_map_or_its_mirror():
    z = torch.randn(16, 2, 4, 4, generator=gen(), dtype=torch.float64)
    found = crop_tokens(z, 1.0, gen(3))
    same = [(torch.allclose(f, a, atol=1e-9), torch.allclose(f, a.flip(-1), atol=1e-9)) for f, a in zip(found, z, strict=True)]
    assert all(a != b for a, b in same)
    assert {a for a, _ in same} == {True, False}
    small = crop_tokens(z, 0.2, gen(3))
    assert small.shape == z.shape
    assert small.min() >= z.min()
    assert small.max() <= z.max()


def test_the_share_that_is_hidden():
    """The normal of mean 0.45 and deviation 0.25 cut to [0.4, 1] has mean 0.45 + 0.25 (phi(-0.2) - phi(2.2)) / (Phi(2.2) - Phi(-0.2)) = 0.6103."""
    phi = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (-0.2, 2.2)]
    below = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in (-0.2, 2.2)]
    mean = 0.45 + 0.25 * (phi[0] - phi[1]) / (below[1] - below[0])
    g = gen()
    drawn = torch.tensor([mask_ratio(g) for _ in range(2000)])
    assert drawn.min() >= 0.4
    assert drawn.max() <= 1
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.015)


def test_the_loss_by_hand():
    """Scores (ln 3, 0) for a hidden token 0: -ln 3/4; the seen patch, told wrongly, does not count."""
    scores = torch.tensor([[[[math.log(3), 0.0]], [[0.0, 9.0]]]])
    loss = masked_token_loss(scores, torch.zeros(1, 2, 1, dtype=torch.int64), torch.tensor([[True, False]]))
    assert float(loss) == pytest.approx(math.log(4 / 3))


def test_targets_are_the_tokens_of_a_patch():
    tokens = torch.arange(16).view(1, 4, 4)
    assert MaskedTokens(4, 8, 4, 2, 8).target(tokens, 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


def test_hidden_tokens_cannot_be_seen():
    """Changing a hidden patch changes no score; changing a seen one does."""
    torch.manual_seed(0)
    net = TokenNet(1, (32, 32), 3, 16, 4, 4, 2, 8, 1)
    head, order = MaskedTokens(16, 16, 4, 2, 8), torch.rand(1, 16, generator=gen()).argsort(1)
    tokens = torch.randint(0, 16, (1, 8, 8), generator=gen())

    def scores(patch):
        i, j = divmod(int(order[0, patch]), 4)
        changed = tokens.clone()
        changed[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += 1
        return head(net, changed % 16, order, 9, 6)

    plain = head(net, tokens, order, 9, 6)
    assert plain.shape == (1, 16, 4, 16)
    assert all(torch.equal(scores(p), plain) for p in (0, 5, 6, 8))
    assert not torch.allclose(scores(9), plain)


# -- the run ---------------------------------------------------------------------------------------


def test_what_moves_in_each_stage():
    """First the tokeniser, then the transformer without its head, then transformer and head."""
    specs = {0: TINY.replace("epochs=1,token", "epochs=0,token", 1), 1: TINY}
    tokens, masked = (made(f"seit-plus-plus:{spec}", epochs=0) for spec in specs.values())
    whole, begun = made(f"seit-plus-plus:{TINY}"), made(f"seit-plus-plus:{TINY}")
    start(begun)
    for run in (tokens, masked, whole):
        fit(run)
    states = [bits(run.model) for run in (begun, tokens, masked, whole)]
    moved = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(states)]
    assert all(moved)
    assert all(n.startswith("seit.tokenizer.") for n in moved[0])
    assert {"seit.tokenizer.book.codes", "seit.tokenizer.encoder.0.weight"} <= moved[0]
    assert all(n.startswith(("seit.trunk.", "seit.norm.")) and not n.startswith("seit.trunk.fc") for n in moved[1])
    assert all(n.startswith(("seit.trunk.", "seit.norm.")) for n in moved[2])
    assert "seit.trunk.fc.weight" in moved[2]
    told = {row["name"]: row["value"] for row in whole.record.rows if row["kind"] == "reading"}
    assert told["storage"] == pytest.approx(4 * 3 / 8 / 64)
    assert 1 <= told["codes in use"] <= 8


def test_labels_are_not_looked_at_and_unlabelled_images_count():
    data = tiny_images()
    few = data.y.clone()
    few[data.split.train[8:]] = -1
    runs = [made(f"seit-plus-plus:{TINY}", epochs=0, data=d) for d in (data, dataclasses.replace(data, y=(data.y + 1) % 3), dataclasses.replace(data, y=few))]
    for run in runs:
        fit(run)
    assert not equal(bits(runs[0].model), bits(runs[1].model))
    assert not equal(bits(runs[0].model), bits(runs[2].model))


def test_pixels_are_rebuilt_and_tokens_told():
    losses = {}
    run = made(f"seit-plus-plus:{TINY.replace('epochs=1', 'epochs=10')},lr=0.01", epochs=0)
    fit(run)
    for row in run.record.rows:
        if row["kind"] == "epoch":
            losses.setdefault(row["stage"], []).append(row["loss"])
    assert losses["tokens"][-1] < 0.8 * losses["tokens"][0]
    assert losses["masked tokens"][-1] < losses["masked tokens"][0]


@pytest.mark.parametrize("option", ["adapt=crop", "adapt=none", "dropped=0.0", "down=2", "down=2,stem=2"])
def test_each_option_counts(option):
    x, found = torch.rand(6, 1, 8, 8), []
    for spec in (TINY, f"{TINY},{option}"):
        run = made(f"seit-plus-plus:{spec}")
        fit(run)
        assert run.model.seit.change is None
        found.append(run.answer.eval()(x))
    assert not torch.allclose(*found)


@pytest.mark.parametrize(("side", "grid", "patches"), [(28, 7, 49), (32, 8, 64), (30, 7, 49), (64, 16, 64), (224, 28, 196)])
def test_tokens_and_patches_of_usual_images(side, grid, patches):
    run = made("seit-plus-plus:codes=8,dim=4,width=8,depth=1", data=tiny_images(side))
    start(run)
    net = run.model.seit
    assert (net.grid, net.trunk.position.shape[1]) == ((grid, grid), patches)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 6])
def test_resume_and_reload(tmp_path, at):
    whole, steps = made(f"seit-plus-plus:{TINY}", checkpoint_seconds=0), []
    fit(whole)

    def kill(*_):
        steps.append(1)
        if len(steps) == at:
            raise Killed

    with pytest.raises(Killed):
        fit(made(f"seit-plus-plus:{TINY}", checkpoint_seconds=0), tmp_path / "c", kill)
    again = made(f"seit-plus-plus:{TINY}", checkpoint_seconds=0)
    fit(again, tmp_path / "c")
    assert not equal(bits(whole.answer), bits(again.answer))
    write_config(tmp_path, whole.settings)
    write_model(tmp_path, whole)
    x = whole.data.x.take(torch.arange(5))
    assert torch.equal(open_run(tmp_path).logits(x), logits_of(whole.answer.eval(), x, whole.plan))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"epochs": -1}, "at least 0"), ({"down": 3}, "power of two"), ({"adapt": "rotate"}, "color"), ({"dropped": 0.5}, "0.4"), ({"codes": 1}, "at least 2")],
)
def test_refusals(options, says):
    with pytest.raises(Mistake, match=says):
        parts.make("seit-plus-plus", **options)


def test_images_of_less_than_two_patches_are_refused():
    with pytest.raises(Mistake, match="--size 32"):
        start(made("seit-plus-plus:down=8,stem=2", data=tiny_images(16)))
    with pytest.raises(Mistake, match="mutes"):
        made(f"seit-plus-plus:{TINY}", "se")
