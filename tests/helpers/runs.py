"""A small run for tests of whole runs, one that is finished, and what it leaves."""

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
    tiny_model(dropout=0.1, drop_path_rate=0.1)
    + """
data: {global_batch_size: 16, num_threads: 1}
train: {epochs: 1.5}
checkpoint: {every_steps: 4, keep_last: 100}
log: {every_steps: 3}
seed: 5
"""
)


@pytest.fixture(name="config")  # as conftest.py's hooks call another
def config_of_a_run(tmp_path: Path, small_digits: Path) -> Config:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return load_config(path, [f"data.root={small_digits}", f"output_dir={tmp_path / 'output'}"])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Config:
    """Of a run that was never interrupted, of 11 steps; it is all tests', to be read."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    found = load_config(folder / "tiny.yaml", [f"data.root={small_digits}", f"output_dir={folder / 'output'}"])
    assert train(found)
    return found


@pytest.fixture
def run(finished: Config, tmp_path: Path) -> Config:
    """A copy of that run, to be gone on with or spoilt."""
    shutil.copytree(finished.run_dir, tmp_path / "copy", symlinks=True)
    return finished.model_copy(update={"output_dir": str(tmp_path), "name": "copy"})


def metrics(run_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def happened(run_dir: Path) -> list[str]:
    """A run's events but its beginning and its checkpoints."""
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"event"' in line]
    return [event["event"] for event in events if event["event"] not in ("started", "checkpoint")]
