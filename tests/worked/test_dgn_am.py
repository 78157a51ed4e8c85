"""DGN-AM: the worked step, a generator that learns and is stored, a search that climbs inside its bounds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.activation_maximisation import unit_activation
from convince.explain.dgn_am import DgnAm, Generator, am_report, dgn_am, feature_inverter, pixel_am, read_generator, step, write_generator


class Net(nn.Module):
    """conv - ReLU - pool - 12 ReLU codes - 3 scores, on 8x8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.code, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(128, 12), nn.Linear(12, 3)

    def codes(self, x: Tensor) -> Tensor:
        return self.code(F.max_pool2d(self.conv(x).relu(), 2).flatten(1)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.codes(x))


@pytest.fixture(scope="module")
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Bright rows at one of eight heights, of some width."""
    gen = torch.Generator().manual_seed(1)
    x = torch.zeros(256, 1, 8, 8)
    for i, (row, wide) in enumerate(zip(torch.randint(8, (256,), generator=gen), torch.randint(3, 9, (256,), generator=gen), strict=True)):
        x[i, 0, row, :wide] = 1
    return x


@pytest.fixture(scope="module")
def made(net: Net, x: Tensor) -> Generator:
    return feature_inverter(net.codes, x, weights=(1.0, 0.1, 0.0), epochs=60, lr=2e-3)


def test_the_worked_step() -> None:
    y, g = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, -1.0]])
    found = step(y, g, 8.0, torch.tensor([0.0, 0.0]), torch.tensor([10.0, 10.0]), 0.99)
    torch.testing.assert_close(found, torch.tensor([[9.9, 0.99]]))
    zero = step(y, torch.zeros(1, 2), 8.0, torch.zeros(2), torch.full((2,), 10.0), 1.0)
    assert torch.equal(zero, y)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_only_the_direction_counts(factor: float, seed: int) -> None:
    y, g = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
    low, high = torch.full((4,), -1.0).double(), torch.ones(4).double()
    found = step(y, g, 0.5, low, high, 0.9)
    torch.testing.assert_close(found, step(y, factor * g, 0.5, low, high, 0.9))
    torch.testing.assert_close(found[1:2], step(y[1:2], g[1:2], 0.5, low, high, 0.9))
    assert bool((found.abs() <= 0.9).all())


@pytest.mark.parametrize(
    ("shape", "plane", "doublings"), [((1, 28, 28), (7, 7), 2), ((3, 32, 32), (8, 8), 2), ((1, 8, 8), (4, 4), 1), ((3, 20, 50), (3, 7), 3)]
)
def test_a_generator_of_any_size(shape: tuple[int, int, int], plane: tuple[int, int], doublings: int) -> None:
    made = Generator(5, shape)
    assert made.plane == plane
    assert made.first.out_features == 64 * math.prod(plane)
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in made.rest) == doublings
    found = made(torch.randn(2, 5))
    assert found.shape == (2, *shape)
    assert bool((found > 0).all() & (found < 1).all())


def test_the_range_of_codes() -> None:
    made = Generator(2, (1, 8, 8))
    codes = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    made.bound_by(codes, 3.0)
    assert made.low.tolist() == [0.0, 0.0]
    torch.testing.assert_close(made.high, torch.tensor([2 + 3 * 2**0.5, 2 + 3 * 8**0.5]))
    made.bound_by(codes - 2, 3.0)
    torch.testing.assert_close(made.low, torch.tensor([-3 * 2**0.5, -3 * 8**0.5]))
    drawn = made.draw(50, 0)
    assert torch.equal(drawn, made.draw(50, 0))
    assert bool((drawn >= made.low).all() & (drawn <= made.high).all())


def test_the_generator_gives_images_back(net: Net, x: Tensor, made: Generator) -> None:
    error, even = F.mse_loss(made(net.codes(x)), x), F.mse_loss(x.mean(0, keepdim=True).expand_as(x), x)
    assert error < 0.6 * even  # 12 codes of a random network tell not all rows apart
    assert not made.training
    state = torch.get_rng_state()
    a, b = (feature_inverter(net.codes, x[:64], epochs=1, seed=s) for s in (0, 0))  # with the discriminator
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_search_climbs_and_stays_inside(net: Net, made: Generator) -> None:
    target = torch.tensor([0, 1, 2])
    activation = unit_activation(net, target)
    y0 = made.draw(3, "start")
    y = dgn_am(activation, made, y0, steps=60)
    assert bool((activation(made(y)) > activation(made(y0))).all())
    assert bool((y >= made.low).all() & (y <= made.high).all())
    alone = dgn_am(unit_activation(net, target[1:2]), made, y0[1:2], steps=60)
    torch.testing.assert_close(y[1:2], alone)


@pytest.mark.parametrize("prior", ["l2", "tv", "blur"])
def test_the_search_among_pixels_climbs_too(net: Net, prior: str) -> None:
    activation, start = unit_activation(net, torch.tensor([0, 1])), torch.full((2, 1, 8, 8), 0.5)
    found = pixel_am(activation, start, prior, steps=20)
    assert bool((activation(found) > activation(start)).all())
    with pytest.raises(Mistake, match="prior='tva'"):
        pixel_am(activation, start, "tva")


def test_the_report_by_hand(net: Net, x: Tensor) -> None:
    images = torch.cat([x[:1], x[:1] * 0.5, x[1:2]])
    target = torch.tensor([0, 0, 1])
    found = am_report(images, target, net, net, x)
    chance = net(images).softmax(1)
    torch.testing.assert_close(found["chance"], chance[torch.arange(3), target])
    assert torch.equal(found["chance"], found["judge chance"])
    assert found["judged right"].tolist() == (chance.argmax(1) == target).float().tolist()
    pixels = x[0].sum().item()
    torch.testing.assert_close(found["nearest"][[0, 2]], torch.zeros(2))  # copies
    assert found["nearest"][1].item() <= 0.5 * pixels**0.5 + 1e-6
    torch.testing.assert_close(found["apart"], torch.tensor([0.5 * pixels**0.5, 0.5 * pixels**0.5, math.inf]))


def test_a_generator_is_stored_and_read(made: Generator, tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    write_generator(made, path)
    again = read_generator(path)
    y = made.draw(2, 0)
    assert torch.equal(made(y), again(y))
    assert torch.equal(made.high, again.high)
    (tmp_path / "other").write_text("no generator")
    with pytest.raises(Mistake, match="no generator that this part has stored"):
        read_generator(tmp_path / "other")


def test_the_part_teaches_once_and_then_reads(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    pixels = torch.rand(3, 1, 8, 8)
    found = DgnAm(images="digits", generator=str(path), steps=5, epochs=1, most=128)(net, pixels, torch.tensor([2, 0, 2]))
    assert found.map is None
    assert found.images["image"].shape == (3, 1, 8, 8)
    assert torch.equal(found.images["image"][0], found.images["image"][2])
    again = DgnAm(generator=str(path), steps=5)(net, pixels[:1], 0)  # other rows, no images to teach on
    torch.testing.assert_close(again.images["image"][0], found.images["image"][1])
    channel = DgnAm(generator=str(path), steps=5, layer="conv", unit=3)(net, pixels, 0)
    assert channel.table == {"layer": "conv", "units": [3]}
    with pytest.raises(Mistake, match="dgn-am: channel 8 of layer 'conv'"):
        DgnAm(generator=str(path), layer="conv", unit=8)(net, pixels, 0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(Mistake, match=r"makes images \(1, 8, 8\), and the answer takes \(1, 12, 12\)"):
        DgnAm(generator=str(path))(wide, torch.rand(1, 1, 12, 12), 0)


def test_the_part_refuses_in_words(net: Net) -> None:
    with pytest.raises(Mistake, match="name the images to teach it on"):
        DgnAm()(net, torch.rand(1, 1, 8, 8), 0)
    with pytest.raises(Mistake, match=r"decay=1\.5"):
        DgnAm(decay=1.5)
    with pytest.raises(Mistake, match="give three numbers"):
        DgnAm(weights=(1.0, -1.0, 0.0))
    with pytest.raises(Mistake, match=r"images=digits are \(1, 8, 8\), and the answer takes \(3, 8, 8\)"):
        DgnAm(images="digits")(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), torch.rand(1, 3, 8, 8), 0)
