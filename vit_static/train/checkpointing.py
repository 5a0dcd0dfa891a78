"""Asynchronous saving of a run's checkpoints, and the log of the results.

RunSpec.due and Trainer.fit decide when to save.
"""

from __future__ import annotations

from vit_static.checkpoint.progress import Progress
from vit_static.checkpoint.writer import CheckpointWriter, SaveResult
from vit_static.program.program import Program
from vit_static.train.metrics import MetricLogger
from vit_static.train.run_spec import RunSpec


class Checkpointer:
    """Saves the state without holding up training, and logs the results as they come in."""

    def __init__(self, writer: CheckpointWriter, spec: RunSpec, metrics: MetricLogger, saved: Progress) -> None:
        """`saved`: the progress that needs no saving, since the run starts from it."""
        self.problem: str | None = None  # why the last checkpoint couldn't be written
        self._writer, self._spec, self._metrics, self._saved = writer, spec, metrics, saved

    def save(self, program: Program, progress: Progress) -> None:
        """Copy the state and let a thread write it; nothing where this progress has been saved. All ranks together."""
        if progress != self._saved:
            position = self._spec.data_position(progress)
            self._writer.save_async(program.shard, progress, position, self._spec.lr_at(progress.step))
            self._saved = progress

    def restored(self, progress: Progress) -> None:
        """Note that the state is that of an earlier checkpoint again."""
        self._saved = progress

    def wait(self) -> None:
        """Return when nothing is being written."""
        self._writer.wait()

    @property
    def writing_step(self) -> int | None:
        """The step of the checkpoint that is being written; None if none is."""
        return self._writer.writing_step

    def log_save_results(self) -> None:
        """Log the results of saves since the last call; `problem` is then the last one's."""
        while not self._writer.results.empty():
            self._log_result(self._writer.results.get())

    def describe(self) -> str | None:
        """Describe the cost of all checkpoints; None if there were none."""
        return self._writer.stats.describe() if self._writer.stats.num_written else None

    def _log_result(self, result: SaveResult) -> None:
        self.problem = result.problem
        self._metrics.log_event(
            result.step,
            "checkpoint" if result.problem is None else "no checkpoint",
            seconds_waited=round(result.seconds_waited, 4),
            seconds_written=round(result.seconds_written, 4),
            bytes=result.num_bytes,
            problem=result.problem,
        )
        if result.problem is not None:
            self._metrics.say(f"the checkpoint of step {result.step} could not be written: {result.problem}")
