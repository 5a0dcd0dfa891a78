"""Image files for prediction: decoding to RGB arrays, and the files in folders and lists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vit_static.common.errors import PredictError, truncate
from vit_static.data.image_set import IMAGE_SUFFIXES, MAX_PIXELS

# The path of an image file, a Pillow image, or decoded pixels [height, width, 3] uint8, RGB
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray

# Pillow's other formats don't occur in training data, and one of them (EPS) runs a program.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")


def to_pixels(image: ImageLike) -> np.ndarray:
    """Return the image as [height, width, 3] uint8, RGB.

    Raises PredictError, with the image's path, for a file that can't be read and for an array of another type or shape.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise PredictError(
                f"an array of {image.dtype} {list(image.shape)} is not an image; pass uint8 [height, width, 3]"
            )
        return np.ascontiguousarray(image)  # DALI rejects views of other arrays
    return _to_rgb(image) if isinstance(image, Image.Image) else read_pixels(Path(image))


def read_pixels(
    source: Path | BinaryIO, name: str = "", *, formats: tuple[str, ...] = _FORMATS, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode an image file to [height, width, 3] uint8, RGB.

    Greyscale, palette and CMYK images are converted. Transparency is dropped, as in training. 16-bit greyscale is
    scaled to 8 bits, and floating-point values from 0-1 to 0-255. As in training, the EXIF orientation is not applied.

    Raises PredictError, with the path or with `name`, if the file can't be read, is of none of Pillow's `formats`, or
    has more than `max_pixels` pixels.
    """
    name = name or str(source)
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise PredictError(f"{name}: not a file; name an image file")
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > max_pixels:  # checked before the pixels are decoded
                raise PredictError(
                    f"{name}: has {image.width}x{image.height} pixels, and at most {max_pixels} are allowed; shrink it"
                )
            return _to_rgb(image)
    except PredictError:
        raise
    except UnidentifiedImageError:
        raise PredictError(f"{name}: can't be read as an image (unknown format)") from None
    except Exception as error:  # a damaged file can make a decoder raise anything
        reason = truncate(str(error), 150).removesuffix(f" {str(source)!r}") or type(error).__name__
        raise PredictError(f"{name}: can't be read as an image ({reason})") from None


def _to_grey(image: Image.Image, scale: float) -> Image.Image:
    """Scale pixel values to 8 bits; NaN becomes black."""
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.nan_to_num(np.asarray(image).astype(np.float64) * scale)
    return Image.fromarray(levels.clip(0.0, 255.0).round().astype(np.uint8))


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":  # values from 0 to 1, as DALI's decoder in training reads them
        image = _to_grey(image, 255.0)
    elif image.mode.startswith("I"):
        image = _to_grey(image, 1.0 / 257.0)
    return np.asarray(image.convert("RGB"))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the files in order, with each folder replaced by the image files in it and its subfolders, sorted by path.

    Raises PredictError for a path that doesn't exist and for a folder without images.
    """
    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            candidates = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            images_in_folder = sorted(file for file in candidates if not file.is_dir())
            if not images_in_folder:
                suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
                raise PredictError(f"{path}: no images in this folder; their names must end with one of {suffixes}")
            images += images_in_folder
        elif path.is_file():
            images.append(path)
        else:
            raise PredictError(f"{path}: no such file or folder")
    return images


def read_path_list(stream: BinaryIO) -> Iterator[Path]:
    """Yield the paths in a stream, one per line; blank lines are skipped."""
    for line in stream:
        path = line.rstrip(b"\r\n")
        if path.strip():
            yield Path(os.fsdecode(path))
