"""The processes of a run and how they share the work. The only reader of Paddle's PADDLE_* variables."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.distributed as dist

from vit_static import cpu_collectives
from vit_static.config import ConfigError, ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """This process among the others. Data-parallel rank r of n takes the r-th of n equal parts of a batch."""

    rank: int
    world_size: int
    device: str  # cpu or gpu
    device_id: int | None  # the card's number; None on a CPU
    dp_rank: int
    dp_size: int
    process_mesh: dist.ProcessMesh

    def total(self, values: np.ndarray) -> np.ndarray:
        """The element-wise sum over the data-parallel ranks, float64 in and out. Waits for all ranks."""
        if self.world_size == 1:
            return values
        tensor = paddle.to_tensor(values, dtype="float64")
        dist.all_reduce(tensor)
        return tensor.numpy()

    def mean(self, value: float) -> float:
        """The mean over the data-parallel ranks. Waits for all ranks."""
        return float(self.total(np.array([value]))[0]) / self.dp_size

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank: what all of them must act on together. Waits for all ranks."""
        return bool(self.total(np.array([float(flag)]))[0] > 0)

    def wait_for_all(self) -> None:
        """Returns when every rank has come here."""
        self.total(np.zeros(1))


def rank_and_world_size(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """As the launcher told this process; before, and without, importing anything heavy or connecting."""
    return int(environ.get("PADDLE_TRAINER_ID", "0")), int(environ.get("PADDLE_TRAINERS_NUM", "1"))


def choose_device(device: str) -> str:
    """cpu or gpu for the config's `device`. Raises ConfigError where a card is asked for and there is none."""
    has_card = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if device == "auto":
        return "gpu" if has_card else "cpu"
    if device == "gpu" and not has_card:
        raise ConfigError(
            "device = 'gpu': this machine has no card, or the CPU build of Paddle; set device=cpu (or auto), "
            "or install the GPU build with VIT_STATIC_DEVICE=gpu ./run.sh setup"
        )
    return device


def check(parallel: ParallelConfig, world_size: int, global_batch_size: int) -> int:
    """The number of data-parallel ranks. Raises ConfigError, before anything is built, for what can't be."""
    for key, default in (("mp", 1), ("pp", 1), ("sharding_stage", 0), ("recompute", "none")):
        value = getattr(parallel, key)
        if value != default:
            raise ConfigError(
                f"parallel.{key} = {value!r}: this version trains data-parallel alone; set parallel.{key}={default}"
            )
    dp = world_size if parallel.dp == "auto" else parallel.dp
    if dp != world_size:
        raise ConfigError(
            f"parallel.dp = {dp}: there are {world_size} processes; set parallel.dp=auto, or start {dp} (NPROC={dp})"
        )
    parts = dp * parallel.grad_accum_steps
    if global_batch_size % parts:
        nearest = max(parts, round(global_batch_size / parts) * parts)
        raise ConfigError(
            f"data.global_batch_size = {global_batch_size}: {dp} data-parallel ranks x "
            f"{parallel.grad_accum_steps} micro-batches don't divide it; {nearest} would do"
        )
    return dp


def start(parallel: ParallelConfig, device: str, global_batch_size: int) -> Mesh:
    """Joins the other processes, if there are any: NCCL on cards, gloo on CPUs."""
    rank, world_size = rank_and_world_size()
    dp = check(parallel, world_size, global_batch_size)
    device = choose_device(device)
    paddle.set_device(f"gpu:{dist.ParallelEnv().device_id}" if device == "gpu" else "cpu")
    os.environ.pop("POD_NAME", None)  # a launcher's; it would make DistModel start `fleet`, which isn't used
    if world_size > 1:
        if device == "cpu":
            os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
            cpu_collectives.install()
        with redirect_stderr(io.StringIO()):  # a table of the flags that runtime.py has set
            dist.init_parallel_env()
    process_mesh = dist.ProcessMesh(list(range(world_size)), dim_names=["dp"])
    dist.auto_parallel.set_mesh(process_mesh)
    device_id = paddle.device.cuda.current_device() if device == "gpu" else None
    return Mesh(rank, world_size, device, device_id, rank, dp, process_mesh)


def seed_everything(seed: int) -> None:
    """Paddle's and NumPy's generators, for the fresh weights: the same ones on every rank."""
    paddle.seed(seed)
    np.random.seed(seed)


def device_name(mesh: Mesh) -> str:
    """The card's name as its driver says it, or 'cpu'."""
    return "cpu" if mesh.device == "cpu" else str(paddle.device.cuda.get_device_name(mesh.device_id))
