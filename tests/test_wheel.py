"""The wheel: its content and metadata, and the command that it installs, in an environment and a folder of its own.

Nothing is downloaded: what the wheel needs comes from the environment that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from helpers.small import ROOT

pytestmark = pytest.mark.slow

BUILT_FROM = ["vit_static", "configs", "data_tools", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]

# In the wheel's environment. `import data_tools` fails: it would be another package's.
SCRIPT = """
import importlib.util, pathlib
assert importlib.util.find_spec("data_tools") is None
import vit_static
from vit_static.config.loader import load_config
from vit_static.common.installation import DATA_TOOLS
from vit_static.doctor.machine import locked_versions
for name in DATA_TOOLS:
    importlib.import_module(f"vit_static.data_tools.{name}")
assert load_config(pathlib.Path("deit_s16")).model.variant == "S/16"
versions = locked_versions()
print(vit_static.__version__, versions["nvidia-dali-cuda120"], versions["paddlepaddle"])
"""


def source_files() -> set[str]:
    """The files that belong into the wheel, by their names in it."""
    folders = {"vit_static": "", "configs": "vit_static/", "data_tools": "vit_static/"}
    return {
        prefix + path.relative_to(ROOT).as_posix()
        for folder, prefix in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the source tree, with the setuptools of the test environment."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})"
    finished = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment, which sees the packages of the test environment."""
    folder = tmp_path_factory.mktemp("an environment")
    venv.create(folder, with_pip=False)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (site_packages / "test_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)], check=True)
    return folder


def run(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment without what points to the source tree."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIT_STATIC"))}
    return subprocess.run(
        [program, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=240, check=False
    )


def metadata(wheel: Path) -> Message[Any, Any]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_every_file_under_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == source_files()
    assert {name.partition("/")[0] for name in names} == {"vit_static"}


def test_the_metadata_are_complete(wheel: Path) -> None:
    fields = metadata(wheel)
    assert fields["Name"] in ("vit_static", "vit-static") and fields["Requires-Python"] == "<3.14,>=3.10"
    assert "Apache-2.0" in (fields["License"], fields["License-Expression"])
    assert all(fields[name] for name in ("Summary", "Author", "Keywords", "Description-Content-Type"))
    assert fields.get_payload().startswith("# ")
    pythons = {each.rpartition(" ")[2] for each in fields.get_all("Classifier", []) if "Python :: 3." in each}
    assert pythons == {"3.10", "3.11", "3.12", "3.13"}
    assert {"cpu", "gpu", "serve", "onnx"} <= set(fields.get_all("Provides-Extra", []))


def test_the_command_does_in_an_empty_folder_what_run_sh_does(installed: Path, tmp_path: Path) -> None:
    """Without arguments it trains the quickstart's model; here for two steps."""
    folder = tmp_path / "empty"
    folder.mkdir()
    command = installed / "bin" / "vit_static"
    done = run(command, "pretrain", "-o", "train.max_steps=2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "created data/digits: 1797 images" in done.stderr and "can't be written" not in done.stderr
    assert {path.name for path in folder.iterdir()} == {"data", "output"}
    assert (folder / "output/quickstart/model.pdparams").is_file()
    assert (folder / "output/quickstart/report.html").stat().st_size > 50_000

    (folder / "yaml.py").write_text("raise SystemExit('the wrong yaml')")
    shown = run(command, "help", "finetune", cwd=folder)
    assert (
        shown.returncode == 0 and shown.stdout.startswith("usage: vit_static finetune") and "run.sh" not in shown.stdout
    )
    tools = run(command, "data", cwd=folder)
    assert tools.returncode == 0 and tools.stdout.startswith("usage: vit_static data NAME")
    # Messages name the command and the pages by what they are called here.
    wrong = run(command, "pretrain", "-o", "data.root=nowhere", cwd=folder)
    assert wrong.returncode == 2 and "run.sh" not in wrong.stderr
    (package,) = installed.glob("lib/*/site-packages/vit_static")
    assert f"{package}/configs/IMAGENET.md" in wrong.stderr and (package / "configs" / "IMAGENET.md").is_file()


def test_data_tools_and_configs_are_found_inside_the_package(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "bin" / "python", "-c", SCRIPT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.1.0", "2.4.0", "3.3.1"]
