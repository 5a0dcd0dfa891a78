"""Lists for people's own images: a folder for each class, split into training and validation.

    ROOT/CLASS/IMAGE.jpg           what is there; or ROOT/train/CLASS/..., ROOT/val/CLASS/..., split already
    OUT/train_list.txt, val_list.txt    'CLASS/IMAGE.jpg 0' a line; OUT is ROOT unless --out says otherwise
    OUT/class_names.txt            a line a class, in label order; one that is there is left alone
    OUT/split.json                 how the split was made, and the copies that were found

Whether an image is for validation is a matter of what is in it and of the seed: so it stays where it is when others are
added or it is renamed, and copies of one image are never on both sides. Of every class with two or more images at least
one is on each side; a class that chance would leave without one gives its likeliest, and only such a class's split may
change as it grows.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_tools.arguments import ToolParser
from vit_static.config import DataConfig
from vit_static.data.images import FileSet
from vit_static.data.sets import CLASS_NAMES_FILE, num_classes_of, open_set
from vit_static.files import write_atomically

SPLIT_FILE = "split.json"


@dataclass(frozen=True)
class OwnImage:
    """One that was found. `place`, 0 to 1, is where its content puts it in the split; copies have the same."""

    path: str
    label: int
    place: float


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
    written = [out / name for name in ("train_list.txt", "val_list.txt")]
    foreign = [path for path in written if path.exists() and not (out / SPLIT_FILE).exists()]
    if foreign:
        raise ValueError(
            f"{foreign[0]}: is there, and not this tool's; name another folder with --out, or move it away"
        )
    is_split = (root / "train").is_dir() and (root / "val").is_dir()
    sets = {split: listed(root, split if is_split else ".") for split in (("train", "val") if is_split else ("train",))}
    if is_split and sets["train"].class_names != sets["val"].class_names:
        odd = sorted(set(sets["train"].class_names) ^ set(sets["val"].class_names))[0]
        raise ValueError(f"{root}: train and val must have the same class folders, but differ in {odd!r}")
    images = {split: read(images, arguments.seed) for split, images in sets.items()}
    if not is_split:
        images = divide(images["train"], arguments.val_share)
    num_copies, both_sides = copies(images)
    out.mkdir(parents=True, exist_ok=True)
    for path, split in zip(written, ("train", "val"), strict=True):
        prefix = "" if out.resolve() == root.resolve() else f"{root.resolve()}/"
        with write_atomically(path) as temporary:
            temporary.write_text("".join(f"{prefix}{image.path} {image.label}\n" for image in images[split]))
    folders = sets["train"].class_names
    if not (out / CLASS_NAMES_FILE).exists():
        with write_atomically(out / CLASS_NAMES_FILE) as temporary:
            temporary.write_text("".join(f"{one_word(name)} {name.replace('_', ' ')}\n" for name in folders))
    summary = {
        "root": str(root),
        "seed": arguments.seed,
        "val_share": None if is_split else arguments.val_share,
        "num_images": {split: len(found) for split, found in images.items()},
        "num_copies": num_copies,
        "on_both_sides": both_sides,
    }
    with write_atomically(out / SPLIT_FILE) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"folder: {len(images['train'])} training and {len(images['val'])} validation images of {len(folders)} classes"
        f"{f', {num_copies} of them copies of others' if num_copies else ''}"
    )
    if both_sides:
        print(f"folder: {len(both_sides)} validation images are training images, too, such as {both_sides[0]}")
    print(
        f"folder: to train on them set -o data.root={out} -o data.train=train_list.txt -o data.val=val_list.txt "
        f"-o model.num_classes={len(folders)}"
    )
    return 0


def listed(root: Path, folder: str) -> FileSet:
    """The images of the class folders in a folder below the root. Raises ValueError where that isn't what is there."""
    place = root / folder
    if not place.is_dir():
        raise ValueError(f"{root}: no such folder; --root must hold a folder for each class")
    data = DataConfig(root=str(root), train=folder)
    num_classes = num_classes_of(data, "train")
    if num_classes < 2:
        raise ValueError(f"{place}: has one class folder; there must be two or more to tell apart")
    images = open_set(data, "train", num_classes)
    assert isinstance(images, FileSet)
    folders = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    return FileSet(root, images.lines, folders)


def read(images: FileSet, seed: int) -> list[OwnImage]:
    """All of them. Raises ValueError for a name that a list can't hold."""

    def one(number: int) -> OwnImage:
        path = os.path.normpath(images.relative_name(number))
        if not path.isprintable():
            raise ValueError(f"{images.name(number)!r}: its name can't stand in a list; rename the file")
        content, labels = images.read(number)
        digest = hashlib.blake2b(content.data, digest_size=8, key=str(seed).encode()).digest()
        return OwnImage(path, int(labels[0]), int.from_bytes(digest, "big") / 2**64)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(tqdm(threads.map(one, range(len(images))), total=len(images), unit="image", disable=None))


def divide(images: list[OwnImage], val_share: float) -> dict[str, list[OwnImage]]:
    """Images whose place is below the share are validation; at least one of each class that has two, on each side."""
    places_of: dict[int, list[float]] = {}
    for image in images:
        places_of.setdefault(image.label, []).append(image.place)
    bounds = {}
    for label, places in places_of.items():
        ordered = sorted(set(places))  # copies have one place: they go together
        num_val = sum(place < val_share for place in ordered)
        num_val = min(max(num_val, 1), len(ordered) - 1)
        bounds[label] = ordered[num_val] if num_val < len(ordered) else float("inf")
    is_val = [image.place < bounds[image.label] for image in images]
    return {
        "train": [image for image, val in zip(images, is_val, strict=True) if not val],
        "val": [image for image, val in zip(images, is_val, strict=True) if val],
    }


def copies(images: dict[str, list[OwnImage]]) -> tuple[int, list[str]]:
    """How many images are copies of others, and the validation images that are training images, too."""
    times = Counter(image.place for found in images.values() for image in found)
    in_train = {image.place for image in images["train"]}
    return sum(times.values()) - len(times), [image.path for image in images["val"] if image.place in in_train]


def one_word(folder: str) -> str:
    """What stands before a class's name, in one word."""
    return "_".join(folder.split())
