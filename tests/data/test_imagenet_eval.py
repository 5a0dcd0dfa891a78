"""ReaL labels and the folders of ImageNet-V2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.sets import photo

from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.data.imagenet_eval import imagenet_v2, with_real_labels
from vit_static.data.open_set import open_set

REAL = [[2], [], [0, 1], [1], [2, 0]]  # the labels of images 1 to 5


@pytest.fixture
def validation(make_set: Callable[..., DataConfig]) -> DataConfig:
    """Five images in class folders, so that they aren't in the order of their numbers."""
    folders = {1: "c", 2: "a", 3: "b", 4: "a", 5: "b"}
    files = {f"val/{folder}/ILSVRC2012_val_{n:08d}.JPEG": photo(20, 20, seed=n) for n, folder in folders.items()}
    return make_set(files, {f"train/{folder}/x.jpeg": photo(20, 20) for folder in "abc"})


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_images_get_all_their_labels_and_those_without_labels_are_left_out(
    validation: DataConfig, tmp_path: Path
) -> None:
    images = with_real_labels(open_set(validation, "val", 3), write(tmp_path / "real.json", REAL), 3)
    labels = {Path(images.name(n)).name[-7:-5]: images.read(n)[1].tolist() for n in range(len(images))}
    assert labels == {"01": [2], "03": [0, 1], "04": [1], "05": [2, 0]}
    assert images.class_names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "not a list of lists"),
        ([1, 2, 3], "not a list of lists"),
        ([["cat"]], "not a list of lists"),
        (["12", "0"], "not a list of lists"),
        ({"0": [1]}, "not a list of lists"),
        ([[1.7]], "not a list of lists"),
        ([[True]], "not a list of lists"),
        ([[[1], [2]]], "not a list of lists"),
        ([[7]], "beyond the model's 3 classes"),
        ([[0]], "N from 1 to 1"),
        ([], "beyond"),
    ],
)
def test_another_file_than_real_json_is_an_error(
    validation: DataConfig, tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        with_real_labels(open_set(validation, "val", 3), write(tmp_path / "real.json", content), 3)
    with pytest.raises(DataError, match=r"nowhere\.json"):
        with_real_labels(open_set(validation, "val", 3), tmp_path / "nowhere.json", 3)


def test_images_without_numbers_are_an_error(make_set: Callable[..., DataConfig], tmp_path: Path) -> None:
    data = make_set({f"val/{c}/cat.jpeg": photo(20, 20) for c in "ab"}, {f"train/{c}/1.png": photo(9, 9) for c in "ab"})
    with pytest.raises(DataError, match=r"cat\.jpeg: isn't called ILSVRC2012_val_N"):
        with_real_labels(open_set(data, "val", 2), write(tmp_path / "real.json", [[0], [1]]), 2)


def test_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Sorted as text, 10 would come before 2."""
    for label in range(12):
        (tmp_path / str(label)).mkdir()
        photo(20, 20).save(tmp_path / str(label) / "image.jpeg")
    images = imagenet_v2(tmp_path, [f"class {label}" for label in range(12)])
    assert len(images) == 12
    for index in range(12):
        assert images.read(index)[1].tolist() == [int(Path(images.name(index)).parent.name)]
    assert images.class_names[10] == "class 10"


def test_other_folders_are_an_error(tmp_path: Path) -> None:
    for label in ("0", "1", "n02"):
        (tmp_path / label).mkdir()
    with pytest.raises(DataError, match="differs in '2'"):
        imagenet_v2(tmp_path, ["a", "b", "c"])
