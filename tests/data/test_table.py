"""Tables of images and labels: CSV, TSV and Parquet, their classes, and errors that name the row."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.config.loader import load_config
from vit_static.data.image_set import FileDataset
from vit_static.data.open_set import check_command, count_classes, describe_empty_classes, open_set

ROWS = [("a.jpg", "dog"), ("b b.jpg", "cat"), ("größer, 1.jpg", "sea lion"), ("d.jpg", "dog")]


def csv_text(rows: Any, header: tuple[str, ...] = ("path", "label"), delimiter: str = ",") -> bytes:
    """Return a CSV as Python's and pandas' writers make it."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([header, *rows])
    return file.getvalue().encode()


def config(folder: Path, name: str = "train.csv", **changed: Any) -> DataConfig:
    return DataConfig(**{"root": str(folder), "train": name, "val": name, **changed})


def contents(data: DataConfig, num_classes: int, split: str = "train") -> list[tuple[str, list[int]]]:
    images = open_set(data, split, num_classes)
    assert isinstance(images, FileDataset)
    return [(images.relative_name(n), images.image_list.labels[n].tolist()) for n in range(len(images))]


def write_parquet(file: Path, /, **columns: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=2)


@pytest.fixture(params=["csv", "excel", "tsv", "parquet", "categories", "list"])
def named(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    """The same four images in a kind of file; as a list, the classes are numbers with names in class_names.txt."""
    paths, labels = zip(*ROWS, strict=True)
    if request.param == "list":
        numbers = [sorted(set(labels)).index(label) for label in labels]
        lines = [f"{path} {number}\n" for path, number in zip(paths, numbers, strict=True)]
        (tmp_path / "list.txt").write_text("".join(lines))
        (tmp_path / "class_names.txt").write_text("cat cat\ndog dog\nsea_lion sea lion\n")
        return config(tmp_path, "list.txt")
    if request.param == "csv":
        (tmp_path / "x.CSV").write_bytes(csv_text([(n, label, path) for n, (path, label) in enumerate(ROWS)],
                                                  ("", "label", "path")))  # fmt: skip
        return config(tmp_path, "x.CSV")
    if request.param == "excel":  # of a country in which the decimal separator is a comma
        (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + csv_text(ROWS, delimiter=";") + b"\r\n")
        return config(tmp_path, "x.csv")
    if request.param == "tsv":
        (tmp_path / "x.tsv").write_bytes(csv_text(ROWS, ("file name", " class "), "\t").replace(b"\r\n", b"\n"))
        return config(tmp_path, "x.tsv", path_column="file name", label_column="class")
    encoded = pyarrow.array(labels).dictionary_encode() if request.param == "categories" else labels
    write_parquet(tmp_path / "x.parquet", label=encoded, width=[1, 2, 3, 4], path=paths)
    return config(tmp_path, "x.parquet")


def test_every_kind_of_file_is_the_same_dataset(named: DataConfig) -> None:
    assert contents(named, 3) == [("a.jpg", [1]), ("b b.jpg", [0]), ("größer, 1.jpg", [2]), ("d.jpg", [1])]
    assert open_set(named, "train", 3).class_names == ["cat", "dog", "sea lion"]
    assert count_classes(named, "train") == 3


def test_paths_may_be_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"path,label\n\xff\xfe.jpg,0\n a  b .jpg,0\n")
    (tmp_path / b"\xff\xfe.jpg".decode("utf-8", "surrogateescape")).write_bytes(b"x")
    images = open_set(config(tmp_path), "train", 1)
    assert isinstance(images, FileDataset)
    assert images.image_list.path(0) == b"\xff\xfe.jpg" and images.read(0)[0].tobytes() == b"x"
    assert images.image_list.path(1) == b" a  b .jpg"


@pytest.mark.parametrize(
    "labels", [["2", "0", "1"], ["2.0", "0.0", "1.0"], ["02", "0", "1"]], ids=["numbers", "floats", "zeros"]
)
def test_labels_that_are_numbers_are_those_of_classes(tmp_path: Path, labels: list[str]) -> None:
    (tmp_path / "train.csv").write_bytes(csv_text([(f"{n}.jpg", label) for n, label in enumerate(labels)]))
    (tmp_path / "class_names.txt").write_text("x cat\ny dog\nz cow\nw ape\n")
    assert [label for _, label in contents(config(tmp_path), 4)] == [[2], [0], [1]]
    assert open_set(config(tmp_path), "train", 4).class_names == ["cat", "dog", "cow", "ape"]


def test_numbers_can_be_names(tmp_path: Path) -> None:
    """Such as the codes of products, in the order of class folders."""
    (tmp_path / "train.csv").write_bytes(csv_text([("a", "900"), ("b", "1001"), ("c", "900")]))
    assert [label for _, label in contents(config(tmp_path, label_type="name"), 2)] == [[1], [0], [1]]
    with pytest.raises(DataError, match="has a label 1001"):
        contents(config(tmp_path), 2)


def test_numbers_of_parquet(tmp_path: Path) -> None:
    for labels in ([2, 0, 1], [2.0, 0.0, 1.0], np.array([2, 0, 1], np.uint8)):
        write_parquet(tmp_path / "t.parquet", path=["a", "b", "c"], label=labels)
        assert [label for _, label in contents(config(tmp_path, "t.parquet"), 3)] == [[2], [0], [1]]


def several(tmp_path: Path) -> dict[str, DataConfig]:
    """Return three notations of the labels {cat, dog}, {}, {cow}, {dog}."""
    cells = ["dog; cat", "", "cow", "dog;dog"]
    (tmp_path / "cells.csv").write_bytes(csv_text([(f"{n}", cell) for n, cell in enumerate(cells)]))
    rows = [("0", 1, "0", True, "x"), ("1", 0, "", False, "x"), ("2", 0, "1.0", "0", "x"), ("3", 0, 0, "TRUE", "x")]
    (tmp_path / "columns.csv").write_bytes(csv_text(rows, ("path", "cat", "cow", "dog", "other")))
    write_parquet(
        tmp_path / "lists.parquet",
        path=list("0123"),
        label=pyarrow.array([["dog", "cat"], [], ["cow"], ["dog"]]),
    )
    write_parquet(
        tmp_path / "columns.parquet",
        path=list("0123"),
        cat=[True, False, False, False],
        dog=[1, 0, 0, 1],
        cow=[0.0, None, 1.0, float("nan")],
    )
    columns = ("cat", "cow", "dog")
    return {
        "cells": config(tmp_path, "cells.csv", multi_label=True, label_separator=";"),
        "columns": config(tmp_path, "columns.csv", multi_label=True, label_column=columns),
        "lists": config(tmp_path, "lists.parquet", multi_label=True),
        "parquet columns": config(tmp_path, "columns.parquet", multi_label=True, label_column=columns),
    }


@pytest.mark.parametrize("notation", ["cells", "columns", "lists", "parquet columns"])
def test_an_image_may_have_several_labels_or_none(tmp_path: Path, notation: str) -> None:
    data = several(tmp_path)[notation]
    labels = [sorted(label) for _, label in contents(data, 3)]
    assert labels == [[0, 2], [], [1], [2]]
    images = open_set(data, "train", 3)
    assert images.class_names == ["cat", "cow", "dog"]
    assert images.labels().class_counts(3).tolist() == [1, 1, 2]
    with pytest.raises(DataError, match=r"(line|row) \d: has several labels; set data.multi_label=true"):
        contents(data.model_copy(update={"multi_label": False}), 3)


def test_columns_of_classes_keep_the_order_of_the_config(tmp_path: Path) -> None:
    data = several(tmp_path)["columns"].model_copy(update={"label_column": ("dog", "cat", "cow")})
    assert [label for _, label in contents(data, 3)] == [[0, 1], [], [2], [0]]


def test_one_column_per_class_can_mean_one_label(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(csv_text([("a", 0, 1), ("b", 1, 0)], ("path", "x", "y")))
    assert contents(config(tmp_path, label_column=("x", "y")), 2) == [("a", [1]), ("b", [0])]


# The classes of the validation set


def test_the_validation_table_has_the_classes_of_the_training_table(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(csv_text(ROWS))
    (tmp_path / "val.csv").write_bytes(csv_text([("x", "sea lion"), ("y", "dog")]))
    data = config(tmp_path, val="val.csv")
    assert contents(data, 3, "val") == [("x", [2]), ("y", [1])]
    assert open_set(data, "val", 3).class_names == ["cat", "dog", "sea lion"]
    assert count_classes(data, "val") == 3
    (tmp_path / "val.csv").write_bytes(csv_text([("x", "sea lion"), ("y", "cow"), ("z", "cow")]))
    with pytest.raises(DataError, match=r"val.csv, line 3: the class 'cow' isn't one of the 3 classes of .*train.csv"):
        contents(data, 3, "val")


def test_tables_and_class_folders_can_be_combined(make_set: Callable[..., DataConfig], tmp_path: Path) -> None:
    """The folders' order and names are those of the table, in both directions."""
    files = {f"folders/{name}/1.png": b"x" for name in ("10", "9", "cat")}
    tables = {
        "names.csv": csv_text([("a", "9"), ("b", "cat"), ("c", "10")]),
        "columns.csv": csv_text([("a", 1, 0, 0), ("b", 0, 1, 0), ("c", 0, 0, 1)], ("path", "cat", "9", "10")),
        "other.csv": csv_text([("a", "9"), ("b", "cat"), ("c", "11")]),
    }
    data = make_set(files, tables, train="folders", val="names.csv")
    assert contents(data, 3, "val") == [("a", [1]), ("b", [2]), ("c", [0])]
    data = data.model_copy(update={"train": "columns.csv", "val": "folders", "label_column": ("cat", "9", "10")})
    assert contents(data, 3, "val") == [("folders/cat/1.png", [0]), ("folders/9/1.png", [1]), ("folders/10/1.png", [2])]
    data = data.model_copy(update={"train": "other.csv", "label_column": "label"})
    with pytest.raises(DataError, match="must have the same classes, but differ in '10'"):
        contents(data, 3, "val")


def test_names_in_a_validation_table_need_named_classes(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.jpg 0\nb.jpg 1\nc.jpg 2\n")
    (tmp_path / "val.csv").write_bytes(csv_text(ROWS))
    data = config(tmp_path, "train.txt", val="val.csv")
    with pytest.raises(DataError, match=r"its labels are names, but .*train.txt doesn't name the classes"):
        contents(data, 3, "val")
    (tmp_path / "class_names.txt").write_text("n1 sea lion\nn2 cat\nn3 dog\n")
    assert [label for _, label in contents(data, 3, "val")] == [[2], [1], [0], [2]]


# Mistakes


@pytest.mark.parametrize(
    ("text", "changed", "problem"),
    [
        (b"", {}, "train.csv: has no column 'path'"),
        (b"path,label\n", {}, "train.csv: has no rows"),
        (b"file,class\na,b\n", {}, "has no column 'path', but 'file', 'class'; set data.path_column"),
        (b"path,class\na,b\n", {}, "has no column 'label', but 'path', 'class'; set data.label_column"),
        (b"path,label,label\na,b,c\n", {}, "has several columns 'label'"),
        (b"path,label\na,0\nb\n", {}, "line 3: has 1 cells, but the first line names 2 columns"),
        (b"path,label\na,0\nb, c,0\n", {}, "line 3: has 3 cells"),
        (b"path,label\na,0\n,0\n", {}, "line 3: has no path but ''"),
        (b"path,label\na,0\nb,\n", {}, "line 3: has no label"),
        (b"path,label\na,0\n\nb,x\n", {"label_type": "number"}, "line 4: the label 'x' isn't a class number"),
        (b"path,label\na,0\nb,-1\n", {"label_type": "number"}, "line 3: the label '-1'"),
        (b"path,label\na,0\nb,1.5\n", {"label_type": "number"}, "line 3: the label '1.5'"),
        (b"path,label\na,0\nb,gr\xfcn\n", {}, "line 3: the label 'gr\\udcfcn' is no printable UTF-8 text"),
        (b'path,label\na,0\n"b,0\nc,0\n', {}, "can't be read (unexpected end of data)"),
        ("path,label\na,0\n".encode("utf-16"), {}, "is UTF-16 text"),
        (b"path,x,y\na,0,1\nb,2,0\n", {"label_column": ("x", "y")}, "line 3, 'x': is '2'; the column of a class"),
        (b"path,x,y\na,0,1\nb,0,0\n", {"label_column": ("x", "y")}, "line 3: has no label"),
        (b"path,label\na,cat\n", {}, "names of 1 class, but model.num_classes is 2; set model.num_classes=1"),
        (b"path,label\na,0\nb,7\n", {}, "has a label 7, but model.num_classes is 2"),
    ],
)
def test_a_wrong_table_is_named_with_its_row(tmp_path: Path, text: bytes, changed: Any, problem: str) -> None:
    (tmp_path / "train.csv").write_bytes(text)
    with pytest.raises(DataError) as error:
        open_set(config(tmp_path, **changed), "train", 2)
    assert str(tmp_path / "train.csv") in str(error.value) and problem in str(error.value)
    assert str(error.value).isprintable()


def test_a_wrong_parquet_file_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"

    def message() -> str:
        with pytest.raises(DataError) as error:
            open_set(config(tmp_path, "t.parquet"), "train", 2)
        assert str(error.value).startswith(str(path)) and str(error.value).isprintable()
        return str(error.value)

    write_parquet(path, path=["a", "b", None], label=[0, 1, 1])
    assert "row 3: has no path but None" in message()
    write_parquet(path, path=["a", "b", "c"], label=[0, 1, None])
    assert "row 3: has no label" in message()
    write_parquet(path, path=[1, 2], label=[0, 1])
    assert "row 1: has no path but 1" in message()
    write_parquet(path, path=["a"], label=[{"x": 1}])
    assert "row 1: {'x': 1} is no label" in message()
    write_parquet(path, file=["a"], label=[0])
    assert "has no column 'path', but 'file', 'label'" in message()
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-9], b"x" * 100):
        path.write_bytes(damaged)
        assert "can't be read as a Parquet file" in message()


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "t.parquet", path=["a"], label=[0])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="run 'pip install pyarrow', or save a CSV"):
        open_set(config(tmp_path, "t.parquet"), "train", 1)


@pytest.mark.parametrize("kind", ["list", "table"])
def test_labels_that_begin_at_1_are_explained(tmp_path: Path, kind: str) -> None:
    rows = [("a", 1), ("b", 3), ("c", 2)]
    (tmp_path / "list").write_text("".join(f"{path} {label}\n" for path, label in rows))
    (tmp_path / "table").with_suffix(".csv").write_bytes(csv_text(rows))
    data = config(tmp_path, "list" if kind == "list" else "table.csv")
    with pytest.raises(DataError, match=r"labels run from 1 to 3, and the first class has number 0; set data.first_"):
        contents(data, 3)
    with pytest.raises(DataError, match=r"has a label 3, but model.num_classes is 2"):
        contents(data, 2)
    note = describe_empty_classes(open_set(data, "train", 4), Path("train"), 0)
    assert note is not None and "1 of 4 classes have no image: '0'; if the labels begin at 1" in note
    from_1 = data.model_copy(update={"first_label": 1})
    assert [label for _, label in contents(from_1, 3)] == [[0], [2], [1]]
    assert count_classes(from_1, "train") == 3
    (tmp_path / "list").write_text("a 0\nb 3\n")
    (tmp_path / "table.csv").write_bytes(csv_text([("a", 0), ("b", 3)]))
    with pytest.raises(DataError, match=r"has a label 0, but data.first_label is 1; set data.first_label=0"):
        contents(from_1, 3)


def test_classes_without_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(csv_text(ROWS))
    (tmp_path / "val.csv").write_bytes(csv_text(ROWS[:1]))
    data = config(tmp_path, val="val.csv")
    assert describe_empty_classes(open_set(data, "train", 3), Path("t"), 0) is None
    note = describe_empty_classes(open_set(data, "val", 3), Path("val.csv"), 0)
    assert note == "val.csv: 2 of 3 classes have no image: 'cat', 'sea lion'"


def test_the_command_that_checks_a_table_has_its_columns(tmp_path: Path) -> None:
    data = DataConfig(root="d", train="t.csv", path_column="a b", label_column=("x", "y"), first_label=1)
    assert check_command(data) == (
        "./run.sh data check d --train t.csv --path-column 'a b' --label-column x --label-column y --first-label 1"
    )


def test_settings_are_read_from_the_command_line() -> None:
    data = load_config(None, ["data.label_column=[7, cat]", "data.path_column=1", 'data.label_separator="|"']).data
    assert (data.label_column, data.path_column, data.label_separator) == (("7", "cat"), "1", "|")
    for override, problem in (
        ("data.label_column=[a, a]", r"label_column=\[a, a\]: must be"),
        ("data.label_column=[]", r"label_column=\[\]: must be"),
        ("data.label_separator=''", "label_separator='': is empty"),
        ("data.label_separator=|", "in quotes"),
        ("data.first_label=2", "data.first_label=2: must be at most 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            load_config(None, [override])
