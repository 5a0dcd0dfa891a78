"""Plans: the cost of a run on a cluster of GPUs, estimated without them.

The run's program is compiled for one rank of the mesh, and its operators are counted. It is compiled in float32, since
Paddle's CPU build has no half-precision operators; a value that the run's precision stores in two bytes counts two
(costs.CostModel). Times follow the roofline model: no operator is faster than the GPU's peak rate and memory bandwidth
allow, and no collective faster than a ring over its links (without reduction in the network). So images/s and MFU are
upper bounds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import paddle

from vit_static.common.errors import ConfigError
from vit_static.common.hardware import GPUS, GPUS_PER_NODE, INTERCONNECTS, RESERVED_BYTES
from vit_static.config.loader import load_config
from vit_static.config.schema import Config, ParallelConfig
from vit_static.model.attention import attention_by_matmul
from vit_static.model.draws import at_size
from vit_static.model.flops import Shape, forward_macs
from vit_static.model.lora import add_adapters, count_parameters
from vit_static.model.variants import check_image_sizes, largest_train_size, shape_of, step_flops, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.optim.schedule import Phase, phases
from vit_static.parallel.mesh import (
    Mesh,
    MeshShape,
    all_mesh_shapes,
    make_mesh,
    num_micro_batches,
    resolve_mesh,
    why_invalid,
)
from vit_static.plan.costs import Collective, CostModel, Costs, count_by_kind, program_costs, runs_per_step
from vit_static.plan.fake_world import fake_world
from vit_static.program.precision import Precision, choose_precision, newton_schulz_dtype, uses_flash_attention
from vit_static.program.program import Program
from vit_static.weights.teacher import TeacherSource, find_teacher, require_mesh, why_unsplittable

_MESH_KEYS = {
    "dp": "dp",
    "mp": "mp",
    "pp": "pp",
    "sharding": "sharding_stage",
    "accum": "grad_accum_steps",
    "recompute": "recompute",
}
_MAX_WORLD_SIZE = 2**16
_UNKNOWN_STEPS = 1_000_000  # of a run whose number of training images isn't known


@dataclass(frozen=True)
class Cluster:
    """The GPUs and the network of a plan."""

    device: str  # a name of hardware.GPUS
    interconnect: str  # a name of hardware.INTERCONNECTS
    gpus_per_node: int = GPUS_PER_NODE


@dataclass(frozen=True)
class Plan:
    """Estimates for one rank: bytes, seconds, floating-point operations."""

    mesh_shape: MeshShape
    sharding_stage: int
    recompute: str
    num_micro_batches: int
    rank: int
    costs: Costs
    num_in_flight: int  # micro-batches whose activations this rank holds at a time
    cluster: Cluster
    dtype: str
    global_batch_size: int
    model_flops: int  # per step on all ranks, in closed form; with the forward pass of a teacher
    teacher_flops: int = 0  # of these
    share_of_all_tokens: float = 1.0  # `model_flops`, of those with all tokens in the last block
    image_size: tuple[int, int] = (0, 0)  # height and width of the training images
    num_trained: int = 0  # parameters of the model on all ranks
    num_frozen: int = 0

    @property
    def activations(self) -> int:
        """Peak bytes of all micro-batches in flight."""
        return self.costs.activations_in_flight(self.num_in_flight)

    @property
    def memory(self) -> int:
        """Total peak bytes."""
        return self.costs.memory(self.num_in_flight)

    @property
    def fits(self) -> bool:
        return self.memory + RESERVED_BYTES <= GPUS[self.cluster.device].memory

    @property
    def peak_flops(self) -> float:
        """Of one GPU, in the precision's dtype."""
        return GPUS[self.cluster.device].peak_flops[self.dtype]

    @property
    def compute_seconds(self) -> float:
        """Lower bound per step: each operator's arithmetic or memory traffic, and the pipeline bubble."""
        device = GPUS[self.cluster.device]
        bubble = (self.num_micro_batches + self.mesh_shape.pp - 1) / self.num_micro_batches
        return sum(
            runs_per_step(op.role, self.num_micro_batches)
            * max(op.num_flops / self.peak_flops, op.num_bytes / device.memory_bandwidth)
            * (1.0 if op.role == "update" else bubble)
            for op in self.costs.operators
        )

    def bandwidth(self, collective: Collective) -> float:
        """Return the bytes per second that each rank of a collective can send.

        Within a node that is its link. Between nodes the group's ranks of a node share their network adapters, one
        per rank.
        """
        link, network = GPUS[self.cluster.device].link_bandwidth, INTERCONNECTS[self.cluster.interconnect]
        ranks_per_node = Counter(rank // self.cluster.gpus_per_node for rank in collective.ranks)
        if len(ranks_per_node) == 1:
            return link
        return network if collective.kind in ("send", "receive") else min(link, network * min(ranks_per_node.values()))

    def seconds_of(self, collective: Collective) -> float:
        """Return a lower bound of a collective's time per step."""
        num_runs = runs_per_step(collective.role, self.num_micro_batches)
        return num_runs * collective.bytes_on_the_wire() / self.bandwidth(collective)

    @property
    def communication_seconds(self) -> float:
        return sum(self.seconds_of(collective) for collective in self.costs.collectives)

    @property
    def step_seconds(self) -> float:
        """Lower bound: computation waits for the collectives of tensor parallelism and overlaps with all others."""
        exposed = sum(self.seconds_of(one) for one in self.costs.collectives if self._is_tensor_parallel(one))
        return max(self.compute_seconds + exposed, self.communication_seconds)

    def _is_tensor_parallel(self, collective: Collective) -> bool:
        is_adjacent = collective.ranks[1] - collective.ranks[0] == 1 if len(collective.ranks) > 1 else False
        return self.mesh_shape.mp > 1 and is_adjacent and len(collective.ranks) == self.mesh_shape.mp

    @property
    def images_per_s(self) -> float:
        return self.global_batch_size / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the model's operations as a share of all GPUs' peak, without recomputation."""
        return self.model_flops / self.step_seconds / (self.peak_flops * self.mesh_shape.world_size)

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        totals = count_by_kind(self.costs.collectives, self.num_micro_batches)
        return {
            "mesh": asdict(self.mesh_shape),
            "world_size": self.mesh_shape.world_size,
            "rank": self.rank,
            "sharding_stage": self.sharding_stage,
            "recompute": self.recompute,
            "micro_batches": self.num_micro_batches,
            "micro_batches_in_flight": self.num_in_flight,
            "global_batch_size": self.global_batch_size,
            "image_size": list(self.image_size),
            "dtype": self.dtype,
            **asdict(self.cluster),
            "bytes": {
                "parameters": self.costs.parameters,
                "teacher_parameters": self.costs.teacher,
                "gradients": self.costs.gradients,
                "optimizer_state": self.costs.optimizer_state,
                "activations_peak_estimate": self.activations,
                "total": self.memory,
                "reserved": int(RESERVED_BYTES),
                "device": int(GPUS[self.cluster.device].memory),
            },
            "parameters": {"trained": self.num_trained, "frozen": self.num_frozen},
            "fits": self.fits,
            "collectives": [
                {"kind": kind, "role": role, "ranks": list(ranks), "count": count, "bytes": num_bytes}
                for (kind, role, ranks), (count, num_bytes) in totals.items()
            ],
            "flops": {
                "program": self.costs.flops(self.num_micro_batches),
                "model": self.model_flops,
                "teacher": self.teacher_flops,
                "share_of_all_tokens": self.share_of_all_tokens,
            },
            "seconds": {
                "compute": self.compute_seconds,
                "communication": self.communication_seconds,
                "step_at_best": self.step_seconds,
            },
            "images_per_s_at_most": self.images_per_s,
            "mfu_at_most": self.mfu,
        }


def with_mesh(parallel: ParallelConfig, text: str | None) -> ParallelConfig:
    """Return the config section `parallel`, changed by an option like ``--mesh dp=8,mp=2,sharding=1``.

    Raises ConfigError for an unknown key or an invalid value.
    """
    if text is None:
        return parallel
    overrides = []
    for part in text.split(","):
        key, separator, value = part.strip().partition("=")
        if not separator or key not in _MESH_KEYS:
            raise ConfigError(f"--mesh {text}: {part!r} is not one of {', '.join(f'{key}=N' for key in _MESH_KEYS)}")
        overrides.append(f"parallel.{_MESH_KEYS[key]}={value}")
    current = [f"parallel.{key}={value}" for key, value in parallel.model_dump(mode="json").items()]
    return load_config(None, [*current, *overrides]).parallel


@dataclass(frozen=True)
class PhasePlans:
    """The phases of a run on images of one size each (train.image_sizes), with the plans of their steps."""

    phases: list[tuple[Phase, Plan]]

    @property
    def largest(self) -> Plan:
        """The plan with most memory, of the largest images."""
        return max((plan for _, plan in self.phases), key=lambda plan: (plan.memory, math.prod(plan.image_size)))

    def mean(self, value_of: Callable[[Plan], float]) -> float:
        """Return the mean of a plan's value over the steps of the run."""
        total = sum((phase.end - phase.start) * value_of(plan) for phase, plan in self.phases)
        return total / sum(phase.end - phase.start for phase, _ in self.phases)

    @property
    def step_seconds(self) -> float:
        """The mean time of a step."""
        return self.mean(lambda plan: plan.step_seconds)


def resolve_world_size(parallel: ParallelConfig, world_size: int | None) -> int:
    """Return the number of ranks: `world_size` if given, otherwise what the mesh's own sizes make.

    Raises ConfigError for one that is too large.
    """
    if world_size is not None:
        if world_size > _MAX_WORLD_SIZE:
            raise ConfigError(f"--world {world_size}: set at most {_MAX_WORLD_SIZE}")
        return world_size
    ranks_per_replica = parallel.mp * parallel.pp
    return ranks_per_replica if parallel.dp == "auto" else parallel.dp * ranks_per_replica


def make_plan(
    config: Config,
    parallel: ParallelConfig,
    world_size: int,
    cluster: Cluster,
    rank: int = 0,
    teacher: TeacherSource | None = None,
    image_size: tuple[int, int] | None = None,
) -> Plan:
    """Compile the run's program for one rank and count its costs.

    `teacher`: of the config, if it has been found. `image_size`: of the training images; None: the largest of
    train.image_sizes, by default model.image_size. Raises ConfigError for an invalid mesh or rank, or a dtype that the
    GPU doesn't support.
    """
    teacher = teacher or find_teacher(config, needs_weights=False)
    variant, image_size = variant_of(config.model), image_size or largest_train_size(config.model, config.train)
    batch_size = config.data.global_batch_size
    mesh_shape = resolve_mesh(parallel, world_size, batch_size, variant)
    require_mesh(teacher, parallel, mesh_shape, batch_size)
    if not 0 <= rank < world_size:
        raise ConfigError(f"--rank {rank}: the mesh has ranks 0 to {world_size - 1}; set one of them")
    precision = choose_precision(config.amp, "gpu")
    if precision.dtype not in GPUS[cluster.device].peak_flops:
        raise ConfigError(
            f"--device {cluster.device}: doesn't support {precision.dtype}; set amp.dtype=float16, or amp.level=O0"
        )
    micro_batches = num_micro_batches(parallel)
    model, teacher_model = at_size(config.model, image_size), None if teacher is None else teacher.model
    model_flops = step_flops(model, teacher_model, config.lora)
    with fake_world(rank, world_size):
        mesh = make_mesh(rank, mesh_shape, "gpu")
        program, built = _compile(config, parallel, mesh, precision, teacher, image_size)
        costs: Costs = program.costs()
        num_trained, num_frozen = count_parameters(built)
    return Plan(
        mesh_shape=mesh_shape,
        sharding_stage=parallel.sharding_stage,
        recompute=str(parallel.recompute),
        num_micro_batches=micro_batches,
        rank=rank,
        costs=costs,
        num_in_flight=_num_in_flight(parallel, mesh, micro_batches),
        cluster=cluster,
        dtype=precision.dtype,
        global_batch_size=batch_size,
        model_flops=model_flops * batch_size,
        teacher_flops=0 if teacher is None else 2 * forward_macs(shape_of(teacher.model)) * batch_size,
        share_of_all_tokens=model_flops / step_flops(model, teacher_model, config.lora, counts_all_tokens=True),
        image_size=image_size,
        num_trained=num_trained,
        num_frozen=num_frozen,
    )


def make_phase_plans(
    config: Config, parallel: ParallelConfig, world_size: int, cluster: Cluster, rank: int, num_steps: int | None
) -> PhasePlans:
    """Return the plans of one rank for the sizes of the training images.

    `num_steps` of the run; if it is unknown, the phases have their shares of _UNKNOWN_STEPS.
    """
    teacher = find_teacher(config, needs_weights=False)
    return _by_phase(
        config, num_steps, lambda size: make_plan(config, parallel, world_size, cluster, rank, teacher, size)
    )


def _by_phase(config: Config, num_steps: int | None, plan_of: Callable[[tuple[int, int]], Plan]) -> PhasePlans:
    check_image_sizes(config.model, config.train.sizes, "train.image_sizes")
    run = phases(config.train, config.model.image_size, num_steps or _UNKNOWN_STEPS)
    plans = {size: plan_of(size) for size in dict.fromkeys(phase.image_size for phase in run)}
    return PhasePlans([(phase, plans[phase.image_size]) for phase in run])


def _compile(
    config: Config,
    parallel: ParallelConfig,
    mesh: Mesh,
    precision: Precision,
    teacher: TeacherSource | None,
    image_size: tuple[int, int],
) -> tuple[Program, VisionTransformer]:
    """Return the program of this rank for images of this size, and its model; its parameters take no memory."""
    models = [at_size(config.model, image_size), *([] if teacher is None else [teacher.model])]
    fused = [each for each in models if uses_flash_attention(each, precision, parallel, config.kernels, "gpu")]
    with paddle.LazyGuard():
        model = VisionTransformer(config.model)
        add_adapters(model, config.lora)
        teacher_model = None if teacher is None else teacher.build(config, attention_by_matmul)
    cost_model = CostModel(
        item_size=2 if precision.level == "O2" else 4,
        master_gradients=config.amp.master_grad,
        dp_ranks=mesh.dp_ranks,
        newton_schulz_size=2 if newton_schulz_dtype(precision, "gpu") == "bfloat16" else 4,
        fused_scores=tuple({scores for each in fused for scores in _attention_scores(shape_of(each))}),
    )
    program = Program.for_training(
        config.model_copy(update={"parallel": parallel}),
        model,
        mesh,
        Precision("O0", "float32"),
        learning_rate=lambda step: config.optim.lr,
        eval_batch_size=mesh.dp_size,
        count_costs=partial(program_costs, cost_model=cost_model),
        teacher=teacher_model,
        train_image_size=image_size,
    )
    return program, model


def _attention_scores(shape: Shape) -> set[tuple[int, int]]:
    """Return the numbers of queries and keys of a model's attentions."""
    num_tokens = shape.num_tokens
    pooling = {(1, num_tokens)} if shape.pools_by_attention else set()
    return {(num_tokens, num_tokens), (shape.num_last_tokens, num_tokens)} | pooling


def _num_in_flight(parallel: ParallelConfig, mesh: Mesh, micro_batches: int) -> int:
    """Return how many micro-batches' activations a rank holds at a time; more than one only in a pipeline."""
    if mesh.shape.pp == 1:
        return 1
    return micro_batches if parallel.pp_schedule == "FThenB" else min(micro_batches, mesh.shape.pp - mesh.pp_rank)


def search_meshes(
    config: Config, parallel: ParallelConfig, world_size: int, cluster: Cluster, num_steps: int | None = None
) -> list[PhasePlans]:
    """Return the plans of every valid mesh: those that fit first, then by the mean step time of a run of `num_steps`.

    Tensor parallelism stays within a node; with data parallelism ZeRO stages 0, 2 and 3 are tried. Raises ConfigError
    if no mesh is valid.
    """
    variant, teacher = variant_of(config.model), find_teacher(config, needs_weights=False)
    batch_size = config.data.global_batch_size
    plans = []
    for mesh_shape in all_mesh_shapes(world_size):
        if mesh_shape.mp > cluster.gpus_per_node:
            continue
        for stage in (0, 2, 3) if mesh_shape.dp > 1 else (0,):
            candidate = parallel.model_copy(
                update={"dp": mesh_shape.dp, "mp": mesh_shape.mp, "pp": mesh_shape.pp, "sharding_stage": stage}
            )
            reason = why_invalid(candidate, mesh_shape, world_size, batch_size, variant)
            if (reason or why_unsplittable(teacher, candidate, mesh_shape, batch_size)) is None:
                plan_of = partial(_plan_worst_stage, config, candidate, world_size, cluster, teacher)
                plans.append(_by_phase(config, num_steps, plan_of))
    if not plans:
        require_mesh(teacher, parallel, resolve_mesh(parallel, world_size, batch_size, variant), batch_size)
    return sorted(plans, key=lambda run: (not run.largest.fits, run.step_seconds, run.largest.memory))


def _plan_worst_stage(
    config: Config,
    parallel: ParallelConfig,
    world_size: int,
    cluster: Cluster,
    teacher: TeacherSource | None,
    image_size: tuple[int, int],
) -> Plan:
    """Return the plan of a pipeline's first or last stage (with the head): whichever doesn't fit or is slower."""
    ranks = [0] if parallel.pp == 1 else [0, world_size - 1]
    plans = [make_plan(config, parallel, world_size, cluster, rank, teacher, image_size) for rank in ranks]
    return max(plans, key=lambda plan: (not plan.fits, plan.step_seconds))
