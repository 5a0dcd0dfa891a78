"""Entry point of `python -m data_tools NAME [arguments]`: one module per tool, exit codes for its errors."""

import signal

if __name__ == "__main__":
    # Until the tool can remove its files, Ctrl-C ends the process at once: Python's handler would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import difflib
import errno
import importlib
import sys
from collections.abc import Sequence

from vit_static.common.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_MISTAKE,
    USER_ERRNOS,
    describe_os_error,
)
from vit_static.common.installation import DATA_TOOLS
from vit_static.common.library_output import best_effort
from vit_static.common.startup import ignored_or, use_utf8
from vit_static.common.text import print_line, program_name, say

# A missing path is the user's mistake here, because the tools open the paths they are given without checking first.
PATH_ERRNOS = USER_ERRNOS | {errno.ENOENT}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a tool and return the exit code. An error that is neither ValueError nor OSError is a bug: it propagates."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print_tools()
        return EXIT_DONE
    name = arguments[0]
    if name not in DATA_TOOLS:
        nearest = difflib.get_close_matches(name, DATA_TOOLS, n=1, cutoff=0.0)[0]
        return fail("vit_static data", f"unknown tool {name!r}; the nearest is {nearest!r} (-h lists all tools)")
    prefix = f"vit_static data {name}"
    try:
        # A tool is imported only when it runs.
        return int(importlib.import_module(f".{name}", __package__).main(arguments[1:]))
    except ValueError as error:
        return fail(prefix, str(error))
    except OSError as error:
        code = EXIT_USER_MISTAKE if error.errno in PATH_ERRNOS else EXIT_FAILED
        return fail(prefix, describe_os_error(error), code)
    except KeyboardInterrupt:
        return fail(prefix, "stopped on request", EXIT_STOPPED)


def print_tools() -> None:
    program = program_name()
    print_line(f"usage: {program} data NAME [arguments]   ('{program} data NAME -h' shows the arguments of a tool)")
    print_line("")
    for name, summary in DATA_TOOLS.items():
        print_line(f"  {name:<13}{summary}")


def fail(prefix: str, message: str, code: int = EXIT_USER_MISTAKE) -> int:
    say(message.strip(), prefix)
    return code


if __name__ == "__main__":
    # SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that a tool removes its temporary files.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, ignored_or(signal.default_int_handler, signal.SIGHUP))
    use_utf8()
    # What a tool prints only reports on the files that it writes: a full disk or a closed pipe doesn't end it.
    sys.stdout, sys.stderr = best_effort(sys.stdout), best_effort(sys.stderr)
    sys.exit(main())
