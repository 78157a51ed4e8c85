"""A contact sheet: each image with its maps beside it, as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from convince.report.overlay import overlay

CELL, GAP, TEXT = 160, 8, 34


def write_sheet(path: Path, images: list[np.ndarray], rows: list[dict[str, Any]], maps: dict[str, np.ndarray]) -> Path:
    """Write the sheet: one row an image (uint8 [h w c]), first the image, then each method's map [n h w] laid over it."""
    width = GAP + (CELL + GAP) * (1 + len(maps))
    sheet = Image.new("RGB", (width, TEXT + GAP + len(images) * (CELL + TEXT + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(["image", *maps]):
        draw.text((GAP + column * (CELL + GAP), GAP), title, fill="black", font=font)
    for i, (image, row) in enumerate(zip(images, rows, strict=True)):
        top = TEXT + i * (CELL + TEXT + GAP)
        pictures = [image, *(overlay(image, found[i]) for found in maps.values())]
        for column, picture in enumerate(pictures):
            sheet.paste(_fitted(picture), (GAP + column * (CELL + GAP), top))
        words = f"{row['label']} {row['probability']:.0%}  {Path(row['file']).name}"
        draw.text((GAP, top + CELL + 4), words.encode("latin-1", "replace").decode("latin-1"), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _fitted(picture: np.ndarray) -> Image.Image:
    picture = picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
    image = Image.fromarray(picture).convert("RGB")
    scale = CELL / max(image.size)
    resample = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
