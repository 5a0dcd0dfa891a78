"""The launcher on this machine's CPUs: processes, nodes that are launches on this machine, and failures."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.jobs import LONG, Job, ScriptedJob, wait_for_both, wait_until

from vit_static.launch import launcher, topology


def test_the_interface_of_an_address() -> None:
    assert launcher.interface_of("127.0.0.1") == "lo"
    assert launcher.interface_of("192.0.2.1") is None  # reserved for documentation


@pytest.mark.parametrize(
    ("arguments", "num_local"),
    [
        (["pretrain", "-o", "seed=1"], 4),
        (["pretrain", "-o", "seed=1", "-o", "device=cpu"], 1),
        (["pretrain", "-c", "cpu.yaml", "--resume", "never"], 1),
        (["pretrain", "-c", "cpu.yaml", "-o", "device=gpu"], 4),
        (["eval", "--checkpoint", "output/x", "-o", "device=cpu"], 1),
        (["pretrain", "-c", "nowhere.yaml"], 4),  # the verb reports it
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
    assert topology.find_layout({}, launcher.config_of(arguments).device).num_local == num_local


# Training on nodes


@pytest.mark.slow
def test_two_nodes_train_as_one_launch_does(job: Job, losses_of_one_launch: list[float]) -> None:
    job.start_nodes()
    for code, _, stderr in job.end():
        assert (code, stderr) == (0, "")
    np.testing.assert_allclose(job.losses(), losses_of_one_launch, rtol=1e-6)


# Failures end the whole job


def start_one_launch(job: Job) -> None:
    job.start(*LONG, NPROC="2")


def start_two_nodes(job: Job) -> None:
    job.start_nodes(*LONG)


@pytest.mark.slow
@pytest.mark.parametrize("start", [start_one_launch, start_two_nodes])
def test_a_killed_rank_ends_the_job(job: Job, start: Callable[[Job], None]) -> None:
    start(job)
    job.wait_for_step(3)
    os.kill(job.worker(rank=1), signal.SIGKILL)
    for code, _, stderr in job.end(timeout_s=60):
        assert code == 1 and "vit_static: rank 1" in stderr and "was killed by signal 9" in stderr


def test_a_node_that_leaves_during_the_rendezvous_can_rejoin(scripted_job: ScriptedJob) -> None:
    def start_one_of_three() -> None:
        scripted_job.start(ACTIONS="0", PADDLE_NNODES="3", PADDLE_MASTER=f"127.0.0.1:{scripted_job.port}")

    def wait_for_socket(state: str) -> None:  # by the number of the state in /proc/net/tcp
        pattern = re.compile(rf" 0100007F:{scripted_job.port:04X} [0-9A-F]+:[0-9A-F]+ {state} ")
        wait_until(lambda: bool(pattern.search(Path("/proc/net/tcp").read_text())))

    start_one_of_three()
    wait_for_socket("0A")  # it is listening
    start_one_of_three()
    wait_for_socket("01")  # the other is connected
    scripted_job.launches[1].send_signal(signal.SIGTERM)
    scripted_job.launches[1].wait()
    for _ in range(2):
        start_one_of_three()
    assert [code for code, _, _ in scripted_job.end(timeout_s=30)] == [0, 75, 0, 0]


# A network that fails without closing connections


@pytest.fixture
def network(scripted_job: ScriptedJob) -> Iterator[Callable[[str], None]]:
    """Return set_network(state), which turns the launches' private network up or down; skip if none can be created."""
    holder = subprocess.Popen(
        ["unshare", "-rn", "sh", "-c", "ip link set lo up && echo ready && exec sleep 600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert holder.stdout
    if holder.stdout.readline() != "ready\n":
        holder.wait()
        pytest.skip("this machine doesn't allow private networks")
    scripted_job.prefix = ("nsenter", "--preserve-credentials", "-U", "-n", "-t", str(holder.pid))

    def set_network(state: str) -> None:
        subprocess.run([*scripted_job.prefix, "ip", "link", "set", "lo", state], check=True)

    yield set_network
    holder.kill()
    holder.wait()


def test_a_silent_node_counts_as_lost_after_the_timeout(
    scripted_job: ScriptedJob, network: Callable[[str], None]
) -> None:
    for _ in range(2):
        scripted_job.start_node("-o", "train.node_timeout_s=3", ACTIONS="until:lost+1")
    wait_for_both(scripted_job)
    sockets = Path(f"/proc/{scripted_job.launches[0].pid}/net/tcp")
    established = re.compile(rf":{scripted_job.port:04X} [0-9A-F]+:[0-9A-F]+ 01 ")
    assert established.search(sockets.read_text())
    network("down")
    cut_at = time.monotonic()
    wait_until(lambda: not established.search(sockets.read_text()))
    assert 2.0 < time.monotonic() - cut_at < 5.0
    (scripted_job.folder / "lost").touch()
    for code, _, stderr in scripted_job.end(timeout_s=20):
        assert code == 1 and re.match(r"vit_static: node [01] \(.+\) was lost", stderr)
