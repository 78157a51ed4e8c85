"""Overlay: worked colours, flat and broken maps, sizes, and inputs left alone."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from convince.errors import Mistake
from convince.report.overlay import colours, normalised, overlay
from convince.report.pictures import rgb, shown


def test_worked_numbers() -> None:
    image = np.array([[0, 100, 200]], np.uint8)
    heat = np.array([[-1.0, 0.0, 1.0]])
    # viridis at 0, .5, 1 is (68 1 84), (33 145 140), (253 231 37); 0.4 grey + 0.6 colour
    expected = [[41, 1, 50], [60, 127, 124], [232, 219, 102]]
    assert overlay(image, heat).tolist() == [expected]


def test_colours_follow_matplotlibs_viridis() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    share = np.linspace(0, 1, 101)
    theirs = matplotlib.colormaps["viridis"](share)[:, :3] * 255
    assert np.abs(colours(share) - theirs).max() < 5  # of 255
    light = colours(share) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(light) > 0).all()


def test_a_flat_map_gives_the_grey_picture() -> None:
    image = np.full((2, 3, 3), (255, 0, 0), np.uint8)
    for heat in (np.zeros((2, 3)), np.full((2, 3), 7.5), np.full((2, 3), np.nan), np.full((1, 1), np.inf)):
        assert (overlay(image, heat) == 76).all()
    assert normalised(np.ones((2, 2))) is None


def test_pixels_without_a_number_show_the_picture() -> None:
    image = np.full((1, 3), 100, np.uint8)
    out = overlay(image, np.array([[0.0, np.nan, 1.0]]))
    assert out[0, 1].tolist() == [100, 100, 100]
    assert out[0, 0].tolist() != [100, 100, 100]
    assert normalised(np.array([[2.0, np.inf, 4.0]]))[0].tolist()[::2] == [0, 1]  # type: ignore[index]


def test_a_coarse_map_is_scaled_to_the_picture() -> None:
    out = overlay(np.zeros((8, 6, 3), np.uint8), np.array([[0.0, 1.0], [0.0, 1.0]]))
    assert out.shape == (8, 6, 3)
    assert out.dtype == np.uint8
    assert out[0, 0].tolist() == [41, 1, 50]
    assert (np.diff(out[0, :, 1].astype(int)) >= 0).all()
    assert overlay(np.zeros((2, 2), np.uint8), np.eye(9)).shape == (2, 2, 3)


def test_inputs_are_left_alone_and_strength_zero_is_the_grey_picture() -> None:
    image, heat = np.full((2, 2), 9, np.uint8), np.eye(2)
    image.flags.writeable = heat.flags.writeable = False
    assert (overlay(image, heat, strength=0) == 9).all()


def test_errors_name_what_came() -> None:
    with pytest.raises(Mistake, match=r"\[2, 2, 1\]"):
        overlay(np.zeros((2, 2), np.uint8), np.zeros((2, 2, 1)))
    with pytest.raises(Mistake, match="float64"):
        overlay(np.zeros((2, 2)), np.zeros((2, 2)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels_becomes_three(channels: int) -> None:
    image = np.full((2, 2, channels), 10, np.uint8)
    assert rgb(image).shape == (2, 2, 3)
    if channels == 4:  # over white: 10 * 10/255 + 255 * 245/255
        assert (rgb(image) == 245).all()


def test_small_pictures_survive_exactly() -> None:
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    out = shown(image)
    assert out.crisp
    raw = base64.b64decode(out.uri.removeprefix("data:image/png;base64,"))
    assert (np.asarray(Image.open(io.BytesIO(raw))) == image).all()
    assert shown(np.zeros((65, 65), np.uint8)).uri.startswith("data:image/webp;base64,")
    assert (shown(np.zeros((1000, 500, 3), np.uint8)).width, shown(np.zeros((1, 2000), np.uint8)).width) == (160, 320)
