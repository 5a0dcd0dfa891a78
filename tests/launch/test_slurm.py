"""The launcher under Slurm: the tasks of a step, and jobs that srun starts.

The tests set the variables that srun sets for its tasks, after SchedMD's `src/common/env.c`.
"""

from __future__ import annotations

import os
import signal
import socket

import numpy as np
import pytest
from helpers.jobs import LONG, Job, ScriptedJob, lose_node, restarts, slurm_environ, srun, wait_until

from vit_static.launch import topology
from vit_static.launch.slurm import expand_counts, expand_hosts, find_slurm_task


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
    """The step has three tasks on two nodes, two of them on the first."""
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
        pytest.param(ON_FOUR_NODES | {"PADDLE_NNODES": "1"}, id="PADDLE_NNODES set by hand"),
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


# Jobs under srun


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [2, 1], ids=["one task per node", "one task per process"])
def test_sruns_tasks_train_as_one_launch_does(job: Job, losses_of_one_launch: list[float], num_nodes: int) -> None:
    """Only task 0, which is rank 0, prints."""
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


@pytest.mark.slow
def test_a_killed_rank_ends_a_job_whose_other_node_hangs(job: Job) -> None:
    """The other worker is suspended, so only SIGKILL ends it, like a worker that waits in NCCL."""
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
    wait_until(lambda: not job.processes())  # its worker ends by itself and saves its state
    (code, _, stderr), _ = job.end()
    assert code == 1 and "vit_static: node 1" in stderr and "was lost" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [slice(1, 2), slice(0, 2)], ids=["one node", "all, as Slurm does"])
def test_a_stopped_node_stops_the_job_with_its_state_saved(job: Job, stopped: slice) -> None:
    srun(job, *LONG, num_nodes=2)
    job.wait_for_step(3)
    for launched in job.launches[stopped]:
        launched.send_signal(signal.SIGTERM)
    (code, stdout, stderr), other = job.end()
    assert (code, stderr) == (75, "") and "the state is saved" in stdout
    assert other == (75, "", "")


@pytest.mark.parametrize("num_nodes", [2, 1], ids=["one task per node", "one task per process"])
def test_a_killed_rank_is_started_again_under_srun(scripted_job: ScriptedJob, num_nodes: int) -> None:
    srun(scripted_job, *restarts(1), num_nodes=num_nodes, ACTIONS_0="1 0", ACTIONS_1="kill 0")
    (code, _, stderr), other = scripted_job.end()
    assert code == 0 and "rank 1 on" in stderr and "restart 1 of 1" in stderr and len(stderr.splitlines()) == 1
    assert other == (0, "", "")


def test_under_srun_a_lost_task_ends_the_job(scripted_job: ScriptedJob) -> None:
    srun(scripted_job, *restarts(3), num_nodes=2, ACTIONS="until:lost+1 0")
    lose_node(scripted_job, 1)
    (code, _, stderr), _ = scripted_job.end(timeout_s=30)
    assert code == 1 and len(scripted_job.calls("0")) == 1
    assert "vit_static: node 1" in stderr and "was lost" in stderr and "restart" not in stderr
