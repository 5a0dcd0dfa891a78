"""`data imagenet` on a miniature of the archives: tars in a tar, a validation tar, a devkit with its MATLAB file."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from sets import photo
from small import ROOT

from data_tools.__main__ import main
from vit_static.config import DataConfig
from vit_static.data.sets import open_set

WNIDS = ["n01440764", "n02105855", "n03000001", "n03999999"]
IDS = {1: "n03000001", 2: "n01440764", 3: "n03999999", 4: "n02105855"}  # in no order
NAMES = {"n01440764": "tench, Tinca tinca", "n02105855": "Shetland sheepdog", "n03000001": "thing", "n03999999": "café"}
NUM_VAL = 18
COUNTS = ["--num-classes", "4", "--num-train", "22", "--num-val", str(NUM_VAL)]


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    photo(20 + seed % 7, 30, seed=seed).save(file, "JPEG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def train_images() -> dict[str, dict[str, bytes]]:
    """By class, its files: 4, 5, 6 and 7 of them."""
    return {
        wnid: {f"{wnid}_{97 * n + 3}.JPEG": jpeg(10 * label + n) for n in range(4 + label)}
        for label, wnid in enumerate(WNIDS)
    }


TRAIN = train_images()
TRUTH = [1 + (7 * number) % 4 for number in range(NUM_VAL)]  # the ID of validation image number + 1
VAL = {f"ILSVRC2012_val_{number + 1:08d}.JPEG": jpeg(200 + number) for number in range(NUM_VAL)}


def write_train(path: Path, images: dict[str, dict[str, bytes]] = TRAIN) -> None:
    with tarfile.open(path, "w") as outer:
        for wnid, files in images.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name, content in files.items():
                    add(tar, name, content)
            add(outer, f"{wnid}.tar", inner.getvalue())


def write_val(path: Path, images: dict[str, bytes] = VAL) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in images.items():
            add(tar, name, content)


def write_devkit(path: Path, truth: list[int] = TRUTH) -> None:
    """With an inner node, 5, above the four leaves, as the real one has."""
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    rows = [(n, w, NAMES[w], "a gloss", 0, np.zeros(0), 0, len(TRAIN[w])) for n, w in IDS.items()]
    rows.append((5, "n00001740", "entity", "what is", 4, np.arange(1, 5), 1, 0))
    synsets = np.array([tuple(row) for row in rows], dtype=[(name, object) for name in fields])[:, None]
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        lines = "".join(f"{number}\n" for number in truth)
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    write_train(folder / "train.tar")
    write_val(folder / "val.tar")
    write_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz")
    return folder


def arguments(archives: Path, out: Path, *parts: str) -> list[str]:
    named = [item for part in parts or ("train", "val") for item in (f"--{part}", str(archives / f"{part}.tar"))]
    return ["imagenet", *named, "--out", str(out), *COUNTS]


def assert_whole(out: Path) -> None:
    for wnid, files in TRAIN.items():
        assert {path.name: path.read_bytes() for path in (out / "train" / wnid).iterdir()} == files
    for number, (name, content) in enumerate(VAL.items()):
        assert (out / "val" / IDS[TRUTH[number]] / name).read_bytes() == content
    assert len(list(out.glob("val/*/*"))) == NUM_VAL
    assert {path.name for path in out.iterdir()} == {
        "train", "val", "class_names.txt", "train_list.txt", "val_list.txt", "source.json",
    }  # fmt: skip
    assert not list(out.rglob(".*"))


def test_the_archives_become_class_folders_names_and_lists(archives: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    assert_whole(out)
    assert (out / "class_names.txt").read_text(encoding="utf-8") == "".join(f"{w} {NAMES[w]}\n" for w in WNIDS)
    lines = (out / "train_list.txt").read_text().splitlines()
    assert lines[0] == "train/n01440764/n01440764_100.JPEG 0" and lines[-1].endswith(" 3") and len(lines) == 22
    assert "22 training and 18 validation images" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "val"])
def test_lists_and_folders_are_one_set(archives: Path, tmp_path: Path, split: str) -> None:
    """Labels are the sorted folders', not the devkit's own numbers; class names are the devkit's."""
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    folders = open_set(DataConfig(root=str(out)), split, 4)
    listed = open_set(DataConfig(root=str(out), **{split: f"{split}_list.txt"}), split, 4)
    assert len(folders) == len(listed) == {"train": 22, "val": NUM_VAL}[split]
    for number in range(len(folders)):
        assert folders.name(number) == listed.name(number)
        assert folders.read(number)[1].tolist() == listed.read(number)[1].tolist()
        assert WNIDS[folders.read(number)[1][0]] == Path(folders.name(number)).parent.name
    assert folders.class_names == listed.class_names == [NAMES[wnid] for wnid in WNIDS]


@pytest.mark.parametrize("parts", [("train",), ("val",)])
def test_one_archive_alone_and_the_other_later(archives: Path, tmp_path: Path, parts: tuple[str, ...]) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out, *parts)) == 0
    assert set(json.loads((out / "source.json").read_text())) == {"source", *parts}
    other = "val" if parts == ("train",) else "train"
    assert main(arguments(archives, out, other)) == 0
    assert_whole(out)
    assert set(json.loads((out / "source.json").read_text())) == {"source", "train", "val"}


def test_training_images_need_no_devkit(archives: Path, tmp_path: Path) -> None:
    (archives / "ILSVRC2012_devkit_t12.tar.gz").rename(tmp_path / "kit.tar.gz")
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out, "train")) == 0
    assert (out / "class_names.txt").read_text() == "".join(f"{wnid} {wnid}\n" for wnid in WNIDS)
    assert main([*arguments(archives, out, "val"), "--devkit", str(tmp_path / "kit.tar.gz")]) == 0
    assert_whole(out)
    assert "tench" in (out / "class_names.txt").read_text()


def test_a_second_run_writes_nothing_again(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.JPEG")}
    assert main(arguments(archives, out)) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.JPEG")} == before


def test_what_a_power_cut_has_spoilt_is_done_again(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    (out / "source.json").unlink()
    (out / ".unfinished.json").touch()
    next((out / "train/n02105855").iterdir()).write_bytes(b"")
    next((out / "val/n02105855").iterdir()).write_bytes(b"")
    next((out / "train/n03000001").iterdir()).unlink()
    assert main(arguments(archives, out)) == 0
    assert_whole(out)


def test_a_run_killed_at_any_moment_is_gone_on_with(archives: Path, tmp_path: Path) -> None:
    """By a signal from within, after a random number of files: what happens between two system calls."""
    script = """
import os, pathlib, signal, sys
from data_tools import imagenet
left, kind, write = int(sys.argv[1]), sys.argv[2], pathlib.Path.write_bytes
def write_bytes(path, content):
    global left
    left -= 1
    if left < 0:
        write(path, content[: len(content) // 2])
        os.kill(os.getpid(), getattr(signal, kind))
    return write(path, content)
pathlib.Path.write_bytes = write_bytes
if kind == "SIGTERM":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(imagenet.main(sys.argv[4:]))
"""
    out = tmp_path / "imagenet"
    rng = random.Random(0)
    for turn in range(6):
        left, kind = rng.randrange(1, 12), ("SIGKILL", "SIGTERM")[turn % 2]
        command = [sys.executable, "-c", script, str(left), kind, *arguments(archives, out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL, 1, -signal.SIGINT), done.stderr
        if done.returncode:
            assert not (out / "source.json").exists()
            for path in out.glob("train/n*/*.JPEG"):  # what has its name is whole
                assert path.read_bytes() == TRAIN[path.parent.name][path.name]
            for path in out.glob("val/*/I*.JPEG"):
                assert path.read_bytes() == VAL[path.name]
    assert main(arguments(archives, out)) == 0
    assert_whole(out)


def failed(capsys, *command: str) -> str:
    assert main(list(command)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_a_cut_off_archive_is_named_and_gone_on_with(archives: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "imagenet"
    whole = (archives / "train.tar").read_bytes()
    for share in (0.4, 0.55, 0.8):
        (archives / "train.tar").write_bytes(whole[: int(share * len(whole))])
        error = failed(capsys, *arguments(archives, out))
        assert str(archives / "train.tar") in error and "fetch it again" in error
        assert not (out / "source.json").exists()
    assert list((out / "train").glob("n*"))
    (archives / "train.tar").write_bytes(whole)
    assert main(arguments(archives, out)) == 0
    assert_whole(out)


def test_other_numbers_than_the_devkits_are_told(archives: Path, tmp_path: Path, capsys) -> None:
    fewer = {wnid: dict(files) for wnid, files in TRAIN.items()}
    fewer["n03000001"].popitem()
    write_train(archives / "train.tar", fewer)
    error = failed(capsys, *arguments(archives, tmp_path / "a"))
    assert "5 images of n03000001, and the devkit says 6" in error
    write_train(archives / "train.tar")
    write_val(archives / "val.tar", dict(list(VAL.items())[:-1]))
    assert "has 17 images, not 18" in failed(capsys, *arguments(archives, tmp_path / "b"))
    real = [item for item in arguments(archives, tmp_path / "c") if item not in COUNTS]
    assert "4 classes and 18 validation images, not of 1000 and 50000" in failed(capsys, *real)
    assert not (tmp_path / "c").exists()
    train_alone = ["imagenet", "--train", str(archives / "train.tar"), "--out", str(tmp_path / "d")]
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "4 classes and 22 images, not 1000 and 1281167" in failed(capsys, *train_alone)


def evil(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(path, "w") as outer:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO())
        add(outer, "n01440764.tar", inner.getvalue())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../../evil.JPEG", tarfile.REGTYPE), ("/tmp/evil.JPEG", tarfile.REGTYPE), ("n01440764_1.JPEG", tarfile.SYMTYPE)],
)
def test_nothing_is_written_beside_the_folder(archives: Path, tmp_path: Path, capsys, name: str, kind: bytes) -> None:
    evil(archives / "train.tar", name, kind)
    assert repr(name) in failed(capsys, *arguments(archives, tmp_path / "imagenet", "train"))
    assert not list(tmp_path.rglob("*evil*")) and not list((tmp_path / "imagenet/train").glob("n*"))


def test_mistakes_are_named_before_anything_is_written(archives: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "imagenet"
    assert "--train or --val" in failed(capsys, "imagenet", "--out", str(out))
    assert "nowhere.tar" in failed(capsys, "imagenet", "--train", "nowhere.tar", "--out", str(out))
    swapped = ["imagenet", "--train", str(archives / "val.tar"), "--out", str(out), *COUNTS]
    assert "n########.tar" in failed(capsys, *swapped)
    (archives / "text.tar").write_text("not a tar")
    text = ["imagenet", "--train", str(archives / "text.tar"), "--out", str(tmp_path / "b")]
    assert "not a tar archive" in failed(capsys, *text)
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"junk")
    assert "fetch it again" in failed(capsys, *arguments(archives, tmp_path / "c"))
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "--devkit" in failed(capsys, *arguments(archives, tmp_path / "c"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    assert "not empty" in failed(capsys, *arguments(archives, tmp_path / "mine", "train"))
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


def test_too_little_room_is_told_at_once(archives: Path, tmp_path: Path, capsys) -> None:
    with (archives / "train.tar").open("ab") as file:
        file.truncate(1 << 43)  # 9 TB, of which the disk holds nothing
    assert "GB left" in failed(capsys, *arguments(archives, tmp_path / "imagenet", "train"))
