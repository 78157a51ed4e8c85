"""Lipschitz and translation by hand: known maps, the bound of Theorem 1, bends of known size, any network."""

import math

import pytest
import torch
from torch import nn

from convince.backbones import builder
from convince.backbones.frame_scattering import FrameScattering, haar
from convince.diagnose.lipschitz_translation import (
    LipschitzTranslation,
    bend,
    decay,
    deformation_curve,
    features_of,
    lipschitz_ratio,
    moved,
    translate,
    translation_bound,
    translation_curve,
)
from convince.errors import Mistake


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=4, side=16, seed=0):
    return torch.rand(n, 1, side, side, generator=gen(seed))


def test_ratio_of_known_maps():
    f, h = images(), images(seed=1)
    torch.testing.assert_close(lipschitz_ratio(lambda x: [3 * x, 4 * x], f, h), torch.full((4,), 5.0, dtype=torch.float64))
    assert bool(lipschitz_ratio(lambda x: [x], f, f).isnan().all())


def test_both_changes_by_hand():
    """f = (3, 4) has length 5; features 2 f move by 2 |d|: absolute 2 |d| / 5, relative |d| / 5."""
    f, d = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    curve = moved(lambda x: [2 * x, 0 * x], f, f + d)
    assert curve.absolute[:, 0].tolist() == pytest.approx([0.4, 0])
    assert curve.relative[:, 0].tolist() == pytest.approx([0.2, 0])


def test_a_shift_goes_round():
    assert translate(torch.arange(4.0).view(1, 1, 1, 4), (0, 1)).flatten().tolist() == [3, 0, 1, 2]
    curve = translation_curve(lambda x: [x.sum((2, 3))], images(), (2, 3))
    assert float(curve.relative.max()) < 1e-6


def test_decay_and_bound_by_hand():
    """The Haar mean of two taps, |cos(pi w)| w along an axis: its largest product of both axes stands at the grid's maximum; 2 pi |t| K / (S S)."""
    w = [
        [math.hypot(a, b) * abs(math.cos(math.pi * a) * math.cos(math.pi * b)) for a in (k / 16 for k in range(-8, 8))] for b in (k / 16 for k in range(-8, 8))
    ]
    assert decay(haar(1), (16, 16)) == pytest.approx(max(map(max, w)))
    assert translation_bound((3, 4), 0.5, (2, 2)) == pytest.approx(2 * math.pi * 5 * 0.5 / 4)


def test_bound_holds_where_no_position_is_left_out():
    net = FrameScattering(img_size=(16, 16), bank="haar", pool="none", stride=1)
    k = decay(haar(2), (16, 16))
    for shift in ((0, 1), (2, 1), (4, 4)):
        curve = translation_curve(net.scatter, images(), shift)
        assert float(curve.absolute.max()) <= translation_bound(shift, k, (1,)) * (1 + 1e-5)


def test_bends_are_as_large_as_said():
    f = torch.arange(16.0).expand(3, 1, 16, 16)  # a ramp moves by the displacement along its rise
    bent = bend(f, 1.5, gen())
    change = (bent - f)[..., 4:-4].abs()
    assert 0.1 < float(change.max()) <= 1.5 + 1e-5
    assert bend(f, 1e-9, gen()).sub(f).abs().max() < 1e-4
    turned = bend(f, 0.5, gen(), omega=0.25)
    torch.testing.assert_close(turned.abs(), bend(f, 0.5, gen()))
    assert float(turned.angle().abs().max()) <= 2 * math.pi * 0.25 + 1e-5


def test_deformation_with_a_modulation():
    net = FrameScattering(img_size=(16, 16))
    small, large = (deformation_curve(net.scatter, images(), tau, gen(), omega) for tau, omega in ((0.2, 0.01), (2.0, 0.1)))
    assert bool((small.absolute.mean(1) < large.absolute.mean(1)).all())
    assert float(large.absolute.square().sum(0).max()) < 4


def test_features_of_any_network():
    ours = builder("resnet:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=1, size=(16, 16))().eval()
    phi, names, _ = features_of(ours)
    assert [len(u) for u in phi(images())] == [4] * len(names)
    assert features_of(FrameScattering())[1] == ["layer 0", "layer 1", "layer 2"]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    assert features_of(plain)[1] == ["scores"]
    assert len(LipschitzTranslation().probe(plain, images(), torch.zeros(4, dtype=torch.long)).readings) == 2 + 2 * 5


def test_wrong_options_and_inputs():
    with pytest.raises(Mistake, match=r"lipschitz-translation: shifts=\(0,\)"):
        LipschitzTranslation(shifts=(0,))
    with pytest.raises(Mistake, match="lipschitz-translation looks at images"):
        LipschitzTranslation().probe(FrameScattering(), torch.rand(1, 1, 32, 32), torch.zeros(1, dtype=torch.long))
