"""Why and when a run stops, decided by all ranks together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.chaos_run import LAUNCH
from helpers.forked_verbs import start_verb
from helpers.runs import TINY
from helpers.tiny import tiny_model

from vit_static.common.errors import EXIT_STOPPED, DataError, RunFailed
from vit_static.train.stop import BAD_IMAGE, NONFINITE, ON_REQUEST, UNSAVED, SignalWatch, StopController


class Ranks:
    """Agreement as between several ranks, of which the others pass fixed values."""

    def __init__(self, *others: list[str] | None) -> None:
        self.others, self.num_rounds = others, 0

    def __call__(self, value: list[str] | None) -> list[str] | None:
        self.num_rounds += 1
        return next((each for each in (value, *self.others) if each is not None), None)


def controller(
    ranks: Ranks | None = None, *, has_signal: bool = False, stops_on_failed_save: bool = False
) -> StopController:
    return StopController(ranks or Ranks(), lambda: has_signal, stops_on_failed_save=stops_on_failed_save)


def test_a_run_continues_while_no_rank_has_a_reason_to_stop() -> None:
    ranks = Ranks(None, None)
    stop = controller(ranks)
    for _ in range(3):
        stop.poll(None, None)
    assert not stop.requested and stop.may_save and stop.reason is None
    assert ranks.num_rounds == 3  # one agreement per step, whatever a rank knows
    stop.raise_if_failed(7, "check", "hint")


@pytest.mark.parametrize(
    ("bad_image", "has_signal", "failed_save", "stops_on_failed_save", "expected"),
    [
        ("a.jpg: is cut off", False, None, False, (BAD_IMAGE, "a.jpg: is cut off", True)),
        ("a.jpg: is cut off", True, "disk full", True, (BAD_IMAGE, "a.jpg: is cut off", True)),
        (None, True, None, False, (ON_REQUEST, "", True)),
        (None, True, "disk full", True, (ON_REQUEST, "", True)),
        (None, False, "disk full", True, (UNSAVED, "disk full", False)),
        (None, False, "disk full", False, None),  # checkpoint.on_failure=continue
    ],
)
def test_the_reasons_and_which_comes_first(
    bad_image: str | None,
    has_signal: bool,
    failed_save: str | None,
    stops_on_failed_save: bool,
    expected: tuple[str, str, bool] | None,
) -> None:
    stop = controller(has_signal=has_signal, stops_on_failed_save=stops_on_failed_save)
    stop.poll(bad_image, failed_save)
    assert stop.requested == (expected is not None)
    if expected is not None:
        assert (stop.reason, stop.message, stop.may_save) == expected


def test_another_ranks_reason_stops_this_one() -> None:
    stop = controller(Ranks(None, [BAD_IMAGE, "b.jpg: is empty"]))
    stop.poll(None, None)
    with pytest.raises(DataError, match=r"^b.jpg: is empty. Stopped at step 7, .* 'data check' finds all such files$"):
        stop.raise_if_failed(7, "data check", "hint")


@pytest.mark.parametrize("reason", [UNSAVED, NONFINITE])
def test_a_failed_run_says_what_can_be_resumed(reason: str) -> None:
    stop = controller()
    stop.request(reason, "the message")
    assert not stop.may_save
    with pytest.raises(RunFailed, match=r"^the message. Stopped at step 7; it has no checkpoint$"):
        stop.raise_if_failed(7, "check", "it has no checkpoint")


def test_a_stop_on_request_is_no_error() -> None:
    stop = controller(has_signal=True)
    stop.poll(None, None)
    stop.raise_if_failed(7, "check", "hint")
    assert stop.requested


@pytest.mark.usefixtures("signals_are_not_ignored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_noted_and_the_handlers_restored(number: int) -> None:
    before = signal.getsignal(number)
    with SignalWatch(60.0) as watch:
        assert not watch.has_received
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # within a second: a scheduler and a launcher forward the same request
        assert watch.has_received
    assert signal.getsignal(number) is before


def test_an_ignored_sighup_stays_ignored() -> None:
    """As nohup sets it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalWatch(60.0) as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not watch.has_received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_after_a_second_ends_the_process() -> None:
    code = (
        "import os, signal, time\n"
        "from vit_static.train.stop import SignalWatch\n"
        "with SignalWatch(60.0):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(1.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 128 + signal.SIGTERM
    assert time.monotonic() - started < 50


def test_ctrl_c_says_what_is_being_saved_and_the_third_ends_the_process() -> None:
    code = (
        "import os, signal, time\n"
        "from vit_static.train.stop import SignalWatch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the tests may run in the background
        "with SignalWatch(60.0) as watch:\n"
        "    watch.describe = lambda: 'the checkpoint of step 7 is being written to a\\nb'\n"
        "    for seconds in (0.1, 1.1, 60.0):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(seconds)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGINT
    saving = "vit_static: stopping on Ctrl-C: the checkpoint of step 7 is being written to a\\nb"
    assert done.stderr.splitlines() == [
        f"{saving} (press it again to see what is being saved)",
        f"{saving} (press it once more to end without that)",
    ]


@pytest.mark.parametrize("outcome", ["raise SystemError('returned a result with an exception set') from None", "pass"])
def test_a_signal_during_the_start_stops_the_run_whatever_a_library_makes_of_it(
    outcome: str, tmp_path: Path, small_digits: Path
) -> None:
    """Paddle calls Python functions while it builds a program; an exception in one may become another, or get lost."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    code = f"""
import os, signal, time
from vit_static.train import trainer
build = trainer._build_program
def build_program(*args):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        {outcome}
    return build(*args)
trainer._build_program = build_program
"""
    arguments = ["pretrain", "-c", "tiny.yaml", "-o", f"data.root={small_digits}"]
    verb = start_verb(arguments, tmp_path, tmp_path / "stdout", tmp_path / "stderr", code)
    assert verb.wait(240) == 75
    stdout, stderr = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    assert "stopped on request" in stderr or "stopped by a signal at step 0" in stdout
    assert "Traceback" not in stderr


# Code that lets both ranks stop for a moment, at a place of their own, and the launcher wait for one second only.
SHORT_GRACE = """
import os, time
from pathlib import Path
from vit_static.launch import launcher
from vit_static.program.program import Program
from vit_static.train import trainer
launcher.START_GRACE_S = 1.0
def reached():
    rank = os.environ["PADDLE_TRAINER_ID"]
    Path(f"reached_{rank}").touch()
    return rank
"""
LATE_RANK_0 = """
start_mesh = trainer.start_mesh
def start_mesh_late_in_rank_0(*arguments):
    if reached() == "0":
        time.sleep(100)
    return start_mesh(*arguments)
trainer.start_mesh = start_mesh_late_in_rank_0
"""
SLOW_STEP = """
train_step = Program.train_step
def slow_train_step(program, images, labels, step):
    if step == 2:
        reached()
        time.sleep(4)
    return train_step(program, images, labels, step)
Program.train_step = slow_train_step
"""


@pytest.mark.parametrize(("place", "is_saved"), [(LATE_RANK_0, False), (SLOW_STEP, True)], ids=["start", "step"])
def test_a_stop_of_two_ranks_ends_both_and_saves_what_there_is(
    tmp_path: Path, small_digits: Path, place: str, is_saved: bool
) -> None:
    """Before the ranks are connected, Paddle's function tries to reach rank 0 without an end, in native code."""
    config = f"{tiny_model()}data: {{root: {small_digits}, global_batch_size: 16}}\noutput_dir: {tmp_path}\n"
    (tmp_path / "run.yaml").write_text(config)
    output = tmp_path / "output"
    before = SHORT_GRACE + place + LAUNCH.format(num_processes=2)
    launch = start_verb(["pretrain", "-c", "run.yaml"], tmp_path, output, before=before)
    try:
        end = time.monotonic() + 100
        while len(list(tmp_path.glob("reached_*"))) < 2:
            assert launch.exit_code is None and time.monotonic() < end, output.read_text()
            time.sleep(0.1)
        time.sleep(1.0)  # in the start, rank 1 begins to wait
        os.kill(launch.process_id, signal.SIGTERM)
        assert launch.wait(30) == EXIT_STOPPED, output.read_text()
    finally:
        launch.kill()
    assert (tmp_path / "run/checkpoints/latest").exists() == is_saved
