"""Names that would forge a line, control a terminal or be a formula, in what every verb shows and writes."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.exported import in_inference_process
from helpers.sets import photo
from helpers.small import ROOT
from helpers.tiny import tiny_model

from data_tools.__main__ import main as run_data_tool
from vit_static.__main__ import main
from vit_static.common.errors import escape
from vit_static.common.text import csv_row, escape_lines, json_line, path_of

pytestmark = pytest.mark.reliability("names: hostile, in all verbs")

FORGED = "forged: all is well"
# A line feed and a line of its own, colours, a C1 control character, an override of the direction, the separators of
# lines and paragraphs, a byte that isn't UTF-8, and what a spreadsheet would evaluate.
HOSTILE = f"=cmd|\n{FORGED}\r\x1b[31m\x85\u202e\u2066\u2028\u2029\udcff\x7f"
CLASSES = (HOSTILE, f"@2{HOSTILE}")
EDITED = tuple(name.replace("\udcff", "") for name in CLASSES)  # JSON has no bytes that aren't UTF-8
FOLDER = "folder\u202e\u2066\u2028"  # config keys refuse control characters
CONFIG = (
    tiny_model(num_classes=2)
    + """
data: {global_batch_size: 4, num_threads: 1}
train: {max_steps: 2}
log: {every_steps: 1}
eval: {batch_size: 4}
export: {num_calibration_images: 2}
"""
)


class Workplace(NamedTuple):
    folder: Path
    data: Path
    run: Path
    model: Path  # an exported folder, with class names that someone has edited
    image: Path


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


def run_here(*arguments: str) -> Done:
    """Run a verb in this process."""
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        code = main([*arguments, "-v"])
    return Done(code, stdout.getvalue(), stderr.getvalue())


def write_dataset(data: Path) -> Path:
    """Write class folders and images with hostile names, and return an image."""
    for split, num_images in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (data / split / name).mkdir(parents=True)
            for number in range(num_images):
                photo(16, 16, 10 * label + number).save(data / split / name / f"{number}{HOSTILE}.png", "PNG")
    return data / "val" / HOSTILE / f"0{HOSTILE}.png"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A finished run in a folder with a hostile name, on images of hostile names, and its export."""
    folder = tmp_path_factory.mktemp("work") / FOLDER
    folder.mkdir()
    image = write_dataset(folder / "data")
    (folder / "tiny.yaml").write_text(CONFIG)
    overrides = (f"data.root={folder / 'data'}", f"output_dir={folder / 'output'}")
    trained = run_here("pretrain", "-c", str(folder / "tiny.yaml"), "-o", overrides[0], "-o", overrides[1])
    place = Workplace(folder, folder / "data", folder / "output/tiny", folder / "model", image)
    exported = in_inference_process(run_here, "export", "--checkpoint", str(place.run), "--out", str(place.model))
    for done in (trained, exported):
        assert done.code == 0, done.stderr
        assert_harmless(done.stdout, done.stderr)
    assert_harmless((place.model / "MODEL_CARD.md").read_text("utf-8"))
    spec = json.loads((place.model / "vit_static.json").read_text())
    spec["class_names"] = list(EDITED)
    (place.model / "vit_static.json").write_text(json.dumps(spec))
    return place


def assert_harmless(*texts: str) -> None:
    """Check that text for people has only printable characters, line feeds and tabs, and that no name begins a line."""
    for text in texts:
        for line in text.split("\n"):
            assert line.replace("\t", "").isprintable(), ascii(line)
            assert not line.lstrip().startswith(FORGED), line


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def check_json(place: Workplace, done: Done) -> None:
    """Check that JSON is exact: a parser gets the names unchanged."""
    lines = [line for line in json_lines(done.stdout) if "top" in line]
    assert path_of(lines[0]) == str(place.image) and lines[0]["top"][0]["name"] in EDITED


def check_csv_of_predictions(place: Workplace, done: Done) -> None:
    head, row = csv.reader(done.stdout.splitlines())
    values = dict(zip(head, row, strict=True))
    assert values["path"] == escape(str(place.image))
    assert {values["name_1"], values["name_2"]} == {f"'{escape(name)}" for name in EDITED}
    assert 0.0 < float(values["probability_1"]) <= 1.0


def check_csv_of_classes(place: Workplace, done: Done) -> None:
    text = (place.folder / "classes.csv").read_text("utf-8")
    assert_harmless(text)
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 2 and all(row["name"].startswith(("'=cmd|", "'@2=cmd|")) for row in rows)
    assert all(float(row["f1"]) >= 0.0 for row in rows)


def check_page(place: Workplace, done: Done) -> None:
    page = (place.run / "report.html").read_text("utf-8")
    assert_harmless(re.sub(r"(?s)<style>.*?</style>", "", page))
    assert "cmd|" in page


def check_stdout(place: Workplace, done: Done) -> None:
    assert "cmd|" in done.stdout + done.stderr


def check_nothing(place: Workplace, done: Done) -> None:
    """What is shown has been checked already."""


Check = Callable[[Workplace, Done], None]
# What each verb is given; `{...}` are fields of Workplace.
VERBS: dict[str, tuple[list[str], Check]] = {
    "eval": (["eval", "--checkpoint", "{run}", "--per-class", "{folder}/classes.csv"], check_csv_of_classes),
    "average": (["average", "{run}", "{run}/model.pdparams", "--out", "{folder}/average"], check_nothing),
    "predict json": (["predict", "--model", "{model}", "{image}"], check_json),
    "predict csv": (["predict", "--model", "{model}", "--format", "csv", "{image}"], check_csv_of_predictions),
    "predict table": (["predict", "--model", "{model}", "--format", "table", "{image}"], check_stdout),
    "predict an image that isn't there": (["predict", "--model", "{model}", "{image}.none"], check_stdout),
    "visualize": (["visualize", "--model", "{model}", "{image}", "--out", "{folder}/maps"], check_nothing),
    "report": (["report", "{run}"], check_page),
    "convert": (
        ["convert", "--from", "{run}/model.pdparams", "--to", "{folder}/out.npz", "--format", "google"],
        check_nothing,
    ),
    "probe": (["probe", "--model", "{model}", "--only", "knn", "-o", "data.root={data}"], check_nothing),
    "plan": (["plan", "-c", "{folder}/tiny.yaml", "--world", "1"], check_nothing),
    "a config that isn't there": (["pretrain", "-c", "{folder}/none\n" + FORGED], check_nothing),
}


@pytest.mark.parametrize("name", VERBS)
def test_verbs_show_hostile_names_as_escapes(workplace: Workplace, name: str) -> None:
    arguments, check = VERBS[name]
    given = [each.format(**workplace._asdict()) for each in arguments]
    done = in_inference_process(run_here, *given) if "--model" in given else run_here(*given)
    assert done.code == (2 if "isn't there" in name else 0), done.stderr
    assert_harmless(done.stdout, done.stderr)
    check(workplace, done)


@pytest.mark.parametrize("tool", ["check", "folder", "shards"])
def test_data_tools_show_hostile_names_as_escapes(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / FOLDER
    image = write_dataset(root)
    (root / "val" / HOSTILE / f"bad{HOSTILE}.jpg").write_bytes(b"nothing")
    arguments = {
        "check": ["check", root],
        "folder": ["folder", "--root", root / "train"],
        "shards": ["shards", "--root", root, "--out", tmp_path / f"out_{FOLDER}"],
    }[tool]
    code = run_data_tool([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == {"check": 1, "folder": 2, "shards": 0}[tool]
    assert_harmless(captured.out, captured.err)
    assert escape(FOLDER) in captured.out + captured.err and image.exists()
    if tool == "check":
        problems = json.loads((root / "data_check.json").read_text("utf-8"))["problems"]
        assert any(path_of(problem) == f"val/{HOSTILE}/bad{HOSTILE}.jpg" for problem in problems)


def test_cells_of_csv_are_no_formulas_and_numbers_stay_numbers() -> None:
    values = ["=1+1", "+1", "-2.5e3", "-a", "@a", " =a", "\uff1da", "\t=a", "\0", "a\nb", "a,b", 'a"', None, -1.5, 7]
    cells = next(csv.reader([csv_row(values)]))
    assert cells[:8] == ["'=1+1", "+1", "-2.5e3", "'-a", "'@a", "' =a", "'\uff1da", "\\t=a"]
    assert cells[8:] == ["\\x00", "a\\nb", "a,b", 'a"', "", "-1.5", "7"]


def test_json_lines_are_printable_and_exact() -> None:
    """But for bytes that aren't UTF-8, which JSON can't hold."""
    value = {"name": HOSTILE.replace("\udcff", ""), "é动": ["\U000e0001", 1.5]}
    assert json_line(value).isprintable() and json.loads(json_line(value)) == value and "动" in json_line(value)
    assert json.loads(json_line([HOSTILE])) == [HOSTILE.replace("\udcff", "\\xff")]
    assert escape_lines("a\tb\x1b\nc\u2028") == "a\tb\\x1b\nc\\u2028"


# What is printed for programs, or is escaped by its caller.
PRINTING = {
    "vit_static/common/text.py",
    "vit_static/common/terminal.py",
    "vit_static/bench/peers/protocol.py",
    "vit_static/bench/harness.py",
}


def test_nothing_is_printed_but_by_the_functions_that_escape() -> None:
    """`print` and the streams' `write` would show a name as it is."""
    for path in sorted([*(ROOT / "vit_static").rglob("*.py"), *(ROOT / "data_tools").rglob("*.py")]):
        relative = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and relative not in PRINTING:
                called = ast.unparse(node.func)
                assert called not in ("print", "sys.stdout.write", "sys.stderr.write"), f"{relative}:{node.lineno}"
