"""ImageNet-21k's list file with all labels of each image, as PLSC trains on it.

    ROOT/images/n00004475/n00004475_54295.JPEG    21,841 class folders, 14,197,122 files (release of Fall 2011)
    ROOT/image_all_list.txt           one line per distinct image: 'images/n00004475/n00004475_54295.JPEG 0,17'
    ROOT/image_dummy_val_list.txt     the first 20 images of each class that have no other label
    ROOT/.digests.sqlite              the digests of the files, so that each is read only once
    ROOT/class_names.txt              with --words, unless it exists

Many images are in several class folders, byte for byte. Such an image has the labels of all its folders (sorted folders
are the classes), and is listed once, by its first path. There is no official validation set; the dummy one, whose
images are also trained on, only shows whether training works. Empty files are left out: their digest would make all of
them one image, with every class that has an empty file.
"""

import errno
import hashlib
import os
import shlex
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_static.common.errors import AtLeast, DataError
from vit_static.common.io import write_atomically, write_errors, write_text
from vit_static.common.terminal import ProgressBar, tracked
from vit_static.common.text import print_line, say
from vit_static.data.image_formats import is_image_name
from vit_static.data.image_set import read_file
from vit_static.data.open_set import CLASS_NAMES_FILE

from .arguments import ToolParser, override_options

ALL_LIST, DUMMY_LIST, CACHE_FILE = "image_all_list.txt", "image_dummy_val_list.txt", ".digests.sqlite"
NUM_CLASSES, NUM_DUMMY = 21_841, 20
_DIGEST_BYTES = 16
_SQLITE_ERRNOS = {"is full": errno.ENOSPC, "readonly": errno.EROFS, "disk I/O": errno.EIO}  # by SQLite's messages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Raise ValueError for a wrong argument or folder."""
    parser = ToolParser("imagenet21k", description="List ImageNet-21k's images, each with all of its labels.")
    parser.add_argument("--root", type=Path, metavar="DIR", required=True, help="folder with images/CLASS/*.JPEG")
    parser.add_argument(
        "--num-classes", type=int, default=NUM_CLASSES, help="for a part of ImageNet-21k (default: 21,841)"
    )
    parser.add_argument("--words", type=Path, metavar="FILE", help="WordNet's words.txt, to write class_names.txt")
    arguments = parser.parse_args(argv)
    root: Path = arguments.root
    if arguments.num_classes < 1:
        raise ValueError(f"--num-classes {arguments.num_classes}: must be at least 1")
    folders = class_folders(root / "images", arguments.num_classes)
    class_names = None if arguments.words is None else class_names_text(folders, arguments.words)
    cache_path = root / CACHE_FILE
    with write_errors(cache_path, lambda: least_cache_bytes(folders)), open_cache(cache_path) as cache:
        counts, skipped_files = read_new_files(cache, folders)
        digests = all_digests(cache, folders, counts)
        labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
        images = merge_copies(digests, labels)
        write_lists(cache, root, folders, images)
    if class_names is not None and not (root / CLASS_NAMES_FILE).exists():
        write_text(class_names, root / CLASS_NAMES_FILE)
    elif class_names is not None:
        say(f"{root / CLASS_NAMES_FILE} exists, and stays as it is", "imagenet21k")
    if skipped_files:
        say(
            f"left out {len(skipped_files)} files that are empty or not images, such as {skipped_files[0]!r}",
            "imagenet21k",
        )
    num_labels = np.diff(images.offsets)
    options = override_options(
        {
            "data.root": root,
            "data.train": ALL_LIST,
            "data.val": DUMMY_LIST,
            "data.multi_label": "true",
            "model.num_classes": len(folders),
            "loss.name": "sigmoid",
        }
    )
    print_line(
        f"imagenet21k: {len(labels)} files, {len(images.first_files)} distinct images, {int((num_labels > 1).sum())} "
        f"with several labels (at most {int(num_labels.max())}), {len(folders)} classes"
    )
    print_line(f"imagenet21k: to train on them, set {options}")
    return 0


def class_folders(images: Path, num_classes: int) -> list[Path]:
    """Return the class folders, sorted. Raise ValueError if their number is wrong, or if there are tars instead."""
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder; --root must have images/CLASS/*.JPEG")
    entries = sorted(path for path in images.iterdir() if not path.name.startswith("."))
    tars = [path for path in entries if path.suffix == ".tar"]
    if tars:
        raise ValueError(
            f"{tars[0]}: is a tar archive; unpack all of them: cd {shlex.quote(str(images))} && for t in *.tar; do "
            "mkdir -p ${t%.tar} && tar xf $t -C ${t%.tar} && rm $t; done"
        )
    folders = [path for path in entries if path.is_dir()]
    if len(folders) != num_classes:
        raise ValueError(
            f"{images}: has {len(folders)} class folders, not {num_classes}; add the missing ones, or give "
            f"--num-classes {len(folders)} if you want only a part"
        )
    for folder in folders:
        check_name(folder.name, folder)
    return folders


def check_name(name: str, path: Path | str) -> None:
    """Raise ValueError for a name with a line break, which a list file can't have."""
    if "\n" in name or "\r" in name:
        raise ValueError(f"{str(path)!r}: its name has a line break; rename it")


def class_names_text(folders: list[Path], words: Path) -> str:
    """Return the content of class_names.txt, from WordNet's words.txt, with 'n00001740<tab>entity' per line.

    Raise ValueError for a class without a name.
    """
    lines = words.read_text(encoding="utf-8", errors="replace").splitlines()
    names = {wnid: name.strip() for wnid, _, name in (line.partition("\t") for line in lines)}
    for folder in folders:
        if not names.get(folder.name):
            raise ValueError(f"{words}: has no name for {folder.name}; give WordNet's words.txt, or leave out --words")
    return "".join(f"{folder.name} {names[folder.name]}\n" for folder in folders)


@contextmanager
def open_cache(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the cache of digests. Raise ValueError if the file isn't one or another run uses it, else OSError."""
    path.open("ab").close()  # for a folder without write permission, this error is clearer than SQLite's
    try:
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as cache:
            # Locked until the end: one run at a time, and no shared memory, which network disks don't support.
            cache.execute("PRAGMA locking_mode = EXCLUSIVE")
            cache.execute("PRAGMA journal_mode = WAL")  # a killed run only loses its last folder
            cache.execute(
                "CREATE TABLE IF NOT EXISTS files (folder BLOB, name BLOB, size INTEGER, changed_ns INTEGER, "
                "digest BLOB, PRIMARY KEY (folder, name)) WITHOUT ROWID"
            )
            yield cache
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise ValueError(f"{path}: another run is using it; wait until that has ended") from None
        number = next((number for words, number in _SQLITE_ERRNOS.items() if words in str(error)), None)
        if number is None:
            raise OSError(f"{path}: {error}") from None
        raise OSError(number, str(error), str(path)) from None  # the cache is still good
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path}: is not a cache of this tool, or is damaged ({error}); remove it, and all files are read again"
        ) from None


def read_new_files(cache: sqlite3.Connection, folders: list[Path]) -> tuple[list[int], list[str]]:
    """Add the digests of new and changed files to the cache, reading on all cores.

    Return the number of images in each folder, and the files that are empty or not images. Threads are as fast as
    processes for files of 100 kB.
    """
    counts, skipped_files = [], []
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 2) as threads,
        ProgressBar(None, "image", title="reading") as bar,
    ):
        for folder in folders:
            files, others = scan_folder(folder)
            if not files:
                raise ValueError(f"{folder}: this class folder has no image; add its images, or remove it")
            key = os.fsencode(folder.name)
            rows = cache.execute("SELECT name, size, changed_ns FROM files WHERE folder = ?", (key,))
            cached = {name: (size, changed_ns) for name, size, changed_ns in rows}
            new = [name for name, state in files.items() if cached.get(name) != state]
            removed = [name for name in cached if name not in files]
            digests = threads.map(digest_of, (os.path.join(os.fsencode(folder), name) for name in new))  # noqa: PTH118
            rows_to_add = [(key, name, *files[name], digest) for name, digest in zip(new, digests, strict=True)]
            if new or removed:
                cache.execute("BEGIN")
                cache.executemany("DELETE FROM files WHERE folder = ? AND name = ?", [(key, name) for name in removed])
                cache.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows_to_add)
                cache.execute("COMMIT")
            counts.append(len(files))
            skipped_files += others
            bar.update(len(files))
    return counts, skipped_files


def least_cache_bytes(folders: list[Path]) -> AtLeast:
    """Return the size of what the cache has about all files, without SQLite's own structures."""
    return AtLeast(
        sum(len(folder.name) + len(name) + _DIGEST_BYTES for folder in folders for name in os.listdir(folder))  # noqa: PTH208
    )


def scan_folder(folder: Path) -> tuple[dict[bytes, tuple[int, int]], list[str]]:
    """Return size (bytes) and modification time (ns) of a class's images by name, and the paths of its other files.

    Hidden files are ignored. Raise ValueError for a name with a line break.
    """
    files: dict[bytes, tuple[int, int]] = {}
    others = []
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            name, path = os.fsdecode(entry.name), os.fsdecode(entry.path)
            is_image = is_image_name(name) and entry.is_file()
            if is_image and (status := entry.stat()).st_size:
                check_name(name, path)
                files[entry.name] = (status.st_size, status.st_mtime_ns)
            else:
                others.append(path)
    return files, others


def digest_of(path: bytes) -> bytes:
    """Return a digest of a file's content. Raise OSError, or ValueError if the file has become shorter or empty."""
    try:
        content = read_file(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None
    except DataError as error:
        message = f"{os.fsdecode(path)}: {error}; it has changed meanwhile, so run the command again"
        raise ValueError(message) from None
    return hashlib.blake2b(content.data, digest_size=_DIGEST_BYTES).digest()


def all_digests(cache: sqlite3.Connection, folders: list[Path], counts: list[int]) -> np.ndarray:
    """Return the digests of all files, sorted by folder and name, [num_files, 2] uint64."""
    digests = np.empty((sum(counts), 2), np.uint64)
    start = 0
    for folder, count in zip(folders, counts, strict=True):
        rows = cache.execute("SELECT digest FROM files WHERE folder = ? ORDER BY name", (os.fsencode(folder.name),))
        digests[start : start + count] = np.frombuffer(b"".join(row[0] for row in rows), np.uint64).reshape(-1, 2)
        start += count
    return digests


@dataclass(frozen=True)
class DistinctImages:
    """Images without copies, in the order of their first files.

    The labels of image n are `labels[offsets[n]:offsets[n + 1]]`, sorted.
    """

    first_files: np.ndarray  # [num_images], the number of the first file
    labels: np.ndarray
    offsets: np.ndarray  # [num_images + 1]


def merge_copies(digests: np.ndarray, labels: np.ndarray) -> DistinctImages:
    """Merge files with the same digest into one image. `labels` are sorted, as the files are."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the files of an image stay in order
    ordered = digests[order]
    is_new_image = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    image_numbers = np.cumsum(is_new_image) - 1
    # A class that has an image in several files counts once.
    is_new_label = is_new_image | np.concatenate([[True], labels[order][1:] != labels[order][:-1]])
    counts = np.bincount(image_numbers[is_new_label])
    values, starts = labels[order][is_new_label], np.concatenate([[0], np.cumsum(counts)])
    first_files = order[is_new_image]
    by_file = np.argsort(first_files, kind="stable")
    sizes = counts[by_file]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes) + np.repeat(starts[:-1][by_file], sizes)
    return DistinctImages(first_files[by_file], values[positions], offsets)


def write_lists(cache: sqlite3.Connection, root: Path, folders: list[Path], images: DistinctImages) -> None:
    """Write both lists, or neither if there is an error."""

    def size_of(*, only_dummy: bool) -> int:
        return sum(len(line) for line, in_dummy in list_lines(cache, folders, images) if in_dummy or not only_dummy)

    with (
        write_atomically(root / DUMMY_LIST, lambda: size_of(only_dummy=True)) as dummy_path,
        write_atomically(root / ALL_LIST, lambda: size_of(only_dummy=False)) as all_path,
        all_path.open("wb") as all_list,
        dummy_path.open("wb") as dummy_list,
    ):
        for line, in_dummy in list_lines(cache, tracked(folders, "class", title="writing"), images):
            all_list.write(line)
            if in_dummy:
                dummy_list.write(line)


def list_lines(
    cache: sqlite3.Connection, folders: Iterable[Path], images: DistinctImages
) -> Iterator[tuple[bytes, bool]]:
    """Yield the line of each distinct image, and whether it is also in the dummy validation list."""
    file_number, image = 0, 0
    for label, folder in enumerate(folders):
        key = os.fsencode(folder.name)
        num_dummy = 0
        for (name,) in cache.execute("SELECT name FROM files WHERE folder = ? ORDER BY name", (key,)):
            if image < len(images.first_files) and images.first_files[image] == file_number:
                labels = images.labels[images.offsets[image] : images.offsets[image + 1]].tolist()
                in_dummy = labels == [label] and num_dummy < NUM_DUMMY
                num_dummy += in_dummy
                yield b"images/%b/%b %b\n" % (key, name, ",".join(map(str, labels)).encode()), in_dummy
                image += 1
            file_number += 1
