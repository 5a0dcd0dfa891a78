"""Every write is atomic, and a disk that refuses it gives one line with path and size, and leaves what was there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
from helpers.disk_writers import FAULTS as DISK_FAULTS
from helpers.disk_writers import WRITERS, write_sources
from helpers.exported import Exported
from helpers.small_disk import run_on_small_disk
from helpers.write_faults import FAULTS, failing

from vit_static.common.drawing import write_png
from vit_static.common.errors import WriteError, describe_os_error, os_reason
from vit_static.common.io import write_atomically, write_errors, write_json, write_lines
from vit_static.inference.predict import append_rows
from vit_static.weights.load import write_pdparams

pytestmark = pytest.mark.reliability("faults: writes of verbs and tools")

STATE = {"a": np.zeros(1000, np.float32)}


def write_features(path: Path) -> None:
    with append_rows(path, 4) as write_row:
        write_row(np.zeros(4, np.float32))


FUNCTIONS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json([1], path),
    "lines": lambda path: write_lines(lambda: [b"a\n", b"b\n"], path),
    "features": write_features,
    "picture": lambda path: write_png(np.zeros((4, 4, 3), np.uint8), path),
    "weights": lambda path: write_pdparams(STATE, path),
}


@pytest.mark.parametrize("writer", FUNCTIONS)
@pytest.mark.parametrize(("call", "number"), FAULTS, ids=lambda value: errno.errorcode.get(value, value))
def test_a_fault_gives_one_line_and_keeps_the_file(
    writer: str, call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with failing(call, number, monkeypatch), pytest.raises(WriteError) as error:
        FUNCTIONS[writer](path)
    message = str(error.value)
    assert message.startswith(f"{path}: can't be written ({os.strerror(number)})") and message.isprintable()
    assert ("bytes are needed" in message) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert ("bytes are free" in message) == (number == errno.ENOSPC)
    assert "None" not in message and error.value.errno == number
    assert path.read_bytes() == b"before" and [each.name for each in tmp_path.iterdir()] == ["file"]


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


def test_every_writer_on_a_bad_disk(exported: Exported, tmp_path: Path, tally: Callable[..., None]) -> None:
    """One line that names what was to be written, its size if the disk is full, and not a byte changed.

    A disk of 3 MB is filled or mounted read-only for real; quotas and damage are faults of the calls that write.
    """
    (tmp_path / "disk").mkdir()
    write_sources(tmp_path / "archives")
    results = run_on_small_disk(
        tmp_path / "disk", "from helpers.disk_writers import main\nmain()",
        exported.folder, exported.run, exported.digits, tmp_path / "archives",
    )  # fmt: skip
    assert [(name, fault) for name, fault, *_ in results] == list(itertools.product(WRITERS, DISK_FAULTS))
    problems = [result for result in results if not is_clean(*result, disk=tmp_path / "disk")]
    assert not problems, json.dumps(problems, indent=1)
    tally("faults: writers on a full, read-only, damaged disk", len(results))


def is_clean(name: str, fault: str, code: int, stderr: str, added: list[str], disk: Path) -> bool:
    """Return whether a writer has ended as it must: `added` are the files that are new or changed."""
    writer, reason = WRITERS[name], os.strerror(getattr(errno, fault))
    size = {"ENOSPC": r"(at least )?[\d,]+ bytes are needed and [\d,]+ bytes are free; "}
    # `data check` tries to write before it reads the images, when the size isn't known yet.
    size["EDQUOT"] = r"((at least )?[\d,]+ bytes are needed; )" + "?" * name.startswith("data check")
    path = re.escape(f"{disk / Path(writer.path).parts[0]}")
    line = (
        rf"vit_static( data \w+)?: {path}\S*: can't be written \({re.escape(reason)}\); {size.get(fault, '')}"
        r"what was there before is unchanged; (make room, or )?use another path"
    )
    lines = [each for each in stderr.splitlines() if reason in each]
    is_one_line = len(lines) == 1 and re.fullmatch(line, lines[0]) is not None and "Traceback" not in stderr
    is_unchanged = all(re.fullmatch(writer.added, each) for each in added) and not any(".part" in a for a in added)
    return is_one_line and ".part" not in lines[0] and code == (2 if fault == "EROFS" else 1) and is_unchanged
