"""Every write is atomic, and a disk that refuses it gives one line with path and size, and leaves what was there."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
from helpers.exported import Exported
from helpers.small_disk import run_on_small_disk
from helpers.write_faults import ERRNOS, FAULTS, failing

from data_tools.__main__ import main as run_data_tool
from vit_static.__main__ import main
from vit_static.common.drawing import write_png
from vit_static.common.errors import WriteError, describe_os_error, os_reason
from vit_static.common.io import write_atomically, write_errors, write_json
from vit_static.inference.predict import append_rows
from vit_static.weights.load import write_pdparams

pytestmark = pytest.mark.reliability("faults: writes of verbs and tools")

STATE = {"a": np.zeros(1000, np.float32)}


def write_features(path: Path) -> None:
    with append_rows(path, 4) as write_row:
        write_row(np.zeros(4, np.float32))


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json([1], path),
    "features": write_features,
    "picture": lambda path: write_png(np.zeros((4, 4, 3), np.uint8), path),
    "weights": lambda path: write_pdparams(STATE, path),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("call", "number"), FAULTS, ids=lambda value: errno.errorcode.get(value, value))
def test_a_fault_gives_one_line_and_keeps_the_file(
    writer: str, call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with failing(call, number, monkeypatch), pytest.raises(WriteError) as error:
        WRITERS[writer](path)
    message = str(error.value)
    assert message.startswith(f"{path}: can't be written ({os.strerror(number)})") and message.isprintable()
    assert "bytes are free" in message and "None" not in message and error.value.errno == number
    assert path.read_bytes() == b"before" and [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", ERRNOS)
def test_verbs_and_tools_end_with_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    write_dataset(tmp_path / "images")
    images = str(tmp_path / "images")
    expected_code = 2 if number == errno.EROFS else 1
    with failing("replace", number, monkeypatch):
        for run, arguments in (
            (main, ["report", str(tmp_path / "run")]),
            (run_data_tool, ["check", images]),
            (run_data_tool, ["folder", "--root", f"{images}/train"]),
            (run_data_tool, ["shards", "--root", images, "--out", str(tmp_path / "shards")]),
        ):
            code, captured = run(arguments), capsys.readouterr()
            line = captured.err.splitlines()[-1]
            assert code == expected_code and line.startswith("vit_static"), captured.err
            assert os.strerror(number) in line and str(tmp_path) in line and "Traceback" not in captured.err


def write_dataset(folder: Path) -> None:
    for number, (split, name) in enumerate(itertools.product(("train", "val"), "aabbb")):  # no two are the same
        write_png(np.full((8, 8, 3), number, np.uint8), folder / split / name / f"{number}.png")


def test_errors_of_other_files_and_of_the_block_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "file"):
        (tmp_path / "none").read_bytes()
    with pytest.raises(ZeroDivisionError), write_atomically(tmp_path / "file"):
        print(1 / 0)
    other = OSError(errno.EIO, "broken", "/another/disk/image.jpg")
    with pytest.raises(OSError, match=r"image\.jpg") as error, write_errors(tmp_path / "file"):
        raise other
    assert error.value is other
    with pytest.raises(WriteError, match="No space left") as wrapped, write_errors(tmp_path / "file", 1234):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert wrapped.value.errno == errno.ENOSPC and "1,234 bytes are needed" in str(wrapped.value)


def test_an_error_without_a_file_name_or_a_reason_is_never_none() -> None:
    for error in (OSError(), OSError("only a message"), OSError(errno.EIO, "reason"), OSError(errno.EIO, "r", "file")):
        assert "None" not in describe_os_error(error) and os_reason(error)
    texts = [describe_os_error(error) for error in (OSError(), OSError("only a message"))]
    assert texts == ["OSError", "only a message"]


ON_A_FULL_DISK = """
import contextlib, io, json, os, sys
from pathlib import Path
disk, model, run, image = map(Path, sys.argv[1:])
from data_tools.__main__ import main as data
from vit_static.__main__ import main

def fill():
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))

def convert(to):
    source = ["--from", str(run / "model.pdparams")]
    return lambda path: main(["convert", *source, "--to", str(path), "--format", to, "-v"])

def on_image(verb, option, is_folder):
    return lambda path: main(
        [verb, "--model", str(model), option, str(path.parent if is_folder else path), "-v", "--", str(image)]
    )

VERBS = {
    "features.npy": on_image("predict", "--features", False),
    "weights.npz": convert("google"),
    "weights.pdparams": convert("plsc"),
    "weights.safetensors": convert("timm"),
    "page.html": lambda path: main(["report", str(run), "--out", str(path), "-v"]),
    "maps/patch_filters.png": on_image("visualize", "--out", True),
    "exported/vit_static.json": lambda path: main(
        ["export", "--checkpoint", str(run), "--out", str(path.parent), "-v"]
    ),
    "digits/before": lambda path: data(["digits", "--out", str(path.parent / "new")]),
}
results = {}
for name, run_verb in VERBS.items():
    path = disk / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"{}")
    fill()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = run_verb(path)
    left = [each.name for each in path.parent.iterdir() if each.name.endswith(".part")]
    results[name] = [code, stderr.getvalue(), path.read_bytes() == b"{}", left]
    os.unlink(disk / "filler")
print(json.dumps(results))
"""


def test_verbs_on_a_full_disk(exported: Exported, tmp_path: Path) -> None:
    """A disk of 3 MB that is full: one line with the path, exit code 1, and the previous content."""
    results = run_on_small_disk(
        tmp_path, ON_A_FULL_DISK, exported.folder, exported.run, exported.validation_images()[0]
    )
    problems = {}
    for name, (code, stderr, is_unchanged, left) in results.items():
        lines = [line for line in stderr.splitlines() if "No space left on device" in line]
        is_line = len(lines) == 1 and lines[0].startswith("vit_static") and str(tmp_path) in lines[0]
        if not (code == 1 and is_line and "Traceback" not in stderr and is_unchanged and not left):
            problems[name] = (code, stderr[-800:], is_unchanged, left)
    assert not problems, json.dumps(problems, indent=1)
    sized = [results[name][1] for name in ("weights.npz", "weights.safetensors", "weights.pdparams", "page.html")]
    assert all("bytes are needed and" in stderr for stderr in sized)
