"""A run's first screen, TensorBoard events and traces, and the library output that stays off the console."""

from __future__ import annotations

import json
import os
import pty
import re
import struct
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import TINY, metrics
from helpers.small import ROOT
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from vit_static.common.errors import ConfigError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.data.image_set import FileDataset
from vit_static.data.list_file import ImageList, Labels
from vit_static.model import flops
from vit_static.model.variants import shape_of
from vit_static.parallel.mesh import MeshShape
from vit_static.train.run_spec import RunSpec
from vit_static.train.summary import expected_end, start_screen
from vit_static.train.trainer import train

# What Paddle's and DALI's own lines look like: glog's, their loggers', Python's warnings.
NOISE = re.compile(r"^[IWEF]\d{4} |\b(INFO|WARNING)\b|Warning:|ccache", re.MULTILINE)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    dumped = config.model_dump(by_alias=True)
    for name, values in sections.items():
        dumped[name] = {**dumped[name], **values}
    return Config.model_validate(dumped)


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def events_of(path: Path) -> list[Event]:
    """Read a file's events: records of a length, its checksum, the event, its checksum."""
    content, events, offset = path.read_bytes(), [], 0
    while offset < len(content):
        (length,) = struct.unpack_from("<Q", content, offset)
        events.append(Event.FromString(content[offset + 12 : offset + 12 + length]))
        offset += 12 + length + 4
    return events


def test_tensorboard_has_the_names_and_numbers_of_metrics(config: Config) -> None:
    """The last value of each step: TensorBoard's purge_step drops what a resumed run does again."""
    config = changed(config, checkpoint={"every_steps": 3}, log={"every_steps": 1})
    assert train(changed(config, train={"max_steps": 5}))
    last = config.run_dir / "checkpoints" / "step_00000003"
    assert train(changed(config, train={"max_steps": 7}), resume=str(last))
    shown: dict[tuple[str, int], float] = {}
    pictures: set[tuple[str, int]] = set()
    hyperparameters: list[bytes] = []
    files = sorted(config.run_dir.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
    for path in files:
        for event in events_of(path):
            if event.HasField("session_log"):
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                if value.HasField("image"):
                    pictures.add((value.tag, event.step))
                elif value.metadata.plugin_data.plugin_name == "hparams":
                    hyperparameters.append(value.metadata.plugin_data.content)
                else:
                    shown[value.tag, event.step] = value.simple_value
    assert {("eval/confusion_matrix", 5), ("eval/wrong", 7)} <= pictures
    contents = [HParamsPluginData.FromString(content) for content in hyperparameters]
    assert {content.session_start_info.hparams["optim.lr"].number_value for content in contents} >= {config.optim.lr}
    expected = {}
    for kind in ("train", "eval"):
        for line in metrics(config.run_dir, kind):
            for key, value in line.items():
                if key not in ("kind", "step", "epoch") and isinstance(value, (int, float)):
                    expected[f"{kind}/{key}", line["step"]] = value
    assert {step for _, step in expected} == {1, 2, 3, 4, 5, 6, 7} and len(files) == 2
    stale = {
        key for key in expected if key[0].startswith("eval/") and key[1] == 5
    }  # of the steps that the resumed run replaced
    assert set(shown) == set(expected) - stale
    assert shown == pytest.approx({key: expected[key] for key in shown}, rel=1e-6)


# -- the trace ---------------------------------------------------------------------------------------------------------


def test_the_trace_has_the_requested_steps_and_changes_no_bit(config: Config) -> None:
    config = changed(config, log={"every_steps": 1}, train={"max_steps": 6})
    plain, traced = changed(config), config.model_copy(update={"name": "traced"})
    assert train(plain)
    assert train(changed(traced, train={"profile_steps": [3, 4]}))
    losses = [[line["loss"] for line in metrics(run.run_dir, "train")] for run in (plain, traced)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert [path.name for path in traced.run_dir.glob("trace*")] == ["trace_steps_3_4.json"]
    trace = json.loads((traced.run_dir / "trace_steps_3_4.json").read_text())
    spans = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = {
        int(event["name"].split("[")[0].removeprefix("step ")): (event["ts"], event["ts"] + event["dur"])
        for event in spans
        if event["name"].startswith("step ")
    }
    assert set(steps) == {3, 4} and steps[3][1] <= steps[4][0]
    assert sum(event["name"].startswith("wait for data") for event in spans) == 2
    for begin, end in steps.values():
        operators = [
            event
            for event in spans
            if event["cat"] == "Operator" and begin <= event["ts"] and event["ts"] + event["dur"] <= end
        ]
        assert sum("matmul" in event["name"] or "linear" in event["name"] for event in operators) > 10


def test_an_invalid_range_of_steps_to_trace_is_refused() -> None:
    for steps in ("[5,4]", "[1,2000]", "[0,3]"):
        with pytest.raises(ConfigError, match="profile_steps"):
            load_config(ROOT / "configs" / "quickstart.yaml", [f"train.profile_steps={steps}"])


# -- the first screen --------------------------------------------------------------------------------------------------


def images_without_files(num_images: int) -> FileDataset:
    empty = np.zeros(num_images, np.int64)
    return FileDataset(Path("root"), ImageList(np.empty(0, np.uint8), empty, empty, Labels(empty)), [])


def test_the_first_screen() -> None:
    recipe = load_config(ROOT / "configs" / "deit3_b16.yaml", ["parallel.grad_accum_steps=2"])
    forward_gflop = 2 * flops.forward_macs(shape_of(recipe.model)) / 1e9
    mesh = {"world_size": 8, "device": "gpu", "dp": 4, "mp": 2, "pp": 1, "sharding_stage": 1, "micro_batches": 2}
    mesh |= {"batch_size": 2048, "batch_size_per_rank": 512, "precision": "O2 bfloat16", "passes": ["a", "b"]}
    images: dict[str, Any] = {
        "train_images": images_without_files(1_281_167),
        "val_images": images_without_files(50_000),
    }
    spec = RunSpec(recipe, 0, MeshShape(4, 2, 1), **images, total_steps=500_400, warmup_steps=3)
    info = {"mesh": mesh, "environment": {"gpu": "H100", "cpu": "a CPU"}}
    text = start_screen(spec, 7, "fresh weights", 86_600_000, info)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) <= 18
    for expected in (
        "B/16, 768 wide, 12 deep, 12 heads",
        f"86.60 M parameters; {forward_gflop:.2f} GFLOP per image",
        "1281167 training and 50000 validation images",
        "loss bce",
        "2048 images, 512 per data-parallel rank, in 2 micro-batches",
        "8 x gpu (H100): dp 4, mp 2, pp 1, sharding stage 1",
        "O2 bfloat16",
        "a, b",
        "lamb, lr",
        "500400 (799.9 epochs), starting after step 7",
    ):
        assert expected in " ".join(text.split()), expected


@pytest.mark.parametrize("num_columns", [40, 80, 200])
def test_the_first_screen_fits_the_terminal_counts_in_the_singular_and_names_no_variant_that_it_is_not(
    num_columns: int,
) -> None:
    config = load_config(None, ["model.depth=1", "model.variant=S/16", "log.every_steps=1", "train.epochs=1"])
    mesh = {"world_size": 1, "device": "cpu", "dp": 1, "mp": 1, "pp": 1, "sharding_stage": 0, "micro_batches": 1}
    mesh |= {"batch_size": 1, "batch_size_per_rank": 1, "precision": "O0 float32", "passes": []}
    images: dict[str, Any] = {"train_images": images_without_files(1024), "val_images": images_without_files(1)}
    spec = RunSpec(config, 0, MeshShape(1, 1, 1), **images, total_steps=1, warmup_steps=1)
    info = {"mesh": mesh, "environment": {"gpu": None, "cpu": "a CPU"}}
    text = start_screen(spec, 0, "fresh weights", 1_000_000, info, num_columns)
    assert max(map(len, text.splitlines())) <= min(num_columns, 100)
    words = " ".join(text.split())
    for expected in (
        "model ViT, 384 wide, 1 deep,",
        "1024 training and 1 validation image in",
        "batch 1 image,",
        "1 step of warmup",
        "steps 1 (1 epoch); evaluated every epoch, logged every step, saved at every evaluation",
    ):
        assert expected in words, expected
    assert "S/16" not in text


def test_the_expected_end() -> None:
    now = datetime(2026, 11, 30, 23, 59, 0, tzinfo=timezone.utc)
    assert expected_end(3723.0, now) == "expected end Tue 01 Dec 01:01:03, in 1 h 02 min"


# -- library output ----------------------------------------------------------------------------------------------------


def on_a_terminal(command: list[str], cwd: Path, environ: dict[str, str]) -> tuple[int, str]:
    """Run a command on a pseudo-terminal; return its exit code and everything that the terminal shows."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command, cwd=cwd, env=environ, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # every process on the terminal has ended
            break
        if not part:
            break
        shown += part
    os.close(master)
    return process.wait(timeout=60), shown.decode()


@pytest.fixture
def place(tmp_path: Path, small_digits: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "digits").symlink_to(small_digits)
    return tmp_path


COMMAND = [sys.executable, "-m", "vit_static", "pretrain", "-c", "tiny.yaml", "-o", "data.root=digits"]


def test_a_terminal_shows_the_screen_the_bar_and_no_noise(place: Path) -> None:
    code, shown = on_a_terminal(COMMAND, place, {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"})
    assert code == 0, shown
    assert not NOISE.search(shown)
    assert "compiling the first step" in shown and "\x1b[36m" in shown  # colours
    shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "passes " in shown and "expected end" in shown and "done in" in shown
    assert re.search(r"step 11/11 .*100%", shown), repr(shown)  # the bar
    log = (place / "output/tiny/log/rank_0.log").read_text()
    assert NOISE.search(log) and "images/s" not in log
    again, shown = on_a_terminal([*COMMAND, "--resume", "never", "-v"], place, {**os.environ, "PYTHONPATH": str(ROOT)})
    assert again == 0 and NOISE.search(shown)
    assert (place / "output/tiny/log/rank_0.log").read_text() == log


PROGRAM = """
import logging, os, sys, warnings
from pathlib import Path
from vit_static.common.library_output import library_output, redirect_library_output
from vit_static.common.startup import prepare_process
prepare_process()
os.write(1, b"of C++ on stdout\\n")
os.write(2, b"of C++ on stderr\\n")
warnings.warn("of Python")
logging.getLogger("any").warning("logged")
logging.basicConfig()
logging.getLogger("any").warning("logged again")
logging.getLogger("any").error("an error")
print("ours")
redirect_library_output(Path("log/rank_0.log"))
os.write(2, b"".join(b"line %d\\n" % number for number in range(100)))
assert library_output(3).splitlines() == [
    f"... the last 3 of {library_output().count(chr(10))} lines that libraries printed (log/rank_0.log has all):",
    "line 97", "line 98", "line 99",
]
if sys.argv[1:]:
    os.abort()
"""


def test_library_output_goes_to_the_log_and_ours_to_the_console(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "log").mkdir()
    (tmp_path / "log/rank_0.log").write_text("of an earlier run\n")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ours\n" and done.stderr.endswith("an error\n") and done.stderr.count("\n") == 1
    log = (tmp_path / "log/rank_0.log").read_text()
    lines = [
        "of an earlier run",
        "of C++ on stdout",
        "of C++ on stderr",
        "of Python",
        "logged",
        "logged again",
        "line 99",
    ]
    places = [log.index(line) for line in lines]
    assert places == sorted(places)


def test_the_last_lines_before_a_crash_are_in_the_log(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, "abort"]
    died = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert died.returncode < 0
    assert (tmp_path / "log/rank_0.log").read_text().endswith("line 99\n") or "line 99\n" in (
        tmp_path / "log/rank_0.log"
    ).read_text()
