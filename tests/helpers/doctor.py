"""Runs of the doctor: the command in a copy of the package with a fault in it, and subjects for single checks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.forked_launch import run_forked_module
from helpers.small import ROOT
from helpers.tiny import tiny_model
from vit_static.config.loader import load_config
from vit_static.doctor.subject import Job, Subject

CONFIG = tiny_model() + "data: {root: nowhere, global_batch_size: 8, num_threads: 2}\n"


@dataclass(frozen=True)
class Report:
    """What the command printed and wrote."""

    code: int
    lines: list[str]
    stderr: str
    checks: dict[str, dict[str, Any]]  # by name, as in the JSON file; empty if it hasn't been written

    def line(self, name: str) -> str:
        (line,) = (line for line in self.lines if line[8:].startswith(f"{name} "))
        return line


class Doctor:
    """Calls the command in a folder of its own; `break_package` puts a fault into the code that it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.code = folder, ROOT
        (folder / "tiny.yaml").write_text(CONFIG)

    def break_package(self, file: str, old: str, new: str) -> None:
        """Replace text, which must occur, in a file of a copy of the package that later calls run."""
        if self.code == ROOT:
            self.code = self.folder / "code"
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "vit_static", self.code / "vit_static", ignore=ignored)
            for name in ("configs", ".requirements"):
                (self.code / name).symlink_to(ROOT / name)
        path = self.code / "vit_static" / file
        text = path.read_text()
        assert old in text, f"{file} has changed"
        path.write_text(text.replace(old, new))

    def __call__(self, *arguments: object, only: tuple[str, ...] = (), **environ: str) -> Report:
        results = self.folder / "results.json"
        results.unlink(missing_ok=True)
        flags = [argument for name in only for argument in ("--only", name)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PADDLE_"))}
        cache = {"XDG_CACHE_HOME": str(self.folder / "cache"), "PYTHONPATH": str(self.code)}
        done = run_forked_module(
            *("vit_static", "doctor", "-c", "tiny.yaml", "--json", results.name, *flags, *arguments),
            cwd=self.folder,
            timeout_s=400,
            environ=inherited | {"VIT_STATIC_DEVICE": "cpu"} | cache | environ,
        )
        written = json.loads(results.read_text())["checks"] if results.exists() else []
        checks = {check["name"]: check for check in written}
        return Report(done.returncode, done.stdout.splitlines(), done.stderr, checks)


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path)


def make_subject(tmp_path: Path, *overrides: str, **changed: Any) -> Subject:
    """Return the subject of the tiny config with overrides; `changed`: other fields of its job, or `device`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    device = changed.pop("device", None)
    job = {"checks": (), "failed": (), "world_size": 1, "num_local": 1, **changed}
    subject = Subject(load_config(path, overrides), Job(**job))
    if device is not None:
        subject.device, subject.device_id = device, 0 if device == "gpu" else None
    return subject


def fake_nvidia_smi(folder: Path, rows: list[str]) -> Mapping[str, str]:
    """Make an nvidia-smi that answers a query with these rows; return the variables with which it is found."""
    folder.mkdir(exist_ok=True)
    tool = folder / "nvidia-smi"
    listing = "\n".join(rows)
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{listing}\nEND\n")
    tool.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def gpu_row(
    index: int = 0, name: str = "NVIDIA A100-SXM4-40GB", driver: str = "560.35.03", capability: str = "8.0"
) -> str:
    """Return nvidia-smi's row of a GPU with 40,960 MiB, of which 40,000 are free."""
    return f"{index}, GPU-{index}abc, {name}, {driver}, {capability}, 40960, 40000"
