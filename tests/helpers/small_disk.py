"""A file system of a few megabytes that only one process sees, to be filled up for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from helpers.small import ROOT

DISK_BYTES = 3 << 20

_CODE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_USERS, PRIVATE = 0x20000, 0x10000000, 1 << 18 | 1 << 14  # sched.h, sys/mount.h
user, group = os.getuid(), os.getgid()
assert libc.unshare(NEW_MOUNTS | (NEW_USERS if user else 0)) == 0, os.strerror(ctypes.get_errno())
if user:
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {{user}} 1"), ("gid_map", f"0 {{group}} 1")):
        with open(f"/proc/self/{{name}}", "w") as file:
            file.write(text)
assert libc.mount(b"none", b"/", None, PRIVATE, None) == 0, os.strerror(ctypes.get_errno())
assert libc.mount(b"tmpfs", {path!r}, b"tmpfs", 0, {options!r}) == 0, os.strerror(ctypes.get_errno())
"""


@cache
def why_no_mount() -> str:
    """Return why this machine can't mount a file system in a namespace; empty if it can."""
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    return probe.stderr.strip() if probe.returncode else ""


def mount_code(folder: Path, num_bytes: int = DISK_BYTES) -> str:
    """Return Python code with which a process without other threads mounts a new file system on a folder.

    Skips the test where that isn't allowed.
    """
    if why_no_mount():
        pytest.skip(f"no file system can be mounted here ({why_no_mount()})")
    return _CODE.format(path=os.fsencode(folder), options=f"size={num_bytes}".encode())


def run_on_small_disk(folder: Path, code: str, *arguments: object) -> Any:
    """Run Python code in a process for which `folder` is a disk of 3 MB; return the JSON in the last line it prints.

    `sys.argv[1:]` is the folder and the arguments.
    """
    command = [sys.executable, "-c", f"{mount_code(folder)}\n{code}", str(folder), *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class DiskOfProcess:
    """The content of a folder as another process sees it, also after the end of that process."""

    def __init__(self, process_id: int, folder: Path) -> None:
        # An open folder keeps its file system in existence.
        self._descriptor = os.open(f"/proc/{process_id}/root{folder}", os.O_RDONLY | os.O_DIRECTORY)
        self.path = Path(f"/proc/self/fd/{self._descriptor}")

    def fill(self) -> None:
        """Leave no free byte."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            for num_bytes in (65536, 1):
                try:
                    while True:
                        file.write(bytes(num_bytes))
                except OSError:
                    continue

    def free(self) -> None:
        """Remove what `fill` has written."""
        (self.path / "filler").unlink()

    def close(self) -> None:
        os.close(self._descriptor)
