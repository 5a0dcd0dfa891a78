"""Small sets of real images for tests of whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_tools.digits import make_digits


def copy_of_some(source: Path, target: Path, train: int, val: int) -> None:
    """The first so many images of each class of a set."""
    for split, count in (("train", train), ("val", val)):
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, target / split / folder.name)
    shutil.copy(source / "class_names.txt", target)


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 3 validation images of each of the ten digits."""
    base = tmp_path_factory.mktemp("digits")
    make_digits(base / "all", "digit", 80)
    copy_of_some(base / "all", base / "some", 12, 3)
    return base / "some"
