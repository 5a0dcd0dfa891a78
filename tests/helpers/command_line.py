"""run.sh as a subprocess, in the environment that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.small import ROOT


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


@pytest.fixture(scope="module", autouse=True)
def use_test_environment() -> Iterator[None]:
    """Make run.sh use the environment that runs the tests, provided that run.sh has set it up."""
    with pytest.MonkeyPatch.context() as patch:
        if not (Path(sys.prefix) / ".vit_static-setup").is_file():
            pytest.fail("run.sh would set this environment up again; run the tests with ./run.sh test")
        if Path(sys.prefix) != ROOT / ".venv":
            patch.setenv("VIRTUAL_ENV", sys.prefix)
        patch.setenv("VIT_STATIC_DEVICE", os.environ.get("VIT_STATIC_DEVICE", "cpu"))
        yield
