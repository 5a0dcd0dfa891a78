"""`data imagenet21k` with a miniature dataset with copies: PLSC's list, the dummy validation list, the cache."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sets import photo
from helpers.small import ROOT

from data_tools import imagenet21k as tool
from data_tools.__main__ import main
from vit_static.config.data_schema import DataConfig
from vit_static.data.open_set import open_set

CLASSES = ["n00004475", "n00005787", "n02087122", "n12492682"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Thirty images in four classes; some are in two or three classes, some twice in one class."""
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


def expected_lists(root: Path) -> tuple[list[str], list[str]]:
    """Return both lists, made with dictionaries of the files' digests, as PLSC's documentation describes them."""
    paths_by_digest = defaultdict(list)
    for path in sorted(root.glob("images/*/*.JPEG")):
        paths_by_digest[hashlib.md5(path.read_bytes()).hexdigest()].append(path.relative_to(root))
    lines = []
    for paths in paths_by_digest.values():
        labels = sorted({CLASSES.index(path.parent.name) for path in paths})
        lines.append((labels[0], str(paths[0]), labels))
    all_lines = [f"{path} {','.join(map(str, labels))}" for _, path, labels in sorted(lines)]
    dummy = [line for label in range(4) for line in [line for line in all_lines if line.split()[1] == str(label)][:20]]
    return all_lines, dummy


def read_lists(root: Path) -> tuple[list[str], list[str]]:
    names = (tool.ALL_LIST, tool.DUMMY_LIST)
    return tuple((root / name).read_text().splitlines() for name in names)  # type: ignore[return-value]


def test_an_image_is_listed_once_with_all_of_its_labels(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root) == 0
    assert read_lists(root) == expected_lists(root)
    all_lines, _ = read_lists(root)
    assert len(all_lines) == 30 and sum("," in line.split()[1] for line in all_lines) > 5
    output = capsys.readouterr().out
    assert "30 distinct images" in output and "-o data.multi_label=true -o model.num_classes=4" in output


def test_training_reads_the_lists(root: Path) -> None:
    assert run(root) == 0
    images = open_set(DataConfig(root=str(root), train=tool.ALL_LIST, multi_label=True), "train", 4)
    for index, line in enumerate(expected_lists(root)[0]):
        path, labels = line.split()
        assert images.name(index) == str(root / path)
        assert images.read(index)[1].tolist() == [int(label) for label in labels.split(",")]
    dummy = open_set(DataConfig(root=str(root), val=tool.DUMMY_LIST), "val", 4)
    assert len(dummy) == len(expected_lists(root)[1])


def test_the_dummy_list_has_at_most_twenty_images_per_class(root: Path) -> None:
    for number in range(30):
        photo(8, 8, seed=500 + number).save(root / f"images/n02087122/x{number:02d}.JPEG")
    assert run(root) == 0
    assert read_lists(root) == expected_lists(root)
    assert sum(line.endswith(" 2") for line in read_lists(root)[1]) == 20


def test_only_new_and_changed_files_are_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest_of = tool.digest_of

    def recording_digest_of(path: bytes) -> Any:
        read.append(Path(os.fsdecode(path)).name)
        return digest_of(path)

    monkeypatch.setattr(tool, "digest_of", recording_digest_of)
    num_files = len(list(root.glob("images/*/*.JPEG")))
    assert run(root) == 0
    assert len(read) == num_files
    read.clear()
    assert run(root) == 0
    assert read == []
    changed, removed = sorted(root.glob("images/*/*.JPEG"))[3:5]
    photo(16, 16, seed=900).save(changed)
    removed.unlink()
    photo(16, 16, seed=901).save(root / "images/n12492682/new.JPEG")
    assert run(root) == 0
    assert sorted(read) == sorted([changed.name, "new.JPEG"])
    assert read_lists(root) == expected_lists(root)


def test_a_killed_run_can_be_resumed(root: Path) -> None:
    script = """
import os, signal, sys
from data_tools import imagenet21k as tool
num_files, digest_of = int(sys.argv[1]), tool.digest_of
def digest_or_die(path):
    global num_files
    num_files -= 1
    if num_files < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return digest_of(path)
tool.digest_of = digest_or_die
tool.main(sys.argv[2:])
"""
    arguments = ["--root", str(root), "--num-classes", "4"]
    for num_files in (3, 15, 12, 30):
        done = subprocess.run([sys.executable, "-c", script, str(num_files), *arguments], cwd=ROOT, check=False)
        assert done.returncode in (0, -signal.SIGKILL)
        if done.returncode:
            assert not (root / tool.ALL_LIST).exists()
    assert run(root) == 0
    assert read_lists(root) == expected_lists(root)


def test_empty_files_and_other_files_are_left_out_and_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = expected_lists(root)
    for label in (0, 1, 3):
        (root / "images" / CLASSES[label] / "empty.JPEG").touch()
    (root / "images" / CLASSES[2] / "notes.txt").write_text("notes")
    (root / "images" / CLASSES[2] / ".hidden.JPEG").write_bytes(b"hidden")
    assert run(root) == 0
    assert read_lists(root) == expected
    assert (
        f"left out 4 files that are empty or not images, such as '{root}/images/n00004475/empty.JPEG'"
        in capsys.readouterr().err
    )


def test_words_txt_gives_the_names_of_classes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{wnid}\tname of {wnid}, its other\n" for wnid in ["n00000001", *CLASSES]))
    assert run(root, "--words", str(words)) == 0
    names = open_set(DataConfig(root=str(root), val=tool.DUMMY_LIST), "val", 4).class_names
    assert names == [f"name of {wnid}, its other" for wnid in CLASSES]
    (root / "class_names.txt").write_text("my names")
    assert run(root, "--words", str(words)) == 0
    assert (root / "class_names.txt").read_text() == "my names"
    assert "stays as it is" in capsys.readouterr().err
    words.write_text(f"{CLASSES[0]}\tone\n")
    assert f"{words}: has no name for {CLASSES[1]}" in failed(
        capsys, "imagenet21k", "--root", str(root), "--num-classes", "4", "--words", str(words)
    )


def test_a_second_run_at_the_same_time_is_an_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root) == 0
    capsys.readouterr()
    with tool.open_cache(root / tool.CACHE_FILE):
        error = failed(capsys, "imagenet21k", "--root", str(root), "--num-classes", "4")
    assert "another run is using it" in error and "remove" not in error
    assert run(root) == 0


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="limits the files of another process, which only Linux can"
)
def test_a_full_disk_is_an_error_and_the_cache_stays_valid(root: Path) -> None:
    limited = """
import resource, sys
from data_tools.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (24576, 24576))  # bytes; simulates a full disk
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
    assert read_lists(root) == expected_lists(root)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        tool.digest_of(os.fsencode(tmp_path / "gone.JPEG"))
    assert missing.value.filename == str(tmp_path / "gone.JPEG")
    (tmp_path / "cut.JPEG").touch()
    with pytest.raises(ValueError, match=r"cut\.JPEG: is empty; it has changed meanwhile"):
        tool.digest_of(os.fsencode(tmp_path / "cut.JPEG"))


def failed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(list(command)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_wrong_arguments_and_folders_are_errors(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["imagenet21k", "--root", str(root)]
    assert "4 class folders, not 21841" in failed(capsys, *command)
    assert "at least 1" in failed(capsys, *command, "--num-classes", "0")
    assert "images: no such folder" in failed(capsys, "imagenet21k", "--root", str(tmp_path / "nowhere"))
    (root / "images/n00000001").mkdir()
    assert f"{root}/images/n00000001: this class folder has no image" in failed(capsys, *command, "--num-classes", "5")
    (root / "images/n00000001.tar").touch()
    assert "tar xf" in failed(capsys, *command)
    (root / "images/n00000001.tar").unlink()
    (root / "images/n00000001").rmdir()
    (root / "images/n00004475/two\nlines.JPEG").write_bytes(b"image")
    assert "rename it" in failed(capsys, *command, "--num-classes", "4")
    (root / "images/n00004475/two\nlines.JPEG").unlink()
    (root / tool.CACHE_FILE).unlink(missing_ok=True)
    (root / tool.CACHE_FILE).write_bytes(b"not a database" * 100)
    assert "remove it" in failed(capsys, *command, "--num-classes", "4")


def test_merging_copies_of_a_million_files_is_what_a_dictionary_gives() -> None:
    rng = np.random.default_rng(0)
    contents = rng.integers(0, 700_000, 1_000_000)
    digests = np.stack([contents // 7, contents * 31 % 1000], axis=1).astype(np.uint64)
    labels = np.sort(rng.integers(0, 500, 1_000_000)).astype(np.int32)
    images = tool.merge_copies(digests, labels)
    expected: dict[int, list[int]] = {}
    for content, label in zip(contents.tolist(), labels.tolist(), strict=True):
        content_labels = expected.setdefault(content, [])
        if label not in content_labels[-1:]:
            content_labels.append(label)
    assert len(images.first_files) == len(expected)
    assert contents[images.first_files].tolist() == list(expected)
    assert images.labels.tolist() == [label for content_labels in expected.values() for label in content_labels]
    assert np.diff(images.offsets).tolist() == [len(content_labels) for content_labels in expected.values()]
