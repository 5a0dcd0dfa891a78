"""Images by number: their bytes and labels, wherever they are; and those that are files."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError, truncate
from vit_static.data.list_file import ImageList

# What DALI's and Pillow's decoders both read. Other files in a class folder (.DS_Store, notes) are no images.
IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
MAX_PIXELS = 178_956_970  # half a gigabyte of bytes; Pillow's own bound


class ImageDataset(ABC):
    """Images in a fixed order, by number: what is in their files, and their labels, 0 to num_classes - 1.

    Reading is all that touches an image's file, so that the set of a network disk is there at once. From any thread.
    """

    def __init__(self, root: Path, class_names: list[str]) -> None:
        self.root, self.class_names = root, class_names

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def relative_name(self, number: int) -> str:
        """Where the image is below the root: its path, or SHARD.tar/MEMBER."""

    def name(self, number: int) -> str:
        """The same with the root, for people."""
        return os.path.join(self.root, self.relative_name(number))  # noqa: PTH118 - one that is absolute stays so

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The encoded image, [num_bytes] uint8, and its labels, [num_labels] int32.

        Raises DataError with its name, also where its header promises more pixels than MOST_PIXELS.
        """
        try:
            encoded, labels = self._read(number)
            num_pixels = pixels_promised(encoded)
            if num_pixels > MAX_PIXELS:
                raise DataError(f"has {num_pixels} pixels by its header, of {MAX_PIXELS} at most", "too_large")
        except OSError as error:
            kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise DataError(f"{self._said(number)}: can't be read ({error.strerror})", kind) from None
        except DataError as error:
            raise DataError(f"{self._said(number)}: {error}", error.kind) from None
        except ValueError as error:  # NUL in a path
            raise DataError(f"{self._said(number)}: can't be read ({error})", "missing") from None
        return encoded, labels

    def _said(self, number: int) -> str:
        return truncate(self.name(number), 300)

    @abstractmethod
    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The same; may raise OSError, too, and a DataError without the name."""

    @abstractmethod
    def digest(self) -> str:
        """In hexadecimal: the same for the same names and labels in the same order, wherever their root is."""

    @abstractmethod
    def exclude(self, names: Collection[str]) -> ImageDataset:
        """The set without the images that have these names, relative to data.root."""


class FileDataset(ImageDataset):
    """Images that are files below a root: those of class folders or of a list."""

    def __init__(self, root: Path, image_list: ImageList, class_names: list[str]) -> None:
        super().__init__(root, class_names)
        self._folder, self.image_list = os.fsencode(root), image_list

    def __len__(self) -> int:
        return len(self.image_list)

    def relative_name(self, number: int) -> str:
        return os.fsdecode(self.image_list.path(number))

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        path = os.path.join(self._folder, self.image_list.path(number))  # noqa: PTH118 - a Path for each image is slow
        return read_whole(path), self.image_list.labels.of(number)

    def digest(self) -> str:
        lines = self.image_list
        found = hashlib.blake2b(digest_size=16)
        for array in (lines.text, lines.starts, lines.stops, lines.labels.values, lines.labels.offsets):
            if array is not None:
                found.update(array.data)
        return found.hexdigest()

    def exclude(self, names: Collection[str]) -> FileDataset:
        excluded = {os.fsencode(name) for name in names}
        kept = np.fromiter((self.image_list.path(n) not in excluded for n in range(len(self))), bool, len(self))
        return FileDataset(self.root, self.image_list.where(kept), self.class_names)


def read_whole(path: bytes) -> np.ndarray:
    """A file's bytes, [num_bytes] uint8. Raises OSError, and DataError (without the path) for an empty one, and for a
    folder, a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
            raise DataError(f"is {what}, not a file")
        return read_at(descriptor, 0, found.st_size)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, offset: int, size: int) -> np.ndarray:
    """`size` bytes of a file from `offset` on, [size] uint8. Raises DataError where there are fewer, or none at all."""
    content = np.empty(size, np.uint8)
    done = 0
    while done < size:
        count = os.preadv(descriptor, [content[done:].data], offset + done)
        if count == 0:
            raise DataError(f"ends after {done} of {size} bytes")
        done += count
    if size == 0:
        raise DataError("is empty", "empty")
    return content


def pixels_promised(encoded: np.ndarray) -> int:
    """How many pixels an image's header says that it has; 0 where that can't be read, which the decoder will tell."""
    beginning = encoded[:24].tobytes()
    try:
        if beginning.startswith(b"\xff\xd8"):
            return _pixels_of_jpeg(encoded.data)
        if beginning.startswith(b"\x89PNG"):
            width, height = struct.unpack(">II", beginning[16:24])
            return int(width * height)
    except (struct.error, IndexError):
        return 0
    return _pixels_by_pillow(encoded)


def _pixels_of_jpeg(encoded: memoryview) -> int:
    """Of its start of frame (ITU-T T.81, B.2.2), segment by segment."""
    place = 2
    while True:
        while encoded[place] == 0xFF:
            place += 1
        marker = encoded[place]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", encoded, place + 4)
            return int(height * width)
        (length,) = struct.unpack_from(">H", encoded, place + 1)
        place += 1 + length


def _pixels_by_pillow(encoded: np.ndarray) -> int:
    """Of the rarer formats. Pillow reads no more than the header."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded.tobytes()), formats=("BMP", "WEBP", "TIFF")) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        return MAX_PIXELS + 1
    except Exception:  # a broken header can raise anything
        return 0
