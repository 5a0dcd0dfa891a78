"""`data imagenet21k` on a miniature with duplicates: the seed's list, the dummy validation list, the cache."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from helpers.sets import photo
from helpers.small import ROOT

from data_tools import imagenet21k as tool
from data_tools.__main__ import main
from vit_static.config.schema import DataConfig
from vit_static.data.open_set import open_set

CLASSES = ["n00004475", "n00005787", "n02087122", "n12492682"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Thirty images dealt out to four classes; some in two or three of them, some twice in one."""
    rng = np.random.default_rng(0)
    for number in range(30):
        photo(16, 16, seed=number).save(tmp_path / "image.jpeg")
        content = (tmp_path / "image.jpeg").read_bytes()
        for copy, label in enumerate(sorted(rng.integers(0, 4, 1 + (number % 4 == 0) + (number % 7 == 0)))):
            folder = tmp_path / "root/images" / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{CLASSES[label]}_{int(rng.integers(1000))}_{number}_{copy}.JPEG").write_bytes(content)
    return tmp_path / "root"


def run(root: Path, *arguments: str) -> int:
    return main(["imagenet21k", "--root", str(root), "--num-classes", "4", *arguments])


def by_hand(root: Path) -> tuple[list[str], list[str]]:
    """Both lists, by dictionaries over the files' digests, as the seed's page describes them."""
    paths_of = defaultdict(list)
    for path in sorted(root.glob("images/*/*.JPEG")):
        paths_of[hashlib.md5(path.read_bytes()).hexdigest()].append(path.relative_to(root))
    lines = []
    for paths in paths_of.values():
        labels = sorted({CLASSES.index(path.parent.name) for path in paths})
        lines.append((labels[0], str(paths[0]), labels))
    listed = [f"{path} {','.join(map(str, labels))}" for _, path, labels in sorted(lines)]
    dummy = [line for label in range(4) for line in [line for line in listed if line.split()[1] == str(label)][:20]]
    return listed, dummy


def lists(root: Path) -> tuple[list[str], list[str]]:
    names = (tool.ALL_LIST, tool.DUMMY_LIST)
    return tuple((root / name).read_text().splitlines() for name in names)  # type: ignore[return-value]


def test_an_image_is_listed_once_with_all_of_its_labels(root: Path, capsys) -> None:
    assert run(root) == 0
    assert lists(root) == by_hand(root)
    listed, _ = lists(root)
    assert len(listed) == 30 and sum("," in line.split()[1] for line in listed) > 5
    said = capsys.readouterr().out
    assert "30 distinct images" in said and "-o data.multi_label=true -o model.num_classes=4" in said


def test_the_list_is_what_training_reads(root: Path) -> None:
    assert run(root) == 0
    images = open_set(DataConfig(root=str(root), train=tool.ALL_LIST, multi_label=True), "train", 4)
    for number, line in enumerate(by_hand(root)[0]):
        path, labels = line.split()
        assert images.name(number) == str(root / path)
        assert images.read(number)[1].tolist() == [int(label) for label in labels.split(",")]
    dummy = open_set(DataConfig(root=str(root), val=tool.DUMMY_LIST), "val", 4)
    assert len(dummy) == len(by_hand(root)[1])


def test_no_more_than_twenty_of_a_class_are_dummies(root: Path) -> None:
    for number in range(30):
        photo(8, 8, seed=500 + number).save(root / f"images/n02087122/x{number:02d}.JPEG")
    assert run(root) == 0
    assert lists(root) == by_hand(root)
    assert sum(line.endswith(" 2") for line in lists(root)[1]) == 20


def test_files_are_read_once_and_changed_ones_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest_of = tool.digest_of
    monkeypatch.setattr(tool, "digest_of", lambda path: read.append(Path(os.fsdecode(path)).name) or digest_of(path))
    num_files = len(list(root.glob("images/*/*.JPEG")))
    assert run(root) == 0
    assert len(read) == num_files
    read.clear()
    assert run(root) == 0
    assert read == []
    changed, gone = sorted(root.glob("images/*/*.JPEG"))[3:5]
    photo(16, 16, seed=900).save(changed)
    gone.unlink()
    photo(16, 16, seed=901).save(root / "images/n12492682/new.JPEG")
    assert run(root) == 0
    assert sorted(read) == sorted([changed.name, "new.JPEG"])
    assert lists(root) == by_hand(root)


def test_a_killed_run_is_gone_on_with(root: Path) -> None:
    script = """
import os, signal, sys
from data_tools import imagenet21k as tool
left, digest_of = int(sys.argv[1]), tool.digest_of
def dying(path):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return digest_of(path)
tool.digest_of = dying
tool.main(sys.argv[2:])
"""
    arguments = ["--root", str(root), "--num-classes", "4"]
    for left in (3, 15, 12, 30):
        done = subprocess.run([sys.executable, "-c", script, str(left), *arguments], cwd=ROOT, check=False)
        assert done.returncode in (0, -signal.SIGKILL)
        if done.returncode:
            assert not (root / tool.ALL_LIST).exists()
    assert run(root) == 0
    assert lists(root) == by_hand(root)


def test_empty_files_and_what_is_no_image_are_left_out_and_named(root: Path, capsys) -> None:
    expected = by_hand(root)
    for label in (0, 1, 3):
        (root / "images" / CLASSES[label] / "empty.JPEG").touch()
    (root / "images" / CLASSES[2] / "notes.txt").write_text("notes")
    (root / "images" / CLASSES[2] / ".hidden.JPEG").write_bytes(b"hidden")
    assert run(root) == 0
    assert lists(root) == expected
    assert f"4 files left out, empty or no images, such as '{root}/images/n00004475/empty.JPEG'" in (
        capsys.readouterr().err
    )


def test_words_give_the_classes_names(root: Path, tmp_path: Path, capsys) -> None:
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{wnid}\tname of {wnid}, its other\n" for wnid in ["n00000001", *CLASSES]))
    assert run(root, "--words", str(words)) == 0
    names = open_set(DataConfig(root=str(root), val=tool.DUMMY_LIST), "val", 4).class_names
    assert names == [f"name of {wnid}, its other" for wnid in CLASSES]
    (root / "class_names.txt").write_text("my own")
    assert run(root, "--words", str(words)) == 0
    assert (root / "class_names.txt").read_text() == "my own"
    assert "is left as it is" in capsys.readouterr().err
    words.write_text(f"{CLASSES[0]}\tone\n")
    assert f"{words}: has no name for {CLASSES[1]}" in failed(
        capsys, "imagenet21k", "--root", str(root), "--num-classes", "4", "--words", str(words)
    )


def test_two_at_once_are_one_too_many(root: Path, capsys) -> None:
    assert run(root) == 0
    capsys.readouterr()
    with tool.opened_cache(root / tool.CACHE_FILE):
        error = failed(capsys, "imagenet21k", "--root", str(root), "--num-classes", "4")
    assert "another run is using it" in error and "remove" not in error
    assert run(root) == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits another process's files: Linux only")
def test_a_full_disk_is_an_error_and_what_was_read_stays(root: Path) -> None:
    limited = """
import resource, sys
from data_tools.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (24576, 24576))  # bytes; stands in for a full disk
sys.exit(main(sys.argv[1:]))
"""
    for number in range(400):
        (root / "images" / CLASSES[3] / f"{number}.JPEG").write_bytes(b"%d" % number)
    done = subprocess.run(
        [sys.executable, "-c", limited, "imagenet21k", "--root", str(root), "--num-classes", "4"],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert tool.CACHE_FILE in done.stderr and len(done.stderr.splitlines()) == 1 and "remove" not in done.stderr
    assert not (root / tool.ALL_LIST).exists()
    assert run(root) == 0
    assert lists(root) == by_hand(root)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        tool.digest_of(os.fsencode(tmp_path / "gone.JPEG"))
    assert missing.value.filename == str(tmp_path / "gone.JPEG")
    (tmp_path / "cut.JPEG").touch()
    with pytest.raises(ValueError, match=r"cut\.JPEG: is empty; it was changed meanwhile"):
        tool.digest_of(os.fsencode(tmp_path / "cut.JPEG"))


def failed(capsys, *command: str) -> str:
    assert main(list(command)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_mistakes_are_named(root: Path, tmp_path: Path, capsys) -> None:
    named = ["imagenet21k", "--root", str(root)]
    assert "4 class folders, not 21841" in failed(capsys, *named)
    assert "at least 1" in failed(capsys, *named, "--num-classes", "0")
    assert "images: no such folder" in failed(capsys, "imagenet21k", "--root", str(tmp_path / "nowhere"))
    (root / "images/n00000001").mkdir()
    assert f"{root}/images/n00000001: this class folder has no image" in failed(capsys, *named, "--num-classes", "5")
    (root / "images/n00000001.tar").touch()
    assert "tar xf" in failed(capsys, *named)
    (root / "images/n00000001.tar").unlink()
    (root / "images/n00000001").rmdir()
    (root / "images/n00004475/two\nlines.JPEG").write_bytes(b"image")
    assert "rename it" in failed(capsys, *named, "--num-classes", "4")
    (root / "images/n00004475/two\nlines.JPEG").unlink()
    (root / tool.CACHE_FILE).unlink(missing_ok=True)
    (root / tool.CACHE_FILE).write_bytes(b"no database at all" * 100)
    assert "remove it" in failed(capsys, *named, "--num-classes", "4")


def test_a_million_files_are_grouped_as_a_dictionary_does() -> None:
    rng = np.random.default_rng(0)
    contents = rng.integers(0, 700_000, 1_000_000)
    digests = np.stack([contents // 7, contents * 31 % 1000], axis=1).astype(np.uint64)
    labels = np.sort(rng.integers(0, 500, 1_000_000)).astype(np.int32)
    images = tool.distinct(digests, labels)
    expected: dict[int, list[int]] = {}
    for content, label in zip(contents.tolist(), labels.tolist(), strict=True):
        found = expected.setdefault(content, [])
        if label not in found[-1:]:
            found.append(label)
    assert len(images.first) == len(expected)
    assert contents[images.first].tolist() == list(expected)
    assert images.labels.tolist() == [label for found in expected.values() for label in found]
    assert np.diff(images.offsets).tolist() == [len(found) for found in expected.values()]
