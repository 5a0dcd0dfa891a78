"""Experiment trackers of a run: TensorBoard's event file, and Weights & Biases, MLflow and SwanLab as processes."""

from __future__ import annotations

import base64
import errno
import importlib.util
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from vit_static.common.errors import UserError
from vit_static.config.schema import Config
from vit_static.train.file_sinks import EventFile, numbers_of
from vit_static.train.sinks import Record, Sink

_TITLES = {"wandb": "Weights & Biases", "mlflow": "MLflow", "swanlab": "SwanLab"}
_MAX_WAITING = 10_000  # records for a tracker's process, about 3 MB, before GuardedSink keeps them
_MAX_BEFORE_PICTURES = 100  # records that may wait before pictures, which are left out otherwise


def check_trackers(config: Config) -> None:
    """Raise UserError if packages of trackers aren't installed."""
    trackers = dict.fromkeys(config.log.trackers)
    missing = [name for name in trackers if name in _TITLES and importlib.util.find_spec(name) is None]
    if missing:
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise UserError(
            f"log.trackers: {' and '.join(missing)} {are} not installed; install {them} with '{sys.executable} -m pip "
            f"install {' '.join(missing)}', or remove {them} from log.trackers"
        )


def make_trackers(config: Config, done_steps: int) -> list[Sink[Record]]:
    """Return the trackers of the config. `done_steps`: the steps that a resumed run has done."""
    parameters = flatten(config.model_dump(mode="json", by_alias=True))
    return [
        EventFile(config.run_dir, done_steps, parameters)
        if name == "tensorboard"
        else TrackerProcess(
            name, config.run_dir, config.name, parameters, config.log.tracker_timeout_s, resumes=done_steps > 0
        )
        for name in config.log.trackers
    ]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Return nested values by dotted key; lists as JSON, and None as "null"."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float) else json.dumps(value)
    return flat


class TrackerProcess(Sink[Record]):
    """A tracker in a process of its own (tracker_process.py), so that whatever its package does, training continues.

    A thread sends records to the process over a pipe, so `write` never waits. Where too many wait for the thread,
    because the package hangs, `write` raises BlockingIOError, and GuardedSink keeps the records. A file has what the
    package prints.
    """

    def __init__(
        self,
        tracker: str,
        run_dir: Path,
        run_name: str,
        parameters: dict[str, Any],
        timeout_s: float,
        *,
        resumes: bool = False,
        module: Sequence[str] = ("-m", "vit_static.train.tracker_process"),
    ) -> None:
        """`timeout_s`: how long `close` waits for the process. `resumes`: continue the tracker's run of an earlier
        process, whose id is in a file. `module`: what Python runs."""
        self.name = _TITLES.get(tracker, tracker)
        self._log_path = run_dir / "log" / f"{tracker}.log"
        self._id_path = self._log_path.with_suffix(".id")
        self._command = [sys.executable, *module, tracker, str(self._id_path)]
        self._run = {"name": run_name, "run_dir": str(run_dir), "parameters": parameters}
        self._timeout_s, self._resumes = timeout_s, resumes
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_broken = False  # the pipe

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, or no longer reads."""
        return self._is_broken or (self._process is not None and self._process.poll() is not None)

    def write(self, item: Record) -> None:
        numbers = {name: value for name, value in numbers_of(item).items() if math.isfinite(value)}
        if not numbers and (not item.pictures or self._lines.qsize() > _MAX_BEFORE_PICTURES):
            return
        if self._process is None:
            self._start()
        if self.has_ended:
            raise BrokenPipeError(errno.EPIPE, f"its process has ended; {self._log_path} says why")
        pictures = {name: base64.b64encode(png).decode() for name, png in item.pictures.items()}
        try:
            self._lines.put_nowait(_line({"step": item.step, "numbers": numbers, "pictures": pictures}))
        except queue.Full:
            raise BlockingIOError(errno.EAGAIN, f"it doesn't answer; {self._log_path} may say why") from None

    def _start(self) -> None:
        self._log_path.parent.mkdir(exist_ok=True)
        if not self._resumes:
            self._id_path.unlink(missing_ok=True)
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for the training process
            )
        self._lines.put_nowait(_line(self._run))
        threading.Thread(target=self._send, args=(self._process.stdin,), daemon=True).start()

    def _send(self, pipe: IO[bytes]) -> None:
        """Send lines until there are no more, or the process has ended."""
        try:
            with pipe:
                while (line := self._lines.get()) is not None:
                    pipe.write(line)
                    pipe.flush()
        except OSError:
            self._is_broken = True

    def close(self) -> None:
        """Let the process send what it has. Raises OSError if it fails, or takes too long and is ended."""
        process, self._process = self._process, None
        if process is None:
            return
        deadline = time.monotonic() + self._timeout_s
        try:
            self._lines.put(None, timeout=self._timeout_s)
            exit_code = process.wait(max(deadline - time.monotonic(), 0.0))
        except (queue.Full, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the package has started
            process.wait()
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"it did not finish within {self._timeout_s:g} s (log.tracker_timeout_s) and was ended; "
                f"{self._log_path} may say why",
            ) from None
        if exit_code != 0:
            raise OSError(errno.EPIPE, f"its process has ended with exit code {exit_code}; {self._log_path} says why")


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
