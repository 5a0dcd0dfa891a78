"""ImageNet-1k (ILSVRC2012) from its archives: class folders, class names and PLSC's list files.

    OUT/train/n01440764/n01440764_10026.JPEG    1,281,167 images in 1,000 folders
    OUT/val/n01440764/ILSVRC2012_val_00000293.JPEG    50,000, sorted into the same folders by the devkit's ground truth
    OUT/class_names.txt           one line per class, in label order: 'n01440764 tench, Tinca tinca'
    OUT/train_list.txt, val_list.txt    'train/n01440764/n01440764_10026.JPEG 0' per line
    OUT/source.json               what it was made from; written last

The archives are read where they are, including the tars within the tar; nothing is unpacked twice. An image gets its
name when it is complete, and an existing one with the archive's size is skipped, so the same command resumes a run that
was stopped. It also rewrites files that a power cut has left short; ext4, XFS and btrfs, with default settings, extend
a file only after its content is on the disk. Files that aren't in the archive are neither removed nor overwritten, and
the files in the folders are counted at the end.
"""

import gzip
import hashlib
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_static.common.io import (
    check_room,
    folder_write_errors,
    lock,
    make_folder,
    remove_new_folders,
    remove_on_failure,
    write_errors,
    write_json,
    write_lines,
    write_text,
)
from vit_static.common.terminal import ProgressBar
from vit_static.common.text import print_line
from vit_static.data.manifest import SOURCE_FILE, read_manifest
from vit_static.data.open_set import CLASS_NAMES_FILE, class_folders, list_folders

from .arguments import ToolParser, override_options

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SOURCE = "ILSVRC2012"
UNFINISHED_FILE = ".unfinished.json"
NUM_CLASSES, NUM_TRAIN, NUM_VAL = 1000, 1_281_167, 50_000
MD5 = {"train": "1d675b47d978889d74fa0da5fadfb00e", "val": "29b22e2961454d5413ddabcf34fc5622"}  # of the archives
_MAX_CLASSES_IN_MESSAGE = 5
_WNID = re.compile(r"n\d{8}")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass(frozen=True)
class Devkit:
    """The content of the development kit."""

    names: dict[str, str]  # of the classes, by WNID
    num_train: dict[str, int]  # number of training images, by WNID
    val_wnids: list[str]  # the class of validation image 1, 2, ...


@dataclass(frozen=True)
class ExpectedCounts:
    """The numbers of classes and images that the archives must have."""

    num_classes: int
    num_train: int
    num_val: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Raise ValueError for a wrong argument or archive."""
    parser = ToolParser("imagenet", description="Unpack ImageNet-1k's archives.")
    parser.add_argument("--train", type=Path, metavar="TAR", help="ILSVRC2012_img_train.tar")
    parser.add_argument("--val", type=Path, metavar="TAR", help="ILSVRC2012_img_val.tar")
    parser.add_argument(
        "--devkit", type=Path, metavar="TAR_GZ", help=f"the devkit (default: {DEVKIT} beside the other archives)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to create or complete")
    part = "for archives with a part of ImageNet"
    parser.add_argument("--num-classes", type=int, default=NUM_CLASSES, help=f"{part} (default: 1,000)")
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN, help=f"{part} (default: 1,281,167)")
    parser.add_argument("--num-val", type=int, default=NUM_VAL, help=f"{part} (default: 50,000)")
    parser.add_argument("--check-md5", action="store_true", help="first compare the archives' MD5 sums")
    arguments = parser.parse_args(argv)
    if arguments.train is None and arguments.val is None:
        raise ValueError("--train or --val is missing; give ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar or both")
    archives = {split: path for split, path in (("train", arguments.train), ("val", arguments.val)) if path is not None}
    for archive in archives.values():
        check_is_tar(archive)
    expected = ExpectedCounts(arguments.num_classes, arguments.num_train, arguments.num_val)
    devkit = find_devkit(arguments.devkit, arguments.train, arguments.val, expected)
    prepare_folder(arguments.out, archives)
    for split, archive in archives.items() if arguments.check_md5 else ():
        check_md5(archive, MD5[split])
    refusal = f"{arguments.out}: another run is writing it; wait until that has ended"
    with (
        lock(arguments.out / UNFINISHED_FILE, refusal),
        folder_write_errors(arguments.out, lambda: missing_bytes(arguments.out, archives)),
    ):
        splits = unpack(arguments.out, archives, devkit, expected)
    print_line(
        f"imagenet: {describe(splits)} in {arguments.out}; to train on them, set "
        f"{override_options({'data.root': arguments.out})}"
    )
    return 0


def describe(splits: Mapping[str, Any]) -> str:
    """Return the number of images of each split that source.json has, in words."""
    names = {"train": "training", "val": "validation"}
    counts = [f"{splits[split]['num_images']} {name}" for split, name in names.items() if split in splits]
    return " and ".join(counts) + " images"


def prepare_folder(out: Path, archives: Mapping[str, Path]) -> None:
    """Create the folder. Raise ValueError if it has other files, and WriteError if the disk is too small."""
    is_ours = any(read_source(out / name) for name in (SOURCE_FILE, UNFINISHED_FILE))
    if out.is_dir() and not is_ours and any(not path.name.endswith(".part") for path in out.iterdir()):
        raise ValueError(f"{out}: is not empty, and not from this tool; give another folder as --out")
    check_room(out, missing_bytes(out, archives))
    with remove_new_folders(out / UNFINISHED_FILE):
        make_folder(out)
        if not (out / UNFINISHED_FILE).exists():
            write_source(out / UNFINISHED_FILE, {})


def unpack(out: Path, archives: Mapping[str, Path], devkit: Devkit | None, expected: ExpectedCounts) -> dict[str, Any]:
    """Unpack the splits of these archives, write their lists and the class names, and return source.json's content."""
    for partial_file in out.glob(".*.part"):  # of a run that was killed
        partial_file.unlink()
    source = read_source(out / SOURCE_FILE)
    splits: dict[str, Any] = {
        split: source[split] for split in ("train", "val") if split in source and split not in archives
    }
    if splits:  # a split is complete again only once its files have been counted
        write_source(out / SOURCE_FILE, splits)
    else:
        (out / SOURCE_FILE).unlink(missing_ok=True)
    for split, archive in archives.items():
        if split == "train":
            unpack_train(archive, out / "train", expected.num_train)
            class_counts = devkit.num_train if devkit is not None else None
            num_images = expected.num_train
        else:
            assert devkit is not None
            unpack_val(archive, out / "val", devkit)
            class_counts = Counter(devkit.val_wnids)
            num_images = expected.num_val
        list_split(archive, out, split, class_counts, expected.num_classes, num_images)
        splits[split] = {"archive": archive.name, "num_images": num_images}
    write_class_names(out, devkit)
    os.sync()  # the images must reach the disk before the file that says that they are complete
    write_source(out / SOURCE_FILE, splits)
    (out / UNFINISHED_FILE).unlink()
    return splits


def check_is_tar(archive: Path) -> None:
    """Raise ValueError if the file isn't an uncompressed tar archive, FileNotFoundError if there is none."""
    try:
        tarfile.open(archive, "r:").close()
    except tarfile.TarError:
        raise ValueError(
            f"{archive}: is not a tar archive, or is compressed; give {SOURCE}'s archives as they were downloaded"
        ) from None


def check_md5(archive: Path, expected: str) -> None:
    """Raise ValueError if the archive's MD5 sum isn't the expected one.

    A tar has no checksum of its content. So a changed byte in an image is only detected here, and by `data check` if
    the image can't be decoded any more.
    """
    md5 = hashlib.md5(usedforsecurity=False)
    with (
        archive.open("rb") as file,
        ProgressBar(archive.stat().st_size, "B", title=archive.name) as bar,
    ):
        while block := file.read(1 << 24):
            md5.update(block)
            bar.update(len(block))
    if md5.hexdigest() != expected:
        raise ValueError(
            f"{archive}: its MD5 sum is {md5.hexdigest()}, but {SOURCE}'s is {expected}; download it again"
        )


def find_devkit(devkit: Path | None, train: Path | None, val: Path | None, expected: ExpectedCounts) -> Devkit | None:
    """Read the devkit given, or the one beside an archive. Return None if there is none and only --train is given."""
    candidates = [archive.parent / DEVKIT for archive in (val, train) if archive is not None]
    path = devkit or next((path for path in candidates if path.is_file()), None)
    if path is not None:
        return read_devkit(path, expected)
    if val is not None:
        raise ValueError(f"--val needs the devkit, which has the classes of its images; give {DEVKIT} as --devkit")
    return None


def read_devkit(path: Path, expected: ExpectedCounts) -> Devkit:
    """Read the devkit's archive. Raise ValueError if a part is missing or isn't as expected."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; run './run.sh setup' or 'pip install scipy'") from error
    try:
        with gzip.open(path) as compressed:
            content = compressed.read()  # to the end, where its checksum is: SciPy can crash on damaged bytes
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            members = {Path(member.name).name: member for member in tar if member.isreg()}
            meta = _content(tar, members.get("meta.mat"))
            ground_truth = _content(tar, members.get("ILSVRC2012_validation_ground_truth.txt"))
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = {str(synset["WNID"]): synset for synset in synsets if int(synset["num_children"]) == 0}
        wnid_by_id = {int(leaf["ILSVRC2012_ID"]): wnid for wnid, leaf in leaves.items()}
        devkit = Devkit(
            names={wnid: " ".join(str(leaf["words"]).split()) for wnid, leaf in leaves.items()},
            num_train={wnid: int(leaf["num_train_images"]) for wnid, leaf in leaves.items()},
            val_wnids=[wnid_by_id[int(class_id)] for class_id in ground_truth.split()],
        )
    except Exception as error:  # for another file gzip, tarfile and above all SciPy can raise almost anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: can't be read as {DEVKIT} ({error!r}); download it again") from None
    counts = ExpectedCounts(len(devkit.names), sum(devkit.num_train.values()), len(devkit.val_wnids))
    if counts != expected or not all(map(_WNID.fullmatch, devkit.names)):
        raise ValueError(
            f"{path}: has {counts.num_classes} classes, {counts.num_train} training and {counts.num_val} validation "
            f"images, not {expected.num_classes}, {expected.num_train} and {expected.num_val}, or other names; give "
            f"{SOURCE}'s devkit"
        )
    return devkit


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
    if member is None:
        raise ValueError("data/meta.mat or data/ILSVRC2012_validation_ground_truth.txt is missing")
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def unpack_train(archive: Path, folder: Path, num_images: int) -> None:
    """Unpack the images of each tar in the archive into a folder with its name."""
    with (
        archive_errors(archive),
        tarfile.open(archive, "r:") as outer,
        ProgressBar(num_images, "image", title="train") as bar,
    ):
        for member in outer:
            wnid = Path(member.name).stem
            if not member.isreg() or not _WNID.fullmatch(wnid) or Path(member.name).suffix != ".tar":
                raise ValueError(
                    f"{archive}: has {member.name!r}, but must only have n########.tar; give {SOURCE}'s training images"
                )
            (folder / wnid).mkdir(parents=True, exist_ok=True)
            image_name = re.compile(rf"{wnid}_\d+\.JPEG")
            with (
                archive_errors(archive, member.name),
                tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner,
            ):
                for image in inner:
                    if not image.isreg() or not image_name.fullmatch(image.name):
                        raise ValueError(
                            f"{archive}: has {image.name!r} in {wnid}.tar, which is not an image of this class; give "
                            f"{SOURCE}'s training images"
                        )
                    unpack_image(inner, image, folder / wnid / image.name)
                    bar.update()
        if not outer.getmembers():
            raise tarfile.ReadError("it is empty")


def unpack_val(archive: Path, folder: Path, devkit: Devkit) -> None:
    """Unpack the validation images into their class folders."""
    for wnid in devkit.names:
        (folder / wnid).mkdir(parents=True, exist_ok=True)
    num_images = len(devkit.val_wnids)
    with (
        archive_errors(archive),
        tarfile.open(archive, "r:") as tar,
        ProgressBar(num_images, "image", title="val") as bar,
    ):
        for member in tar:
            match = _VAL_IMAGE.fullmatch(member.name)
            if not member.isreg() or match is None or not 1 <= int(match[1]) <= num_images:
                raise ValueError(
                    f"{archive}: has {member.name!r}, which is not one of its {num_images} images; give {SOURCE}'s "
                    "validation images"
                )
            with archive_errors(archive, member.name):
                unpack_image(tar, member, folder / devkit.val_wnids[int(match[1]) - 1] / member.name)
            bar.update()


def unpack_image(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write an image unless it exists with this size. tarfile raises ReadError if the archive ends within the member.

    An fsync for each of a million files would take hours; files that a power cut leaves short are detected by size.
    """
    try:
        if path.stat().st_size == member.size:
            return
    except FileNotFoundError:
        pass
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    part = path.with_name(f".{path.name}.part")
    with remove_on_failure(part), write_errors(path, len(content), part):
        part.write_bytes(content)
        part.replace(path)


@contextmanager
def archive_errors(archive: Path, member: str | None = None) -> Iterator[None]:
    """Turn tarfile's errors about a damaged archive into ValueError with the remedy."""
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        where = f" at {member}" if member else ""
        raise ValueError(
            f"{archive}: is truncated or damaged{where} ({error}); download it again and run the same command, which "
            "keeps the images that are unpacked"
        ) from None


def list_split(
    archive: Path,
    out: Path,
    split: str,
    class_counts: Mapping[str, int] | None,
    num_classes: int,
    num_images: int,
) -> None:
    """Write PLSC's list of a split: the images that training would find in its folders.

    Raise ValueError if their number is wrong, also in one class if `class_counts` has the number per class.
    """
    folders = class_folders(out / split)
    image_list, counts, _ = list_folders(folders, out)
    actual = {folder.name: int(count) for folder, count in zip(folders, counts, strict=True)}
    expected = actual if class_counts is None else class_counts
    wrong = [
        f"{wnid} has {actual.get(wnid, 0)} of {expected.get(wnid, 0)}"
        for wnid in sorted(actual.keys() | expected.keys())
        if actual.get(wnid, 0) != expected.get(wnid, 0)
    ]
    if wrong or (len(actual), len(image_list)) != (num_classes, num_images):
        num_more = len(wrong) - _MAX_CLASSES_IN_MESSAGE
        more = f" and {num_more} more classes" if num_more > 0 else ""
        classes = f" ({', '.join(wrong[:_MAX_CLASSES_IN_MESSAGE])}{more})" if wrong else ""
        raise ValueError(
            f"{out / split}: {len(image_list)} images in {len(actual)} classes, not {num_images} in "
            f"{num_classes}{classes}; if images are missing, {archive} is truncated or the wrong archive: download it "
            "again (unpacked images are kept); if there are too many, move away those that aren't in the archive"
        )
    labels = image_list.labels.values.tolist()
    write_lines(
        lambda: (b"%s %d\n" % (image_list.path(index), label) for index, label in enumerate(labels)),
        out / f"{split}_list.txt",
    )


def missing_bytes(out: Path, archives: Mapping[str, Path]) -> int:
    """Return the size of what the archives have and `out` doesn't."""
    return sum(max(0, archive.stat().st_size - image_bytes(out / split)) for split, archive in archives.items())


def image_bytes(folder: Path) -> int:
    """Return the size of all images below a folder; 0 if there is no such folder."""
    return sum(
        (Path(parent) / name).stat().st_size
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith(".JPEG")
    )


def write_class_names(out: Path, devkit: Devkit | None) -> None:
    """Write class_names.txt. Without a devkit, keep an existing one, or use the WNIDs as names."""
    if devkit is None and (out / CLASS_NAMES_FILE).exists():
        return
    names = devkit.names if devkit is not None else {path.name: path.name for path in class_folders(out / "train")}
    write_text("".join(f"{wnid} {names[wnid]}\n" for wnid in sorted(names)), out / CLASS_NAMES_FILE)


def read_source(path: Path) -> dict[str, Any]:
    """Return the content of a manifest that this tool has written; empty for any other file."""
    content = read_manifest(path)
    return content if content.get("source") == SOURCE else {}


def write_source(path: Path, splits: Mapping[str, Any]) -> None:
    write_json({"source": SOURCE, **splits}, path)
