"""Config of a small run, a finished run, and its metrics, for tests of complete runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.tiny import tiny_model
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.train.trainer import train

TINY = (
    tiny_model(dropout=0.1, drop_path_rate=0.1, drop_path_schedule="constant")
    + """
data: {global_batch_size: 16, num_threads: 1}
train: {epochs: 1.5}
checkpoint: {every_steps: 4, keep_last: 100}
log: {every_steps: 3}
seed: 5
"""
)


@pytest.fixture(name="config")  # the function can't have this name: hooks in conftest.py have an argument `config`
def small_config(tmp_path: Path, small_digits: Path) -> Config:
    """Return the config of a run of 11 steps that hasn't started."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return load_config(path, [f"data.root={small_digits}", f"output_dir={tmp_path / 'output'}"])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Config:
    """Return the config of a finished run of 11 steps. All tests share its folder, and must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    config = load_config(folder / "tiny.yaml", [f"data.root={small_digits}", f"output_dir={folder / 'output'}"])
    assert train(config)
    return config


@pytest.fixture
def run(finished: Config, tmp_path: Path) -> Config:
    """Return the config of a copy of that run, which a test may resume or damage."""
    shutil.copytree(finished.run_dir, tmp_path / "copy", symlinks=True)
    return finished.model_copy(update={"output_dir": str(tmp_path), "name": "copy"})


def metrics(run_dir: Path, kind: str) -> list[dict]:
    """Return the lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def event_names(run_dir: Path) -> list[str]:
    """Return the names of a run's events, except its starts and its checkpoints."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"event"' in line]
    return [event["event"] for event in events if event["event"] not in ("started", "checkpoint")]
