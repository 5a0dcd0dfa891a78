"""The launcher with real workers: nodes, Slurm tasks, failures and restarts.

The nodes are launches on this machine. Slurm is what srun tells its tasks, after SchedMD's `src/common/env.c`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.small import ROOT, read_state
from helpers.tiny import tiny_model

from vit_static.launch import __main__, topology
from vit_static.launch.slurm import expand_counts, expand_hosts, find_slurm_task

TINY = (
    tiny_model()
    + """
data: {root: ROOT, global_batch_size: 16, num_threads: 1}
train: {max_steps: 6}
eval: {every_epochs: 1000}
log: {every_steps: 1, tensorboard: false}
"""
)
LONG = ("-o", "train.max_steps=100000")


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# A verb that at each start does the next thing in DEEDS (DEEDS_0 for rank 0), and records how it was called.
DOER = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["PADDLE_TRAINER_ID"]
deeds = os.environ.get("DEEDS_" + rank) or os.environ["DEEDS"]
notes = Path(f"calls.{os.environ.get('NODE', rank)}")
with notes.open("a") as file:
    print(*sys.argv[1:], file=file)
print("a word", flush=True)
for deed in deeds.split()[len(notes.read_text().splitlines()) - 1].split("+"):
    what, _, name = deed.partition(":")
    if what == "save":
        Path(f"output/tiny/checkpoints/{name}").mkdir(parents=True)
        Path(f"output/tiny/checkpoints/{name}/meta.json").touch()
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "until":
        while not Path(name).exists():
            time.sleep(0.05)
    else:
        sys.exit(int(what))
"""


class Job:
    """The launches of one job, in a separate folder."""

    code = ROOT
    prefix: tuple[str, ...] = ()  # of the command

    def __init__(self, folder: Path, small_digits: Path) -> None:
        self.folder = folder
        self.launches: list[subprocess.Popen[str]] = []
        self.name = f"{folder}-{os.getpid()}"  # found again in the environment of all its processes
        (folder / "tiny.yaml").write_text(TINY.replace("root: ROOT", f"root: {small_digits}"))

    def start(self, *arguments: str, verb: str = "pretrain", **environ: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PADDLE_"))}
        job_environ = {"VIT_STATIC_DEVICE": "cpu", "PYTHONPATH": str(self.code), "TEST_JOB": self.name}
        self.launches.append(
            subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "vit_static.launch", verb, "-c", "tiny.yaml", *arguments],
                cwd=self.folder,
                env=inherited | job_environ | environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def start_node(self, *arguments: str, **environ: str) -> None:
        self.start(*arguments, PADDLE_NNODES="2", PADDLE_MASTER=f"127.0.0.1:{self.port}", **environ)

    def start_nodes(self, *arguments: str) -> None:
        for _ in range(2):
            self.start_node(*arguments)

    @property
    def port(self) -> int:
        """A port that is the same for all launches of the job, and free when first requested."""
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

    def processes(self) -> dict[int, dict[str, str]]:
        """The environments of the job's running processes, by process id."""
        environs = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                entries = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:  # has ended meanwhile, or is another user's
                continue
            environ = dict(entry.split("=", 1) for entry in entries if "=" in entry)
            if environ.get("TEST_JOB") == self.name:
                environs[int(path.parent.name)] = environ
        return environs

    def worker(self, rank: int) -> int:
        (number,) = [n for n, environ in self.processes().items() if environ.get("PADDLE_TRAINER_ID") == str(rank)]
        return number

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            assert all(launched.poll() is None for launched in self.launches)
            return len(self.losses()) >= step

        wait_until(is_there)

    def losses(self) -> list[float]:
        try:
            lines = (self.folder / "output/tiny/metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return [entry["loss"] for entry in entries if entry["kind"] == "train"]


class LightJob(Job):
    """A job whose workers run DOER under the real launcher."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder)
        self.code = folder / "code"
        package = self.code / "vit_static"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(DOER)
        for name in ("launch", "config", "common"):
            shutil.copytree(ROOT / "vit_static" / name, package / name)

    def calls(self, who: str) -> list[str]:
        """How the worker of a rank, or of a launch with that NODE, was called, without the constant arguments."""
        path = self.folder / f"calls.{who}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix("pretrain -c tiny.yaml ") for line in lines]

    def save(self, name: str) -> None:
        """A complete checkpoint, as far as the launcher looks."""
        path = self.folder / "output/tiny/checkpoints" / name
        path.mkdir(parents=True)
        (path / "meta.json").touch()


@pytest.fixture
def light(tmp_path: Path) -> Iterator[LightJob]:
    job = LightJob(tmp_path)
    yield job
    for number in job.processes():
        os.kill(number, signal.SIGKILL)


@pytest.fixture
def job(tmp_path: Path, small_digits: Path) -> Iterator[Job]:
    job = Job(tmp_path, small_digits)
    yield job
    for number in job.processes():
        os.kill(number, signal.SIGKILL)


@pytest.fixture(scope="module")
def losses_of_one_launch(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> list[float]:
    job = Job(tmp_path_factory.mktemp("one launch"), small_digits)
    job.start(NPROC="2")
    ((code, _, stderr),) = job.end()
    assert code == 0, stderr
    assert len(job.losses()) == 6
    return job.losses()


def srun(job: Job, *arguments: str, num_nodes: int, num_tasks: int = 2, **environ: str) -> None:
    """Start what srun starts: one task per node, or all of them on one."""
    for task in range(num_tasks):
        node = task if num_nodes > 1 else 0
        job.start(*arguments, **slurm_environ(task, node, num_nodes, num_tasks), **environ)


def slurm_environ(task: int, node: int, num_nodes: int, num_tasks: int) -> dict[str, str]:
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


# Slurm's environment


@pytest.mark.parametrize(
    ("written", "hosts"),
    [
        ("login", ["login"]),
        ("node[001-003,7]", ["node001", "node002", "node003", "node7"]),
        ("a1,b[2-3],c-x", ["a1", "b2", "b3", "c-x"]),
        ("n[09-11]-ib,z", ["n09-ib", "n10-ib", "n11-ib", "z"]),
        ("rack[1-2]node[01-02]", ["rack1node01", "rack1node02", "rack2node01", "rack2node02"]),
    ],
)
def test_a_list_of_nodes_is_expanded_as_slurm_does(written: str, hosts: list[str]) -> None:
    assert expand_hosts(written) == hosts


@pytest.mark.parametrize("written", ["", "node[1-", "node[a-b]", "a,,b", "node1]"])
def test_an_invalid_list_of_nodes_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="PADDLE_MASTER"):
        expand_hosts(written)


def test_tasks_per_node() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]


def test_one_task_per_node_starts_the_nodes_processes() -> None:
    layout = topology.find_layout(slurm_environ(1, 1, 4, 4) | {"VIT_STATIC_DEVICE": "cpu", "NPROC": "3"})
    assert (layout.num_nodes, layout.num_local, layout.first_on_machine, layout.num_on_machine) == (4, 3, 0, 3)
    assert layout.task and layout.task.number == 1


def test_one_task_per_process_is_one_worker() -> None:
    """Also with three tasks on two nodes, the second with one: the largest number per node decides for all nodes."""
    environ = slurm_environ(1, 0, 2, 3) | {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_LOCALID": "1"}
    layout = topology.find_layout(environ | {"VIT_STATIC_DEVICE": "cpu"})
    assert (layout.num_nodes, layout.num_local, layout.first_on_machine, layout.num_on_machine) == (3, 1, 1, 2)
    assert layout.num_machines == 2
    with pytest.raises(ValueError, match="NPROC=4: srun started 2 tasks here"):
        topology.find_layout(environ | {"VIT_STATIC_DEVICE": "cpu", "NPROC": "4"})


def without(environ: dict[str, str], *prefixes: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(prefixes)}


ON_FOUR_NODES = slurm_environ(0, 0, 4, 8)


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param(without(ON_FOUR_NODES, "SLURM_STEP"), id="an sbatch script"),
        pytest.param(without(ON_FOUR_NODES, "SLURM_STEP", "SLURM_PROCID"), id="an salloc shell"),
        pytest.param(ON_FOUR_NODES | {"SLURM_STEP_NUM_TASKS": "1"}, id="an salloc shell that is a step"),
        pytest.param(slurm_environ(0, 0, 1, 1), id="srun of one task"),
        pytest.param(ON_FOUR_NODES | {"PADDLE_NNODES": "1"}, id="told otherwise by hand"),
    ],
)
def test_without_srun_a_job_of_several_nodes_runs_on_one(environ: dict[str, str]) -> None:
    layout = topology.find_layout(environ | {"VIT_STATIC_DEVICE": "cpu"})
    assert (layout.num_nodes, layout.num_local, layout.task) == (1, 1, None)


def test_idle_nodes_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    topology.warn_of_idle_nodes(without(ON_FOUR_NODES, "SLURM_STEP"))
    assert "one of the Slurm job's 4 nodes; start it with srun" in capsys.readouterr().err
    for environ in ({}, ON_FOUR_NODES, without(ON_FOUR_NODES, "SLURM_STEP") | {"PADDLE_NNODES": "1"}):
        topology.warn_of_idle_nodes(environ)
    assert capsys.readouterr().err == ""


def test_the_address_of_task_0() -> None:
    def master(**environ: str) -> str:
        task = find_slurm_task(slurm_environ(1, 1, 2, 2) | {"SLURM_STEP_NODELIST": "gpu[08-09]"} | environ)
        assert task is not None
        return task.master

    assert master(SLURM_JOB_ID="7") == "gpu08:20112"
    assert master(SLURM_JOB_ID="7", SLURM_STEP_ID="2") == "gpu08:20114"
    assert 20000 <= int(master(SLURM_JOB_ID="123456789").removeprefix("gpu08:")) < 30000
    assert master(PADDLE_MASTER="10.0.0.1:99") == "10.0.0.1:99"


def test_a_port_in_use_is_reported_with_the_variable_to_set(job: Job) -> None:
    with socket.create_server(("127.0.0.1", job.port)):
        job.start(**slurm_environ(0, 0, 2, 2), PADDLE_MASTER=f"127.0.0.1:{job.port}")
        ((code, _, stderr),) = job.end()
    assert code == 2 and f"port {job.port}" in stderr and "PADDLE_MASTER=127.0.0.1:PORT" in stderr
    assert len(stderr.splitlines()) == 1


def test_the_interface_of_an_address() -> None:
    assert __main__.interface_of("127.0.0.1") == "lo"
    assert __main__.interface_of("192.0.2.1") is None  # reserved for documents


# GPUs


@pytest.mark.parametrize(
    ("arguments", "num_local"),
    [
        (["pretrain", "-o", "seed=1"], 4),
        (["pretrain", "-o", "seed=1", "-o", "device=cpu"], 1),
        (["pretrain", "-c", "cpu.yaml", "--resume", "never"], 1),
        (["pretrain", "-c", "cpu.yaml", "-o", "device=gpu"], 4),
        (["eval", "--checkpoint", "output/x", "-o", "device=cpu"], 1),
        (["pretrain", "-c", "nowhere.yaml"], 4),  # the verb will say it
        (["pretrain", "-c"], 4),
    ],
)
def test_a_config_for_the_cpu_leaves_the_gpus_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], num_local: int
) -> None:
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: an accelerator"; done\n')
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    Path("cpu.yaml").write_text("device: cpu\n")
    assert topology.find_layout({}, __main__.config_of(arguments).device).num_local == num_local


# Training on nodes


@pytest.mark.slow
def test_two_nodes_train_as_one_launch_does(job: Job, losses_of_one_launch: list[float]) -> None:
    job.start_nodes()
    for code, _, stderr in job.end():
        assert (code, stderr) == (0, "")
    np.testing.assert_allclose(job.losses(), losses_of_one_launch, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [2, 1], ids=["one task per node", "one task per process"])
def test_sruns_tasks_train_as_one_launch_does(job: Job, losses_of_one_launch: list[float], num_nodes: int) -> None:
    """Task 0 is rank 0 and prints for all."""
    srun(job, num_nodes=num_nodes)
    (code, stdout, stderr), other = job.end()
    assert (code, stderr) == (0, "") and "2 x cpu" in stdout
    assert other == (0, "", "")
    np.testing.assert_allclose(job.losses(), losses_of_one_launch, rtol=1e-6)


@pytest.mark.slow
def test_a_mistake_under_srun_is_printed_once(job: Job) -> None:
    srun(job, "-o", "data.global_batch_size=15", num_nodes=2)
    (code, _, stderr), other = job.end()
    assert code == 2 and "data.global_batch_size = 15" in stderr and len(stderr.splitlines()) == 1
    assert other == (2, "", "")


# Failures end the whole job


def start_one(job: Job) -> None:
    job.start(*LONG, NPROC="2")


def start_two(job: Job) -> None:
    job.start_nodes(*LONG)


@pytest.mark.slow
@pytest.mark.parametrize("start", [start_one, start_two])
def test_a_killed_rank_ends_the_job(job: Job, start: Callable[[Job], None]) -> None:
    start(job)
    job.wait_for_step(3)
    os.kill(job.worker(rank=1), signal.SIGKILL)
    for code, _, stderr in job.end(timeout_s=60):
        assert code == 1 and "vit_static: rank 1" in stderr and "was killed by signal 9" in stderr


@pytest.mark.slow
def test_a_killed_rank_ends_a_job_whose_other_node_hangs(job: Job) -> None:
    """NCCL waits for its peers for ever: here a worker that only SIGKILL ends."""
    srun(job, *LONG, num_nodes=2)
    job.wait_for_step(3)
    os.kill(job.worker(rank=0), signal.SIGSTOP)
    os.kill(job.worker(rank=1), signal.SIGKILL)
    (code, _, stderr), (other, *_) = job.end(timeout_s=60)
    assert (code, other) == (1, 1)
    assert "vit_static: rank 1 on" in stderr and "was killed by signal 9" in stderr


@pytest.mark.slow
def test_a_lost_node_ends_the_job(job: Job) -> None:
    srun(job, *LONG, num_nodes=2)
    job.wait_for_step(3)
    job.launches[1].kill()
    wait_until(lambda: not job.processes())  # its worker ends by itself, with the state saved
    (code, _, stderr), _ = job.end()
    assert code == 1 and "vit_static: node 1" in stderr and "was lost" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("told", [slice(1, 2), slice(0, 2)], ids=["one node", "all, as Slurm does"])
def test_a_stopped_node_stops_the_job_with_its_state_saved(job: Job, told: slice) -> None:
    srun(job, *LONG, num_nodes=2)
    job.wait_for_step(3)
    for launched in job.launches[told]:
        launched.send_signal(signal.SIGTERM)
    (code, stdout, stderr), other = job.end()
    assert (code, stderr) == (75, "") and "state saved" in stdout
    assert other == (75, "", "")


# Restarts by train.max_restarts


def restarts(number: int) -> tuple[str, str]:
    return ("-o", f"train.max_restarts={number}")


def test_a_killed_rank_is_started_again_with_the_others(light: LightJob) -> None:
    light.start(*restarts(1), NPROC="2", DEEDS_0="1 0", DEEDS_1="kill 0")
    ((code, _, stderr),) = light.end()
    assert code == 0
    assert re.fullmatch(
        r"vit_static: rank 1 was killed by signal 9 \(out of memory\?\) \(/.*/workerlog.1\); restart 1 of 1, "
        r"from the beginning, since no checkpoint has been saved\n",
        stderr,
    )
    assert len(light.calls("0")) == len(light.calls("1")) == 2
    assert len(list(light.folder.glob("log/*/workerlog.1"))) == 2  # the first one's last words are kept


def test_one_process_is_restarted_too_and_resumes_what_it_has_saved(light: LightJob) -> None:
    """But not an earlier run's checkpoint, before it has saved one."""
    light.save("step_00000900")
    light.start("--resume", "never", *restarts(2), DEEDS="1 save:step_00000010+kill 0")
    ((code, _, stderr),) = light.end()
    assert code == 0
    first, second, third = light.calls("0")
    assert first == second == "--resume never -o train.max_restarts=2"
    assert third == f"{first} --resume auto"
    assert [line.split("; ")[1] for line in stderr.splitlines()] == [
        "restart 1 of 2, from the beginning, since no checkpoint has been saved",
        "restart 2 of 2, from the latest checkpoint",
    ]


def test_restarts_are_used_up(light: LightJob) -> None:
    light.start(*restarts(2), DEEDS="1 1 1 0")
    ((code, _, stderr),) = light.end()
    assert code == 1 and len(light.calls("0")) == 3
    assert stderr.splitlines()[-1] == "vit_static: rank 0 failed with exit code 1; train.max_restarts = 2 is used up"


@pytest.mark.parametrize(
    ("verb", "code"), [("pretrain", 2), ("pretrain", 75), ("pretrain", 0), ("finetune", 2), ("eval", 1)]
)
def test_a_mistake_or_a_stop_is_not_restarted(light: LightJob, verb: str, code: int) -> None:
    light.start(*restarts(3), verb=verb, NPROC="2", DEEDS=f"{code} 0")
    ((ended_with, _, stderr),) = light.end()
    assert ended_with == code and len(light.calls("0")) == 1 and "restart" not in stderr


def test_a_mistake_in_the_config_is_reported_by_the_verb(light: LightJob) -> None:
    light.start("-o", "train.max_restarts=-1", DEEDS="2", PADDLE_TRAINER_ID="0")
    ((code, _, stderr),) = light.end()
    assert (code, stderr, len(light.calls("0"))) == (2, "", 1)


def test_a_signal_is_not_answered_with_a_restart(light: LightJob) -> None:
    light.start(*restarts(1), NPROC="2", DEEDS="until:never 0")
    wait_for_both(light)
    light.launches[0].send_signal(signal.SIGTERM)
    ((code, _, stderr),) = light.end()
    assert (code, stderr, len(light.calls("0"))) == (75, "", 1)


@pytest.mark.parametrize("num_nodes", [2, 1], ids=["one task per node", "one task per process"])
def test_a_killed_rank_is_started_again_under_srun(light: LightJob, num_nodes: int) -> None:
    srun(light, *restarts(1), num_nodes=num_nodes, DEEDS_0="1 0", DEEDS_1="kill 0")
    (code, _, stderr), other = light.end()
    assert code == 0 and "rank 1 on" in stderr and "restart 1 of 1" in stderr and len(stderr.splitlines()) == 1
    assert other == (0, "", "")


def wait_for_both(light: LightJob) -> None:
    """Wait until two workers have recorded how they were called."""
    wait_until(lambda: len(list(light.folder.glob("calls.*"))) == 2)


def lose_node(light: LightJob, which: int) -> None:
    """Kill the launcher of one of two nodes, and with it its worker; the other node's worker then fails."""
    wait_for_both(light)
    light.launches[which].kill()
    light.launches[which].wait()
    (light.folder / "lost").touch()


def test_under_srun_a_lost_task_ends_the_job(light: LightJob) -> None:
    srun(light, *restarts(3), num_nodes=2, DEEDS="until:lost+1 0")
    lose_node(light, 1)
    (code, _, stderr), _ = light.end(timeout_s=30)
    assert code == 1 and len(light.calls("0")) == 1
    assert "vit_static: node 1" in stderr and "was lost" in stderr and "restart" not in stderr


def test_a_lost_node_joins_again_when_its_launcher_is_started(light: LightJob) -> None:
    """Whichever node is node 0, which the test doesn't know; the new launcher learns the state of the old one."""
    as_begun = ("--resume", "never", *restarts(1))
    for node in ("kept", "lost one"):
        light.start_node(*as_begun, NODE=node, DEEDS="until:lost+1 until:again+0")
    wait_for_both(light)
    light.save("step_00000010")
    lose_node(light, 1)
    light.start_node(*as_begun, NODE="new", DEEDS="until:again+0 0")
    wait_until(lambda: len(light.calls("kept")) == 2 and bool(light.calls("new")))
    assert light.calls("kept")[-1] == light.calls("new")[0] == " ".join([*as_begun, "--resume", "auto"])
    (light.folder / "again").touch()
    (code, _, stderr), lost, new = light.end()
    assert (code, lost[0], new[0], new[2]) == (0, -signal.SIGKILL, 0, "")
    assert re.fullmatch(
        r"vit_static: node [01] \(.+\) was lost: its launcher was killed, or its machine or network failed; restart 1 "
        r"of 1, from the latest checkpoint, when its launcher is started again; waiting up to 900 s\n",
        stderr,
    )


def test_a_joined_nodes_restarts_are_counted_with_the_others(light: LightJob) -> None:
    for node in ("kept", "lost one"):
        light.start_node(*restarts(1), NODE=node, DEEDS="until:lost+1 1 0")
    lose_node(light, 1)
    light.start_node(*restarts(1), NODE="new", DEEDS="1 0")
    (code, _, _), _, (new_code, _, stderr) = light.end()
    assert (code, new_code) == (1, 1) and "train.max_restarts = 1 is used up" in stderr


def test_a_node_that_leaves_during_the_rendezvous_can_rejoin(light: LightJob) -> None:
    def start_one_of_three() -> None:
        light.start(DEEDS="0", PADDLE_NNODES="3", PADDLE_MASTER=f"127.0.0.1:{light.port}")

    def wait_for_socket(state: str) -> None:  # of the first launch, by its number in /proc/net/tcp
        pattern = re.compile(rf" 0100007F:{light.port:04X} [0-9A-F]+:[0-9A-F]+ {state} ")
        wait_until(lambda: bool(pattern.search(Path("/proc/net/tcp").read_text())))

    start_one_of_three()
    wait_for_socket("0A")  # it listens
    start_one_of_three()
    wait_for_socket("01")  # the other is connected
    light.launches[1].send_signal(signal.SIGTERM)
    light.launches[1].wait()
    for _ in range(2):
        start_one_of_three()
    assert [code for code, _, _ in light.end(timeout_s=30)] == [0, 75, 0, 0]


def test_a_signal_ends_the_wait_for_a_lost_node(light: LightJob) -> None:
    for node in ("kept", "lost one"):
        light.start_node(*restarts(1), NODE=node, DEEDS="until:lost+1 0")
    lose_node(light, 1)
    stderr = light.launches[0].stderr
    assert stderr and "restart 1 of 1" in stderr.readline()
    light.launches[0].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in light.end(timeout_s=30)] == [75, -signal.SIGKILL]


# A network that fails silently


@pytest.fixture
def network(light: LightJob) -> Iterator[Callable[[str], None]]:
    """network("down") cuts the launches' own network; skips where no such network can be created."""
    holder = subprocess.Popen(
        ["unshare", "-rn", "sh", "-c", "ip link set lo up && echo ready && exec sleep 600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert holder.stdout
    if holder.stdout.readline() != "ready\n":
        holder.wait()
        pytest.skip("this machine lets nobody make a network of their own")
    light.prefix = ("nsenter", "--preserve-credentials", "-U", "-n", "-t", str(holder.pid))

    def turn(direction: str) -> None:
        subprocess.run([*light.prefix, "ip", "link", "set", "lo", direction], check=True)

    yield turn
    holder.kill()
    holder.wait()


def test_a_silent_node_counts_as_lost_after_the_timeout(light: LightJob, network: Callable[[str], None]) -> None:
    for _ in range(2):
        light.start_node("-o", "train.node_timeout_s=3", DEEDS="until:lost+1")
    wait_for_both(light)
    sockets = Path(f"/proc/{light.launches[0].pid}/net/tcp")
    established = re.compile(rf":{light.port:04X} [0-9A-F]+:[0-9A-F]+ 01 ")
    assert established.search(sockets.read_text())
    network("down")
    cut_at = time.monotonic()
    wait_until(lambda: not established.search(sockets.read_text()))
    assert 2.0 < time.monotonic() - cut_at < 5.0
    (light.folder / "lost").touch()
    for code, _, stderr in light.end(timeout_s=20):
        assert code == 1 and re.match(r"vit_static: node [01] \(.+\) was lost", stderr)


# Training with restarts


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_resumes_by_itself_to_the_same_bits(
    job: Job, tmp_path_factory: pytest.TempPathFactory, small_digits: Path
) -> None:
    arguments = ("-o", "train.max_steps=40", "-o", "checkpoint.every_steps=5")
    undisturbed = Job(tmp_path_factory.mktemp("undisturbed"), small_digits)
    undisturbed.start(*arguments, NPROC="2")
    ((code, _, stderr),) = undisturbed.end()
    assert code == 0, stderr

    job.start(*arguments, *restarts(1), "--resume", "never", NPROC="2")
    job.wait_for_step(12)
    os.kill(job.worker(rank=1), signal.SIGKILL)
    ((code, stdout, stderr),) = job.end()
    assert code == 0 and "rank 1 was killed by signal 9" in stderr
    assert "restart 1 of 1, from the latest checkpoint" in stderr and "resumed from" in stdout
    weights, expected = (read_state(each.folder / "output/tiny/model.pdparams") for each in (job, undisturbed))
    assert weights.keys() == expected.keys()
    assert all(weights[name].tobytes() == expected[name].tobytes() for name in expected)
