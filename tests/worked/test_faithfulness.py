"""Insertion and deletion by hand: an answer that counts lit pixels, maps that are right, wrong, or say nothing."""

import pytest
import torch
from torch import nn

from convince.explain.faithfulness import blurred, deletion, insertion


class Lit(nn.Module):
    """Class 1 by the light in the upper left quarter."""

    def forward(self, x):
        light = x[:, 0, :4, :4].mean((1, 2))
        return torch.stack([torch.zeros_like(light), 20 * light - 10], 1)


@pytest.fixture
def picture():
    x = torch.zeros(1, 1, 8, 8)
    x[:, :, :4, :4] = 1
    good = x.clone()
    return x, good, torch.tensor([1])


def test_the_right_map_deletes_faster_and_inserts_faster(picture):
    x, good, target = picture
    assert float(deletion(Lit(), x, good, target)) < 0.2
    assert float(deletion(Lit(), x, -good, target)) > 0.75
    assert float(insertion(Lit(), x, good, target)) > float(insertion(Lit(), x, -good, target))


def test_deletion_by_hand(picture):
    """Four steps of 16 pixels: the lit quarter goes first, so p is sigmoid(10), then four times sigmoid(-10); trapezoids."""
    x, good, target = picture
    p = torch.sigmoid(torch.tensor([10.0, -10.0, -10.0, -10.0, -10.0]))
    expected = float(((p[1:] + p[:-1]) / 2).sum() / 4)
    assert float(deletion(Lit(), x, good, target, steps=4)) == pytest.approx(expected, abs=1e-6)


def test_the_area_of_an_answer_that_never_changes_is_its_probability():
    class Still(nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

    x = torch.rand(3, 3, 9, 7)
    p = float(torch.sigmoid(torch.tensor(1.0)))
    for measure in (insertion, deletion):
        torch.testing.assert_close(measure(Still(), x, torch.rand(3, 1, 9, 7), torch.tensor([1, 1, 1])), torch.full((3,), p))


def test_a_blurred_picture_keeps_its_shape_and_its_mean_colour():
    x = torch.full((2, 3, 11, 16), 0.3)
    torch.testing.assert_close(blurred(x), x)
