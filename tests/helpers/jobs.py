"""Jobs of the launcher on this machine: launches, their processes and losses, and the variables of srun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.forked_launch import ForkedLaunch, processes_of
from helpers.small import ROOT
from helpers.tiny import tiny_model

TINY = (
    tiny_model()
    + """
data: {root: ROOT, global_batch_size: 16, num_threads: 1}
train: {max_steps: 6}
eval: {every_epochs: 1000}
log: {every_steps: 1, trackers: []}
"""
)

LONG = ("-o", "train.max_steps=100000")  # longer than any test

# A verb that at its n-th start takes the n-th of the space-separated actions in ACTIONS (ACTIONS_0 for rank 0), and
# records its arguments. Actions are joined by "+" and end with an exit code, "kill", or "catch:N": wait for SIGTERM and
# end with N. "begin" is what a worker does when it begins to train.
SCRIPTED_VERB = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["PADDLE_TRAINER_ID"]
actions = os.environ.get("ACTIONS_" + rank) or os.environ["ACTIONS"]
calls = Path(f"calls.{os.environ.get('NODE', rank)}")
with calls.open("a") as file:
    print(*sys.argv[1:], file=file)
print("started", flush=True)
for action in actions.split()[len(calls.read_text().splitlines()) - 1].split("+"):
    kind, _, name = action.partition(":")
    if kind == "save":
        Path(f"output/tiny/checkpoints/{name}").mkdir(parents=True)
        Path(f"output/tiny/checkpoints/{name}/meta.json").touch()
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "begin":
        Path(os.environ["VIT_STATIC_STARTED_FOLDER"], rank).touch()
    elif kind == "catch":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(name)))
        Path(f"waits.{rank}").touch()
        time.sleep(100)
    elif kind == "until":
        while not Path(name).exists():
            time.sleep(0.05)
    else:
        sys.exit(int(kind))
"""


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait until the condition holds; fail after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Job:
    """The launches of one job, in a separate folder and in forked processes (helpers/forked_launch.py)."""

    code = ROOT

    def __init__(self, folder: Path, small_digits: Path) -> None:
        self.folder = folder
        self.launches: list[Any] = []  # ForkedLaunch, or for a scripted job subprocess.Popen
        (folder / "tiny.yaml").write_text(TINY.replace("root: ROOT", f"root: {small_digits}"))

    def start(self, *arguments: str, verb: str = "pretrain", **environ: str) -> None:
        """Start a launch, without the variables of Slurm and of other launchers."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PADDLE_"))}
        own = {"VIT_STATIC_DEVICE": "cpu", "PYTHONPATH": str(self.code), "TEST_PROCESSES": str(self.folder / "running")}
        self.launches.append(self._launch([verb, "-c", "tiny.yaml", *arguments], inherited | own | environ))

    def _launch(self, arguments: list[str], environ: dict[str, str]) -> Any:
        output = self.folder / f"launch{len(self.launches)}"
        return ForkedLaunch(arguments, self.folder, environ, output)

    def start_node(self, *arguments: str, **environ: str) -> None:
        """Start one of two nodes."""
        self.start(*arguments, PADDLE_NNODES="2", PADDLE_MASTER=f"127.0.0.1:{self.port}", **environ)

    def start_nodes(self, *arguments: str) -> None:
        for _ in range(2):
            self.start_node(*arguments)

    @property
    def port(self) -> int:
        """Return a port, the same for all launches of the job, that was free when first requested."""
        if not hasattr(self, "_port"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                self._port = free.getsockname()[1]
        return self._port

    def end(self, timeout_s: float = 120) -> list[tuple[int, str, str]]:
        """Return (exit code, stdout, stderr) of every launch; all of their processes must have ended by then."""
        deadline = time.monotonic() + timeout_s
        outputs = [launched.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for launched in self.launches]
        assert not self.processes()
        return [(launched.returncode, *output) for launched, output in zip(self.launches, outputs, strict=True)]

    def processes(self) -> dict[int, str]:
        """Return the ranks of the job's running processes by process ID, with an empty rank for a launcher."""
        return processes_of(self.folder / "running")

    def worker(self, rank: int) -> int:
        """Return the process ID of the worker with this rank."""
        (number,) = [number for number, running in self.processes().items() if running == str(rank)]
        return number

    def wait_for_step(self, step: int) -> None:
        """Wait until the job, all of whose launches must be running, has logged the step."""

        def has_logged_step() -> bool:
            assert all(launched.poll() is None for launched in self.launches)
            return len(self.losses()) >= step

        wait_until(has_logged_step)

    def losses(self) -> list[float]:
        """Return the training losses logged so far."""
        try:
            lines = (self.folder / "output/tiny/metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return [entry["loss"] for entry in entries if entry["kind"] == "train"]


class ScriptedJob(Job):
    """A job whose workers run SCRIPTED_VERB under the real launcher, all in processes of their own Python."""

    prefix: tuple[str, ...] = ()  # of the command

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder)
        self.code = folder / "code"
        package = self.code / "vit_static"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "worker.py").write_text(SCRIPTED_VERB)
        for name in ("launch", "config", "common"):
            shutil.copytree(ROOT / "vit_static" / name, package / name)

    def _launch(self, arguments: list[str], environ: dict[str, str]) -> Any:
        command = [*self.prefix, sys.executable, "-m", "vit_static.launch", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=environ, stdout=pipe, stderr=pipe, text=True)

    def processes(self) -> dict[int, str]:
        """Return the ranks of the job's running processes by process ID, from their environment."""
        ranks = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                entries = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:  # ended in the meantime, or another user's
                continue
            environ = dict(entry.split("=", 1) for entry in entries if "=" in entry)
            if environ.get("TEST_PROCESSES") == str(self.folder / "running"):
                ranks[int(path.parent.name)] = environ.get("PADDLE_TRAINER_ID", "")
        return ranks

    def calls(self, worker: str) -> list[str]:
        """Return the arguments of each start of the worker with this rank or NODE, without the constant ones."""
        path = self.folder / f"calls.{worker}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix("pretrain -c tiny.yaml ") for line in lines]

    def save(self, name: str) -> None:
        """Create a checkpoint that the launcher accepts as complete."""
        path = self.folder / "output/tiny/checkpoints" / name
        path.mkdir(parents=True)
        (path / "meta.json").touch()


@pytest.fixture
def scripted_job(tmp_path: Path) -> Iterator[ScriptedJob]:
    """Return a job of scripted workers; no process of it outlives the test."""
    job = ScriptedJob(tmp_path)
    yield job
    for number in job.processes():
        os.kill(number, signal.SIGKILL)


@pytest.fixture
def job(tmp_path: Path, small_digits: Path) -> Iterator[Job]:
    """Return a job that trains; no process of it outlives the test."""
    job = Job(tmp_path, small_digits)
    yield job
    for number in job.processes():
        os.kill(number, signal.SIGKILL)


@pytest.fixture(scope="session")
def losses_of_one_launch(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> list[float]:
    """Return the losses of two processes of a single launch."""
    job = Job(tmp_path_factory.mktemp("one launch"), small_digits)
    job.start(NPROC="2")
    ((code, _, stderr),) = job.end()
    assert code == 0, stderr
    assert len(job.losses()) == 6
    return job.losses()


def srun(job: Job, *arguments: str, num_nodes: int, num_tasks: int = 2, **environ: str) -> None:
    """Start the tasks that srun would start: one per node, or all on one node."""
    for task in range(num_tasks):
        node = task if num_nodes > 1 else 0
        job.start(*arguments, **slurm_environ(task, node, num_nodes, num_tasks), **environ)


def slurm_environ(task: int, node: int, num_nodes: int, num_tasks: int) -> dict[str, str]:
    """Return the variables that srun sets for a task (SchedMD's `src/common/env.c`)."""
    per_node = num_tasks // num_nodes
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_NNODES": str(num_nodes),
        "SLURM_JOB_NUM_NODES": str(num_nodes),
        "SLURM_STEP_NUM_NODES": str(num_nodes),
        "SLURM_NTASKS": str(num_tasks),
        "SLURM_STEP_NUM_TASKS": str(num_tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(per_node) + (f"(x{num_nodes})" if num_nodes > 1 else ""),
        "SLURM_STEP_NODELIST": f"127.0.0.[1-{num_nodes}]" if num_nodes > 1 else "127.0.0.1",
        "SLURM_JOB_NODELIST": "127.0.0.[1-9]",
        "SLURM_PROCID": str(task),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(task % per_node),
    }


def restarts(num_restarts: int) -> tuple[str, str]:
    """Return the arguments that allow this many restarts."""
    return ("-o", f"train.max_restarts={num_restarts}")


def wait_for_both(scripted_job: ScriptedJob) -> None:
    """Wait until two workers have recorded how they were called."""
    wait_until(lambda: len(list(scripted_job.folder.glob("calls.*"))) == 2)


def lose_node(scripted_job: ScriptedJob, index: int) -> None:
    """Kill the launcher of one of two nodes and its worker, and let the other node's worker fail."""
    wait_for_both(scripted_job)
    scripted_job.launches[index].kill()
    scripted_job.launches[index].wait()
    (scripted_job.folder / "lost").touch()
