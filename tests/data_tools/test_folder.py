"""`data folder`: list files for your own images, and a split that doesn't change when images are added."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.sets import photo
from helpers.small import ROOT

from data_tools.__main__ import main
from data_tools.stratify import UserImage, divide
from vit_static.config.data_schema import DataConfig
from vit_static.data.open_set import open_set

NUM_IMAGES = {"cats": 40, "big dogs": 60, "red_deer": 3}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    seed = 0
    for name, count in NUM_IMAGES.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            seed += 1
            photo(12, 12, seed=seed).save(tmp_path / "images" / name / f"image {number}.jpg")
    return tmp_path / "images"


def run(root: Path, *arguments: str) -> int:
    return main(["folder", "--root", str(root), *arguments])


def read_lists(folder: Path) -> dict[str, list[str]]:
    return {split: (folder / f"{split}_list.txt").read_text().splitlines() for split in ("train", "val")}


def test_every_image_is_in_one_split_and_every_class_in_both(root: Path) -> None:
    assert run(root, "--val-share", "0.2") == 0
    lists = read_lists(root)
    paths = sorted(line.rsplit(" ", 1)[0] for lines in lists.values() for line in lines)
    assert paths == sorted(str(path.relative_to(root)) for path in root.glob("*/*.jpg"))
    for lines in lists.values():
        assert {line.rsplit(" ", 1)[1] for line in lines} == {"0", "1", "2"}
        for line in lines:
            path, label = line.rsplit(" ", 1)
            assert sorted(NUM_IMAGES)[int(label)] == Path(path).parent.name
    assert 8 <= len(lists["val"]) <= 35  # about 20 of 103


def test_a_class_of_one_image_and_what_is_left_out_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `data check` too, which finds the lists."""
    (root / "ape").mkdir()
    photo(12, 12, seed=1000).save(root / "ape/only.jpg")
    shutil.copy(root / "ape/only.jpg", root / "ape/copy.jpg")
    for name in ("Thumbs.db", "a.pdf", "b.pdf"):
        (root / "cats" / name).write_bytes(b"x")
    assert run(root) == 0
    assert "1 classes have only one image (copies count once), so none for validation, such as ape" in (
        capsys.readouterr().err
    )
    assert main(["check", str(root)]) == 0
    assert "left out of the lists: 2 .pdf (not supported: save as PNG or JPEG), 1 .db" in capsys.readouterr().out


def test_the_printed_options_train_on_the_lists(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = root.rename(root.with_name("my images"))
    assert run(root) == 0
    output = capsys.readouterr().out
    words = shlex.split(output.splitlines()[-1])
    values = dict(word.split("=") for word in words if word.startswith(("data.", "model.")))
    data = DataConfig(root=values["data.root"], train=values["data.train"], val=values["data.val"])
    images = open_set(data, "train", int(values["model.num_classes"]))
    assert images.class_names == ["big dogs", "cats", "red deer"]
    assert all(len(images.read(index)[0]) > 100 for index in range(len(images)))


def test_lists_in_another_folder_have_absolute_paths(root: Path, tmp_path: Path) -> None:
    assert run(root, "--out", str(tmp_path / "lists")) == 0
    assert sorted(path.name for path in root.iterdir()) == sorted(NUM_IMAGES)  # nothing was written there
    images = open_set(DataConfig(root=str(tmp_path / "lists"), val="val_list.txt"), "val", 3)
    assert images.read(0)[0].tobytes().startswith(b"\xff\xd8")


def test_images_stay_in_their_split_when_others_are_added_or_they_are_renamed(root: Path) -> None:
    assert run(root, "--val-share", "0.3") == 0
    before = {line.rsplit(" ", 1)[0] for line in read_lists(root)["val"]}
    for number in range(50):
        photo(12, 12, seed=1000 + number).save(root / "cats" / f"new {number}.jpg")
    (root / "big dogs/image 3.jpg").rename(root / "big dogs/renamed.jpg")
    (root / "a new class").mkdir()
    photo(12, 12, seed=2000).save(root / "a new class/1.jpg")
    photo(12, 12, seed=2001).save(root / "a new class/2.jpg")
    assert run(root, "--val-share", "0.3") == 0
    after = {line.rsplit(" ", 1)[0] for line in read_lists(root)["val"]}
    old = {path.replace("renamed", "image 3") for path in after if "new" not in path}
    assert old == before


def test_no_image_changes_its_split_as_classes_grow() -> None:
    rng = random.Random(0)
    for share in (0.1, 0.5, 0.9):
        for _ in range(200):
            images = [UserImage(f"{n}.jpg", rng.randrange(3), f"{rng.getrandbits(64):016x}") for n in range(20)]
            assigned: dict[str, str] = {}
            before: dict[str, list[UserImage]] = {"train": [], "val": []}
            for count in range(1, len(images) + 1):
                now = divide(images[:count], share, assigned)
                assert set(before["train"]) <= set(now["train"])
                for label in {image.label for image in images[:count]}:
                    num_train, num_val = (sum(i.label == label for i in now[split]) for split in ("train", "val"))
                    assert num_train >= 1 and num_val >= (num_train + num_val > 1)
                assert set(before["val"]) <= set(now["val"])
                before = now


def test_an_image_that_was_moved_to_the_other_split_stays_there(tmp_path: Path) -> None:
    """With such a large share, chance puts all images of a small class into validation."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    before: set[str] = set()
    for number in range(12):
        for name in ("a", "b"):
            photo(12, 12, seed=100 * number + ord(name)).save(tmp_path / "images" / name / f"{number}.jpg")
        exit_code = run(tmp_path / "images", "--val-share", "0.9")
        assert exit_code == (0 if number else 2)  # with one image per class, none is for validation
        if number:
            now = set(read_lists(tmp_path / "images")["train"])
            assert before <= now
            before = now
    assert json.loads((tmp_path / "images/split.json").read_text())["settled"]


def test_an_image_in_two_classes_is_in_one_split_and_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):  # red_deer has so few that one is moved to validation
        shutil.copy(root / f"red_deer/image {number}.jpg", root / f"cats/deer {number}.jpg")
    assert run(root, "--val-share", "0.01") == 0
    splits = {path.rsplit(" ", 1)[0]: split for split, lines in read_lists(root).items() for path in lines}
    assert all(splits[f"red_deer/image {n}.jpg"] == splits[f"cats/deer {n}.jpg"] for n in range(3))
    assert "6 images are in several classes, such as cats/deer" in capsys.readouterr().err


def test_an_added_class_gets_a_name_and_the_others_keep_theirs(root: Path) -> None:
    assert run(root) == 0
    names = root / "class_names.txt"
    assert names.read_text() == "big dogs\tbig dogs\ncats cats\nred_deer red deer\n"
    names.write_text(names.read_text().replace("cats cats", "cats Felis catus"))
    shutil.copytree(root / "cats", root / "a_new one")
    assert run(root) == 0
    assert names.read_text() == "a_new one\ta new one\nbig dogs\tbig dogs\ncats Felis catus\nred_deer red deer\n"
    names.write_text("apple fruit\n")
    assert run(root) == 2
    assert names.read_text() == "apple fruit\n"


def test_files_and_folders_that_are_left_out_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(8, 8).save(root / "stray.jpg")
    (root / "cats/kittens").mkdir()
    assert run(root) == 0
    error = capsys.readouterr().err
    assert f"left out 1 images outside the class folders, such as {root}/stray.jpg" in error
    assert f"left out 1 folders in class folders, such as {root}/cats/kittens" in error


def test_names_may_have_any_characters_but_line_breaks(root: Path) -> None:
    source = root / "cats/image 0.jpg"
    for name in ("Screenshot 1.02\u202fPM.jpg", os.fsdecode(b"caf\xe9.jpg"), "  two  blanks, 7\t.jpg"):
        shutil.copy(source, root / "cats" / name)
    assert run(root) == 0
    data = DataConfig(root=str(root), train="train_list.txt", val="val_list.txt")
    sets = [open_set(data, split, 3) for split in ("train", "val")]
    contents = [images.read(index)[0].tobytes() for images in sets for index in range(len(images))]
    assert contents.count(source.read_bytes()) == 4


def test_the_split_depends_on_the_seed(root: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(root, "--seed", seed, "--out", str(tmp_path / name)) == 0
    assert read_lists(tmp_path / "a") == read_lists(tmp_path / "b") != read_lists(tmp_path / "c")


def test_copies_are_in_the_same_split_and_are_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(40):
        shutil.copy(root / f"cats/image {number}.jpg", root / f"cats/copy {number}.jpg")
    assert run(root, "--val-share", "0.5") == 0
    assert "40 of them copies" in capsys.readouterr().out
    val = {Path(line.rsplit(" ", 1)[0]).name for line in read_lists(root)["val"] if line.startswith("cats")}
    assert all((f"copy {n}.jpg" in val) == (f"image {n}.jpg" in val) for n in range(40))


def test_an_existing_split_is_kept_and_shared_images_are_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = tmp_path / "split"
    for name, count in NUM_IMAGES.items():
        shutil.copytree(root / name, split / "train" / name)
        (split / "val" / name).mkdir(parents=True)
        photo(12, 12, seed=3000 + count).save(split / "val" / name / "v.jpg")
    shutil.copy(split / "train/cats/image 1.jpg", split / "val/cats/leak.jpg")
    assert run(split) == 0
    lists = read_lists(split)
    assert all(line.startswith(f"{name}/") for name, lines in lists.items() for line in lines)
    assert (len(lists["train"]), len(lists["val"])) == (103, 4)
    assert "1 validation images are also training images, such as val/cats/leak.jpg" in capsys.readouterr().err


def failed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(["folder", *command]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_wrong_arguments_and_folders_are_errors(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in failed(capsys, "--root", str(tmp_path / "nowhere"))
    assert "--val-share" in failed(capsys, "--root", str(root), "--val-share", "1")
    (tmp_path / "flat").mkdir()
    photo(8, 8).save(tmp_path / "flat/1.jpg")
    assert "class folders" in failed(capsys, "--root", str(tmp_path / "flat"))
    (tmp_path / "flat/only").mkdir()
    assert "at least two" in failed(capsys, "--root", str(tmp_path / "flat"))
    (root / "empty").mkdir()
    assert f"{root}/empty: this class folder has no image" in failed(capsys, "--root", str(root))
    (root / "empty").rmdir()
    (root / "cats/empty.jpg").touch()
    assert f"{root}/cats/empty.jpg: is empty; repair" in failed(capsys, "--root", str(root))
    (root / "cats/other.png").touch()
    error = failed(capsys, "--root", str(root))
    assert f"2 images can't be read ({root}/cats/empty.jpg: is empty; {root}/cats/other.png: is empty)" in error
    (root / "cats/empty.jpg").unlink()
    assert "is inside --root" in failed(capsys, "--root", str(root), "--out", str(root / "lists"))
    (tmp_path / "half").mkdir()
    shutil.copytree(root, tmp_path / "half/train")
    assert f"--root {tmp_path}/half/train" in failed(capsys, "--root", str(tmp_path / "half"))
    (root / "split.json").write_text("[]")
    assert "split.json: is damaged" in failed(capsys, "--root", str(root))
    (root / "split.json").unlink()
    (root / "train_list.txt").write_text("mine\n")
    assert "this tool didn't write it" in failed(capsys, "--root", str(root))
    assert (root / "train_list.txt").read_text() == "mine\n"
    (root / "train_list.txt").unlink()
    photo(8, 8).save(root / "cats/two\nlines.jpg")
    assert "rename the file" in failed(capsys, "--root", str(root))


def test_the_only_image_of_a_class_is_for_training(root: Path) -> None:
    (root / "rare").mkdir()
    photo(12, 12, seed=77).save(root / "rare/only.jpg")
    assert run(root, "--val-share", "0.9") == 0
    assert any(line.startswith("rare/") for line in read_lists(root)["train"])
    assert {line.rsplit(" ", 1)[1] for line in read_lists(root)["train"]} == {"0", "1", "2", "3"}


def test_a_tool_whose_output_cannot_be_printed_does_its_work(tmp_path: Path) -> None:
    """A full disk behind standard output, or a reader that has left: the first run's data is made all the same."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            photo(30, 40, seed=10 * label + number).save(tmp_path / "photos" / name / f"{number}.jpeg")
    command = f"{sys.executable} -m data_tools folder --root photos > /dev/full"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "photos/train_list.txt").is_file()
