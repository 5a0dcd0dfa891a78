"""Datasets of encoded images that are read by index, and the dataset whose images are files."""

from __future__ import annotations

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError, os_reason, truncate
from vit_static.data.image_pixels import MAX_PIXELS, DecodeOptions, has_too_many_pixels, prepare_for_dali
from vit_static.data.list_file import ImageList, Labels


class ImageDataset(ABC):
    """Images in a fixed order, read by index: the bytes of their files, and labels from 0 to num_classes - 1.

    An image's file isn't touched before it is read, so that a dataset on a network disk opens at once. All methods may
    be called from any thread.
    """

    def __init__(self, root: Path, class_names: list[str]) -> None:
        self.root, self.class_names = root, class_names
        self.left_out: Mapping[str, int] = {}  # what isn't an image in its folders, by `image_formats.left_out_kind`

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def relative_name(self, index: int) -> str:
        """Return where the image is below the root: its path, or SHARD.tar/MEMBER."""

    def name(self, index: int) -> str:
        """Return the same with the root, for messages."""
        return os.path.join(self.root, self.relative_name(index))  # noqa: PTH118 - keeps an absolute path as it is

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the encoded image, [num_bytes] uint8, and its labels, [num_labels] int32.

        Raise DataError, with the image's name, if it can't be read or its header gives more than MAX_PIXELS pixels.
        """
        encoded, labels = self.read_bytes(index)
        with self._name_in_errors(index):
            if has_too_many_pixels(encoded):
                raise DataError(f"has more than {MAX_PIXELS} pixels according to its header", "too_large")
        return encoded, labels

    def read_bytes(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `read` returns, without a look at the image's header. Raise DataError if it can't be read."""
        with self._name_in_errors(index):
            return self._read(index)

    def read_for_dali(self, index: int, options: DecodeOptions) -> tuple[np.ndarray, np.ndarray]:
        """Return a file [num_bytes] uint8 that DALI decodes to Pillow's pixels, and the labels, as `read` does.

        Raise DataError, with the image's name, also if only Pillow could decode the image and it is damaged.
        """
        with self._name_in_errors(index):
            encoded, labels = self._read(index)
            return prepare_for_dali(encoded, options), labels

    @contextmanager
    def _name_in_errors(self, index: int) -> Iterator[None]:
        """Turn any error about an image's file into a DataError with the image's name."""
        try:
            yield
        except OSError as error:
            kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise DataError(f"{self.message_name(index)}: can't be read ({os_reason(error)})", kind) from None
        except DataError as error:
            raise DataError(f"{self.message_name(index)}: {error}", error.kind) from None
        except ValueError as error:  # a path with a NUL
            raise DataError(f"{self.message_name(index)}: can't be read ({error})", "missing") from None

    def message_name(self, index: int) -> str:
        """Return the image's name for a message of one line: at most 300 characters of it."""
        return truncate(self.name(index), 300)

    @abstractmethod
    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `read` returns. May also raise OSError, and a DataError without the image's name."""

    @abstractmethod
    def labels(self) -> Labels:
        """Return the labels of all images. Raise DataError, with the image's name, if they can't be read."""

    @abstractmethod
    def digest(self) -> str:
        """Return a hexadecimal digest of the names and labels, in order, which doesn't depend on where the root is."""

    @abstractmethod
    def exclude(self, names: Collection[str]) -> ImageDataset:
        """Return the dataset without the images that have these names, relative to the root."""


class FileDataset(ImageDataset):
    """Images that are files below a root, from class folders or from a list file."""

    def __init__(
        self, root: Path, image_list: ImageList, class_names: list[str], left_out: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(root, class_names)
        self._root_bytes, self.image_list = os.fsencode(root), image_list
        self.left_out = left_out or {}

    def __len__(self) -> int:
        return len(self.image_list)

    def relative_name(self, index: int) -> str:
        return os.fsdecode(self.image_list.path(index))

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        path = os.path.join(self._root_bytes, self.image_list.path(index))  # noqa: PTH118 - a Path per image is slow
        return read_file(path), self.image_list.labels[index]

    def labels(self) -> Labels:
        return self.image_list.labels

    def digest(self) -> str:
        images = self.image_list
        digest = hashlib.blake2b(digest_size=16)
        for array in (images.text, images.starts, images.stops, images.labels.values, images.labels.offsets):
            if array is not None:
                digest.update(array.data)
        return digest.hexdigest()

    def exclude(self, names: Collection[str]) -> FileDataset:
        excluded = {os.fsencode(name) for name in names}
        mask = np.fromiter((self.image_list.path(n) not in excluded for n in range(len(self))), bool, len(self))
        return FileDataset(self.root, self.image_list.select(mask), self.class_names, self.left_out)


def read_file(path: bytes) -> np.ndarray:
    """Return a file's bytes, [num_bytes] uint8.

    Raise OSError, or a DataError without the path, for an empty file, a folder, a pipe and a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise DataError(f"is {kind}, not a file")
        return read_at(descriptor, 0, status.st_size)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, offset: int, size: int) -> np.ndarray:
    """Return `size` bytes of a file from `offset` on, [size] uint8. Raise DataError if there are fewer, or none."""
    content = np.empty(size, np.uint8)
    num_read = 0
    while num_read < size:
        count = os.preadv(descriptor, [content[num_read:].data], offset + num_read)
        if count == 0:
            raise DataError(f"ends after {num_read} of {size} bytes")
        num_read += count
    if size == 0:
        raise DataError("is empty", "empty")
    return content
