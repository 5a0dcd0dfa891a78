"""What only reports never blocks, ends or falsifies a run: full disks, closed outputs, failing trackers, slow disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.forked_verbs import ForkedVerb, start_verb
from helpers.jobs import wait_until
from helpers.runs import TINY
from helpers.small import ROOT
from helpers.small_disk import DiskOfProcess, mount_code

from vit_static.common.errors import describe_error
from vit_static.report.run_log import read_metrics
from vit_static.train.file_sinks import EventFile, MetricsFile, ReportPage
from vit_static.train.log import RunLog
from vit_static.train.sinks import GIVE_UP_S, MAX_EXCEPTIONS, GuardedSink, Record, Sink

pytestmark = pytest.mark.reliability("faults: sinks of a run's log")


class Clock:
    """A clock that stands still unless it is set."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Tracker(Sink[Record]):
    """A tracker that raises `problem`, if it has one, at each attempt."""

    name = "the tracker"

    def __init__(self, problem: Exception | None) -> None:
        self.problem, self.num_attempts = problem, 0
        self.steps: list[int] = []

    def write(self, item: Record) -> None:
        self.num_attempts += 1
        if self.problem is not None:
            raise self.problem
        self.steps.append(item.step)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Make the kernel refuse what is written beyond a position, in the middle of a write (setrlimit(2))."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def record(step: int, **values: Any) -> Record:
    return Record("train", step, 0.0, {"loss": 0.5, **values}, time=1.0)


def guarded(sink: Sink[Record], **options: Any) -> tuple[GuardedSink[Record], Clock, list[str]]:
    clock, messages = Clock(), list[str]()
    return GuardedSink(sink, lambda _, message: messages.append(message), clock=clock, **options), clock, messages


# -- the guard ---------------------------------------------------------------------------------------------------------


def test_a_failing_sink_is_tried_again_ever_later_and_loses_nothing() -> None:
    tracker = Tracker(OSError(28, "No space left on device"))
    sink, clock, messages = guarded(tracker)
    attempts = []
    for second in range(1000):
        clock.seconds, before = float(second), tracker.num_attempts
        sink.write(record(second))
        attempts += [second] * (tracker.num_attempts - before)
    assert attempts == [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 811]  # at most 300 s apart
    tracker.problem = None
    sink.close()
    assert tracker.steps == list(range(1000))
    assert len(messages) == 1 and "the tracker can't be written (No space left on device)" in messages[0]


def test_a_sink_is_dropped_in_the_end() -> None:
    for problem, num_attempts in ((ValueError("refused"), MAX_EXCEPTIONS), (BrokenPipeError(32, "Broken pipe"), 1)):
        tracker = Tracker(problem)
        sink, clock, messages = guarded(tracker)
        for step in range(100):
            clock.seconds += 1000.0
            sink.write(record(step))
        sink.close()
        assert tracker.num_attempts == num_attempts
        assert "nothing more will be written" in messages[-2] and "100 records are lost" in messages[-1]
    tracker = Tracker(OSError(28, "No space left on device"))
    sink, clock, messages = guarded(tracker)
    for clock.seconds in (0.0, GIVE_UP_S - 1.0, GIVE_UP_S + 1000.0, GIVE_UP_S + 2000.0):
        sink.write(record(0))
    assert tracker.num_attempts == 3 and len(messages) == 2


@pytest.mark.parametrize("num_bytes", [0, 30, 100, 130])
def test_no_line_is_torn_or_doubled_where_the_disk_was_full(tmp_path: Path, num_bytes: int) -> None:
    sink, clock, messages = guarded(MetricsFile(tmp_path))
    with largest_file(num_bytes):
        for step in range(5):
            sink.write(record(step))
    clock.seconds = 10.0
    sink.write(record(5))
    sink.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6)) and len(messages) == 1


def test_records_that_are_lost_are_counted_in_the_file(tmp_path: Path) -> None:
    sink, clock, messages = guarded(MetricsFile(tmp_path), max_buffered=3)
    with largest_file(20):
        for step in range(10):
            sink.write(record(step))
    clock.seconds = 10.0
    sink.write(record(10))
    sink.close()
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries if entry["kind"] == "train"] == [0, 9, 10]
    assert [(entry["event"], entry["num_records"]) for entry in entries if entry["kind"] == "event"] == [
        ("records lost", 8)
    ]
    assert len(messages) == 1


def test_an_event_file_is_whole_after_a_full_disk(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter

    sink, clock, _ = guarded(EventFile(tmp_path, done_steps=2))
    with largest_file(50):
        sink.write(record(3))
    clock.seconds = 10.0
    sink.write(record(4))
    sink.close()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    events, offset = [], 0
    while offset < len(content):
        length = int.from_bytes(content[offset : offset + 8], "little")
        events.append(Event.FromString(content[offset + 12 : offset + 12 + length]))
        offset += 12 + length + 4
    writer = RecordWriter(str(tmp_path / "theirs"))
    for event in events:
        writer.write(event.SerializeToString())
    writer.close()
    assert (tmp_path / "theirs").read_bytes() == content
    assert [event.step for event in events] == [0, 3, 3, 4] and events[1].session_log.status == 1


def test_a_tracker_that_raises_is_reported_once_by_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(RuntimeError("the server\nis away"))
    with RunLog(tmp_path, trackers=[tracker]) as log:
        for step in (1, 2, 3):
            log.record("train", step, 0.1, loss=1.0)
    out, err = capsys.readouterr()
    assert out.count("the tracker can't be written (RuntimeError: the server\\nis away)") == 1 and not err
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries if entry["kind"] == "train"] == [1, 2, 3]
    assert [entry["sink"] for entry in entries if entry.get("event") == "sink failed"] == [tracker.name] * 2


def test_an_error_without_a_file_is_described_without_none() -> None:
    errors = [OSError(30, "Read-only file system"), OSError(), OSError("odd"), OSError(30, "Read-only", None)]
    assert [describe_error(error) for error in errors] == ["Read-only file system", "OSError", "odd", "Read-only"]
    assert describe_error(OSError(28, "full", b"/tmp/\xff\n")) == "/tmp/\\xff\\n: full"
    assert describe_error(KeyError()) == "KeyError"


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path, small_digits: Path) -> Iterator[Callable[..., ForkedVerb]]:
    """Return start(*overrides, stdout=..., before=...), which starts a run with messages in `stderr`."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    verbs = []

    def start_run(*overrides: str, stdout: Path | None = None, before: str | None = None) -> ForkedVerb:
        words = [word for override in (f"data.root={small_digits}", *overrides) for word in ("-o", override)]
        arguments = ["pretrain", "-c", "tiny.yaml", *words]
        verb = start_verb(arguments, tmp_path, stdout or tmp_path / "stdout", tmp_path / "stderr", before)
        verbs.append(verb)
        return verb

    yield start_run
    for verb in verbs:
        if verb.exit_code is None:
            verb.kill()


LONG = ["train.epochs=100000", "log.every_steps=1", "eval.every_epochs=50000", "checkpoint.every_steps=100000"]


def test_a_full_disk_stops_nothing_and_loses_nothing(start: Callable[..., ForkedVerb], tmp_path: Path) -> None:
    """With TensorBoard, on a file system that is full for a while; one SIGTERM then saves the state."""
    output, stdout = tmp_path / "output", tmp_path / "stdout"
    output.mkdir()
    verb = start(*LONG, before=mount_code(output, 3 << 20))

    def has_lines(number: int) -> Callable[[], bool]:
        return lambda: stdout.exists() and stdout.read_text().count("images/s") >= number

    wait_until(has_lines(3))
    disk = DiskOfProcess(verb.process_id, output)
    disk.fill()
    wait_until(lambda: "metrics.jsonl can't be written" in stdout.read_text())
    wait_until(has_lines(stdout.read_text().count("images/s") + 100))
    assert stdout.read_text().count("can't be written") <= 2  # each of the files once
    disk.free()
    os.kill(verb.process_id, signal.SIGTERM)
    assert verb.wait(60) == 75
    text = stdout.read_text()
    num_steps = int(text.rpartition("stopped by a signal at step ")[2].partition(";")[0])
    entries = read_metrics(disk.path / "tiny/metrics.jsonl")
    assert [entry["step"] for entry in entries if entry["kind"] == "train"] == list(range(1, num_steps + 1))
    assert (disk.path / f"tiny/checkpoints/step_{num_steps:08d}/meta.json").exists()
    assert "records are lost" not in text + (tmp_path / "stderr").read_text()
    disk.close()


def test_one_sigterm_ends_a_run_whose_disk_stays_full(start: Callable[..., ForkedVerb], tmp_path: Path) -> None:
    output, stdout = tmp_path / "output", tmp_path / "stdout"
    output.mkdir()
    verb = start(*LONG, before=mount_code(output, 3 << 20))
    wait_until(lambda: stdout.exists() and stdout.read_text().count("images/s") >= 3)
    disk = DiskOfProcess(verb.process_id, output)
    disk.fill()
    wait_until(lambda: "metrics.jsonl can't be written" in stdout.read_text())
    os.kill(verb.process_id, signal.SIGTERM)
    assert verb.wait(60) == 1  # the state can't be saved
    stderr = (tmp_path / "stderr").read_text()
    assert "No space left on device" in stderr and "Traceback" not in stderr
    assert "records are lost" in stdout.read_text()
    disk.close()


def test_a_run_whose_reader_leaves_ends_with_its_state_saved(start: Callable[..., ForkedVerb], tmp_path: Path) -> None:
    """As `pretrain | head -18` does; on a full disk behind a redirected stdout, too."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    verb = start("name=head", "log.every_steps=1", stdout=pipe)
    with pipe.open() as reader:
        assert any("step 2/" in line for line in reader)
    full = start("name=full", stdout=Path("/dev/full"))
    for run, name in ((verb, "head"), (full, "full")):
        assert run.wait(60) == 0
        assert (tmp_path / f"output/{name}/model.pdparams").exists()
        entries = read_metrics(tmp_path / f"output/{name}/metrics.jsonl")
        assert [entry for entry in entries if entry.get("event") == "sink failed"]
    stderr = (tmp_path / "stderr").read_text()
    assert "(Broken pipe): nothing more will be written to it; training continues" in stderr
    assert "(No space left on device); training continues" in stderr and "Traceback" not in stderr


def test_a_stop_that_hangs_ends_within_its_limit(start: Callable[..., ForkedVerb], tmp_path: Path) -> None:
    """A disk that doesn't answer: fsync of a checkpoint never returns."""
    hang = "import time; from vit_static.checkpoint import writer; writer.fsync = lambda path: time.sleep(1000)"
    verb = start(*LONG, "train.stop_timeout_s=1", before=hang)
    wait_until(lambda: (tmp_path / "stdout").exists() and "images/s" in (tmp_path / "stdout").read_text())
    started = time.monotonic()
    os.kill(verb.process_id, signal.SIGTERM)
    assert verb.wait(60) == 1
    assert time.monotonic() - started < 30.0
    assert "the same command resumes from the latest checkpoint" in (tmp_path / "stderr").read_text()


def test_a_disk_that_does_not_answer_ends_the_run_after_the_limit(
    start: Callable[..., ForkedVerb], tmp_path: Path
) -> None:
    hang = "import time; from vit_static.checkpoint import writer; writer.fsync = lambda path: time.sleep(1000)"
    verb = start("train.max_steps=2", "checkpoint.write_timeout_s=1", before=hang)
    assert verb.wait(120) == 1
    stderr = (tmp_path / "stderr").read_text()
    assert "within 1 s (checkpoint.write_timeout_s)" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "output/tiny/model.pdparams").exists()


def test_closed_streams_are_those_of_no_other_file(tmp_path: Path) -> None:
    code = "from vit_static.common.startup import use_utf8; use_utf8(); print('x'); open('f', 'w').write('y')"
    command = f'{sys.executable} -c "{code}" <&- >&- 2>&-'
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, shell=True, cwd=tmp_path, env=environ).returncode == 0
    assert (tmp_path / "f").read_text() == "y"


# -- the report of a run that goes on ----------------------------------------------------------------------------------


def test_pages_at_log_steps_take_a_hundredth_of_the_time_at_most(tmp_path: Path) -> None:
    MetricsFile(tmp_path).write(Record("event", 0, 0.0, {"event": "started"}))
    seconds = [0.0]

    def clock() -> float:
        seconds[0] += step
        return seconds[0]

    page = ReportPage(tmp_path, clock)
    for step, expected_wait in ((0.001, 5.0), (1.0, 100.0)):  # a page is written between two looks at the clock
        page.write(None)
        written, step = seconds[0], 0.0
        for wait, is_due in ((0.99 * expected_wait, False), (1.01 * expected_wait, True)):
            seconds[0] = written + wait
            assert page.is_due == is_due


@pytest.mark.parametrize("has_end", [True, False])
def test_the_page_of_a_run_that_has_ended_does_not_reload_itself(tmp_path: Path, has_end: bool) -> None:
    """Not after an exception either, of which the log says nothing."""
    path = tmp_path / "report.html"
    with suppress(ZeroDivisionError), RunLog(tmp_path) as log:
        log.record("event", 0, 0.0, event="started")
        log.write_report()
        assert '"refresh_s":10.0' in path.read_text()
        if has_end:
            log.record("event", 0, 0.0, event="finished")
            log.write_report()
            assert '"refresh_s":null' in path.read_text()
        raise ZeroDivisionError
    assert '"refresh_s":null' in path.read_text()
    assert ("finished" if has_end else "running or killed: the log has no end") in path.read_text().rsplit("<body>")[-1]
