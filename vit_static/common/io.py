"""Atomic writes, fsync and file locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_static.common.errors import DISK_ERRNOS, RunFailed, UserError, WriteError
from vit_static.common.text import say

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust show the system's error


@contextmanager
def write_atomically(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end, or remove it if the block raises.

    So a process that is killed, and a disk that is full, leave the previous file. Missing parent folders are created.
    The file gets the permissions of the user's umask, whatever the block creates it with.
    `num_bytes`: the size, if it is known. Raises WriteError as `write_errors` does.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with write_errors(path, num_bytes, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # left by a killed process, or a symbolic link to somewhere else
        try:
            yield temporary
            set_default_mode(temporary)
            fsync(temporary)
            temporary.replace(path)
        finally:
            with suppress(OSError):  # the error to report is the first one
                temporary.unlink(missing_ok=True)


@contextmanager
def write_errors(path: Path, num_bytes: int | None = None, temporary: Path | None = None) -> Iterator[None]:
    """Turn what a disk answers to a write in the block (full, over quota, read-only, damaged) into a WriteError.

    `path` is the file or folder that the block writes, `temporary` where it does. An error about another file passes.
    Libraries may wrap the system's error in their own class, or report none: then a disk without room is the reason.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        own = (str(path), str(temporary or path))
        is_other = error.filename is not None and not str(error.filename).startswith(own)
        if error.errno not in DISK_ERRNOS or is_other:
            raise
        raise WriteError(error.errno, path, num_bytes, _num_free(path)) from error
    except (UserError, RunFailed):
        raise
    except Exception as error:
        wrapped = _OS_ERROR.search(str(error))
        number = int(wrapped[1]) if wrapped else errno.ENOSPC if _num_free(path) == 0 else None
        if number not in DISK_ERRNOS:
            raise
        raise WriteError(number, path, num_bytes, _num_free(path)) from error


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


def write_json(values: Any, path: Path) -> None:
    """Write `values` as JSON, atomically."""
    write_text(json.dumps(values, indent=1) + "\n", path)


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
