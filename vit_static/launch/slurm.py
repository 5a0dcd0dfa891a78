"""Slurm's environment variables: nodes, tasks, host lists."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vit_static.common.text import non_negative_int, positive_int

SLURM_PORTS = range(20000, 30000)  # below the ports that Linux assigns by itself


class SlurmTask(NamedTuple):
    """The position of this process among the tasks of a step that srun started."""

    step: str  # JOB.STEP
    number: int  # 0 to num_tasks - 1
    num_tasks: int
    num_nodes: int
    local_number: int  # among the tasks of this machine
    num_local: int
    master: str  # host:port where task 0 will listen

    @property
    def is_one_worker(self) -> bool:
        """Return whether srun started one task per process, otherwise one per machine, which starts the processes."""
        return self.num_tasks > self.num_nodes


def find_slurm_task(environ: Mapping[str, str]) -> SlurmTask | None:
    """Return this process's task if srun started a step of several tasks; otherwise None.

    A command that an `sbatch` script or an `salloc` shell runs without srun runs once, on one node, as Slurm's users
    expect: nobody would start launchers on the other nodes. SLURM_PROCID=0 and the job's SLURM_NTASKS are set there,
    too, so only the step's variables distinguish the two cases. (An `salloc` shell may itself be a step of one task,
    with the job's SLURM_NTASKS.) Raise ValueError if a number or a list of nodes is invalid.
    """
    if not all(environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID")):
        return None
    num_tasks = positive_int(environ, "SLURM_STEP_NUM_TASKS", positive_int(environ, "SLURM_NTASKS", 1))
    if num_tasks == 1:
        return None
    num_job_nodes = positive_int(environ, "SLURM_NNODES", positive_int(environ, "SLURM_JOB_NUM_NODES", 1))
    num_nodes = positive_int(environ, "SLURM_STEP_NUM_NODES", num_job_nodes)
    node = non_negative_int(environ, "SLURM_NODEID")
    tasks_per_node = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    job, step = non_negative_int(environ, "SLURM_JOB_ID"), non_negative_int(environ, "SLURM_STEP_ID")
    # Concurrent steps of a job get different ports, and 16 steps fit before the next job's ports begin.
    port = SLURM_PORTS[(16 * job + step) % len(SLURM_PORTS)]
    return SlurmTask(
        step=f"{job}.{step}",
        number=non_negative_int(environ, "SLURM_PROCID"),
        num_tasks=num_tasks,
        num_nodes=num_nodes,
        local_number=non_negative_int(environ, "SLURM_LOCALID"),
        num_local=tasks_per_node[node] if node < len(tasks_per_node) else -(-num_tasks // num_nodes),
        master=environ.get("PADDLE_MASTER") or f"{'127.0.0.1' if num_nodes == 1 else first_host(environ)}:{port}",
    )


def first_host(environ: Mapping[str, str]) -> str:
    """Return the step's first node, on which task 0 runs."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return expand_hosts(environ[name])[0]
    raise ValueError("SLURM_STEP_NODELIST is not set; set PADDLE_MASTER=HOST:PORT, where HOST is the host of task 0")


def expand_hosts(hosts: str) -> list[str]:
    """Expand Slurm's `node[001-003,7],login` to node001, node002, node003, node7, login."""
    ranges = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
    group = rf"(?:[^][,\s]|{ranges})+"
    if not re.fullmatch(rf"{group}(?:,{group})*", hosts):
        raise ValueError(f"{hosts!r}: not a list of nodes in Slurm's format; set PADDLE_MASTER=HOST:PORT")
    expanded = []
    for name in re.findall(group, hosts):
        parts = re.split(rf"({ranges})", name)
        choices = [list(expand_ranges(part[1:-1])) if part.startswith("[") else [part] for part in parts]
        expanded += ["".join(choice) for choice in itertools.product(*choices)]
    return expanded


def expand_ranges(ranges: str) -> Iterator[str]:
    """Expand `001-003,7` to 001, 002, 003, 7."""
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}d}"


def expand_counts(counts: str) -> list[int]:
    """Expand Slurm's `2(x3),1` to 2, 2, 2, 1."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, repeats in groups for _ in range(int(repeats or 1))]
