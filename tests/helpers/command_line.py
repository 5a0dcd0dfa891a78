"""run.sh as people call it, in the environment that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.small import ROOT


def run_sh(*arguments: object, cwd: Path, timeout: float = 240, **environ: str) -> subprocess.CompletedProcess[str]:
    """run.sh in the environment that runs the tests, so that it installs nothing."""
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
def the_tests_own_environment() -> Iterator[None]:
    """run.sh takes the active environment: this one, marked as set up, as it is where run.sh started the tests."""
    with pytest.MonkeyPatch.context() as patch:
        if not (Path(sys.prefix) / ".vit_static-setup").is_file():
            pytest.fail("run the tests with ./run.sh test: these start run.sh, which would set this environment up")
        if Path(sys.prefix) != ROOT / ".venv":
            patch.setenv("VIRTUAL_ENV", sys.prefix)
        patch.setenv("VIT_STATIC_DEVICE", os.environ.get("VIT_STATIC_DEVICE", "cpu"))
        yield
