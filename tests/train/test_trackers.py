"""Experiment trackers: what they get, packages that raise, end or hang, and secrets that stay out of files."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import wait_until
from helpers.runs import metrics
from helpers.small import ROOT
from PIL import Image

from vit_static.common.errors import UserError
from vit_static.config.schema import Config
from vit_static.report.run_log import read_metrics
from vit_static.train import trackers
from vit_static.train.log import RunLog
from vit_static.train.sinks import PICTURES, Record
from vit_static.train.start_point import check_settings
from vit_static.train.trackers import TrackerProcess
from vit_static.train.trainer import train

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "SWANLAB_API_KEY": "swanlab-key-that-no-file-has",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-password-that-no-file-has",
}
SCRIPT = """
import json, sys, time
from pathlib import Path
from vit_static.train.tracker_process import RunFacts, Tracker, run_tracker

class Recording(Tracker):
    def start(self, run: RunFacts, saved_id: str | None) -> str:
        {start}
        self.file = open({path!r}, "a")
        print(json.dumps([run.name, run.parameters, saved_id]), file=self.file)
        return "the-id"

    def log(self, step, numbers, pictures):
        {log}
        print(json.dumps([step, numbers, {{name: len(png) for name, png in pictures.items()}}]), file=self.file)

    def finish(self):
        {finish}
        self.file.close()

run_tracker(Recording(), iter(sys.stdin.buffer), Path(sys.argv[2]))
"""


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrackerProcess]:
    """Return tracker(start=..., log=..., finish=...), which makes a tracker with these statements."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def make(
        start: str = "pass", log: str = "pass", finish: str = "pass", timeout_s: float = 60.0, resumes: bool = False
    ) -> TrackerProcess:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(path=str(tmp_path / "lines"), start=start, log=log, finish=finish))
        return TrackerProcess(
            "recording", tmp_path, "tiny", {"optim.lr": 0.1}, timeout_s, resumes=resumes, module=(str(script),)
        )

    return make


def lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "lines").read_text().splitlines()]


def png() -> bytes:
    Image.new("RGB", (400, 300), "red").save(buffer := io.BytesIO(), "PNG", compress_level=0)
    return buffer.getvalue()  # larger than a pipe


def test_a_tracker_gets_numbers_and_pictures_and_continues_its_run(
    tmp_path: Path, tracker: Callable[..., TrackerProcess]
) -> None:
    picture = png()
    for first, resumes in ((1, False), (3, True), (5, False)):
        process = tracker(resumes=resumes)
        process.write(Record("event", first, 0.0, {"event": "start"}))
        process.write(Record("train", first, 0.1, {"loss": 1.5, "mfu": None, "note": "x", "lr": float("nan")}))
        process.write(Record("eval", first, 0.1, {"top1": 50.0}, tag="eval_real"))
        process.write(Record(PICTURES, first, 0.1, pictures={"eval/wrong": picture}))
        process.close()
    assert [line for line in lines(tmp_path) if line[0] == "tiny"][2][2] is None
    assert lines(tmp_path)[:8] == [
        ["tiny", {"optim.lr": 0.1}, None],
        *([1, {"train/loss": 1.5}, {}], [1, {"eval_real/top1": 50.0}, {}], [1, {}, {"eval/wrong": len(picture)}]),
        ["tiny", {"optim.lr": 0.1}, "the-id"],
        *([3, {"train/loss": 1.5}, {}], [3, {"eval_real/top1": 50.0}, {}], [3, {}, {"eval/wrong": len(picture)}]),
    ]


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ({"start": "raise RuntimeError('no key')"}, "its process has ended"),
        ({"start": "import os; os.kill(os.getpid(), 9)"}, "its process has ended"),
        ({"finish": "sys.exit(3)"}, "could not be closed (its process has ended with exit code 3"),
        ({"start": "time.sleep(1000)"}, "did not finish within 2 s"),
        ({"log": "time.sleep(1000)"}, "did not finish within 2 s"),
        ({"finish": "time.sleep(1000)"}, "did not finish within 2 s"),
    ],
)
def test_a_tracker_that_fails_or_hangs_stops_nothing(
    tmp_path: Path,
    tracker: Callable[..., TrackerProcess],
    capsys: pytest.CaptureFixture[str],
    statements: dict[str, str],
    message: str,
) -> None:
    process = tracker(**statements, timeout_s=2.0)
    longest_s = 0.0
    with RunLog(tmp_path, trackers=[process]) as log:
        for step in range(300):
            start = time.monotonic()
            log.record("train", step, 0.1, loss=1.0)
            longest_s = max(longest_s, time.monotonic() - start)
            if step == 0 and message == "its process has ended":
                wait_until(lambda: process.has_ended)
    assert longest_s < 2.0
    out, err = capsys.readouterr()
    assert message in out + err and "Traceback" not in out + err
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries if entry["kind"] == "train"] == list(range(300))


def test_records_for_a_tracker_that_hangs_are_bounded(
    tmp_path: Path,
    tracker: Callable[..., TrackerProcess],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "_MAX_WAITING", 50)
    process = tracker(start="time.sleep(1000)", timeout_s=0.5)
    with RunLog(tmp_path, trackers=[process]) as log:
        for step in range(2000):  # more than the pipe holds
            log.record("train", step, 0.1, loss=1.0)
    out, _ = capsys.readouterr()
    assert "can't be written (it doesn't answer" in out and "records are lost" in out
    assert len(metrics(tmp_path, "train")) == 2000


def test_an_entry_that_a_tracker_refuses_is_left_out(tmp_path: Path, tracker: Callable[..., TrackerProcess]) -> None:
    process = tracker(log="assert step != 2, 'refused'")
    for step in (1, 2, 3):
        process.write(Record("train", step, 0.1, {"loss": 1.0}))
    process.close()
    assert [line[0] for line in lines(tmp_path)[1:]] == [1, 3]
    assert "refused" in (tmp_path / "log/recording.log").read_text()


def test_a_run_with_packages_that_hang_and_raise_trains_to_its_end(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "wandb.py").write_text("import time\ntime.sleep(1000)\n")
    (packages / "mlflow.py").write_text("raise SystemError('broken')\n")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", f"{packages}:{ROOT}")
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    config = config.model_copy(
        update={"log": config.log.model_copy(update={"trackers": ("wandb", "mlflow"), "tracker_timeout_s": 1.0})}
    )
    assert train(config)
    out, err = capsys.readouterr()
    assert "Weights & Biases" in out + err and "MLflow" in out + err and "Traceback" not in out + err
    assert len(metrics(config.run_dir, "eval")) >= 1 and (config.run_dir / "model.pdparams").is_file()
    assert "broken" in (config.run_dir / "log/mlflow.log").read_text()
    assert_no_secrets(tmp_path)


def assert_no_secrets(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in SECRETS.values():
                assert secret.encode() not in content and base64.b64encode(secret.encode()) not in content, path


def test_a_missing_package_is_reported_before_the_run(config: Config) -> None:
    missing = [name for name in ("wandb", "mlflow", "swanlab") if importlib.util.find_spec(name) is None]
    for name in missing:
        changed = config.model_copy(update={"log": config.log.model_copy(update={"trackers": (name,)})})
        with pytest.raises(UserError, match=rf"log\.trackers: {name} is not installed.*pip install"):
            check_settings(changed, "auto")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab"])
def test_the_real_package_offline(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed, because it is heavy")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    for variable, secret in SECRETS.items():
        monkeypatch.setenv(variable, secret)
    config = config.model_copy(update={"log": config.log.model_copy(update={"trackers": (name,)})})
    assert train(config)
    assert "can't be written" not in (output := capsys.readouterr().out) and "could not" not in output
    if name == "mlflow":
        database = sqlite3.connect(config.run_dir.parent / "mlflow.db")
        rows = database.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        assert rows == [(line["step"], pytest.approx(line["loss"])) for line in metrics(config.run_dir, "train")]
        assert len(list(config.run_dir.parent.rglob("eval_wrong*.png"))) >= 1
    else:
        folder = {"wandb": "wandb/offline-run-*", "swanlab": "swanlog/run-*"}[name]
        (run,) = config.run_dir.glob(folder)
        assert any(run.rglob("*.png"))
    assert_no_secrets(tmp_path)
