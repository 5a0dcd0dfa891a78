"""Miniature archives of ImageNet-1k: tars in a tar, a validation tar, a devkit with a MATLAB file."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

from helpers.sets import photo

WNIDS = ["n01440764", "n02105855", "n03000001", "n03999999"]
IDS = {1: "n03000001", 2: "n01440764", 3: "n03999999", 4: "n02105855"}  # not sorted
NAMES = {"n01440764": "tench, Tinca tinca", "n02105855": "Shetland sheepdog", "n03000001": "thing", "n03999999": "café"}
NUM_VAL = 18
COUNTS = ["--num-classes", "4", "--num-train", "22", "--num-val", str(NUM_VAL)]


def make_jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    photo(20 + seed % 7, 30, seed=seed).save(file, "JPEG")
    return file.getvalue()


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def train_images() -> dict[str, dict[str, bytes]]:
    """Return 4, 5, 6 and 7 files by class."""
    return {
        wnid: {f"{wnid}_{97 * n + 3}.JPEG": make_jpeg(10 * label + n) for n in range(4 + label)}
        for label, wnid in enumerate(WNIDS)
    }


TRAIN = train_images()
TRUTH = [1 + (7 * number) % 4 for number in range(NUM_VAL)]  # the ID of validation image number + 1
VAL = {f"ILSVRC2012_val_{number + 1:08d}.JPEG": make_jpeg(200 + number) for number in range(NUM_VAL)}


def write_train(path: Path, images: dict[str, dict[str, bytes]] = TRAIN) -> None:
    with tarfile.open(path, "w") as outer:
        for wnid, files in images.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name, content in files.items():
                    add_member(tar, name, content)
            add_member(outer, f"{wnid}.tar", inner.getvalue())


def write_val(path: Path, images: dict[str, bytes] = VAL) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in images.items():
            add_member(tar, name, content)


def make_meta(ids: dict[int, str] = IDS) -> bytes:
    """Return the devkit's meta.mat, with an inner node, 5, above the four leaves, like the real one."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    fields += ["wordnet_height", "num_train_images"]
    rows: list[tuple[object, ...]] = [
        (n, w, NAMES[IDS[n]], "a gloss", 0, np.zeros(0), 0, len(TRAIN[IDS[n]])) for n, w in ids.items()
    ]
    rows.append((5, "n00001740", "entity", "a gloss", 4, np.arange(1, 5), 1, 0))
    synsets = np.array([tuple(row) for row in rows], dtype=[(name, object) for name in fields])[:, None]
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    return mat.getvalue()


def write_devkit(path: Path, mat: bytes | None = None) -> None:
    with tarfile.open(path, "w:gz") as tar:
        add_member(tar, "ILSVRC2012_devkit_t12/data/meta.mat", make_meta() if mat is None else mat)
        lines = "".join(f"{number}\n" for number in TRUTH)
        add_member(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())


def write_archives(folder: Path) -> Path:
    """Write all of them to a new folder, and return it."""
    folder.mkdir()
    write_train(folder / "train.tar")
    write_val(folder / "val.tar")
    write_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz")
    return folder


def arguments(archives: Path, out: Path, *parts: str) -> list[str]:
    options = [item for part in parts or ("train", "val") for item in (f"--{part}", str(archives / f"{part}.tar"))]
    return ["imagenet", *options, "--out", str(out), *COUNTS]
