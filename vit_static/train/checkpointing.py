"""Log what becomes of asynchronous checkpoint writes."""

from __future__ import annotations

from vit_static.checkpoint.writer import CheckpointWriter
from vit_static.train.metrics import RunLog


def log_save_results(
    saver: CheckpointWriter, log: RunLog, num_images: int, batch_size: int, unwritten: str | None
) -> str | None:
    """Logs what has become of checkpoints. Why the last of them couldn't be written, or None if it could."""
    while not saver.written.empty():
        written = saver.written.get()
        unwritten = written.problem
        log.record(
            "event",
            written.step,
            written.step * batch_size / num_images,
            event="checkpoint" if written.problem is None else "no checkpoint",
            seconds_waited=round(written.seconds_waited, 4),
            seconds_written=round(written.seconds_written, 4),
            bytes=written.num_bytes,
            problem=written.problem,
        )
        if written.problem is not None:
            log.say(f"the checkpoint of step {written.step} could not be written: {written.problem}")
    return unwritten
