"""A check of the doctor and its result."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from vit_static.common.text import escape_within
from vit_static.doctor.subject import Subject

Group = Literal["machine", "ranks", "export"]
Status = Literal["ok", "failed", "skipped"]

MAX_MESSAGE = 240
# Paddle's errors are pages long. This heading is followed by the line that says what is wrong.
_PADDLE_SUMMARY = re.compile(r"Error Message Summary:\s*-*\s*(\S.*)")


@dataclass(frozen=True)
class Result:
    """The outcome of a check: one line for the user, and its figures for programs.

    `remedy` says what to do about a failure, in most cases which switch works around it.
    """

    status: Status
    message: str
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(message: str, /, **figures: Any) -> Result:
    return Result("ok", message, figures=figures)


def failed(message: str, remedy: str = "", /, **figures: Any) -> Result:
    """Return a failure. Without `remedy` the check's own is shown."""
    return Result("failed", message, remedy, figures)


def skipped(reason: str) -> Result:
    return Result("skipped", reason)


def _always(subject: Subject) -> str | None:
    return None


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    `run` does the check; an exception that it raises is a failure. `why_not` returns why the check doesn't apply to
    this config and device, or None if it does. `group` is the set of processes that run it: one process on this
    machine, all ranks of the mesh, or one process that has not trained. `needs` names the checks without which this one
    can't run. A process that works on a check for more than `timeout_s` seconds is killed.
    """

    name: str
    group: Group
    run: Callable[[Subject], Result]
    remedy: Callable[[Subject], str]
    why_not: Callable[[Subject], str | None] = _always
    needs: tuple[str, ...] = ()
    timeout_s: float = 120.0


def perform(check: Check, subject: Subject) -> Result:
    """Run a check and return its result; never raises an exception."""
    try:
        reason = check.why_not(subject)
        if reason is not None:
            return skipped(reason)
        result = check.run(subject)
        if result.status != "failed" or result.remedy:
            return result
        return replace(result, remedy=check.remedy(subject))
    except Exception as error:
        return Result("failed", error_line(error), remedy_of(check, subject))


def remedy_of(check: Check, subject: Subject) -> str:
    """Return the check's remedy, also on a device so broken that the remedy can't be chosen."""
    try:
        return check.remedy(subject)
    except Exception:
        return "see the log"


def error_line(error: BaseException) -> str:
    """Return an error as one printable line: of Paddle's long errors their summary, of others the first line."""
    text = str(error).strip()
    summary = _PADDLE_SUMMARY.search(text)
    line = summary[1] if summary else next(iter(text.splitlines()), "")
    name = type(error).__name__
    return escape_within(f"{name}: {line}" if line else name, MAX_MESSAGE)
