"""Console, JSONL and TensorBoard logging."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from vit_static.common.text import duration, escape_lines, print_text


class RunLog:
    """The log of one rank; only rank 0 writes anything. A context manager that closes its files."""

    def __init__(self, run_dir: Path | None, rank: int = 0, tensorboard: bool = True, done_steps: int = 0) -> None:
        """`run_dir` None logs to the console alone. `done_steps`: the steps that a resumed run has done; TensorBoard
        drops what an earlier process wrote of later ones."""
        self._is_writer = rank == 0
        self._metrics: TextIO | None = None
        self._events: Any = None
        self._bar: tqdm[Any] | None = None
        if run_dir is not None and self._is_writer:
            path = run_dir / "metrics.jsonl"
            is_cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
            self._metrics = path.open("a", encoding="utf-8")
            if is_cut_off and path.stat().st_size:
                self._metrics.write("\n")  # a killed run left half a line; the next one must not be appended to it
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
        """Print a line on the console, above the progress bar if there is one."""
        if not self._is_writer:
            return
        if self._bar is not None:
            self._bar.write(escape_lines(text), file=sys.stdout)
        else:
            print_text(text, flush=True)

    def say_json(self, values: dict[str, Any]) -> None:
        """Print one line of JSON, for programs that read the console."""
        self.say(json.dumps(values))

    def record(self, kind: str, step: int, epoch: float, *, tag: str | None = None, **values: Any) -> None:
        """Append a line to metrics.jsonl. Its numbers also go to TensorBoard, as ``kind/key`` or ``tag/key``, but those
        of events.
        """
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
                    self._events.add_scalar(f"{tag or kind}/{key}", value, step)

    def open_bar(self, total_steps: int, done_steps: int) -> None:
        """Show a progress bar on a terminal; elsewhere the lines of the log steps are all there is."""
        if self._is_writer and sys.stdout.isatty():
            num_columns = os.get_terminal_size(sys.stdout.fileno()).columns
            self._bar = tqdm(
                total=total_steps,
                initial=done_steps,
                unit="step",
                # Some pseudo-terminals report 0 columns, for which tqdm shows nothing.
                ncols=None if num_columns else 100,
                nrows=None if num_columns else 20,
                dynamic_ncols=num_columns > 0,
                file=sys.stdout,
            )

    def reopen_bar(self, total_steps: int, done_steps: int) -> None:
        """Restart the progress bar after a rollback."""
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

    def say_train_step(self, step: int, total_steps: int, values: dict[str, float], seconds_left: float) -> None:
        """Show a log step: in the progress bar if there is one, else as a line."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['images_per_s']:.0f} images/s")
            return
        text = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad_norm {values['grad_norm']:.2f}  "
            f"{values['images_per_s']:.0f} images/s  data_wait {values['data_wait']:.1%}"
        )
        if values.get("mfu") is not None:
            text += f"  mfu {values['mfu']:.1%}"
        self.say(f"step {step}/{total_steps}  {text}  {duration(seconds_left)} left")
