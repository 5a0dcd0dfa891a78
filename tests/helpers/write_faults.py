"""System errors in the calls that make a write durable."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
FAULTS = [(call, number) for call in ("fsync", "replace") for number in ERRNOS]


@contextmanager
def failing(call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `os.fsync` or `os.replace` fail with an errno, without a file name, as a network disk may."""
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        patch.setattr(os, call, fail)
        yield
