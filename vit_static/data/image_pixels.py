"""Decoding of images to RGB with Pillow, and the preparation of files so that DALI decodes them to the same pixels."""

from __future__ import annotations

import io
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from vit_static.common.errors import DataError, truncate
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_formats import PILLOW_FORMATS, REMEDY, name_unsupported
from vit_static.data.image_headers import Header, replace_metadata, scan, simple_orientation

MAX_PIXELS = 178_956_970  # half a gigabyte of pixels; the limit above which Pillow refuses an image
_ORIENTATION_TAG = 274  # of EXIF and TIFF
_SUBFILE_TYPE_TAG = 254  # of TIFF; bit 0: a reduced copy of another image in the file
# What makes an image upright, by orientation (EXIF 2.32, section 4.6.4)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP_ROWS = 64
_INVERSE = {6: 8, 8: 6}  # the other orientations are their own inverses

# What Pillow says of damaged data where its decoder gives no reason
_CODES = re.compile(r"^(decoder error -?\d+|could not create decoder object)$")


@dataclass(frozen=True)
class DecodeOptions:
    """How pixels are made of a file; the fields are the config's `data.orientation` and `data.background`."""

    orientation: Literal["apply", "ignore"]
    background: tuple[int, int, int] | None  # None: transparency is dropped


def decode_options(data: DataConfig) -> DecodeOptions:
    """Return the options of a config."""
    return DecodeOptions(data.orientation, data.background)


def decode(source: Path | BinaryIO, options: DecodeOptions, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file with Pillow to [height, width, 3] uint8, RGB, as `to_rgb` describes.

    Raise DataError, without the file's name, if it is damaged, of no supported format, or has more than `max_pixels`
    pixels; and OSError if a path can't be opened.
    """
    # Pillow gets an open file: from a path it maps some TIFF files into memory, and scrambles those to turn (13.0).
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        return _decode_file(file, options, max_pixels)


def _decode_file(file: BinaryIO, options: DecodeOptions, max_pixels: int) -> np.ndarray:
    try:
        with Image.open(file, formats=PILLOW_FORMATS) as image:
            if image.width * image.height > max_pixels:  # checked before the pixels are decoded
                raise DataError(
                    f"has {image.width}x{image.height} pixels, and at most {max_pixels} are allowed; shrink it",
                    "too_large",
                )
            if isinstance(image, TiffImagePlugin.TiffImageFile) and is_preview(image):
                raise DataError(
                    f"is a camera's raw file, of which only a preview could be read; {REMEDY}", "unsupported"
                )
            return to_rgb(image, options)
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"has more than {MAX_PIXELS} pixels according to its header", "too_large") from None
    except UnidentifiedImageError:
        file.seek(0)
        name = name_unsupported(file.read(1024))
        if name is None:
            raise DataError("can't be read as an image (unknown format)") from None
        raise DataError(f"is {name}, which is not supported; {REMEDY}", "unsupported") from None
    except Exception as error:  # a damaged file can make a decoder raise anything
        # Pillow's PPM decoder raises its messages as bytes.
        message = error.args[0] if error.args else ""
        text = message.decode("ascii", "backslashreplace") if isinstance(message, bytes) else str(error)
        reason = _CODES.sub("its data is damaged", truncate(text, 150)) or type(error).__name__
        kind = "truncated" if "truncated" in reason.lower() else "unreadable"
        raise DataError(f"can't be read as an image ({reason})", kind) from None


def is_preview(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Return whether the first page is a reduced copy of another image in the file, as in DNG, NEF and ARW files."""
    subfile_type = image.tag_v2.get(_SUBFILE_TYPE_TAG, 0)
    return isinstance(subfile_type, int) and bool(subfile_type & 1)


def to_rgb(image: Image.Image, options: DecodeOptions) -> np.ndarray:
    """Return an image of any of Pillow's modes as [height, width, 3] uint8, RGB.

    The orientation of EXIF, XMP or TIFF is applied, and transparent pixels are composed onto the background, as the
    options say. Deep images are reduced to 8 bits: whole numbers are divided by 257, so that 65535 becomes 255;
    floating-point values count from 0 to 1. CIELAB becomes sRGB. Colour profiles are not applied.
    """
    is_tiff = image.format == "TIFF"
    orientation = image_orientation(image) if is_tiff else 1  # loading a TIFF's pixels applies and forgets it
    image.load()  # before the metadata of other formats, which for PNG are partly behind the pixels
    if not is_tiff:
        orientation = image_orientation(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _reduce_depth(image)
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image  # None only in place
    if options.background is not None and image.has_transparency_data:
        foreground = image.convert("RGBA")
        background = Image.new("RGBA", foreground.size, (*options.background, 255))
        image = Image.alpha_composite(background, foreground)
    pixels = image.convert("RGB")
    if is_tiff:
        orientation = 1 if options.orientation == "apply" else _INVERSE.get(orientation, orientation)
    elif options.orientation == "ignore":
        orientation = 1
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    return np.asarray(pixels)


def image_orientation(image: Image.Image) -> int:
    """Return an image's orientation, 1 to 8; 1, which is upright, if it has none or it can't be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged EXIF data can raise anything, and isn't needed to see the image
        return 1
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


def _reduce_depth(image: Image.Image) -> Image.Image:
    """Reduce a grey image to 8 bits; NaN becomes black, and the transparent value gets an alpha of 0."""
    values = np.asarray(image)
    scale = 255.0 if image.mode == "F" else 1.0 / 257.0
    levels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _STRIP_ROWS):  # in float64 the whole image would take eight times its memory
        rows = slice(start, start + _STRIP_ROWS)
        with np.errstate(invalid="ignore", over="ignore"):
            levels[rows] = np.nan_to_num(values[rows].astype(np.float64) * scale).clip(0.0, 255.0).round()
    grey = Image.fromarray(levels)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def prepare_for_dali(encoded: np.ndarray, options: DecodeOptions) -> np.ndarray:
    """Return a file [num_bytes] uint8 that DALI, applying orientations, decodes to Pillow's pixels.

    An ordinary file stays as it is, but for a JPEG's metadata. Pillow decodes all others, and the result is an
    uncompressed image, a PPM file. On a GPU, JPEGs differ from Pillow by the rounding of its decoder. Raise DataError,
    without the file's name, for a file that can't be decoded.
    """
    header = scan(encoded)
    if header is None or header.width * header.height > MAX_PIXELS:
        return to_ppm(decode(io.BytesIO(encoded.data), options))
    if not header.app1:
        return encoded
    orientation = _jpeg_orientation(encoded, header) if options.orientation == "apply" else 1
    return replace_metadata(encoded, header, orientation)


def _jpeg_orientation(encoded: np.ndarray, header: Header) -> int:
    orientation = simple_orientation(encoded, header)
    if orientation is not None:
        return orientation
    try:
        with Image.open(io.BytesIO(encoded[: header.end].data), formats=("JPEG",)) as image:
            return image_orientation(image)
    except Exception:  # as in `image_orientation`
        return 1


def to_ppm(pixels: np.ndarray) -> np.ndarray:
    """Return [height, width, 3] uint8 as a binary PPM file, [num_bytes] uint8."""
    height, width, _ = pixels.shape
    header = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8)
    return np.concatenate([header, pixels.reshape(-1)])


def has_too_many_pixels(encoded: np.ndarray) -> bool:
    """Return whether an image's header gives more than MAX_PIXELS pixels, which a decoder would allocate memory for.

    A header that can't be read counts as no: the decoder will report the image.
    """
    header = scan(encoded)
    if header is not None:
        return header.width * header.height > MAX_PIXELS
    try:
        with Image.open(io.BytesIO(encoded.data), formats=PILLOW_FORMATS) as image:  # reads only the header
            return image.width * image.height > MAX_PIXELS
    except Image.DecompressionBombError:
        return True
    except Exception:  # a broken header can raise anything
        return False
