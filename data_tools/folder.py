"""Lists for people's own images: a folder for each class, split into training and validation.

    ROOT/CLASS/IMAGE.jpg           what is there; or ROOT/train/CLASS/..., ROOT/val/CLASS/..., split already
    OUT/train_list.txt, val_list.txt    'CLASS/IMAGE.jpg 0' a line; OUT is ROOT unless --out says otherwise
    OUT/class_names.txt            'FOLDER NAME' a line, in label order; names that one there or in ROOT has are kept
    OUT/split.json                 how the split was made, and the copies that were found

Whether an image is for validation is a matter of what is in it and of the seed: so it stays where it is when others are
added or it is renamed, and copies of one image are never on both sides. Of every class at least one image is for
training and, of two or more, one for validation; where chance would have it otherwise, one image is put on the other
side. It must stay there, too, as its class grows, which no rule without a memory can do: split.json remembers it, for
as long as the seed and the share are the same. Where a class loses its only validation image, another takes its place.
"""

import hashlib
import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data_tools.arguments import ToolParser
from vit_static.common.errors import DataError
from vit_static.common.io import write_atomically, write_json
from vit_static.config.schema import DataConfig
from vit_static.data.image_set import IMAGE_SUFFIXES, FileDataset
from vit_static.data.open_set import CLASS_NAMES_FILE, class_folders, open_set

SPLIT_FILE = "split.json"
SPLITS = ("train", "val")
_READ_AT_ONCE = 4096  # images that are handed to the threads


@dataclass(frozen=True)
class OwnImage:
    """One that was found; `digest`, 16 hexadecimal digits, is of its content and the seed."""

    path: str
    label: int
    digest: str

    @property
    def place(self) -> float:
        """In the split, 0 to 1; copies have the same."""
        return int(self.digest, 16) / 2**64


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises ValueError for a wrong argument or folder."""
    parser = ToolParser(prog="vit_static data folder", description="Lists of your own images: a folder for each class.")
    parser.add_argument("--root", type=Path, metavar="DIR", required=True, help="holds CLASS/IMAGE.jpg")
    parser.add_argument("--val-share", type=float, default=0.1, help="of the images for validation (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the lists (default: --root)")
    arguments = parser.parse_args(argv)
    root, out = arguments.root, arguments.out or arguments.root
    if not 0 < arguments.val_share < 1:
        raise ValueError(f"--val-share {arguments.val_share:g}: must be between 0 and 1")
    is_split = split_already(root)
    data = DataConfig(root=str(root)) if is_split else DataConfig(root=str(root), train=".")
    sets = {split: listed(data, split) for split in (SPLITS if is_split else ("train",))}
    folders = sets["train"].class_names
    check_out(out, root)
    class_names = names_of_classes(folders, root, out)
    made_by = {"seed": arguments.seed, "val_share": None if is_split else arguments.val_share}
    settled = remembered(out / SPLIT_FILE, made_by)
    images = {split: list(read(found, arguments.seed)) for split, found in sets.items()}
    if not is_split:
        images = divide(images["train"], arguments.val_share, settled)
        if not images["val"]:
            raise ValueError(f"{root}: no class has two different images, one of them for validation; put more in")
    found = copies(images)
    write(out, root, images, class_names, {"root": str(root), **made_by, **asdict(found), "settled": settled})
    if found.on_both_sides:
        warn(f"{len(found.on_both_sides)} validation images are training images, too, such as {found.on_both_sides[0]}")
    if found.in_several_classes:
        warn(f"{len(found.in_several_classes)} images stand in several classes, such as {found.in_several_classes[0]}")
    print(
        f"folder: {len(images['train'])} training and {len(images['val'])} validation images of {len(folders)} classes"
        f"{f', {found.num_copies} of them copies of others' if found.num_copies else ''}\n"
        f"folder: to train on them set -o {shlex.quote(f'data.root={out}')} -o data.train=train_list.txt "
        f"-o data.val=val_list.txt -o model.num_classes={len(folders)}"
    )
    return 0


def warn(message: str) -> None:
    print(f"folder: {message}", file=sys.stderr)


def split_already(root: Path) -> bool:
    """Whether the root holds train and val. Raises ValueError where it holds class folders in one of them alone."""
    there = [split for split in SPLITS if (root / split).is_dir()]
    if len(there) == 1 and any(path.is_dir() for path in (root / there[0]).iterdir()):
        other = SPLITS[1 - SPLITS.index(there[0])]
        whole = shlex.quote(str(root / there[0]))
        raise ValueError(f"{root}: has {there[0]} and no {other}; add it, or have one split off with --root {whole}")
    return len(there) == 2


def check_out(out: Path, root: Path) -> None:
    """Raises ValueError where the lists would be taken for a class, or take the place of somebody's own."""
    if root.resolve() in out.resolve().parents:
        raise ValueError(f"--out {out}: lies in --root, among its classes; name a folder elsewhere, or leave it out")
    foreign = [path for path in lists_in(out).values() if path.exists() and not (out / SPLIT_FILE).exists()]
    if foreign:
        raise ValueError(
            f"{foreign[0]}: is there, and not this tool's; name another folder with --out, or move it away"
        )


def lists_in(out: Path) -> dict[str, Path]:
    return {split: out / f"{split}_list.txt" for split in SPLITS}


def listed(data: DataConfig, split: str) -> FileDataset:
    """The images of a split's class folders. Raises ValueError where that isn't what is there.

    Says what is left out: images outside of the class folders, and folders within them.
    """
    place = Path(data.root) / {"train": data.train, "val": data.val}[split]
    if not place.is_dir():
        raise ValueError(f"{place}: no such folder; --root must hold a folder for each class")
    folders = class_folders(place)
    if len(folders) < 2:
        raise ValueError(f"{place}: has one class folder; there must be two or more to tell apart")
    outside = [path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    within = [Path(entry) for folder in folders for entry in os.scandir(folder) if entry.is_dir()]
    for found, what in ((outside, "images lie outside of the class folders"), (within, "folders lie in class folders")):
        skipped_batches = sorted(path for path in found if not path.name.startswith("."))
        if skipped_batches:
            warn(f"left out: {len(skipped_batches)} {what}, such as {skipped_batches[0]}")
    images = open_set(data, split, len(folders))
    assert isinstance(images, FileDataset)
    return FileDataset(images.root, images.image_list, [folder.name for folder in folders])


def read(images: FileDataset, seed: int) -> Iterator[OwnImage]:
    """All of them. Raises ValueError for a name that a list can't hold, and for an image that can't be read."""

    def one(number: int) -> OwnImage:
        path = os.path.normpath(images.relative_name(number))
        if "\n" in path or "\r" in path:
            raise ValueError(f"{images.name(number)!r}: its name can't stand in a list; rename the file")
        try:
            content, labels = images.read(number)
        except DataError as error:
            raise ValueError(f"{error}; mend the file, or remove it") from None
        digest = hashlib.blake2b(content.data, digest_size=8, key=str(seed).encode()).hexdigest()
        return OwnImage(path, int(labels[0]), digest)

    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 2) as threads,
        tqdm(total=len(images), unit="image", disable=None) as bar,
    ):
        for start in range(0, len(images), _READ_AT_ONCE):
            for image in threads.map(one, range(start, min(start + _READ_AT_ONCE, len(images)))):
                yield image
                bar.update()


def divide(images: list[OwnImage], val_share: float, settled: dict[str, str]) -> dict[str, list[OwnImage]]:
    """Images whose place is below the share are validation, but for those of `settled`, by digest, to which it adds.

    So that each class has an image for training and, if it has two different ones, one for validation.
    """
    side_of = {image.digest: "val" if image.place < val_share else "train" for image in images} | settled
    digests_of: defaultdict[int, set[str]] = defaultdict(set)
    for image in images:
        digests_of[image.label].add(image.digest)
    for _, digests in sorted(digests_of.items()):
        sides = {side_of[digest] for digest in digests}
        if sides == {"val"} or len(digests) == 1:  # a lone one is for training, and stays so when a second one comes
            side_of[max(digests)] = settled[max(digests)] = "train"
        elif sides == {"train"}:
            new = min(digests - settled.keys(), default=min(digests))
            side_of[new] = settled[new] = "val"
    return {split: [image for image in images if side_of[image.digest] == split] for split in SPLITS}


def remembered(path: Path, made_by: dict[str, float | None]) -> dict[str, str]:
    """What an earlier run of the same seed and share settled. Raises ValueError for a damaged file."""
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        same = all(summary[key] == value for key, value in made_by.items())
        return {str(digest): SPLITS[SPLITS.index(side)] for digest, side in summary["settled"].items()} if same else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: is damaged, or not this tool's; remove it, and the split is made anew") from None


@dataclass(frozen=True)
class Copies:
    """Images that are others, byte for byte: how many, and the paths of those where there should be none."""

    num_copies: int
    on_both_sides: list[str]  # of validation
    in_several_classes: list[str]


def copies(images: dict[str, list[OwnImage]]) -> Copies:
    everything = [image for split in SPLITS for image in images[split]]
    labels_of: defaultdict[str, set[int]] = defaultdict(set)
    for image in everything:
        labels_of[image.digest].add(image.label)
    in_train = {image.digest for image in images["train"]}
    return Copies(
        len(everything) - len(labels_of),
        [image.path for image in images["val"] if image.digest in in_train],
        [image.path for image in everything if len(labels_of[image.digest]) > 1],
    )


def names_of_classes(folders: list[str], root: Path, out: Path) -> str:
    """class_names.txt: the names that one in `out` or in `root` gives, else the folders' own.

    Raises ValueError for a file that is about other classes.
    """
    given: dict[str, str] = {}
    for path in (root / CLASS_NAMES_FILE, out / CLASS_NAMES_FILE):
        if path.exists():
            lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
            names = {line[0]: line[1].strip() for line in lines if len(line) == 2}
            if not names.keys() & set(map(one_word, folders)):
                raise ValueError(f"{path}: names none of the class folders; a line is 'FOLDER NAME'; move it away")
            given |= names
    return "".join(f"{one_word(name)} {given.get(one_word(name), name.replace('_', ' '))}\n" for name in folders)


def one_word(folder: str) -> str:
    """What stands before a class's name, in one word."""
    return "_".join(folder.split())


def write(
    out: Path, root: Path, images: dict[str, list[OwnImage]], class_names: str, summary: dict[str, object]
) -> None:
    """split.json first: it says whose the lists are."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(summary, out / SPLIT_FILE)
    prefix = "" if out.resolve() == root.resolve() else f"{root.resolve()}/"
    for split, path in lists_in(out).items():
        with write_atomically(path) as temporary, temporary.open("wb") as file:
            # A path's bytes are written as they are, also where they aren't UTF-8.
            file.writelines(os.fsencode(f"{prefix}{image.path} {image.label}\n") for image in images[split])
    with write_atomically(out / CLASS_NAMES_FILE) as temporary:
        temporary.write_text(class_names, encoding="utf-8", errors="replace")
