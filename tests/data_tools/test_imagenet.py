"""`data imagenet` with miniature archives: tars in a tar, a validation tar, a devkit with a MATLAB file."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.imagenet_archives import (
    COUNTS,
    IDS,
    NAMES,
    NUM_VAL,
    TRAIN,
    TRUTH,
    VAL,
    WNIDS,
    add_member,
    arguments,
    make_jpeg,
    make_meta,
    write_archives,
    write_devkit,
    write_train,
    write_val,
)
from helpers.small import ROOT
from scipy.io import savemat

from data_tools import imagenet
from data_tools.__main__ import main
from vit_static.config.data_schema import DataConfig
from vit_static.data.open_set import open_set


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    return write_archives(tmp_path / "archives")


def assert_complete(out: Path) -> None:
    for wnid, files in TRAIN.items():
        assert {path.name: path.read_bytes() for path in (out / "train" / wnid).iterdir()} == files
    for number, (name, content) in enumerate(VAL.items()):
        assert (out / "val" / IDS[TRUTH[number]] / name).read_bytes() == content
    assert len(list(out.glob("val/*/*"))) == NUM_VAL
    assert {path.name for path in out.iterdir()} == {
        "train", "val", "class_names.txt", "train_list.txt", "val_list.txt", "source.json",
    }  # fmt: skip
    assert not list(out.rglob(".*"))


def test_the_archives_become_class_folders_names_and_lists(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    assert_complete(out)
    assert (out / "class_names.txt").read_text(encoding="utf-8") == "".join(f"{w} {NAMES[w]}\n" for w in WNIDS)
    lines = (out / "train_list.txt").read_text().splitlines()
    assert lines[0] == "train/n01440764/n01440764_100.JPEG 0" and lines[-1].endswith(" 3") and len(lines) == 22
    assert "22 training and 18 validation images" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "val"])
def test_lists_and_folders_are_the_same_dataset(archives: Path, tmp_path: Path, split: str) -> None:
    """Labels are the positions of the sorted folders, not the devkit's IDs; class names are the devkit's."""
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    folders = open_set(DataConfig(root=str(out)), split, 4)
    image_list = open_set(DataConfig(root=str(out), **{split: f"{split}_list.txt"}), split, 4)
    assert len(folders) == len(image_list) == {"train": 22, "val": NUM_VAL}[split]
    for index in range(len(folders)):
        assert folders.name(index) == image_list.name(index)
        assert folders.read(index)[1].tolist() == image_list.read(index)[1].tolist()
        assert WNIDS[folders.read(index)[1][0]] == Path(folders.name(index)).parent.name
    assert folders.class_names == image_list.class_names == [NAMES[wnid] for wnid in WNIDS]


@pytest.mark.parametrize("parts", [("train",), ("val",)])
def test_one_archive_first_and_the_other_later(archives: Path, tmp_path: Path, parts: tuple[str, ...]) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out, *parts)) == 0
    assert set(json.loads((out / "source.json").read_text())) == {"source", *parts}
    other = "val" if parts == ("train",) else "train"
    assert main(arguments(archives, out, other)) == 0
    assert_complete(out)
    assert set(json.loads((out / "source.json").read_text())) == {"source", "train", "val"}


def test_training_images_need_no_devkit(archives: Path, tmp_path: Path) -> None:
    (archives / "ILSVRC2012_devkit_t12.tar.gz").rename(tmp_path / "kit.tar.gz")
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out, "train")) == 0
    assert (out / "class_names.txt").read_text() == "".join(f"{wnid} {wnid}\n" for wnid in WNIDS)
    assert main([*arguments(archives, out, "val"), "--devkit", str(tmp_path / "kit.tar.gz")]) == 0
    assert_complete(out)
    assert main(arguments(archives, out, "train")) == 0
    assert "tench" in (out / "class_names.txt").read_text(encoding="utf-8")  # existing names are kept


def test_a_second_run_writes_no_image_again(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.JPEG")}
    assert main(arguments(archives, out)) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.JPEG")} == before


def test_files_that_a_power_cut_has_truncated_are_written_again(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    (out / "source.json").rename(out / ".unfinished.json")
    (out / ".source.json.12345.part").touch()
    next((out / "train/n02105855").iterdir()).write_bytes(b"")
    next((out / "val/n02105855").iterdir()).write_bytes(b"")
    next((out / "train/n03000001").iterdir()).unlink()
    assert main(arguments(archives, out)) == 0
    assert_complete(out)


def test_a_wrong_archive_removes_nothing_from_a_complete_dataset(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that the archive lacks stay, a damaged one replaces none, and source.json is only written for a complete
    dataset."""
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    (out / "train/n03000001/notes.txt").write_text("my notes")
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    del before[out / "source.json"]
    intact = (archives / "train.tar").read_bytes()
    (archives / "train.tar").write_bytes(intact[: len(intact) // 2])
    failed(capsys, *arguments(archives, out))
    assert not (out / "source.json").exists()
    write_train(archives / "train.tar", {"n01440764": TRAIN["n01440764"]})
    assert main(arguments(archives, out)) == 0  # the others exist since the first run
    write_train(archives / "train.tar", {"n01440764": {"n01440764_1.JPEG": make_jpeg(1)}})
    assert "(n01440764 has 5 of 4)" in failed(capsys, *arguments(archives, out, "train"))
    assert {path: path.read_bytes() for path in before} == before
    assert set(json.loads((out / "source.json").read_text())) == {"source", "val"}


def test_a_wrong_md5_sum_is_an_error_with_check_md5(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, out = archives / "val.tar", tmp_path / "imagenet"
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    error = failed(capsys, *arguments(archives, out, "val"), "--check-md5")
    assert str(archive) in error and md5 in error and imagenet.MD5["val"] in error
    assert not list(out.rglob("*.JPEG"))
    imagenet.check_md5(archive, md5)


def test_a_second_run_at_the_same_time_is_an_error(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    (out / "source.json").rename(out / ".unfinished.json")
    with (out / ".unfinished.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert "another run is writing it" in failed(capsys, *arguments(archives, out))
    assert main(arguments(archives, out)) == 0
    assert_complete(out)


def test_a_run_killed_at_any_time_can_be_resumed(archives: Path, tmp_path: Path) -> None:
    """By a signal from the process itself, after a random number of files, in the middle of a file."""
    script = """
import os, pathlib, signal, sys
from data_tools import imagenet
num_files, kind, write = int(sys.argv[1]), sys.argv[2], pathlib.Path.write_bytes
def write_bytes(path, content):
    global num_files
    num_files -= 1
    if num_files < 0:
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
        num_files, kind = rng.randrange(1, 12), ("SIGKILL", "SIGTERM")[turn % 2]
        command = [sys.executable, "-c", script, str(num_files), kind, *arguments(archives, out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL, 1, -signal.SIGINT), done.stderr
        if done.returncode:
            assert not (out / "source.json").exists()
            for path in out.glob("train/n*/*.JPEG"):  # a file with its final name is complete
                assert path.read_bytes() == TRAIN[path.parent.name][path.name]
            for path in out.glob("val/*/I*.JPEG"):
                assert path.read_bytes() == VAL[path.name]
    assert main(arguments(archives, out)) == 0
    assert_complete(out)


def failed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(list(command)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_a_truncated_archive_is_named_and_the_run_can_be_resumed(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imagenet"
    intact = (archives / "train.tar").read_bytes()
    for share in (0.4, 0.55, 0.8):
        (archives / "train.tar").write_bytes(intact[: int(share * len(intact))])
        error = failed(capsys, *arguments(archives, out))
        assert str(archives / "train.tar") in error and "download it again" in error
        assert not (out / "source.json").exists()
    assert list((out / "train").glob("n*"))
    (archives / "train.tar").write_bytes(intact)
    assert main(arguments(archives, out)) == 0
    assert_complete(out)


def test_an_image_in_which_the_archive_ends_is_not_written(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imagenet"
    with tarfile.open(archives / "val.tar") as tar:
        member = tar.getmembers()[9]
    with (archives / "val.tar").open("r+b") as file:
        file.truncate(member.offset_data + member.size // 2)
    assert member.name in failed(capsys, *arguments(archives, out, "val"))
    assert {path.name: path.read_bytes() for path in out.rglob("*.JPEG")} == dict(list(VAL.items())[:9])


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="limits the files of another process, which only Linux can"
)
def test_a_full_disk_is_an_error_with_the_file_and_the_run_can_be_resumed(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "imagenet"
    process = subprocess.Popen(
        [sys.executable, "-m", "data_tools", *arguments(archives, out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},  # would be subject to the limit, too
        stderr=subprocess.PIPE,
        text=True,
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (512, 512))  # bytes; simulates a full disk
    error = process.communicate()[1]
    assert process.returncode == 1
    assert f"{out}: can't be written (File too large); " in error and len(error.splitlines()) == 1
    assert not list(out.glob("train/*/*")) and not list(out.glob("train/*/.*"))
    assert main(arguments(archives, out)) == 0
    assert_complete(out)


def test_wrong_numbers_of_images_are_errors_with_the_classes(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = {wnid: dict(files) for wnid, files in TRAIN.items()}
    fewer["n03000001"].popitem()
    del fewer["n03999999"]
    write_train(archives / "train.tar", fewer)
    error = failed(capsys, *arguments(archives, tmp_path / "a"))
    assert "14 images in 3 classes, not 22 in 4 (n03000001 has 5 of 6, n03999999 has 0 of 7)" in error
    assert not (tmp_path / "a/source.json").exists()
    moved = {wnid: dict(files) for wnid, files in TRAIN.items()}
    moved["n03000001"].popitem()
    moved["n01440764"]["n01440764_1.JPEG"] = make_jpeg(1)
    write_train(archives / "train.tar", moved)
    error = failed(capsys, *arguments(archives, tmp_path / "moved"))
    assert "not 22 in 4 (n01440764 has 5 of 4, n03000001 has 5 of 6)" in error
    write_train(archives / "train.tar")
    write_val(archives / "val.tar", dict(list(VAL.items())[:-1]))
    assert "17 images in 4 classes, not 18 in 4" in failed(capsys, *arguments(archives, tmp_path / "b"))
    without_counts = [item for item in arguments(archives, tmp_path / "c") if item not in COUNTS]
    error = failed(capsys, *without_counts)
    assert "4 classes, 22 training and 18 validation images, not 1000, 1281167 and 50000" in error
    assert not (tmp_path / "c").exists()
    only_train = ["imagenet", "--train", str(archives / "train.tar"), "--out", str(tmp_path / "d")]
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "22 images in 4 classes, not 1281167 in 1000" in failed(capsys, *only_train)


def test_an_image_that_is_twice_in_the_archive_counts_once(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(archives / "val.tar", "w") as tar:
        for name, content in [*list(VAL.items())[1:], list(VAL.items())[-1]]:
            add_member(tar, name, content)
    assert "17 images in 4 classes, not 18 in 4" in failed(capsys, *arguments(archives, tmp_path / "imagenet"))


def test_an_added_image_is_counted_as_training_would(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imagenet"
    assert main(arguments(archives, out)) == 0
    (out / "train/n03000001/holiday.jpg").write_bytes(make_jpeg(1))
    assert "n03000001 has 7 of 6" in failed(capsys, *arguments(archives, out))


def test_a_damaged_devkit_is_detected_by_its_checksum(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before SciPy reads it, which can crash on damaged data."""
    rng, kit = random.Random(0), archives / "ILSVRC2012_devkit_t12.tar.gz"
    intact = kit.read_bytes()
    for turn in range(60):
        damaged = bytearray(intact)
        offset = rng.randrange(64, len(intact))  # after gzip's header, whose time and name don't matter
        damaged[offset] ^= rng.randrange(1, 256)
        kit.write_bytes(damaged if turn % 2 else intact[:offset])
        error = failed(capsys, *arguments(archives, tmp_path / "imagenet"))
        assert str(kit) in error and "download it again" in error
    assert not (tmp_path / "imagenet").exists()


def test_a_devkit_without_synsets_is_an_error(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = io.BytesIO()
    savemat(others, {"others": np.zeros(3)})
    for mat in (b"", b"no MATLAB file" * 20, others.getvalue()):
        write_devkit(archives / "ILSVRC2012_devkit_t12.tar.gz", mat)
        assert "can't be read as" in failed(capsys, *arguments(archives, tmp_path / "imagenet"))


def write_malicious_train(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(path, "w") as outer:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO())
        add_member(outer, "n01440764.tar", inner.getvalue())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../../evil.JPEG", tarfile.REGTYPE),
        ("/tmp/evil.JPEG", tarfile.REGTYPE),
        ("n01440764_1.JPEG", tarfile.SYMTYPE),
        ("n02105855_1.JPEG", tarfile.REGTYPE),  # in the folder of another class
    ],
)
def test_nothing_is_written_outside_the_folder(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: bytes
) -> None:
    write_malicious_train(archives / "train.tar", name, kind)
    assert repr(name) in failed(capsys, *arguments(archives, tmp_path / "imagenet", "train"))
    assert not list(tmp_path.rglob("*evil*")) and not list(tmp_path.rglob("*.JPEG"))


def test_a_devkit_cant_name_a_folder_outside(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_devkit(archives / "ILSVRC2012_devkit_t12.tar.gz", make_meta({**IDS, 3: "../../evil"}))
    assert "or other names" in failed(capsys, *arguments(archives, tmp_path / "imagenet", "val"))
    assert not list(tmp_path.rglob("*evil*"))


def test_wrong_arguments_are_errors_before_anything_is_written(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imagenet"
    assert "--train or --val" in failed(capsys, "imagenet", "--out", str(out))
    assert "nowhere.tar" in failed(capsys, "imagenet", "--train", "nowhere.tar", "--out", str(out))
    swapped = ["imagenet", "--train", str(archives / "val.tar"), "--out", str(out), *COUNTS]
    assert "n########.tar" in failed(capsys, *swapped)
    (archives / "text.tar").write_text("not a tar")
    text = ["imagenet", "--train", str(archives / "text.tar"), "--out", str(tmp_path / "b")]
    assert "not a tar archive" in failed(capsys, *text)
    (archives / "packed.tar").write_bytes(gzip.compress((archives / "train.tar").read_bytes()))
    packed = ["imagenet", "--train", str(archives / "packed.tar"), "--out", str(tmp_path / "b")]
    assert "is compressed" in failed(capsys, *packed)
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"junk")
    assert "download it again" in failed(capsys, *arguments(archives, tmp_path / "c"))
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "--devkit" in failed(capsys, *arguments(archives, tmp_path / "c"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    assert "not empty" in failed(capsys, *arguments(archives, tmp_path / "mine", "train"))
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"
    (tmp_path / "mine/thesis.txt").unlink()
    (tmp_path / "mine/source.json").write_text('{"source": "digits"}')  # other tools also write this file
    assert "not from this tool" in failed(capsys, *arguments(archives, tmp_path / "mine", "train"))


def test_too_little_disk_space_is_an_error_before_anything_is_written(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Existing files of one split don't count for the other."""
    out = tmp_path / "imagenet"
    for name in ("train.tar", "val.tar"):
        with (archives / name).open("ab") as file:
            file.truncate(1 << 43)  # 9 TB, as a sparse file
    assert main(arguments(archives, out, "train")) == 1
    assert f"{out}: can't be written" in (error := capsys.readouterr().err) and "8,796,093,022,208 bytes are" in error
    assert not out.exists()
    write_train(archives / "train.tar")
    assert main(arguments(archives, out, "train")) == 0
    with (out / "train/n01440764/n01440764_3.JPEG").open("r+b") as file:
        file.truncate(1 << 43)
    assert main(arguments(archives, out, "val")) == 1 and "bytes are free" in capsys.readouterr().err
    assert not (out / "val").exists()
