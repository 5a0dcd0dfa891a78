"""The command line: verbs, their flags, exit codes. No logic."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

from vit_static.cli import parse_arguments
from vit_static.common.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_MISTAKE,
    USER_ERRNOS,
    RunFailed,
    UserError,
)
from vit_static.common.library_output import library_output

NUM_LINES = 40  # of what libraries have said, where something fails


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. A user's mistake is one line on stderr and exit code 2; anything else keeps its traceback."""
    # Until the training loop, which saves its state first, SIGTERM ends a verb as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments = parse_arguments(argv)
        return arguments.handler(arguments)
    except BrokenPipeError:  # what reads the output has seen enough, such as `head`
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for what Python flushes at its end
        return EXIT_DONE
    except UserError as error:
        print(f"vit_static: {error}", file=sys.stderr)
        return EXIT_USER_MISTAKE
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            print(library_output(NUM_LINES), end="", file=sys.stderr)
            traceback.print_exc()
            return EXIT_FAILED
        print(f"vit_static: {error.filename}: {error.strerror}; name another path, or mend this one", file=sys.stderr)
        return EXIT_USER_MISTAKE
    except RunFailed as error:
        print(f"vit_static: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("vit_static: stopped on request", file=sys.stderr)
        return EXIT_STOPPED
    except Exception:
        print(library_output(NUM_LINES), end="", file=sys.stderr)
        traceback.print_exc()
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
