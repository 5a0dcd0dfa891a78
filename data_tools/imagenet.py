"""ImageNet-1k (ILSVRC2012) from its archives: class folders, class names and the seed's lists.

    OUT/train/n01440764/n01440764_10026.JPEG    1,281,167 images in 1,000 folders
    OUT/val/n01440764/ILSVRC2012_val_00000293.JPEG    50,000, sorted into the same by the devkit's ground truth
    OUT/class_names.txt           a line a class, in label order: 'n01440764 tench, Tinca tinca'
    OUT/train_list.txt, val_list.txt    'train/n01440764/n01440764_10026.JPEG 0' a line
    OUT/source.json               what it was made from; written last

The archives are read where they lie, tars within the tar included: nothing is unpacked twice. A class's folder, and a
validation image, appears under its name when it is whole, so the same command goes on where it was stopped; what is
there is compared with the archive by names and sizes, so that what a power cut has spoilt is done again.
"""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.arguments import ToolParser
from vit_static.data.sets import CLASS_NAMES_FILE
from vit_static.files import write_atomically

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SOURCE_FILE, UNFINISHED_FILE = "source.json", ".unfinished.json"
NUM_CLASSES, NUM_TRAIN, NUM_VAL = 1000, 1_281_167, 50_000
_WNID = re.compile(r"n\d{8}")
_TRAIN_IMAGE = re.compile(r"n\d{8}_\d+\.JPEG")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass(frozen=True)
class Devkit:
    """What the development kit says."""

    names: dict[str, str]  # of a class, by its WNID
    num_train: dict[str, int]  # its training images
    truth: list[str]  # the WNID of validation image 1, 2, ...


@dataclass(frozen=True)
class Expected:
    """How many there must be."""

    classes: int
    train: int
    val: int


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises ValueError for a wrong argument or archive."""
    parser = ToolParser(prog="vit_static data imagenet", description="ImageNet-1k from its archives.")
    parser.add_argument("--train", type=Path, metavar="TAR", help="ILSVRC2012_img_train.tar")
    parser.add_argument("--val", type=Path, metavar="TAR", help="ILSVRC2012_img_val.tar")
    parser.add_argument("--devkit", type=Path, metavar="TAR_GZ", help=f"default: {DEVKIT} beside the others")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True)
    parser.add_argument("--num-classes", type=int, default=NUM_CLASSES, help="of a part of it (default: 1,000)")
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN, help="the same (default: 1,281,167)")
    parser.add_argument("--num-val", type=int, default=NUM_VAL, help="the same (default: 50,000)")
    arguments = parser.parse_args(argv)
    if arguments.train is None and arguments.val is None:
        raise ValueError("--train or --val is needed: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar")
    archives = [path for path in (arguments.train, arguments.val) if path is not None]
    for archive in archives:
        if not tarfile.is_tarfile(archive):  # FileNotFoundError where there is none
            raise ValueError(f"{archive}: is not a tar archive; name ILSVRC2012's own, as they were downloaded")
    expected = Expected(arguments.num_classes, arguments.num_train, arguments.num_val)
    devkit = find_devkit(arguments.devkit, arguments.train, arguments.val, expected)
    out = arguments.out
    begin(out, archives)
    found = read_json(out / SOURCE_FILE) or {}
    if arguments.train is not None:
        counts = unpack_train(arguments.train, out / "train", expected)
        check_train(arguments.train, counts, devkit, expected)
        write_list(out, "train")
        found["train"] = {"archive": arguments.train.name, "num_images": sum(counts.values())}
    if arguments.val is not None:
        assert devkit is not None
        num_images = unpack_val(arguments.val, out / "val", devkit)
        if num_images != expected.val:
            raise ValueError(
                f"{arguments.val}: has {num_images} images, not {expected.val}: it is cut off, or another archive; "
                "fetch it again (what is unpacked stays)"
            )
        write_list(out, "val")
        found["val"] = {"archive": arguments.val.name, "num_images": num_images}
    write_class_names(out, devkit)
    os.sync()  # the images, before what says that they are there
    with write_atomically(out / SOURCE_FILE) as temporary:
        temporary.write_text(json.dumps({"source": "ILSVRC2012", **found}, indent=1) + "\n")
    (out / UNFINISHED_FILE).unlink(missing_ok=True)
    print(f"imagenet: {describe(found)} in {out}; to train on it set -o data.root={out}")
    return 0


def describe(found: dict[str, Any]) -> str:
    parts = {"train": "training", "val": "validation"}
    return (
        " and ".join(f"{found[part]['num_images']} {name}" for part, name in parts.items() if part in found) + " images"
    )


def begin(out: Path, archives: list[Path]) -> None:
    """Makes the folder, or sees that it is ours, and that there is room. Raises ValueError where not."""
    is_ours = (out / UNFINISHED_FILE).exists() or (out / SOURCE_FILE).exists()
    if out.is_dir() and any(out.iterdir()) and not is_ours:
        raise ValueError(f"{out}: is not empty, and not this tool's; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED_FILE).touch()
    there = sum(file.stat().st_size for part in ("train", "val") for file in (out / part).rglob("*.JPEG"))
    needed = sum(archive.stat().st_size for archive in archives) - there
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(
            f"{out}: needs {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left; name another --out"
        )


def find_devkit(given: Path | None, train: Path | None, val: Path | None, expected: Expected) -> Devkit | None:
    """The devkit that was named or lies beside an archive; None without one, where only --train is asked for."""
    beside = [archive.parent / DEVKIT for archive in (val, train) if archive is not None]
    path = given or next((path for path in beside if path.is_file()), None)
    if path is not None:
        return read_devkit(path, expected)
    if val is not None:
        raise ValueError(f"--val needs the devkit, which says what its images show: name {DEVKIT} with --devkit")
    return None


def read_devkit(path: Path, expected: Expected) -> Devkit:
    """Raises ValueError where a part is missing or isn't what it should be."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: ./run.sh setup, or pip install scipy") from error
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = {Path(member.name).name: member for member in tar if member.isreg()}
            meta = _content(tar, members.get("meta.mat"))
            truth = _content(tar, members.get("ILSVRC2012_validation_ground_truth.txt"))
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
        wnid_of = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
        kit = Devkit(
            names={str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves},
            num_train={str(leaf["WNID"]): int(leaf["num_train_images"]) for leaf in leaves},
            truth=[wnid_of[int(number)] for number in truth.split()],
        )
    except (tarfile.TarError, EOFError, MatReadError, KeyError, ValueError, TypeError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: can't be read as {DEVKIT} ({error!r}); fetch it again") from None
    if (len(kit.names), len(kit.truth)) != (expected.classes, expected.val):
        raise ValueError(
            f"{path}: tells of {len(kit.names)} classes and {len(kit.truth)} validation images, not of "
            f"{expected.classes} and {expected.val}; it is not ILSVRC2012's"
        )
    return kit


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
    if member is None:
        raise ValueError("data/meta.mat or data/ILSVRC2012_validation_ground_truth.txt is missing")
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def unpack_train(archive: Path, folder: Path, expected: Expected) -> dict[str, int]:
    """A folder for each tar in the archive; how many images each class has. Passes over classes that are there."""
    counts: dict[str, int] = {}
    folder.mkdir(exist_ok=True)
    with (
        reading(archive),
        tarfile.open(archive, "r:") as outer,
        tqdm(total=expected.train, unit="image", desc="train", disable=None) as bar,
    ):
        for member in outer:
            wnid = Path(member.name).stem
            if not member.isreg() or not _WNID.fullmatch(wnid) or Path(member.name).suffix != ".tar":
                raise ValueError(f"{archive}: holds {member.name!r}, where there should be nothing but n########.tar")
            with reading(archive, member.name), tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                counts[wnid] = unpack_class(archive, inner, folder / wnid, bar)
    return counts


def unpack_class(archive: Path, inner: tarfile.TarFile, folder: Path, bar: Any) -> int:
    """The images of one class, whose folder appears when they are all there; their number."""
    members = list(inner)
    for member in members:
        if not member.isreg() or not _TRAIN_IMAGE.fullmatch(member.name):
            raise ValueError(f"{archive}: holds {member.name!r} in {folder.name}.tar, which is no image of it")
    if sizes_in(folder) == {member.name: member.size for member in members}:
        bar.update(len(members))
        return len(members)
    part = folder.with_name(f".{folder.name}.part")
    for spoilt in (part, folder):
        shutil.rmtree(spoilt, ignore_errors=True)
    part.mkdir()
    for member in members:
        copy(inner, member, part / member.name)
        bar.update()
    part.rename(folder)
    return len(members)


def unpack_val(archive: Path, folder: Path, devkit: Devkit) -> int:
    """The validation images, each in its class's folder; their number. Passes over those that are there."""
    for wnid in devkit.names:
        (folder / wnid).mkdir(parents=True, exist_ok=True)
    num_images = 0
    with (
        reading(archive),
        tarfile.open(archive, "r:") as tar,
        tqdm(total=len(devkit.truth), unit="image", desc="val", disable=None) as bar,
    ):
        for member in tar:
            match = _VAL_IMAGE.fullmatch(member.name)
            if not member.isreg() or match is None or not 1 <= int(match[1]) <= len(devkit.truth):
                raise ValueError(f"{archive}: holds {member.name!r}, which is none of its {len(devkit.truth)} images")
            path = folder / devkit.truth[int(match[1]) - 1] / member.name
            if not path.exists() or path.stat().st_size != member.size:
                with reading(archive, member.name):
                    part = path.with_name(f".{path.name}.part")
                    copy(tar, member, part)
                    part.replace(path)
            num_images += 1
            bar.update()
    return num_images


def copy(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Raises ReadError where the archive ends within the member."""
    source = tar.extractfile(member)
    assert source is not None
    content = source.read()
    if len(content) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    path.write_bytes(content)


@contextmanager
def reading(archive: Path, member: str | None = None) -> Iterator[None]:
    """What tarfile says of a damaged archive, as a mistake with its remedy."""
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        where = f" at {member}" if member else ""
        raise ValueError(
            f"{archive}: is cut off or damaged{where} ({error}); fetch it again, and give the same command (what is "
            "unpacked stays)"
        ) from None


def check_train(archive: Path, counts: dict[str, int], devkit: Devkit | None, expected: Expected) -> None:
    """Raises ValueError where classes or images are missing."""
    if devkit is not None:
        for wnid, number in sorted(devkit.num_train.items()):
            if counts.get(wnid, 0) != number:
                raise ValueError(
                    f"{archive}: has {counts.get(wnid, 0)} images of {wnid}, and the devkit says {number}; it is cut "
                    "off, or another archive; fetch it again (what is unpacked stays)"
                )
    total = sum(counts.values())
    if (len(counts), total) != (expected.classes, expected.train):
        raise ValueError(
            f"{archive}: has {len(counts)} classes and {total} images, not {expected.classes} and {expected.train}; it "
            "is cut off, or another archive; fetch it again (what is unpacked stays)"
        )


def sizes_in(folder: Path) -> dict[str, int]:
    """The files of a folder, and their sizes in bytes; of none, nothing."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries}
    except FileNotFoundError:
        return {}


def write_list(out: Path, split: str) -> None:
    """The seed's list of a split, in the order in which training lists class folders."""
    with write_atomically(out / f"{split}_list.txt") as temporary, temporary.open("w") as file:
        for label, folder in enumerate(sorted(path for path in (out / split).iterdir() if _WNID.fullmatch(path.name))):
            file.writelines(f"{split}/{folder.name}/{name} {label}\n" for name in sorted(sizes_in(folder)))


def write_class_names(out: Path, devkit: Devkit | None) -> None:
    """Without a devkit, a class is called by its WNID, unless the names are there."""
    if devkit is None and (out / CLASS_NAMES_FILE).exists():
        return
    folders = sorted(path.name for path in (out / "train").iterdir()) if devkit is None else sorted(devkit.names)
    with write_atomically(out / CLASS_NAMES_FILE) as temporary:
        temporary.write_text(
            "".join(f"{wnid} {wnid if devkit is None else devkit.names[wnid]}\n" for wnid in folders), encoding="utf-8"
        )


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (FileNotFoundError, ValueError):
        return None
