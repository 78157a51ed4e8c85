"""CNNAgarap by hand: parameter counts, sizes, what its options refuse."""

from __future__ import annotations

import pytest
import torch

from convince.backbones import builder
from convince.backbones.cnn_agarap import CNNAgarap
from convince.errors import Mistake


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameters_are_the_papers():
    """832 + 51,264 + (3136 * 1024 + 1024) + 10,250 = 3,274,634 at 28x28x1."""
    net = CNNAgarap()
    assert count(net) == 3_274_634
    assert [tuple(p.shape) for n, p in net.named_parameters() if n.endswith("weight")] == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 3136), (10, 1024)]
    assert {p.p for p in net.modules() if isinstance(p, torch.nn.Dropout)} == {0.5}


def test_half_the_width():
    """416 + 12,832 + (1568 * 512 + 512) + 5,130 = 821,706."""
    assert count(builder("cnn-agarap-half", num_classes=10, in_chans=1, size=(28, 28))()) == 821_706


@pytest.mark.parametrize(("size", "flat"), [((28, 28), 7 * 7), ((8, 8), 2 * 2), ((30, 33), 8 * 9), ((1, 5), 1 * 2)])
def test_same_padding_and_pools_that_keep_the_edge(size, flat):
    net = CNNAgarap(num_classes=3, in_chans=2, widths=(2, 4), hidden=5, img_size=size).eval()
    assert net.hidden[0].in_features == 4 * flat
    x = torch.randn(2, 2, *size)
    assert net(x).shape == (2, 3)
    assert net.forward_head(net.forward_features(x), pre_logits=True).shape == (2, 5)


def test_mistakes_teach():
    with pytest.raises(Mistake, match="built for images of 28x28 pixels, given 32x32"):
        CNNAgarap()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(Mistake, match=r"dropout=1\.0"):
        CNNAgarap(dropout=1.0)
    with pytest.raises(Mistake, match="at least one convolution"):
        CNNAgarap(widths=())
