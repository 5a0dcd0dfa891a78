"""The launcher and the doctor, and what they start, in forked processes that needn't import Paddle and DALI.

That import is half of the CPU time of a short run. Everything else is as on the command line: the launcher's code, its
signals, each worker's own process, session, environment and output. tests/test_command_line.py starts real ones.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NoReturn

from helpers.forked_verbs import ForkedVerb, redirect_output, start_forked
from helpers.small import ROOT

_popen = subprocess.Popen


def run_module(module: str, arguments: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Do what `python -m MODULE ARGUMENTS` does, in this forked process, and end it.

    What it starts of the package is forked, too.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # as after an exec, which drops handlers
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python sets them when it starts
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environ)
    _note_process()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=True)
    subprocess.Popen = start_module
    sys.argv = [module, *arguments]
    code_folder = environ.get("PYTHONPATH", "").split(os.pathsep)[0]
    if code_folder and Path(code_folder) != ROOT:  # a copy of the package, with a fault
        for name in [name for name in sys.modules if name.partition(".")[0] == "vit_static"]:
            del sys.modules[name]
        sys.path.insert(0, code_folder)
    code: Any = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_module(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a process as `subprocess.Popen` does; if it runs a module of the package, it doesn't get as far as exec."""
    if list(command[:2]) != [sys.executable, "-m"] or command[2].partition(".")[0] != "vit_static":
        return _popen(command, **options)
    prepare, environ = options.pop("preexec_fn"), options["env"]

    def become_module() -> None:
        prepare()
        os.closerange(3, 1024)  # among them the pipe by which Popen learns of the exec
        run_module(command[2], command[3:], environ)

    return _popen(command, preexec_fn=become_module, **options)


def _note_process() -> None:
    """Write this process's rank for `processes_of`, since /proc has the environment that it was forked with."""
    if "TEST_PROCESSES" in os.environ:
        folder = Path(os.environ["TEST_PROCESSES"])
        folder.mkdir(exist_ok=True)
        (folder / str(os.getpid())).write_text(os.environ.get("PADDLE_TRAINER_ID", ""))


def processes_of(folder: Path) -> dict[int, str]:
    """Return the ranks of the running processes by process ID, with an empty rank for a launcher."""
    running = {}
    for path in folder.glob("*"):
        try:
            state = Path(f"/proc/{path.name}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            running[int(path.name)] = path.read_text()
    return running


class ForkedLaunch:
    """What tests use of `subprocess.Popen`, for `python -m vit_static.launch ARGUMENTS` or another module."""

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path,
        environ: Mapping[str, str],
        output: Path,
        module: str = "vit_static.launch",
    ) -> None:
        """`output`: the path of the files with standard output and error, without their suffixes."""
        self._stdout, self._stderr = output.with_suffix(".stdout"), output.with_suffix(".stderr")
        self._process = ForkedVerb(
            start_forked(_run, module, list(arguments), cwd, dict(environ), self._stdout, self._stderr)
        )

    @property
    def pid(self) -> int:
        return self._process.process_id

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exit_code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        code = self._process.wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("vit_static.launch", timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, and return standard output and error."""
        self.wait(timeout)
        return self._stdout.read_text(), self._stderr.read_text()


def run_forked_launch(*arguments: object, cwd: Path, timeout_s: float = 240, **environ: str) -> CompletedProcess[str]:
    """Run the launcher to its end, as `run_sh` does, with variables added to the environment."""
    return run_forked_module(
        "vit_static.launch", *arguments, cwd=cwd, timeout_s=timeout_s, environ=os.environ | environ
    )


def run_forked_module(
    module: str, *arguments: object, cwd: Path, timeout_s: float, environ: Mapping[str, str]
) -> CompletedProcess[str]:
    """Do what `python -m MODULE ARGUMENTS` does, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        launched = ForkedLaunch([str(each) for each in arguments], cwd, environ, output, module)
        try:
            stdout, stderr = launched.communicate(timeout_s)
        finally:
            launched.kill()  # after the time limit; what it has started ends with it
        return CompletedProcess(list(arguments), launched.wait(), stdout, stderr)


def _run(module: str, arguments: list[str], cwd: Path, environ: dict[str, str], stdout: Path, stderr: Path) -> None:
    os.chdir(cwd)
    redirect_output(stdout, stderr)
    run_module(module, arguments, environ)
