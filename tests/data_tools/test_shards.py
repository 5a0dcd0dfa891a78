"""`data shards`: its content for our reader and for NVIDIA's, resumed runs, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.shards import NUM_IMAGES, contents, open_split, pack
from helpers.small import ROOT
from nvidia.dali import fn, pipeline_def

from data_tools import shards as tool
from data_tools.__main__ import main
from vit_static.common.errors import DataError
from vit_static.common.io import lock


def test_shards_have_every_image_once_with_its_label(source: Path, tmp_path: Path) -> None:
    packed = open_split(pack(source, tmp_path / "packed"))
    assert len(list((tmp_path / "packed/train").glob("*.tar"))) > 2
    assert sorted(contents(packed)) == sorted(contents(open_split(source)))
    assert contents(packed) != contents(open_split(source))  # shuffled
    assert packed.class_names == ["cat", "cow", "dog"]
    assert contents(open_split(tmp_path / "packed", "val")) == contents(open_split(source, "val"))


def test_contents_txt_has_the_path_that_an_image_came_from(source: Path, tmp_path: Path) -> None:
    (source / "train/c0/image 0.jpeg").rename(source / "train/c0/image\n0.jpeg")
    root = pack(source, tmp_path / "packed")
    packed = open_split(root)
    sources = dict(line.split(" ", 1) for line in (root / "train/contents.txt").read_text().splitlines())
    for index in range(len(packed)):
        name = Path(packed.name(index)).relative_to(root / "train")
        assert (source / sources[str(name)].replace("\\n", "\n")).read_bytes() == packed.read(index)[0].tobytes()


def test_nvidias_reader_reads_the_shards(source: Path, tmp_path: Path) -> None:
    root = pack(source, tmp_path / "packed")
    packed = open_split(root)
    paths = sorted((root / "train").glob("*.tar"))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> tuple[Any, Any]:
        encoded, label = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg;png", "cls"],
        )
        return encoded, label

    built = pipeline()
    built.build()
    read = []
    for _ in range(NUM_IMAGES):
        encoded, label = built.run()
        read.append((encoded.as_array()[0].tobytes(), [int(label.as_array()[0].tobytes())]))
    assert read == contents(packed)


def test_the_same_source_gives_the_same_bytes_and_another_seed_another_order(source: Path, tmp_path: Path) -> None:
    first, again = pack(source, tmp_path / "a"), pack(source, tmp_path / "b")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 8
    assert all((first / path).read_bytes() == (again / path).read_bytes() for path in files)
    other = pack(source, tmp_path / "c", "--seed", "1")
    assert contents(open_split(other)) != contents(open_split(first))


@pytest.mark.parametrize("kill_after", [0.0, 0.05, 0.15])
def test_a_killed_run_can_be_resumed(source: Path, tmp_path: Path, kill_after: float) -> None:
    expected = pack(source, tmp_path / "expected")
    command = [sys.executable, "-m", "data_tools", "shards", "--root", str(source), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen([*command, "--shard-mb", "0.02"], cwd=ROOT, stdout=subprocess.DEVNULL)
    folder = tmp_path / "killed/train"
    while not list(folder.glob("*")) and process.poll() is None:
        pass  # until it writes
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.wait()
    if (folder / ".unfinished.json").exists():
        with pytest.raises(DataError, match="not finished"):
            open_split(tmp_path / "killed")
    pack(source, tmp_path / "killed")
    for path in sorted(expected.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(expected)).read_bytes()


def test_a_finished_dataset_stays_and_another_one_is_an_error(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = pack(source, tmp_path / "packed")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    pack(source, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before
    capsys.readouterr()
    for change in (["--seed", "1"], ["--shard-mb", "5"]):
        assert main(["shards", "--root", str(source), "--out", str(out), *change]) == 2
        assert "give another folder as --out" in capsys.readouterr().err
    (tmp_path / "mine/train").mkdir(parents=True)
    (tmp_path / "mine/train/thesis.txt").write_text("precious")
    assert main(["shards", "--root", str(source), "--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine/train/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--root and --out"),
        (["--root", "nowhere", "--out", "x"], "no such folder"),
        (["--root", "source", "--out", "source"], "the dataset itself"),
        (["--root", "source", "--out", "x", "--shard-mb", "0"], "--shard-mb"),
        (["--index", "source"], "no .tar files"),
    ],
)
def test_wrong_arguments_are_errors(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["shards", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_shards_may_have_several_labels_and_skipped_images(source: Path, tmp_path: Path) -> None:
    paths = [str(path.relative_to(source)) for path in sorted(source.glob("train/*/*"))]
    (source / "multi.txt").write_text(
        "".join(f"{path} 0,{n % 3}\n" if n % 3 else f"{path} 0\n" for n, path in enumerate(paths))
    )
    root = pack(source, tmp_path / "packed", "--train", "multi.txt")
    packed = open_split(root, multi_label=True)
    assert sorted(contents(packed)) == sorted(contents(open_split(source, train="multi.txt", multi_label=True)))
    bad = str(Path(packed.name(5)).relative_to(root))
    (root / "data_check.json").write_text(json.dumps({"problems": [{"path": bad, "stops_training": True}]}))
    remaining = open_split(root, multi_label=True, on_bad_image="skip")
    assert contents(remaining) == [image for index, image in enumerate(contents(packed)) if index != 5]
    assert packed.digest() != remaining.digest()
    assert remaining.name(5) == packed.name(6)


def test_shards_have_the_configured_size(source: Path, tmp_path: Path) -> None:
    root = pack(source, tmp_path / "packed")
    sizes = [path.stat().st_size for path in sorted((root / "train").glob("*.tar"))]
    assert max(sizes) <= 20_000 + 2 * tarfile.RECORDSIZE and np.mean(sizes[:-1]) > 10_000
    one = open_split(pack(source, tmp_path / "one", "--shard-mb", "0.000001"))
    assert len(one) == NUM_IMAGES and len(list((tmp_path / "one/train").glob("*.tar"))) == NUM_IMAGES
    assert tool.MANIFEST_FILE in {path.name for path in (root / "train").iterdir()}


def test_a_second_run_at_the_same_time_is_an_error(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    (out / "train").mkdir(parents=True)
    with lock(out / "train", "not here"):
        assert main(["shards", "--root", str(source), "--out", str(out)]) == 2
        assert "another run is writing it" in capsys.readouterr().err
    pack(source, out)


def test_names_that_arent_utf8_are_packed_and_listed(source: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xe9t\xe9.jpeg")
    next((source / "train/c0").glob("*.jpeg")).rename(source / "train/c0" / name)
    root = pack(source, tmp_path / "packed")
    assert sorted(contents(open_split(root))) == sorted(contents(open_split(source)))
    assert b" train/c0/\xe9t\xe9.jpeg\n" in (root / "train/contents.txt").read_bytes()
