"""How many processes a launch has, and on which nodes: by the visible cards, by NPROC and PADDLE_NNODES, by srun."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

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


class Layout(NamedTuple):
    num_nodes: int  # launchers
    num_local: int  # processes of this launcher
    num_gpus: int  # visible ones, of which a process takes one; 0: CPUs
    task: SlurmTask | None = None

    @property
    def first_on_machine(self) -> int:
        """The number of this launcher's first process among those of the machine."""
        return self.task.local_number if self.task and self.task.is_one_worker else 0

    @property
    def num_on_machine(self) -> int:
        return self.task.num_local if self.task and self.task.is_one_worker else self.num_local

    @property
    def num_machines(self) -> int:
        return self.task.num_nodes if self.task else self.num_nodes


def say(line: str) -> None:
    print(f"vit_static: {line}", file=sys.stderr, flush=True)


def find_layout(environ: Mapping[str, str], device: str = "auto") -> Layout:
    """One process a visible card, or one on a CPU, unless NPROC says otherwise; on as many nodes as PADDLE_NNODES or
    srun says. `device` is the config's.

    Raises ValueError where a number is none, NPROC exceeds the cards, or srun's tasks contradict NPROC.
    """
    if is_worker(environ):
        return Layout(1, 1, num_gpus=0)
    task = None if environ.get("PADDLE_NNODES") else find_slurm_task(environ)
    num_gpus = 0 if device == "cpu" else count_visible_gpus(environ)
    if task and task.is_one_worker:
        if positive_int(environ, "NPROC", default=task.num_local) != task.num_local:
            raise ValueError(
                f"NPROC={environ['NPROC']}: srun has started {task.num_local} tasks here, each of which is one "
                "process; leave NPROC unset, or give srun --ntasks-per-node=1"
            )
        return Layout(task.num_tasks, 1, num_gpus, task)
    num_nodes = task.num_nodes if task else positive_int(environ, "PADDLE_NNODES", default=1)
    num_local = positive_int(environ, "NPROC", default=max(1, num_gpus))
    if 0 < num_gpus < num_local:
        raise ValueError(f"NPROC={num_local}: only {num_gpus} GPUs are visible; VIT_STATIC_DEVICE=cpu runs on the CPU")
    return Layout(num_nodes, num_local, num_gpus, task)


def is_worker(environ: Mapping[str, str]) -> bool:
    """Whether another launcher has started this process."""
    return "PADDLE_CURRENT_ENDPOINT" in environ


def positive_int(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name) or str(default)
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise ValueError(f"{name}={value}: it must be a positive integer")
    return int(value)


def count_visible_gpus(environ: Mapping[str, str]) -> int:
    """Without importing Paddle, which would cost every start seconds. run.sh sets VIT_STATIC_DEVICE."""
    if environ.get("VIT_STATIC_DEVICE") == "cpu":
        return 0
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    num_gpus = sum(line.startswith("GPU ") for line in listing.splitlines())
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if num_gpus == 0 or visible is None or visible == "all":
        return num_gpus
    entries = [entry.strip() for entry in visible.split(",")]
    # As CUDA does: whatever follows an invalid entry ("-1", nothing) is invisible too.
    return next((i for i, entry in enumerate(entries) if entry in ("", "-1")), len(entries))


# Slurm


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
    node = whole_number(environ, "SLURM_NODEID")
    tasks_per_node = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    job, step = whole_number(environ, "SLURM_JOB_ID"), whole_number(environ, "SLURM_STEP_ID")
    # 16: steps of one job that run at once should differ, and not have the next job's ports.
    port = SLURM_PORTS[(16 * job + step) % len(SLURM_PORTS)]
    return SlurmTask(
        step=f"{job}.{step}",
        number=whole_number(environ, "SLURM_PROCID"),
        num_tasks=num_tasks,
        num_nodes=num_nodes,
        local_number=whole_number(environ, "SLURM_LOCALID"),
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
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, repeats in found for _ in range(int(repeats or 1))]


def whole_number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name) or "0"
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name}={value}: it must be a whole number")
    return int(value)


def warn_of_idle_nodes(environ: Mapping[str, str]) -> None:
    """Says where a job of several nodes runs this on one, as it does without srun (see `find_slurm_task`)."""
    decided = any(environ.get(name) for name in ("SLURM_STEP_ID", "PADDLE_NNODES", "PADDLE_CURRENT_ENDPOINT"))
    num_nodes = whole_number(environ, "SLURM_JOB_NUM_NODES")
    if not decided and num_nodes > 1:
        say(
            f"this runs on one of the Slurm job's {num_nodes} nodes; start it with srun to use all, "
            "or with PADDLE_NNODES=1 if one is meant"
        )
