"""Restarts after a failure, as configured by train.max_restarts."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from helpers.jobs import Job, ScriptedJob, lose_node, restarts, wait_for_both, wait_until
from helpers.small import read_state


def test_a_killed_rank_is_started_again_with_the_others(scripted_job: ScriptedJob) -> None:
    scripted_job.start(*restarts(1), NPROC="2", ACTIONS_0="1 0", ACTIONS_1="kill 0")
    ((code, _, stderr),) = scripted_job.end()
    assert code == 0
    assert re.fullmatch(
        r"vit_static: rank 1 was killed by signal 9 \(out of memory\?\) \(/.*/workerlog.1\); restart 1 of 1, "
        r"from the beginning, since no checkpoint has been saved\n",
        stderr,
    )
    assert len(scripted_job.calls("0")) == len(scripted_job.calls("1")) == 2
    assert len(list(scripted_job.folder.glob("log/*/workerlog.1"))) == 2  # one log per attempt


def test_a_single_process_is_restarted_from_its_latest_checkpoint(scripted_job: ScriptedJob) -> None:
    """Until it has saved one, it isn't restarted from the checkpoint of an earlier run."""
    scripted_job.save("step_00000900")
    scripted_job.start("--resume", "never", *restarts(2), ACTIONS="1 save:step_00000010+kill 0")
    ((code, _, stderr),) = scripted_job.end()
    assert code == 0
    first, second, third = scripted_job.calls("0")
    assert first == second == "--resume never -o train.max_restarts=2"
    assert third == f"{first} --resume auto"
    assert [line.split("; ")[1] for line in stderr.splitlines()] == [
        "restart 1 of 2, from the beginning, since no checkpoint has been saved",
        "restart 2 of 2, from the latest checkpoint",
    ]


def test_restarts_are_used_up(scripted_job: ScriptedJob) -> None:
    scripted_job.start(*restarts(2), ACTIONS="1 1 1 0")
    ((code, _, stderr),) = scripted_job.end()
    assert code == 1 and len(scripted_job.calls("0")) == 3
    assert stderr.splitlines()[-1] == "vit_static: rank 0 failed with exit code 1; train.max_restarts = 2 is used up"


@pytest.mark.parametrize(
    ("verb", "code"), [("pretrain", 2), ("pretrain", 75), ("pretrain", 0), ("finetune", 2), ("eval", 1)]
)
def test_a_mistake_or_a_stop_is_not_restarted(scripted_job: ScriptedJob, verb: str, code: int) -> None:
    scripted_job.start(*restarts(3), verb=verb, NPROC="2", ACTIONS=f"{code} 0")
    ((exit_code, _, stderr),) = scripted_job.end()
    assert exit_code == code and len(scripted_job.calls("0")) == 1 and "restart" not in stderr


def test_a_mistake_in_the_config_is_reported_by_the_verb(scripted_job: ScriptedJob) -> None:
    scripted_job.start("-o", "train.max_restarts=-1", ACTIONS="2", PADDLE_TRAINER_ID="0")
    ((code, _, stderr),) = scripted_job.end()
    assert (code, stderr, len(scripted_job.calls("0"))) == (2, "", 1)


@pytest.mark.usefixtures("signals_are_not_ignored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_not_answered_with_a_restart(scripted_job: ScriptedJob, number: signal.Signals) -> None:
    scripted_job.start(*restarts(1), NPROC="2", ACTIONS="until:never 0")
    wait_for_both(scripted_job)
    scripted_job.launches[0].send_signal(number)
    ((code, _, stderr),) = scripted_job.end()
    assert (code, stderr, len(scripted_job.calls("0"))) == (75, "", 1)


@pytest.mark.parametrize(("before", "expected"), [("", 75), ("begin+", 1)])
def test_a_rank_that_fails_after_a_stop_in_the_start_is_no_failure(
    scripted_job: ScriptedJob, before: str, expected: int
) -> None:
    """The first rank has ended before the other's training began, which then waits for it in vain."""
    scripted_job.start(*restarts(1), NPROC="2", ACTIONS_0=f"{before}catch:75", ACTIONS_1=f"{before}catch:1")
    wait_until(lambda: len(list(scripted_job.folder.glob("waits.*"))) == 2)
    scripted_job.launches[0].send_signal(signal.SIGTERM)
    ((code, _, _),) = scripted_job.end()
    assert (code, len(scripted_job.calls("0"))) == (expected, 1)


def test_a_lost_node_joins_again_when_its_launcher_is_started(scripted_job: ScriptedJob) -> None:
    """Either node may be node 0. The new launcher receives the state of the earlier attempts."""
    arguments = ("--resume", "never", *restarts(1))
    for node in ("surviving", "lost"):
        scripted_job.start_node(*arguments, NODE=node, ACTIONS="until:lost+1 until:again+0")
    wait_for_both(scripted_job)
    scripted_job.save("step_00000010")
    lose_node(scripted_job, 1)
    scripted_job.start_node(*arguments, NODE="new", ACTIONS="until:again+0 0")
    wait_until(lambda: len(scripted_job.calls("surviving")) == 2 and bool(scripted_job.calls("new")))
    resumed = " ".join([*arguments, "--resume", "auto"])
    assert scripted_job.calls("surviving")[-1] == scripted_job.calls("new")[0] == resumed
    (scripted_job.folder / "again").touch()
    (code, _, stderr), lost, new = scripted_job.end()
    assert (code, lost[0], new[0], new[2]) == (0, -signal.SIGKILL, 0, "")
    assert re.fullmatch(
        r"vit_static: node [01] \(.+\) was lost: its launcher was killed, or its machine or network failed; restart 1 "
        r"of 1, from the latest checkpoint, when its launcher is started again; waiting up to 900 s\n",
        stderr,
    )


def test_a_joined_nodes_restarts_are_counted_with_the_others(scripted_job: ScriptedJob) -> None:
    for node in ("surviving", "lost"):
        scripted_job.start_node(*restarts(1), NODE=node, ACTIONS="until:lost+1 1 0")
    lose_node(scripted_job, 1)
    scripted_job.start_node(*restarts(1), NODE="new", ACTIONS="1 0")
    (code, _, _), _, (new_code, _, stderr) = scripted_job.end()
    assert (code, new_code) == (1, 1) and "train.max_restarts = 1 is used up" in stderr


def test_a_signal_ends_the_wait_for_a_lost_node(scripted_job: ScriptedJob) -> None:
    for node in ("surviving", "lost"):
        scripted_job.start_node(*restarts(1), NODE=node, ACTIONS="until:lost+1 0")
    lose_node(scripted_job, 1)
    stderr = scripted_job.launches[0].stderr
    assert stderr and "restart 1 of 1" in stderr.readline()
    scripted_job.launches[0].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in scripted_job.end(timeout_s=30)] == [75, -signal.SIGKILL]


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_resumes_by_itself_to_the_same_bits(
    job: Job, tmp_path_factory: pytest.TempPathFactory, small_digits: Path
) -> None:
    arguments = ("-o", "train.max_steps=24", "-o", "checkpoint.every_steps=4")
    undisturbed = Job(tmp_path_factory.mktemp("undisturbed"), small_digits)
    undisturbed.start(*arguments, NPROC="2")
    ((code, _, stderr),) = undisturbed.end()
    assert code == 0, stderr

    job.start(*arguments, *restarts(1), "--resume", "never", NPROC="2")
    job.wait_for_step(9)
    os.kill(job.worker(rank=1), signal.SIGKILL)
    ((code, stdout, stderr),) = job.end()
    assert code == 0 and "rank 1 was killed by signal 9" in stderr
    assert "restart 1 of 1, from the latest checkpoint" in stderr and "resumed from" in stdout
    weights, expected = (read_state(each.folder / "output/tiny/model.pdparams") for each in (job, undisturbed))
    assert weights.keys() == expected.keys()
    assert all(weights[name].tobytes() == expected[name].tobytes() for name in expected)
