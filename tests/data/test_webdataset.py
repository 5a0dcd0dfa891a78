"""WebDataset shards: their content for our reader and for NVIDIA's, and errors that name the file."""

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
    """Class folders of JPEG and PNG files, with one validation image per class."""
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


def open_split(root: Path, split: str = "train", **data: object) -> ImageDataset:
    return open_set(DataConfig(root=str(root), **data), split, NUM_CLASSES)  # type: ignore[arg-type]


def contents(images: ImageDataset) -> list[tuple[bytes, list[int]]]:
    return [(encoded.tobytes(), labels.tolist()) for encoded, labels in map(images.read, range(len(images)))]


def test_shards_have_every_image_once_with_its_label(source: Path, tmp_path: Path) -> None:
    packed = open_split(pack(source, tmp_path / "packed"))
    assert len(list((tmp_path / "packed/train").glob("*.tar"))) > 2
    assert sorted(contents(packed)) == sorted(contents(open_split(source)))
    assert contents(packed) != contents(open_split(source))  # shuffled
    assert packed.class_names == ["cat", "cow", "dog"]
    assert contents(open_split(tmp_path / "packed", "val")) == contents(open_split(source, "val"))


def test_contents_txt_has_the_path_that_an_image_came_from(source: Path, tmp_path: Path) -> None:
    root = pack(source, tmp_path / "packed")
    packed = open_split(root)
    sources = dict(line.split(" ", 1) for line in (root / "train/contents.txt").read_text().splitlines())
    for index in range(len(packed)):
        name = Path(packed.name(index)).relative_to(root / "train")
        assert (source / sources[str(name)]).read_bytes() == packed.read(index)[0].tobytes()


def test_nvidias_reader_reads_the_shards(source: Path, tmp_path: Path) -> None:
    root = pack(source, tmp_path / "packed")
    packed = open_split(root)
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


def test_other_tars_with_nvidias_indexes_are_read(source: Path, tmp_path: Path) -> None:
    """Indexed by DALI's wds2idx: with other members, labels before images, and labels that end with a newline."""
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
        open_split(tmp_path / "others")
    assert main(["shards", "--index", str(folder)]) == 0
    assert contents(open_split(tmp_path / "others")) == expected


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


def test_a_finished_dataset_stays_and_another_one_is_an_error(source: Path, tmp_path: Path, capsys) -> None:
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
def test_wrong_arguments_are_errors(source, tmp_path, monkeypatch, capsys, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["shards", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def damage_shard(root: Path, damage: str) -> Path:
    """Damage the first shard and return its path."""
    shard = root / "train/000000.tar"
    index = shard.with_suffix(".idx")
    lines = index.read_text().splitlines()
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:3000])
    elif damage == "other index":
        index.write_text((root / "train/000001.idx").read_text().replace("v1.2 ", "v1.2 1"))
    elif damage == "no label":
        index.write_text("\n".join([lines[0], " ".join(lines[1].split()[:4]), *lines[2:]]) + "\n")
    elif damage == "no index":
        index.unlink()
    return shard


@pytest.mark.parametrize(
    ("damage", "message"),
    [("truncated", "index of another file"), ("other index", "not a complete index"), ("no label", "lacks a label"),
     ("no index", "--index")],
)  # fmt: skip
def test_a_damaged_shard_is_named_when_it_is_opened(source, tmp_path, damage: str, message: str) -> None:
    root = pack(source, tmp_path / "packed")
    shard = damage_shard(root, damage)
    with pytest.raises(DataError, match=message) as error:
        open_split(root)
    assert str(shard.with_suffix("")) in str(error.value) and "\n" not in str(error.value)


def test_a_shard_that_is_removed_is_named_when_it_is_read(source: Path, tmp_path: Path) -> None:
    root = pack(source, tmp_path / "packed")
    images = open_split(root)
    (root / "train/000001.tar").unlink()
    data = DataConfig(root=str(root), global_batch_size=4, num_threads=1)
    loader = TrainLoader(
        images, (32, 32), data, AugmentConfig(), seed=0, start_step=0, dp_rank=0, dp_size=1, device_id=None
    )
    with pytest.raises(DataError) as error:
        for _ in range(8):
            next(loader)
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
    images = open_split(tmp_path)
    assert images.read(0)[1].tolist() == [0]
    errors = ["not the number", "several labels", "label 3", "label -1", "not the number"]
    for index, message in enumerate(errors, start=1):
        with pytest.raises(DataError, match=message) as error:
            images.read(index)
        assert str(folder / f"a.tar/{index}.jpg") in str(error.value)
    assert open_split(tmp_path, multi_label=True).read(2)[1].tolist() == [0, 2]


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


def test_a_second_run_at_the_same_time_is_an_error(source: Path, tmp_path: Path, capsys) -> None:
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
