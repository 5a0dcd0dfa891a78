"""Reasons for which a run stops early: signals, unreadable images, failed saves and non-finite gradients.

SIGTERM, SIGINT and SIGHUP during training: SignalWatch sets a flag, all ranks agree on the stop at the next step, the
trainer saves a checkpoint, and the process ends with exit code 75. Before training, __main__.py handles them.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vit_static.common.errors import EXIT_FAILED, DataError, RunFailed, escape
from vit_static.common.startup import STARTED_FOLDER, ignored_or, take_stop_signal
from vit_static.common.text import duration, say

BAD_IMAGE, ON_REQUEST, UNSAVED, NONFINITE = "bad image", "stopped", "not saved", "not finite"


@dataclass(frozen=True)
class Stop:
    """An early end of a run: one of the reasons above, and a message for people."""

    reason: str
    message: str

    @property
    def may_save(self) -> bool:
        """Return whether the state is worth saving and there is somewhere to save it."""
        return self.reason in (BAD_IMAGE, ON_REQUEST)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class SignalWatch:
    """Records SIGTERM, SIGINT and SIGHUP while open, instead of letting them end the process.

    The first Ctrl-C says what happens next, the second what is being saved, the third ends the process at once. A
    second SIGTERM or SIGHUP ends it, but not within a second of the first: a scheduler and a launcher may both forward
    the same request. SIGHUP stays ignored if it was (nohup).

    A thread ends the process `limit_s` after the first signal if the watch is still open, with exit code 1. It learns
    of the signal from the C handler, through a pipe, so this works while the main thread waits for a device, a disk or
    another rank, where no Python handler runs.

    A signal that came during the start, and whose exception a library has dropped, counts as received.
    """

    def __init__(self, limit_s: float) -> None:
        self.has_received = False
        self.describe: Callable[[], str] = lambda: "the run stops before its first step"  # what is being done or saved
        self._limit_s, self._received_at, self._num_presses = limit_s, 0.0, 0
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe, self._previous_pipe = -1, -1

    def __enter__(self) -> SignalWatch:
        reader, self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, ignored_or(self._receive, number)) for number in STOP_SIGNALS}
        # A daemon: it must not keep alive a process that ends in another way.
        watch = threading.Thread(target=_limit, args=(reader, self._limit_s), daemon=True, name="vit_static stop limit")
        watch.start()
        number = take_stop_signal()
        if number is not None:
            os.write(self._pipe, bytes([number]))
            self._receive(number, None)
        _tell_launcher()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_pipe)
        os.close(self._pipe)  # ends the thread

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        is_first, self.has_received = not self.has_received, True
        if signum == signal.SIGINT:
            self._num_presses += 1
            if self._num_presses <= 2:
                more = "again to see what is being saved" if self._num_presses == 1 else "once more to end without that"
                _say_in_handler(f"stopping on Ctrl-C: {self.describe()} (press it {more})")
                self._received_at = time.monotonic()
                return
        if is_first:
            self._received_at = time.monotonic()
        elif time.monotonic() - self._received_at > 1.0:
            os._exit(128 + signum)


def _tell_launcher() -> None:
    """Let the launcher know that from now on this process saves its state on a signal."""
    if STARTED_FOLDER in os.environ:
        with suppress(OSError):
            Path(os.environ[STARTED_FOLDER], os.environ["PADDLE_TRAINER_ID"]).touch()


def _say_in_handler(text: str) -> None:
    """Print a status line without Python's buffers, which the code that the signal has interrupted may be using."""
    with suppress(OSError, ValueError):
        descriptor = sys.stderr.fileno()
        start = "\n" if os.isatty(descriptor) else ""  # after the ^C of the terminal and the progress bar
        os.write(descriptor, f"{start}vit_static: {escape(text)}\n".encode(errors="backslashreplace"))


def _limit(reader: int, limit_s: float) -> None:
    """End the process `limit_s` after a stop signal's number can be read, unless the pipe is closed before."""
    deadline = float("inf")
    try:
        while True:
            seconds = deadline - time.monotonic()
            if not select.select([reader], [], [], max(seconds, 0.0) if seconds < float("inf") else None)[0]:
                break
            numbers = os.read(reader, 64)
            if not numbers:
                return
            if deadline == float("inf") and any(number in numbers for number in STOP_SIGNALS):
                deadline = time.monotonic() + limit_s
    finally:
        os.close(reader)
    say(
        f"a signal requested a stop {duration(limit_s)} ago (train.stop_timeout_s), but the run is still waiting for a "
        "disk, a device or another rank. It ends without saving; the same command resumes from the latest checkpoint"
    )
    os._exit(EXIT_FAILED)


class StopController:
    """Decides, together with all other ranks, whether and why the run stops."""

    def __init__(
        self,
        agree: Callable[[list[str] | None], list[str] | None],
        has_signal: Callable[[], bool],
        *,
        stops_on_failed_save: bool,
    ) -> None:
        """`agree` returns the first value that isn't None among those that the ranks pass, the same on all ranks."""
        self._agree, self._has_signal = agree, has_signal
        self._stops_on_failed_save = stops_on_failed_save
        self._stop: Stop | None = None

    @property
    def requested(self) -> bool:
        return self._stop is not None

    @property
    def reason(self) -> str | None:
        return None if self._stop is None else self._stop.reason

    @property
    def message(self) -> str | None:
        return None if self._stop is None else self._stop.message

    @property
    def may_save(self) -> bool:
        """Return whether the state may be saved, which it always may while the run continues."""
        return self._stop is None or self._stop.may_save

    def poll(self, bad_image: str | None, failed_save: str | None) -> None:
        """Agree once with all ranks, which all call this together: each passes what it knows of, one decision follows.

        `bad_image`: why the next batch can't be read; `failed_save`: why the last checkpoint couldn't be written.
        """
        proposal: list[str] | None = None
        if bad_image is not None:
            proposal = [BAD_IMAGE, bad_image]
        elif self._has_signal():
            proposal = [ON_REQUEST, ""]
        elif failed_save is not None and self._stops_on_failed_save:
            proposal = [UNSAVED, failed_save]
        agreed = self._agree(proposal)
        if agreed is not None:
            self._stop = Stop(*agreed)

    def request(self, reason: str, message: str) -> None:
        """Stop for a reason that all ranks know already."""
        self._stop = Stop(reason, message)

    def raise_if_failed(self, step: int, check_command: str, resume_hint: str) -> None:
        """Raise the error that the run ends with, the same on all ranks; a stop on request is none.

        `check_command` finds unreadable images, `resume_hint` says what can be resumed. Raises DataError for an image
        that can't be read, RunFailed for a failed save or non-finite gradients.
        """
        if self._stop is None or self._stop.reason == ON_REQUEST:
            return
        if self._stop.reason == BAD_IMAGE:
            raise DataError(
                f"{self._stop.message}. Stopped at step {step}, from which the same command resumes; "
                f"'{check_command}' finds all such files"
            )
        raise RunFailed(f"{self._stop.message}. Stopped at step {step}; {resume_hint}")
