"""The watch over the ranks: whom it names, when it ends a run, and gloo's own time limit, which it replaces."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import Pipe
from typing import Any

import pytest
from helpers.jobs import LONG, Job, job  # noqa: F401 - a fixture
from helpers.small import ROOT

from vit_static.common.errors import EXIT_UNANSWERED
from vit_static.parallel import gloo_timeout
from vit_static.parallel.rank_watch import RankStatus, RankWatch, judge, waiting_for_ranks

SINCE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"

# Two processes with two groups. Rank 1 joins no operation within the limit of 1 s; prints how those of rank 0 end.
LATE_RANK = """
import os, sys, time
rank, ports = int(sys.argv[1]), map(int, sys.argv[2:])
os.environ["PADDLE_TRAINER_ID"] = str(rank)
import paddle
from paddle.base import core
from vit_static.parallel.gloo_timeout import set_gloo_timeouts
groups = [
    core.ProcessGroupGloo.create(core.TCPStore("127.0.0.1", port, rank == 0, 1, 60), rank, 2, number)
    for number, port in enumerate(ports)
]
assert set_gloo_timeouts(1) >= 2 and set_gloo_timeouts(1) == 0
if rank == 1:
    time.sleep(60)
x = paddle.ones([4])
for start in (
    lambda: groups[0].all_reduce(x, core.ReduceOp.SUM, True),
    lambda: groups[1].recv(x, 1, True),
):
    started = time.monotonic()
    try:
        start().wait()
        outcome = "done"
    except RuntimeError as error:
        outcome = "timeout" if "TIMEOUT" in str(error) else str(error)
    print(outcome, time.monotonic() - started)
"""


def status(name: str, **values: Any) -> RankStatus:
    return RankStatus(name, **values)


WAITS: dict[str, Any] = {"wait": "all_reduce", "waited_s": 50.0, "began_at": 1_000_000.0}


@pytest.mark.parametrize(
    ("ranks", "rank", "message"),
    [
        ({0: status("rank 0"), 1: status("rank 1")}, "nobody", ""),
        ({0: status("rank 0"), 1: status("rank 1", silent_s=9.0)}, "nobody", ""),
        ({0: status("rank 0"), 1: status("rank 1", silent_s=9.0, **WAITS)}, "nobody", ""),
        (
            {0: status("rank 0", **WAITS), 1: status("rank 1 on b", silent_s=51.0, heard_at=999_999.0)},
            1,
            rf"rank 1 on b has not answered since {SINCE}",
        ),
        (  # of two, the one that has been silent longer
            {0: status("rank 0", **WAITS), 1: status("rank 1", silent_s=8.0), 2: status("rank 2", silent_s=9.0)},
            2,
            rf"rank 2 has not answered since {SINCE}, nor has 1 other rank",
        ),
        (  # what a silent rank was waiting for no longer counts
            {0: status("rank 0", **WAITS), 1: status("rank 1", silent_s=9.0, wait="all_reduce", waited_s=3.0)},
            1,
            rf"rank 1 has not answered since {SINCE}",
        ),
        (
            {0: status("rank 0", **WAITS), 1: status("rank 1"), 2: status("rank 2", **WAITS)},
            1,
            rf"rank 1 is running, but has not joined the all_reduce of the others since {SINCE}",
        ),
        (
            {0: status("rank 0", **WAITS), 1: status("rank 1", wait="agreement", waited_s=40.0)},
            None,
            rf"no rank has finished its agreement since {SINCE}, and all are running",
        ),
    ],
)
def test_the_rank_that_others_wait_for_is_named(ranks: dict[int, RankStatus], rank: object, message: str) -> None:
    verdict = judge(ranks)
    if rank == "nobody":
        assert verdict is None
    else:
        assert verdict is not None and verdict.rank == rank
        assert re.fullmatch(message, verdict.message)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_wait_for_a_silent_rank_ends_after_the_limit(silent: int, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Pipe()
    watching = 1 - silent
    codes: list[int] = []
    watch = RankWatch(watching, ["rank 0", "rank 1"], {silent: first}, 0.6, codes.append)
    with waiting_for_ranks("all_reduce"):
        started = time.monotonic()
        thread = watch.start()
        while not codes and time.monotonic() < started + 20:
            time.sleep(0.01)
    seconds = time.monotonic() - started
    second.close()
    thread.join(10)
    assert codes[0] == EXIT_UNANSWERED and 0.5 < seconds < 10
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"vit_static: rank {silent} has not answered since {SINCE}; others have waited for 1 s "
        r"\(parallel\.collective_timeout_s\), so the run ends without saving",
        lines[-1],
    )
    first.close()


def test_ranks_that_answer_each_other_or_wait_for_nothing_go_on() -> None:
    """No wait is longer than the limit, although all of them together are."""
    first, second = Pipe()
    codes: list[int] = []
    threads = [
        RankWatch(rank, ["rank 0", "rank 1"], {1 - rank: connection}, 0.4, codes.append).start()
        for rank, connection in enumerate((first, second))
    ]
    for _ in range(12):
        with waiting_for_ranks("all_reduce"):
            time.sleep(0.05)
    time.sleep(0.6)
    assert not codes and all(thread.is_alive() for thread in threads)
    with socket.socket(fileno=os.dup(first.fileno())) as both_ends:
        both_ends.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    first.close()
    second.close()


def test_gloos_own_limit_is_replaced() -> None:
    """It ends an operation after 1 s and not after 30."""
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as another:
        ports = [str(each.getsockname()[1]) for each in (free, another)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "GLOG_minloglevel": "2", "PADDLE_DISTRI_BACKEND": "gloo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE_RANK, str(rank), *ports],
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lines = ranks[0].communicate(timeout=120)[0].splitlines()
    ranks[1].kill()
    ranks[1].communicate()
    assert len(lines) == 2
    for line in lines:
        outcome, seconds = line.split()
        assert outcome == "timeout" and 0.9 < float(seconds) < 15


def test_gloos_limit_stays_where_memory_may_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(gloo_timeout, "open", refuse, raising=False)
    assert gloo_timeout.set_gloo_timeouts(1.0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.reliability("a stopped rank is named")
def test_a_run_ends_with_one_line_that_names_the_stopped_rank(job: Job, rank: int) -> None:  # noqa: F811
    job.start(*LONG, "-o", "parallel.collective_timeout_s=3", NPROC="2")
    job.wait_for_step(3)
    os.kill(job.worker(rank), signal.SIGSTOP)
    stopped = time.monotonic()
    ((code, _, stderr),) = job.end()
    assert code == 1 and time.monotonic() - stopped < 60
    line, *others = [line for line in stderr.splitlines() if line.startswith("vit_static: rank")]
    assert re.fullmatch(rf"vit_static: rank {rank} has not answered since {SINCE}; others have waited .*", line)
    assert not others and "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.reliability("a stopped rank returns")
def test_a_run_continues_when_the_rank_returns(job: Job) -> None:  # noqa: F811
    """After more than the 30 s of gloo's own limit."""
    job.start("-o", "train.max_steps=200", NPROC="2")
    job.wait_for_step(3)
    number = job.worker(rank=1)
    os.kill(number, signal.SIGSTOP)
    time.sleep(34)
    os.kill(number, signal.SIGCONT)
    ((code, _, stderr),) = job.end()
    assert code == 0 and len(job.losses()) == 200, stderr
    notice, answer = [line for line in stderr.splitlines() if line.startswith("vit_static: rank 1")]
    assert re.fullmatch(rf"vit_static: rank 1 has not answered since {SINCE}; the others wait for it, .*", notice)
    assert answer == "vit_static: rank 1 answers again"
