"""CIFAR-10 from its Python archive (https://www.cs.toronto.edu/~kriz/cifar.html) as class folders of PNG files.

    OUT/train/airplane/00000.png   50,000 images of 32x32 pixels, numbered by their position in the archive
    OUT/val/airplane/00010.png     10,000
    OUT/class_names.txt, OUT/source.json

The archive has the classes' names in alphabetical order, so the labels of the sorted folders are CIFAR-10's.
"""

import gzip
import io
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit_static.common.io import lock, remove_new_folders, write_errors
from vit_static.common.terminal import ProgressBar
from vit_static.common.text import json_text, print_line
from vit_static.data.manifest import SOURCE_FILE, read_manifest
from vit_static.data.open_set import CLASS_NAMES_FILE
from vit_static.weights.unpickler import PickledArray, load_pickle

from .arguments import ToolParser, override_options

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
IMAGES_PER_BATCH = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Raise ValueError for a wrong argument or archive."""
    parser = ToolParser("cifar10", description="Unpack CIFAR-10 into class folders.")
    parser.add_argument("--archive", type=Path, metavar="TAR_GZ", required=True, help="cifar-10-python.tar.gz")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to create")
    arguments = parser.parse_args(argv)
    already_exists = unpack(arguments.archive, arguments.out)
    print_line(
        f"cifar10: 50000 training and 10000 validation images {'are already' if already_exists else 'written'} in "
        f"{arguments.out}; to train on them, set "
        f"{override_options({'data.root': arguments.out, 'model.num_classes': 10})}"
    )
    return 0


def unpack(archive: Path, out: Path, images_per_batch: int = IMAGES_PER_BATCH) -> bool:
    """Write the dataset to `out`, completely or not at all. Return True if it is there already.

    Raise ValueError if `out` contains anything else, or if another run is writing it.
    """
    target = out.resolve()  # a folder can't be renamed onto a symbolic link
    if is_complete(target, images_per_batch):
        return True
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out}: exists, and is not the complete CIFAR-10; give another folder as --out")
    if target.is_mount():
        raise ValueError(f"{out}: is a mount point, which can't be replaced; give a folder inside it as --out")
    batches = read_archive(archive, images_per_batch)
    part_folder = target.with_name(f".{target.name}.part")
    with (
        remove_new_folders(part_folder),
        write_errors(out, lambda: set_bytes(batches, images_per_batch), part_folder),
        locked_folder(part_folder, out) as part,
    ):
        if is_complete(target, images_per_batch):  # another run has finished in the meantime
            return True
        write_set(part / "set", batches, images_per_batch)
        os.sync()  # the images must reach the disk before the rename
        (part / "set").rename(target)  # works if there is nothing, or an empty folder
    return False


@contextmanager
def locked_folder(part: Path, out: Path) -> Iterator[Path]:
    """Yield a temporary folder that only this run uses. Raise ValueError while another run uses it.

    The folder is removed at the end; what a killed run has left in it is removed at the start.
    """
    part.mkdir(parents=True, exist_ok=True)
    with lock(part, f"{out}: another run is writing it; wait until that has ended"):
        try:
            shutil.rmtree(part / "set", ignore_errors=True)
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_set(folder: Path, batches: dict[str, tuple[np.ndarray, list[int]]], images_per_batch: int) -> None:
    """Write images, class names and manifest to a new folder. `batches` are those of `read_archive`."""
    for split in BATCHES:
        for class_name in CLASSES:
            (folder / split / class_name).mkdir(parents=True)
    with ProgressBar(images_per_batch * len(batches), "image") as bar:
        for name, content in encode_set(batches, images_per_batch):
            (folder / name).write_bytes(content)
            bar.update(int(name.endswith(".png")))


def encode_set(batches: dict[str, tuple[np.ndarray, list[int]]], images_per_batch: int) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of all files."""
    for split, batch_names in BATCHES.items():
        for batch, batch_name in enumerate(batch_names):
            for position, (image, label) in enumerate(zip(*batches[batch_name], strict=True)):
                encoded = io.BytesIO()  # Pillow doesn't notice a short write to a full disk
                Image.fromarray(image).save(encoded, "PNG")
                number = batch * images_per_batch + position
                yield f"{split}/{CLASSES[label]}/{number:05d}.png", encoded.getvalue()
    yield CLASS_NAMES_FILE, "".join(f"{name} {name}\n" for name in CLASSES).encode()
    yield SOURCE_FILE, json_text(manifest(images_per_batch), indent=1).encode() + b"\n"


def set_bytes(batches: dict[str, tuple[np.ndarray, list[int]]], images_per_batch: int) -> int:
    """Return the size of all files."""
    return sum(len(content) for _, content in encode_set(batches, images_per_batch))


def manifest(images_per_batch: int) -> dict[str, str | int]:
    """Return the content of source.json."""
    counts = {f"num_{split}": images_per_batch * len(names) for split, names in BATCHES.items()}
    return {"source": "CIFAR-10, python version", **counts}


def is_complete(folder: Path, images_per_batch: int) -> bool:
    """Return whether the folder is the complete dataset, by its manifest and its number of files."""
    expected = manifest(images_per_batch)
    return read_manifest(folder / SOURCE_FILE) == expected and all(
        sum(1 for _ in folder.glob(f"{split}/*/*.png")) == expected[f"num_{split}"] for split in BATCHES
    )


def read_archive(archive: Path, images_per_batch: int) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Return, by the name of the batch, pixels [images, 32, 32, 3] uint8 and labels.

    Raise ValueError for anything but CIFAR-10's archive.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            members = {Path(member.name).name: member for member in tar if member.isreg()}
            assert tar.fileobj is not None
            while tar.fileobj.read(1 << 20):  # read to the end of the file, where gzip verifies its checksum
                pass
            contents = {name: read_pickle(tar, members[name]) for names in BATCHES.values() for name in names}
            names = [name.decode() for name in read_pickle(tar, members["batches.meta"])[b"label_names"]]
        if names != CLASSES:
            raise ValueError(f"its classes are {names}")
        return {name: decode_batch(content, images_per_batch) for name, content in contents.items()}
    except gzip.BadGzipFile as error:
        raise damaged_archive_error(archive, error) from None
    except OSError:  # of the disk
        raise
    except Exception as error:  # damaged bytes can make zlib, tarfile and pickle raise nearly anything
        raise damaged_archive_error(archive, error) from None


def damaged_archive_error(archive: Path, error: Exception) -> ValueError:
    reason = f"no {error}" if isinstance(error, KeyError) else error
    return ValueError(f"{archive}: is not CIFAR-10's Python archive, or is damaged ({reason}); download it again")


def read_pickle(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[bytes, Any]:
    file = tar.extractfile(member)
    assert file is not None
    content = load_pickle(io.BytesIO(file.read()), encoding="bytes")
    if not isinstance(content, dict):
        raise ValueError(f"{member.name} is not a dictionary")
    return content


def decode_batch(content: dict[bytes, Any], num_images: int) -> tuple[np.ndarray, list[int]]:
    """Return a batch's images and labels. Its rows have all red values, then all green, then all blue ones."""
    pickled, labels = content[b"data"], [int(label) for label in content[b"labels"]]
    rows = pickled.to_numpy() if isinstance(pickled, PickledArray) else None
    if rows is None:
        raise ValueError("a batch has no array of pixels")
    if rows.shape != (num_images, 3 * 32 * 32) or rows.dtype != np.uint8 or len(labels) != num_images:
        raise ValueError(f"a batch has {rows.shape} {rows.dtype} and {len(labels)} labels")
    if min(labels) < 0 or max(labels) >= len(CLASSES):
        raise ValueError(f"labels go from {min(labels)} to {max(labels)}")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels  # [images, 32, 32, 3]
