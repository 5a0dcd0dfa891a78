"""What a run would cost on a mesh of cards that need not be there; the verb `plan`.

The run's own program is compiled for one rank of the mesh, and its operators are counted. It is compiled in float32,
since Paddle's CPU build has no operators of half precision; what the run's precision keeps in two bytes counts two
(costs.Counting). Times are a roofline's: no operator is quicker than the card's peak rate and its memory allow, no
collective than a ring over its links (without reduction in the network). So images/s and MFU are bounds from above.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import paddle

from vit_static.common.errors import ConfigError
from vit_static.common.hardware import GPUS, GPUS_PER_NODE, INTERCONNECTS, RESERVED_BYTES
from vit_static.config.loader import load_config
from vit_static.config.schema import Config, ParallelConfig
from vit_static.model import flops
from vit_static.model.variants import shape_of, variant_of
from vit_static.model.vit import VisionTransformer, flash_attention
from vit_static.parallel.mesh import (
    Mesh,
    MeshShape,
    all_mesh_shapes,
    make_mesh,
    num_micro_batches,
    resolve_mesh,
    why_invalid,
)
from vit_static.plan import costs
from vit_static.plan.costs import Collective, Costs
from vit_static.plan.fake_world import fake_world
from vit_static.program.precision import Precision, choose_attention, choose_precision
from vit_static.program.program import Program

_MESH_KEYS = {
    "dp": "dp",
    "mp": "mp",
    "pp": "pp",
    "sharding": "sharding_stage",
    "accum": "grad_accum_steps",
    "recompute": "recompute",
}
_LARGEST_WORLD = 2**16


@dataclass(frozen=True)
class Place:
    """What the mesh would stand on."""

    device: str  # a name of hardware.GPUS
    interconnect: str  # a name of hardware.INTERCONNECTS
    gpus_per_node: int = GPUS_PER_NODE


@dataclass(frozen=True)
class Plan:
    """Of one rank. Bytes, seconds, operations."""

    mesh_shape: MeshShape
    sharding_stage: int
    recompute: str
    num_micro_batches: int
    rank: int
    costs: Costs
    num_in_flight: int  # micro-batches that this rank holds at once
    place: Place
    dtype: str
    global_batch_size: int
    model_flops: int  # of the whole step, in closed form

    @property
    def activations(self) -> int:
        return self.costs.activations_at_once(self.num_in_flight)

    @property
    def memory(self) -> int:
        return self.costs.memory(self.num_in_flight)

    @property
    def fits(self) -> bool:
        return self.memory + RESERVED_BYTES <= GPUS[self.place.device].memory

    @property
    def peak_flops(self) -> float:
        """Of one GPU, in the precision's dtype."""
        return GPUS[self.place.device].peak_flops[self.dtype]

    @property
    def compute_seconds(self) -> float:
        """Of a step: every operator by the slower of its products and its memory; a pipeline's filling and draining."""
        device = GPUS[self.place.device]
        filling = (self.num_micro_batches + self.mesh_shape.pp - 1) / self.num_micro_batches
        return sum(
            costs.scale_costs(op.role, self.num_micro_batches)
            * max(op.num_flops / self.peak_flops, op.num_bytes / device.memory_bandwidth)
            * (1.0 if op.role == "update" else filling)
            for op in self.costs.operators
        )

    def link(self, collective: Collective) -> float:
        """Bytes a second that a rank's part of an exchange goes at: within a node, or through the network, where a
        group's ranks of a node have an adapter each, and share them."""
        within, between = GPUS[self.place.device].link_bandwidth, INTERCONNECTS[self.place.interconnect]
        on_nodes = Counter(rank // self.place.gpus_per_node for rank in collective.ranks)
        if len(on_nodes) == 1:
            return within
        return between if collective.kind in ("send", "receive") else min(within, between * min(on_nodes.values()))

    def seconds_of(self, collective: Collective) -> float:
        repeated = costs.scale_costs(collective.role, self.num_micro_batches)
        return repeated * collective.bytes_on_the_wire() / self.link(collective)

    @property
    def communication_seconds(self) -> float:
        return sum(self.seconds_of(collective) for collective in self.costs.collectives)

    @property
    def step_seconds(self) -> float:
        """At best: what tensor parallelism exchanges is waited for, all else is hidden behind the computing."""
        waited = sum(self.seconds_of(found) for found in self.costs.collectives if self._is_waited_for(found))
        return max(self.compute_seconds + waited, self.communication_seconds)

    def _is_waited_for(self, collective: Collective) -> bool:
        adjacent = collective.ranks[1] - collective.ranks[0] == 1 if len(collective.ranks) > 1 else False
        return self.mesh_shape.mp > 1 and adjacent and len(collective.ranks) == self.mesh_shape.mp

    @property
    def images_per_s(self) -> float:
        return self.global_batch_size / self.step_seconds

    @property
    def mfu(self) -> float:
        """The share of all cards' peak that the model's own operations are; what is computed again doesn't count."""
        return self.model_flops / self.step_seconds / (self.peak_flops * self.mesh_shape.world_size)

    def as_json(self) -> dict[str, Any]:
        found = self.costs
        table = costs.by_kind(found.collectives, self.num_micro_batches)
        return {
            "mesh": asdict(self.mesh_shape),
            "world_size": self.mesh_shape.world_size,
            "rank": self.rank,
            "sharding_stage": self.sharding_stage,
            "recompute": self.recompute,
            "micro_batches": self.num_micro_batches,
            "micro_batches_in_flight": self.num_in_flight,
            "global_batch_size": self.global_batch_size,
            "dtype": self.dtype,
            **asdict(self.place),
            "bytes": {
                "parameters": found.parameters,
                "gradients": found.gradients,
                "optimizer_state": found.optimizer_state,
                "activations_peak_estimate": self.activations,
                "total": self.memory,
                "reserved": int(RESERVED_BYTES),
                "device": int(GPUS[self.place.device].memory),
            },
            "fits": self.fits,
            "collectives": [
                {"kind": kind, "role": role, "ranks": list(ranks), "count": count, "bytes": num_bytes}
                for (kind, role, ranks), (count, num_bytes) in table.items()
            ],
            "flops": {"program": found.flops(self.num_micro_batches), "model": self.model_flops},
            "seconds": {
                "compute": self.compute_seconds,
                "communication": self.communication_seconds,
                "step_at_best": self.step_seconds,
            },
            "images_per_s_at_most": self.images_per_s,
            "mfu_at_most": self.mfu,
        }


def with_mesh(parallel: ParallelConfig, text: str | None) -> ParallelConfig:
    """The config's section with a ``--mesh dp=8,mp=2,sharding=1`` on top. Raises ConfigError for what it can't be."""
    if text is None:
        return parallel
    overrides = []
    for part in text.split(","):
        key, separator, value = part.strip().partition("=")
        if not separator or key not in _MESH_KEYS:
            raise ConfigError(f"--mesh {text}: {part!r} is not one of {', '.join(f'{key}=N' for key in _MESH_KEYS)}")
        overrides.append(f"parallel.{_MESH_KEYS[key]}={value}")
    given = [f"parallel.{key}={value}" for key, value in parallel.model_dump(mode="json").items()]
    return load_config(None, [*given, *overrides]).parallel


def _world(parallel: ParallelConfig, world_size: int | None) -> int:
    rest = parallel.mp * parallel.pp
    if world_size is not None:
        if world_size > _LARGEST_WORLD:
            raise ConfigError(f"--world {world_size}: at most {_LARGEST_WORLD}")
        return world_size
    return rest if parallel.dp == "auto" else parallel.dp * rest


def make_plan(config: Config, parallel: ParallelConfig, world_size: int, place: Place, rank: int = 0) -> Plan:
    """Compiles the run's program for one rank. Raises ConfigError for a mesh that can't be."""
    variant = variant_of(config.model)
    batch_size = config.data.global_batch_size
    mesh_shape = resolve_mesh(parallel, world_size, batch_size, variant)
    if not 0 <= rank < world_size:
        raise ConfigError(f"--rank {rank}: the mesh has the ranks 0 to {world_size - 1}")
    precision = choose_precision(config.amp, "gpu")
    if precision.dtype not in GPUS[place.device].peak_flops:
        raise ConfigError(f"--device {place.device}: has no {precision.dtype}; set amp.dtype=float16, or amp.level=O0")
    micro_batches = num_micro_batches(parallel)
    with fake_world(rank, world_size):
        mesh = make_mesh(rank, mesh_shape, "gpu")
        program = _compile(config, parallel, mesh, precision)
        found: Costs = program.costs()
    return Plan(
        mesh_shape=mesh_shape,
        sharding_stage=parallel.sharding_stage,
        recompute=str(parallel.recompute),
        num_micro_batches=micro_batches,
        rank=rank,
        costs=found,
        num_in_flight=_in_flight(parallel, mesh, micro_batches),
        place=place,
        dtype=precision.dtype,
        global_batch_size=batch_size,
        model_flops=flops.train_flops(shape_of(config.model)) * batch_size,
    )


def _compile(config: Config, parallel: ParallelConfig, mesh: Mesh, precision: Precision) -> Program:
    """The program of this rank, of parameters that take no memory."""
    attention = choose_attention(config.model, parallel, config.kernels, "gpu")
    is_fused = attention is flash_attention and precision.dtype != "float32"
    with paddle.LazyGuard():
        model = VisionTransformer(config.model, attention)
    counting = costs.CostModel(
        item_size=2 if precision.level == "O2" else 4,
        master_gradients=config.amp.master_grad,
        fused_tokens=shape_of(config.model).num_tokens if is_fused else None,
    )
    return Program.for_training(
        config.model_copy(update={"parallel": parallel}),
        model,
        mesh,
        Precision("O0", "float32"),
        learning_rate=lambda step: config.optim.lr,
        eval_batch_size=mesh.dp_size,
        count_costs=partial(costs.program_costs, counting=counting),
    )


def _in_flight(parallel: ParallelConfig, mesh: Mesh, micro_batches: int) -> int:
    """How many micro-batches' activations a rank holds at once: one, but in a pipeline those that are under way."""
    if mesh.shape.pp == 1:
        return 1
    return micro_batches if parallel.pp_schedule == "FThenB" else min(micro_batches, mesh.shape.pp - mesh.pp_rank)


def search_meshes(config: Config, parallel: ParallelConfig, world_size: int, place: Place) -> list[Plan]:
    """Plans of every mesh that can be, those that fit first, the quickest first.

    Tensor parallelism within a node; ZeRO in stages 0, 2 and 3 where there is data parallelism.
    Raises ConfigError where none can be.
    """
    variant = variant_of(config.model)
    plans = []
    for mesh_shape in all_mesh_shapes(world_size):
        if mesh_shape.mp > place.gpus_per_node:
            continue
        for stage in (0, 2, 3) if mesh_shape.dp > 1 else (0,):
            tried = parallel.model_copy(
                update={"dp": mesh_shape.dp, "mp": mesh_shape.mp, "pp": mesh_shape.pp, "sharding_stage": stage}
            )
            if why_invalid(tried, mesh_shape, world_size, config.data.global_batch_size, variant) is None:
                plans.append(_worst_stage(config, tried, world_size, place))
    if not plans:
        resolve_mesh(parallel, world_size, config.data.global_batch_size, variant)
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step_seconds, plan.memory))


def _worst_stage(config: Config, parallel: ParallelConfig, world_size: int, place: Place) -> Plan:
    """Of a pipeline's first and last stage, which has the head, the one that doesn't fit or is the slower."""
    ranks = [0] if parallel.pp == 1 else [0, world_size - 1]
    plans = [make_plan(config, parallel, world_size, place, rank) for rank in ranks]
    return max(plans, key=lambda plan: (not plan.fits, plan.step_seconds))
