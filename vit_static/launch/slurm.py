"""Slurm's environment variables: nodes, tasks, host lists."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vit_static.common.text import non_negative_int, positive_int

SLURM_PORTS = range(20000, 30000)  # below those that Linux hands out by itself


class SlurmTask(NamedTuple):
    """This process among the tasks of a step that srun has started."""

    step: str  # JOB.STEP
    number: int  # 0 to num_tasks - 1
    num_tasks: int
    num_nodes: int
    local_number: int  # among the tasks of this machine
    num_local: int
    master: str  # host:port where task 0 will listen

    @property
    def is_one_worker(self) -> bool:
        """Whether srun has started a task a process; else it is one a machine, which starts the processes."""
        return self.num_tasks > self.num_nodes


def find_slurm_task(environ: Mapping[str, str]) -> SlurmTask | None:
    """This task of a step that srun has started with more than one; None where there is no such step.

    What an `sbatch` script or an `salloc` shell runs without srun runs once, on one node: Slurm's users know it so, and
    to reach for the other nodes from there would be to wait for launchers that nobody starts. (SLURM_PROCID=0 and the
    job's SLURM_NTASKS stand there too, so that only the step's own variables tell; an `salloc` shell may be a step
    itself, of one task, with the job's SLURM_NTASKS.)
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
    # 16: steps of one job that run at once should differ, and not have the next job's ports.
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
    """The step's first node, where task 0 is."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return expand_hosts(environ[name])[0]
    raise ValueError("srun has set no SLURM_STEP_NODELIST; set PADDLE_MASTER=HOST:PORT, HOST being task 0's")


def expand_hosts(hosts: str) -> list[str]:
    """Slurm's `node[001-003,7],login` as node001, node002, node003, node7, login."""
    ranges = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
    group = rf"(?:[^][,\s]|{ranges})+"
    if not re.fullmatch(rf"{group}(?:,{group})*", hosts):
        raise ValueError(f"{hosts!r}: not a list of nodes as Slurm writes it; set PADDLE_MASTER=HOST:PORT")
    expanded = []
    for name in re.findall(group, hosts):
        parts = re.split(rf"({ranges})", name)
        choices = [list(expand_ranges(part[1:-1])) if part.startswith("[") else [part] for part in parts]
        expanded += ["".join(choice) for choice in itertools.product(*choices)]
    return expanded


def expand_ranges(ranges: str) -> Iterator[str]:
    """`001-003,7` as 001, 002, 003, 7."""
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}d}"


def expand_counts(counts: str) -> list[int]:
    """Slurm's `2(x3),1` as 2, 2, 2, 1."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, repeats in groups for _ in range(int(repeats or 1))]
