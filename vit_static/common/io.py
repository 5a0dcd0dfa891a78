"""Writing files so that a run that is killed leaves the last good one, and two runs don't write the same."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what was written takes its place at the end, and only if all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)  # a killed run's, or a link to elsewhere
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_symlink(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target` (relative to the link's folder), replacing an older one at once."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def fsync(path: Path) -> None:
    """Returns when the file's or folder's content has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(values: Any, path: Path) -> None:
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


@contextmanager
def lock(path: Path, refusal: str, wait_s: float = 0.0) -> Iterator[None]:
    """Holds an existing file or folder against every other run. Raises ValueError(refusal) while another has it, after
    waiting so long for it.

    The kernel forgets a lock with its process, also one that is killed. Some network disks have no locks: nobody is
    kept out there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    deadline, has_said = time.monotonic() + wait_s, False
    try:
        while not _has_locked(descriptor):
            if time.monotonic() > deadline:
                raise ValueError(refusal)
            if not has_said:
                print(f"vit_static: {path} is in use; waiting up to {wait_s:.0f} s for it", file=sys.stderr)
                has_said = True
            time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _has_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        pass
    return True
