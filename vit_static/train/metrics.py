"""What a run says: rank 0's console, ``metrics.jsonl``, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from vit_static.common.text import duration


class RunLog:
    """The log of one rank; all but rank 0's are silent. A context manager: the end closes its files.

    `run_dir` None writes to the console alone. `done_steps`: of a run that goes on; what an earlier process has written
    of later steps TensorBoard then passes over.
    """

    def __init__(self, run_dir: Path | None, rank: int = 0, tensorboard: bool = True, done_steps: int = 0) -> None:
        self.speaks = rank == 0
        self._metrics: TextIO | None = None
        self._events: Any = None
        self._bar: tqdm[Any] | None = None
        if run_dir is not None and self.speaks:
            path = run_dir / "metrics.jsonl"
            unfinished = path.exists() and not path.read_bytes().endswith(b"\n")
            self._metrics = path.open("a", encoding="utf-8")
            if unfinished and path.stat().st_size:
                self._metrics.write("\n")  # a killed run left half a line: what follows must not join it
            if tensorboard:
                from tensorboardX import SummaryWriter

                self._events = SummaryWriter(str(run_dir), purge_step=done_steps + 1 if done_steps else None)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_bar()
        if self._metrics is not None:
            self._metrics.close()
        if self._events is not None:
            self._events.close()

    def say(self, text: str) -> None:
        """A line on the console, above the bar if there is one."""
        if not self.speaks:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def say_json(self, values: dict[str, Any]) -> None:
        """The same for a program that reads the console: one line of JSON."""
        self.say(json.dumps(values))

    def record(self, kind: str, step: int, epoch: float, **values: Any) -> None:
        """A line of metrics.jsonl; the numbers of training and evaluations go to TensorBoard as ``kind/key``."""
        if self._metrics is not None:
            entry = {"kind": kind, "step": step, "epoch": round(epoch, 4), **values}
            finite = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in entry.items()
            }
            self._metrics.write(json.dumps(finite) + "\n")
            self._metrics.flush()
        if self._events is not None and kind != "event":
            for key, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._events.add_scalar(f"{kind}/{key}", value, step)

    def open_bar(self, total_steps: int, done_steps: int) -> None:
        """A bar with the time left, on a terminal; elsewhere the log steps' lines are all there is."""
        if self.speaks and sys.stdout.isatty():
            num_columns = os.get_terminal_size(sys.stdout.fileno()).columns
            self._bar = tqdm(
                total=total_steps,
                initial=done_steps,
                unit="step",
                # Some pseudo-terminals say 0, at which tqdm shows nothing.
                ncols=None if num_columns else 100,
                nrows=None if num_columns else 20,
                dynamic_ncols=num_columns > 0,
                file=sys.stdout,
            )

    def reopen_bar(self, total_steps: int, done_steps: int) -> None:
        """For a run that has gone back."""
        if self._bar is not None:
            self.close_bar()
            self.open_bar(total_steps, done_steps)

    def advance_bar(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def train_line(self, step: int, total_steps: int, values: dict[str, float], seconds_left: float) -> None:
        """The console's view of a log step: in the bar, or a plain line."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['images_per_s']:.0f} images/s")
            return
        shown = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad_norm {values['grad_norm']:.2f}  "
            f"{values['images_per_s']:.0f} images/s  data_wait {values['data_wait']:.1%}"
        )
        if values.get("mfu") is not None:
            shown += f"  mfu {values['mfu']:.1%}"
        self.say(f"step {step}/{total_steps}  {shown}  {duration(seconds_left)} left")


class ThroughputMeter:
    """Images a second and the share of the time that data was waited for, between log steps."""

    def __init__(self) -> None:
        self.reset(0.0)

    def reset(self, seconds_waited: float) -> None:
        """Starts a new interval; `seconds_waited` is the feed's running total."""
        self._started = time.perf_counter()
        self._waited = seconds_waited
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Takes time that was not training (an evaluation, a checkpoint) out of the interval."""
        self._paused += seconds

    def read(self, num_images: int, seconds_waited: float) -> tuple[float, float]:
        """(images a second, data wait 0-1) since the last reset."""
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        return num_images / seconds, min(max((seconds_waited - self._waited) / seconds, 0.0), 1.0)


@contextmanager
def log_exceptions(log: RunLog, what: str) -> Iterator[None]:
    """What fails inside is a line of the log: a run doesn't end for something that can be made again."""
    try:
        yield
    except Exception as error:  # anything, a mistake of ours as a full disk
        log.say(f"{what} could not be written: {type(error).__name__}: {error}")
