"""WebDataset shards: other programs' files, and errors that name the file."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from helpers.shards import NUM_CLASSES, contents, open_split, pack

from data_tools.__main__ import main
from vit_static.common.errors import DataError
from vit_static.config.data_schema import AugmentConfig, DataConfig
from vit_static.data.loader import TrainLoader


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
