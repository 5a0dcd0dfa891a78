"""The launcher with workers that are forked from its process, which has imported Paddle.

Everything else is real: the processes and their sessions, ranks, signals, output, and the sockets between them. Without
Python's start and Paddle's import, a worker needs five seconds less.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vit_static.__main__ import main as run_verb
from vit_static.launch import launcher

# As code for `start_verb(before=...)`, which it replaces: runs the verb of sys.argv in this many processes.
CODE = """
import os, sys
os.environ.update(NPROC="{num_processes}", VIT_STATIC_DEVICE="cpu")
for name in [name for name in os.environ if name.startswith(("SLURM_", "PADDLE_"))]:
    del os.environ[name]
from helpers import forked_launcher
sys.exit(forked_launcher.main())
"""


def main() -> int:
    """Run the verb of sys.argv as the launcher does, and return its exit code."""
    launcher.subprocess = _ForkingSubprocess
    return launcher.main()


class _ForkingSubprocess:
    """What the launcher uses of `subprocess`: the class's own Popen, whose child doesn't get as far as exec."""

    DEVNULL = subprocess.DEVNULL

    @staticmethod
    def Popen(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        prepare = options.pop("preexec_fn")
        arguments = list(command[command.index("vit_static") + 1 :])
        return subprocess.Popen(
            command, preexec_fn=lambda: _become_worker(arguments, options["env"], prepare), **options
        )


def _become_worker(arguments: list[str], environ: dict[str, str], prepare: Callable[[], None]) -> NoReturn:
    """Run the verb in the child, in which descriptors 0 to 2 are set already, and end the process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # as after an exec, which drops handlers
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python sets them when it starts
        signal.signal(number, signal.SIG_IGN)
    prepare()
    os.closerange(3, 1024)  # among them the pipe by which Popen learns of the exec
    os.environ.clear()
    os.environ.update(environ)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=True)
    sys.argv = ["vit_static", *arguments]
    code = 1
    try:
        code = run_verb(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
