"""Files of every run: metrics.jsonl, TensorBoard event file, report."""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vit_static.common.text import json_text
from vit_static.report.error_analysis import EVALUATION_FILE, ErrorAnalysis
from vit_static.report.page import REPORT_FILE, write_live_report, write_report
from vit_static.report.run_log import METRICS_FILE, RECORDS_LOST
from vit_static.train.sinks import PICTURES, Record, Sink


class PartialWriter:
    """Writes data to file descriptors so that, after an error in the middle, a retry continues where it stopped."""

    def __init__(self) -> None:
        self._rest = b""

    def write(self, descriptor: int, data: bytes) -> None:
        """Write all of `data`; after an error, only what is missing of the data that was cut off. Raises OSError."""
        self._rest = self._rest or data
        while self._rest:
            self._rest = self._rest[os.write(descriptor, self._rest) :]


class MetricsFile(Sink[Record]):
    """metrics.jsonl: one line of JSON per record, with None for numbers that aren't finite."""

    def __init__(self, run_dir: Path) -> None:
        self.name = str(run_dir / METRICS_FILE)
        self._path, self._descriptor = run_dir / METRICS_FILE, -1
        self._writer = PartialWriter()
        self._last_step, self._last_epoch = 0, 0.0

    def write(self, item: Record) -> None:
        if item.kind == PICTURES:
            return
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._descriptor).st_size
            # A killed run may have left half a line, to which the next one must not be appended.
            self._is_cut_off = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        entry = {"kind": item.kind, "step": item.step, "epoch": round(item.epoch, 4), **item.values}
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        self._writer.write(self._descriptor, ("\n" * self._is_cut_off + json_text(finite) + "\n").encode())
        self._is_cut_off = False
        self._last_step, self._last_epoch = item.step, item.epoch

    def loss_note(self, num_lost: int) -> Record:
        """Return an event with the number of lost records."""
        return Record("event", self._last_step, self._last_epoch, {"event": RECORDS_LOST, "num_records": num_lost})

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def numbers_of(record: Record) -> dict[str, float]:
    """Return a record's numbers for trackers, as ``kind/key`` or ``tag/key``; an event has none."""
    if record.kind == "event":
        return {}
    return {
        f"{record.tag or record.kind}/{key}": value
        for key, value in record.values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class EventFile(Sink[Record]):
    """A TensorBoard event file of the records' numbers and pictures, and of the run's hyperparameters.

    It is written here, in the calling thread: tensorboardX's writer has a thread behind a queue in shared memory, and
    when that thread dies, of a full disk for example, whoever adds to the queue waits forever.
    """

    def __init__(self, run_dir: Path, done_steps: int = 0, parameters: Mapping[str, Any] | None = None) -> None:
        """`done_steps`: the steps that a resumed run has done; TensorBoard drops other files' events of later ones.
        `parameters` are the hyperparameters by name."""
        self._parameters = dict(parameters or {})
        # The name that TensorFlow's EventsWriter gives: time, host, process; TensorBoard needs only "tfevents".
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._path, self.name = run_dir / name, f"TensorBoard's {run_dir / name}"
        self._done_steps, self._descriptor, self._header = done_steps, -1, b""
        self._writer = PartialWriter()

    def write(self, item: Record) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import Summary, scalar

        numbers = numbers_of(item)
        if not numbers and not item.pictures:
            return
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._header = self._first_events(item.time)
        values = [value for name, number in numbers.items() for value in scalar(name, number).value]
        for name, png in item.pictures.items():
            width, height = struct.unpack(">II", png[16:24])  # of the PNG file's header
            picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
            values.append(Summary.Value(tag=name, image=picture))
        event = Event(wall_time=item.time, step=item.step, summary=Summary(value=values))
        self._writer.write(self._descriptor, self._header + _event_record(event))
        self._header = b""

    def _first_events(self, wall_time: float) -> bytes:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        events = [Event(wall_time=wall_time, file_version="brain.Event:2")]
        if self._done_steps:
            start = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=wall_time, step=self._done_steps + 1, session_log=start))
        if self._parameters:
            from tensorboardX.summary import hparams

            metrics = {"eval/top1": 0.0, "eval/loss": 0.0}  # the names of the metrics that the table shows
            experiment, start_info, _ = hparams(self._parameters, metrics)
            events += [Event(wall_time=wall_time, summary=summary) for summary in (experiment, start_info)]
        return b"".join(map(_event_record, events))

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _event_record(event: Any) -> bytes:
    """Return an event as a TFRecord: length, its masked CRC-32C, content, its masked CRC-32C (tf.io.TFRecordWriter)."""
    from tensorboardX.record_writer import masked_crc32c

    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join(
        (length, struct.pack("<I", masked_crc32c(length)), content, struct.pack("<I", masked_crc32c(content)))
    )


class ReportPage(Sink["ErrorAnalysis | None"]):
    """report.html and the error analysis in evaluation.json; None: the latest analysis stays valid.

    The page reloads itself in a browser until the run ends.
    """

    MIN_INTERVAL_S = 5.0  # between two pages at log steps
    MAX_SHARE = 0.01  # of the time, for pages at log steps

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self._run_dir, self._clock = str(run_dir / REPORT_FILE), run_dir, clock
        self._written_analysis: ErrorAnalysis | None = None
        self._due_at = float("-inf")
        self._has_live_page = False

    @property
    def is_due(self) -> bool:
        """Whether a log step should write the page: not too often, since reading a long log takes time."""
        return self._clock() >= self._due_at

    def write(self, item: ErrorAnalysis | None) -> None:
        started = self._clock()
        if item is not None and item is not self._written_analysis:
            item.write(self._run_dir / EVALUATION_FILE)
            self._written_analysis = item
        self._has_live_page = write_live_report(self._run_dir)
        finished = self._clock()
        self._due_at = finished + max(self.MIN_INTERVAL_S, (finished - started) / self.MAX_SHARE)

    def close(self) -> None:
        """Write the page of a run that has ended without a last one, by an exception: it no longer reloads itself."""
        if self._has_live_page:
            self._has_live_page = False
            write_report(self._run_dir)
