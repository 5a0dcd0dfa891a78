"""Atomic writes, fsync and file locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from vit_static.common.errors import DISK_ERRNOS, DISK_FULL_ERRNOS, RunFailed, UserError, WriteError
from vit_static.common.text import json_text, say

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust show the system's error
NumBytes = int | Callable[[], int] | None  # a size, or a function that computes it if a disk turns out to be full


@contextmanager
def write_atomically(path: Path, num_bytes: NumBytes = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end, or remove it if the block raises.

    So a process that is killed, and a disk that is full, leave the previous file. Missing parent folders are created.
    The file gets the permissions of the user's umask, whatever the block creates it with.
    `num_bytes`: the size, if it can be known. Raises WriteError as `write_errors` does.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with remove_on_failure(temporary), write_errors(path, num_bytes, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # left by a killed process, or a symbolic link to somewhere else
        yield temporary
        set_default_mode(temporary)
        fsync(temporary)
        temporary.replace(path)


@contextmanager
def remove_on_failure(path: Path) -> Iterator[None]:
    """Remove a file or folder if the block raises, and the empty folders above it that didn't exist before."""
    with remove_new_folders(path):
        try:
            yield
        except BaseException:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # the error to report is the first one
                path.unlink(missing_ok=True)
            raise


@contextmanager
def remove_new_folders(path: Path) -> Iterator[None]:
    """Remove the folders above `path` that didn't exist before and are empty if the block raises."""
    new_folders: list[Path] = []
    with suppress(OSError):
        new_folders += takewhile(lambda folder: not folder.exists(), path.parents)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in new_folders:
                folder.rmdir()
        raise


def make_folder(path: Path) -> None:
    """Create a folder, with those above it, unless it exists. Raises WriteError as `write_errors` does."""
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def write_errors(path: Path, num_bytes: NumBytes = None, temporary: Path | None = None) -> Iterator[None]:
    """Turn what a disk answers to a write in the block (full, over quota, read-only, damaged) into a WriteError.

    `path` is the file or folder that the block writes, `temporary` where it does; `temporary` may be the beginning of a
    name, and its room counts as free. The error names `path` and its size, also if a writer inside has raised it for
    one of its files. An error about another file passes. Libraries may wrap the system's error in their own class, or
    report none: then a disk without room is the reason.
    """
    try:
        yield
    except Exception as error:
        number = _disk_errno(error, path, temporary or path)
        if number is not None:
            raise _write_error(number, path, num_bytes, temporary) from error
        if isinstance(error, OSError) and temporary is not None and str(error.filename) == str(temporary):
            error.filename = str(path)  # a hidden name would tell a user nothing
        raise


@contextmanager
def folder_write_errors(folder: Path, num_bytes: NumBytes) -> Iterator[None]:
    """Raise the WriteError of any file in `folder` as one of the folder, with the size of all that is to be written.

    Other errors pass, so the block may also read.
    """
    try:
        yield
    except WriteError as error:
        if not _is_below(error.filename, folder):
            raise
        raise _write_error(error.errno or errno.EIO, folder, num_bytes) from error


def check_room(path: Path, num_bytes: int) -> None:
    """Raise WriteError if the disk of `path` has fewer free bytes than these."""
    num_free = _num_free(path)
    if num_free is not None and num_free < num_bytes:
        raise WriteError(errno.ENOSPC, path, num_bytes, num_free)


def check_writable(path: Path) -> None:
    """Raise OSError, or WriteError as `write_errors` does, if no file can be written at `path`; change nothing.

    To be called before long work whose result is to be written there.
    """
    folder = next(each for each in path.absolute().parents if each.exists())
    temporary = folder / f".{path.name}.{os.getpid()}.part"
    with remove_on_failure(temporary), write_errors(path, temporary=temporary):
        temporary.write_bytes(b"\n")
        fsync(temporary)
        temporary.unlink()


def _disk_errno(error: BaseException, path: Path, temporary: Path) -> int | None:
    """Return the errno of a disk's answer to a write at `path` or `temporary`, or None for another error."""
    if isinstance(error, WriteError):
        return error.errno if error.filename != str(path) and _concerns(error.filename, path, temporary) else None
    if isinstance(error, OSError):
        is_ours = error.filename is None or _concerns(error.filename, path, temporary)
        return error.errno if error.errno in DISK_ERRNOS and is_ours else None
    if isinstance(error, UserError | RunFailed) or not isinstance(error, Exception):
        return None
    wrapped = _OS_ERROR.search(str(error))
    number = int(wrapped[1]) if wrapped else errno.ENOSPC if _num_free(path) == 0 else None
    return number if number in DISK_ERRNOS else None


def _write_error(number: int, path: Path, num_bytes: NumBytes, temporary: Path | None = None) -> WriteError:
    """Return the error about `path`."""
    if number not in DISK_FULL_ERRNOS:
        return WriteError(number, path)
    size = num_bytes() if callable(num_bytes) else num_bytes
    if number != errno.ENOSPC:  # what a quota or the limit for a file's size leaves is unknown
        return WriteError(number, path, size)
    num_free = _num_free(path)
    return WriteError(number, path, size, None if num_free is None else num_free + _room_of(temporary))


def _concerns(name: object, path: Path, temporary: Path) -> bool:
    """Return whether the file of this name is `path`, a folder above it, below it, or begins with `temporary`."""
    return _is_below(name, path) or _is_below(path, Path(str(name))) or str(name).startswith(str(temporary))


def _is_below(name: object, folder: Path) -> bool:
    return Path(str(name)).is_relative_to(folder)


def _room_of(path: Path | None) -> int:
    """Return the bytes that a file, or all files in a folder, take from the disk; 0 if there is none."""
    if path is None:
        return 0
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(512 * file.lstat().st_blocks for file in files if file.is_file())


def _num_free(path: Path) -> int | None:
    """Return the free bytes of the disk that has `path` or, if it doesn't exist, the nearest folder above it."""
    with suppress(OSError):
        return shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists())).free
    return None


def write_text(text: str, path: Path) -> None:
    """Write a text in UTF-8, atomically. Surrogate escapes become the bytes that they stand for."""
    write_bytes(text.encode("utf-8", "surrogateescape"), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file, atomically."""
    with write_atomically(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_lines(lines: Callable[[], Iterable[bytes]], path: Path) -> None:
    """Write the lines that a function returns, which may be more than fit into memory, atomically.

    The function is called again if the disk is full, to compute the size.
    """
    with write_atomically(path, lambda: sum(map(len, lines()))) as temporary, temporary.open("wb") as file:
        file.writelines(lines())


def write_json(values: Any, path: Path) -> None:
    """Write `values` as JSON, atomically."""
    write_text(json_text(values, indent=1) + "\n", path)


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return this program's folder below XDG_CACHE_HOME or ~/.cache (XDG Base Directory Specification)."""
    given = Path(environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "vit_static"


def set_default_mode(path: Path) -> None:
    """Give a file the permissions of the user's umask, which libraries that write through a private file ignore."""
    mode = 0o666 & ~_umask()
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)


def _umask() -> int:
    """Return the process's umask without changing it, as os.umask does for a moment and for all threads."""
    with suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        if "Umask" in fields:  # Linux 4.7
            return int(fields["Umask"], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def replace_symlink(link: Path, target: str) -> None:
    """Atomically make `link` a symbolic link to `target`, which is relative to the folder of `link`."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def fsync(path: Path) -> None:
    """Block until the content of a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 digest (64 hexadecimal digits) of a file, by which a copy or damage is recognised."""

    num_bytes: int
    sha256: str


def file_record(path: Path) -> FileRecord:
    """Read a whole file and return its size and digest. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return FileRecord(file.tell(), digest.hexdigest())


@contextmanager
def lock(path: Path, refusal: str, wait_s: float = 0.0, *, announce: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on an existing file or folder. Raise ValueError(refusal) if another process still holds
    it after `wait_s` seconds. `announce`: tell the user about the wait.

    The kernel releases a lock when its process ends, even if it is killed. On network disks that don't support locks,
    this doesn't exclude anyone.
    """
    descriptor = os.open(path, os.O_RDONLY)
    deadline, has_announced_wait = time.monotonic() + wait_s, not announce
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ValueError(refusal)
            if not has_announced_wait:
                say(f"{path} is in use; waiting up to {wait_s:.0f} s for it")
                has_announced_wait = True
            time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system doesn't support locks
        pass
    return True
