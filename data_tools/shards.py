"""A set as WebDataset shards with DALI's index files: for network disks, where opening a million files is slow.

    OUT/train/000000.tar, 000000.idx, 000001.tar, ...   as vit_static/data/shards.py describes them
    OUT/train/contents.txt      a line an image, in order: 000000.tar/00000042.jpg and where it came from
    OUT/val/...                 the same
    OUT/class_names.txt         a copy of the source's

Training images are shuffled, by the seed, so that a part of the shards is a fair sample; validation images keep their
order. An image's bytes stay as they are. The same source gives the same shards, byte for byte. The same command goes on
where it was stopped: shards that are there are whole.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.arguments import ToolParser
from vit_static.common.io import lock, write_atomically, write_json
from vit_static.config.schema import DataConfig
from vit_static.data.image_set import FileDataset
from vit_static.data.open_set import CLASS_NAMES_FILE, count_classes, open_set
from vit_static.data.webdataset import LABEL_EXTENSION, UNFINISHED_FILE

MANIFEST_FILE, CONTENTS_FILE = "shards.json", "contents.txt"
_BLOCK = 512  # tar's


@dataclass(frozen=True)
class Shard:
    """One to be written: the images with these numbers."""

    path: Path
    numbers: np.ndarray
    first: int  # of its keys


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises ValueError for a wrong argument."""
    parser = ToolParser(prog="vit_static data shards", description="WebDataset shards, for network disks.")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the set, as data.root names it")
    parser.add_argument("--train", default="train", help="below it: class folders or a list file (default: train)")
    parser.add_argument("--val", default="val", help="the same, if it is there (default: val)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the shards go")
    parser.add_argument("--shard-mb", type=float, default=1000.0, help="size of a shard, in MB (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the training images' order (default: 0)")
    parser.add_argument("--index", type=Path, metavar="DIR", help="instead: make the indexes of the shards in a folder")
    arguments = parser.parse_args(argv)
    if arguments.index is not None:
        return make_indexes(arguments.index)
    if arguments.root is None or arguments.out is None:
        raise ValueError("--root and --out are needed: the set, and where its shards go (-h shows the arguments)")
    if not arguments.shard_mb > 0:
        raise ValueError(f"--shard-mb {arguments.shard_mb:g}: must be above 0")
    root, out = arguments.root, arguments.out
    if out.resolve() == root.resolve():
        raise ValueError(f"--out {out}: is the set itself; name another folder")
    for split in ("train", "val"):
        place = {"train": arguments.train, "val": arguments.val}[split]
        if split == "val" and not (root / place).exists():
            print(f"shards: no {root / place}, so there will be no validation shards")
            continue
        data = DataConfig(root=str(root), train=arguments.train, val=arguments.val, multi_label=True)
        images = open_set(data, split, count_classes(data, split))
        if not isinstance(images, FileDataset):
            raise ValueError(f"{root / place}: holds shards already; --{split} takes class folders or a list file")
        pack(images, out / split, arguments.shard_mb, arguments.seed if split == "train" else None)
    if (root / CLASS_NAMES_FILE).is_file():
        shutil.copy(root / CLASS_NAMES_FILE, out / CLASS_NAMES_FILE)
    print(f"shards: to train from them set -o data.root={out}")
    return 0


def pack(images: FileDataset, folder: Path, shard_mb: float, seed: int | None) -> None:
    """Writes the images' shards into `folder`, in an order shuffled by the seed if there is one."""
    sizes = np.fromiter((Path(images.name(number)).stat().st_size for number in range(len(images))), np.int64)
    source = {"images": images.digest(), "num_images": len(images), "num_bytes": int(sizes.sum())}
    manifest = {**source, "shard_mb": shard_mb, "seed": seed}
    unfinished = folder / UNFINISHED_FILE
    if _read_json(folder / MANIFEST_FILE) == manifest:
        print(f"shards: the {len(images)} images are already in {folder}")
        return
    half_written = set(folder.glob(".*.part"))  # by a run that was killed, or is at it
    if folder.is_dir() and set(folder.iterdir()) - half_written and _read_json(unfinished) != manifest:
        raise ValueError(
            f"{folder}: holds something else, or shards of another set, --shard-mb or --seed; name another --out, or "
            "remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, f"{folder}: another run is writing it; wait until that has ended"):
        for path in half_written:
            path.unlink(missing_ok=True)
        write_json(manifest, unfinished)
        num_shards = write_shards(images, folder, shard_mb, seed, sizes)
        write_json(manifest, folder / MANIFEST_FILE)
        unfinished.unlink()
    print(f"shards: {len(images)} images written in {num_shards} shards in {folder}")


def write_shards(images: FileDataset, folder: Path, shard_mb: float, seed: int | None, sizes: np.ndarray) -> int:
    """Those that aren't there yet, and the list of what is in all of them; how many there are. `sizes` are in bytes."""
    order = (
        np.arange(len(images)) if seed is None else np.random.Generator(np.random.Philox(seed)).permutation(len(images))
    )
    shards = plan(folder, order, sizes[order], shard_mb)
    missing = [shard for shard in shards if not shard.path.with_suffix(".idx").exists()]
    done = len(images) - sum(len(shard.numbers) for shard in missing)
    with (
        tqdm(total=len(images), initial=done, unit="image", desc=folder.name, disable=None) as bar,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
    ):
        writing = [threads.submit(write_shard, images, shard, bar) for shard in missing]
        try:
            for future in writing:
                future.result()
        finally:  # after a failure, or Ctrl-C, those that haven't begun aren't
            threads.shutdown(wait=True, cancel_futures=True)
    with write_atomically(folder / CONTENTS_FILE) as temporary, temporary.open("wb") as file:
        for shard in shards:
            file.writelines(
                f"{shard.path.name}/{member_name(images, shard, place)} ".encode()
                + os.fsencode(images.relative_name(int(number)))
                + b"\n"
                for place, number in enumerate(shard.numbers)
            )
    return len(shards)


def plan(folder: Path, order: np.ndarray, sizes: np.ndarray, shard_mb: float) -> list[Shard]:
    """Which images, of these sizes in bytes, go into which shard: as many as fit, at least one."""
    in_tar = 2 * _BLOCK + -(-sizes // _BLOCK) * _BLOCK + _BLOCK  # two headers, the image, its label
    shards: list[Shard] = []
    start, filled = 0, 0
    for place, size in enumerate(in_tar.tolist()):
        if filled and filled + size > shard_mb * 1e6:
            shards.append(Shard(folder / f"{len(shards):06d}.tar", order[start:place], start))
            start, filled = place, 0
        filled += size
    shards.append(Shard(folder / f"{len(shards):06d}.tar", order[start:], start))
    return shards


def write_shard(images: FileDataset, shard: Shard, bar: Any) -> None:
    """The tar first, its index last: where the index is, both are whole."""
    lines = [f"v1.2 {len(shard.numbers)}"]
    with write_atomically(shard.path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, number in enumerate(shard.numbers):
            encoded, labels = images.read(int(number))
            name = member_name(images, shard, place)
            label = ",".join(map(str, labels.tolist())).encode()
            components = []
            for member, content in ((name, encoded.data), (f"{name.split('.')[0]}.{LABEL_EXTENSION}", label)):
                entry = tarfile.TarInfo(member)
                entry.size, entry.mode = len(content), 0o644
                components.append(f"{member.split('.')[1]} {tar.offset + _BLOCK} {entry.size} {member}")
                tar.addfile(entry, io.BytesIO(content))
            lines.append(" ".join(components))
            bar.update()
    with write_atomically(shard.path.with_suffix(".idx")) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def member_name(images: FileDataset, shard: Shard, place: int) -> str:
    """An image's name in its shard: its number in the split, and what it is called by the end of its name."""
    suffix = Path(images.name(int(shard.numbers[place]))).suffix.lower().lstrip(".")
    return f"{shard.first + place:08d}.{'jpg' if suffix == 'jpeg' else suffix}"


def make_indexes(folder: Path) -> int:
    """Indexes, by DALI's own program, of the shards in a folder that have none. Raises ValueError for what it can't."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        packed = sorted(folder.glob("*.tar.*")) + sorted(folder.glob("*.tgz"))
        hint = (
            f"; {packed[0].name} is compressed, which can't be read at any place: unpack it (gunzip)" if packed else ""
        )
        raise ValueError(f"{folder}: has no .tar files{hint}")
    missing = [shard for shard in shards if not shard.with_suffix(".idx").exists()]
    for shard in tqdm(missing, unit="shard", disable=None):
        if not tarfile.is_tarfile(shard):
            raise ValueError(f"{shard}: is not a tar file; remove it, or fetch it again")
        with write_atomically(shard.with_suffix(".idx")) as temporary:
            done = subprocess.run(
                [sys.executable, "-m", "wds2idx", str(shard), str(temporary)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise ValueError(f"{shard}: DALI's wds2idx can't index it ({reason})")
    print(f"shards: {len(missing)} indexes made in {folder}, {len(shards) - len(missing)} were there")
    return 0


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
