"""WebDataset shards: what is packed is what was there, for us and for NVIDIA's own reader; what is wrong is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.sets import photo
from helpers.small import ROOT
from nvidia.dali import fn, pipeline_def

from data_tools import shards as tool
from data_tools.__main__ import main
from vit_static.common.errors import DataError
from vit_static.common.io import lock
from vit_static.config.schema import AugmentConfig, DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.loader import TrainLoader
from vit_static.data.open_set import open_set

NUM_IMAGES, NUM_CLASSES = 23, 3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Class folders of JPEG and PNG files, and of one validation image a class."""
    root = tmp_path / "source"
    for number in range(NUM_IMAGES):
        folder = root / "train" / f"c{number % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        suffix = ("jpeg", "JPG", "png")[number % 3]
        photo(30 + number, 40, seed=number).save(folder / f"image {number}.{suffix}")
    for label in range(NUM_CLASSES):
        (root / "val" / f"c{label}").mkdir(parents=True)
        photo(30, 30, seed=100 + label).save(root / f"val/c{label}/v.jpeg")
    (root / "class_names.txt").write_text("c0 cat\nc1 cow\nc2 dog\n")
    return root


def pack(source: Path, out: Path, *arguments: str) -> Path:
    assert main(["shards", "--root", str(source), "--out", str(out), "--shard-mb", "0.02", *arguments]) == 0
    return out


def opened(root: Path, split: str = "train", **data: object) -> ImageDataset:
    return open_set(DataConfig(root=str(root), **data), split, NUM_CLASSES)  # type: ignore[arg-type]


def contents(images: ImageDataset) -> list[tuple[bytes, list[int]]]:
    return [(encoded.tobytes(), labels.tolist()) for encoded, labels in map(images.read, range(len(images)))]


def test_shards_hold_every_image_once_with_its_label(source: Path, tmp_path: Path) -> None:
    packed = opened(pack(source, tmp_path / "packed"))
    assert len(list((tmp_path / "packed/train").glob("*.tar"))) > 2
    assert sorted(contents(packed)) == sorted(contents(opened(source)))
    assert contents(packed) != contents(opened(source))  # shuffled
    assert packed.class_names == ["cat", "cow", "dog"]
    assert contents(opened(tmp_path / "packed", "val")) == contents(opened(source, "val"))


def test_an_images_name_leads_to_where_it_came_from(source: Path, tmp_path: Path) -> None:
    root = pack(source, tmp_path / "packed")
    packed = opened(root)
    came_from = dict(line.split(" ", 1) for line in (root / "train/contents.txt").read_text().splitlines())
    for number in range(len(packed)):
        name = Path(packed.name(number)).relative_to(root / "train")
        assert (source / came_from[str(name)]).read_bytes() == packed.read(number)[0].tobytes()


def test_nvidias_reader_takes_the_shards(source: Path, tmp_path: Path) -> None:
    root = pack(source, tmp_path / "packed")
    packed = opened(root)
    paths = sorted((root / "train").glob("*.tar"))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
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


def test_nvidias_indexes_and_tars_of_others_are_read(source: Path, tmp_path: Path) -> None:
    """Made by tar and indexed by DALI's own program: text beside, labels before images, a label with a newline."""
    folder = tmp_path / "others/train"
    folder.mkdir(parents=True)
    expected = []
    for number in range(4):
        content = (source / "train/c0/image 0.jpeg").read_bytes() + bytes(number)
        expected.append((content, [number % NUM_CLASSES]))
        for suffix, part in ((".cls", b"%d\n" % (number % NUM_CLASSES)), (".json", b"{}" * 40_000), (".jpg", content)):
            (folder / f"{number}{suffix}").write_bytes(part)
    names = sorted(path.name for path in folder.iterdir())
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in names:
            tar.add(folder / name, name)
            (folder / name).unlink()
    with pytest.raises(DataError, match="data shards --index"):
        opened(tmp_path / "others")
    assert main(["shards", "--index", str(folder)]) == 0
    assert contents(opened(tmp_path / "others")) == expected


def test_the_same_source_gives_the_same_bytes_and_another_seed_another_order(source: Path, tmp_path: Path) -> None:
    first, again = pack(source, tmp_path / "a"), pack(source, tmp_path / "b")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 8
    assert all((first / path).read_bytes() == (again / path).read_bytes() for path in files)
    other = pack(source, tmp_path / "c", "--seed", "1")
    assert contents(opened(other)) != contents(opened(first))


@pytest.mark.parametrize("kill_after", [0.0, 0.05, 0.15])
def test_a_killed_run_is_gone_on_with(source: Path, tmp_path: Path, kill_after: float) -> None:
    whole = pack(source, tmp_path / "whole")
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
            opened(tmp_path / "killed")
    pack(source, tmp_path / "killed")
    for path in sorted(whole.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(whole)).read_bytes()


def test_a_finished_set_is_left_alone_and_another_one_refused(source: Path, tmp_path: Path, capsys) -> None:
    out = pack(source, tmp_path / "packed")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    pack(source, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before
    capsys.readouterr()
    for change in (["--seed", "1"], ["--shard-mb", "5"]):
        assert main(["shards", "--root", str(source), "--out", str(out), *change]) == 2
        assert "name another --out" in capsys.readouterr().err
    (tmp_path / "mine/train").mkdir(parents=True)
    (tmp_path / "mine/train/thesis.txt").write_text("precious")
    assert main(["shards", "--root", str(source), "--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine/train/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--root and --out"),
        (["--root", "nowhere", "--out", "x"], "no such folder"),
        (["--root", "source", "--out", "source"], "the set itself"),
        (["--root", "source", "--out", "x", "--shard-mb", "0"], "--shard-mb"),
        (["--index", "source"], "no .tar files"),
    ],
)
def test_mistakes_are_named(source, tmp_path, monkeypatch, capsys, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["shards", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def harmed(root: Path, harm: str) -> Path:
    """What is wrong with the first shard, and its path."""
    shard = root / "train/000000.tar"
    index = shard.with_suffix(".idx")
    lines = index.read_text().splitlines()
    if harm == "cut off":
        shard.write_bytes(shard.read_bytes()[:3000])
    elif harm == "other index":
        index.write_text((root / "train/000001.idx").read_text().replace("v1.2 ", "v1.2 1"))
    elif harm == "no label":
        index.write_text("\n".join([lines[0], " ".join(lines[1].split()[:4]), *lines[2:]]) + "\n")
    elif harm == "no index":
        index.unlink()
    return shard


@pytest.mark.parametrize(
    ("harm", "said"),
    [("cut off", "another file's index"), ("other index", "no whole index"), ("no label", "lacks a label"),
     ("no index", "--index")],
)  # fmt: skip
def test_a_shard_that_cant_be_is_named_when_it_is_opened(source, tmp_path, harm: str, said: str) -> None:
    root = pack(source, tmp_path / "packed")
    shard = harmed(root, harm)
    with pytest.raises(DataError, match=said) as error:
        opened(root)
    assert str(shard.with_suffix("")) in str(error.value) and "\n" not in str(error.value)


def test_a_shard_that_vanishes_is_named_when_it_is_read(source: Path, tmp_path: Path) -> None:
    root = pack(source, tmp_path / "packed")
    images = opened(root)
    (root / "train/000001.tar").unlink()
    data = DataConfig(root=str(root), global_batch_size=4, num_threads=1)
    feed = TrainLoader(
        images, (32, 32), data, AugmentConfig(), seed=0, start_step=0, dp_rank=0, dp_size=1, device_id=None
    )
    with pytest.raises(DataError) as error:
        for _ in range(8):
            next(feed)
    assert str(root / "train/000001.tar") in str(error.value) and "No such file" in str(error.value)


def test_labels_are_checked_when_they_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    labels = ["0", "x", "0,2", "3", "-1", ""]
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, label in enumerate(labels):
            for name, content in ((f"{number}.jpg", b"image"), (f"{number}.cls", label.encode())):
                (tmp_path / name).write_bytes(content)
                tar.add(tmp_path / name, name)
    assert main(["shards", "--index", str(folder)]) == 0
    images = opened(tmp_path)
    assert images.read(0)[1].tolist() == [0]
    for number, said in ((1, "no number"), (2, "several labels"), (3, "label 3"), (4, "label -1"), (5, "no number")):
        with pytest.raises(DataError, match=said) as error:
            images.read(number)
        assert str(folder / f"a.tar/{number}.jpg") in str(error.value)
    assert opened(tmp_path, multi_label=True).read(2)[1].tolist() == [0, 2]


def test_several_labels_and_skipped_images_go_through_shards(source: Path, tmp_path: Path) -> None:
    listed = [str(path.relative_to(source)) for path in sorted(source.glob("train/*/*"))]
    (source / "multi.txt").write_text(
        "".join(f"{path} 0,{n % 3}\n" if n % 3 else f"{path} 0\n" for n, path in enumerate(listed))
    )
    root = pack(source, tmp_path / "packed", "--train", "multi.txt")
    packed = opened(root, multi_label=True)
    assert sorted(contents(packed)) == sorted(contents(opened(source, train="multi.txt", multi_label=True)))
    bad = str(Path(packed.name(5)).relative_to(root))
    (root / "data_check.json").write_text(json.dumps({"problems": [{"path": bad, "stops_training": True}]}))
    rest = opened(root, multi_label=True, on_bad_image="skip")
    assert contents(rest) == [image for number, image in enumerate(contents(packed)) if number != 5]
    assert packed.digest() != rest.digest()
    assert rest.name(5) == packed.name(6)


def test_shards_have_the_size_that_was_asked_for(source: Path, tmp_path: Path) -> None:
    root = pack(source, tmp_path / "packed")
    sizes = [path.stat().st_size for path in sorted((root / "train").glob("*.tar"))]
    assert max(sizes) <= 20_000 + 2 * tarfile.RECORDSIZE and np.mean(sizes[:-1]) > 10_000
    one = opened(pack(source, tmp_path / "one", "--shard-mb", "0.000001"))
    assert len(one) == NUM_IMAGES and len(list((tmp_path / "one/train").glob("*.tar"))) == NUM_IMAGES
    assert tool.MANIFEST_FILE in {path.name for path in (root / "train").iterdir()}


def test_two_runs_at_once_are_refused(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "packed"
    (out / "train").mkdir(parents=True)
    with lock(out / "train", "not here"):
        assert main(["shards", "--root", str(source), "--out", str(out)]) == 2
        assert "another run is writing it" in capsys.readouterr().err
    pack(source, out)


def test_names_that_are_no_text_are_packed_and_listed(source: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xe9t\xe9.jpeg")
    next((source / "train/c0").glob("*.jpeg")).rename(source / "train/c0" / name)
    root = pack(source, tmp_path / "packed")
    assert sorted(contents(opened(root))) == sorted(contents(opened(source)))
    assert b" train/c0/\xe9t\xe9.jpeg\n" in (root / "train/contents.txt").read_bytes()
