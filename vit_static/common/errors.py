"""Errors that are shown to users, exit codes, and values formatted for messages."""

from __future__ import annotations

import errno
import reprlib
from typing import Any

EXIT_DONE, EXIT_FAILED, EXIT_USER_MISTAKE, EXIT_STOPPED = 0, 1, 2, 75
# How the system refuses a path that the user should not have given; a full disk, say, is no such mistake.
USER_ERRNOS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG})


class UserError(ValueError):
    """A user's mistake: a message of one line that names the thing and the remedy, whatever a name in it holds.

    What a terminal would obey is shown by its escape.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(
            line
            if line.isprintable()
            else "".join(
                character if character.isprintable() else character.encode("unicode_escape").decode()
                for character in line
            )
        )


class RunFailed(RuntimeError):
    """What ends a run though the command was right, in words for people: exit code 1."""


class ConfigError(UserError):
    """A mistake in a config file or an override."""


def truncate(text: str, most: int = 100) -> str:
    """A text as a message has it: its beginning."""
    return text if len(text) <= most else f"{text[:most]}..."


def format_value(value: Any, most: int = 100) -> str:
    """A value as a message has it: its beginning, whatever it is; aliases in YAML make 2**60 values of a few lines."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    return truncate(text, most)


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 3, 12, 6, 90, 90, 90


pass


class DataError(UserError):
    """A data set that can't be used as it is. `kind` is data_tools.check's word for an image that can't be read."""

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


class ExportError(RunFailed):
    """The exported model doesn't answer as the trained one."""


class PredictError(UserError):
    """A model folder that can't be used, or an image that can't be read."""


pass


class WeightsError(UserError):
    """A file of weights that can't be read, or doesn't fit the model."""
