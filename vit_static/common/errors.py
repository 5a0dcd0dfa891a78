"""Errors shown to users, exit codes, and formatting of values in messages."""

from __future__ import annotations

import errno
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vit_static.common.installation import localize

EXIT_DONE, EXIT_FAILED, EXIT_USER_MISTAKE, EXIT_STOPPED = 0, 1, 2, 75
EXIT_UNANSWERED = 69  # of a worker that has waited too long for another rank; its launcher ends with EXIT_FAILED

# System errors caused by a path that the user gave, as opposed to a full disk, for example. ENOENT isn't among them:
# every path that a user names is checked where it is read, so a file that is missing later has vanished during the run
# (exit code 1, which `train.max_restarts` restarts) or points to a bug (whose traceback must be shown).
USER_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)


# A disk without room, or over the user's quota; and all that a disk can answer to a write.
DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
DISK_ERRNOS = DISK_FULL_ERRNOS | {errno.EIO, errno.EROFS}


class UserError(ValueError):
    """A user's mistake. The message is one printable line that says what happened, where, and what to do.

    Line breaks and control characters, for example in the name of a file, are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escape(localize(message.strip())))


class RunFailed(RuntimeError):
    """A failure that isn't the user's mistake, with a message for users: exit code 1, no traceback."""


class AtLeast(int):
    """A number of bytes of which only a lower bound is known."""


class WriteError(OSError):
    """A file that can't be written, as an OSError with its errno. The message is one printable line for users."""

    def __init__(self, number: int, path: object, num_bytes: int | None = None, num_free: int | None = None) -> None:
        """`number`: the errno; `num_bytes`: the file's size, if it is known; `num_free`: the free bytes of its disk."""
        reason = os.strerror(number)
        super().__init__(number, reason, str(path))
        bound = "at least " if isinstance(num_bytes, AtLeast) else ""
        sizes = [] if num_bytes is None else [f"{bound}{num_bytes:,} bytes are needed"]
        sizes += [] if num_free is None else [f"{num_free:,} bytes are free"]
        detail = f"; {' and '.join(sizes)}" if sizes else ""
        remedy = "make room, or use another path" if number in DISK_FULL_ERRNOS else "use another path"
        unchanged = "what was there before is unchanged"
        self._message = escape(f"{path}: can't be written ({reason}){detail}; {unchanged}; {remedy}")

    def __str__(self) -> str:
        return self._message


class ConfigError(UserError):
    """A mistake in a config file or an override."""


class DataError(UserError):
    """A data set that can't be used. `kind` classifies an image that can't be read, as `data check` reports it."""

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


class ExportError(RunFailed):
    """An exported model whose outputs differ from the trained model's."""


class PredictError(UserError):
    """A model folder that can't be used, or an image that can't be read."""


class WeightsError(UserError):
    """A file of weights that can't be read, or doesn't fit the model."""


def escape(text: str) -> str:
    """Return `text` with its unprintable characters as escapes, so that it is one line and can't control a terminal."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else escape_character(character) for character in text)


def escape_character(character: str) -> str:
    """Return an escape such as \\n or \\u202e; a byte of a file's name that isn't UTF-8 becomes \\xb9."""
    if "\udc80" <= character <= "\udcff":  # a surrogate escape (PEP 383)
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def os_reason(error: OSError) -> str:
    """Return the reason of a system error in words, also of one that has only a message, or none."""
    return error.strerror or str(error) or type(error).__name__


def describe_os_error(error: OSError) -> str:
    """Return a system error as a line: the file, if it is known, and the reason."""
    if isinstance(error, WriteError):
        return str(error)
    has_name = isinstance(error.filename, str | bytes | os.PathLike)
    return f"{os.fsdecode(error.filename)}: {os_reason(error)}" if has_name else os_reason(error)


def describe_error(error: Exception) -> str:
    """Return one line about an exception: the file and the reason of a system error, else its class and message."""
    if isinstance(error, OSError):
        return escape(describe_os_error(error))
    return escape(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def truncate(text: str, max_length: int = 100) -> str:
    """Return the beginning of `text`, marked with dots if it was longer."""
    return text if len(text) <= max_length else f"{text[:max_length]}..."


def format_value(value: Any, max_length: int = 100) -> str:
    """Return the beginning of `repr(value)`; huge or deeply nested values are cut without formatting all of them."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return "a number of thousands of digits"
    return truncate(text, max_length)


def require_argument(is_valid: bool, name: str, value: Any, expected: str) -> None:
    """Raise ConfigError for an argument of a Python function that isn't what is expected."""
    if not is_valid:
        raise ConfigError(f"{name} = {format_value(value)}: must be {expected}")


def require_path(name: str, value: Any) -> None:
    """Raise ConfigError for an argument that isn't a path."""
    require_argument(isinstance(value, str | os.PathLike), name, value, "a path (str or pathlib.Path)")


def require_overrides(overrides: Any) -> None:
    """Raise ConfigError for overrides that aren't a list of settings: the letters of one would be taken for several."""
    is_iterable = isinstance(overrides, Iterable) and not isinstance(overrides, str | bytes | Mapping)
    is_valid = is_iterable and (isinstance(overrides, Iterator) or all(isinstance(each, str) for each in overrides))
    require_argument(is_valid, "overrides", overrides, 'a list of settings, such as ["train.epochs=5"]')


def newer_format(saved: Any, supported: int) -> str | None:
    """Return what to say about a file whose format number is above the supported one; None if it isn't.

    Files of a newer version aren't damaged, and must not be replaced.
    """
    if type(saved) is not int or saved <= supported:
        return None
    return f"was written by a newer version (format {format_value(saved)}); this one reads up to {supported}"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 3, 12, 6, 90, 90, 90
