"""Make some 200 malformed or odd image files, each with what a careful reader should do: "ok" or "skip".

``python tests/make_malformed.py OUT`` writes them below OUT and prints the outcome expected of each.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF"}


@dataclass(frozen=True)
class Odd:
    """One file: its name, its bytes, and whether it should be read ("ok") or listed ("skip")."""

    name: str
    raw: bytes
    outcome: str


def picture(height: int = 24, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth picture with some noise, uint8 [h w c], or [h w] for one channel."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 5 + columns * 3 + rng.integers(0, 20, (height, width)) + 40 * c for c in range(channels)]
    pixels = (np.stack(planes, -1) % 256).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    """The bytes of an image in a format."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, colour: int, depth: int, body: bytes) -> bytes:
    """A PNG with any header a person can think of."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def cases() -> Iterator[Odd]:
    """All files, in groups."""
    yield from truncated()
    yield from disguised()
    yield from headers()
    yield from sizes()
    yield from colours()
    yield from animated()
    yield from turned()
    yield from named()


def truncated() -> Iterator[Odd]:
    """Six formats, each cut at eight places, then with bytes flipped."""
    for suffix, kind in FORMATS.items():
        raw = encoded(picture(64, 64), kind)
        for percent in (0, 1, 5, 10, 25, 50, 75, 90):
            yield Odd(f"cut-{percent:02d}.{suffix}", raw[: len(raw) * percent // 100], "skip")
        yield Odd(f"whole.{suffix}", raw, "ok")
        yield Odd(f"trailing-junk.{suffix}", raw + b"junk" * 50, "any" if kind == "TIFF" else "ok")
        rng = np.random.default_rng(len(raw))
        for number in range(4):
            noisy = bytearray(raw)
            for at in rng.integers(0, len(raw), 12):
                noisy[at] ^= 0x55
            yield Odd(f"flipped-{number}.{suffix}", bytes(noisy), "any")
        yield Odd(f"first-byte.{suffix}", b"\x00" + raw[1:], "skip")
        yield Odd(f"doubled-start.{suffix}", raw[:20] + raw, "any")


def disguised() -> Iterator[Odd]:
    """Things that are no images under image names, and images under wrong names."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as pack:
        pack.writestr("a.txt", "hello")
    foreign = {
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "zip": archive.getvalue(),
        "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
        "xml": b"<?xml version='1.0'?><a/>",
        "text": b"just some words\n" * 10,
        "json": b'{"label": 3}',
        "zeros": bytes(5000),
        "ones": b"\xff" * 5000,
        "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00" + bytes(30),
        "elf": b"\x7fELF\x02\x01\x01" + bytes(100),
        "wav": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(30),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "psd": b"8BPS\x00\x01" + bytes(60),
        "ico": b"\x00\x00\x01\x00\x01\x00" + bytes(60),
        "heic": b"\x00\x00\x00\x18ftypheic" + bytes(60),
        "noise": np.random.default_rng(3).bytes(4000),
    }
    for kind, raw in foreign.items():
        yield Odd(f"{kind}-as.jpg", raw, "skip")
        yield Odd(f"{kind}-as.png", raw, "skip")
    suffixes = list(FORMATS)
    for place, (suffix, kind) in enumerate(FORMATS.items()):
        wrong = suffixes[(place + 1) % len(suffixes)]
        yield Odd(f"{suffix}-really.{wrong}", encoded(picture(), kind), "ok")
        yield Odd(f"{suffix}-without-suffix-{place}", encoded(picture(), kind), "ok")
    yield Odd("upper.JPG", encoded(picture(), "JPEG"), "ok")
    yield Odd("image.txt", encoded(picture(), "PNG"), "ok")
    yield Odd("notes.txt", b"not an image", "skip")
    for suffix in FORMATS:
        yield Odd(f"empty.{suffix}", b"", "skip")
    yield Odd("one-byte.jpg", b"\xff", "skip")


def headers() -> Iterator[Odd]:
    """Headers that lie: bombs, zero sizes, unknown colour types, missing data."""
    rows = zlib.compress(bytes(20001 * 100))
    yield Odd("bomb-200-megapixels.png", png(20000, 10000, 0, 8, rows), "skip")
    yield Odd("bomb-200-megapixels-rgb.png", png(20000, 10000, 2, 8, rows), "skip")
    yield Odd("bomb-widest.png", png(2**31 - 1, 2**31 - 1, 2, 8, rows), "skip")
    yield Odd("bomb.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded(picture(8, 8), "GIF")[10:], "skip")
    bmp = bytearray(encoded(picture(8, 8), "BMP"))
    bmp[18:26] = struct.pack("<ii", 20000, 10000)
    yield Odd("bomb.bmp", bytes(bmp), "skip")
    yield Odd("bomb.ppm", b"P6\n20000 10000\n255\n" + bytes(100), "skip")
    jpeg = encoded(picture(16, 16), "JPEG")
    at = jpeg.index(b"\xff\xc0")
    yield Odd("bomb.jpg", jpeg[: at + 5] + struct.pack(">HH", 60000, 60000) + jpeg[at + 9 :], "skip")
    yield Odd("no-rows.jpg", jpeg[: at + 5] + struct.pack(">HH", 0, 16) + jpeg[at + 9 :], "skip")
    yield Odd("no-columns.png", png(0, 5, 2, 8, rows), "skip")
    yield Odd("no-rows.png", png(5, 0, 2, 8, rows), "skip")
    yield Odd("colour-type-7.png", png(5, 5, 7, 8, rows), "skip")
    yield Odd("depth-3.png", png(5, 5, 2, 3, rows), "skip")
    yield Odd("palette-missing.png", png(5, 5, 3, 8, zlib.compress(bytes(30))), "any")
    yield Odd("data-missing.png", png(5, 5, 2, 8, b""), "skip")
    yield Odd("data-not-packed.png", png(5, 5, 2, 8, b"abcdefgh"), "skip")
    good = encoded(picture(16, 16), "PNG")
    spot = good.index(b"IDAT") + 20
    yield Odd("wrong-checksum.png", good[:spot] + bytes([good[spot] ^ 1]) + good[spot + 1 :], "skip")
    yield Odd("text-bomb.png", good[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20))) + good[33:], "any")
    yield Odd("header-only.jpg", jpeg[:at], "skip")
    yield Odd("negative-size.bmp", bytes(bmp[:18]) + struct.pack("<ii", -5, 5) + bytes(bmp[26:]), "skip")
    yield Odd("loop.tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "skip")
    yield Odd("far-directory.tif", b"II*\0\xff\xff\xff\x7f" + bytes(20), "skip")
    yield Odd("many-entries.tif", b"II*\0\x08\0\0\0\xff\xff" + bytes(64), "skip")
    yield Odd("words.ppm", b"P6\nten ten\n255\n" + bytes(300), "skip")
    yield Odd("short.ppm", b"P6\n10 10\n255\n" + bytes(100), "skip")
    yield Odd("maxval-0.ppm", b"P6\n2 2\n0\n" + bytes(12), "skip")


def sizes() -> Iterator[Odd]:
    """One pixel, one row, one column."""
    for suffix, kind in FORMATS.items():
        yield Odd(f"one-pixel.{suffix}", encoded(picture(1, 1), kind), "ok")
    yield Odd("one-row.png", encoded(Image.new("RGB", (65500, 1), "red"), "PNG"), "ok")
    yield Odd("one-row.jpg", encoded(Image.new("RGB", (65500, 1), "red"), "JPEG"), "ok")
    yield Odd("one-column.png", encoded(Image.new("L", (1, 65500), 90), "PNG"), "ok")
    yield Odd("one-column.jpg", encoded(Image.new("RGB", (1, 65500), "blue"), "JPEG"), "ok")
    yield Odd("one-row.bmp", encoded(Image.new("RGB", (5000, 1), "red"), "BMP"), "ok")
    yield Odd("two-pixels.gif", encoded(picture(1, 2), "GIF"), "ok")
    yield Odd("megapixels.png", encoded(Image.new("L", (2000, 1500), 7), "PNG"), "ok")


def colours() -> Iterator[Odd]:
    """Every way to write colours down."""
    rgb, alpha = Image.fromarray(picture()), Image.fromarray(picture(channels=4))
    yield Odd("cmyk.jpg", encoded(rgb.convert("CMYK"), "JPEG"), "ok")
    yield Odd("cmyk.tif", encoded(rgb.convert("CMYK"), "TIFF"), "ok")
    yield Odd("ycbcr.tif", encoded(rgb.convert("YCbCr"), "TIFF"), "ok")
    yield Odd("lab-colours.tif", encoded(Image.new("LAB", (8, 8)), "TIFF"), "skip")
    yield Odd("grey.jpg", encoded(rgb.convert("L"), "JPEG"), "ok")
    yield Odd("bits.png", encoded(rgb.convert("1"), "PNG"), "ok")
    yield Odd("bits.tif", encoded(rgb.convert("1"), "TIFF"), "ok")
    yield Odd("bits.bmp", encoded(rgb.convert("1"), "BMP"), "ok")
    yield Odd("bits.pbm", encoded(rgb.convert("1"), "PPM"), "ok")
    yield Odd("grey.pgm", encoded(rgb.convert("L"), "PPM"), "ok")
    yield Odd("palette.png", encoded(rgb.quantize(16), "PNG"), "ok")
    yield Odd("palette-one-clear.png", encoded(rgb.quantize(16), "PNG", transparency=3), "ok")
    yield Odd("palette-alpha.png", encoded(rgb.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))), "ok")
    yield Odd("palette-clear.gif", encoded(rgb.quantize(16), "GIF", transparency=2), "ok")
    yield Odd("rgb-one-clear.png", encoded(rgb, "PNG", transparency=(1, 2, 3)), "ok")
    yield Odd("grey-one-clear.png", encoded(rgb.convert("L"), "PNG", transparency=9), "ok")
    yield Odd("rgba.png", encoded(alpha, "PNG"), "ok")
    yield Odd("rgba.webp", encoded(alpha, "WEBP"), "ok")
    yield Odd("rgba.tif", encoded(alpha, "TIFF"), "ok")
    yield Odd("grey-alpha.png", encoded(alpha.convert("LA"), "PNG"), "ok")
    deep = Image.fromarray(picture(channels=1).astype(np.uint16) * 257)
    yield Odd("grey-16.png", encoded(deep, "PNG"), "ok")
    yield Odd("grey-16.tif", encoded(deep, "TIFF"), "ok")
    body = b"".join(b"\0" + np.arange(i, i + 18, dtype=">u2").tobytes() for i in range(6))
    yield Odd("rgb-16.png", png(6, 6, 2, 16, zlib.compress(body)), "ok")
    yield Odd("grey-16.pgm", b"P5\n4 4\n65535\n" + np.arange(16, dtype=">u2").tobytes(), "ok")
    unit = picture(channels=1).astype(np.float32) / 255
    yield Odd("float.tif", encoded(unit, "TIFF"), "ok")
    yield Odd("float-255.tif", encoded(unit * 255, "TIFF"), "ok")
    yield Odd("float-wide.tif", encoded(unit * 9000 - 400, "TIFF"), "ok")
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus-inf", -np.inf)):
        broken = unit.copy()
        broken[3, 4] = value
        yield Odd(f"{name}.tif", encoded(broken, "TIFF"), "skip")
    yield Odd("int-32.tif", encoded(Image.fromarray(picture(channels=1).astype(np.int32) * 200), "TIFF"), "ok")
    yield Odd("int-32-negative.tif", encoded(Image.fromarray(picture(channels=1).astype(np.int32) - 9), "TIFF"), "skip")
    yield Odd("progressive.jpg", encoded(rgb, "JPEG", progressive=True), "ok")
    yield Odd("interlaced-quality-1.jpg", encoded(rgb, "JPEG", quality=1), "ok")
    for packing in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        yield Odd(f"{packing}.tif", encoded(rgb, "TIFF", compression=packing), "ok")
    yield Odd("lossless.webp", encoded(rgb, "WEBP", lossless=True), "ok")
    yield Odd("broken-profile.png", encoded(rgb, "PNG", icc_profile=b"not a profile"), "ok")
    yield Odd("broken-profile.jpg", encoded(rgb, "JPEG", icc_profile=b"not a profile"), "ok")


def animated() -> Iterator[Odd]:
    """Several frames or pages."""
    frames = [Image.fromarray(picture(seed=n)) for n in range(3)]
    for suffix in ("gif", "webp", "png", "tif"):
        raw = encoded(frames[0], FORMATS[suffix], save_all=True, append_images=frames[1:])
        yield Odd(f"frames.{suffix}", raw, "ok")
    yield Odd("frames-cut.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])[:-200], "any")
    yield Odd("two-pictures.jpg", encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), "ok")


def turned() -> Iterator[Odd]:
    """EXIF orientations 1 to 8, two that do not exist, and EXIF that is damaged."""
    for turn in (*range(1, 9), 0, 99):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield Odd(f"exif-{turn}.jpg", encoded(picture(), "JPEG", exif=exif), "ok")
        if turn in (3, 6, 8):
            yield Odd(f"exif-{turn}.png", encoded(picture(), "PNG", exif=exif), "ok")
            yield Odd(f"exif-{turn}.webp", encoded(picture(), "WEBP", exif=exif), "ok")
            yield Odd(f"exif-{turn}.tif", encoded(picture(), "TIFF", exif=exif), "ok")
    for number, junk in enumerate((b"Exif\0\0junk", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff")):
        yield Odd(f"exif-damaged-{number}.jpg", encoded(picture(), "JPEG", exif=junk), "ok")


def named() -> Iterator[Odd]:
    """Names that trip programs."""
    raw = encoded(picture(8, 8), "PNG")
    for name in (
        "two\nlines.png", "tab\there.png", "grüße ŝ.png", "猫.png", "🐈.png", "a" * 240 + ".png", "-dash.png", "--help",
        "quote\"'.png", "semi;comma,.png", "%s%d.png", "$(echo).png", "back\\slash.png", "*.png", " lead.png", "trail .png",
    ):  # fmt: skip
        yield Odd(name, raw, "ok")
    for name in (".hidden.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        yield Odd(name, raw, "skip")


def make(folder: Path) -> dict[str, str]:
    """Write all files into ``folder``; name -> "ok", "skip", or "any" (either, but one of them).

    Folders, links and closed files are among them; what the system cannot make is left out of the answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for odd in cases():
        assert odd.name not in expected, odd.name
        (folder / odd.name).write_bytes(odd.raw)
        expected[odd.name] = odd.outcome
    for name in ("folder.jpg", "empty-folder"):
        (folder / name).mkdir()
        expected[name] = "skip"
    (folder / "folder.jpg" / "inside.png").write_bytes(encoded(picture(), "PNG"))
    raw_name = os.fsdecode(b"bytes-\xff\xfe.png")
    (folder / raw_name).write_bytes(encoded(picture(), "PNG"))
    expected[raw_name] = "ok"
    links = {"loop-a.png": "loop-b.png", "loop-b.png": "loop-a.png", "self.png": "self.png", "gone.png": "nowhere.png"}
    for name, target in {**links, "up": ".."}.items():
        (folder / name).symlink_to(target)
        expected[name] = "skip"
    (folder / "good-link.png").symlink_to("whole.png")
    expected["good-link.png"] = "ok"
    os.mkfifo(folder / "pipe.png")
    expected["pipe.png"] = "skip"
    closed = folder / "closed.png"
    closed.write_bytes(encoded(picture(), "PNG"))
    closed.chmod(0)
    expected["closed.png"] = "ok" if os.access(closed, os.R_OK) else "skip"
    return expected


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/make_malformed.py OUT")
    for written, outcome in sorted(make(Path(sys.argv[1])).items()):
        print(f"{outcome}\t{written!r}")
