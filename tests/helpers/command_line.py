"""run.sh as a subprocess, in the environment that runs the tests, and a folder with a finished run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.sets import copy_part
from helpers.small import ROOT
from helpers.tiny import tiny_model
from vit_static.data.digits import make_digits

TINY = (
    tiny_model(dropout=0.1)
    + """
data: {root: digits, global_batch_size: 16, num_threads: 1}
optim: {lr: 3e-3}
train: {epochs: 4}
eval: {every_epochs: 2}
log: {every_steps: 5}
"""
)
FINETUNE = (
    tiny_model(image_size=[24, 32], num_classes=2)
    + """
data: {root: parity, global_batch_size: 16, num_threads: 1}
train: {epochs: 1}
init: {from: output/tiny}
"""
)


def run_sh(*arguments: object, cwd: Path, timeout: float = 240, **environ: str) -> subprocess.CompletedProcess[str]:
    """Call run.sh in the environment that runs the tests, so that it installs nothing."""
    return subprocess.run(
        [ROOT / "run.sh", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@contextmanager
def environment_for_run_sh() -> Iterator[None]:
    """Make run.sh use the environment that runs the tests, provided that run.sh has set it up."""
    with pytest.MonkeyPatch.context() as patch:
        if not (Path(sys.prefix) / ".vit_static-setup").is_file():
            pytest.fail("run.sh would set this environment up again; run the tests with ./run.sh test")
        if Path(sys.prefix) != ROOT / ".venv":
            patch.setenv("VIRTUAL_ENV", sys.prefix)
        patch.setenv("VIT_STATIC_DEVICE", os.environ.get("VIT_STATIC_DEVICE", "cpu"))
        yield


@pytest.fixture(scope="module", autouse=True)
def use_test_environment() -> Iterator[None]:
    """Make run.sh use the environment that runs the tests, in every test of a module that imports this fixture."""
    with environment_for_run_sh():
        yield


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with small copies of both datasets, the configs and a finished pretraining run."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    for labels, name, per_class in (("digit", "digits", 12), ("parity", "parity", 40)):
        make_digits(folder / "all" / name, labels, 80)
        copy_part(folder / "all" / name, folder / name, per_class, per_class // 4)
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "finetune.yaml").write_text(FINETUNE)
    with environment_for_run_sh():
        pretrained = run_sh("pretrain", "-c", "tiny.yaml", cwd=folder)
    assert pretrained.returncode == 0, pretrained.stderr
    return folder
