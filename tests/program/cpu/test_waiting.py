"""OpenMP's threads sleep while they wait for each other if the cores are shared, and spin if they aren't."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import paddle
import pytest

from vit_static.program.cpu.waiting import ThreadWaiting


class Machine:
    """A clock, and the seconds that the thread has waited for a core."""

    def __init__(self) -> None:
        self.now, self.waited = 0.0, 0.0
        self.calls: list[int] = []

    def waiting(self, environ: Mapping[str, str] | None = None) -> ThreadWaiting:
        return ThreadWaiting(self.calls.append, lambda: self.waited, environ or {}, lambda: self.now)

    def pass_seconds(self, waiting: ThreadWaiting, seconds: float, share: float) -> None:
        for _ in range(int(10 * seconds)):
            self.now += 0.1
            self.waited += 0.1 * share
            waiting.update()


def test_threads_sleep_while_the_cores_are_shared() -> None:
    machine = Machine()
    waiting = machine.waiting()
    machine.pass_seconds(waiting, 5, 0.01)
    assert machine.calls == [] and not waiting.is_sleeping
    machine.pass_seconds(waiting, 5, 0.4)
    assert machine.calls == [0] and waiting.is_sleeping
    machine.pass_seconds(waiting, 5, 0.05)  # less, but not none
    assert machine.calls == [0]
    machine.pass_seconds(waiting, 5, 0.0)
    assert machine.calls == [0, 200] and not waiting.is_sleeping


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "KMP_BLOCKTIME"])
def test_the_users_setting_stays(name: str) -> None:
    machine = Machine()
    machine.pass_seconds(machine.waiting({name: "1"}), 5, 0.9)
    assert machine.calls == []


def test_nothing_changes_where_the_kernel_does_not_tell() -> None:
    machine = Machine()
    waiting = ThreadWaiting(machine.calls.append, lambda: None, {}, lambda: machine.now)
    machine.pass_seconds(waiting, 5, 0.9)
    assert machine.calls == []


BUSY = "import time\nstart = time.monotonic()\nwhile time.monotonic() - start < 30: pass"


def test_a_busy_core_lets_the_librarys_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, kernel and clock, with another process on the only core that this thread may use."""
    library = Path(paddle.__file__).parent / "libs/libiomp5.so"
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    code = f"""
import ctypes, os, subprocess, sys, time
import paddle
from vit_static.program.cpu.waiting import ThreadWaiting
library = ctypes.CDLL({str(library)!r})
library.kmp_set_blocktime(200)
core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {{core}})
waiting = ThreadWaiting()
others = [subprocess.Popen([sys.executable, "-c", {BUSY!r}]) for _ in range(2)]  # on the same core
start = time.monotonic()
while not waiting.is_sleeping and time.monotonic() - start < 20:
    sum(range(1000))
    waiting.update()
for other in others:
    other.kill()
print(waiting.is_sleeping, library.kmp_get_blocktime())
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout == "True 0\n"
