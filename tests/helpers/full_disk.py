"""A small disk of its own for a process, and system errors in the calls that make a write durable."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from helpers.small import ROOT

DISK_BYTES = 3 << 20
# The mount is private to the process and its children: nothing else sees it, and it ends with them.
_MOUNT = 'mount -t tmpfs -o size="$1",mode=700 tmpfs "$2" && shift 2 && exec "$@"'


@cache
def why_no_mount() -> str:
    """Return why this machine can't mount a disk in a namespace; empty if it can."""
    done = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, check=False
    )
    return done.stderr.strip() if done.returncode else ""


def run_on_small_disk(folder: Path, code: str, *arguments: object) -> Any:
    """Run Python code in a process for which `folder` is a disk of 3 MB; return the JSON in the last line it prints.

    `sys.argv[1:]` is the folder and the arguments. Skips the test where namespaces aren't allowed.
    """
    if why_no_mount():
        pytest.skip(f"no private mount namespace: {why_no_mount()}")
    command = ["unshare", "-rm", "sh", "-c", _MOUNT, "sh", str(DISK_BYTES), str(folder)]
    command += [sys.executable, "-c", code, str(folder), *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def failing(call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `os.fsync` or `os.replace` fail with an errno, without a file name, as a network disk may."""
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        patch.setattr(os, call, fail)
        yield


ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
FAULTS = [(call, number) for call in ("fsync", "replace") for number in ERRNOS]
