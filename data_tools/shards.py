"""WebDataset shards with DALI's index files, for network disks, where opening a million files is slow.

    OUT/train/000000.tar, 000000.idx, 000001.tar, ...   as described in vit_static/data/webdataset.py
    OUT/train/contents.txt      one line per image, in order: 000000.tar/00000042.jpg and the path that it came from,
                                 with line breaks in names as \\n and \\r
    OUT/val/...                 the same
    OUT/class_names.txt         a copy of the source's, or the names of a table's classes

Training images are shuffled by the seed, so that some of the shards are a fair sample; validation images keep their
order. The bytes of the images don't change. The same source gives the same shards, byte for byte. The same command
resumes a run that was stopped: every shard with an index is complete.
"""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_static.common.io import (
    folder_write_errors,
    lock,
    make_folder,
    remove_new_folders,
    write_atomically,
    write_bytes,
    write_json,
    write_lines,
    write_text,
)
from vit_static.common.terminal import ProgressBar, tracked
from vit_static.common.text import counted, print_line
from vit_static.data.image_formats import describe_left_out
from vit_static.data.image_set import FileDataset
from vit_static.data.manifest import read_manifest
from vit_static.data.open_set import CLASS_NAMES_FILE, count_classes, open_set, split_path
from vit_static.data.table import is_table
from vit_static.data.webdataset import LABEL_EXTENSION, UNFINISHED_FILE

from .arguments import ToolParser, add_label_arguments, data_config, override_options
from .class_names import write_class_names

MANIFEST_FILE, CONTENTS_FILE = "shards.json", "contents.txt"
_BLOCK_BYTES = 512  # of tar


@dataclass(frozen=True)
class Shard:
    """A shard to write, with the images of these indices."""

    path: Path
    indices: np.ndarray
    first_key: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Raise ValueError for a wrong argument."""
    parser = ToolParser("shards", description="Pack a dataset into WebDataset shards, for network disks.")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the dataset, as in data.root")
    parser.add_argument("--train", default="train", help="class folders, a list file or a table in it (default: train)")
    parser.add_argument("--val", default="val", help="the same; skipped if it doesn't exist (default: val)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the shards")
    parser.add_argument("--shard-mb", type=float, default=1000.0, help="size of a shard, in MB (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training images' order (default: 0)")
    parser.add_argument("--index", type=Path, metavar="DIR", help="only index the shards in this folder")
    add_label_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.index is not None:
        return make_indexes(arguments.index)
    if arguments.root is None or arguments.out is None:
        raise ValueError("--root and --out are missing; give the dataset, and a folder for its shards")
    if not arguments.shard_mb > 0:
        raise ValueError(f"--shard-mb {arguments.shard_mb:g}: must be above 0")
    root, out = arguments.root, arguments.out
    if out.resolve() == root.resolve():
        raise ValueError(f"--out {out}: is the dataset itself; give another folder")
    data = data_config(arguments)
    class_names: dict[str, list[str]] = {}
    for split in ("train", "val"):
        path = split_path(data, split)
        if split == "val" and not path.exists():
            print_line(f"shards: {path} doesn't exist, so there will be no validation shards")
            continue
        images = open_set(data, split, count_classes(data, split))
        class_names[split] = images.class_names
        if not isinstance(images, FileDataset):
            raise ValueError(f"{path}: has shards already; give class folders, a list file or a table as --{split}")
        if images.left_out:
            print_line(f"shards: left out of {path}: {describe_left_out(images.left_out)}")
        pack(images, out / split, arguments.shard_mb, arguments.seed if split == "train" else None)
    if is_table(split_path(data, "train")):  # shards have the classes' numbers, whose order is the table's
        write_class_names(out, class_names["train"])
    elif (root / CLASS_NAMES_FILE).is_file():
        write_bytes((root / CLASS_NAMES_FILE).read_bytes(), out / CLASS_NAMES_FILE)
    print_line(f"shards: to train on them, set {override_options({'data.root': out})}")
    return 0


def pack(images: FileDataset, folder: Path, shard_mb: float, seed: int | None) -> None:
    """Write the images' shards to `folder`, shuffled if there is a seed."""
    sizes = np.fromiter((Path(images.name(index)).stat().st_size for index in range(len(images))), np.int64)
    source = {"images": images.digest(), "num_images": len(images), "num_bytes": int(sizes.sum())}
    manifest = {**source, "shard_mb": shard_mb, "seed": seed}
    unfinished = folder / UNFINISHED_FILE
    if read_manifest(folder / MANIFEST_FILE) == manifest:
        print_line(f"shards: {counted(len(images), 'image')} already in {folder}")
        return
    partial_files = set(folder.glob(".*.part"))  # of a run that was killed, or is still writing
    if folder.is_dir() and set(folder.iterdir()) - partial_files and read_manifest(unfinished) != manifest:
        raise ValueError(
            f"{folder}: has other files, or shards of another dataset, --shard-mb or --seed; give another folder as "
            "--out, or remove it"
        )
    refusal = f"{folder}: another run is writing it; wait until that has ended"
    with remove_new_folders(unfinished), make_and_lock(folder, refusal):
        for path in partial_files:
            path.unlink(missing_ok=True)
        write_json(manifest, unfinished)
        num_shards = write_shards(images, folder, shard_mb, seed, sizes)
        write_json(manifest, folder / MANIFEST_FILE)
        unfinished.unlink()
    print_line(f"shards: {counted(len(images), 'image')} written to {counted(num_shards, 'shard')} in {folder}")


@contextmanager
def make_and_lock(folder: Path, refusal: str) -> Iterator[None]:
    """Create a folder unless it exists, and hold its lock."""
    make_folder(folder)
    with lock(folder, refusal):
        yield


def write_shards(images: FileDataset, folder: Path, shard_mb: float, seed: int | None, sizes: np.ndarray) -> int:
    """Write the missing shards and the list of their contents, and return the number of shards. `sizes`: in bytes."""
    num_images = len(images)
    order = (
        np.arange(num_images) if seed is None else np.random.Generator(np.random.Philox(seed)).permutation(num_images)
    )
    shards = plan_shards(folder, order, sizes[order], shard_mb)
    missing = unfinished(shards)
    num_written = num_images - sum(len(shard.indices) for shard in missing)
    with (
        folder_write_errors(folder, lambda: sum(tar_size(sizes[shard.indices]) for shard in unfinished(shards))),
        ProgressBar(num_images, "image", title=folder.name, num_done=num_written) as bar,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
    ):
        futures = [threads.submit(write_shard, images, shard, bar) for shard in missing]
        try:
            for future in futures:
                future.result()
        finally:  # after an error, or Ctrl-C, no further shard is started
            threads.shutdown(wait=True, cancel_futures=True)
    write_lines(
        lambda: (
            f"{shard.path.name}/{member_name(images, shard, position)} ".encode()
            + os.fsencode(images.relative_name(int(index))).replace(b"\n", rb"\n").replace(b"\r", rb"\r")
            + b"\n"
            for shard in shards
            for position, index in enumerate(shard.indices)
        ),
        folder / CONTENTS_FILE,
    )
    return len(shards)


def plan_shards(folder: Path, order: np.ndarray, sizes: np.ndarray, shard_mb: float) -> list[Shard]:
    """Divide the images, with these sizes in bytes, into shards: as many as fit, at least one."""
    shards: list[Shard] = []
    start, num_bytes = 0, 0
    for position, size in enumerate(member_sizes(sizes).tolist()):
        if num_bytes and num_bytes + size > shard_mb * 1e6:
            shards.append(Shard(folder / f"{len(shards):06d}.tar", order[start:position], start))
            start, num_bytes = position, 0
        num_bytes += size
    shards.append(Shard(folder / f"{len(shards):06d}.tar", order[start:], start))
    return shards


def member_sizes(sizes: np.ndarray) -> np.ndarray:
    """Return how many bytes of a tar the images of these sizes take with their labels and both headers."""
    return 2 * _BLOCK_BYTES + -(-sizes // _BLOCK_BYTES) * _BLOCK_BYTES + _BLOCK_BYTES


def tar_size(sizes: np.ndarray) -> int:
    """Return the size in bytes of a shard of images of these sizes: two empty blocks end it, in a whole record."""
    num_bytes = int(member_sizes(sizes).sum()) + 2 * _BLOCK_BYTES
    return -(-num_bytes // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def unfinished(shards: list[Shard]) -> list[Shard]:
    """Return the shards without an index."""
    return [shard for shard in shards if not shard.path.with_suffix(".idx").exists()]


def write_shard(images: FileDataset, shard: Shard, bar: ProgressBar) -> None:
    """Write a shard and, last, its index, whose presence says that both are complete."""
    lines = [f"v1.2 {len(shard.indices)}"]
    size = tar_size(np.array([Path(images.name(int(index))).stat().st_size for index in shard.indices]))
    with (
        write_atomically(shard.path, size) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for position, index in enumerate(shard.indices):
            encoded, labels = images.read(int(index))
            name = member_name(images, shard, position)
            label = ",".join(map(str, labels.tolist())).encode()
            components = []
            for member, content in ((name, encoded.data), (f"{name.split('.')[0]}.{LABEL_EXTENSION}", label)):
                entry = tarfile.TarInfo(member)
                entry.size, entry.mode = len(content), 0o644
                components.append(f"{member.split('.')[1]} {tar.offset + _BLOCK_BYTES} {entry.size} {member}")
                tar.addfile(entry, io.BytesIO(content))
            lines.append(" ".join(components))
            bar.update()
    write_text("\n".join(lines) + "\n", shard.path.with_suffix(".idx"))


def member_name(images: FileDataset, shard: Shard, position: int) -> str:
    """Return the name of an image in its shard: its number in the split, and its suffix."""
    suffix = Path(images.name(int(shard.indices[position]))).suffix.lower().lstrip(".")
    return f"{shard.first_key + position:08d}.{'jpg' if suffix == 'jpeg' else suffix}"


def make_indexes(folder: Path) -> int:
    """Write the missing indexes of the shards in a folder, with DALI's wds2idx, and return the exit code.

    Raise ValueError for a shard that can't be indexed.
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        compressed = sorted(folder.glob("*.tar.*")) + sorted(folder.glob("*.tgz"))
        remedy = (
            f"{compressed[0].name} is compressed, and must be unpacked with gunzip to be read at any position"
            if compressed
            else "give a folder with shards as --index"
        )
        raise ValueError(f"{folder}: has no .tar files; {remedy}")
    missing = [shard for shard in shards if not shard.with_suffix(".idx").exists()]
    for shard in tracked(missing, "shard"):
        if not tarfile.is_tarfile(shard):
            raise ValueError(f"{shard}: is not a tar file; remove it, or download it again")
        with write_atomically(shard.with_suffix(".idx")) as temporary:
            done = subprocess.run(
                [sys.executable, "-m", "wds2idx", str(shard), str(temporary)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise ValueError(f"{shard}: DALI's wds2idx can't index it ({reason}); remove it, or download it again")
    print_line(f"shards: {len(missing)} indexes written to {folder}, {len(shards) - len(missing)} were there already")
    return 0
