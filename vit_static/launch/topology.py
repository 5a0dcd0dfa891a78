"""Number of processes and nodes of a launch, from the visible GPUs, NPROC, PADDLE_NNODES, or srun."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from vit_static.common.text import counted, non_negative_int, positive_int, say
from vit_static.launch.slurm import SlurmTask, find_slurm_task


class Layout(NamedTuple):
    """Number of nodes, and of processes and GPUs on this node."""

    num_nodes: int  # launchers
    num_local: int  # processes of this launcher
    num_gpus: int  # visible GPUs, one per process; 0 if the processes run on CPUs
    task: SlurmTask | None = None

    @property
    def first_on_machine(self) -> int:
        """Return the index of this launcher's first process among the processes of the machine."""
        return self.task.local_number if self.task and self.task.is_one_worker else 0

    @property
    def num_on_machine(self) -> int:
        """Return the number of processes on this machine."""
        return self.task.num_local if self.task and self.task.is_one_worker else self.num_local

    @property
    def num_machines(self) -> int:
        """Return the number of machines, which is that of nodes unless srun started several tasks on one."""
        return self.task.num_nodes if self.task else self.num_nodes


def find_layout(environ: Mapping[str, str], device: str = "auto") -> Layout:
    """Return one process per visible GPU, or one on a CPU, unless NPROC is set; on the nodes of PADDLE_NNODES or srun.

    `device` is the config's. Raise ValueError if a number is invalid, NPROC exceeds the number of GPUs, or srun's tasks
    contradict NPROC.
    """
    if is_worker(environ):
        return Layout(1, 1, num_gpus=0)
    task = None if environ.get("PADDLE_NNODES") else find_slurm_task(environ)
    num_gpus = 0 if device == "cpu" else count_visible_gpus(environ)
    if task and task.is_one_worker:
        if positive_int(environ, "NPROC", default=task.num_local) != task.num_local:
            raise ValueError(
                f"NPROC={environ['NPROC']}: srun started {task.num_local} tasks here, each of which is one "
                "process; leave NPROC unset, or give srun --ntasks-per-node=1"
            )
        return Layout(task.num_tasks, 1, num_gpus, task)
    num_nodes = task.num_nodes if task else positive_int(environ, "PADDLE_NNODES", default=1)
    num_local = positive_int(environ, "NPROC", default=max(1, num_gpus))
    if 0 < num_gpus < num_local:
        raise ValueError(
            f"NPROC={num_local}: only {counted(num_gpus, 'GPU', be=True)} visible; VIT_STATIC_DEVICE=cpu runs on the "
            "CPU"
        )
    return Layout(num_nodes, num_local, num_gpus, task)


def is_worker(environ: Mapping[str, str]) -> bool:
    """Return whether another launcher has started this process."""
    return "PADDLE_CURRENT_ENDPOINT" in environ


def count_visible_gpus(environ: Mapping[str, str]) -> int:
    """Count the visible GPUs without importing Paddle, which takes seconds. (run.sh sets VIT_STATIC_DEVICE.)"""
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
    # As in CUDA, the GPUs after an invalid entry ("-1" or an empty one) are invisible, too.
    return next((i for i, entry in enumerate(entries) if entry in ("", "-1")), len(entries))


def warn_of_idle_nodes(environ: Mapping[str, str]) -> None:
    """Warn if a Slurm job of several nodes runs this on only one, without srun (see `find_slurm_task`)."""
    is_explicit = any(environ.get(name) for name in ("SLURM_STEP_ID", "PADDLE_NNODES", "PADDLE_CURRENT_ENDPOINT"))
    num_nodes = non_negative_int(environ, "SLURM_JOB_NUM_NODES")
    if not is_explicit and num_nodes > 1:
        say(
            f"this runs on one of the Slurm job's {num_nodes} nodes; start it with srun to use all, "
            "or set PADDLE_NNODES=1 if one node is enough"
        )
