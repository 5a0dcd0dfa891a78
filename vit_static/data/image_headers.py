"""Headers of JPEG, PNG and WebP files: which files DALI decodes to the same pixels as Pillow, and without metadata.

A file is ordinary if it is well-formed up to its pixels and has nothing that the two decoders treat differently. The
test is strict, because Pillow decodes whatever isn't ordinary. It reads a few dozen bytes of a JPEG or WebP file, and
the lengths of a PNG file's chunks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"  # start and end of a JPEG
_SOF, _OTHER_SOF = (0xC0, 0xC1, 0xC2), range(0xC3, 0xD0)  # start of frame: baseline, extended and progressive; others
_DHT, _DAC, _SOS, _APP1, _ADOBE = 0xC4, 0xCC, 0xDA, 0xE1, 0xEE
_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})  # APP1 to APP13, APP15, comment: not JFIF's or Adobe's marker
_END_SEARCH_BYTES = 4096
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Transparency, animation, and what may hold an orientation; a text chunk may hold EXIF or XMP.
_UNUSUAL_CHUNKS = frozenset({b"tRNS", b"acTL", b"eXIf", b"zTXt", b"iTXt"})
_METADATA_TEXTS = (b"Raw profile type", b"XML:com.adobe.xmp")
_WEBP_UNUSUAL = 0x10 | 0x08 | 0x04 | 0x02  # flags of the extended header: alpha, EXIF, XMP, animation


@dataclass(frozen=True)
class Header:
    """The header of an ordinary file: its size in pixels, and where a JPEG has metadata."""

    width: int
    height: int
    metadata: tuple[tuple[int, int], ...] = ()  # start and end, in bytes, of each segment
    end: int = 0  # of the header, in bytes, with the marker at which a JPEG's pixels begin
    app1: tuple[tuple[int, int], ...] = ()  # those that may have an orientation, as EXIF or XMP


def scan(encoded: np.ndarray) -> Header | None:
    """Return the header of an ordinary JPEG, PNG or WebP file [num_bytes] uint8; None for every other file."""
    data = encoded.data
    start = bytes(data[:16])
    try:
        if start.startswith(_SOI):
            return _scan_jpeg(data)
        if start.startswith(_PNG_SIGNATURE):
            return _scan_png(data)
        if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
            return _scan_webp(data)
    except (IndexError, struct.error):  # the file ends in its header
        pass
    return None


def simple_orientation(encoded: np.ndarray, header: Header) -> int | None:
    """Return the orientation, 1 to 8, of a JPEG with one well-formed EXIF segment and none in XMP; None for others.

    Pillow, which takes ten times as long, reads the orientation of the others.
    """
    exif = None
    for start, end in header.app1:
        segment = encoded[start + 4 : end].tobytes()
        if segment.startswith(b"Exif\0\0") and exif is None:
            exif = segment[6:]
        elif segment.startswith(b"Exif") or b"Orientation" in segment:
            return None
    return 1 if exif is None else _orientation_of_tiff(exif)


def _orientation_of_tiff(tiff: bytes) -> int | None:
    """Return the orientation in the first directory of TIFF data, as in EXIF; None if anything is unusual."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 14:
        return None
    (start,) = struct.unpack(order + "I", tiff[4:8])
    (num_entries,) = struct.unpack_from(order + "H", tiff, start) if 8 <= start <= len(tiff) - 2 else (0,)
    directory = tiff[start + 2 : start + 2 + 12 * num_entries]
    if not num_entries or len(tiff) < start + 2 + 12 * num_entries + 4:
        return None
    orientations = [entry for entry in struct.iter_unpack(order + "HHIH2x", directory) if entry[0] == 274]
    if not orientations:
        return 1
    _, kind, count, value = orientations[0]
    return value if len(orientations) == 1 and kind == 3 and count == 1 and 1 <= value <= 8 else None


def replace_metadata(encoded: np.ndarray, header: Header, orientation: int) -> np.ndarray:
    """Return a JPEG without its metadata but for the orientation, 1 to 8, [num_bytes] uint8.

    DALI then reads the same orientation as Pillow: they differ for unusual EXIF data, and two contradictory segments
    make DALI 2.4 end the process.
    """
    exif = np.frombuffer(_exif_segment(orientation) if orientation != 1 else b"", np.uint8)
    starts = [2, *(end for _, end in header.metadata)]
    ends = [*(start for start, _ in header.metadata), len(encoded)]
    return np.concatenate([encoded[:2], exif, *(encoded[a:b] for a, b in zip(starts, ends, strict=True))])


def _exif_segment(orientation: int) -> bytes:
    """Return an APP1 segment with one EXIF entry, the orientation (tag 274, SHORT)."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)
    content = b"Exif\0\0" + tiff
    return b"\xff\xe1" + struct.pack(">H", 2 + len(content)) + content


def _scan_jpeg(data: memoryview) -> Header | None:
    """Accept 8-bit grey and YCbCr files with Huffman coding, whose header is as the standard says."""
    position, size, metadata, app1 = 2, None, [], []
    while True:
        marker, length = data[position + 1], data[position + 2] << 8 | data[position + 3]
        end = position + 2 + length
        if data[position] != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or length < 2 or end > len(data):
            return None
        if marker in _SOF:
            size = _jpeg_frame(data[position + 4 : end])
            if size is None:
                return None
        elif (marker in _OTHER_SOF and marker != _DHT) or marker == _DAC:
            return None
        elif marker == _ADOBE:
            content = bytes(data[position + 4 : end])
            if content.startswith(b"Adobe") and (len(content) < 12 or content[11] == 0):  # RGB or CMYK, or too short
                return None
        elif marker in _METADATA:
            metadata.append((position, end))
            if marker == _APP1:
                app1.append((position, end))
        elif marker == _SOS:
            break
        position = end
    tail = data[-_END_SEARCH_BYTES:]
    if size is None or (_EOI not in bytes(tail) and _EOI not in bytes(data[end:])):
        return None
    return Header(*size, tuple(metadata), end, tuple(app1))


def _jpeg_frame(frame: memoryview) -> tuple[int, int] | None:
    """Return width and height of a frame of 8-bit grey or YCbCr, else None."""
    precision, height, width, num_components = struct.unpack(">BHHB", frame[:6])
    if precision != 8 or not height or not width or len(frame) != 6 + 3 * num_components:
        return None
    names = bytes(frame[6::3])
    is_ycbcr = num_components == 3 and names != b"RGB"
    return (width, height) if num_components == 1 or is_ycbcr else None


def _scan_png(data: memoryview) -> Header | None:
    """Accept complete files of up to 8 bits per channel without transparency, animation and metadata."""
    width, height, depth, colours, compression, row_filter, interlace = struct.unpack(">IIBBBBB", data[16:29])
    if bytes(data[8:16]) != b"\0\0\0\rIHDR" or depth > 8 or colours not in (0, 2, 3) or interlace > 1:
        return None
    if not width or not height or compression or row_filter:
        return None
    position, names = 33, set()
    while True:
        length, name = struct.unpack(">I4s", data[position : position + 8])
        end = position + 12 + length
        if end > len(data) or name in _UNUSUAL_CHUNKS:
            return None
        if name == b"tEXt" and bytes(data[position + 8 : position + 32]).startswith(_METADATA_TEXTS):
            return None
        names.add(name)
        if name == b"IEND":
            break
        position = end
    return Header(width, height) if b"IDAT" in names and (colours != 3 or b"PLTE" in names) else None


def _scan_webp(data: memoryview) -> Header | None:
    """Accept complete files without transparency, animation and metadata."""
    if struct.unpack("<I", data[4:8])[0] + 8 > len(data):
        return None
    kind = bytes(data[12:16])
    if kind == b"VP8 " and bytes(data[23:26]) == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
    elif kind == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        width, height, has_alpha = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bits >> 28 & 1
        if data[20] != 0x2F or has_alpha:
            return None
    elif kind == b"VP8X" and not data[20] & _WEBP_UNUSUAL:
        width, height = (1 + int.from_bytes(data[start : start + 3], "little") for start in (24, 27))
    else:
        return None
    return Header(width, height) if width and height else None
