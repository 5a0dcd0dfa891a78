"""CIFAR-10 from its Python archive (https://www.cs.toronto.edu/~kriz/cifar.html) as class folders of PNG files.

    OUT/train/airplane/00000.png   50,000 images of 32x32 pixels; the number is the image's place in the archive
    OUT/val/airplane/00010.png     10,000
    OUT/class_names.txt, OUT/source.json

The classes' names are in alphabetical order in the archive, so the folders' labels are CIFAR-10's own.
"""

import gzip
import io
import json
import os
import shlex
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools.arguments import ToolParser
from vit_static.common.io import lock, write_json
from vit_static.data.open_set import CLASS_NAMES_FILE
from vit_static.weights.unpickler import PickledArray, load_pickle

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
IMAGES_A_BATCH = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises ValueError for a wrong argument or archive."""
    parser = ToolParser(prog="vit_static data cifar10", description="CIFAR-10 as class folders.")
    parser.add_argument("--archive", type=Path, metavar="TAR_GZ", required=True, help="cifar-10-python.tar.gz")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True)
    arguments = parser.parse_args(argv)
    was_there = unpack(arguments.archive, arguments.out)
    print(
        f"cifar10: 50000 training and 10000 validation images {'are already' if was_there else 'written'} in "
        f"{arguments.out}; to train on them set -o {shlex.quote(f'data.root={arguments.out}')} -o model.num_classes=10"
    )
    return 0


def unpack(archive: Path, out: Path, images_a_batch: int = IMAGES_A_BATCH) -> bool:
    """Writes the set to `out`, complete or not at all; True where it is there already.

    Raises ValueError where `out` holds anything else, or another run is writing it.
    """
    target = out.resolve()  # through a symbolic link, which a folder can't be renamed onto
    if is_complete(target, images_a_batch):
        return True
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out}: is there, and not the whole of CIFAR-10; name another folder with --out")
    if target.is_mount():
        raise ValueError(f"{out}: is a mount point, which no folder can take the place of; name a folder within it")
    batches = read_archive(archive, images_a_batch)
    with claimed(target.with_name(f".{target.name}.part"), out) as part:
        if is_complete(target, images_a_batch):  # by another run, meanwhile
            return True
        write_set(part / "set", batches, images_a_batch)
        os.sync()  # the images, before the name that says that they are there
        (part / "set").rename(target)  # in the place of nothing, or of an empty folder
    return False


@contextmanager
def claimed(part: Path, out: Path) -> Iterator[Path]:
    """An empty folder of this run's own, which goes away at the end. Raises ValueError while another run has it.

    What a killed run left is removed here.
    """
    part.mkdir(parents=True, exist_ok=True)
    with lock(part, f"{out}: another run is writing it; wait until that has ended"):
        try:
            shutil.rmtree(part / "set", ignore_errors=True)
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_set(folder: Path, batches: dict[str, tuple[np.ndarray, list[int]]], images_a_batch: int) -> None:
    total = images_a_batch * len(batches)
    with tqdm(total=total, unit="image", disable=None) as bar:
        for split, names in BATCHES.items():
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
            for batch, name in enumerate(names):
                for place, (image, label) in enumerate(zip(*batches[name], strict=True)):
                    number = batch * images_a_batch + place
                    Image.fromarray(image).save(folder / split / CLASSES[label] / f"{number:05d}.png")
                    bar.update()
    (folder / CLASS_NAMES_FILE).write_text("".join(f"{name} {name}\n" for name in CLASSES))
    write_json(manifest(images_a_batch), folder / "source.json")


def manifest(images_a_batch: int) -> dict[str, str | int]:
    """What source.json says."""
    counts = {f"num_{split}": images_a_batch * len(names) for split, names in BATCHES.items()}
    return {"source": "CIFAR-10, python version", **counts}


def is_complete(folder: Path, images_a_batch: int) -> bool:
    """Whether the whole set is there, by its manifest and number of files."""
    try:
        found = json.loads((folder / "source.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    expected = manifest(images_a_batch)
    return bool(found == expected) and all(
        sum(1 for _ in folder.glob(f"{split}/*/*.png")) == expected[f"num_{split}"] for split in BATCHES
    )


def read_archive(archive: Path, images_a_batch: int) -> dict[str, tuple[np.ndarray, list[int]]]:
    """By batch, pixels [images, 32, 32, 3] uint8 and labels. Raises ValueError for what is not CIFAR-10's archive."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            members = {Path(member.name).name: member for member in tar if member.isreg()}
            assert tar.fileobj is not None
            while tar.fileobj.read(1 << 20):  # to its very end, where gzip's checksum is
                pass
            contents = {name: content_of(tar, members[name]) for names in BATCHES.values() for name in names}
            names = [name.decode() for name in content_of(tar, members["batches.meta"])[b"label_names"]]
        if names != CLASSES:
            raise ValueError(f"its classes are {names}")
        return {name: batch_of(content, images_a_batch) for name, content in contents.items()}
    except gzip.BadGzipFile as error:
        raise damaged(archive, error) from None
    except OSError:  # the disk's
        raise
    except Exception as error:  # damaged bytes can make zlib, tarfile and pickle raise nearly anything
        raise damaged(archive, error) from None


def damaged(archive: Path, error: Exception) -> ValueError:
    said = f"no {error}" if isinstance(error, KeyError) else error
    return ValueError(f"{archive}: is not CIFAR-10's Python archive, or is damaged ({said}); fetch it again")


def content_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[bytes, Any]:
    file = tar.extractfile(member)
    assert file is not None
    content = load_pickle(io.BytesIO(file.read()), encoding="bytes")
    if not isinstance(content, dict):
        raise ValueError(f"{member.name} holds no dictionary")
    return content


def batch_of(content: dict[bytes, Any], num_images: int) -> tuple[np.ndarray, list[int]]:
    """A batch's rows, red, green and blue one after the other, as images."""
    pickled, labels = content[b"data"], [int(label) for label in content[b"labels"]]
    rows = pickled.to_numpy() if isinstance(pickled, PickledArray) else None
    if rows is None:
        raise ValueError("a batch has no array of pixels")
    if rows.shape != (num_images, 3 * 32 * 32) or rows.dtype != np.uint8 or len(labels) != num_images:
        raise ValueError(f"a batch has {rows.shape} {rows.dtype} and {len(labels)} labels")
    if min(labels) < 0 or max(labels) >= len(CLASSES):
        raise ValueError(f"labels go from {min(labels)} to {max(labels)}")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
