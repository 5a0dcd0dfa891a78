"""Device mesh: its validation, its start, and this process's coordinates in it.

Rank and world size come from the `PADDLE_*` variables that the launcher sets.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from vit_static.common.errors import ConfigError
from vit_static.common.text import counted
from vit_static.config.schema import ParallelConfig
from vit_static.model.variants import Variant
from vit_static.parallel import gloo
from vit_static.parallel.host_collectives import HostGroup
from vit_static.parallel.rank_watch import start_rank_watch, waiting_for_ranks

_host_group = HostGroup("steps")  # one per process; not an attribute of Mesh, because Paddle copies meshes


@dataclass(frozen=True)
class MeshShape:
    """Number of ranks along each axis of the mesh: data-parallel, tensor-parallel, pipeline stages."""

    dp: int
    mp: int
    pp: int

    @property
    def world_size(self) -> int:
        return self.dp * self.mp * self.pp

    def __str__(self) -> str:
        return ", ".join(f"{axis}={size}" for axis, size in (("dp", self.dp), ("mp", self.mp), ("pp", self.pp)))


@dataclass(frozen=True)
class Mesh:
    """Device mesh, seen from this process.

    Ranks are numbered along mp first, then dp, then pp, so that tensor parallelism stays within a machine.
    Data-parallel rank r of n takes the r-th of n equal parts of a batch. Ranks that differ only in mp or pp take the
    same part.
    """

    rank: int
    shape: MeshShape
    device: str  # cpu or gpu
    device_id: int | None  # index of the GPU; None on a CPU
    process_mesh: dist.ProcessMesh  # all ranks; axes pp, dp, mp, without pp or mp where it is 1

    @property
    def world_size(self) -> int:
        return self.shape.world_size

    @property
    def dp_size(self) -> int:
        return self.shape.dp

    @property
    def mp_rank(self) -> int:
        return self.rank % self.shape.mp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.shape.mp % self.shape.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.shape.mp * self.shape.dp)

    @property
    def dp_ranks(self) -> tuple[int, ...]:
        """Ranks that hold the same part of the model as this one, this one among them."""
        first = self.pp_rank * self.shape.dp * self.shape.mp + self.mp_rank
        return tuple(first + self.shape.mp * index for index in range(self.shape.dp))

    @property
    def axes(self) -> list[str]:
        """Axis names of a pipeline stage's mesh, in order."""
        return [axis for axis in self.process_mesh.dim_names if axis != "pp"]

    def stage(self, index: int) -> dist.ProcessMesh:
        """Return the mesh of a pipeline stage. Without a pipeline, stage 0 has all ranks."""
        return self.process_mesh if self.shape.pp == 1 else self.process_mesh.get_mesh_with_dim("pp", index)

    @property
    def first_stage(self) -> dist.ProcessMesh:
        return self.stage(0)

    @property
    def last_stage(self) -> dist.ProcessMesh:
        return self.stage(self.shape.pp - 1)

    def all_reduce_sum(self, values: np.ndarray) -> np.ndarray:
        """Return the element-wise sum over the data-parallel ranks, float64. Waits for all ranks.

        Of the ranks that share their images, only one contributes: mp rank 0 of the last stage, which has the loss.
        """
        if self.world_size == 1:
            return values
        contributes = self.mp_rank == 0 and self.pp_rank == self.shape.pp - 1
        return _all_reduce_sum(values if contributes else np.zeros_like(values))

    def mean(self, value: float) -> float:
        """Return the mean over the data-parallel ranks. Waits for all ranks."""
        return float(self.all_reduce_sum(np.array([value]))[0]) / self.dp_size

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank. Waits for all ranks."""
        if self.world_size == 1:
            return flag
        return bool(_all_reduce_sum(np.array([float(flag)]))[0] > 0)

    def first_non_none(self, value: Any) -> Any:
        """Return the first value of all ranks' that isn't None, the same on every rank. Values must be JSON.

        Waits for all ranks, but not for the device.
        """
        with waiting_for_ranks("agreement on the next step"):
            return _host_group.first_non_none(value, self.rank, self.world_size)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every rank's value, rank 0's first, the same list on all ranks. Waits like `first_non_none`."""
        with waiting_for_ranks("all_gather_object"):
            return _host_group.all_gather_object(value, self.rank, self.world_size)

    def waiting_for_device(self) -> AbstractContextManager[None]:
        """Mark a wait for the program on a GPU, whose collectives wait for other ranks; on CPUs, gloo.py marks them."""
        return waiting_for_ranks("program on the device") if self.device == "gpu" else nullcontext()

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.any_rank(False)


def _all_reduce_sum(values: np.ndarray) -> np.ndarray:
    tensor = paddle.to_tensor(values, dtype="float64")
    with waiting_for_ranks("all_reduce"):
        dist.all_reduce(tensor)
        return tensor.numpy()


def rank_and_world_size(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return this process's rank and the world size, as the launcher set them; 0 and 1 without a launcher. Opens no
    connections.
    """
    return int(environ.get("PADDLE_TRAINER_ID", "0")), int(environ.get("PADDLE_TRAINERS_NUM", "1"))


def choose_device(device: str) -> str:
    """Resolve the config's `device` to cpu or gpu. Raises ConfigError for gpu on a machine without one."""
    has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if device == "auto":
        return "gpu" if has_gpu else "cpu"
    if device == "gpu" and not has_gpu:
        raise ConfigError(
            "device = 'gpu': this machine has no GPU, or Paddle's CPU build is installed; set device=cpu (or auto), "
            "or install the GPU build with VIT_STATIC_DEVICE=gpu ./run.sh setup"
        )
    return device


def gpu_capability(mesh: Mesh) -> tuple[int, int] | None:
    """Return the compute capability of this process's GPU, or None on a CPU."""
    if mesh.device != "gpu":
        return None
    major, minor = paddle.device.cuda.get_device_capability(mesh.device_id)
    return major, minor


def num_micro_batches(parallel: ParallelConfig) -> int:
    """Return the number of micro-batches per step and rank: `grad_accum_steps`, or if that is 1, one per stage."""
    return parallel.grad_accum_steps if parallel.grad_accum_steps > 1 else parallel.pp


def resolve_mesh(parallel: ParallelConfig, world_size: int, global_batch_size: int, variant: Variant) -> MeshShape:
    """Return the mesh shape of the config, with `dp` computed if it is auto.

    Raises ConfigError, before anything is built, if this mesh can't train the model.
    """
    dp = max(world_size // (parallel.mp * parallel.pp), 1) if parallel.dp == "auto" else parallel.dp
    mesh_shape = MeshShape(dp, parallel.mp, parallel.pp)
    reason = why_invalid(parallel, mesh_shape, world_size, global_batch_size, variant)
    if reason is not None:
        raise ConfigError(reason)
    return mesh_shape


def why_invalid(
    parallel: ParallelConfig, shape: MeshShape, world_size: int, global_batch_size: int, variant: Variant
) -> str | None:
    """Return why a mesh can't train the model and what to change, or None if it can."""
    if variant.num_heads % shape.mp or variant.mlp_dim % shape.mp:
        return (
            f"parallel.mp = {shape.mp}: must divide the model's num_heads of {variant.num_heads} and mlp_dim of "
            f"{variant.mlp_dim}; set it to {_one_of(divisors(math.gcd(variant.num_heads, variant.mlp_dim)))}"
        )
    if shape.pp > variant.depth:
        blocks = counted(variant.depth, "block")
        return f"parallel.pp = {shape.pp}: the model has only {blocks}; set it to {variant.depth} or less"
    micro_batches = num_micro_batches(parallel.model_copy(update={"pp": shape.pp}))
    num_parts = shape.dp * micro_batches
    if global_batch_size % num_parts:
        nearest = max(round(global_batch_size / num_parts), 1) * num_parts
        return (
            f"data.global_batch_size = {global_batch_size}: can't be divided by {shape.dp} data-parallel ranks x "
            f"{counted(micro_batches, 'micro-batch')}; set data.global_batch_size={nearest}"
        )
    if shape.world_size != world_size:
        return (
            f"parallel.dp = {parallel.dp}, mp = {shape.mp}, pp = {shape.pp}: this mesh needs {shape.world_size} "
            f"processes, and the run has {world_size}; start {shape.world_size} (NPROC={shape.world_size} on one "
            f"machine), or choose dp, mp and pp whose product is {world_size}"
        )
    return None


def divisors(number: int) -> list[int]:
    """Return all divisors, in ascending order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _one_of(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def all_mesh_shapes(world_size: int) -> Iterator[MeshShape]:
    """Yield every way to write `world_size` as dp x mp x pp."""
    for mp in divisors(world_size):
        for pp in divisors(world_size // mp):
            yield MeshShape(world_size // (mp * pp), mp, pp)


def start_mesh(
    mesh_shape: MeshShape, device: str, collective_timeout_s: float = 1800.0, deterministic: bool = False
) -> Mesh:
    """Connect to the other processes, if there are any (NCCL on GPUs, gloo on CPUs), and return the mesh of them all.

    `device` is the config's. Raises ConfigError if this machine doesn't have it. If a rank waits for another one for
    `collective_timeout_s` seconds, all processes end (rank_watch.py). With `deterministic`, a GPU's kernels add in the
    same order in every run.
    """
    rank, world_size = rank_and_world_size()
    device = choose_device(device)
    paddle.set_device(f"gpu:{dist.ParallelEnv().device_id}" if device == "gpu" else "cpu")
    if deterministic and device == "gpu":
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})  # cuDNN's kernels, and FlashAttention's backward pass
    os.environ.pop("POD_NAME", None)  # set by launchers; it would make DistModel start `fleet`, which isn't used here
    if world_size > 1:
        if device == "cpu":
            os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
            gloo.install()
        with redirect_stderr(io.StringIO()):  # Paddle prints a table of the flags that common/startup.py has set
            dist.init_parallel_env()
        if device == "cpu":
            gloo.unlimit_groups()
        start_rank_watch(rank, world_size, collective_timeout_s)
    device_id = dist.ParallelEnv().device_id if device == "gpu" else None
    return make_mesh(rank, mesh_shape, device, device_id)


def make_mesh(rank: int, mesh_shape: MeshShape, device: str, device_id: int | None = None) -> Mesh:
    """Create the mesh as seen by `rank`, and make it Paddle's global mesh. Connects nothing."""
    sizes = {"pp": mesh_shape.pp, "dp": mesh_shape.dp, "mp": mesh_shape.mp}
    axes = [axis for axis, size in sizes.items() if size > 1 or axis == "dp"]
    ranks = np.arange(mesh_shape.world_size).reshape([sizes[axis] for axis in axes])
    process_mesh = dist.ProcessMesh(ranks.tolist(), dim_names=axes)
    dist.auto_parallel.set_mesh(process_mesh)
    return Mesh(rank, mesh_shape, device, device_id, process_mesh)


def seed_everything(seed: int) -> None:
    """Seed Paddle's and NumPy's generators, so that all ranks draw the same initial weights."""
    paddle.seed(seed)
    np.random.seed(seed)


def device_name(mesh: Mesh) -> str:
    """Return the GPU's name as its driver reports it, or cpu."""
    return "cpu" if mesh.device == "cpu" else str(paddle.device.cuda.get_device_name(mesh.device_id))
