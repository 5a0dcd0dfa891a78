"""Pixels of image files by Pillow's own functions, as the reference for all decoders of the program."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps


def pillow_pixels(source: Path | BinaryIO) -> tuple[str, np.ndarray | str]:
    """Return an image's format and mode, and its upright pixels on white, [height, width, 3] uint8.

    The pixels are the reason, if Pillow can't read the file.
    """
    kind = "unidentified"
    # From a path, Pillow 13 maps an uncompressed RGBA or CMYK TIFF with an orientation into memory, and scrambles it.
    content = io.BytesIO(source.read_bytes()) if isinstance(source, Path) else source
    try:
        with Image.open(content) as opened:
            kind = f"{opened.format} {opened.mode}"
            opened.load()
            return kind, _upright_on_white(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's plugins raise many types
        return kind, f"{type(error).__name__}: {error}"


def _upright_on_white(image: Image.Image) -> np.ndarray:
    transparent = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):  # as documented: 0 to 1, or 0 to 65535
        values = np.asarray(image, np.float64)
        levels = np.nan_to_num(values * 255.0 if image.mode == "F" else values / 257.0).clip(0, 255)
        image = Image.fromarray(levels.round().astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(((values != transparent) * 255).astype(np.uint8)))
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
