"""Table of image formats: suffixes, decoders and support, and the report of files that are left out.

Everything that lists, reads or refuses images uses this table; the table in configs/DATA.md is generated from it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

REMEDY = "save it as PNG or JPEG"


@dataclass(frozen=True)
class ImageFormat:
    """A file format of images.

    `decoder` is what training decodes ordinary files of the format with (`image_headers.scan` says which are ordinary);
    Pillow decodes the others, and all files in prediction. None: the format is not supported.
    """

    name: str
    suffixes: tuple[str, ...]
    decoder: Literal["DALI", "Pillow"] | None
    pillow_formats: tuple[str, ...] = ()
    on_gpu: bool = False  # whether a GPU decodes ordinary files in training
    note: str = ""


FORMATS = (
    ImageFormat(
        "JPEG", (".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".mpo"), "DALI", ("JPEG",), on_gpu=True,
        note="CMYK: Pillow; the first picture of several",
    ),
    ImageFormat(
        "PNG", (".png", ".apng"), "DALI", ("PNG",),
        note="with transparency, 16 bits, EXIF or animation: Pillow; the default picture of an animation",
    ),
    ImageFormat(
        "WebP", (".webp",), "DALI", ("WEBP",),
        note="with transparency, EXIF or animation: Pillow; the first picture of an animation",
    ),
    ImageFormat("TIFF", (".tif", ".tiff"), "Pillow", ("TIFF",), note="the first page"),
    ImageFormat("BMP", (".bmp", ".dib"), "Pillow", ("BMP", "DIB")),
    ImageFormat("GIF", (".gif",), "Pillow", ("GIF",), note="the first picture of an animation"),
    ImageFormat("PPM", (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), "Pillow", ("PPM",)),
    ImageFormat("JPEG 2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "Pillow", ("JPEG2000",)),
    ImageFormat("AVIF", (".avif", ".avifs"), "Pillow", ("AVIF",), note="the first picture of an animation"),
    ImageFormat("HEIC", (".heic", ".heif", ".hif"), None, note="of phones"),
    ImageFormat("JPEG XL", (".jxl",), None),
    ImageFormat(
        "raw files of cameras",
        (".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".raw"),
        None,
    ),
    ImageFormat("Photoshop", (".psd", ".psb"), None),
    ImageFormat("vector graphics", (".svg", ".svgz", ".eps", ".ps", ".ai", ".pdf", ".wmf", ".emf"), None),
    ImageFormat("others", (".ico", ".cur", ".tga", ".dds", ".pcx", ".sgi", ".qoi", ".hdr", ".exr", ".xcf"), None),
)  # fmt: skip

SUPPORTED_FORMATS = tuple(image_format for image_format in FORMATS if image_format.decoder)
IMAGE_SUFFIXES = frozenset(suffix for image_format in SUPPORTED_FORMATS for suffix in image_format.suffixes)
PILLOW_FORMATS = tuple(name for image_format in SUPPORTED_FORMATS for name in image_format.pillow_formats)
_UNSUPPORTED_SUFFIXES = frozenset(suffix for f in FORMATS if f.decoder is None for suffix in f.suffixes)

# What is counted as left out of a folder besides suffixes
HIDDEN, FOLDER, NO_SUFFIX = "hidden", "folder", ""
_MAX_SUFFIX_LENGTH, _MAX_SUFFIXES = 12, 8  # of those that a message names

# The first bytes of files that are often among images, and are not supported
_OTHER_FILES = {
    b"8BPS": "a Photoshop file",
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"%PDF": "a PDF file",
    b"%!PS": "a PostScript file",
    b"\0\0\1\0": "an icon",
    b"DDS ": "a DDS texture",
    b"qoif": "a QOI image",
    b"gimp xcf": "a GIMP file",
}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def suffix_of(name: str | bytes) -> str:
    """Return a file name's suffix in lower case, with its dot; empty if there is none."""
    suffix = os.path.splitext(name)[1]  # noqa: PTH122 - names may be bytes
    return (suffix if isinstance(suffix, str) else os.fsdecode(suffix)).lower()


def is_image_name(name: str | bytes) -> bool:
    """Return whether a file's suffix is that of a supported format."""
    return suffix_of(name) in IMAGE_SUFFIXES


def left_out_kind(name: str | bytes, is_folder: bool) -> str:
    """Return what a file or folder counts as that isn't an image by its name: FOLDER, HIDDEN, or its suffix."""
    if is_folder:
        return FOLDER
    return HIDDEN if os.fsdecode(name).startswith(".") else suffix_of(name)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Return the counts of `left_out_kind` for a message, the most frequent first; empty if there are none.

    For example '9 .pdf, 3 .heic (not supported: save as PNG or JPEG), 1 hidden file, 2 without a suffix'.
    """
    suffixes = Counter({kind: count for kind, count in left_out.items() if kind not in (HIDDEN, FOLDER, NO_SUFFIX)})
    parts = []
    for suffix, count in sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))[:_MAX_SUFFIXES]:
        remedy = " (not supported: save as PNG or JPEG)" if suffix in _UNSUPPORTED_SUFFIXES else ""
        shown = suffix if len(suffix) <= _MAX_SUFFIX_LENGTH else f"{suffix[:_MAX_SUFFIX_LENGTH]}..."
        parts.append(f"{count} {shown}{remedy}")
    if len(suffixes) > _MAX_SUFFIXES:
        named = sum(sorted(suffixes.values(), reverse=True)[:_MAX_SUFFIXES])
        parts.append(f"{sum(suffixes.values()) - named} with other suffixes")
    for kind, one, several in (
        (NO_SUFFIX, "without a suffix", "without a suffix"),
        (HIDDEN, "hidden file", "hidden files"),
        (FOLDER, "folder", "folders"),
    ):
        if count := left_out.get(kind, 0):
            parts.append(f"{count} {one if count == 1 else several}")
    return ", ".join(parts)


def name_unsupported(head: bytes) -> str | None:
    """Return what a file is that begins with `head` and is in a known format that isn't supported, else None."""
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return "a HEIC image"
    if b"<svg" in head[:1024]:
        return "an SVG drawing"
    return next((name for start, name in _OTHER_FILES.items() if head.startswith(start)), None)


def formats_table() -> str:
    """Return the table of formats in Markdown, as configs/DATA.md shows it."""
    rows = [("Format", "Suffixes", "Training on a CPU", "Training on a GPU", "Prediction", "Remarks"), ("---",) * 6]
    for image_format in FORMATS:
        suffixes = " ".join(f"`{suffix}`" for suffix in image_format.suffixes)
        decoder = image_format.decoder
        if decoder is None:
            cells = ("-", "-", "-", f"{image_format.note}; " * bool(image_format.note) + "not supported: " + REMEDY)
        else:
            on_gpu = f"{decoder}, on the {'GPU' if image_format.on_gpu else 'CPU'}"
            cells = (decoder, on_gpu, "Pillow", image_format.note)
        rows.append((image_format.name, suffixes, *cells))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
