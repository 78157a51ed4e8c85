"""Large kernel study by hand: equal parameters, one kernel against a stack, cue conflicts of two classes, speed, and the table."""

import json

import pytest
import torch
from torch import nn

from convince.diagnose.large_kernel_study import LargeKernelStudy, cue_conflicts, dense_vs_stack, equal_width, network, parameters, throughput
from convince.errors import Mistake
from convince.types import Budget


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("depths", [(2, 2), (3,)])
def test_smaller_kernels_are_given_more_channels(depths):
    large = network(13, 24, depths)
    widths = [equal_width(k, large, depths) for k in (3, 7)]
    assert widths[0] > widths[1] > 24
    for k, width in zip((3, 7), widths, strict=True):
        gaps = [abs(parameters(network(k, w, depths)) - parameters(large)) for w in (width - 1, width, width + 1)]
        assert min(gaps) == gaps[1], "no neighbouring width is closer"
        assert gaps[1] < 0.05 * parameters(large)
    assert equal_width(13, large, depths) == 24


def test_one_kernel_and_a_stack_see_equally_far():
    for kernel in (3, 7, 13):
        one, stack = dense_vs_stack(2, kernel)
        for way in (one, stack):
            x = torch.zeros(1, 2, 15, 15, requires_grad=True)
            for p in way.parameters():
                nn.init.ones_(p)
            way(x)[..., 7, 7].sum().backward()
            assert x.grad is not None
            seen = x.grad.abs().sum((0, 1)).nonzero()
            assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [kernel, kernel]
        assert sum(p.numel() for p in one.parameters()) == 2 * kernel**2
        assert sum(p.numel() for p in stack.parameters()) == 2 * 9 * (kernel - 1) // 2
    with pytest.raises(Mistake, match="kernel=4 must be odd"):
        dense_vs_stack(2, 4)


def test_conflicts_are_of_two_classes():
    x, y = torch.rand(12, 1, 6, 6, generator=gen()), torch.arange(12) % 3
    made, shape, texture = cue_conflicts(x, y, 50, gen())
    assert made.shape == (50, 1, 6, 6)
    assert bool((shape != texture).all())
    assert set(shape.tolist()) == set(texture.tolist()) == {0, 1, 2}
    again = cue_conflicts(x, y, 50, gen())
    assert torch.equal(made, again[0])
    with pytest.raises(Mistake, match="at least two classes"):
        cue_conflicts(x, torch.zeros_like(y), 5, gen())


def test_throughput_counts_images_and_puts_the_mode_back():
    calls = []

    class Counts(nn.Module):
        def forward(self, x):
            calls.append((tuple(x.shape), self.training))
            return x

    model = Counts().train()
    assert throughput(model, (4, 5), in_chans=2, batch=3, seconds=0.0) > 0
    assert model.training
    assert set(calls) == {((3, 2, 4, 5), False)}


def test_the_table(capsys):
    study = LargeKernelStudy(kernels=(3, 5), depths=(1,), width=4, size=8, seeds=1, images=8, pairs=12)
    found = study.run(Budget(2, "steps"))
    assert json.loads(json.dumps(found)) == found
    rows = found["table"]
    assert [row["kernel"] for row in rows] == [3, 5]
    assert rows[1]["width"] == 4
    for row in rows:
        assert 0 < row["merged_parameters"] < row["parameters"]
        assert all(0 < row[name] <= 1 for name in ("erf", "erf_plain", "erf_untrained"))
        assert 0 <= row["shape_bias"] <= 1
    assert "shape bias" in capsys.readouterr().out
    assert study._steps(Budget(3, "epochs"), 7) == 21
    assert study._steps(Budget(1280, "images"), 7) == 10


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="at least one of each"):
        LargeKernelStudy(kernels=())
    with pytest.raises(Mistake, match="large-kernel-study: a budget in seconds does not fit"):
        LargeKernelStudy().run(Budget(3.0, "seconds"))
