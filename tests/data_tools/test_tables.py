"""`data check` and `data shards` of tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.bad_input import encoded_image

from data_tools import check, shards
from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.data.open_set import open_set

ROWS = ["1.png;cat|small", "2.png;dog", "sub/3.png;", "2 b.png;dog|cat", "1.png;cat"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images, one of which is in two rows of a table with the classes cat, dog, small."""
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("1.png", "2.png", "sub/3.png", "2 b.png")):
        (folder / name).write_bytes(encoded_image("RGB", "PNG", (8 + number, 9)))
    (folder / "labels.csv").write_text("\n".join(["file;tags", *ROWS]))
    (folder / "val.csv").write_text("file;tags\n2.png;dog")
    return folder


COLUMNS = ["--path-column", "file", "--label-column", "tags", "--label-separator", "|"]
TABLES = ["--train", "labels.csv", "--val", "val.csv", *COLUMNS]


def table_config(root: Path) -> DataConfig:
    return DataConfig(
        root=str(root), train="labels.csv", val="val.csv", path_column="file", label_column="tags",
        label_separator="|", multi_label=True,
    )  # fmt: skip


def contents(data: DataConfig, split: str, num_classes: int) -> list[tuple[bytes, list[int]]]:
    images = open_set(data, split, num_classes)
    read = (images.read(index) for index in range(len(images)))
    return sorted((encoded.tobytes(), labels.tolist()) for encoded, labels in read)


def test_the_images_of_a_table_are_checked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "2 b.png").write_bytes(b"no image")
    assert check.main([str(root), *TABLES]) == 1
    problems = json.loads((root / "data_check.json").read_text())["problems"]
    found = {(problem["split"], problem["path"], problem["kind"], problem["stops_training"]) for problem in problems}
    assert found == {
        ("train", "2 b.png", "unreadable", True),
        ("val", "2.png", "duplicate", False),
        ("val", "cat", "unused_class", False),
        ("val", "small", "unused_class", False),
    }
    assert "read 5 train and 1 val images" in capsys.readouterr().out
    skipping = table_config(root).model_copy(update={"on_bad_image": "skip"})
    assert len(open_set(skipping, "train", 3)) == 4


def test_clean_lists_of_a_table_have_its_classes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lists can't have images without labels."""
    assert check.main([str(root), *TABLES, "--fix", str(tmp_path / "fixed")]) == 0
    output = capsys.readouterr().out
    assert "train_list.txt with 4 images, without 1" in output and "model.num_classes=3" in output
    lists = DataConfig(root=str(tmp_path / "fixed"), train="train_list.txt", val="val_list.txt", multi_label=True)
    labelled = [image for image in contents(table_config(root), "train", 3) if image[1]]
    assert [(encoded, sorted(labels)) for encoded, labels in contents(lists, "train", 3)] == [
        (encoded, sorted(labels)) for encoded, labels in labelled
    ]
    assert open_set(lists, "train", 3).class_names == ["cat", "dog", "small"]


def test_labels_that_are_no_class_are_found_in_numbered_tables(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "labels.csv").write_text("path,label\n1.png,1\n2.png,3\n2 b.png,2\n")
    (root / "class_names.txt").write_text("a a\nb b\nc c\n")
    arguments = [str(root), "--train", "labels.csv"]
    assert check.main(arguments) == 1
    (wrong, *empty) = [
        problem
        for problem in json.loads((root / "data_check.json").read_text())["problems"]
        if problem["kind"] in ("label", "labels_from_1")
    ]
    assert wrong["path"] == "2.png" and "label 3, but there are 3 classes" in wrong["detail"]
    assert "--first-label 1" in wrong["detail"] and [problem["path"] for problem in empty] == ["0"]
    assert check.main([*arguments, "--first-label", "1"]) == 0
    assert capsys.readouterr().out.count("check: nothing would stop training\n") == 1
    (root / "class_names.txt").unlink()
    assert check.main(arguments) == 0
    assert "if the first class has number 0 (see labels_from_1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ("1.png,cat\n2.png,dog\n", [], "has no line of column names, but begins with '1.png', 'cat'; add one"),
        ("path,label\n1.png,cat\n2.png,dog\n", ["--first-label", "1"], "labels are names, which have no first"),
    ],
)
def test_a_table_that_is_not_read_as_meant_is_refused(
    root: Path, table: str, arguments: list[str], message: str
) -> None:
    (root / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        check.main([str(root), "--train", "labels.csv", *arguments])
    with pytest.raises(ValueError, match="is a file; give its folder"):
        check.main([str(root / "labels.csv")])


def test_shards_have_the_images_and_classes_of_a_table(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert shards.main(["--root", str(root), "--out", str(out), *TABLES]) == 0
    data = DataConfig(root=str(out), multi_label=True)
    for split in ("train", "val"):
        assert contents(data, split, 3) == contents(table_config(root), split, 3)
    assert open_set(data, "train", 3).class_names == ["cat", "dog", "small"]
    assert open_set(data, "train", 3).labels().class_counts(3).tolist() == [3, 2, 1]


@pytest.mark.parametrize("tool", [check.main, shards.main])
def test_wrong_arguments_are_one_line(tool: Callable[[list[str]], int], root: Path) -> None:
    arguments = [str(root)] if tool is check.main else ["--root", str(root), "--out", str(root / "out")]
    with pytest.raises(ValueError, match="label_separator: is empty") as error:
        tool([*arguments, "--train", "labels.csv", "--label-separator", ""])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no column 'path', but 'file', 'tags'"):
        tool([*arguments, "--train", "labels.csv"])
