"""Reads every image of a set with the decoder that training uses, and tells what would stop training, and what is odd.

    missing, empty, unreadable       the file, or what the disk says of it
    truncated, not_an_image          what the decoder refuses, by whether it begins as an image does
    too_large                        more than 179 megapixels, by the header
    class_folders, empty_class, label    train and val differ; a class has no image; a label is beyond the classes
                                     all of these stop training; the rest does not:
    cmyk, 16_bit, other_format, huge     odd, but decoded; a PNG that is called .jpg, say; more than 50 megapixels
    no_end                           a JPEG without its end marker that the decoder takes nevertheless
    duplicate                        a validation image that is a training image, too

A report is printed, and written as JSON to ROOT/data_check.json, which data.on_bad_image=skip reads. Exit code 1 where
something would stop training. What has been read is kept beside it, in .data_check.journal, until the end, so that the
same command goes on where it was stopped; files that were changed meanwhile are read again.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools.arguments import ToolParser
from vit_static.common.errors import DataError, truncate
from vit_static.common.io import lock, write_atomically, write_json
from vit_static.data.dali_pipeline import decoders_words, decoding_pipeline
from vit_static.data.image_set import FileDataset, ImageDataset
from vit_static.data.list_file import read_list
from vit_static.data.open_set import (
    CHECK_FILE,
    CLASS_NAMES_FILE,
    class_folders,
    is_of_shards,
    list_folders,
    read_class_names,
)
from vit_static.data.webdataset import open_shards

STOPPING = frozenset({
    "missing", "empty", "unreadable", "too_large", "truncated", "not_an_image", "class_folders", "empty_class", "label",
})  # fmt: skip
HUGE_PIXELS = 50_000_000
NUM_SHOWN = 3  # of each kind
MOST_CLASSES = 1_000_000  # of shards whose number of classes isn't known
_JOURNAL_BATCH, _DECODED_AT_ONCE = 256, 32
_FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF",
}  # fmt: skip


_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"RIFF", b"II*\0", b"MM\0*")  # of those formats


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong or odd."""

    path: str  # below the root
    split: str
    kind: str
    detail: str
    stops_training: bool


@dataclass(frozen=True)
class Checked:
    """What reading a stretch of images found: a digest each (0 where there is nothing to read), and problems."""

    digests: np.ndarray  # uint64
    problems: list[Problem]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 where training would be stopped. Raises ValueError for a wrong argument."""
    parser = ToolParser(prog="vit_static data check", description="Reads every image of a set.")
    parser.add_argument("root", type=Path, metavar="DIR", help="the set, as data.root names it")
    parser.add_argument("--train", default="train", help="as data.train (default: train)")
    parser.add_argument("--val", default="val", help="as data.val (default: val); passed over where there is none")
    parser.add_argument("--fix", type=Path, metavar="DIR2", help="write lists there without what stops training")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where the report goes (default: DIR/{CHECK_FILE})")
    arguments = parser.parse_args(argv)
    root: Path = arguments.root
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; name what data.root names")
    places = {"train": root / arguments.train, "val": root / arguments.val}
    if not places["train"].exists():
        raise ValueError(f"{places['train']}: no such folder or list; name it with --train, as data.train does")
    if arguments.fix is not None and arguments.fix.exists() and any(arguments.fix.iterdir()):
        raise ValueError(f"{arguments.fix}: is not empty; name another folder with --fix")
    sets, problems = open_sets(root, {split: place for split, place in places.items() if place.exists()})
    if arguments.fix is not None and not all(isinstance(images, FileDataset) for images in sets.values()):
        raise ValueError("--fix writes lists of files, and these are shards: set data.on_bad_image=skip instead")
    path = arguments.json or root / CHECK_FILE
    digests = {}
    with open_journal(path.with_name(f".{path.stem}.journal"), sets) as journal:
        for split, images in sets.items():
            digests[split], found = check_set(images, split, journal)
            problems += found
    problems += duplicates(sets, digests)
    problems.sort(key=lambda problem: (problem.split, problem.kind, problem.path, problem.detail))
    report = {
        "root": str(root),
        "train": arguments.train,
        "val": arguments.val,
        "num_images": {split: len(images) for split, images in sets.items()},
        "num_copies_within": {split: num_copies(found) for split, found in digests.items()},
        "problems": [asdict(problem) for problem in problems],
    }
    write_json(report, path)
    journal.remove()
    print_report(report, problems, path)
    if arguments.fix is not None:
        write_fixed(arguments.fix, root, sets, problems)
    return 1 if any(problem.stops_training for problem in problems) else 0


def problem(split: str, path: str, kind: str, detail: str) -> Problem:
    return Problem(path, split, kind, " ".join(detail.split()), kind in STOPPING)


def open_sets(root: Path, places: dict[str, Path]) -> tuple[dict[str, ImageDataset], list[Problem]]:
    """The images of each split, and what is wrong with how they are laid out, which would stop training at its start.

    Raises DataError for a list or an index that can't be read at all.
    """
    sets: dict[str, ImageDataset] = {}
    problems: list[Problem] = []
    folders: dict[str, list[Path]] = {}
    for split, place in places.items():
        if place.is_file():
            sets[split] = FileDataset(root, read_list(place), [])
        elif is_of_shards(place):
            # Labels are checked as the images are read.
            sets[split] = open_shards(place, root, [""] * (num_names(root) or MOST_CLASSES), True)
        else:
            folders[split] = class_folders(place)
            known = [folder.name for folder in folders.get("train", folders[split])]
            lines, counts = list_folders(folders[split], root)
            for folder in np.flatnonzero(counts == 0).tolist():
                path = os.path.relpath(folders[split][folder], root)
                problems.append(problem(split, path, "empty_class", "this class folder has no image"))
            labels = np.array([known.index(f.name) if f.name in known else -1 for f in folders[split]], np.int32)
            lines.labels.values[:] = labels[lines.labels.values]
            sets[split] = FileDataset(root, lines, [])
    if len(folders) == 2:
        names = {split: {folder.name for folder in found} for split, found in folders.items()}
        for split, other in (("train", "val"), ("val", "train")):
            for name in sorted(names[split] - names[other]):
                path = os.path.relpath(places[split] / name, root)
                problems.append(problem(split, path, "class_folders", f"{other} has no such class folder"))
    return sets, problems + label_problems(root, sets, {split for split in places if places[split].is_file()})


def num_names(root: Path) -> int | None:
    """How many classes the set says that it has."""
    path = root / CLASS_NAMES_FILE
    return sum(1 for line in read_class_names(path) if line.strip()) if path.is_file() else None


def label_problems(root: Path, sets: dict[str, ImageDataset], lists: set[str]) -> list[Problem]:
    """Of lists: labels beyond the classes that the set names, or that the training list has."""
    train = sets["train"]
    of_train = (
        1 + int(train.image_list.labels.values.max()) if isinstance(train, FileDataset) and "train" in lists else None
    )
    num_classes = num_names(root) or of_train
    found = []
    for split in sorted(lists):
        images = sets[split]
        assert isinstance(images, FileDataset)
        if num_classes is not None:
            for number in (n for n in range(len(images)) if images.image_list.labels.of(n).max() >= num_classes):
                label = int(images.image_list.labels.of(number).max())
                said = f"label {label} of {num_classes} classes, which begin at 0"
                found.append(problem(split, images.relative_name(number), "label", said))
    return found


class Journal:
    """What has been read so far, a line a stretch, so that a stopped check goes on."""

    def __init__(self, path: Path, sets: dict[str, ImageDataset]) -> None:
        self._path = path
        digests = {split: images.digest() for split, images in sets.items()}
        entries = [entry for line in path.read_bytes().splitlines() if (entry := _parsed(line)) is not None]
        if not entries or entries[0] != digests:
            entries = [digests]
            path.write_text(json.dumps(digests), encoding="utf-8")
        self._known = {f"{entry.get('split')}/{entry.get('start')}": entry for entry in entries[1:]}
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n")  # a killed run may have left half a line

    def recall(self, split: str, start: int, state: str) -> Checked | None:
        """What a stretch gave, if its files are still as they were, and the entry is one of ours."""
        entry = self._known.get(f"{split}/{start}", {})
        if entry.get("state") != state:
            return None
        try:
            problems = [Problem(**found) for found in entry["problems"]]
            digests = np.array(entry["digests"], np.uint64)
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        texts = (text for found in problems for text in (found.path, found.split, found.kind, found.detail))
        return Checked(digests, problems) if all(isinstance(text, str) for text in texts) else None

    def keep(self, split: str, start: int, state: str, checked: Checked) -> None:
        entry = {"split": split, "start": start, "state": state, "digests": checked.digests.tolist()}
        self._file.write(json.dumps({**entry, "problems": [asdict(found) for found in checked.problems]}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def open_journal(path: Path, sets: dict[str, ImageDataset]) -> Iterator[Journal]:
    """Raises ValueError while another check writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):  # a stranger's set would have us write elsewhere
        raise ValueError(f"{path}: is no file of this program's; take it away")
    path.touch()
    with (
        lock(path, f"{path}: another check is writing it; wait until it has ended, or give this one its own --json"),
        closing(Journal(path, sets)) as journal,
    ):
        yield journal


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def check_set(images: ImageDataset, split: str, journal: Journal) -> tuple[np.ndarray, list[Problem]]:
    """Reads every image of a split, on all cores; digests [num_images], and problems."""
    digests, problems = np.zeros(len(images), np.uint64), []
    decoder = Decoder()
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 2) as threads,
        tqdm(total=len(images), unit="image", desc=split, disable=None) as bar,
    ):
        for start in range(0, len(images), _JOURNAL_BATCH):
            numbers = range(start, min(start + _JOURNAL_BATCH, len(images)))
            state = hashlib.blake2b(repr([state_of(images, n) for n in numbers]).encode(), digest_size=8).hexdigest()
            checked = journal.recall(split, start, state)
            if checked is None or checked.digests.shape != (len(numbers),):
                checked = check_some(images, split, numbers, decoder, threads)
                journal.keep(split, start, state, checked)
            digests[start : start + len(numbers)] = checked.digests
            problems += checked.problems
            bar.update(len(numbers))
    return digests, problems


def state_of(images: ImageDataset, number: int) -> tuple[int, int] | None:
    """When an image's file, or the shard that it is in, was changed, and its size in bytes."""
    path = images.name(number)
    for place in (path, os.path.dirname(path)):  # noqa: PTH120 - a Path for each image is slow
        try:
            found = os.stat(place)  # noqa: PTH116
        except (OSError, ValueError):  # what is wrong is told when it is read
            continue
        return found.st_mtime_ns, found.st_size
    return None


def check_some(
    images: ImageDataset, split: str, numbers: Sequence[int], decoder: "Decoder", threads: ThreadPoolExecutor
) -> Checked:
    digests, problems = [], []
    to_decode: list[tuple[str, np.ndarray]] = []
    for name, (encoded, digest, found) in zip(
        map(images.relative_name, numbers), threads.map(lambda n: look_at(images, split, n), numbers), strict=True
    ):
        digests.append(digest)
        problems += found
        if encoded is not None:
            to_decode.append((name, encoded))
    refused = decoder.refused([encoded for _, encoded in to_decode])
    for (name, encoded), reason in zip(to_decode, refused, strict=True):
        if reason is not None:
            begins_well = encoded[:4].tobytes().startswith(_BEGINNINGS)
            problems.append(problem(split, name, "truncated" if begins_well else "not_an_image", reason))
        elif encoded[:2].tobytes() == b"\xff\xd8" and b"\xff\xd9" not in encoded[-4096:].tobytes():
            problems.append(problem(split, name, "no_end", "a JPEG without its end marker"))
    return Checked(np.array(digests, np.uint64), problems)


def look_at(images: ImageDataset, split: str, number: int) -> tuple[np.ndarray | None, int, list[Problem]]:
    """An image's bytes, where it has any, their digest, and what its file and its header say."""
    name = images.relative_name(number)
    try:
        encoded, _ = images.read(number)
    except DataError as error:
        said = str(error).removeprefix(f"{truncate(images.name(number), 300)}: ")
        return None, 0, [problem(split, name, error.kind, said)]
    digest = int.from_bytes(hashlib.blake2b(encoded.data, digest_size=8).digest(), "big")
    return encoded, digest, list(oddities(split, name, encoded))


def header_of(encoded: np.ndarray) -> Image.Image | None:
    try:
        return Image.open(io.BytesIO(encoded.tobytes()))  # reads no pixels
    except Exception:  # a broken header can raise anything
        return None


def oddities(split: str, name: str, encoded: np.ndarray) -> Iterator[Problem]:
    """What an image's header tells."""
    image = header_of(encoded)
    if image is None:
        return
    expected = _FORMATS.get(Path(name).suffix.lower())
    if expected is not None and image.format not in (expected, "MPO"):  # a JPEG with several pictures
        yield problem(split, name, "other_format", f"is a {image.format} called {Path(name).suffix}")
    if image.mode == "CMYK":
        yield problem(split, name, "cmyk", "has four inks, which are turned into red, green and blue")
    is_deep_png = image.format == "PNG" and encoded[24:25] == 16  # the bit depth in its header
    if is_deep_png or image.mode.startswith("I") or image.mode == "F":
        yield problem(split, name, "16_bit", "has more than 8 bits a channel, of which 8 are kept")
    if image.width * image.height > HUGE_PIXELS:
        yield problem(split, name, "huge", f"{image.width}x{image.height} pixels")


class Decoder:
    """Training's decoder on the CPU, which dies of an image that it refuses, and is made anew."""

    def __init__(self) -> None:
        self._num_threads = len(os.sched_getaffinity(0))
        self._together = self._make(_DECODED_AT_ONCE)

    def refused(self, images: list[np.ndarray]) -> list[str | None]:
        """Of each encoded image why it can't be decoded, or None."""
        reasons: list[str | None] = []
        for start in range(0, len(images), _DECODED_AT_ONCE):
            some = images[start : start + _DECODED_AT_ONCE]
            try:
                self._together.run(encoded=some)
                reasons += [None] * len(some)
            except RuntimeError:
                self._together = self._make(_DECODED_AT_ONCE)
                reasons += self._one_by_one(some)
        return reasons

    def _one_by_one(self, images: list[np.ndarray]) -> list[str | None]:
        reasons: list[str | None] = []
        alone = self._make(1)
        for image in images:
            try:
                alone.run(encoded=[image])
                reasons.append(None)
            except RuntimeError as error:
                reasons.append(decoders_words(error))
                alone = self._make(1)
        return reasons

    def _make(self, batch_size: int) -> Any:
        return decoding_pipeline(batch_size, self._num_threads, None)


def duplicates(sets: dict[str, ImageDataset], digests: dict[str, np.ndarray]) -> list[Problem]:
    """Validation images whose bytes are a training image's."""
    if "val" not in digests:
        return []
    in_train, first = np.unique(digests["train"], return_index=True)
    found = []
    for number in np.flatnonzero(np.isin(digests["val"], in_train) & (digests["val"] != 0)).tolist():
        twin = int(first[np.searchsorted(in_train, digests["val"][number])])
        detail = f"is {sets['train'].relative_name(twin)}, too"
        found.append(problem("val", sets["val"].relative_name(number), "duplicate", detail))
    return found


def num_copies(digests: np.ndarray) -> int:
    """How many images are copies of others in the same split."""
    readable = digests[digests != 0]
    return len(readable) - len(np.unique(readable))


def print_report(report: dict[str, Any], problems: list[Problem], path: Path) -> None:
    counts = " and ".join(f"{count} {split}" for split, count in report["num_images"].items())
    print(f"check: read {counts} images of {report['root']}")
    for (stops, kind), count in sorted(Counter((not p.stops_training, p.kind) for p in problems).items()):
        some = [found for found in problems if found.kind == kind]
        print(f"  {kind:<14}{count:8}  {'' if stops else 'stops training'}")
        for found in some[:NUM_SHOWN]:
            print(f"    {found.path}: {found.detail}")
        if count > NUM_SHOWN:
            print(f"    and {count - NUM_SHOWN} more")
    for split, count in report["num_copies_within"].items():
        if count:
            print(f"  {count} {split} images are copies of other {split} images")
    num_stopping = sum(found.stops_training for found in problems)
    if num_stopping:
        print(
            f"check: {num_stopping} of these would stop training: mend or remove them, set data.on_bad_image=skip, or "
            "have lists without them written with --fix DIR2"
        )
    else:
        print("check: nothing would stop training")
    print(f"check: all of it in {path}")


def write_fixed(folder: Path, root: Path, sets: dict[str, ImageDataset], problems: list[Problem]) -> None:
    """Lists of what doesn't stop training, by whole paths; labels are those of the training set's folders or lists."""
    folder.mkdir(parents=True, exist_ok=True)
    bad = {(found.split, found.path) for found in problems if found.stops_training}
    num_classes = 0
    for split, images in sets.items():
        assert isinstance(images, FileDataset)
        num_left_out = 0
        with write_atomically(folder / f"{split}_list.txt") as temporary, temporary.open("wb") as file:
            for number in range(len(images)):
                labels = images.image_list.labels.of(number).tolist()
                if (split, images.relative_name(number)) in bad or min(labels) < 0:
                    num_left_out += 1
                    continue
                num_classes = max(num_classes, 1 + max(labels))
                path = os.path.abspath(images.name(number))  # noqa: PTH100 - symbolic links stay as they are
                file.write(os.fsencode(path) + b" " + ",".join(map(str, labels)).encode() + b"\n")
        print(f"check: {folder / f'{split}_list.txt'}: {len(images) - num_left_out} images, {num_left_out} left out")
    if (root / CLASS_NAMES_FILE).is_file():
        (folder / CLASS_NAMES_FILE).write_bytes((root / CLASS_NAMES_FILE).read_bytes())
    of_val = " -o data.val=val_list.txt" if "val" in sets else ""
    print(
        f"check: to train on these set -o data.root={folder} -o data.train=train_list.txt{of_val} "
        f"-o model.num_classes={num_names(root) or num_classes}"
    )
