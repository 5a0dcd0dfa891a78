"""Entry points: the command `vit_static`, which `python -m vit_static` runs, too, and `main`, which runs a verb."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

LAUNCHED_VERBS = frozenset({"pretrain", "train", "finetune", "eval"})  # may have several processes


def command() -> None:
    """Do what `./run.sh VERB ...` does with the command line: the entry point of an installed wheel, too.

    The verb runs in this process unless the launcher starts several. A process that another launcher has started, such
    as `paddle.distributed.launch`, is one of its own already.
    """
    # Until the verb or the launcher handles it, Ctrl-C ends the process at once: Python's own handler would print a
    # traceback from whatever is being imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # run.sh blocks it while Python starts
    import os
    import runpy
    from importlib.util import find_spec

    _set_defaults_of_run_sh()
    if len(sys.argv) == 1:
        sys.argv.append("help")
    if sys.argv[1:3] == ["help", "data"]:
        sys.argv[1:] = ["data", *sys.argv[3:], "--help"]
    verb = sys.argv[1]
    if verb == "data":
        del sys.argv[1]
        module = next(name for name in ("vit_static.data_tools", "data_tools") if find_spec(name))
    else:
        needs_launcher = verb in LAUNCHED_VERBS and "PADDLE_CURRENT_ENDPOINT" not in os.environ
        module = "vit_static.launch" if needs_launcher else "vit_static.worker"
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _set_defaults_of_run_sh() -> None:
    """Set the variables that run.sh sets, unless it or the user has: an installed wheel has no run.sh."""
    import os
    from importlib.metadata import PackageNotFoundError, distribution

    from vit_static.common.installation import IS_WHEEL

    if IS_WHEEL:
        os.environ.setdefault("PYTHONSAFEPATH", "1")  # for the processes that this one starts
    try:
        distribution("paddlepaddle-gpu")
    except PackageNotFoundError:
        os.environ.setdefault("VIT_STATIC_DEVICE", "cpu")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code: see `vit_static.cli.run`."""
    from vit_static.cli import run

    return run.main(argv)


if __name__ == "__main__":
    if not __package__:  # a file, as paddle.distributed.launch runs it: the folder above this one has the package
        from pathlib import Path

        here = Path(__file__).resolve().parent
        sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]
    command()
