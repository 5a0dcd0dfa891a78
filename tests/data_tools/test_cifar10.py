"""`data cifar10` with archives like CIFAR-10's, damaged archives, and archives that try to run code."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cifar_archive import NUM_IMAGES, make_batches, write_archive
from helpers.small import ROOT
from PIL import Image

from data_tools import cifar10 as tool
from data_tools.__main__ import main
from vit_static.config.data_schema import DataConfig
from vit_static.data.open_set import open_set


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_image_is_in_the_folder_of_its_label(tmp_path: Path, protocol: int) -> None:
    contents = make_batches()
    archive = write_archive(tmp_path / "cifar.tar.gz", contents, protocol)
    assert tool.unpack(archive, tmp_path / "out", NUM_IMAGES) is False
    for split, names in tool.BATCHES.items():
        images = open_set(DataConfig(root=str(tmp_path / "out")), split, 10)
        assert len(images) == NUM_IMAGES * len(names)
        assert images.class_names == tool.CLASSES
        for index in range(len(images)):
            path = Path(images.name(index))
            batch, position = divmod(int(path.stem), NUM_IMAGES)
            content = contents[names[batch]]
            assert images.read(index)[1].tolist() == [content[b"labels"][position]]
            red_green_blue = np.asarray(Image.open(path)).transpose(2, 0, 1).reshape(-1)
            np.testing.assert_array_equal(red_green_blue, content[b"data"][position])
    assert tool.unpack(archive, tmp_path / "out", NUM_IMAGES) is True


def pickle_as_python2(value: Any) -> bytes:
    """Return the pickle of Python 2's cPickle, protocol 2, with text and pixels as BINSTRING."""
    if isinstance(value, np.ndarray):
        shape = b"".join(map(pickle_as_python2, value.shape))
        dtype = (
            b"cnumpy\ndtype\n("
            + pickle_as_python2(b"u1")
            + b"K\0K\1tR(K\3"
            + pickle_as_python2(b"|")
            + b"NNNJ"
            + b"\xff" * 4
        )
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + pickle_as_python2(b"b") + b"tR(K\1("
            + shape + b"t" + dtype + b"J" + b"\xff" * 4 + b"K\0tb\x89" + pickle_as_python2(value.tobytes()) + b"tb"
        )  # fmt: skip
    if isinstance(value, dict):
        return b"}(" + b"".join(pickle_as_python2(item) for pair in value.items() for item in pair) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(pickle_as_python2, value)) + b"e"
    return b"J" + struct.pack("<i", value) if isinstance(value, int) else b"T" + struct.pack("<i", len(value)) + value


def test_an_archive_from_python_2_is_read(tmp_path: Path) -> None:
    contents = make_batches()
    old = write_archive(
        tmp_path / "old.tar.gz", {name: b"\x80\2" + pickle_as_python2(c) + b"." for name, c in contents.items()}
    )
    for name, (pixels, labels) in tool.read_archive(old, NUM_IMAGES).items():
        np.testing.assert_array_equal(pixels.transpose(0, 3, 1, 2).reshape(NUM_IMAGES, -1), contents[name][b"data"])
        assert labels == contents[name][b"labels"]


def test_a_damaged_archive_is_an_error_wherever_the_damage_is(tmp_path: Path) -> None:
    """With one changed bit. If the bit doesn't matter, as in a file's date, the content must be the same."""
    intact = write_archive(tmp_path / "cifar.tar.gz", make_batches())
    expected = tool.read_archive(intact, NUM_IMAGES)
    content, damaged = intact.read_bytes(), tmp_path / "damaged.tar.gz"
    rng = np.random.default_rng(0)
    num_refused = 0
    for offset, bit in zip(rng.integers(0, len(content), 100).tolist(), rng.integers(0, 8, 100).tolist(), strict=True):
        changed = bytearray(content)
        changed[offset] ^= 1 << bit
        damaged.write_bytes(changed)
        try:
            actual = tool.read_archive(damaged, NUM_IMAGES)
        except ValueError as error:
            assert "download it again" in str(error)
            num_refused += 1
        else:
            for name, (pixels, labels) in actual.items():
                np.testing.assert_array_equal(pixels, expected[name][0])
                assert labels == expected[name][1]
    assert num_refused > 90


def test_damaged_pickles_are_errors(tmp_path: Path) -> None:
    """With changed bytes at the start of a pickle, in a tar without a checksum."""
    raw = bytearray(gzip.decompress(write_archive(tmp_path / "cifar.tar.gz", make_batches()).read_bytes()))
    begin = raw.find(b"data_batch_1") + 512 - raw.find(b"data_batch_1") % 512
    rng = np.random.default_rng(0)
    for offset, byte in zip(rng.integers(0, 250, 200).tolist(), rng.integers(0, 256, 200).tolist(), strict=True):
        changed = bytearray(raw)
        changed[begin + offset] = byte
        (tmp_path / "damaged.tar").write_bytes(changed)
        try:
            tool.read_archive(tmp_path / "damaged.tar", NUM_IMAGES)
        except ValueError as error:
            assert "download it again" in str(error)


def test_the_classes_are_in_the_order_of_their_folders() -> None:
    assert sorted(tool.CLASSES) == tool.CLASSES


def failed(capsys: pytest.CaptureFixture[str], archive: Path, out: Path) -> str:
    assert main(["cifar10", "--archive", str(archive), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and not out.exists()
    return error


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch evil",)


@pytest.mark.parametrize("attack", ["a call", "eval"])
def test_no_code_in_an_archive_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], attack: str
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(Malicious()) if attack == "a call" else b'c__builtin__\neval\n(S\'open("evil","w")\'\ntR.'
    archive = write_archive(tmp_path / "evil.tar.gz", {**make_batches(), "data_batch_3": pickled})
    assert "it asks for" in failed(capsys, archive, tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_other_archives_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    intact = write_archive(tmp_path / "cifar.tar.gz", make_batches())
    assert "(30, 3072)" in failed(capsys, intact, out)  # too few images
    (tmp_path / "half.tar.gz").write_bytes(intact.read_bytes()[: intact.stat().st_size // 2])
    assert "download it again" in failed(capsys, tmp_path / "half.tar.gz", out)
    (tmp_path / "text.tar.gz").write_text("text")
    assert "download it again" in failed(capsys, tmp_path / "text.tar.gz", out)
    assert "nowhere.tar.gz" in failed(capsys, tmp_path / "nowhere.tar.gz", out)
    missing = {name: content for name, content in make_batches().items() if name != "data_batch_5"}
    assert "data_batch_5" in failed(capsys, write_archive(tmp_path / "m.tar.gz", missing), out)
    other = {**make_batches(), "batches.meta": {b"label_names": [b"apple"]}}
    assert "apple" in failed(capsys, write_archive(tmp_path / "o.tar.gz", other), out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_with_other_files_is_never_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    archive = write_archive(tmp_path / "cifar.tar.gz", make_batches())
    assert main(["cifar10", "--archive", str(archive), "--out", str(tmp_path / "mine")]) == 2
    assert "give another folder" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


def test_a_dataset_without_one_image_is_not_complete(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "cifar.tar.gz", make_batches())
    tool.unpack(archive, tmp_path / "out", NUM_IMAGES)
    next((tmp_path / "out/val/cat").iterdir()).unlink()
    with pytest.raises(ValueError, match="not the complete CIFAR-10"):
        tool.unpack(archive, tmp_path / "out", NUM_IMAGES)


def test_a_second_run_at_the_same_time_is_an_error(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "cifar.tar.gz", make_batches())
    with tool.locked_folder(tmp_path / ".out.part", tmp_path / "out") as part:
        (part / "set").mkdir()
        with pytest.raises(ValueError, match="another run is writing it"):
            tool.unpack(archive, tmp_path / "out", NUM_IMAGES)
        assert (part / "set").is_dir()
    assert tool.unpack(archive, tmp_path / "out", NUM_IMAGES) is False


def test_the_current_folder_can_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path / "cifar.tar.gz", make_batches())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert tool.unpack(archive, Path(), NUM_IMAGES) is False
    assert (tmp_path / "here/train/cat").is_dir()


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "cifar.tar.gz", make_batches())
    limited = f"""
import resource, sys
from pathlib import Path
from data_tools import cifar10
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # bytes; simulates a full disk
try:
    cifar10.unpack(Path(sys.argv[1]), Path(sys.argv[2]), {NUM_IMAGES})
except OSError:
    sys.exit(7)
"""
    command = [sys.executable, "-c", limited, str(archive), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, check=False)
    assert done.returncode == 7
    assert list(tmp_path.iterdir()) == [archive]


def test_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.part/set/train").mkdir(parents=True)
    archive = write_archive(tmp_path / "cifar.tar.gz", make_batches())
    assert tool.unpack(archive, tmp_path / "out", NUM_IMAGES) is False
    assert not (tmp_path / ".out.part").exists()
