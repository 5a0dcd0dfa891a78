"""Drawing with NumPy and Pillow: numbers as colours, pictures beside each other with captions, a scale of the colours.

A picture is an array [height, width, 3] uint8, RGB.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_static.common.io import write_atomically

# From dark to light with rising lightness, so that it is read alike in grey and with any eyes: place, RGB.
_COLOURS = ((0.0, 9, 8, 36), (0.25, 84, 18, 112), (0.5, 188, 48, 88), (0.75, 244, 132, 36), (1.0, 252, 250, 174))
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)
_FONT_SIZE, _LINE, _MARGIN = 14, 20, 12  # pixels
_WHOLE_FROM = 3  # an image enlarged so many times shows its pixels as squares; less, and they are interpolated


def colours(values: np.ndarray) -> np.ndarray:
    """Values 0-1 (what lies outside is cut off), [...], to colours [..., 3] uint8: dark for 0, light for 1."""
    places, *channels = np.array(_COLOURS).T
    mixed = np.stack([np.interp(values, places, channel) for channel in channels], axis=-1)
    return mixed.round().astype(np.uint8)


def squares(values: np.ndarray, side: int) -> np.ndarray:
    """Each of [height, width, ...] as side x side pixels."""
    return values.repeat(side, axis=0).repeat(side, axis=1)


def scaled(picture: np.ndarray, least: int, most: int) -> np.ndarray:
    """Enlarged by a whole factor until its shorter side has about `least` pixels; made smaller if it has over `most`.

    A few pixels become squares, as they are what the model saw; a photo is interpolated.
    """
    height, width = picture.shape[:2]
    factor = max(round(least / min(height, width)), 1)
    if factor >= _WHOLE_FROM:
        return squares(picture, factor)
    scale = min(factor, most / min(height, width))
    if scale == 1.0:
        return picture
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def heat(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values 0-1 of patches, [rows, columns], as colours over the picture, which is made grey; light where they are 1.

    Between the patches' centres they are interpolated.
    """
    grey = picture @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601's luma
    return (0.3 * grey[..., None] + 0.7 * colours(_smooth(values, picture))).round().astype(np.uint8)


def darkened(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The picture times values 0-1 of patches, [rows, columns], interpolated: black where they are 0."""
    return (picture * _smooth(values, picture)[..., None]).round().astype(np.uint8)


def _smooth(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    patches = Image.fromarray(values.astype(np.float32))
    return np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC)).clip(0.0, 1.0)


def sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str] | None,
    columns: int,
    title: str,
    *,
    gap: int = _MARGIN,
    scale: tuple[str, str] | None = None,
) -> np.ndarray:
    """Pictures of one size in rows of `columns`, each below its caption, `gap` pixels apart; a title of one or more
    lines above; with `scale`, to the right, the colours with the words for 0 and for 1. Captions are cut off at
    their picture's end."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    line = 0 if captions is None else _LINE
    font = ImageFont.load_default(_FONT_SIZE)
    titles = title.splitlines()
    top = _MARGIN + _LINE * len(titles)
    inner_width = columns * (width + gap) - gap
    inner_height = rows * (height + line + gap) - gap
    bar = 0 if scale is None else 3 * _MARGIN + max(int(font.getlength(word)) for word in scale)
    total_width = max(2 * _MARGIN + inner_width + bar, _MARGIN + max(int(font.getlength(row)) for row in titles) + 1)
    canvas = Image.new("RGB", (total_width, top + inner_height + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, row in enumerate(titles):
        draw.text((_MARGIN, _MARGIN // 2 + _LINE * number), row, _INK, font)
    for number, picture in enumerate(pictures):
        x = _MARGIN + number % columns * (width + gap)
        y = top + number // columns * (height + line + gap)
        if captions is not None:
            draw.text((x, y), shortened(captions[number], width, font), _INK, font)
        canvas.paste(Image.fromarray(picture), (x, y + line))
    if scale is not None:
        x, y = _MARGIN + inner_width + _MARGIN, top + line
        length = inner_height - line
        ramp = colours(np.linspace(1.0, 0.0, length))[:, None].repeat(_MARGIN, axis=1)
        canvas.paste(Image.fromarray(ramp), (x, y))
        draw.text((x + _MARGIN + 4, y), scale[1], _INK, font)
        draw.text((x + _MARGIN + 4, y + length), scale[0], _INK, font, anchor="ls")
    return np.asarray(canvas)


def shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of the text as `width` pixels hold."""
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text


def thumbnail(encoded: bytes, longest: int) -> bytes:
    """An image file made small, as a JPEG file: its longer side has at most `longest` pixels.

    Raises OSError, and whatever a decoder raises of a file that is broken.
    """
    with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "BMP", "WEBP", "TIFF")) as image:
        image.draft("RGB", (longest, longest))  # a JPEG needn't be decoded whole
        image.thumbnail((longest, longest))
        file = io.BytesIO()
        image.convert("RGB").save(file, format="JPEG", quality=80)
    return file.getvalue()


def write_png(picture: np.ndarray, path: Path) -> None:
    with write_atomically(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
