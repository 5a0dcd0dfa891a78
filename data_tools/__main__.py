"""`python -m data_tools NAME [arguments]`: picks the tool, and turns what it raises into an exit code."""

import difflib
import errno
import importlib
import io
import signal
import sys
from collections.abc import Sequence

from vit_static.common.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_MISTAKE,
    USER_ERRNOS,
    escape,
)

# name: (module, what it does); a module is imported only when its tool runs, and has main(argv) -> exit code
TOOLS = {
    "digits": ("data_tools.digits", "scikit-learn's 1,797 handwritten digits as a tree of JPEG files"),
    "imagenet": ("data_tools.imagenet", "ImageNet-1k's archives as class folders and lists"),
    "imagenet21k": ("data_tools.imagenet21k", "ImageNet-21k's list, an image with all of its labels"),
    "folder": ("data_tools.folder", "lists of your own images: a folder for each class"),
    "cifar10": ("data_tools.cifar10", "CIFAR-10's archive as class folders"),
    "check": ("data_tools.check", "reads every image of a set; finds what would stop training"),
    "shards": ("data_tools.shards", "WebDataset shards of a set, for network disks"),
}

# A tool opens the paths that it is given without a check of its own.
PATH_ERRNOS = USER_ERRNOS | {errno.ENOENT}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. What is neither ValueError nor OSError is a bug, and keeps its traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print_tools()
        return EXIT_DONE
    name = arguments[0]
    if name not in TOOLS:
        nearest = difflib.get_close_matches(name, TOOLS, n=1, cutoff=0.0)[0]
        return fail("vit_static data", f"unknown tool {name!r}; the nearest is {nearest!r} (-h lists all)")
    module_name, _ = TOOLS[name]
    prefix = f"vit_static data {name}"
    try:
        return int(importlib.import_module(module_name).main(arguments[1:]))
    except ValueError as error:
        return fail(prefix, str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = EXIT_USER_MISTAKE if error.errno in PATH_ERRNOS else EXIT_FAILED
        return fail(prefix, f"{where}{error.strerror or error}", code)
    except KeyboardInterrupt:
        return fail(prefix, "stopped on request", EXIT_STOPPED)


def print_tools() -> None:
    print("usage: python -m data_tools NAME [arguments]   (NAME -h shows a tool's own arguments)\n")
    for name, (_, summary) in TOOLS.items():
        print(f"  {name:<12}{summary}")


def fail(prefix: str, message: str, code: int = EXIT_USER_MISTAKE) -> int:
    print(f"{prefix}: {escape(message.strip())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # SIGTERM unwinds like Ctrl-C, so that a tool's temporary files go with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files that are no text
    sys.exit(main())
