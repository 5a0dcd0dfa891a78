"""`data cifar10` on archives made as CIFAR-10's was, and on such as want to run something."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import cifar10 as tool
from data_tools.__main__ import main
from vit_static.config import DataConfig
from vit_static.data.sets import open_set

NUM_IMAGES = 30  # a batch


def batches() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    names = [name for names in tool.BATCHES.values() for name in names]
    found: dict[str, Any] = {
        name: {
            b"batch_label": b"one of them",
            b"labels": [int(label) for label in rng.permutation(np.arange(NUM_IMAGES) % 10)],
            b"data": rng.integers(0, 256, (NUM_IMAGES, 3072), np.uint8),
            b"filenames": [b"x.png"] * NUM_IMAGES,
        }
        for name in names
    }
    found["batches.meta"] = {b"label_names": [name.encode() for name in tool.CLASSES], b"num_vis": 3072}
    return found


def write(path: Path, contents: dict[str, Any], protocol: int = 2) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            pickled = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(pickled)
            tar.addfile(member, io.BytesIO(pickled))
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_image_is_where_its_label_says(tmp_path: Path, protocol: int) -> None:
    contents = batches()
    archive = write(tmp_path / "cifar.tar.gz", contents, protocol)
    assert tool.unpack(archive, tmp_path / "out", NUM_IMAGES) is False
    for split, names in tool.BATCHES.items():
        images = open_set(DataConfig(root=str(tmp_path / "out")), split, 10)
        assert len(images) == NUM_IMAGES * len(names)
        assert images.class_names == tool.CLASSES
        for number in range(len(images)):
            path = Path(images.name(number))
            batch, place = divmod(int(path.stem), NUM_IMAGES)
            content = contents[names[batch]]
            assert images.read(number)[1].tolist() == [content[b"labels"][place]]
            red_green_blue = np.asarray(Image.open(path)).transpose(2, 0, 1).reshape(-1)
            np.testing.assert_array_equal(red_green_blue, content[b"data"][place])
    assert tool.unpack(archive, tmp_path / "out", NUM_IMAGES) is True


def test_the_classes_are_in_the_order_of_their_folders() -> None:
    assert sorted(tool.CLASSES) == tool.CLASSES


def failed(capsys, archive: Path, out: Path) -> str:
    assert main(["cifar10", "--archive", str(archive), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and not out.exists()
    return error


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch evil",)


@pytest.mark.parametrize("what", ["a call", "eval"])
def test_nothing_in_an_archive_is_run(tmp_path: Path, monkeypatch, capsys, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Evil()) if what == "a call" else b'c__builtin__\neval\n(S\'open("evil","w")\'\ntR.'
    archive = write(tmp_path / "evil.tar.gz", {**batches(), "data_batch_3": evil})
    assert "it asks for" in failed(capsys, archive, tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_other_archives_are_refused(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    whole = write(tmp_path / "cifar.tar.gz", batches())
    assert "(30, 3072)" in failed(capsys, whole, out)  # a miniature is not CIFAR-10
    (tmp_path / "half.tar.gz").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "fetch it again" in failed(capsys, tmp_path / "half.tar.gz", out)
    (tmp_path / "text.tar.gz").write_text("text")
    assert "fetch it again" in failed(capsys, tmp_path / "text.tar.gz", out)
    assert "nowhere.tar.gz" in failed(capsys, tmp_path / "nowhere.tar.gz", out)
    missing = {name: content for name, content in batches().items() if name != "data_batch_5"}
    assert "data_batch_5" in failed(capsys, write(tmp_path / "m.tar.gz", missing), out)
    other = {**batches(), "batches.meta": {b"label_names": [b"apple"]}}
    assert "apple" in failed(capsys, write(tmp_path / "o.tar.gz", other), out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    archive = write(tmp_path / "cifar.tar.gz", batches())
    assert main(["cifar10", "--archive", str(archive), "--out", str(tmp_path / "mine")]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


def test_a_killed_runs_leftovers_are_no_set(tmp_path: Path) -> None:
    (tmp_path / ".out.part/train").mkdir(parents=True)
    archive = write(tmp_path / "cifar.tar.gz", batches())
    assert tool.unpack(archive, tmp_path / "out", NUM_IMAGES) is False
    assert not (tmp_path / ".out.part").exists()
