"""Checks of augmentations: shapes, ranges, labels, and randomness from the generator alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from convince.checks.subject import Subject
from convince.fit.randomness import generator


def _batch(n: int = 12, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, channels, 10, 8, generator=generator("batch")), F.one_hot(torch.arange(n) % 3, 3).float()


def check_shapes_and_ranges_are_kept(s: Subject) -> None:
    """Images keep shape, dtype and [0, 1]; label rows keep their sum."""
    for dtype in (torch.float32, torch.float64):
        x, y = _batch()
        x2, y2 = s.make()(x.to(dtype), y.to(dtype), generator(1))
        assert x2.shape == x.shape, f"shape {tuple(x.shape)} became {tuple(x2.shape)}"
        assert x2.dtype == dtype and y2.dtype == dtype, f"{dtype} became {x2.dtype} and {y2.dtype}"
        assert float(x2.min()) >= -1e-6 and float(x2.max()) <= 1 + 1e-6, "pixels leave [0, 1]"
        torch.testing.assert_close(y2.sum(1), torch.ones(len(y), dtype=dtype))


def check_randomness_is_handed_in(s: Subject) -> None:
    """Equal generators give equal images, another one gives others; the global state stays."""
    x, y = _batch()
    state = torch.get_rng_state()
    a, b = s.make()(x, y, generator(1)), s.make()(x, y, generator(1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]), "equal generators give different images"
    others = [s.make()(x, y, generator(i))[0] for i in range(2, 8)]
    assert any(not torch.equal(a[0], other) for other in others), "the generator is not used"
    assert torch.equal(state, torch.get_rng_state()), "the global random state moved"


def check_batch_is_unchanged(s: Subject) -> None:
    """The images and labels handed in are as before."""
    x, y = _batch()
    kept = x.clone(), y.clone()
    for i in range(4):
        s.make()(x, y, generator(i))
    assert torch.equal(x, kept[0]), "the images handed in were changed"
    assert torch.equal(y, kept[1]), "the labels handed in were changed"
