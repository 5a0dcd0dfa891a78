"""List files: their content in many notations, and errors that name the line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vit_static.common.errors import DataError
from vit_static.data import list_file
from vit_static.data.list_file import read_list


def write(folder: Path, text: bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(text)
    return path


def read(path: Path) -> list[tuple[str, list[int]]]:
    images = read_list(path)
    return [(images.path(n).decode(), images.labels[n].tolist()) for n in range(len(images))]


def test_a_line_has_a_path_and_a_label(tmp_path: Path) -> None:
    path = write(tmp_path, b"train/a/1.jpeg 0\ntrain/b/2.jpeg 17\ntrain/b/3.jpeg 999\n")
    assert read(path) == [("train/a/1.jpeg", [0]), ("train/b/2.jpeg", [17]), ("train/b/3.jpeg", [999])]
    assert read_list(path).labels.offsets is None


def test_a_line_may_have_several_labels(tmp_path: Path) -> None:
    path = write(tmp_path, b"a.jpeg 3\nb.jpeg 0,21840\nc.jpeg 1,2,3\n")
    assert read(path) == [("a.jpeg", [3]), ("b.jpeg", [0, 21840]), ("c.jpeg", [1, 2, 3])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a.jpeg 1", [("a.jpeg", [1])]),
        (b"a.jpeg 1\r\nb.jpeg 2\r\n", [("a.jpeg", [1]), ("b.jpeg", [2])]),
        (b"a.jpeg\t1\n", [("a.jpeg", [1])]),
        (b"\na.jpeg 1\n\n\nb.jpeg 2\n\n", [("a.jpeg", [1]), ("b.jpeg", [2])]),
        (b"a b, c.jpeg 1\n", [("a b, c.jpeg", [1])]),
        (b"a,1,2 3.jpeg 4,5\n", [("a,1,2 3.jpeg", [4, 5])]),
        ("größer.jpeg 7\n".encode(), [("größer.jpeg", [7])]),
        (b"a.jpeg 007\n", [("a.jpeg", [7])]),
    ],
    ids=["no newline", "windows", "tab", "empty lines", "spaces", "commas", "umlauts", "zeros"],
)
def test_lists_may_be_written_in_many_notations(
    tmp_path: Path, text: bytes, expected: list[tuple[str, list[int]]]
) -> None:
    assert read(write(tmp_path, text)) == expected


@pytest.mark.parametrize(
    "line", [b"b.jpeg", b"b.jpeg ", b" 1", b"b.jpeg x", b"b.jpeg -1", b"b.jpeg 1,", b"b.jpeg ,1", b"b.jpeg 1.0",
             b"b.jpeg 12345678901", b"b.jpeg 1;2"]
)  # fmt: skip
def test_a_wrong_line_is_named_by_its_number_and_text(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, b"a.jpeg 1\n\n" + line + b"\nc.jpeg 2\n")
    with pytest.raises(DataError) as error:
        read_list(path)
    assert f"{path}, line 3" in str(error.value)
    assert line.decode().strip() in str(error.value)


def test_an_empty_list_is_an_error(tmp_path: Path) -> None:
    for text in (b"", b"\n\n"):
        with pytest.raises(DataError, match="empty"):
            read_list(write(tmp_path, text))


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_long_list_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multi_label: bool) -> None:
    monkeypatch.setattr(list_file, "_BLOCK_BYTES", 1000)
    rng = np.random.default_rng(0)
    expected = [
        (f"{'x' * int(rng.integers(30))}/{n}.jpeg", rng.integers(30_000, size=rng.integers(1, 4 if multi_label else 2)))
        for n in range(500)
    ]
    path = write(tmp_path, "".join(f"{name} {','.join(map(str, labels))}\n" for name, labels in expected).encode())
    assert read(path) == [(name, labels.tolist()) for name, labels in expected]
    (tmp_path / "late.txt").write_bytes(path.read_bytes() + b"oops\n")
    with pytest.raises(DataError, match="line 501, 'oops'"):
        read_list(tmp_path / "late.txt")


def test_images_can_be_selected(tmp_path: Path) -> None:
    images = read_list(write(tmp_path, b"a 1\nb 2,3\nc 4\nd 5,6,7\n")).select(np.array([True, False, True, True]))
    assert [(images.path(n), images.labels[n].tolist()) for n in range(3)] == [
        (b"a", [1]), (b"c", [4]), (b"d", [5, 6, 7]),
    ]  # fmt: skip
