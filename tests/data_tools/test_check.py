"""`data check`: every kind of problem in class folders, lists and shards, and the options for bad images."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sets import photo
from helpers.small import ROOT
from helpers.write_faults import failing
from PIL import Image

from data_tools import check as tool
from data_tools.__main__ import main
from vit_static.common.errors import DataError
from vit_static.common.io import lock
from vit_static.common.text import path_of
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.loader import undecodable
from vit_static.data.open_set import open_set


def encode(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


INTACT = encode(photo(40, 50, seed=1))
STOPPING = {
    "empty.jpeg": (b"", "empty"),
    "half.jpeg": (INTACT[: len(INTACT) // 2], "truncated"),
    "half.png": (encode(photo(40, 50), "PNG")[:2000], "truncated"),
    "text.jpeg": (b"This is not an image.\n" * 20, "unreadable"),
    "page.jpg": (b"<html><body>404 Not Found</body></html>", "unreadable"),
}
UNUSUAL = {
    "cmyk.jpeg": (encode(photo(40, 50, seed=2).convert("CMYK")), "cmyk"),
    "png_named.jpeg": (encode(photo(40, 50, seed=3), "PNG"), "other_format"),
    "deep.png": (encode(Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30), "PNG"), "16_bit"),
}


def write_good_images(root: Path) -> None:
    """Write two classes with five training images and two validation images each."""
    for split, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                seed = 1000 * (split == "val") + 100 * label + number
                photo(30, 40, seed=seed).save(root / split / name / f"{number}.jpeg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Good images, and among the dogs every kind of bad or unusual file."""
    write_good_images(tmp_path / "set")
    for name, (content, _) in (STOPPING | UNUSUAL).items():
        (tmp_path / "set/train/dog" / name).write_bytes(content)
    return tmp_path / "set"


def run_check(root: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", str(root), *arguments])
    return code, json.loads((root / "data_check.json").read_text(encoding="utf-8"))


def kinds(report: dict[str, Any]) -> dict[str, str]:
    """Return the kinds of problems by the name of the file."""
    return {Path(problem["path"]).name: problem["kind"] for problem in report["problems"]}


def stopping(report: dict[str, Any]) -> set[str]:
    return {problem["path"] for problem in report["problems"] if problem["stops_training"]}


def test_a_good_dataset_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_good_images(tmp_path)
    code, report = run_check(tmp_path)
    assert (code, report["problems"]) == (0, [])
    assert report["num_images"] == {"train": 10, "val": 4}
    assert "nothing would stop training" in capsys.readouterr().out
    assert not (tmp_path / ".data_check.journal").exists()


def test_every_kind_is_found_and_only_some_stop_training(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_check(root)
    assert code == 1
    assert kinds(report) == {name: kind for name, (_, kind) in (STOPPING | UNUSUAL).items()}
    assert {Path(path).name for path in stopping(report)} == set(STOPPING)
    output = capsys.readouterr().out
    assert "train/dog/half.jpeg" in output and "5 of these would stop training" in output


def test_the_images_that_stop_training_are_those_that_its_decoder_refuses(root: Path) -> None:
    """For every image of the dataset, with the pipeline that a run uses."""
    _, report = run_check(root)
    images = open_set(DataConfig(root=str(root)), "train", 2)
    refused = {images.relative_name(n) for n, _ in undecodable(images, range(len(images)))}
    assert refused == stopping(report)


def test_a_huge_image_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_good_images(tmp_path)
    monkeypatch.setattr(tool, "HUGE_PIXELS", 1300)
    photo(36, 40, seed=5).save(tmp_path / "train/cat/panorama.jpeg")
    assert kinds(run_check(tmp_path)[1]) == {"panorama.jpeg": "huge"}


def test_a_validation_image_that_is_also_a_training_image_is_reported_with_its_twin(tmp_path: Path) -> None:
    write_good_images(tmp_path)
    content = (tmp_path / "train/cat/3.jpeg").read_bytes()
    (tmp_path / "val/dog/other name.jpeg").write_bytes(content)
    (tmp_path / "train/dog/copy.jpeg").write_bytes((tmp_path / "train/dog/0.jpeg").read_bytes())
    code, report = run_check(tmp_path)
    assert code == 0
    (problem,) = report["problems"]
    assert (problem["path"], problem["kind"]) == ("val/dog/other name.jpeg", "duplicate")
    assert "train/cat/3.jpeg" in problem["detail"]
    assert report["num_copies_within"] == {"train": 1, "val": 0}


def test_class_folders_that_differ_and_empty_ones_stop_training(tmp_path: Path) -> None:
    write_good_images(tmp_path)
    (tmp_path / "val/cow").mkdir()
    photo(30, 30, seed=9).save(tmp_path / "val/cow/1.jpeg")
    (tmp_path / "train/emu").mkdir()
    code, report = run_check(tmp_path)
    assert code == 1
    assert sorted((problem["path"], problem["kind"]) for problem in report["problems"]) == [
        ("train/emu", "class_folders"), ("train/emu", "empty_class"), ("val/cow", "class_folders"),
    ]  # fmt: skip
    with pytest.raises(DataError):
        open_set(DataConfig(root=str(tmp_path)), "val", 3)


def test_missing_files_and_labels_beyond_the_classes_of_lists_are_reported(tmp_path: Path) -> None:
    write_good_images(tmp_path)
    (tmp_path / "t.txt").write_text("train/cat/0.jpeg 0\ntrain/cat/gone.jpeg 0\ntrain/dog/1.jpeg 0,1\n")
    (tmp_path / "v.txt").write_text("val/cat/0.jpeg 0\nval/dog/1.jpeg 2\n")
    code, report = run_check(tmp_path, "--train", "t.txt", "--val", "v.txt")
    assert code == 1
    assert kinds(report) == {"gone.jpeg": "missing", "1.jpeg": "label", "1": "unused_class"}
    assert stopping(report) == {"train/cat/gone.jpeg", "val/dog/1.jpeg"}


@pytest.fixture
def shards(tmp_path: Path, root: Path) -> Path:
    """The dataset as shards, without the empty file, which can't be packed."""
    (root / "train/dog/empty.jpeg").unlink()
    assert main(["shards", "--root", str(root), "--out", str(tmp_path / "shards"), "--shard-mb", "0.03"]) == 0
    return tmp_path / "shards"


def test_shards_have_the_same_problems(shards: Path, root: Path) -> None:
    code, report = run_check(shards)
    assert code == 1
    sources = dict(line.split(" ", 1) for line in (shards / "train/contents.txt").read_text().splitlines())
    actual = {Path(sources[entry["path"].removeprefix("train/")]).name: entry["kind"] for entry in report["problems"]}
    expected = {name: kind for name, (_, kind) in (STOPPING | UNUSUAL).items() if name != "empty.jpeg"}
    assert actual == expected


@pytest.mark.parametrize("source", ["folders", "list", "shards"])
def test_bad_images_can_be_skipped_or_left_out_of_lists(root: Path, shards: Path, tmp_path: Path, source: str) -> None:
    dataset = shards if source == "shards" else root
    names: dict[str, str] = {}
    if source == "list":
        paths = sorted(str(path.relative_to(root)) for path in root.glob("train/*/*"))
        (root / "t.txt").write_text("".join(f"{path} {int('dog' in path)}\n" for path in paths))
        names = {"train": "t.txt"}
    arguments = [item for name, value in names.items() for item in (f"--{name}", value)]
    code, report = run_check(dataset, *arguments)
    assert code == 1
    data = DataConfig(root=str(dataset), **names)
    all_images = open_set(data, "train", 2)
    good_images = open_set(data.model_copy(update={"on_bad_image": "skip"}), "train", 2)
    assert len(good_images) == len(all_images) - len(stopping(report)) == len(all_images) - 4
    assert not list(undecodable(good_images, range(len(good_images))))
    if source == "shards":
        return
    before = sorted(root.rglob("*.jpeg"))
    code, _ = run_check(dataset, *arguments, "--fix", str(tmp_path / "fixed"))
    assert code == 1  # because of the images left out
    fixed = open_set(DataConfig(root=str(tmp_path / "fixed"), train="train_list.txt"), "train", 2)
    assert contents(fixed) == contents(good_images)
    assert sorted(root.rglob("*.jpeg")) == before  # nothing is deleted


def contents(images: ImageDataset) -> list[tuple[bytes, list[int]]]:
    return [(content.tobytes(), labels.tolist()) for content, labels in map(images.read, range(len(images)))]


def test_shards_cant_be_listed_without_their_bad_images(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(shards), "--fix", str(tmp_path / "fixed")]) == 2
    assert "data.on_bad_image=skip" in capsys.readouterr().err


def test_a_killed_check_resumes_and_reads_changed_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_good_images(tmp_path)
    for number in range(5, 60):
        photo(20, 20, seed=5000 + number).save(tmp_path / f"train/cat/{number}.jpeg")
    script = """
import os, signal, sys
from data_tools import check as tool
tool._JOURNAL_BATCH_SIZE = 8
num_batches, check_batch = int(sys.argv[1]), tool.check_batch
def check_or_die(*arguments):
    global num_batches
    num_batches -= 1
    if num_batches < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return check_batch(*arguments)
tool.check_batch = check_or_die
tool.main(sys.argv[2:])
"""
    for num_batches in (2, 3):
        done = subprocess.run([sys.executable, "-c", script, str(num_batches), str(tmp_path)], cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "data_check.json").exists()
    monkeypatch.setattr(tool, "_JOURNAL_BATCH_SIZE", 8)
    (tmp_path / "train/cat/0.jpeg").write_bytes(b"damaged since")
    first_indices: list[int] = []
    check_batch = tool.check_batch

    def check_and_record(images: ImageDataset, split: str, indices: range, *arguments: Any) -> Any:
        first_indices.append(indices[0])
        return check_batch(images, split, indices, *arguments)

    monkeypatch.setattr(tool, "check_batch", check_and_record)
    code, report = run_check(tmp_path)
    assert code == 1 and kinds(report) == {"0.jpeg": "unreadable"}
    assert first_indices[:2] == [0, 40]  # of the first five batches, only the one with the changed file
    assert not (tmp_path / ".data_check.journal").exists()


def test_a_repeated_check_writes_the_same_report(root: Path, tmp_path: Path) -> None:
    run_check(root)
    first = (root / "data_check.json").read_bytes()
    assert main(["check", str(root), "--json", str(tmp_path / "again.json")]) == 1
    assert (tmp_path / "again.json").read_bytes() == first


def test_wrong_arguments_are_errors(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(root), "--train", "list.txt"], "--train"),
        ([str(root), "--fix", str(root)], "is not empty"),
        ([], "DIR"),
    ):
        assert main(["check", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    write_good_images(tmp_path)
    (tmp_path / "train/cat/0.jpeg").chmod(0)
    assert kinds(run_check(tmp_path)[1]) == {"0.jpeg": "unreadable"}


def test_a_second_check_at_the_same_time_is_an_error(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = root / ".data_check.journal"
    journal.touch()
    with lock(journal, "not here"):
        assert main(["check", str(root)]) == 2
        assert "another check" in capsys.readouterr().err
        assert main(["check", str(root), "--json", str(tmp_path / "mine/report.json")]) == 1
    assert list((tmp_path / "mine").iterdir()) == [tmp_path / "mine/report.json"]
    assert not (root / "data_check.json").exists()


def test_names_that_arent_utf8_are_checked_and_skipped(tmp_path: Path) -> None:
    write_good_images(tmp_path)
    name = os.fsdecode(b"\xe9t\xe9.jpeg")  # in Latin-1
    (tmp_path / "train/cat" / name).write_bytes(b"nothing")
    command = [sys.executable, "-m", "data_tools", "check", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONUTF8": "1"}, capture_output=True, check=False)
    assert done.returncode == 1, done.stderr
    assert b"\\xe9t\\xe9.jpeg" in done.stdout
    report = json.loads((tmp_path / "data_check.json").read_text(encoding="utf-8"))
    (problem,) = report["problems"]
    json.dumps(report, ensure_ascii=False).encode()  # raises for what other parsers refuse
    assert problem["path"] == "train/cat/\\xe9t\\xe9.jpeg" and path_of(problem) == f"train/cat/{name}"
    data = DataConfig(root=str(tmp_path), on_bad_image="skip")
    num_files = sum(1 for _ in (tmp_path / "train").glob("*/*"))
    assert len(open_set(data, "train", 2)) == num_files - 1
    for newer in (2, 10**30):
        (tmp_path / "data_check.json").write_text(json.dumps(report | {"format": newer}))
        with pytest.raises(DataError, match=r"written by a newer version \(format \d+\); this one reads up to 1; upd"):
            open_set(data, "train", 2)


def test_a_disk_that_refuses_the_lists_is_found_before_an_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_good_images(tmp_path / "set")
    monkeypatch.setattr(tool, "check_split", None)  # would be called to read the images
    with failing("fsync", errno.EROFS, monkeypatch):
        assert main(["check", str(tmp_path / "set"), "--fix", str(tmp_path / "fixed")]) == 2
    assert "Read-only file system" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and not list((tmp_path / "set").glob("*.j*"))
    (tmp_path / "set/.c.journal").touch()
    with pytest.raises(TypeError):  # a failure before there are results leaves no journal
        main(["check", str(tmp_path / "set"), "--json", str(tmp_path / "set/c.json")])
    assert not list((tmp_path / "set").glob(".*"))
