"""Reasons for which a run stops early: signals, unreadable images, failed saves and non-finite gradients.

SIGTERM and SIGINT during training: SignalWatch sets a flag, all ranks agree on the stop at the next step, the trainer
saves a checkpoint, and the process ends with exit code 75. Before training, __main__.py handles them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from vit_static.common.errors import DataError, RunFailed

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


class SignalWatch:
    """Records SIGTERM and SIGINT while open, instead of letting them end the process.

    A second signal ends the process at once, but not within a second of the first: a scheduler and a launcher may both
    forward the same request.
    """

    def __init__(self) -> None:
        self.has_received = False
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self.has_received:
            self.has_received, self._received_at = True, time.monotonic()
        elif time.monotonic() - self._received_at > 1.0:
            os._exit(128 + signum)


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
