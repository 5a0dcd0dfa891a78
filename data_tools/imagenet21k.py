"""ImageNet-21k's list of images with all of their labels, as the seed trains on it.

    ROOT/images/n00004475/n00004475_54295.JPEG    21,841 class folders, 14,197,122 files (release of Fall 2011)
    ROOT/image_all_list.txt           a line a distinct image: 'images/n00004475/n00004475_54295.JPEG 0,17'
    ROOT/image_dummy_val_list.txt     of each class the first 20 images that have no other label
    ROOT/.digests.sqlite              what is known of the files, so that they are read once
    ROOT/class_names.txt              with --words, unless there is one

Many images stand in several class folders, byte for byte: such an image has several labels, those of all its folders
(sorted folders are the classes), and is listed once, by its first path. There is no official validation set; the dummy
one, whose images are trained on, too, shows no more than whether training works. Empty files are left out: by their
digest they would all be one image, of every class that has one.
"""

import hashlib
import os
import shlex
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.arguments import ToolParser
from vit_static.common.errors import DataError
from vit_static.common.io import write_atomically
from vit_static.data.image_set import IMAGE_SUFFIXES, read_whole
from vit_static.data.open_set import CLASS_NAMES_FILE

ALL_LIST, DUMMY_LIST, CACHE_FILE = "image_all_list.txt", "image_dummy_val_list.txt", ".digests.sqlite"
NUM_CLASSES, NUM_DUMMY = 21_841, 20
_DIGEST_BYTES = 16


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises ValueError for a wrong argument or folder."""
    parser = ToolParser(prog="vit_static data imagenet21k", description="ImageNet-21k's list, with several labels.")
    parser.add_argument("--root", type=Path, metavar="DIR", required=True, help="holds images/CLASS/*.JPEG")
    parser.add_argument("--num-classes", type=int, default=NUM_CLASSES, help="of a part of it (default: 21,841)")
    parser.add_argument("--words", type=Path, metavar="FILE", help="WordNet's words.txt, for class_names.txt")
    arguments = parser.parse_args(argv)
    root: Path = arguments.root
    if arguments.num_classes < 1:
        raise ValueError(f"--num-classes {arguments.num_classes}: must be at least 1")
    folders = class_folders(root / "images", arguments.num_classes)
    class_names = None if arguments.words is None else named(folders, arguments.words)
    with opened_cache(root / CACHE_FILE) as cache:
        counts, skipped_batches = read_new_files(cache, folders)
        digests = all_digests(cache, folders, counts)
        labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
        images = distinct(digests, labels)
        write_lists(cache, root, folders, images)
    if class_names is not None and not (root / CLASS_NAMES_FILE).exists():
        with write_atomically(root / CLASS_NAMES_FILE) as temporary:
            temporary.write_text(class_names, encoding="utf-8")
    elif class_names is not None:
        print(f"imagenet21k: {root / CLASS_NAMES_FILE} is there, and is left as it is", file=sys.stderr)
    if skipped_batches:
        print(
            f"imagenet21k: {len(skipped_batches)} files left out, empty or no images, such as {skipped_batches[0]!r}",
            file=sys.stderr,
        )
    several = int((np.diff(images.offsets) > 1).sum())
    most = int(np.diff(images.offsets).max())
    print(
        f"imagenet21k: {len(labels)} files, {len(images.first)} distinct images, {several} with several labels (at "
        f"most {most}), {len(folders)} classes\n"
        f"imagenet21k: to train on it set -o {shlex.quote(f'data.root={root}')} -o data.train={ALL_LIST} "
        f"-o data.val={DUMMY_LIST} -o data.multi_label=true -o model.num_classes={len(folders)} -o loss.name=sigmoid"
    )
    return 0


def class_folders(images: Path, num_classes: int) -> list[Path]:
    """Raises ValueError where there are not so many, or tars in their place."""
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder; --root must hold images/CLASS/*.JPEG")
    entries = sorted(path for path in images.iterdir() if not path.name.startswith("."))
    tars = [path for path in entries if path.suffix == ".tar"]
    if tars:
        raise ValueError(
            f"{tars[0]}: is packed; unpack all of them: cd {shlex.quote(str(images))} && for t in *.tar; do "
            "mkdir -p ${t%.tar} && tar xf $t -C ${t%.tar} && rm $t; done"
        )
    folders = [path for path in entries if path.is_dir()]
    if len(folders) != num_classes:
        raise ValueError(
            f"{images}: has {len(folders)} class folders, not {num_classes}; complete it, or say --num-classes "
            f"{len(folders)} if it is a part on purpose"
        )
    for folder in folders:
        check_name(folder.name, folder)
    return folders


def check_name(name: str, path: Path | str) -> None:
    """Raises ValueError for a name that would be two lines of a list."""
    if "\n" in name or "\r" in name:
        raise ValueError(f"{str(path)!r}: its name breaks a list's lines; rename it")


def named(folders: list[Path], words: Path) -> str:
    """class_names.txt, from WordNet's `n00001740<tab>entity` a line. ValueError where a class has no name there."""
    lines = words.read_text(encoding="utf-8", errors="replace").splitlines()
    names = {wnid: name.strip() for wnid, _, name in (line.partition("\t") for line in lines)}
    for folder in folders:
        if not names.get(folder.name):
            raise ValueError(f"{words}: has no name for {folder.name}; give WordNet's words.txt, or leave out --words")
    return "".join(f"{folder.name} {names[folder.name]}\n" for folder in folders)


@contextmanager
def opened_cache(path: Path) -> Iterator[sqlite3.Connection]:
    """Raises ValueError for a file that is no cache of ours and for one that another run has open, else OSError."""
    path.open("ab").close()  # of a folder that can't be written to, this says more than SQLite does
    try:
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as cache:
            # Held until the end: one run at a time, and no shared memory, which network disks lack.
            cache.execute("PRAGMA locking_mode = EXCLUSIVE")
            cache.execute("PRAGMA journal_mode = WAL")  # a killed run's last folder is missing, and nothing else
            cache.execute(
                "CREATE TABLE IF NOT EXISTS files (folder BLOB, name BLOB, size INTEGER, changed_ns INTEGER, "
                "digest BLOB, PRIMARY KEY (folder, name)) WITHOUT ROWID"
            )
            yield cache
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise ValueError(f"{path}: another run is using it; wait until that has ended") from None
        raise OSError(f"{path}: {error}") from None  # a full disk, say: what is in the cache is still good
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: is no cache or damaged ({error}); remove it, all files are then read anew") from None


def read_new_files(cache: sqlite3.Connection, folders: list[Path]) -> tuple[list[int], list[str]]:
    """Brings the cache up to date, reading what is new on all cores; how many images each folder has, and what is none.

    Threads do: on files of 100 kB they are as quick as processes.
    """
    counts, skipped_batches = [], []
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 2) as threads,
        tqdm(unit="image", desc="reading", disable=None) as bar,
    ):
        for folder in folders:
            files, others = files_of(folder)
            if not files:
                raise ValueError(f"{folder}: this class folder has no image; put its images in, or remove it")
            key = os.fsencode(folder.name)
            rows = cache.execute("SELECT name, size, changed_ns FROM files WHERE folder = ?", (key,))
            known = {name: (size, changed_ns) for name, size, changed_ns in rows}
            new = [name for name, state in files.items() if known.get(name) != state]
            gone = [name for name in known if name not in files]
            digests = threads.map(digest_of, (os.path.join(os.fsencode(folder), name) for name in new))  # noqa: PTH118
            rows_to_add = [(key, name, *files[name], digest) for name, digest in zip(new, digests, strict=True)]
            if new or gone:
                cache.execute("BEGIN")
                cache.executemany("DELETE FROM files WHERE folder = ? AND name = ?", [(key, name) for name in gone])
                cache.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows_to_add)
                cache.execute("COMMIT")
            counts.append(len(files))
            skipped_batches += others
            bar.update(len(files))
    return counts, skipped_batches


def files_of(folder: Path) -> tuple[dict[bytes, tuple[int, int]], list[str]]:
    """A class's images by name, with size in bytes and when they were changed, and whatever else is in its folder.

    Hidden files are neither. Raises ValueError for a name that would be two lines of a list.
    """
    files: dict[bytes, tuple[int, int]] = {}
    others = []
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            name, path = os.fsdecode(entry.name), os.fsdecode(entry.path)
            is_image = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and entry.is_file()  # noqa: PTH122
            if is_image and (state := entry.stat()).st_size:
                check_name(name, path)
                files[entry.name] = (state.st_size, state.st_mtime_ns)
            else:
                others.append(path)
    return files, others


def digest_of(path: bytes) -> bytes:
    """Raises OSError, and ValueError for a file that became shorter as it was read."""
    try:
        content = read_whole(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None
    except DataError as error:
        raise ValueError(f"{os.fsdecode(path)}: {error}; it was changed meanwhile: give the command again") from None
    return hashlib.blake2b(content.data, digest_size=_DIGEST_BYTES).digest()


def all_digests(cache: sqlite3.Connection, folders: list[Path], counts: list[int]) -> np.ndarray:
    """Of all files, by folder and then by name, [num_files, 2] uint64."""
    digests = np.empty((sum(counts), 2), np.uint64)
    start = 0
    for folder, count in zip(folders, counts, strict=True):
        rows = cache.execute("SELECT digest FROM files WHERE folder = ? ORDER BY name", (os.fsencode(folder.name),))
        digests[start : start + count] = np.frombuffer(b"".join(row[0] for row in rows), np.uint64).reshape(-1, 2)
        start += count
    return digests


@dataclass(frozen=True)
class DistinctImages:
    """Images, each once, in the order of their first files; the labels of image n are `labels[offsets[n]:
    offsets[n + 1]]`, in order."""

    first: np.ndarray  # [num_images], the number of the first file
    labels: np.ndarray
    offsets: np.ndarray  # [num_images + 1]


def distinct(digests: np.ndarray, labels: np.ndarray) -> DistinctImages:
    """Files of one digest as one image. `labels` rise with the files' numbers."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: within an image, files stay in order
    ordered = digests[order]
    begins = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    image_of = np.cumsum(begins) - 1
    # A class counts once for an image, though it may have it in several files.
    new_label = begins | np.concatenate([[True], labels[order][1:] != labels[order][:-1]])
    counts = np.bincount(image_of[new_label])
    values, starts = labels[order][new_label], np.concatenate([[0], np.cumsum(counts)])
    first = order[begins]
    by_file = np.argsort(first, kind="stable")
    sizes = counts[by_file]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    picked = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes) + np.repeat(starts[:-1][by_file], sizes)
    return DistinctImages(first[by_file], values[picked], offsets)


def write_lists(cache: sqlite3.Connection, root: Path, folders: list[Path], images: DistinctImages) -> None:
    """Both lists, or neither of them anew."""
    number, image = 0, 0
    with (
        write_atomically(root / DUMMY_LIST) as dummy_path,
        write_atomically(root / ALL_LIST) as all_path,
        all_path.open("wb") as all_list,
        dummy_path.open("wb") as dummy_list,
    ):
        for label, folder in enumerate(tqdm(folders, unit="class", desc="writing", disable=None)):
            key = os.fsencode(folder.name)
            num_dummy = 0
            for (name,) in cache.execute("SELECT name FROM files WHERE folder = ? ORDER BY name", (key,)):
                if image < len(images.first) and images.first[image] == number:
                    labels = images.labels[images.offsets[image] : images.offsets[image + 1]].tolist()
                    line = b"images/%b/%b %b\n" % (key, name, ",".join(map(str, labels)).encode())
                    all_list.write(line)
                    if labels == [label] and num_dummy < NUM_DUMMY:
                        dummy_list.write(line)
                        num_dummy += 1
                    image += 1
                number += 1
