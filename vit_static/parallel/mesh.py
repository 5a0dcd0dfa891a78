"""The processes of a run and how they share the work: which meshes can be, the start, this process's place.

Of `PADDLE_*` it reads what a launcher tells a process (launch.py writes these; runtime.py reads one).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from vit_static.common.errors import ConfigError
from vit_static.config.schema import ParallelConfig
from vit_static.model.variants import Variant
from vit_static.parallel import gloo
from vit_static.parallel.host_collectives import HostGroup

_host_group = HostGroup("steps")  # of this process with the others; no part of a mesh, which Paddle copies


@dataclass(frozen=True)
class MeshShape:
    """How many ranks stand along each axis of the mesh."""

    dp: int
    mp: int
    pp: int

    @property
    def world(self) -> int:
        return self.dp * self.mp * self.pp

    def __str__(self) -> str:
        return ", ".join(f"{axis}={size}" for axis, size in (("dp", self.dp), ("mp", self.mp), ("pp", self.pp)))


@dataclass(frozen=True)
class Mesh:
    """This process among the others.

    Ranks are numbered along mp first, then dp, then pp, so that tensor parallelism stays within a machine.
    Data-parallel rank r of n takes the r-th of n equal parts of a batch; ranks that differ in mp or pp alone take the
    same part.
    """

    rank: int
    shape: MeshShape
    device: str  # cpu or gpu
    device_id: int | None  # the card's number; None on a CPU
    process_mesh: dist.ProcessMesh  # all ranks; its axes are dp, and of pp and mp those of more than one rank

    @property
    def world_size(self) -> int:
        return self.shape.world

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
    def axes(self) -> list[str]:
        """Those of a pipeline stage's mesh, in its order."""
        return [axis for axis in self.process_mesh.dim_names if axis != "pp"]

    def stage(self, index: int) -> dist.ProcessMesh:
        """The mesh of one pipeline stage; without a pipeline there is one, 0, of all ranks."""
        return self.process_mesh if self.shape.pp == 1 else self.process_mesh.get_mesh_with_dim("pp", index)

    @property
    def first_stage(self) -> dist.ProcessMesh:
        return self.stage(0)

    @property
    def last_stage(self) -> dist.ProcessMesh:
        return self.stage(self.shape.pp - 1)

    def all_reduce_sum(self, values: np.ndarray) -> np.ndarray:
        """The element-wise sum over the data-parallel ranks, float64 in and out. Waits for all ranks.

        Of ranks that share their images the one counts that computes the loss: mp's first of pp's last.
        """
        if self.world_size == 1:
            return values
        counts = self.mp_rank == 0 and self.pp_rank == self.shape.pp - 1
        tensor = paddle.to_tensor(values if counts else np.zeros_like(values), dtype="float64")
        dist.all_reduce(tensor)
        return tensor.numpy()

    def mean(self, value: float) -> float:
        """The mean over the data-parallel ranks. Waits for all ranks."""
        return float(self.all_reduce_sum(np.array([value]))[0]) / self.dp_size

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank: what all of them must act on together. Waits for all ranks."""
        if self.world_size == 1:
            return flag
        tensor = paddle.to_tensor([float(flag)], dtype="float64")
        dist.all_reduce(tensor)
        return bool(tensor.numpy()[0] > 0)

    def first_non_none(self, value: Any) -> Any:
        """Of what ranks bring that isn't None, the first, the same on all of them; what JSON can hold.

        Waits for all ranks, but not for the device, and for ranks that are late as long as they take.
        """
        return _host_group.first_non_none(value, self.rank, self.world_size)

    def all_gather_object(self, value: Any) -> list[Any]:
        """What each rank brings, rank 0's first, the same list on all of them; waits as `first` does."""
        return _host_group.all_gather_object(value, self.rank, self.world_size)

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self.any_rank(False)


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


def num_micro_batches(parallel: ParallelConfig) -> int:
    """The parts that a rank's batch is computed in, one after the other: what `grad_accum_steps` says, but a pipeline
    gets at least one for each of its stages."""
    return parallel.grad_accum_steps if parallel.grad_accum_steps > 1 else parallel.pp


def resolve_mesh(parallel: ParallelConfig, world_size: int, global_batch_size: int, variant: Variant) -> MeshShape:
    """The mesh's sizes. Raises ConfigError, before anything is built, with the reason and the nearest that can be."""
    rest = parallel.mp * parallel.pp
    dp = max(world_size // rest, 1) if parallel.dp == "auto" else parallel.dp
    sizes = MeshShape(dp, parallel.mp, parallel.pp)
    reason = why_invalid(parallel, sizes, world_size, global_batch_size, variant)
    if reason is None:
        return sizes
    raise ConfigError(f"{reason}; {_remedy(parallel, sizes, world_size, global_batch_size, variant)}")


def why_invalid(
    parallel: ParallelConfig, sizes: MeshShape, world_size: int, global_batch_size: int, variant: Variant
) -> str | None:
    """Why these sizes can't be, or None where they can."""
    if sizes.world != world_size:
        key = "dp" if parallel.dp != "auto" else "mp" if sizes.mp > 1 else "pp"
        size = getattr(sizes, key)
        return f"parallel.{key} = {size}: {sizes} is a mesh of {sizes.world} processes, and there are {world_size}"
    for name, size in (("num_heads", variant.num_heads), ("mlp_dim", variant.mlp_dim)):
        if size % sizes.mp:
            return f"parallel.mp = {sizes.mp}: doesn't divide the model's {name} of {size}"
    if sizes.pp > variant.depth:
        return f"parallel.pp = {sizes.pp}: the model has only {variant.depth} blocks"
    micro_batches = num_micro_batches(parallel.model_copy(update={"pp": sizes.pp}))
    parts = sizes.dp * micro_batches
    if global_batch_size % parts:
        return (
            f"data.global_batch_size = {global_batch_size}: {sizes.dp} data-parallel ranks x {micro_batches} "
            "micro-batches don't divide it"
        )
    return None


def all_mesh_shapes(world_size: int) -> Iterator[MeshShape]:
    """Every way to write the world as dp x mp x pp."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for mp in divisors:
        for pp in divisors:
            if world_size % (mp * pp) == 0:
                yield MeshShape(world_size // (mp * pp), mp, pp)


def nearest_mesh(
    parallel: ParallelConfig, wanted: MeshShape, world_size: int, global_batch_size: int, variant: Variant
) -> MeshShape | None:
    """Of the meshes that can be, the one whose mp and pp are nearest, by their ratios, to the wanted ones."""

    def distance(sizes: MeshShape) -> float:
        return abs(math.log(sizes.mp / wanted.mp)) + abs(math.log(sizes.pp / wanted.pp))

    can_be = [
        sizes
        for sizes in all_mesh_shapes(world_size)
        if why_invalid(parallel, sizes, world_size, global_batch_size, variant) is None
    ]
    return min(can_be, key=distance, default=None)


def _remedy(
    parallel: ParallelConfig, wanted: MeshShape, world_size: int, global_batch_size: int, variant: Variant
) -> str:
    near = nearest_mesh(parallel, wanted, world_size, global_batch_size, variant)
    if wanted.world != world_size and why_invalid(parallel, wanted, wanted.world, global_batch_size, variant) is None:
        start = f"start {wanted.world} (NPROC={wanted.world} on one machine)"
        return f"{start}, or take the nearest mesh of {world_size}: {near}" if near else start
    parts = wanted.dp * num_micro_batches(parallel)
    batch = max(parts, round(global_batch_size / parts) * parts)
    if wanted.world == world_size and why_invalid(parallel, wanted, world_size, batch, variant) is None:
        return f"data.global_batch_size={batch} would do" + (f", or the mesh {near}" if near else "")
    if near is None:
        others = _others(parallel, wanted, global_batch_size, variant)
        of_others = "; ".join(f"{sizes} of {sizes.world} processes" for sizes in others)
        none = f"no mesh of {world_size} processes can be"
        return f"{none}, but {of_others}" if others else f"{none}; change the batch or the model"
    return f"the nearest mesh that can be is {near}"


def _others(parallel: ParallelConfig, wanted: MeshShape, global_batch_size: int, variant: Variant) -> list[MeshShape]:
    """The three meshes nearest to the wanted one that other numbers of processes could be."""

    def distance(sizes: MeshShape) -> float:
        pairs = ((sizes.dp, wanted.dp), (sizes.mp, wanted.mp), (sizes.pp, wanted.pp))
        return sum(abs(math.log(size / other)) for size, other in pairs)

    tried = [
        MeshShape(dp, mp, pp)
        for dp in {wanted.dp, max(wanted.dp - 1, 1), wanted.dp + 1}
        for mp in range(1, 2 * wanted.mp + 1)
        for pp in range(1, 2 * wanted.pp + 1)
    ]
    can_be = [sizes for sizes in tried if why_invalid(parallel, sizes, sizes.world, global_batch_size, variant) is None]
    return sorted(can_be, key=distance)[:3]


def start_mesh(sizes: MeshShape, device: str) -> Mesh:
    """Joins the other processes, if there are any: NCCL on cards, gloo on CPUs. `sizes` are of the whole world."""
    rank, world_size = rank_and_world_size()
    device = choose_device(device)
    paddle.set_device(f"gpu:{dist.ParallelEnv().device_id}" if device == "gpu" else "cpu")
    os.environ.pop("POD_NAME", None)  # a launcher's; it would make DistModel start `fleet`, which isn't used
    if world_size > 1:
        if device == "cpu":
            os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
            gloo.install()
        with redirect_stderr(io.StringIO()):  # a table of the flags that runtime.py has set
            dist.init_parallel_env()
    device_id = paddle.device.cuda.current_device() if device == "gpu" else None
    return make_mesh(rank, sizes, device, device_id)


def make_mesh(rank: int, sizes: MeshShape, device: str, device_id: int | None = None) -> Mesh:
    """The mesh of these sizes, and Paddle told of it; connects nothing."""
    axes = {"pp": sizes.pp, "dp": sizes.dp, "mp": sizes.mp}
    kept = {axis: size for axis, size in axes.items() if size > 1 or axis == "dp"}
    ranks = np.arange(sizes.world).reshape(list(kept.values()))
    process_mesh = dist.ProcessMesh(ranks.tolist(), dim_names=list(kept))
    dist.auto_parallel.set_mesh(process_mesh)
    return Mesh(rank, sizes, device, device_id, process_mesh)


def seed_everything(seed: int) -> None:
    """Paddle's and NumPy's generators, for the fresh weights: the same ones on every rank."""
    paddle.seed(seed)
    np.random.seed(seed)


def device_name(mesh: Mesh) -> str:
    """The card's name as its driver says it, or 'cpu'."""
    return "cpu" if mesh.device == "cpu" else str(paddle.device.cuda.get_device_name(mesh.device_id))
