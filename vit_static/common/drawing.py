"""Image composition with NumPy and Pillow: colormaps, heat-map overlays, grids with captions and a colour bar.

A picture is an array [height, width, 3] uint8, RGB.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vit_static.common.io import write_bytes

# (value, R, G, B): lightness rises with the value, so the map also reads well in grey and for colour-blind readers.
_COLORMAP = ((0.0, 9, 8, 36), (0.25, 84, 18, 112), (0.5, 188, 48, 88), (0.75, 244, 132, 36), (1.0, 252, 250, 174))
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)
_FONT_SIZE, _LINE_HEIGHT, _MARGIN = 14, 20, 12  # pixels
_MIN_NEAREST_FACTOR = 3  # enlarged by this factor or more, a picture shows its pixels as squares; below, it is smoothed

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def apply_colormap(values: np.ndarray) -> np.ndarray:
    """Map values from 0 to 1, [...], to colours [..., 3] uint8, from dark to light; other values are clipped."""
    positions, *channels = np.array(_COLORMAP).T
    colours = np.stack([np.interp(values, positions, channel) for channel in channels], axis=-1)
    return colours.round().astype(np.uint8)


def enlarge_pixels(values: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel of [height, width, ...] `factor` times along both axes."""
    return values.repeat(factor, axis=0).repeat(factor, axis=1)


def fit_for_display(picture: np.ndarray, min_side: int, max_side: int) -> np.ndarray:
    """Enlarge by an integer factor to a shorter side of about `min_side` pixels, or shrink to one of `max_side`.

    A picture of a few pixels keeps them as squares, because they are what the model receives; a photo is interpolated.
    """
    height, width = picture.shape[:2]
    factor = max(round(min_side / min(height, width)), 1)
    if factor >= _MIN_NEAREST_FACTOR:
        return enlarge_pixels(picture, factor)
    scale = min(factor, max_side / min(height, width))
    if scale == 1.0:
        return picture
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def overlay_heatmap(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Blend one value per patch, [rows, columns] from 0 to 1, as colours over the picture in grey.

    Values are interpolated between the patches' centres.
    """
    grey = picture @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
    return (0.3 * grey[..., None] + 0.7 * apply_colormap(_upsample(values, picture))).round().astype(np.uint8)


def darken(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Multiply the picture by one value per patch, [rows, columns] from 0 to 1, interpolated: black where it is 0."""
    return (picture * _upsample(values, picture)[..., None]).round().astype(np.uint8)


def _upsample(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    patches = Image.fromarray(values.astype(np.float32))
    return np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC)).clip(0.0, 1.0)


def image_grid(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str] | None,
    num_columns: int,
    title: str,
    *,
    gap: int = _MARGIN,
    colour_bar: tuple[str, str] | None = None,
) -> np.ndarray:
    """Arrange pictures of one size in rows of `num_columns`, `gap` pixels apart, each below its caption.

    The title, of one or more lines, stands above. `colour_bar` adds the colormap on the right, with these labels for 0
    and for 1. Captions are truncated to the width of a picture.
    """
    height, width = pictures[0].shape[:2]
    num_rows = -(-len(pictures) // num_columns)
    caption_height = 0 if captions is None else _LINE_HEIGHT
    font = ImageFont.load_default(_FONT_SIZE)
    title_lines = title.splitlines()
    top = _MARGIN + _LINE_HEIGHT * len(title_lines)
    grid_width = num_columns * (width + gap) - gap
    grid_height = num_rows * (height + caption_height + gap) - gap
    bar_width = 0 if colour_bar is None else 3 * _MARGIN + max(int(font.getlength(label)) for label in colour_bar)
    title_width = _MARGIN + max(int(font.getlength(line)) for line in title_lines) + 1
    total_width = max(2 * _MARGIN + grid_width + bar_width, title_width)
    canvas = Image.new("RGB", (total_width, top + grid_height + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, line in enumerate(title_lines):
        draw.text((_MARGIN, _MARGIN // 2 + _LINE_HEIGHT * index), line, _INK, font)
    for index, picture in enumerate(pictures):
        x = _MARGIN + index % num_columns * (width + gap)
        y = top + index // num_columns * (height + caption_height + gap)
        if captions is not None:
            draw.text((x, y), truncate_to_width(captions[index], width, font), _INK, font)
        canvas.paste(Image.fromarray(picture), (x, y + caption_height))
    if colour_bar is not None:
        x, y = _MARGIN + grid_width + _MARGIN, top + caption_height
        length = grid_height - caption_height
        bar = apply_colormap(np.linspace(1.0, 0.0, length))[:, None].repeat(_MARGIN, axis=1)
        canvas.paste(Image.fromarray(bar), (x, y))
        draw.text((x + _MARGIN + 4, y), colour_bar[1], _INK, font)
        draw.text((x + _MARGIN + 4, y + length), colour_bar[0], _INK, font, anchor="ls")
    return np.asarray(canvas)


def truncate_to_width(text: str, width: int, font: Font) -> str:
    """Return as much of the text as fits into `width` pixels, with an ellipsis where something is left out."""
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text


def thumbnail(encoded: bytes, max_side: int) -> bytes:
    """Shrink an image file, made upright by its EXIF data, to a JPEG file with sides of at most `max_side` pixels.

    Raises OSError, and whatever else a decoder raises for a damaged file.
    """
    with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP", "PPM")) as image:
        image.draft("RGB", (max_side, max_side))  # decodes a JPEG at a reduced size
        image.thumbnail((max_side, max_side))
        file = io.BytesIO()
        ImageOps.exif_transpose(image).convert("RGB").save(file, format="JPEG", quality=80)
    return file.getvalue()


def write_png(picture: np.ndarray, path: Path) -> None:
    """Write the picture as a PNG file, atomically."""
    file = io.BytesIO()  # Pillow doesn't notice a short write to a full disk
    Image.fromarray(picture).save(file, format="PNG")
    write_bytes(file.getvalue(), path)
