"""Read image files and find them in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vit_static.common.errors import PredictError, truncate
from vit_static.data.image_set import IMAGE_SUFFIXES, MAX_PIXELS

# A file, a picture, or decoded pixels [height, width, 3] uint8, RGB
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


def to_pixels(image: ImageLike) -> np.ndarray:
    """Any picture as [height, width, 3] uint8, RGB. Raises PredictError, with its name, for one that is none."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise PredictError(f"an array of {image.dtype} {list(image.shape)}: must be uint8 [height, width, 3]")
        return np.ascontiguousarray(image)  # DALI takes no part of another array
    return _rgb(image) if isinstance(image, Image.Image) else read_pixels(Path(image))


# Pillow's others have no place in training, and one of them (EPS) starts a program.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")


def read_pixels(
    source: Path | BinaryIO, name: str = "", *, formats: tuple[str, ...] = _FORMATS, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """An image file as [height, width, 3] uint8, RGB. Raises PredictError, with its path or its `name`, where it can't
    be read, is of none of Pillow's `formats` (None: any), or has more than `max_pixels`.

    Grey, palette and CMYK are converted; transparency is left out, as the training's decoder does; 16-bit grey is
    scaled to 8, and fractions to 0-255. The orientation in a photo's EXIF data is not applied, as in training.
    """
    name = name or str(source)
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise PredictError(f"{name}: is no file")
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > max_pixels:  # before they are decoded
                raise PredictError(f"{name}: has {image.width}x{image.height} pixels, of {max_pixels} at most")
            return _rgb(image)
    except PredictError:
        raise
    except UnidentifiedImageError:
        raise PredictError(f"{name}: can't be read as an image (of no known format)") from None
    except Exception as error:  # a broken image can raise anything
        reason = truncate(str(error), 150).removesuffix(f" {str(source)!r}") or type(error).__name__
        raise PredictError(f"{name}: can't be read as an image ({reason})") from None


def _grey(image: Image.Image, times: float) -> Image.Image:
    """In 8 bits, of other numbers; what is no number is black."""
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.nan_to_num(np.asarray(image).astype(np.float64) * times)
    return Image.fromarray(levels.clip(0.0, 255.0).round().astype(np.uint8))


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":  # 0 to 1, as training's decoder takes it
        image = _grey(image, 255.0)
    elif image.mode.startswith("I"):
        image = _grey(image, 1.0 / 257.0)
    return np.asarray(image.convert("RGB"))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files, and those in the folders (by name, with all folders in them). Raises PredictError for none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            named = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            inside = sorted(file for file in named if not file.is_dir())
            if not inside:
                raise PredictError(f"{path}: has no images")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise PredictError(f"{path}: no such file or folder")
    return found


def listed_on(stream: BinaryIO) -> Iterator[Path]:
    """Paths from a stream, one a line; blank lines are passed over."""
    for line in stream:
        path = line.rstrip(b"\r\n")
        if path.strip():
            yield Path(os.fsdecode(path))
