"""Console, JSONL, TensorBoard and report of a run, none of which can end it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_static.common.text import duration, say
from vit_static.report.error_analysis import ErrorAnalysis
from vit_static.report.run_log import SINK_FAILED
from vit_static.train.console import Console
from vit_static.train.file_sinks import MetricsFile, ReportPage
from vit_static.train.sinks import PICTURES, GuardedSink, Record, Sink
from vit_static.train.tracker_pictures import draw_pictures


class RunLog:
    """The log of one rank; only rank 0 writes anything. A context manager that closes its sinks."""

    def __init__(
        self,
        run_dir: Path,
        rank: int = 0,
        trackers: Sequence[Sink[Record]] = (),
    ) -> None:
        """`trackers` get every record, as metrics.jsonl does, and the pictures of evaluations."""
        self._is_writer = rank == 0
        self._position = 0, 0.0  # step and epoch of the last record
        self._analysis: ErrorAnalysis | None = None
        self._bar = Console()
        self._console: GuardedSink[str] = GuardedSink(self._bar, self._report_failure)
        self._page = ReportPage(run_dir)
        self._report: GuardedSink[ErrorAnalysis | None] = GuardedSink(self._page, self._report_failure, max_buffered=1)
        self._trackers: list[GuardedSink[Record]] = [GuardedSink(sink, self._report_failure) for sink in trackers]
        self._records = [GuardedSink(MetricsFile(run_dir), self._report_failure), *self._trackers]

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_writer:
            # Each is reported on those that are closed after it.
            for sink in reversed(self._records):
                sink.close()
            self._report.close()
            self._console.close()

    @property
    def num_columns(self) -> int:
        """Width of the terminal; very large for files."""
        return self._bar.num_columns

    def say(self, text: str) -> None:
        """Print a line on the console, above the progress bar if there is one."""
        if self._is_writer:
            self._console.write(text)

    def record(self, kind: str, step: int, epoch: float, *, tag: str | None = None, **values: Any) -> None:
        """Add a record to metrics.jsonl, TensorBoard and trackers. `tag` replaces the kind in TensorBoard's names."""
        self._position = step, epoch
        self._add_record(Record(kind, step, epoch, values, tag))

    def write_report(self, analysis: ErrorAnalysis | None = None) -> None:
        """Write report.html and, if there is a new one, the error analysis."""
        if self._is_writer:
            self._analysis = analysis or self._analysis  # an earlier one may not have been written yet
            self._report.write(self._analysis)
            # Not to a tracker that is failing, for which they would be kept in memory.
            trackers = [tracker for tracker in self._trackers if not tracker.has_backlog]
            if analysis is not None and trackers:
                step, epoch = self._position
                record = Record(PICTURES, step, epoch, pictures=draw_pictures(analysis))
                for tracker in trackers:
                    tracker.write(record)

    def update_report(self) -> None:
        """Write report.html at a log step, unless it was written a short time ago."""
        if self._page.is_due:
            self.write_report()

    def open_bar(self, total_steps: int, done_steps: int) -> None:
        """Show a progress bar on a terminal; elsewhere the lines of the log steps are all there is."""
        if self._is_writer:
            self._bar.open_bar(total_steps, done_steps)

    def reopen_bar(self, total_steps: int, done_steps: int) -> None:
        """Restart the progress bar after a rollback."""
        if self._bar.has_bar:
            self.close_bar()
            self.open_bar(total_steps, done_steps)

    def advance_bar(self) -> None:
        self._bar.advance_bar()

    def close_bar(self) -> None:
        self._bar.close_bar()

    def say_train_step(self, step: int, total_steps: int, values: dict[str, float], seconds_left: float | None) -> None:
        """Show a log step: in the progress bar if there is one, else as a line.

        `seconds_left` is None at the first step, whose speed isn't shown either: it compiles the program.
        """
        has_speed = seconds_left is not None
        if self._bar.has_bar:
            speed = f", {values['images_per_s']:.0f} images/s" if has_speed else ""
            self._bar.describe_bar(f"loss {values['loss']:.3f}{speed}")
            return
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad_norm {values['grad_norm']:.2f}"
        if has_speed:
            text += f"  {values['images_per_s']:.0f} images/s  data_wait {values['data_wait']:.1%}"
        if has_speed and values.get("mfu") is not None:
            text += f"  mfu {values['mfu']:.1%}"
        if seconds_left is not None:
            text += f"  {duration(seconds_left)} left"
        self.say(f"step {step}/{total_steps}  {text}")

    def _add_record(self, record: Record, without: object = None) -> None:
        if self._is_writer:
            for sink in self._records:
                if sink is not without:
                    sink.write(record)

    def _report_failure(self, sink: GuardedSink[Any], message: str) -> None:
        """Tell the other sinks that this one has failed. What the console can't show goes to stderr."""
        if sink is self._console or self._console.is_closed:
            say(message)
        else:
            self._console.write(message)
        step, epoch = self._position
        values = {"event": SINK_FAILED, "sink": sink.name, "problem": message}
        self._add_record(Record("event", step, epoch, values), without=sink)
