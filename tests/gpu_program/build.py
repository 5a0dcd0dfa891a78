"""Compile the program that a GPU would execute, for any rank of any mesh and precision, on a machine without a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, product
from typing import Any

import paddle
from helpers.small import SMALL
from paddle.distributed.auto_parallel.static.process_group import get_all_process_groups

from gpu_program.gpu_wheel import gpu_wheel
from vit_static.config.data_schema import DataConfig
from vit_static.config.distill_schema import DistillConfig, DistillKind
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import AmpConfig, Config, KernelsConfig, OptimConfig, ParallelConfig, TrainConfig
from vit_static.model.teacher import Normalization, Teacher
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import Mesh, MeshShape, make_mesh
from vit_static.plan.fake_world import fake_world
from vit_static.program.precision import Precision, choose_attention, uses_flash_attention
from vit_static.program.program import Program
from vit_static.program.verify import Expected

# 4 heads of 16 channels, which FlashAttention supports. One block, and more where they differ: see GpuCase.config.
MODEL = SMALL.model_copy(update={"width": 64, "num_heads": 4, "layer_scale_init": None, "depth": 1})
IMAGES_PER_RANK = 4  # per micro-batch


@dataclass(frozen=True)
class GpuCase:
    """A program to compile: mesh, precision and the settings that change it."""

    mesh: str = "single"  # a key of MESHES
    precision: str = "O2 bfloat16"
    optimizer: str = "adamw"
    num_micro_batches: int = 1
    recompute: str = "none"
    dropout: float = 0.0
    has_ema: bool = False
    freeze: str = "none"
    distills: DistillKind | None = None  # with a teacher of another width and size of images
    parallel: dict[str, Any] = field(default_factory=dict, compare=False)  # other fields of ParallelConfig
    amp: dict[str, Any] = field(default_factory=dict, compare=False)  # fields of AmpConfig
    kernels: dict[str, Any] = field(default_factory=dict, compare=False)  # fields of KernelsConfig
    optim: dict[str, Any] = field(default_factory=dict, compare=False)  # other fields of OptimConfig
    model: ModelConfig = field(default=MODEL, compare=False)

    def __str__(self) -> str:
        options = {
            f"{self.num_micro_batches} micro-batches": self.num_micro_batches > 1,
            "recompute": self.recompute != "none",
            "dropout": self.dropout > 0.0,
            "EMA": self.has_ema,
            "frozen": self.freeze != "none",
            f"distilled, {self.distills}": self.distills is not None,
        }
        return ", ".join(
            [self.mesh, self.precision, self.optimizer, *(name for name, is_on in options.items() if is_on)]
        )

    @property
    def shape(self) -> MeshShape:
        return MESHES[self.mesh][0]

    def config(self) -> Config:
        """Return the run's config, with IMAGES_PER_RANK images per data-parallel rank and micro-batch.

        Every pipeline stage has a block, and a recomputed model has two, which are recomputed one after the other.
        """
        shape, sharding_stage = MESHES[self.mesh]
        level, dtype = self.precision.split()
        num_micro_batches = max(self.num_micro_batches, shape.pp)
        model = self.model
        if model.depth is not None:
            depth = max(model.depth, shape.pp, 1 if self.recompute == "none" else 2)
            model = model.model_copy(update={"depth": depth})
        if self.dropout:
            model = model.model_copy(update={"dropout": self.dropout, "drop_path_rate": self.dropout})
        if self.distills == "token":
            model = model.model_copy(update={"distillation_token": True, "representation_size": None})
        return Config(
            name="gpu",
            seed=3,
            model=model,
            distill=DistillConfig(teacher="t", kind=self.distills) if self.distills else DistillConfig(),
            data=DataConfig(global_batch_size=IMAGES_PER_RANK * shape.dp * num_micro_batches),
            train=TrainConfig(freeze=self.freeze),
            optim=OptimConfig(
                **{
                    "name": self.optimizer,
                    "weight_decay": 0.1,
                    "clip_norm": 1.0,
                    "ema_decay": 0.99 if self.has_ema else 0.0,
                    **self.optim,
                }
            ),
            amp=AmpConfig(level=level, dtype="auto" if level == "O0" else dtype, **self.amp),
            parallel=ParallelConfig(
                **{
                    "dp": shape.dp,
                    "mp": shape.mp,
                    "pp": shape.pp,
                    "sharding_stage": sharding_stage,
                    "grad_accum_steps": num_micro_batches,
                    "recompute": self.recompute,
                    **self.parallel,
                }
            ),
            kernels=KernelsConfig(**self.kernels),
        )


# Mesh shape and ZeRO stage by name.
_COVERED_MESHES = {
    "single": (MeshShape(1, 1, 1), 0),
    "dp 8": (MeshShape(8, 1, 1), 0),
    "dp 4 x mp 2": (MeshShape(4, 2, 1), 0),
    "pp 2 x mp 2 x dp 2": (MeshShape(2, 2, 2), 0),
    "ZeRO 1": (MeshShape(4, 1, 1), 1),
    "ZeRO 2": (MeshShape(4, 1, 1), 2),
    "ZeRO 3": (MeshShape(4, 1, 1), 3),
}
# Smaller ones for test_execution.py.
_EXECUTED_MESHES = {
    "dp 2": (MeshShape(2, 1, 1), 0),
    "dp 2 x mp 2": (MeshShape(2, 2, 1), 0),
    "pp 2": (MeshShape(1, 1, 2), 0),
    "pp 2 x dp 2": (MeshShape(2, 1, 2), 0),
    "dp 2, ZeRO 1": (MeshShape(2, 1, 1), 1),
    "dp 2, ZeRO 2": (MeshShape(2, 1, 1), 2),
    "dp 2, ZeRO 3": (MeshShape(2, 1, 1), 3),
}
MESHES = {**_COVERED_MESHES, **_EXECUTED_MESHES}
OPTIONS: dict[str, list[Any]] = {
    "mesh": list(_COVERED_MESHES),
    "precision": ["O2 float16", "O2 bfloat16", "O1 bfloat16", "O0 float32"],
    "optimizer": ["adamw", "sgd", "lamb", "lion", "adafactor"],
    "num_micro_batches": [1, 2],
    "recompute": ["none", "block"],
    "dropout": [0.0, 0.1],
    "has_ema": [False, True],
    "freeze": ["none", "backbone"],
}


@cache
def covering_cases() -> list[GpuCase]:
    """Return cases in which every two values of different options occur together.

    Greedy: of all combinations, take the one with the most pairs that haven't occurred, until all have.
    """
    names = list(OPTIONS)
    numbers: defaultdict[Any, int] = defaultdict(lambda: len(numbers))  # of each pair, as a bit
    pairs = {
        values: sum(1 << numbers[pair] for pair in combinations(zip(names, values, strict=True), 2))
        for values in product(*OPTIONS.values())
    }
    missing = (1 << len(numbers)) - 1
    cases = []
    while missing:
        best = max(pairs, key=lambda values: (pairs[values] & missing).bit_count())
        missing &= ~pairs[best]
        cases.append(GpuCase(**dict(zip(names, best, strict=True))))
    return cases


@dataclass(frozen=True)
class Compiled:
    """A rank's compiled programs."""

    case: GpuCase
    rank: int
    program: Program
    modes: dict[str, Any]  # the compiled program by mode: train, eval
    rings: dict[int, tuple[int, ...]]  # ranks by ring_id, the identifier of a process group in a collective
    parameter_names: dict[str, str]  # from the layers' names to the model's: linear_3.w_0 to blocks.0.attn.q.weight


def compile_rank(case: GpuCase, rank: int = 0, modes: tuple[str, ...] = ("train", "eval")) -> Compiled:
    """Compile the programs of one rank of a run that trains. Every rank's parameters have the same names."""
    with building(case.shape, rank):
        program = build_program(case, rank)
        return _compile(case, rank, program, modes)


def compile_eval_only(case: GpuCase, rank: int = 0) -> Compiled:
    """Compile the program of the verb `eval`, which has no optimizer."""
    with building(case.shape, rank):
        config, precision = case.config(), _precision(case)
        mesh = make_mesh(rank, case.shape, "gpu")
        batch_size = IMAGES_PER_RANK * case.shape.dp
        program = Program.for_eval(config, _model(config, precision), mesh, precision, eval_batch_size=batch_size)
        return _compile(case, rank, program, ("eval",))


@contextmanager
def building(shape: MeshShape, rank: int) -> Iterator[None]:
    """Compile as this rank of a world of GPUs within the context."""
    with gpu_wheel(), fake_world(rank, shape.world_size), paddle.utils.unique_name.guard():
        yield


def build_program(case: GpuCase, rank: int, **arguments: Any) -> Program:
    """Return the run's program, to be compiled within `building`. `arguments`: others of Program.for_training."""
    config = case.config()
    mesh = make_mesh(rank, case.shape, "gpu")
    paddle.seed(config.seed)
    model = _model(config, _precision(case))
    return Program.for_training(
        config,
        model,
        mesh,
        _precision(case),
        teacher=_teacher(config, _precision(case)) if case.distills else None,
        learning_rate=lambda step: 1e-3,
        eval_batch_size=IMAGES_PER_RANK * case.shape.dp,
        **arguments,
    )


def _compile(case: GpuCase, rank: int, program: Program, modes: tuple[str, ...]) -> Compiled:
    from vit_static.program.engine import structured_names

    compiled = {mode: program.compiled(mode) for mode in modes}
    rings = {group.id: tuple(group.ranks) for group in get_all_process_groups()}
    return Compiled(case, rank, program, compiled, rings, structured_names(program._program))


def expected_of(compiled: Compiled, mode: str) -> Expected:
    """Return the properties by which a compiled program is checked."""
    case, config, precision = compiled.case, compiled.case.config(), _precision(compiled.case)
    mesh = Mesh(compiled.rank, case.shape, "gpu", None, None)
    return Expected(
        precision,
        is_training=mode == "train",
        dp_ranks=mesh.dp_ranks,
        uses_flash_attention=uses_flash_attention(config.model, precision, config.parallel, config.kernels, "gpu"),
        reduce_dtype=config.parallel.reduce_dtype,
    )


def _teacher(config: Config, precision: Precision) -> Teacher:
    """Return a teacher that differs from the model in width, size of images, pooling and normalization."""
    changed = {"width": 128, "num_heads": 8, "image_size": (16, 20), "pool": "gap", "distillation_token": False}
    model = config.model.model_copy(update=changed)
    returns_features = config.distill.kind == "features"
    half, other = Normalization([0.5] * 3, [0.5] * 3), Normalization([0.4] * 3, [0.2] * 3)
    network = _model(config.model_copy(update={"model": model}), precision)
    return Teacher(network, other, half, [config.model.image_size], returns_features=returns_features)


def _model(config: Config, precision: Precision) -> VisionTransformer:
    attention = choose_attention(config.model, precision, config.parallel, config.kernels, "gpu")
    return VisionTransformer(config.model, attention)


def _precision(case: GpuCase) -> Precision:
    level, dtype = case.precision.split()
    return Precision(level, dtype)
