"""Quantus as oracle: complexity, the share of a map inside a mask, and the pointing game give its numbers."""

from __future__ import annotations

import warnings

import pytest
import torch

from convince.explain.localisation import energy_in_mask, pointing_hit
from convince.explain.metrics import entropy


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.rand(5, 1, 9, 9, generator=torch.Generator().manual_seed(0)).double()


def evaluated(name: str, maps: torch.Tensor, mask: torch.Tensor | None = None) -> list[float]:
    """A metric of Quantus on these maps; the model and the images that it asks for do not matter to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantus = pytest.importorskip("quantus")
        metric = getattr(quantus, name)(abs=False, normalise=False, disable_warnings=True, display_progressbar=False)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(81, 2))
        rest = {} if mask is None else {"s_batch": mask.numpy()}
        x, y = maps.float().numpy(), torch.zeros(len(maps), dtype=torch.int64).numpy()
        return [float(value) for value in metric(model=net, x_batch=x, y_batch=y, a_batch=maps.numpy(), channel_first=True, **rest)]


def test_complexity_is_its_entropy(maps: torch.Tensor) -> None:
    assert entropy(maps).tolist() == pytest.approx(evaluated("Complexity", maps), rel=1e-6)


def test_energy_and_pointing_agree(maps: torch.Tensor) -> None:
    mask = torch.zeros(5, 1, 9, 9, dtype=torch.bool)
    mask[..., 2:6, 1:7] = True
    assert energy_in_mask(maps, mask).tolist() == pytest.approx(evaluated("RelevanceMassAccuracy", maps, mask), rel=1e-6)
    assert pointing_hit(maps, mask).double().tolist() == evaluated("PointingGame", maps, mask)
