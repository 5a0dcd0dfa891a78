"""ImageNet-1k (ILSVRC2012) from its archives: class folders, class names and the seed's lists.

    OUT/train/n01440764/n01440764_10026.JPEG    1,281,167 images in 1,000 folders
    OUT/val/n01440764/ILSVRC2012_val_00000293.JPEG    50,000, sorted into the same by the devkit's ground truth
    OUT/class_names.txt           a line a class, in label order: 'n01440764 tench, Tinca tinca'
    OUT/train_list.txt, val_list.txt    'train/n01440764/n01440764_10026.JPEG 0' a line
    OUT/source.json               what it was made from; written last

The archives are read where they lie, tars within the tar included: nothing is unpacked twice. An image appears under
its name when it is whole, and one that is there with the archive's size is passed over: so the same command goes on
where it was stopped. It does again what a power cut has left short; ext4, XFS and btrfs, as they are by default,
lengthen a file only once its content is on the disk. Nothing that the archive doesn't hold is removed or written over,
and what is counted is what is in the folders at the end.
"""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.arguments import ToolParser
from vit_static.common.io import lock, write_atomically, write_json
from vit_static.data.open_set import CLASS_NAMES_FILE, class_folders, list_folders

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SOURCE = "ILSVRC2012"
SOURCE_FILE, UNFINISHED_FILE = "source.json", ".unfinished.json"
NUM_CLASSES, NUM_TRAIN, NUM_VAL = 1000, 1_281_167, 50_000
MD5 = {"train": "1d675b47d978889d74fa0da5fadfb00e", "val": "29b22e2961454d5413ddabcf34fc5622"}  # of the archives
_SHOWN_CLASSES = 5  # of those with other numbers than the devkit's
_WNID = re.compile(r"n\d{8}")
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
    parser.add_argument("--check-md5", action="store_true", help="first see that the archives are whole, by MD5 sum")
    arguments = parser.parse_args(argv)
    if arguments.train is None and arguments.val is None:
        raise ValueError("--train or --val is needed: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar")
    archives = {split: path for split, path in (("train", arguments.train), ("val", arguments.val)) if path is not None}
    for archive in archives.values():
        check_is_tar(archive)
    expected = Expected(arguments.num_classes, arguments.num_train, arguments.num_val)
    devkit = find_devkit(arguments.devkit, arguments.train, arguments.val, expected)
    begin(arguments.out, archives)
    for split, archive in archives.items() if arguments.check_md5 else ():
        check_md5(archive, MD5[split])
    refusal = f"{arguments.out}: another run is filling it; wait until it has ended"
    with lock(arguments.out / UNFINISHED_FILE, refusal):
        done = make(arguments.out, archives, devkit, expected)
    print(f"imagenet: {describe(done)} in {arguments.out}; to train on it set -o data.root={arguments.out}")
    return 0


def describe(done: Mapping[str, Any]) -> str:
    names = {"train": "training", "val": "validation"}
    return " and ".join(f"{done[split]['num_images']} {names[split]}" for split in names if split in done) + " images"


def begin(out: Path, archives: Mapping[str, Path]) -> None:
    """Makes the folder, or sees that it is ours; before that, that there is room. Raises ValueError where not."""
    is_ours = any(read_source(out / name) for name in (SOURCE_FILE, UNFINISHED_FILE))
    if out.is_dir() and not is_ours and any(not path.name.endswith(".part") for path in out.iterdir()):
        raise ValueError(f"{out}: is not empty, and not this tool's; name another folder with --out")
    needed = sum(max(0, archive.stat().st_size - bytes_in(out / split)) for split, archive in archives.items())
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())).free
    if free < needed:
        raise ValueError(
            f"{out}: needs {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left; name another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / UNFINISHED_FILE).exists():
        write_source(out / UNFINISHED_FILE, {})


def make(out: Path, archives: Mapping[str, Path], devkit: Devkit | None, expected: Expected) -> dict[str, Any]:
    """The splits that have an archive, their lists and the class names; what source.json then says is whole."""
    for half_written in out.glob(".*.part"):  # by a run that was killed
        half_written.unlink()
    found = read_source(out / SOURCE_FILE)
    done: dict[str, Any] = {
        split: found[split] for split in ("train", "val") if split in found and split not in archives
    }
    if done:  # a split that is begun anew is not whole until it has been looked through
        write_source(out / SOURCE_FILE, done)
    else:
        (out / SOURCE_FILE).unlink(missing_ok=True)
    for split, archive in archives.items():
        if split == "train":
            unpack_train(archive, out / "train", expected)
            of_class = devkit.num_train if devkit is not None else None
        else:
            assert devkit is not None
            unpack_val(archive, out / "val", devkit)
            of_class = Counter(devkit.truth)
        num_images = {"train": expected.train, "val": expected.val}[split]
        list_split(archive, out, split, of_class, expected.classes, num_images)
        done[split] = {"archive": archive.name, "num_images": num_images}
    write_class_names(out, devkit)
    os.sync()  # the images, before what says that they are there
    write_source(out / SOURCE_FILE, done)
    (out / UNFINISHED_FILE).unlink()
    return done


def check_is_tar(archive: Path) -> None:
    """Raises ValueError for what isn't, and FileNotFoundError where there is none."""
    try:
        tarfile.open(archive, "r:").close()
    except tarfile.TarError:
        raise ValueError(
            f"{archive}: is not a tar archive, or is compressed; name {SOURCE}'s own, as they were downloaded"
        ) from None


def check_md5(archive: Path, expected: str) -> None:
    """Raises ValueError where the archive's sum is another. A tar has none of its own: damage within an image, of
    whose bytes none is lost, is seen only here, and by `data check` where it doesn't decode."""
    found = hashlib.md5(usedforsecurity=False)
    with (
        archive.open("rb") as file,
        tqdm(total=archive.stat().st_size, unit="B", unit_scale=True, desc=archive.name, disable=None) as bar,
    ):
        while piece := file.read(1 << 24):
            found.update(piece)
            bar.update(len(piece))
    if found.hexdigest() != expected:
        raise ValueError(f"{archive}: its MD5 sum is {found.hexdigest()}, and {SOURCE}'s is {expected}; fetch it again")


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
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: ./run.sh setup, or pip install scipy") from error
    try:
        with gzip.open(path) as packed:
            content = packed.read()  # to its end, where its checksum is: SciPy can crash on damaged bytes
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            members = {Path(member.name).name: member for member in tar if member.isreg()}
            meta = _content(tar, members.get("meta.mat"))
            truth = _content(tar, members.get("ILSVRC2012_validation_ground_truth.txt"))
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = {str(synset["WNID"]): synset for synset in synsets if int(synset["num_children"]) == 0}
        wnid_of = {int(leaf["ILSVRC2012_ID"]): wnid for wnid, leaf in leaves.items()}
        kit = Devkit(
            names={wnid: " ".join(str(leaf["words"]).split()) for wnid, leaf in leaves.items()},
            num_train={wnid: int(leaf["num_train_images"]) for wnid, leaf in leaves.items()},
            truth=[wnid_of[int(number)] for number in truth.split()],
        )
    except Exception as error:  # for what isn't a devkit gzip, tarfile and, above all, SciPy raise almost anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: can't be read as {DEVKIT} ({error!r}); fetch it again") from None
    found = Expected(len(kit.names), sum(kit.num_train.values()), len(kit.truth))
    if found != expected or not all(map(_WNID.fullmatch, kit.names)):
        raise ValueError(
            f"{path}: tells of {found.classes} classes, {found.train} training and {found.val} validation images, not "
            f"of {expected.classes}, {expected.train} and {expected.val}, or names them otherwise; it is not {SOURCE}'s"
        )
    return kit


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
    if member is None:
        raise ValueError("data/meta.mat or data/ILSVRC2012_validation_ground_truth.txt is missing")
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def unpack_train(archive: Path, folder: Path, expected: Expected) -> None:
    """The images of each tar in the archive into a folder of its name."""
    with (
        reading(archive),
        tarfile.open(archive, "r:") as outer,
        tqdm(total=expected.train, unit="image", desc="train", disable=None) as bar,
    ):
        for member in outer:
            wnid = Path(member.name).stem
            if not member.isreg() or not _WNID.fullmatch(wnid) or Path(member.name).suffix != ".tar":
                raise ValueError(f"{archive}: holds {member.name!r}, where there should be nothing but n########.tar")
            (folder / wnid).mkdir(parents=True, exist_ok=True)
            image_name = re.compile(rf"{wnid}_\d+\.JPEG")
            with reading(archive, member.name), tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                for image in inner:
                    if not image.isreg() or not image_name.fullmatch(image.name):
                        raise ValueError(f"{archive}: holds {image.name!r} in {wnid}.tar, which is no image of it")
                    unpack_image(inner, image, folder / wnid / image.name)
                    bar.update()
        if not outer.getmembers():
            raise tarfile.ReadError("it is empty")


def unpack_val(archive: Path, folder: Path, devkit: Devkit) -> None:
    """The validation images, each into its class's folder."""
    for wnid in devkit.names:
        (folder / wnid).mkdir(parents=True, exist_ok=True)
    with (
        reading(archive),
        tarfile.open(archive, "r:") as tar,
        tqdm(total=len(devkit.truth), unit="image", desc="val", disable=None) as bar,
    ):
        for member in tar:
            match = _VAL_IMAGE.fullmatch(member.name)
            if not member.isreg() or match is None or not 1 <= int(match[1]) <= len(devkit.truth):
                raise ValueError(f"{archive}: holds {member.name!r}, which is none of its {len(devkit.truth)} images")
            with reading(archive, member.name):
                unpack_image(tar, member, folder / devkit.truth[int(match[1]) - 1] / member.name)
            bar.update()


def unpack_image(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Passes over one that is there. tarfile raises ReadError where the archive ends within the member.

    An fsync for each of a million files would take hours: what a power cut leaves of them, the next run sees by size.
    """
    try:
        if path.stat().st_size == member.size:
            return
    except FileNotFoundError:
        pass
    source = tar.extractfile(member)
    assert source is not None
    content = source.read()
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:  # which names no file where the disk is full
        error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


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


def list_split(
    archive: Path, out: Path, split: str, of_class: Mapping[str, int] | None, num_classes: int, num_images: int
) -> None:
    """The seed's list of a split, of what training would find in its folders.

    Raises ValueError where that is too few or too many, by class where `of_class` says how many each must have.
    """
    folders = class_folders(out / split)
    lines, counts = list_folders(folders, out)
    found = {folder.name: int(count) for folder, count in zip(folders, counts, strict=True)}
    wanted = found if of_class is None else of_class
    wrong = [
        f"{wnid} has {found.get(wnid, 0)} of {wanted.get(wnid, 0)}"
        for wnid in sorted(found.keys() | wanted.keys())
        if found.get(wnid, 0) != wanted.get(wnid, 0)
    ]
    if wrong or (len(found), len(lines)) != (num_classes, num_images):
        more = f" and {len(wrong) - _SHOWN_CLASSES} more classes" if len(wrong) > _SHOWN_CLASSES else ""
        classes = f" ({', '.join(wrong[:_SHOWN_CLASSES])}{more})" if wrong else ""
        raise ValueError(
            f"{out / split}: {len(lines)} images in {len(found)} classes, not {num_images} in {num_classes}{classes}; "
            f"where images lack, {archive} is cut off or another archive: fetch it again (what is unpacked stays); "
            "where there are too many, move away those that aren't the archive's"
        )
    with write_atomically(out / f"{split}_list.txt") as temporary, temporary.open("wb") as file:
        for number, label in enumerate(lines.labels.values.tolist()):
            file.write(b"%s %d\n" % (lines.path(number), label))


def bytes_in(folder: Path) -> int:
    """What the images below a folder take; 0 where there is none."""
    return sum(
        (Path(below) / name).stat().st_size
        for below, _, names in os.walk(folder)
        for name in names
        if name.endswith(".JPEG")
    )


def write_class_names(out: Path, devkit: Devkit | None) -> None:
    """Without a devkit, a class is called by its WNID, unless the names are there."""
    if devkit is None and (out / CLASS_NAMES_FILE).exists():
        return
    names = devkit.names if devkit is not None else {path.name: path.name for path in class_folders(out / "train")}
    with write_atomically(out / CLASS_NAMES_FILE) as temporary:
        temporary.write_text("".join(f"{wnid} {names[wnid]}\n" for wnid in sorted(names)), encoding="utf-8")


def read_source(path: Path) -> dict[str, Any]:
    """What this tool has written there; nothing where it hasn't."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("source") == SOURCE else {}


def write_source(path: Path, splits: Mapping[str, Any]) -> None:
    write_json({"source": SOURCE, **splits}, path)
