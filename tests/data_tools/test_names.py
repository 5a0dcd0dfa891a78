"""Names of files and classes with any bytes, in any locale: lists, class names, checks and shards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.sets import photo
from helpers.small import ROOT

from vit_static.common.errors import escape
from vit_static.common.text import (
    display_name,
    escape_within,
    json_line,
    json_text,
    path_fields,
    path_of,
)
from vit_static.config.data_schema import DataConfig
from vit_static.data.open_set import class_line, name_of_folder, open_set, read_class_names

GBK_NAME = "动物".encode("gbk")
FOLDERS = {  # class folder: its name in class_names.txt, as it is displayed
    GBK_NAME: "\\xb6\\xaf\\xce\\xef",
    "狗".encode(): "狗",
    b" two  spaces  ": " two  spaces  ",
    b"tab\there": "tab\\there",
    "wide\u3000space\u2028end".encode(): "wide\u3000space\\u2028end",
    b"\x1b[31mred\x85": "\\x1b[31mred\\x85",
}
NAMES = (b" 1  .jpg", GBK_NAME + b".JPG", "é\u2028.jpg".encode(), b"\xff\xfe\x80.jpeg", b"-o 7, 8\t.jpg", b"a\\nb.jpg")


def write_images(root: Path) -> None:
    """Write an image with each of the names to each of the folders."""
    for number, folder in enumerate(FOLDERS):
        directory = os.fsencode(root) + b"/" + folder
        os.makedirs(directory)  # noqa: PTH103 - bytes
        for position, name in enumerate(NAMES):
            path = Path(os.fsdecode(directory + b"/" + name))
            photo(12, 12, seed=10 * number + position).save(path, "JPEG")


@pytest.fixture(scope="module", params=["C", "zh_CN.GBK"])
def locale(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a locale whose encoding isn't UTF-8."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    if request.param == "C":
        return environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    folder = tmp_path_factory.mktemp("locale")
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/charmaps/GBK.gz").exists():
        pytest.skip("this machine can't create a GBK locale")
    subprocess.run(["localedef", "-i", "zh_CN", "-f", "GBK", folder / "zh_CN.GBK"], check=True)
    environ.pop("PYTHONUTF8", None)
    return environ | {"LC_ALL": "zh_CN.GBK", "LOCPATH": str(folder)}


def run_tool(environ: dict[str, str], *arguments: object) -> bytes:
    """Run a data tool, and return what it prints."""
    command = [sys.executable, "-m", "data_tools", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=False)
    assert done.returncode in (0, 1), done.stderr.decode(errors="replace")
    return done.stdout + done.stderr


def test_tools_keep_every_byte_of_names_in_any_locale(locale: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_images(root)
    run_tool(locale, "folder", "--root", root)
    paths = b"".join((root / f"{split}_list.txt").read_bytes() for split in ("train", "val")).splitlines()
    expected = {folder + b"/" + name for folder in FOLDERS for name in NAMES}
    assert {line.rpartition(b" ")[0] for line in paths if line} == expected
    classes = {os.fsencode(folder): name for folder, name in read_class_names(root / "class_names.txt")}
    assert classes == {folder.replace(b"\t", b"\\t"): os.fsdecode(folder).replace("\t", "\\t") for folder in FOLDERS}
    data = DataConfig(root=str(root), train="train_list.txt", val="val_list.txt")
    assert sorted(open_set(data, "train", len(FOLDERS)).class_names) == sorted(FOLDERS.values())
    assert sorted(open_set(data.model_copy(update={"train": "."}), "train", len(FOLDERS)).class_names) == sorted(
        FOLDERS.values()
    )
    damaged = GBK_NAME + b"/" + NAMES[0]
    Path(os.fsdecode(os.fsencode(root) + b"/" + damaged)).write_bytes(b"nothing")
    printed = run_tool(locale, "check", root)
    assert rb"\xb6\xaf\xce\xef/ 1  .jpg: can't be read as an image" in printed
    (problem,) = json.loads((root / "data_check.json").read_text(encoding="utf-8"))["problems"]
    assert os.fsencode(path_of(problem)) == damaged
    skipping = data.model_copy(update={"on_bad_image": "skip"})
    sizes = [len(open_set(each, split, len(FOLDERS))) for each in (data, skipping) for split in ("train", "val")]
    assert sum(sizes[:2]) == len(expected) == sum(sizes[2:]) + 1
    run_tool(locale, "shards", "--root", root, "--train", "train_list.txt", "--out", tmp_path / "shards")
    contents = (tmp_path / "shards/train/contents.txt").read_bytes().split(b"\n")
    assert {line.partition(b" ")[2] for line in contents if line} <= expected


def test_lines_of_class_names_keep_spaces_and_earlier_files_are_read(tmp_path: Path) -> None:
    for folder, name in ((" a  b ", "  two  blanks "), ("a", " b"), ("a\tb", "c\td"), ("n01440764", "tench, Tinca")):
        (tmp_path / "class_names.txt").write_text(class_line(folder, name) + "\n", encoding="utf-8")
        ((line_folder, line_name),) = read_class_names(tmp_path / "class_names.txt")
        assert name_of_folder({line_folder: line_name}, folder) == name.replace("\t", "\\t")
    (tmp_path / "class_names.txt").write_bytes(b"\xef\xbb\xbfbig_dogs  big dogs \r\n\ncats Felis  catus\nalone\n")
    names = dict(read_class_names(tmp_path / "class_names.txt"))
    assert names == {"big_dogs": "big dogs", "cats": "Felis  catus", "alone": ""}
    assert name_of_folder(names, "big dogs") == "big dogs"


def test_names_are_displayed_without_losing_spaces() -> None:
    assert display_name("  a\u3000b \u202fc  ") == "  a\u3000b \u202fc  "
    assert display_name("a\nb\x1b\udcb9\u2028") == "a\\nb\\x1b\\xb9\\u2028"
    assert escape("  \udcb9  \u202e ") == "  \\xb9  \\u202e "


def test_a_name_is_cut_between_escapes() -> None:
    name = "ab\udcb9\u202ec"  # shown as ab\xb9\u202ec
    cut = [escape_within(name, width) for width in range(1, 15)]
    assert cut[:6] == ["…", "a…", "ab…", "ab…", "ab…", "ab…"] and cut[6] == "ab\\xb9…" == cut[11]
    assert cut[12] == cut[13] == escape(name)


def test_json_is_read_by_any_parser_and_keeps_the_bytes_of_paths() -> None:
    for path in ("a/b.jpg", "caf\u00e9 \U0001f408", "\udcb9\udcff.jpg", "\\xb9.jpg"):
        fields = path_fields(path)
        assert {path_of(json.loads(to_json(fields))) for to_json in (json_text, json_line)} == {path}
    value = {"k\udcb9": ["\ud800", ("\udfff", 1.5, None, True)], "cat": "\U0001f408"}
    for text in (json_text(value), json_text(value, indent=1), json_line(value)):
        assert json.loads(text) == {"k\\xb9": ["\\ud800", ["\\udfff", 1.5, None, True]], "cat": "\U0001f408"}
        json.dumps(json.loads(text), ensure_ascii=False).encode()  # raises for a lone surrogate
