"""`data digits`: the images, their labels and their split; existing files are never overwritten."""

import hashlib
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_tools.__main__ import main
from vit_static.data.digits import make_digits

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 80
DIGIT_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# Images of each digit, 0 to 9, according to UCI's description of this part (optdigits.names, "Testing").
NUM_OF_DIGIT = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("made") / "digits", "digit", SIZE).root


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("made") / "parity", "parity", SIZE).root


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "data_tools", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=REPOSITORY, capture_output=True, text=True)


def images_of(root: Path) -> list[Path]:
    return sorted(root.rglob("*.jpeg"))


def source_index(path: Path) -> int:
    return int(path.stem.removeprefix("digit_"))


def contents(root: Path) -> dict[Path, tuple[int, str]]:
    """Return modification time and digest of every file."""
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in root.rglob("*")
        if path.is_file()
    }


def test_every_image_of_the_source_is_once_in_the_folder_of_its_digit(digits: Path) -> None:
    targets = load_digits().target
    paths = images_of(digits)
    assert sorted(map(source_index, paths)) == list(range(1797))
    assert all(int(path.parent.name) == targets[source_index(path)] for path in paths)
    assert Counter(int(path.parent.name) for path in paths) == dict(enumerate(NUM_OF_DIGIT))


def test_a_fifth_of_each_digit_is_for_validation(digits: Path) -> None:
    for digit, count in enumerate(NUM_OF_DIGIT):
        num_val = len(list((digits / "val" / str(digit)).iterdir()))
        num_train = len(list((digits / "train" / str(digit)).iterdir()))
        assert (num_train, num_val) == (count - count // 5, count // 5)


def test_no_validation_image_is_also_a_training_image(digits: Path) -> None:
    digests = {
        split: {hashlib.sha256(path.read_bytes()).digest() for path in images_of(digits / split)}
        for split in ("train", "val")
    }
    assert (len(digests["train"]), len(digests["val"])) == (1442, 355)
    assert not digests["train"] & digests["val"]


def test_every_image_shows_its_source(digits: Path) -> None:
    """Reduced by box means, it is within 20 grey levels of 255 on average over an image, and 90 at any pixel.

    Bicubic enlargement (a = -1/2) and then the mean of a box is, in one dimension, a filter with the weights -0.013,
    0.094, 0.838, 0.094, -0.013 (integrals of the kernel). In two dimensions, the positive weights outside the centre
    add up to 0.350, so that white neighbours raise a black pixel by at most 89.3. Images of different digits differ
    by 64 levels on average.
    """
    source = load_digits().images * (255 / 16)  # [1797, 8, 8]
    for path in images_of(digits):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE)), path
            grey = np.asarray(image, dtype=np.float64).mean(axis=2)
        reduced = grey.reshape(8, SIZE // 8, 8, SIZE // 8).mean(axis=(1, 3))  # [8, 8]
        difference = np.abs(reduced - source[source_index(path)])
        assert difference.mean() < 20 and difference.max() < 90, path


def test_the_parity_dataset_has_the_same_images_in_other_folders(digits: Path, parity: Path) -> None:
    expected = {
        (path.parts[-3], "odd" if int(path.parent.name) % 2 else "even", path.name): path.read_bytes()
        for path in images_of(digits)
    }
    assert {path.parts[-3:]: path.read_bytes() for path in images_of(parity)} == expected


def test_class_names_are_in_label_order(digits: Path, parity: Path) -> None:
    lines = (digits / "class_names.txt").read_text().splitlines()
    assert lines == [f"{digit} {word}" for digit, word in enumerate(DIGIT_WORDS)]
    assert (parity / "class_names.txt").read_text().splitlines() == ["even even", "odd odd"]
    for root in (digits, parity):
        folders = [line.split()[0] for line in (root / "class_names.txt").read_text().splitlines()]
        assert folders == sorted(path.name for path in (root / "train").iterdir())
        assert folders == sorted(path.name for path in (root / "val").iterdir())


def test_a_complete_dataset_is_not_written_again(digits: Path) -> None:
    before = contents(digits)
    done = run("digits", "--out", digits, "--size", str(SIZE))
    assert done.returncode == 0
    assert "already" in done.stdout
    assert contents(digits) == before


def test_a_folder_with_other_files_is_an_error_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    before = contents(tmp_path)
    done = run("digits", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"vit_static data digits: {tmp_path} ")
    assert "--out" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_dataset_of_another_size_or_without_one_file_is_an_error(tmp_path: Path) -> None:
    root = make_digits(tmp_path / "digits", "digit", 64).root
    for labels, size in (("digit", SIZE), ("parity", 64)):
        with pytest.raises(ValueError, match="not the complete dataset"):
            make_digits(root, labels, size)
    images_of(root)[0].unlink()
    before = contents(root)
    with pytest.raises(ValueError, match="not the complete dataset"):
        make_digits(root, "digit", 64)
    assert contents(root) == before


def test_two_runs_at_the_same_time_make_one_complete_dataset(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    processes = [
        subprocess.Popen(command("digits", "--out", root), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("written" in output for output in outputs) == 1
    assert len(images_of(root)) == 1797
    assert list(tmp_path.iterdir()) == [root]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert not make_digits(tmp_path, "digit", 64).already_existed
    assert len(images_of(tmp_path)) == 1797


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "63"], "at least 64"),
        (["--size", "big"], "invalid int value"),
        (["--labels", "colour"], "invalid choice"),
        (["--out", "a_file/digits"], "can't be created"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("no folder")
    assert main(["digits", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vit_static data digits: ") and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="limits the files of another process, which only Linux can"
)
def test_a_full_disk_is_an_error_and_leaves_no_files(tmp_path: Path) -> None:
    without_bytecode = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # would be subject to the limit, too
    process = subprocess.Popen(
        command("digits", "--out", tmp_path / "digits"),
        cwd=REPOSITORY,
        env=without_bytecode,
        stderr=subprocess.PIPE,
        text=True,
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, 1024))  # bytes; simulates a full disk
    error = process.communicate()[1]
    assert process.returncode == 1
    assert error.startswith("vit_static data digits: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_scikit_learn_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # makes the import fail as if it weren't installed
    assert main(["digits", "--out", str(tmp_path / "digits")]) == 2
    error = capsys.readouterr().err
    assert "pip install scikit-learn" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_error_for_an_unknown_tool_names_the_nearest() -> None:
    done = run("digit")
    assert done.returncode == 2
    assert "'digits'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["-h"]])
def test_the_tools_are_listed(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert "digits" in done.stdout
