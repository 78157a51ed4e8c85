"""Sequencer2D by hand: rows and columns are torch's LSTM, V-Sequencer's order, timm's network and counts, padding, the curve over resolutions."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.sequencer import LSTM2d
from torch import nn

from convince.backbones import builder
from convince.backbones.sequencer2d import Lstm1d, Sequencer2d, resolution_curve
from convince.errors import Mistake
from convince.models.counting import count

TINY = {"layers": (1, 2), "patches": (4, 2), "dims": (8, 12), "hidden": (2, 3)}


def drawn(model: nn.Module) -> nn.Module:
    """All weights drawn anew: the head starts at zero, and would hide everything."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model.eval()


def test_a_row_is_torchs_lstm():
    mixer, x = LSTM2d(6, 3, union="horizontal", with_fc=False).eval(), torch.randn(2, 1, 5, 6)
    alone = nn.LSTM(6, 3, batch_first=True, bidirectional=True)
    alone.load_state_dict(mixer.rnn_h.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[:, 0], alone(x[:, 0])[0])


def test_both_ways_by_hand():
    mixer, x = LSTM2d(6, 3).eval(), torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        across = torch.stack([mixer.rnn_h(x[:, i])[0] for i in range(4)], 1)
        down = torch.stack([mixer.rnn_v(x[:, :, j])[0] for j in range(5)], 2)
        torch.testing.assert_close(mixer(x), mixer.fc(torch.cat([down, across], -1)))


def test_a_row_of_patches_sees_its_row_and_its_column_only():
    mixer = LSTM2d(4, 2).double().eval()
    x = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    mixer(x)[0, 0, 1].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 0
    assert seen.tolist() == [[True, True, True], [False, True, False], [False, True, False]]


def test_the_vanilla_mixer_reads_tokens_row_after_row():
    mixer, x = Lstm1d(6, 3).eval(), torch.randn(2, 3, 4, 6)
    tokens = torch.stack([x[:, i, j] for i in range(3) for j in range(4)], 1)
    with torch.no_grad():
        y = mixer.rnn(tokens)[0]
        torch.testing.assert_close(mixer(x)[:, 1, 2], y[:, 6])


def test_the_small_size_is_timms_network():
    theirs = timm.create_model("sequencer2d_s", num_classes=3, in_chans=1)
    ours = Sequencer2d(3, 1)
    ours.load_state_dict(drawn(theirs).state_dict())
    x = torch.randn(1, 1, 28, 42)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_the_published_counts():
    for name, parameters in (("s", 27_651_688), ("m", 38_307_688), ("l", 54_298_216)):
        with torch.device("meta"):
            model = builder(f"sequencer2d-{name}", num_classes=1000, in_chans=3, size=(224, 224))()
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert [row["reduction"] for row in model.feature_info] == [7, 14, 14, 14]


def test_the_two_minis_have_equal_parameters():
    sizes = [count(builder(f"{name}-mini", num_classes=10, in_chans=1, size=(8, 8))(), (8, 8), 1).parameters for name in ("sequencer2d", "v-sequencer")]
    assert sizes[0] == 301_882
    assert abs(sizes[1] / sizes[0] - 1) < 0.05


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20))
def test_an_image_is_filled_up_with_zeros_below_and_on_the_right(rows, columns):
    model, x = drawn(Sequencer2d(3, 1, **TINY)), torch.rand(1, 1, rows, columns)
    whole = torch.zeros(1, 1, -(-rows // 8) * 8, -(-columns // 8) * 8)
    whole[:, :, :rows, :columns] = x
    with torch.no_grad():
        assert model.forward_features(x).shape == (1, whole.shape[2] // 8, whole.shape[3] // 8, 12)
        assert torch.equal(model(x), model(whole))


def test_drop_path_rises_evenly():
    model = Sequencer2d(3, 1, **TINY, drop_path=0.4)
    assert [block.drop_path.drop_prob for block in model.blocks()] == pytest.approx([0.0, 0.2, 0.4])


@pytest.mark.parametrize("union", ["add", "vertical", "horizontal"])
def test_unions(union):
    model = Sequencer2d(3, 1, **TINY, union=union, bidirectional=False)
    assert model.blocks()[0].rnn_tokens.fc.in_features == 2
    assert model(torch.rand(2, 1, 8, 16)).shape == (2, 3)


class Bright(nn.Module):
    """Says 1 where the mean of the picture is above a half, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x):
        assert not self.training
        self.seen.append(tuple(x.shape))
        return torch.stack([torch.zeros(len(x)), x.mean((1, 2, 3)) - 0.5], 1)


def test_a_resolution_curve_by_hand():
    answer = Bright().train()
    x, y = torch.stack([torch.full((1, 4, 4), value) for value in (0.1, 0.9, 0.8)]), torch.tensor([0, 1, 0])
    assert resolution_curve(answer, x, y, (2, 4, 8), batch=2) == {2: 2 / 3, 4: 2 / 3, 8: 2 / 3}
    assert answer.seen == [(2, 1, 2, 2), (1, 1, 2, 2), (2, 1, 4, 4), (1, 1, 4, 4), (2, 1, 8, 8), (1, 1, 8, 8)]
    assert answer.training, "the mode is put back"


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="one number a stage each"):
        Sequencer2d(layers=(1, 1))
    with pytest.raises(Mistake, match=r"hidden=\(3,\) times 2 must be dims=\(8,\)"):
        Sequencer2d(layers=(1,), patches=(4,), dims=(8,), hidden=(3,), mixer="1d")
