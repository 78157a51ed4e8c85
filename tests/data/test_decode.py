"""The decoding policy, row by row, with worked numbers."""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convince.data import Preprocess, Unreadable, decode, read_files
from convince.data.decode import look

TWO_BY_THREE = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
# what a viewer shows for each EXIF orientation of the stored rows above
UPRIGHT = {
    1: [[10, 20, 30], [40, 50, 60]],
    2: [[30, 20, 10], [60, 50, 40]],
    3: [[60, 50, 40], [30, 20, 10]],
    4: [[40, 50, 60], [10, 20, 30]],
    5: [[10, 40], [20, 50], [30, 60]],
    6: [[40, 10], [50, 20], [60, 30]],
    7: [[60, 30], [50, 20], [40, 10]],
    8: [[30, 60], [20, 50], [10, 40]],
}


def raw(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("turn", UPRIGHT)
def test_exif_orientation(turn: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    wanted = torch.tensor(UPRIGHT[turn], dtype=torch.uint8)
    data = raw(TWO_BY_THREE, kind, exif=exif)
    assert torch.equal(decode(data, 1, tuple(wanted.shape), "stretch")[0], wanted)
    assert look(data) == (tuple(wanted.shape), True)


@pytest.mark.parametrize("fit", ["letterbox", "crop", "stretch"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_photograph_is_the_upright_one(turn: int, fit: str) -> None:
    rows, columns = np.mgrid[0:480, 0:640]
    upright = np.stack([rows // 3, columns // 4, (rows + columns) // 6], -1).astype(np.uint8)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]  # Image.Transpose members that store it
    stored = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = turn
    a = decode(raw(upright, "JPEG", quality=98), 3, (24, 32), fit).int()
    b = decode(raw(stored, "JPEG", quality=98, exif=exif), 3, (24, 32), fit).int()
    assert (a - b).abs().max() <= 3


def test_letterbox_by_hand() -> None:
    """A 2 x 4 image into 4 x 4: scaled by 1, one grey row above and below."""
    x = decode(raw(np.full((2, 4), 200, np.uint8)), 1, (4, 4), "letterbox")[0]
    assert x.tolist() == [[128] * 4, [200] * 4, [200] * 4, [128] * 4]


def test_letterbox_scales_up_and_rounds() -> None:
    """A 1 x 3 image into 8 x 8: 8/3 = 2.67 times, so 3 rows (2.67 rounded) between 2 and 3 grey ones."""
    x = decode(raw(np.full((1, 3), 9, np.uint8)), 1, (8, 8), "letterbox")[0]
    assert (x == 9).all(1).nonzero().flatten().tolist() == [2, 3, 4]
    assert (x == 128).all(1).sum() == 5


def test_crop_takes_the_centre() -> None:
    pixels = np.repeat(np.array([[0, 50, 100, 150]], np.uint8), 2, 0)
    assert decode(raw(pixels), 1, (2, 2), "crop")[0].tolist() == [[50, 100], [50, 100]]


def test_stretch_averages_when_it_shrinks() -> None:
    x = decode(raw(np.array([[0, 100], [200, 100]], np.uint8)), 1, (1, 1), "stretch")
    assert x.tolist() == [[[100]]]


def test_shrinking_is_antialiased() -> None:
    """A checkerboard of single pixels shrinks to even grey, not to a new pattern."""
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    x = decode(raw(board), 1, (8, 8), "stretch").int()
    assert (x - 127).abs().max() <= 2


@pytest.mark.parametrize("fit", ["letterbox", "crop", "stretch"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 65500), (65500, 1), (3, 7), (200, 100), (1000, 1001)])
def test_any_shape_fits(shape: tuple[int, int], fit: str) -> None:
    x = decode(raw(Image.new("L", shape[::-1], 77)), 3, (20, 30), fit)
    assert x.shape == (3, 20, 30)
    assert x.dtype == torch.uint8
    assert (x == 77).any()


def test_large_jpegs_are_reduced_but_look_the_same() -> None:
    rows, columns = np.mgrid[0:900, 0:1200]
    pixels = np.stack([rows // 4, columns // 5, (rows + columns) // 9], -1).astype(np.uint8)
    a = decode(raw(pixels, "JPEG", quality=98), 3, (96, 96)).int()
    b = decode(raw(pixels, "PNG"), 3, (96, 96)).int()
    assert (a - b).abs().max() <= 4


def one(image: Image.Image | np.ndarray, channels: int = 3, kind: str = "PNG", **options: object) -> list[int]:
    """The one colour of an even image."""
    x = decode(raw(image, kind, **options), channels, (4, 4), "stretch").flatten(1)
    assert (x == x[:, :1]).all()
    return x[:, 0].tolist()


def test_alpha_is_composited_on_white() -> None:
    assert one(Image.new("RGBA", (4, 4), (0, 100, 200, 0))) == [255, 255, 255]
    assert one(Image.new("RGBA", (4, 4), (0, 100, 200, 255))) == [0, 100, 200]
    assert one(Image.new("RGBA", (4, 4), (0, 0, 0, 51))) == [204, 204, 204]  # 255 * (1 - 51/255)
    assert one(Image.new("LA", (4, 4), (0, 51)), channels=1) == [204]


def test_palettes_with_and_without_alpha() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert one(image) == [10, 20, 30]
    assert one(image, transparency=1) == [255, 255, 255]
    assert one(image, kind="GIF") == [10, 20, 30]


def test_cmyk_grey_and_colour() -> None:
    assert one(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), kind="TIFF") == [0, 255, 255]
    assert one(Image.new("L", (4, 4), 33)) == [33, 33, 33]
    assert one(Image.new("RGB", (4, 4), (255, 0, 0)), channels=1) == [76]  # 0.299 * 255
    assert one(Image.new("1", (4, 4), 1), channels=1) == [255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(kind: str) -> None:
    for deep, eight in ((0, 0), (65535, 255), (257 * 77, 77), (128, 0), (129, 1), (32768, 128)):
        assert one(np.full((4, 4), deep, np.uint16), 1, kind) == [eight], deep


def test_float_tiff() -> None:
    assert one(np.full((4, 4), 0.5, np.float32), 1, "TIFF") == [128]
    assert one(np.full((4, 4), 77.0, np.float32), 1, "TIFF") == [77]
    wide = np.tile(np.array([-100.0, 300.0, 140.0, 0.0], np.float32), (4, 1))
    x = decode(raw(wide, "TIFF"), 1, (4, 4), "stretch")[0, 0]
    assert x.tolist() == [0, 255, 153, 64]  # (v + 100) * 255 / 400
    for bad in (np.nan, np.inf):
        with pytest.raises(Unreadable, match="NaN or infinity"):
            decode(raw(np.full((4, 4), bad, np.float32), "TIFF"), 1, (4, 4))


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert one(frames[0], kind=kind, save_all=True, append_images=frames[1:], **options) == [255, 0, 0], kind


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really-a-png.jpg"
    path.write_bytes(raw(np.full((4, 4), 5, np.uint8)))
    assert decode(path, 1, (4, 4))[0, 0, 0] == 5
    for kind in ("ICO", "TGA", "PCX"):
        with pytest.raises(Unreadable):
            decode(raw(np.full((16, 16, 3), 5, np.uint8), kind), 1, (4, 4))


def test_bombs_are_refused_by_their_header() -> None:
    data = raw(Image.new("1", (2000, 1000)))
    with pytest.raises(Unreadable, match="2000 x 1000 pixels, allowed are 1000000"):
        decode(data, 1, (8, 8), limit_pixels=1_000_000)
    decode(data, 1, (8, 8), limit_pixels=2_000_000)


def test_the_message_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(Unreadable, match=r"page\.jpg: no image in an allowed format.*a web page"):
        decode(path, 3, (8, 8))
    with pytest.raises(Unreadable, match="no such file"):
        decode(tmp_path / "gone.jpg", 3, (8, 8))
    with pytest.raises(ValueError, match="letterbox"):
        decode(path, 3, (8, 8), "leterbox")


def test_unreadable_permissions(tmp_path: Path) -> None:
    path = tmp_path / "closed.png"
    path.write_bytes(raw(np.zeros((4, 4), np.uint8)))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file whatever its mode (root)")
    with pytest.raises(Unreadable, match="no permission"):
        decode(path, 1, (4, 4))
    path.chmod(stat.S_IRUSR)


def test_warnings_stay_inside_and_filters_come_back() -> None:
    data = raw(np.zeros((4, 4, 3), np.uint8), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda: [decode(data, 3, (4, 4)) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not seen
    assert list(warnings.filters) == before


def test_read_files_uses_what_was_stored(tmp_path: Path) -> None:
    pre = Preprocess("image", 1, (8, 6), "crop", (0.5,), (0.2,))
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    good.write_bytes(raw(np.full((9, 9, 3), 50, np.uint8)))
    bad.write_bytes(b"no")
    x, names, skipped = read_files([bad, good, str(good)], pre)
    assert x.shape == (2, 1, 8, 6)
    assert (x == 50).all()
    assert names == [str(good), str(good)]
    assert [row.file for row in skipped] == [str(bad)]
    assert read_files([], pre)[0].shape == (0, 1, 8, 6)


def test_preprocess_round_trip() -> None:
    for pre in (
        Preprocess("image", 3, (32, 48), "letterbox", (0.1, 1 / 3, 0.5), (0.2, 0.3, 0.4)),
        Preprocess("table", 2, (), "", (1e9, -3.5), (1.0, 2.0)),
    ):
        assert Preprocess.from_json(pre.to_json()) == pre
    with pytest.raises(ValueError, match="cannot be read"):
        Preprocess.from_json("{}")
