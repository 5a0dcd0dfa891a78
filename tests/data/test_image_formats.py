"""The table of image formats, and the report of what is left out of folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.sets import photo
from helpers.small import ROOT
from PIL import Image

from data_tools import check, folder
from vit_static.common.errors import DataError, PredictError
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_formats import (
    FOLDER,
    FORMATS,
    HIDDEN,
    PILLOW_FORMATS,
    SUPPORTED_FORMATS,
    describe_left_out,
    formats_table,
    is_image_name,
    name_unsupported,
)
from vit_static.data.open_set import open_set
from vit_static.inference.image_io import find_images

LEFT_OUT = {".pdf": 2, ".heic": 1, ".db": 1, "": 1, HIDDEN: 2, FOLDER: 1}
DESCRIPTION = (
    "2 .pdf (not supported: save as PNG or JPEG), 1 .db, 1 .heic (not supported: save as PNG or JPEG), "
    "1 without a suffix, 2 hidden files, 1 folder"
)


def test_the_documented_table_is_the_programs() -> None:
    assert formats_table() in (ROOT / "configs/DATA.md").read_text(encoding="utf-8")


def test_a_suffix_belongs_to_one_format() -> None:
    suffixes = [suffix for image_format in FORMATS for suffix in image_format.suffixes]
    assert len(suffixes) == len(set(suffixes))
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in suffixes)


def test_pillow_knows_the_supported_formats_by_the_same_suffixes() -> None:
    extensions = Image.registered_extensions()
    for image_format in SUPPORTED_FORMATS:
        known = {extensions.get(suffix, image_format.pillow_formats[0]) for suffix in image_format.suffixes}
        assert known <= {*image_format.pillow_formats, "MPO"}, image_format.name
    assert set(PILLOW_FORMATS) <= Image.OPEN.keys()  # this build of Pillow can read them


@pytest.mark.parametrize("name", ["a.JPG", "b.jfif", b"c.Tiff", "d.e.webp", b"\xff.avif", " .png"])
def test_images_are_recognized_by_their_suffix(name: str | bytes) -> None:
    assert is_image_name(name)
    assert not is_image_name(name + (b".txt" if isinstance(name, bytes) else ".txt"))


def test_unsupported_files_are_named_by_their_first_bytes() -> None:
    assert name_unsupported(b"\0\0\0\x18ftypmif1") == "a HEIC image"
    assert name_unsupported(b"8BPS\0\1") == "a Photoshop file"
    assert name_unsupported(b"\0\0\0\x18ftypisom") is None


def test_what_is_left_out_is_counted_by_suffix() -> None:
    assert describe_left_out(LEFT_OUT) == DESCRIPTION
    assert describe_left_out({}) == ""
    many = {f".{'x' * (20 * (number == 0))}{number}": 10 - number for number in range(10)}
    assert describe_left_out(many).startswith("10 .xxxxxxxxxxx..., 9 .1")
    assert describe_left_out(many).endswith("3 .7, 3 with other suffixes")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; in one of them, files and a folder that are left out."""
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            photo(20, 20, seed=10 * number + len(name)).save(tmp_path / "set" / name / f"{number}.jpeg")
    photo(20, 20, seed=1).save(tmp_path / "set/cat/5.JFIF", "JPEG")
    for name in ("a.pdf", "B.PDF", "phone.heic", "Thumbs.db", "README", ".DS_Store", "._3.jpeg"):
        (tmp_path / "set/cat" / name).write_bytes(b"no image")
    (tmp_path / "set/cat/more").mkdir()
    return tmp_path / "set"


def test_every_command_reports_what_it_leaves_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert folder.main(["--root", str(root), "--out", str(root.parent / "lists")]) == 0
    assert f"folder: {root}: left out {DESCRIPTION}\n" in capsys.readouterr().err
    assert check.main([str(root), "--train", "."]) == 0
    assert f"left out of train: {DESCRIPTION}\n" in capsys.readouterr().out
    report = json.loads((root / "data_check.json").read_text(encoding="utf-8"))
    assert report["left_out"] == {"train": LEFT_OUT}
    assert [path.name for path in find_images([root])].count("5.JFIF") == 1
    without_report = "2 .pdf (not supported: save as PNG or JPEG), 1 .db, 1 .heic (not supported: save as PNG or JPEG)"
    message = capsys.readouterr().err
    assert message.startswith(f"vit_static: {root}: left out {without_report}, 1 .json, 1 without a suffix, 2 hidden")


def test_a_folder_without_images_says_what_it_has(root: Path) -> None:
    with pytest.raises(PredictError, match=r"no images in this folder \(it is empty\)"):
        find_images([root / "cat/more"])
    (root / "cat/more/x.heic").touch()
    with pytest.raises(PredictError, match=r"\(1 \.heic \(not supported: save as PNG or JPEG\)\)"):
        find_images([root / "cat/more"])
    (root / "cow").mkdir()
    (root / "cow/x.psd").touch()
    with pytest.raises(DataError, match=r"cow: this class folder has no image \(only 1 \.psd \(not supported"):
        open_set(DataConfig(root=str(root), train="."), "train", 3)
