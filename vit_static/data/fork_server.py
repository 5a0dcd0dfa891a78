"""Processes forked from one that has imported what they need: only the first of them waits for the imports.

The process that is forked is multiprocessing's "fork server". It has one thread and none of this process's memory, so
that forking it is safe.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any

_processes = multiprocessing.get_context("forkserver")
_modules: list[str] = []
# Starting a process asks all others for their exit codes, each of which can be read once.
_lock = threading.Lock()


def preload(module: str) -> None:
    """Have the server import a module when it starts. Has no effect on one that already runs."""
    if module not in _modules:
        _modules.append(module)


def start_process(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start a function of a module, with arguments that can be pickled, in a process that is forked from the server."""
    process = _processes.Process(target=_call, args=(os.environ.get("PYTHONPATH"), function, arguments))
    with _lock:
        _processes.set_forkserver_preload(_modules)
        _ensure_running()
        process.start()
    return process


def exit_code(process: ForkServerProcess) -> int | None:
    """Return the exit code: -9 after SIGKILL, None while the process runs."""
    with _lock:
        return process.exitcode


def _ensure_running() -> None:
    module_path = os.environ.get("PYTHONPATH")
    # Before Python 3.12.8 the server gets no sys.path, and passes over a module that it can't find.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        _set_module_path(module_path)


def _set_module_path(module_path: str | None) -> None:
    os.environ.pop("PYTHONPATH", None)
    if module_path is not None:
        os.environ["PYTHONPATH"] = module_path


def _call(module_path: str | None, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _set_module_path(module_path)
    function(*arguments)
