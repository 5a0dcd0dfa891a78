"""Image files for prediction: decoding to RGB arrays, and the files in folders and lists."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from vit_static.common.errors import DataError, PredictError, format_value
from vit_static.common.text import say
from vit_static.data.image_formats import PILLOW_FORMATS, describe_left_out, is_image_name, left_out_kind
from vit_static.data.image_pixels import MAX_PIXELS, DecodeOptions, decode, to_rgb

# The path of an image file, a Pillow image, or decoded pixels [height, width, 3] uint8, RGB
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


def to_pixels(image: ImageLike, options: DecodeOptions) -> np.ndarray:
    """Return the image as [height, width, 3] uint8, RGB.

    Raises PredictError, with the image's path, for a file that can't be read and for an array of another type or shape.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise PredictError(
                f"an array of {image.dtype} {list(image.shape)} is not an image; pass uint8 [height, width, 3]"
            )
        return np.ascontiguousarray(image)  # DALI rejects views of other arrays
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.filename and image.tile and image.tell() == 0:
        image = os.fsdecode(image.filename)  # not loaded yet, and Pillow would do so as described in `decode`
    if isinstance(image, Image.Image):
        return to_rgb(image, options)
    if not isinstance(image, str | os.PathLike):
        raise PredictError(f"{format_value(image)}: is no image; pass paths, Pillow images or arrays")
    return read_pixels(Path(image), options)


def require_several(images: Iterable[ImageLike]) -> None:
    """Raise PredictError for one image where a list of them is needed: a path's letters would be taken for paths."""
    if isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        what = "an array" if isinstance(images, np.ndarray) else "a Pillow image"
        name = os.fsdecode(images) if isinstance(images, str | os.PathLike) else what
        raise PredictError(f"{name}: is one image; pass a list of images: [image]")
    if not isinstance(images, Iterable):
        raise PredictError(f"{format_value(images)}: is no list of images; pass [image, ...]")


def read_pixels(
    source: Path | BinaryIO, options: DecodeOptions, name: str = "", *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode an image file to [height, width, 3] uint8, RGB, with the pixels that training sees.

    Raises PredictError, with the path or with `name`, if the file can't be read, is of none of the supported formats,
    or has more than `max_pixels` pixels.
    """
    name = name or str(source)
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise PredictError(f"{name}: not a file; name an image file")
    try:
        return decode(source, options, max_pixels=max_pixels)
    except DataError as error:
        raise PredictError(f"{name}: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise PredictError(f"{name}: can't be read as an image ({reason})") from None


def count_pixels(source: BinaryIO) -> int:
    """Return the number of pixels according to an image's header; 0 if it can't be read, which decoding will report."""
    try:
        with Image.open(source, formats=PILLOW_FORMATS) as image:
            return image.width * image.height
    except Exception:  # a damaged header can raise anything
        return 0


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the files in order, with each folder replaced by the image files in it and its subfolders, sorted by path.

    What is left out of a folder is reported. Raises PredictError for a path that doesn't exist and for a folder without
    images.
    """
    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            images += _images_below(path)
        elif path.is_file():
            images.append(path)
        else:
            raise PredictError(f"{path}: no such file or folder")
    return images


def _images_below(folder: Path) -> list[Path]:
    images: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        if is_image_name(path.name) and not path.name.startswith("."):
            images.append(path)
        else:
            left_out[left_out_kind(path.name, False)] += 1
    contents = describe_left_out(left_out)
    if not images:
        raise PredictError(
            f"{folder}: no images in this folder ({contents or 'it is empty'}); name a folder with JPEG, PNG or other "
            "supported images (configs/DATA.md lists them)"
        )
    if contents:
        say(f"{folder}: left out {contents}")
    return sorted(images)


def read_path_list(stream: BinaryIO) -> Iterator[Path]:
    """Yield the paths in a stream, one per line; blank lines are skipped."""
    for line in stream:
        path = line.rstrip(b"\r\n")
        if path.strip():
            yield Path(os.fsdecode(path))
