"""All that writes files, on a small disk that is full, over quota, damaged or read-only, in a process of its own."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import cifar_archive, imagenet_archives

ROOM = 8192  # bytes that the full disk still has
_REMOUNT, _READ_ONLY = 32, 1  # sys/mount.h


@dataclass(frozen=True)
class Sources:
    """What is read, on another disk: an exported model, its run, a data set, and archives of public data sets."""

    model: Path
    run: Path
    digits: Path
    archives: Path

    @property
    def image(self) -> Path:
        return next((self.digits / "val/3").iterdir())


@dataclass(frozen=True)
class Writer:
    """A verb or tool, which gets the path to write."""

    run: Callable[[Path, Sources], int]
    path: str  # relative to the disk
    room: int = ROOM  # on the full disk, in bytes
    added: str = ""  # a regular expression for files with which the same command resumes
    prepare: Callable[[Path], None] | None = None


def verb(*words: str, path: str, room: int = ROOM, added: str = "") -> Writer:
    """Return a writer for words, in which {name} stands for a source, {path} for the path, {folder} for its folder."""

    def run(path: Path, sources: Sources) -> int:
        from data_tools.__main__ import main as run_tool
        from vit_static.__main__ import main as run_verb

        names = {name: getattr(sources, name) for name in ("model", "run", "digits", "archives", "image")}
        arguments = [word.format(path=path, folder=path.parent, **names) for word in words]
        return run_tool(arguments[1:]) if arguments[0] == "data" else run_verb([arguments[0], "-v", *arguments[1:]])

    return Writer(run, path, room, added)


def unpack_cifar10(path: Path, sources: Sources) -> int:
    """Call the tool with the number of images that its miniature archive has."""
    from data_tools import cifar10
    from data_tools.__main__ import main

    number = cifar_archive.NUM_IMAGES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10.unpack, "__defaults__", (number,))
        return main(["cifar10", "--archive", str(sources.archives / "cifar.tar.gz"), "--out", str(path)])


def unpack_imagenet(path: Path, sources: Sources) -> int:
    """Call the tool with the numbers of the miniature archives, and without its look at the room before it begins."""
    from data_tools import imagenet
    from data_tools.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet, "check_room", lambda *_: None)
        return main(imagenet_archives.arguments(sources.archives, path))


def list_imagenet21k(path: Path, sources: Sources) -> int:
    """Call the tool, which writes into the data set's folder."""
    from data_tools.__main__ import main

    return main(["imagenet21k", "--root", str(path), "--num-classes", "2"])


def make_imagenet21k(root: Path) -> None:
    """Write two classes with so many images that their digests need more than the room."""
    for number in range(300):
        folder = root / f"images/n0000000{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPEG").write_bytes(b"%d" % number)


CONVERT = ("convert", "--from", "{run}/model.pdparams", "--to", "{path}", "--format")
WRITERS = {
    "predict --features": verb(
        "predict", "--model", "{model}", "--features", "{path}", "{digits}/val", path="f.npy", room=0
    ),
    "convert to .npz": verb(*CONVERT, "google", path="weights.npz"),
    "convert to .pdparams": verb(*CONVERT, "plsc", path="weights.pdparams"),
    "convert to .safetensors": verb(*CONVERT, "timm", path="weights.safetensors"),
    "report": verb("report", "{run}", "--out", "{path}", path="page.html"),
    "visualize": verb(
        "visualize", "--model", "{model}", "--out", "{folder}", "--", "{image}", path="maps/patch_filters.png",
        added=r"maps/position_similarity\.png",
    ),
    "export": verb(
        "export", "--checkpoint", "{run}", "--out", "{folder}", "-o", "export.num_check_images=4",
        path="exported/vit_static.json",
    ),
    "data digits": verb("data", "digits", "--size", "64", "--out", "{path}", path="new/digits"),
    "data folder": verb(
        "data", "folder", "--root", "{digits}/train", "--out", "{path}", path="new/split", room=4096, added="new.*"
    ),
    "data check --json": verb(
        "data", "check", "{archives}/damaged", "--json", "{path}", path="c.json", room=65536, added=r"\.c\.journal",
    ),
    "data check --fix": verb(
        "data", "check", "{digits}", "--json", "{archives}/c.json", "--fix", "{path}", path="fixed"
    ),
    "data shards": verb("data", "shards", "--root", "{digits}", "--out", "{path}", path="shards", added=r"shards.*"),
    "data cifar10": Writer(unpack_cifar10, "cifar"),
    "data imagenet": Writer(unpack_imagenet, "imagenet", 20480, r"imagenet.*"),
    "data imagenet21k": Writer(list_imagenet21k, "in21k", prepare=make_imagenet21k),
}  # fmt: skip


def write_sources(folder: Path) -> None:
    """Write the archives, and a data set whose report is long."""
    imagenet_archives.write_archives(folder)
    cifar_archive.write_archive(folder / "cifar.tar.gz", cifar_archive.make_batches())
    for number in range(300):
        path = folder / f"damaged/train/{number % 2}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@contextlib.contextmanager
def full(disk: Path, room: int) -> Iterator[None]:
    """Fill the disk but for `room` bytes."""
    filler = disk / "filler"
    filler.write_bytes(b"")
    os.truncate(filler, 0)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - room)
    assert shutil.disk_usage(disk).free == room
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Mount the disk read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (_REMOUNT | _READ_ONLY, _REMOUNT):
        assert libc.mount(None, os.fsencode(disk), None, flags, None) == 0, os.strerror(ctypes.get_errno())
        if flags & _READ_ONLY:
            yield


@contextlib.contextmanager
def failing_writes(disk: Path, number: int) -> Iterator[None]:
    """Let each write to the disk fail with an errno: in Python's files, and for those of libraries in fsync."""

    class FailingFile(io.FileIO):
        def write(self, _: Any) -> int:
            raise OSError(number, os.strerror(number))

    original = io.open

    def open_failing(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        is_path = isinstance(file, str | os.PathLike) and Path(file).is_relative_to(disk)
        if not is_path or not set(mode) & set("wax+"):
            return original(file, mode, *arguments, **options)
        raw = FailingFile(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8", write_through=True)

    fsync = os.fsync

    def fsync_failing(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_relative_to(disk):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync_failing)
        patch.setattr(io, "open", open_failing)
        patch.setattr(builtins, "open", open_failing)
        yield


FAULTS: dict[str, tuple[int, Callable[[Path, int], contextlib.AbstractContextManager[None]]]] = {
    "ENOSPC": (errno.ENOSPC, full),
    "EROFS": (errno.EROFS, lambda disk, _: read_only(disk)),
    "EDQUOT": (errno.EDQUOT, lambda disk, _: failing_writes(disk, errno.EDQUOT)),
    "EIO": (errno.EIO, lambda disk, _: failing_writes(disk, errno.EIO)),
}


def contents(disk: Path) -> dict[str, bytes]:
    """Return the contents of all files by name, and folders, but for a cache, which is allowed to grow."""
    return {
        str(path.relative_to(disk)): path.read_bytes() if path.is_file() else b""
        for path in disk.rglob("*")
        if ".sqlite" not in path.name
    }


def main() -> None:
    """Run every writer with every fault on the disk `sys.argv[1]`; print [[writer, fault, exit code, stderr, changes]].

    Where the writer replaces a file, that exists before.
    """
    disk, sources = Path(sys.argv[1]), Sources(*map(Path, sys.argv[2:]))
    results = []
    for name, writer in WRITERS.items():
        path = disk / writer.path
        if writer.prepare is not None:
            writer.prepare(path)
        elif path.suffix:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"{}")
        before = contents(disk)
        for fault, (_, make_fault) in FAULTS.items():
            output, errors = io.StringIO(), io.StringIO()
            with (
                make_fault(disk, writer.room),
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(errors),
            ):
                code = writer.run(path, sources)
            after = contents(disk)
            changes = sorted(set(before.items()) ^ set(after.items()))
            results.append([name, fault, code, errors.getvalue(), [changed for changed, _ in changes]])
            restore(disk, before)
        restore(disk, {})
    print(json.dumps(results))


def restore(disk: Path, files: dict[str, bytes]) -> None:
    """Remove everything that isn't among these files."""
    for path in sorted(disk.rglob("*"), reverse=True):
        if str(path.relative_to(disk)) not in files:
            path.rmdir() if path.is_dir() else path.unlink()
