"""Datasets from class folders and list files: their content, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.sets import photo

from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import CHECK_FILE, open_set


def test_images_are_in_the_order_of_folders_and_names(make_set) -> None:
    image = photo(8, 8)
    data = make_set({f"train/{name}": image for name in ("b/2.png", "b/10.png", "a/z.jpeg", "B/1.jpg", "c/0.png")})
    images = open_set(data, "train", 4)
    names = [str(Path(images.name(index)).relative_to(data.root)) for index in range(len(images))]
    assert names == ["train/B/1.jpg", "train/a/z.jpeg", "train/b/10.png", "train/b/2.png", "train/c/0.png"]
    assert [images.read(index)[1].tolist() for index in range(5)] == [[0], [1], [2], [2], [3]]
    assert images.class_names == ["B", "a", "b", "c"]
    assert len(images) == 5


def test_class_names_come_from_class_names_txt(make_set) -> None:
    names = "n02 tench, Tinca tinca\n\nn01\tkitten\nn99 without a folder\nunnamed\n"
    data = make_set({f"train/{name}/1.png": photo(8, 8) for name in ("n01", "n02", "n03")})
    (Path(data.root) / "class_names.txt").write_text(names)
    assert open_set(data, "train", 3).class_names == ["kitten", "tench, Tinca tinca", "n03"]


def test_files_that_arent_images_are_ignored(make_set) -> None:
    other_files = {
        "train/a/.DS_Store": b"junk",
        "train/a/notes.txt": b"notes",
        "train/a/archive.tar": b"tar",
        "train/a/._1.png": b"added by macOS to an archive with 1.png",
        "train/list.txt": b"a file beside the class folders",
        "train/.cache/1.png": b"a hidden folder",
        "train/a/folder.png/inner.png": b"in a folder below a class",
    }
    data = make_set({"train/a/1.png": photo(8, 8)}, other_files)
    images = open_set(data, "train", 1)
    assert [Path(images.name(index)).name for index in range(len(images))] == ["1.png"]
    assert images.class_names == ["a"]


def error_message(data: DataConfig, split: str, num_classes: int) -> str:
    with pytest.raises(DataError) as error:
        open_set(data, split, num_classes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_root_or_split_is_named(make_set, tmp_path: Path) -> None:
    message = error_message(DataConfig(root=str(tmp_path / "nowhere")), "train", 1)
    assert str(tmp_path / "nowhere/train") in message
    message = error_message(make_set({"train/a/1.png": photo(8, 8)}), "val", 1)
    assert str(tmp_path / "val") in message
    message = error_message(make_set({"set/1.png": photo(8, 8)}, train="set/nowhere"), "train", 1)
    assert str(tmp_path / "set/nowhere") in message


def test_class_folders_that_no_list_names_lead_to_data_folder(make_set, tmp_path: Path) -> None:
    images = {"cat/1.png": photo(8, 8), "dog/1.png": photo(8, 8), ".thumbnails/1.png": photo(8, 8), "notes/a.txt": b""}
    for train in ("train", "train_list.txt"):
        message = error_message(make_set(images, train=train), "train", 2)
        assert f"{tmp_path} has 2 folders with images; './run.sh data folder --root {tmp_path}' splits" in message
        assert "set -o data.train=train_list.txt -o data.val=val_list.txt" in message
    splits = {f"splits/{split}/cat/1.png": photo(8, 8) for split in ("train", "val")}
    data = make_set(splits, train="splits/train_list.txt")
    message = error_message(data, "train", 1)
    assert f"{tmp_path}/splits has the folders train and val; set -o data.train=train -o data.val=val" in message
    lists = {"train_list.txt": b"cat/1.png 0\n", "val_list.txt": b"dog/1.png 1\n"}
    message = error_message(make_set(lists), "train", 2)
    assert "has the lists that 'data folder' writes; set -o data.train=train_list.txt" in message
    assert "folders with images" not in error_message(make_set({"val/cat/1.png": photo(8, 8)}), "train", 2)


def test_a_split_without_class_folders_is_named(make_set, tmp_path: Path) -> None:
    message = error_message(make_set({"train/1.png": photo(8, 8)}), "train", 1)
    assert str(tmp_path / "train") in message
    assert "class folders" in message


def test_an_empty_class_folder_is_named(make_set, tmp_path: Path) -> None:
    data = make_set({"train/a/1.png": photo(8, 8), "train/b/notes.txt": b"no image"})
    assert str(tmp_path / "train/b") in error_message(data, "train", 2)


def test_a_wrong_number_of_classes_is_reported_with_both_numbers_and_the_key(make_set) -> None:
    data = make_set({"train/a/1.png": photo(8, 8), "train/b/1.png": photo(8, 8)})
    message = error_message(data, "train", 10)
    assert "10" in message
    assert "model.num_classes=2" in message


def test_a_class_that_only_one_split_has_is_named(make_set) -> None:
    image = photo(8, 8)
    data = make_set({f"{name}/1.png": image for name in ("train/cat", "train/dog", "val/cat", "val/cow")})
    assert len(open_set(data, "train", 2)) == 2
    message = error_message(data, "val", 2)
    assert "'cow'" in message or "'dog'" in message


def contents(images: ImageDataset) -> list[tuple[str, bytes, list[int]]]:
    """Return the name, the bytes and the labels of each image."""
    return [(images.name(n), images.read(n)[0].tobytes(), images.read(n)[1].tolist()) for n in range(len(images))]


def two_classes() -> dict[str, bytes]:
    return {f"train/{name}": name.encode() for name in ("a/1.png", "a/2.png", "b/1.png")}


def test_a_list_file_is_the_same_dataset_as_its_class_folders(make_set, tmp_path: Path) -> None:
    lines = b"train/a/1.png 0\ntrain/a/2.png 0\ntrain/b/1.png 1\n"
    data = make_set(two_classes(), {"list.txt": lines})
    folders = open_set(data, "train", 2)
    image_list = open_set(data.model_copy(update={"train": "list.txt"}), "train", 2)
    assert contents(folders) == contents(image_list)
    assert contents(folders)[2] == (str(tmp_path / "train/b/1.png"), b"b/1.png", [1])


def test_a_list_file_may_have_absolute_paths_and_be_outside_the_root(make_set, tmp_path: Path) -> None:
    lines = f"{tmp_path}/train/b/1.png 0\n".encode()
    data = make_set(two_classes(), {"elsewhere/list.txt": lines})
    changed = {"root": str(tmp_path / "nowhere"), "train": str(tmp_path / "elsewhere/list.txt")}
    assert contents(open_set(data.model_copy(update=changed), "train", 1))[0][1] == b"b/1.png"


def test_a_list_file_uses_class_names_txt_if_it_has_one_name_per_class(make_set) -> None:
    files = {"list.txt": b"train/a/1.png 0\ntrain/b/1.png 1\n", "class_names.txt": b"n1 cat\nn2 dog, big\n"}
    data = make_set(two_classes(), files, train="list.txt")
    assert open_set(data, "train", 2).class_names == ["cat", "dog, big"]
    assert open_set(data, "train", 3).class_names == ["0", "1", "2"]


def test_several_labels_need_multi_label(make_set) -> None:
    data = make_set(two_classes(), {"list.txt": b"train/a/1.png 0\ntrain/a/2.png 0,1\n"}, train="list.txt")
    assert "image 2" in error_message(data, "train", 2)
    assert "data.multi_label=true" in error_message(data, "train", 2)
    images = open_set(data.model_copy(update={"multi_label": True}), "train", 2)
    assert [labels for _, _, labels in contents(images)] == [[0], [0, 1]]


def test_a_label_beyond_the_classes_is_reported_with_the_key(make_set) -> None:
    data = make_set(two_classes(), {"list.txt": b"train/a/1.png 0\ntrain/a/2.png 7\n"}, train="list.txt")
    assert "model.num_classes=8" in error_message(data, "train", 2)


def test_the_digest_depends_on_names_labels_and_order_only(make_set, tmp_path: Path) -> None:
    lines = [b"train/a/1.png 0\n", b"train/a/2.png 0\n", b"train/b/1.png 1\n"]
    orders = {"x": lines, "y": lines[::-1], "z": lines[:2], "w": [*lines[:2], b"train/b/1.png 0\n"]}
    data = make_set(two_classes(), {f"{name}.txt": b"".join(order) for name, order in orders.items()})

    def digest(train: str) -> str:
        return open_set(data.model_copy(update={"train": train}), "train", 2).digest()

    assert len({digest(f"{name}.txt") for name in orders}) == 4
    before = digest("train")
    (tmp_path / "train").rename(tmp_path / "moved")
    (tmp_path / "root/train").parent.mkdir()
    (tmp_path / "moved").rename(tmp_path / "root/train")
    assert open_set(data.model_copy(update={"root": str(tmp_path / "root")}), "train", 2).digest() == before


def check_report(*problems: tuple[str, bool]) -> dict[str, bytes]:
    """Return the report of a check with these paths, and whether they stop training."""
    entries = [{"path": path, "stops_training": stops_training} for path, stops_training in problems]
    return {CHECK_FILE: json.dumps({"problems": entries}).encode()}


def test_images_that_a_check_reports_as_bad_can_be_skipped(make_set) -> None:
    data = make_set(two_classes(), check_report(("train/a/2.png", True), ("train/b/1.png", False)), on_bad_image="skip")
    images = open_set(data, "train", 2)
    assert [Path(images.name(n)).name for n in range(len(images))] == ["1.png", "1.png"]
    assert images.digest() != open_set(data.model_copy(update={"on_bad_image": "stop"}), "train", 2).digest()


def test_skipping_bad_images_needs_a_check(make_set, tmp_path: Path) -> None:
    data = make_set(two_classes(), on_bad_image="skip")
    assert f"data check {tmp_path}" in error_message(data, "train", 2)
    (tmp_path / CHECK_FILE).write_text("[]")
    assert f"data check {tmp_path}" in error_message(data, "train", 2)
    (tmp_path / CHECK_FILE).write_bytes(
        check_report(*((f"train/{name}", True) for name in ("a/1.png", "a/2.png", "b/1.png")))[CHECK_FILE]
    )
    assert "lists all of its images as bad" in error_message(data, "train", 2)
