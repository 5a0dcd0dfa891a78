"""Any metrics.jsonl gives a report: extreme numbers, damaged lines and binary among its entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_static.__main__ import main
from vit_static.report.curves import CURVES
from vit_static.report.page import write_comparison, write_report
from vit_static.report.run_log import read_metrics

pytestmark = pytest.mark.reliability("metrics files: damaged or extreme")

STARTED = '{"kind": "event", "step": 0, "event": "started", "total_steps": 9, "num_parameters": 5}\n'
TRAIN = '{"kind": "train", "step": %d, "loss": %s, "lr": %s, "seconds": %s, "images_per_s": %s, "memory_mb": %s}\n'
EVAL = '{"kind": "eval", "step": %d, "epoch": 1.0, "top1": %s, "loss": %s, "ema_top1": %s, "num_images": %s}\n'
DIGITS = "9" * 400
EXTREME = {
    "extreme but finite": ("-1e308", "1e308"),
    "largest": ("1.7976931348623157e308", "1.7976931348623157e308"),
    "smallest": ("5e-324", "-5e-324"),
    "smallest and one": ("5e-324", "1"),
    "neighbours": ("1.0", "1.0000000000000002"),
    "the largest that are shown": ("-1e100", "1e100"),
    "not a number": ("NaN", "Infinity"),
    "negative infinity": ("-Infinity", "1.0"),
    "too large for a float": (f"1{DIGITS}.0e999", "-1e999"),
    "400 digits": (DIGITS, f"-{DIGITS}"),
    "5000 digits": ("9" * 5000, "1"),
    "strings": ('"1e308"', '"\\u0000\\ud800"'),
    "other types": ("[[[1e400]]]", '{"a": true}'),
    "booleans": ("true", "null"),
}


def write_run(folder: Path, log: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(log)
    (folder / "config.yaml").write_text("name: odd\neval: {metric: [1]}\n")
    return folder


def check_reports(folder: Path) -> str:
    """Write the page of a run and its comparison with itself, and return the former."""
    write_comparison([folder, folder], folder / "two.html")
    return write_report(folder).read_text("utf-8")


@pytest.mark.parametrize("case", EXTREME)
def test_extreme_values_give_a_report(case: str, tmp_path: Path) -> None:
    first, second = EXTREME[case]
    log = STARTED
    for step, value in enumerate((first, second, first, "0.5"), 1):
        log += TRAIN % (step, *[value] * 5) + EVAL % (step, *[value] * 4)
    page = check_reports(write_run(tmp_path / "run", log.encode()))
    body = page.rsplit("<body>", 1)[1].rsplit("<script>", 1)[0]  # without the scripts
    assert "curve-train-loss" in body and "nan" not in body.lower().replace("nano", "")


@pytest.mark.parametrize(
    ("line", "num_unread"),
    [
        (b"\x00\xff\xfe\x80 binary \x1b\n", 1),
        (bytes(range(256)) * 40 + b"\n", 41),
        (b'{"kind": "train", "step": 2, "loss": "' + b"x" * (5 << 20) + b'"}\n', 1),
        (b"x" * (3 << 20), 1),
        (b"[" * 100_000 + b"\n", 1),
        (b'{"kind": "train", "step": ' + b"9" * 400 + b"}\n", 1),
        (b'{"kind": "train", "step": -1}\n{"kind": "train", "step": 1e3}\n{"kind": ["train"], "step": 1}\n', 3),
        (b'{"kind": "event", "step": 2, "event": "resumed", "mesh": ' + b'{"a": ' * 400 + b"1" + b"}" * 401 + b"\n", 0),
        (b'{"kind": "event", "step": 2, "event": {"a": []}, "time": [1], "environment": {"cpu": 1e999}}\n', 0),
        (b'{"kind": "event", "step": 0, "event": "started", "total_steps": "many", "num_parameters": -1e99}\n', 0),
        (b'{"kind": "eval_also", "step": 3, "set": "\\u2028<b>", "top1": 1e99}\n', 0),
        (b'{"kind": "train", "step": 1000000000000000, "loss": 1.0}\n', 0),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_damaged_lines_give_a_report(line: bytes, num_unread: int, tmp_path: Path) -> None:
    log = STARTED.encode() + (TRAIN % (1, 2.0, 0.1, 1, 100, 50)).encode() + line
    page = check_reports(write_run(tmp_path / "run", log + b"" if line.endswith(b"\n") else log))
    shown = f"lines of the log that can&#39;t be read</dt><dd>{num_unread}</dd>"
    assert (shown in page) == (num_unread > 0)
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 2 + line.count(b"\n") - num_unread + (
        0 if line.endswith(b"\n") else 1
    )


def test_a_log_of_other_bytes_gives_a_page_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = check_reports(write_run(tmp_path / "run", b"\x00\xff\n\x00\n"))
    assert f"{tmp_path}/run/metrics.jsonl: 2 unreadable lines left out" in capsys.readouterr().err
    assert "lines of the log that can&#39;t be read</dt><dd>2</dd>" in page


def test_an_empty_log_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(write_run(tmp_path / "run", b""))]) == 2
    assert "has no entries yet; wait for" in capsys.readouterr().err


numbers = st.one_of(st.floats(), st.integers(-(10**400), 10**400), st.sampled_from([5e-324, 1e308, -1e308, 1e100, 0]))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
keys = st.sampled_from([key for _, _, key in CURVES] + ["ema_top1", "seconds", "set", "time", "mesh", "event", "epoch"])
events = st.sampled_from(["started", "resumed", "rolled back", "finished", "early stop"])
entries = st.builds(
    lambda kind, step, event, values: {"kind": kind, "step": step, "event": event, **values},
    st.sampled_from(["train", "eval", "event", "eval_also"]),
    st.integers(0, 30),
    events,
    st.dictionaries(keys, st.one_of(numbers, json_values), max_size=8),
)


@settings(max_examples=25, deadline=None)
@given(log=st.lists(entries, min_size=1, max_size=12))
def test_any_entries_give_a_report(log: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    text = "".join(json.dumps(entry) + "\n" for entry in log)
    check_reports(write_run(tmp_path_factory.mktemp("any") / "run", text.encode("utf-8", "surrogatepass")))
