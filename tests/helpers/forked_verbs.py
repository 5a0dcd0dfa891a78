"""Verbs in processes forked from one that has imported the package, which saves the four seconds of Paddle's import.

Everything from the parsing of the arguments to the exit code is as on the command line. What run.sh and the launcher do
is not part of it: see helpers/forked_launch.py and helpers/command_line.py.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess

from vit_static.data import fork_server

_IMPORTS = "helpers.forked_imports"
fork_server.preload(_IMPORTS)


@dataclass(frozen=True)
class ForkedVerb:
    """A verb in its own process. May be used by several threads."""

    _process: ForkServerProcess

    @property
    def process_id(self) -> int:
        """Return the process ID."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Return the exit code: -9 after SIGKILL, None while the process runs."""
        return fork_server.exit_code(self._process)

    def wait(self, timeout_s: float | None = 600) -> int | None:
        """Wait for the end of the process, or for the timeout, and return the exit code."""
        wait([self._process.sentinel], timeout_s)
        return self.exit_code

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def start_verb(
    arguments: Sequence[object], cwd: Path, stdout: Path, stderr: Path | None = None, before: str | None = None
) -> ForkedVerb:
    """Start a verb whose output is appended to files (`stderr` = None: to the same).

    `before` is Python code that runs first, such as a change of a function.
    """
    words = [str(argument) for argument in arguments]
    return ForkedVerb(start_forked(_run, words, cwd, stdout, stderr or stdout, before))


def start_forked(function: Callable[..., None], *arguments: object) -> ForkServerProcess:
    """Start a function of a module in a process that is forked from one that has imported the package."""
    return fork_server.start_process(_call, function, arguments)


def redirect_output(stdout: Path, stderr: Path) -> None:
    """Append this process's output to files, and give it no input."""
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115 - lives as long as the process


def run_verb(*arguments: object, cwd: Path, timeout_s: float = 240) -> CompletedProcess[str]:
    """Run a verb to its end, as `run_sh` does."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        verb = start_verb(arguments, cwd, stdout, stderr)
        code = verb.wait(timeout_s)
        if code is None:
            verb.kill()
            raise TimeoutError(f"{arguments} took more than {timeout_s} s")
        return CompletedProcess(list(arguments), code, stdout.read_text(), stderr.read_text())


def _call(function: Callable[..., None], arguments: Sequence[object]) -> None:
    assert _IMPORTS in sys.modules
    function(*arguments)


def _run(arguments: list[str], cwd: Path, stdout: Path, stderr: Path, before: str | None) -> None:
    from vit_static.__main__ import main

    os.chdir(cwd)
    redirect_output(stdout, stderr)
    sys.argv = ["vit_static", *arguments]
    if before is not None:
        exec(before, {})
    sys.exit(main(arguments))
