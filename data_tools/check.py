"""A check of every image in a dataset, with the decoder that training uses.

    missing, empty                   there is no such file, or it is empty
    unreadable                       the file can't be read, isn't an image, is damaged, or makes the decoder crash
    truncated                        the file ends early
    unsupported                      a format that training doesn't read, such as HEIC, or one that only Pillow reads
    too_large                        more than 179 megapixels according to its header
    class_folders, empty_class, label    train and val differ; a class has no image; a label is beyond the classes
                                     all of these stop training; the others don't:
    cmyk, 16_bit, other_format, huge     unusual, but decoded: for example a PNG called .jpg, or more than 50 megapixels
    unused_class                     a class of a list or a table has no image
    labels_from_1                    no image has label 0: training stops if model.num_classes is the highest label
    duplicate                        a validation image that is also a training image

The report is printed, and written as JSON to ROOT/data_check.json, which data.on_bad_image=skip reads. The exit code is
1 if something would stop training. Results are kept in .data_check.journal, beside the report, until the check ends, so
that the same command resumes a check that was stopped; files that have changed since are read again.

Images are decoded in another process, which is started again if a file ends it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.errors import DataError, WriteError, escape
from vit_static.common.io import check_writable, write_bytes, write_json, write_lines
from vit_static.common.terminal import ProgressBar
from vit_static.common.text import counted, path_fields, print_line, say
from vit_static.config.data_schema import DataConfig
from vit_static.data.decoder_process import DecoderProcess, ImageHeader
from vit_static.data.image_formats import SUPPORTED_FORMATS, describe_left_out, suffix_of
from vit_static.data.image_set import FileDataset, ImageDataset
from vit_static.data.open_set import (
    CHECK_FILE,
    CHECK_FORMAT,
    CLASS_NAMES_FILE,
    class_folders,
    has_shards,
    list_folders,
    read_class_names,
    read_label_file,
)
from vit_static.data.webdataset import open_shards

from .arguments import ToolParser, add_label_arguments, data_config, override_options
from .check_journal import BatchResult, Journal, Problem, open_journal
from .class_names import write_class_names
from .folder import SPLIT_FILE, list_paths
from .stratify import SPLITS

STOPPING_KINDS = frozenset({
    "missing", "empty", "unreadable", "truncated", "unsupported", "too_large", "class_folders", "empty_class", "label",
})  # fmt: skip
HUGE_PIXELS = 50_000_000
NUM_EXAMPLES = 3  # printed of each kind
MAX_CLASSES = 1_000_000  # for shards whose number of classes isn't known
_JOURNAL_BATCH_SIZE = 256
_FORMATS = {suffix: f.pillow_formats for f in SUPPORTED_FORMATS for suffix in f.suffixes}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return 1 if training would stop. Raise ValueError for a wrong argument."""
    parser = ToolParser("check", description="Read every image of a dataset with training's decoder.")
    parser.add_argument("root", type=Path, metavar="DIR", help="the dataset, as in data.root")
    parser.add_argument("--train", help="as in data.train (default: train, or train_list.txt of 'data folder')")
    parser.add_argument("--val", help="as in data.val (default: val, or val_list.txt); skipped if it doesn't exist")
    parser.add_argument(
        "--fix", type=Path, metavar="DIR2", help="also write list files to DIR2, without the images that stop training"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"the report to write (default: DIR/{CHECK_FILE})")
    add_label_arguments(parser)
    arguments = parser.parse_args(argv)
    root: Path = arguments.root
    if not root.is_dir():
        if root.is_file():
            raise ValueError(f"{root}: is a file; give its folder, and the file's name as --train")
        raise ValueError(f"{root}: no such folder; give the folder that data.root names")
    defaults = default_names(root)
    arguments.train, arguments.val = arguments.train or defaults["train"], arguments.val or defaults["val"]
    names = {"train": arguments.train, "val": arguments.val}
    paths = {split: root / name for split, name in names.items()}
    if not paths["train"].exists():
        raise ValueError(
            f"{paths['train']}: no such folder, list or table; give its name as --train, or split class folders first, "
            f"with './run.sh data folder --root {root}'"
        )
    if arguments.fix is not None and arguments.fix.exists() and any(arguments.fix.iterdir()):
        raise ValueError(f"{arguments.fix}: is not empty; give another folder as --fix")
    data = data_config(arguments)
    sets, problems = open_splits(root, {split: path for split, path in paths.items() if path.exists()}, data)
    if arguments.fix is not None and not all(isinstance(images, FileDataset) for images in sets.values()):
        raise ValueError(f"{root}: has shards, and --fix can only list files; set data.on_bad_image=skip instead")
    report_path = arguments.json or root / CHECK_FILE
    for path in [report_path, *([] if arguments.fix is None else [arguments.fix / "train_list.txt"])]:
        check_writable(path)
    digests = {}
    journal_path = report_path.with_name(f".{report_path.stem}.journal")
    with open_journal(journal_path, sets) as journal:
        for split, images in sets.items():
            digests[split], image_problems = check_split(images, split, journal)
            problems += image_problems
    problems += find_duplicates(sets, digests)
    problems.sort(key=lambda problem: (problem.split, problem.kind, problem.path, problem.detail))
    report = {
        "format": CHECK_FORMAT,
        "root": str(root),
        **names,
        "num_images": {split: len(images) for split, images in sets.items()},
        "left_out": {split: dict(images.left_out) for split, images in sets.items()} | left_out_of_lists(root, names),
        "num_copies_within": {split: count_copies(split_digests) for split, split_digests in digests.items()},
        "problems": [asdict(problem) | path_fields(problem.path) for problem in problems],
    }
    try:
        write_json(report, report_path)
    except WriteError:
        if journal_path.exists():
            say(f"{journal_path}: has the results, so the same command doesn't read the images again", "check")
        raise
    journal.remove()
    print_report(report, problems, report_path)
    if arguments.fix is not None:
        write_clean_lists(arguments.fix, root, sets, problems)
    return 1 if any(problem.stops_training for problem in problems) else 0


def default_names(root: Path) -> dict[str, str]:
    """Return the split names of a dataset: train and val, or the lists that `data folder` has written."""
    has_lists = not (root / "train").exists() and (root / SPLIT_FILE).exists()
    return {split: list_paths(root)[split].name if has_lists else split for split in SPLITS}


def left_out_of_lists(root: Path, names: dict[str, str]) -> dict[str, dict[str, int]]:
    """Return what `data folder` left out of its lists, if the splits are these lists."""
    if names != {split: path.name for split, path in list_paths(root).items()} or not (root / SPLIT_FILE).exists():
        return {}
    try:
        left_out = json.loads((root / SPLIT_FILE).read_text(encoding="utf-8"))["left_out"]
        return {"the lists": {str(kind): int(count) for kind, count in left_out.items()}}
    except (ValueError, KeyError, TypeError, AttributeError):  # of an earlier version, or edited
        return {}


def make_problem(split: str, path: str, kind: str, detail: str) -> Problem:
    return Problem(path, split, kind, escape(detail), kind in STOPPING_KINDS)


def open_splits(
    root: Path, paths: dict[str, Path], data: DataConfig | None = None
) -> tuple[dict[str, ImageDataset], list[Problem]]:
    """Open the images of each split; also return the problems of its layout, which would stop training at its start.

    `data` says how tables and lists are read. Raise DataError for a list, a table or an index that can't be read.
    """
    data = data or DataConfig(root=str(root), multi_label=True)
    sets: dict[str, ImageDataset] = {}
    problems: list[Problem] = []
    folders: dict[str, list[Path]] = {}
    for split, path in paths.items():
        if path.is_file():
            image_list, classes = read_label_file(path, data, split)
            sets[split] = FileDataset(root, image_list, classes or [])
        elif has_shards(path):
            # Labels are checked as the images are read.
            sets[split] = open_shards(path, root, [""] * (count_class_names(root) or MAX_CLASSES), True)
        else:
            folders[split] = class_folders(path)
            train_names = [folder.name for folder in folders.get("train", folders[split])]
            image_list, counts, left_out = list_folders(folders[split], root)
            for number in np.flatnonzero(counts == 0).tolist():
                folder = os.path.relpath(folders[split][number], root)
                problems.append(make_problem(split, folder, "empty_class", "this class folder has no image"))
            labels = [train_names.index(f.name) if f.name in train_names else -1 for f in folders[split]]
            image_list.labels.values[:] = np.array(labels, np.int32)[image_list.labels.values]
            sets[split] = FileDataset(root, image_list, [], left_out)
    if len(folders) == 2:
        names = {split: {folder.name for folder in split_folders} for split, split_folders in folders.items()}
        for split, other in (("train", "val"), ("val", "train")):
            for name in sorted(names[split] - names[other]):
                folder = os.path.relpath(paths[split] / name, root)
                problems.append(make_problem(split, folder, "class_folders", f"{other} has no such class folder"))
    list_splits = {split for split in paths if paths[split].is_file()}
    return sets, problems + label_problems(root, sets, list_splits, data.first_label)


def count_class_names(root: Path) -> int | None:
    """Return the number of classes in class_names.txt, or None if there is no such file."""
    path = root / CLASS_NAMES_FILE
    return len(read_class_names(path)) if path.is_file() else None


def label_problems(root: Path, sets: dict[str, ImageDataset], list_splits: set[str], first_label: int) -> list[Problem]:
    """Return the problems of the labels in lists and tables: those that are no class, and the classes without images.

    The number of classes is that of a table's names, of class_names.txt, or of the labels in the training list.
    """
    train = sets["train"]
    num_classes = len(train.class_names) or count_class_names(root) or None
    if num_classes is None and "train" in list_splits:
        num_classes = 1 + int(train.labels().values.max(initial=0))
    problems: list[Problem] = []
    if num_classes is None:
        return problems
    lowest = min((int(sets[split].labels().values.min(initial=num_classes)) for split in list_splits), default=0)
    begins_at_1 = first_label == 0 and lowest == 1 and not train.class_names
    for split in sorted(list_splits):
        images = sets[split]
        label_images, labels = images.labels().pairs()
        hint = "; the labels begin at 1: give --first-label 1, and set data.first_label=1" if begins_at_1 else ""
        is_wrong = (labels < 0) | (labels >= num_classes)
        wrong = dict(zip(label_images[is_wrong].tolist(), labels[is_wrong].tolist(), strict=True))
        for index, label in wrong.items():
            shown = f"label {label + first_label}, but there are {num_classes} classes"
            detail = f"{shown} and labels begin at {first_label}{hint}"
            problems.append(make_problem(split, images.relative_name(index), "label", detail))
        names = images.class_names or [str(label + first_label) for label in range(num_classes)]
        is_empty = np.bincount(labels[~is_wrong], minlength=num_classes) == 0
        for label in np.flatnonzero(is_empty).tolist():
            kind = "labels_from_1" if begins_at_1 and label == 0 else "unused_class"
            problems.append(make_problem(split, names[label], kind, f"this class has no image{hint * (label == 0)}"))
    return problems


def check_split(images: ImageDataset, split: str, journal: Journal) -> tuple[np.ndarray, list[Problem]]:
    """Read every image of a split, on all cores, and return digests [num_images] and problems."""
    digests, problems = np.zeros(len(images), np.uint64), []
    num_cores = len(os.sched_getaffinity(0))
    with (
        DecoderProcess(num_cores) as decoder,
        ThreadPoolExecutor(num_cores + 2) as threads,
        ProgressBar(len(images), "image", title=split) as bar,
    ):
        for start in range(0, len(images), _JOURNAL_BATCH_SIZE):
            indices = range(start, min(start + _JOURNAL_BATCH_SIZE, len(images)))
            states = repr([file_state(images, index) for index in indices]).encode()
            state = hashlib.blake2b(states, digest_size=8).hexdigest()
            result = journal.find(split, start, state)
            if result is None or result.digests.shape != (len(indices),):
                result = check_batch(images, split, indices, decoder, threads)
                journal.add(split, start, state, result)
            digests[start : start + len(indices)] = result.digests
            problems += result.problems
            bar.update(len(indices))
    return digests, problems


def file_state(images: ImageDataset, index: int) -> tuple[int, int] | None:
    """Return modification time (ns) and size (bytes) of an image's file or shard, or None if it can't be accessed."""
    path = images.name(index)
    for file in (path, os.path.dirname(path)):  # noqa: PTH120 - a Path per image is slow
        try:
            status = os.stat(file)  # noqa: PTH116
        except (OSError, ValueError):  # reported when the image is read
            continue
        return status.st_mtime_ns, status.st_size
    return None


def check_batch(
    images: ImageDataset, split: str, indices: Sequence[int], decoder: DecoderProcess, threads: ThreadPoolExecutor
) -> BatchResult:
    """Read and decode the images with these indices."""
    digests, problems = [], []
    to_decode: list[tuple[str, np.ndarray]] = []
    for name, (encoded, digest, problem) in zip(
        map(images.relative_name, indices),
        threads.map(lambda index: read_image(images, split, index), indices),
        strict=True,
    ):
        digests.append(digest)
        if problem is not None:
            problems.append(problem)
        if encoded is not None:
            to_decode.append((name, encoded))
    reports = decoder.reports([encoded for _, encoded in to_decode])
    for (name, _), report in zip(to_decode, reports, strict=True):
        problems += header_problems(split, name, report.header)
        if report.fault is not None:
            problems.append(make_problem(split, name, report.fault.kind, report.fault.reason))
    return BatchResult(np.array(digests, np.uint64), problems)


def read_image(images: ImageDataset, split: str, index: int) -> tuple[np.ndarray | None, int, Problem | None]:
    """Return an image's bytes and their digest, or None, 0 and the problem if they can't be read."""
    try:
        encoded, _ = images.read_bytes(index)
    except DataError as error:
        detail = str(error).removeprefix(escape(f"{images.message_name(index)}: "))
        return None, 0, make_problem(split, images.relative_name(index), error.kind, detail)
    return encoded, int.from_bytes(hashlib.blake2b(encoded.data, digest_size=8).digest(), "big"), None


def header_problems(split: str, name: str, header: ImageHeader | None) -> Iterator[Problem]:
    """Yield what is unusual about an image according to its header, and isn't the reason why it can't be decoded."""
    if header is None:
        return
    expected = _FORMATS.get(suffix_of(name))
    if expected is not None and header.format not in (*expected, "MPO"):  # a JPEG with several images
        yield make_problem(split, name, "other_format", f"is a {header.format} called {Path(name).suffix}")
    if header.mode == "CMYK":
        yield make_problem(split, name, "cmyk", "has CMYK colours, which are converted to RGB")
    if header.is_deep:
        yield make_problem(split, name, "16_bit", "has more than 8 bits per channel, which are reduced to 8")
    if header.width * header.height > HUGE_PIXELS:
        yield make_problem(split, name, "huge", f"{header.width}x{header.height} pixels")


def find_duplicates(sets: dict[str, ImageDataset], digests: dict[str, np.ndarray]) -> list[Problem]:
    """Return the validation images with the same bytes as a training image."""
    if "val" not in digests:
        return []
    train_digests, train_indices = np.unique(digests["train"], return_index=True)
    problems = []
    for index in np.flatnonzero(np.isin(digests["val"], train_digests) & (digests["val"] != 0)).tolist():
        twin = int(train_indices[np.searchsorted(train_digests, digests["val"][index])])
        detail = f"has the same bytes as {sets['train'].relative_name(twin)}"
        problems.append(make_problem("val", sets["val"].relative_name(index), "duplicate", detail))
    return problems


def count_copies(digests: np.ndarray) -> int:
    """Return how many images are copies of others in the same split."""
    readable = digests[digests != 0]
    return len(readable) - len(np.unique(readable))


def print_report(report: dict[str, Any], problems: list[Problem], path: Path) -> None:
    """Print the number of problems of each kind, with a few examples. `path` is where the report was written."""
    counts = " and ".join(f"{count} {split}" for split, count in report["num_images"].items())
    print_line(f"check: read {counts} images of {report['root']}")
    for (is_harmless, kind), count in sorted(Counter((not p.stops_training, p.kind) for p in problems).items()):
        print_line(f"  {kind:<14}{count:8}  {'' if is_harmless else 'stops training'}")
        for problem in [problem for problem in problems if problem.kind == kind][:NUM_EXAMPLES]:
            print_line(f"    {problem.path}: {problem.detail}")
        if count > NUM_EXAMPLES:
            print_line(f"    and {count - NUM_EXAMPLES} more")
    for split, left_out in report["left_out"].items():
        if left_out:
            print_line(f"  left out of {split}: {describe_left_out(left_out)}")
    for split, count in report["num_copies_within"].items():
        if count:
            print_line(f"  {count} {split} images are copies of other {split} images")
    num_stopping = sum(problem.stops_training for problem in problems)
    if num_stopping:
        print_line(
            f"check: {num_stopping} of these would stop training; repair or remove them, set data.on_bad_image=skip, "
            "or write lists without them with --fix DIR2"
        )
    elif any(problem.kind == "labels_from_1" for problem in problems):
        print_line("check: nothing would stop training if the first class has number 0 (see labels_from_1)")
    else:
        print_line("check: nothing would stop training")
    print_line(f"check: wrote the full report to {path}")


def write_clean_lists(folder: Path, root: Path, sets: dict[str, ImageDataset], problems: list[Problem]) -> None:
    """Write list files without the images that stop training, with absolute paths and the training set's labels."""
    bad = {(problem.split, problem.path) for problem in problems if problem.stops_training}
    num_classes = 0
    for split, images in sets.items():
        assert isinstance(images, FileDataset)
        list_path = folder / f"{split}_list.txt"
        is_good = np.array([
            # a list has at least one label per image
            (split, images.relative_name(index)) not in bad and min(images.image_list.labels[index], default=-1) >= 0
            for index in range(len(images))
        ], bool)  # fmt: skip
        good = np.flatnonzero(is_good).tolist()
        num_classes = max([num_classes, *(1 + int(max(images.image_list.labels[index])) for index in good)])
        write_lines(partial(list_lines, images, good), list_path)
        print_line(f"check: wrote {list_path} with {counted(len(good), 'image')}, without {len(images) - len(good)}")
    names = sets["train"].class_names
    if names:
        write_class_names(folder, names)
    elif (root / CLASS_NAMES_FILE).is_file():
        write_bytes((root / CLASS_NAMES_FILE).read_bytes(), folder / CLASS_NAMES_FILE)
    values: dict[str, object] = {"data.root": folder, "data.train": "train_list.txt"}
    if "val" in sets:
        values["data.val"] = "val_list.txt"
    values["model.num_classes"] = len(names) or count_class_names(root) or num_classes
    print_line(f"check: to train on these, set {override_options(values)}")


def list_lines(images: FileDataset, indices: Iterable[int]) -> Iterator[bytes]:
    """Yield the lines of a list file with these images, by their absolute paths."""
    for index in indices:
        path = os.path.abspath(images.name(index))  # noqa: PTH100 - doesn't resolve symbolic links
        yield os.fsencode(path) + b" " + ",".join(map(str, images.image_list.labels[index].tolist())).encode() + b"\n"
