"""The sets of images: what class folders, lists and shards hold, and their mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.sets import photo

from vit_static.common.errors import DataError
from vit_static.config.schema import DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import CHECK_FILE, open_set


def test_the_list_is_in_the_order_of_folders_and_names(make_set) -> None:
    picture = photo(8, 8)
    data = make_set({f"train/{name}": picture for name in ("b/2.png", "b/10.png", "a/z.jpeg", "B/1.jpg", "c/0.png")})
    images = open_set(data, "train", 4)
    names = [str(Path(images.name(number)).relative_to(data.root)) for number in range(len(images))]
    assert names == ["train/B/1.jpg", "train/a/z.jpeg", "train/b/10.png", "train/b/2.png", "train/c/0.png"]
    assert [images.read(number)[1].tolist() for number in range(5)] == [[0], [1], [2], [2], [3]]
    assert images.class_names == ["B", "a", "b", "c"]
    assert len(images) == 5


def test_class_names_come_from_the_sets_own_file(make_set) -> None:
    names = "n02 tench, Tinca tinca\n\nn01\tkitten\nn99 of no folder\nlonely\n"
    data = make_set({f"train/{name}/1.png": photo(8, 8) for name in ("n01", "n02", "n03")})
    (Path(data.root) / "class_names.txt").write_text(names)
    assert open_set(data, "train", 3).class_names == ["kitten", "tench, Tinca tinca", "n03"]


def test_files_that_are_no_images_are_left_out(make_set) -> None:
    junk = {
        "train/a/.DS_Store": b"junk",
        "train/a/notes.txt": b"notes",
        "train/a/archive.tar": b"tar",
        "train/a/._1.png": b"what macOS puts beside 1.png in an archive",
        "train/list.txt": b"a file beside the class folders",
        "train/.cache/1.png": b"a hidden folder",
        "train/a/folder.png/inner.png": b"in a folder below a class",
    }
    data = make_set({"train/a/1.png": photo(8, 8)}, junk)
    images = open_set(data, "train", 1)
    assert [Path(images.name(number)).name for number in range(len(images))] == ["1.png"]
    assert images.class_names == ["a"]


def listing_mistake(data: DataConfig, split: str, num_classes: int) -> str:
    with pytest.raises(DataError) as error:
        open_set(data, split, num_classes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_root_or_split_is_named(make_set, tmp_path: Path) -> None:
    message = listing_mistake(DataConfig(root=str(tmp_path / "nowhere")), "train", 1)
    assert str(tmp_path / "nowhere/train") in message
    message = listing_mistake(make_set({"train/a/1.png": photo(8, 8)}), "val", 1)
    assert str(tmp_path / "val") in message
    message = listing_mistake(make_set({"set/1.png": photo(8, 8)}, train="set/nowhere"), "train", 1)
    assert str(tmp_path / "set/nowhere") in message


def test_a_split_without_class_folders_is_named(make_set, tmp_path: Path) -> None:
    message = listing_mistake(make_set({"train/1.png": photo(8, 8)}), "train", 1)
    assert str(tmp_path / "train") in message
    assert "class folders" in message


def test_an_empty_class_folder_is_named(make_set, tmp_path: Path) -> None:
    data = make_set({"train/a/1.png": photo(8, 8), "train/b/notes.txt": b"no image"})
    assert str(tmp_path / "train/b") in listing_mistake(data, "train", 2)


def test_another_number_of_classes_is_told_with_both_and_the_key(make_set) -> None:
    data = make_set({"train/a/1.png": photo(8, 8), "train/b/1.png": photo(8, 8)})
    message = listing_mistake(data, "train", 10)
    assert "10" in message
    assert "model.num_classes=2" in message


def test_a_class_of_one_split_alone_is_named(make_set) -> None:
    picture = photo(8, 8)
    data = make_set({f"{name}/1.png": picture for name in ("train/cat", "train/dog", "val/cat", "val/cow")})
    assert len(open_set(data, "train", 2)) == 2
    message = listing_mistake(data, "val", 2)
    assert "'cow'" in message or "'dog'" in message


def contents(images: ImageDataset) -> list[tuple[str, bytes, list[int]]]:
    """Of each image its name, its bytes, its labels."""
    return [(images.name(n), images.read(n)[0].tobytes(), images.read(n)[1].tolist()) for n in range(len(images))]


def two_classes() -> dict[str, bytes]:
    return {f"train/{name}": name.encode() for name in ("a/1.png", "a/2.png", "b/1.png")}


def test_a_list_gives_what_its_class_folders_give(make_set, tmp_path: Path) -> None:
    lines = b"train/a/1.png 0\ntrain/a/2.png 0\ntrain/b/1.png 1\n"
    data = make_set(two_classes(), {"list.txt": lines})
    folders = open_set(data, "train", 2)
    listed = open_set(data.model_copy(update={"train": "list.txt"}), "train", 2)
    assert contents(folders) == contents(listed)
    assert contents(folders)[2] == (str(tmp_path / "train/b/1.png"), b"b/1.png", [1])


def test_a_list_may_name_absolute_paths_and_lie_elsewhere(make_set, tmp_path: Path) -> None:
    lines = f"{tmp_path}/train/b/1.png 0\n".encode()
    data = make_set(two_classes(), {"elsewhere/list.txt": lines})
    changed = {"root": str(tmp_path / "nowhere"), "train": str(tmp_path / "elsewhere/list.txt")}
    assert contents(open_set(data.model_copy(update=changed), "train", 1))[0][1] == b"b/1.png"


def test_a_lists_classes_are_named_by_the_sets_file_if_it_has_one_a_class(make_set) -> None:
    lines = {"list.txt": b"train/a/1.png 0\ntrain/b/1.png 1\n", "class_names.txt": b"n1 cat\nn2 dog, big\n"}
    data = make_set(two_classes(), lines, train="list.txt")
    assert open_set(data, "train", 2).class_names == ["cat", "dog, big"]
    assert open_set(data, "train", 3).class_names == ["0", "1", "2"]


def test_several_labels_need_to_be_asked_for(make_set) -> None:
    data = make_set(two_classes(), {"list.txt": b"train/a/1.png 0\ntrain/a/2.png 0,1\n"}, train="list.txt")
    assert "image 2" in listing_mistake(data, "train", 2)
    assert "data.multi_label=true" in listing_mistake(data, "train", 2)
    images = open_set(data.model_copy(update={"multi_label": True}), "train", 2)
    assert [labels for _, _, labels in contents(images)] == [[0], [0, 1]]


def test_a_label_beyond_the_classes_is_told_with_the_key(make_set) -> None:
    data = make_set(two_classes(), {"list.txt": b"train/a/1.png 0\ntrain/a/2.png 7\n"}, train="list.txt")
    assert "model.num_classes=8" in listing_mistake(data, "train", 2)


def test_the_digest_is_that_of_names_labels_and_order(make_set, tmp_path: Path) -> None:
    lines = [b"train/a/1.png 0\n", b"train/a/2.png 0\n", b"train/b/1.png 1\n"]
    orders = {"x": lines, "y": lines[::-1], "z": lines[:2], "w": [*lines[:2], b"train/b/1.png 0\n"]}
    data = make_set(two_classes(), {f"{name}.txt": b"".join(some) for name, some in orders.items()})

    def digest(train: str) -> str:
        return open_set(data.model_copy(update={"train": train}), "train", 2).digest()

    assert len({digest(f"{name}.txt") for name in orders}) == 4
    here = digest("train")
    (tmp_path / "train").rename(tmp_path / "moved")
    (tmp_path / "root/train").parent.mkdir()
    (tmp_path / "moved").rename(tmp_path / "root/train")
    assert open_set(data.model_copy(update={"root": str(tmp_path / "root")}), "train", 2).digest() == here


def checked(*problems: tuple[str, bool]) -> dict[str, bytes]:
    """The report of a check that found these, and whether they stop training."""
    found = [{"path": path, "stops_training": stops} for path, stops in problems]
    return {CHECK_FILE: json.dumps({"problems": found}).encode()}


def test_what_a_check_has_found_bad_can_be_left_out(make_set) -> None:
    data = make_set(two_classes(), checked(("train/a/2.png", True), ("train/b/1.png", False)), on_bad_image="skip")
    images = open_set(data, "train", 2)
    assert [Path(images.name(n)).name for n in range(len(images))] == ["1.png", "1.png"]
    assert images.digest() != open_set(data.model_copy(update={"on_bad_image": "stop"}), "train", 2).digest()


def test_leaving_bad_images_out_needs_a_check(make_set, tmp_path: Path) -> None:
    data = make_set(two_classes(), on_bad_image="skip")
    assert f"data check {tmp_path}" in listing_mistake(data, "train", 2)
    (tmp_path / CHECK_FILE).write_text("[]")
    assert f"data check {tmp_path}" in listing_mistake(data, "train", 2)
    (tmp_path / CHECK_FILE).write_bytes(
        checked(*((f"train/{name}", True) for name in ("a/1.png", "a/2.png", "b/1.png")))[CHECK_FILE]
    )
    assert "all of its images are bad" in listing_mistake(data, "train", 2)
