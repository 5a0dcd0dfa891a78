"""List files for your own images, one folder per class, split into training and validation.

    ROOT/CLASS/IMAGE.jpg           the images; or ROOT/train/CLASS/..., ROOT/val/CLASS/..., if they are split already
    OUT/train_list.txt, val_list.txt    one line per image, 'CLASS/IMAGE.jpg 0'; OUT is ROOT without --out
    OUT/class_names.txt            one line per class, 'FOLDER NAME', in label order, with a tab between them if they
                                   have spaces; keeps the names of an existing file in OUT or ROOT
    OUT/split.json                 how the split was made, and the copies found

The split is stratified: validation gets --val-share of each class, at least one image of a class with two or more.
Which ones depends on their content and the seed. split.json records the split of every image, so an image stays in its
split when others are added or when it is renamed, for as long as seed, share and --group-by are the same. Copies of an
image are never in both splits, nor are images of a group: those whose file names give the same match of --group-by, for
example the pictures of a burst. If a class loses its only validation image, another one replaces it.
"""

import hashlib
import json
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath

from vit_static.common.errors import DataError
from vit_static.common.io import write_json, write_text
from vit_static.common.terminal import ProgressBar
from vit_static.common.text import counted, print_line, say
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_formats import describe_left_out, is_image_name
from vit_static.data.image_set import FileDataset
from vit_static.data.open_set import (
    CLASS_NAMES_FILE,
    class_folders,
    class_line,
    name_of_folder,
    open_set,
    read_class_names,
    split_path,
)

from .arguments import ToolParser, override_options
from .stratify import SPLITS, UserImage, divide, group_of

SPLIT_FILE = "split.json"
_MAX_NAMED_FILES = 10  # in an error
_READ_BATCH_SIZE = 4096  # images that are queued for the threads


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Raise ValueError for a wrong argument or folder."""
    parser = ToolParser("folder", description="Split your own images, one folder per class, and list them.")
    parser.add_argument("--root", type=Path, metavar="DIR", required=True, help="folder with CLASS/IMAGE.jpg")
    parser.add_argument("--val-share", type=float, default=0.1, help="share of validation images (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    parser.add_argument(
        "--group-by",
        metavar="REGEX",
        help="keep images in the same split whose file names give the same match of this regular expression, or of its "
        "first parenthesis: '^[^_]*' for patient1_2.jpg",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the list files (default: --root)")
    arguments = parser.parse_args(argv)
    root, out = arguments.root, arguments.out or arguments.root
    if not 0 < arguments.val_share < 1:
        raise ValueError(f"--val-share {arguments.val_share:g}: must be between 0 and 1")
    pattern = compile_pattern(arguments.group_by)
    is_split = is_already_split(root)
    if is_split and pattern is not None:
        raise ValueError(f"{root}: is split into train and val already, so --group-by can't change it; leave it out")
    data = DataConfig(root=str(root)) if is_split else DataConfig(root=str(root), train=".")
    sets = {split: open_folders(data, split) for split in (SPLITS if is_split else ("train",))}
    folders = sets["train"].class_names
    check_out(out, root)
    class_names = class_names_text(folders, root, out)
    val_share = None if is_split else arguments.val_share
    settings = {"seed": arguments.seed, "val_share": val_share, "group_by": arguments.group_by, "stratified": True}
    assigned = read_assigned(out / SPLIT_FILE, settings)
    images = {split: list(read_images(split_images, arguments.seed)) for split, split_images in sets.items()}
    if not is_split:
        grouped = group_images(images["train"], pattern)
        images = divide(grouped, arguments.val_share, assigned)
        if not images["val"]:
            several = "images" if pattern is None else "groups of images"
            raise ValueError(f"{root}: no class has two different {several}, so none is for validation; add images")
    copies = find_copies(images)
    left_out = sum((Counter(split_images.left_out) for split_images in sets.values()), Counter[str]())
    facts = {"root": str(root), **settings, **asdict(copies), "left_out": left_out, "settled": assigned}
    write_lists(out, root, images, class_names, facts)
    without = [folders[label] for label in sorted(labels_of(images["train"]) - labels_of(images["val"]))]
    if without:
        cause = "one image (copies count once)" if pattern is None else "one group of images"
        say(f"{len(without)} classes have only {cause}, so none for validation, such as {without[0]}", "folder")
    if copies.on_both_sides:
        example = copies.on_both_sides[0]
        say(f"{len(copies.on_both_sides)} validation images are also training images, such as {example}", "folder")
    if copies.in_several_classes:
        example = copies.in_several_classes[0]
        say(f"{len(copies.in_several_classes)} images are in several classes, such as {example}", "folder")
    if not is_split and pattern is not None:
        num_groups = counted(len({image.group for image in grouped}), "group")
        print_line(f"folder: {counted(len(grouped), 'image')} in {num_groups}, each in one of the splits")
    values = {
        "data.root": out,
        "data.train": "train_list.txt",
        "data.val": "val_list.txt",
        "model.num_classes": len(folders),
    }
    print_line(
        f"folder: {len(images['train'])} training and {len(images['val'])} validation images of "
        f"{counted(len(folders), 'class')}"
        f"{f', {copies.num_copies} of them copies of others' if copies.num_copies else ''}"
    )
    print_line(f"folder: to train on them, set {override_options(values)}")
    return 0


def is_already_split(root: Path) -> bool:
    """Return whether the root has folders train and val. Raise ValueError if only one of them has class folders."""
    existing = [split for split in SPLITS if (root / split).is_dir()]
    if len(existing) == 1 and any(path.is_dir() for path in (root / existing[0]).iterdir()):
        other = SPLITS[1 - SPLITS.index(existing[0])]
        folder = shlex.quote(str(root / existing[0]))
        raise ValueError(f"{root}: has {existing[0]} but no {other}; add it, or split with --root {folder}")
    return len(existing) == 2


def check_out(out: Path, root: Path) -> None:
    """Raise ValueError if the lists would be inside a class folder's parent, or replace files of the user's."""
    if root.resolve() in out.resolve().parents:
        raise ValueError(f"--out {out}: is inside --root, among its classes; give a folder elsewhere, or no --out")
    is_ours = (out / SPLIT_FILE).exists()
    existing = [path for path in list_paths(out).values() if path.exists()]
    if existing and not is_ours:
        raise ValueError(
            f"{existing[0]}: exists, but this tool didn't write it; give another folder as --out, or move it away"
        )


def list_paths(out: Path) -> dict[str, Path]:
    return {split: out / f"{split}_list.txt" for split in SPLITS}


def open_folders(data: DataConfig, split: str) -> FileDataset:
    """Open the images of a split's class folders. Raise ValueError if there aren't at least two class folders.

    Warn about what is left out: images outside the class folders, and folders inside them.
    """
    folder = split_path(data, split)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; --root must have one folder per class")
    folders = class_folders(folder)
    if len(folders) < 2:
        raise ValueError(f"{folder}: has one class folder, but needs at least two; add a folder for each class")
    outside = [path for path in folder.iterdir() if is_image_name(path.name) and path.is_file()]
    inside = [Path(entry) for class_folder in folders for entry in os.scandir(class_folder) if entry.is_dir()]
    for paths, description in ((outside, "images outside the class folders"), (inside, "folders in class folders")):
        skipped = sorted(path for path in paths if not path.name.startswith("."))
        if skipped:
            say(f"left out {len(skipped)} {description}, such as {skipped[0]}", "folder")
    images = open_set(data, split, len(folders))
    assert isinstance(images, FileDataset)
    if images.left_out:
        say(f"{folder}: left out {describe_left_out(images.left_out)}", "folder")
    names = [class_folder.name for class_folder in folders]
    return FileDataset(images.root, images.image_list, names, images.left_out)


def read_images(images: FileDataset, seed: int) -> Iterator[UserImage]:
    """Read all images. Raise ValueError for those that can't be read, and for a name with a line break."""

    def read_image(index: int) -> UserImage | DataError:
        path = os.path.normpath(images.relative_name(index))
        if "\n" in path or "\r" in path:
            raise ValueError(f"{images.name(index)!r}: its name has a line break; rename the file")
        try:
            content, labels = images.read(index)
        except DataError as error:
            return error
        digest = hashlib.blake2b(content.data, digest_size=8, key=str(seed).encode()).hexdigest()
        return UserImage(path, int(labels[0]), digest)

    errors: list[DataError] = []
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 2) as threads,
        ProgressBar(len(images), "image") as bar,
    ):
        for start in range(0, len(images), _READ_BATCH_SIZE):
            for image in threads.map(read_image, range(start, min(start + _READ_BATCH_SIZE, len(images)))):
                if isinstance(image, DataError):
                    errors.append(image)
                else:
                    yield image
                bar.update()
    if len(errors) == 1:
        raise ValueError(f"{errors[0]}; repair the file, or remove it")
    if errors:
        shown = "; ".join(map(str, errors[:_MAX_NAMED_FILES])) + "; ..." * (len(errors) > _MAX_NAMED_FILES)
        raise ValueError(f"{counted(len(errors), 'image')} can't be read ({shown}); repair the files, or remove them")


def labels_of(images: list[UserImage]) -> set[int]:
    """Return the labels that occur."""
    return {image.label for image in images}


def compile_pattern(text: str | None) -> re.Pattern[str] | None:
    """Compile the regular expression of --group-by. Raise ValueError if it isn't one."""
    if text == "":
        raise ValueError("--group-by '': matches nothing in a name, so all images would be one group; leave it out")
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ValueError(f"--group-by {text!r}: is not a regular expression ({error}); correct it") from None


def group_images(images: list[UserImage], pattern: re.Pattern[str] | None) -> list[UserImage]:
    """Return the images with their groups. Raise ValueError if the pattern doesn't match all of their names."""
    if pattern is None:
        return images
    grouped = [replace(image, group=group_of(image.path, pattern)) for image in images]
    unmatched = [image.path for image in grouped if image.group is None]
    if unmatched:
        raise ValueError(
            f"--group-by '{pattern.pattern}': doesn't match the names of {len(unmatched)} of {len(images)} images, "
            f"such as {PurePath(unmatched[0]).name}; extend it, for example by '|.*' for images that are groups of "
            "their own"
        )
    return grouped


def read_assigned(path: Path, settings: dict[str, object]) -> dict[str, str]:
    """Return the splits by digest that an earlier run with the same settings recorded in split.json.

    Raise ValueError for a damaged file.
    """
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if any(summary.get(key) != value for key, value in settings.items()):
            return {}
        return {str(digest): SPLITS[SPLITS.index(split)] for digest, split in summary["settled"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: is damaged, or not from this tool; remove it to make a new split") from None


@dataclass(frozen=True)
class Copies:
    """Images with the same bytes as another: their number, and the paths of those that are a problem."""

    num_copies: int
    on_both_sides: list[str]  # in validation, of training images
    in_several_classes: list[str]


def find_copies(images: dict[str, list[UserImage]]) -> Copies:
    all_images = [image for split in SPLITS for image in images[split]]
    labels_by_digest: defaultdict[str, set[int]] = defaultdict(set)
    for image in all_images:
        labels_by_digest[image.digest].add(image.label)
    train_digests = {image.digest for image in images["train"]}
    return Copies(
        len(all_images) - len(labels_by_digest),
        [image.path for image in images["val"] if image.digest in train_digests],
        [image.path for image in all_images if len(labels_by_digest[image.digest]) > 1],
    )


def class_names_text(folders: list[str], root: Path, out: Path) -> str:
    """Return the content of class_names.txt, with existing names from `out` or `root`, else the folders' names.

    Raise ValueError for an existing file that has none of these classes.
    """
    existing_names: dict[str, str] = {}
    for path in (root / CLASS_NAMES_FILE, out / CLASS_NAMES_FILE):
        if path.exists():
            names = {folder: name for folder, name in read_class_names(path) if name}
            if all(name_of_folder(names, folder) is None for folder in folders):
                raise ValueError(
                    f"{path}: has none of the class folders (a line is 'FOLDER NAME'); correct it, or move it away"
                )
            existing_names |= names
    return "".join(
        class_line(folder, name_of_folder(existing_names, folder) or folder.replace("_", " ")) + "\n"
        for folder in folders
    )


def write_lists(
    out: Path, root: Path, images: dict[str, list[UserImage]], class_names: str, summary: dict[str, object]
) -> None:
    """Write split.json, whose presence says that the lists are this tool's, then list files and class names."""
    write_json(summary, out / SPLIT_FILE)
    prefix = "" if out.resolve() == root.resolve() else f"{root.resolve()}/"
    for split, path in list_paths(out).items():
        # Names that aren't UTF-8 keep their bytes.
        write_text("".join(f"{prefix}{image.path} {image.label}\n" for image in images[split]), path)
    write_text(class_names, out / CLASS_NAMES_FILE)
