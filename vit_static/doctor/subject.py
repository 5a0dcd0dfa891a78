"""The config that the doctor checks, with what follows from it on this device and mesh."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_static.common.io import write_json
from vit_static.config.schema import Config
from vit_static.doctor.gpus import Gpu, visible_gpus
from vit_static.model.draws import at_size
from vit_static.model.variants import largest_train_size, shape_of, step_flops, variant_of

if TYPE_CHECKING:
    from vit_static.parallel.mesh import Mesh
    from vit_static.weights.teacher import TeacherSource

_JOB_FILE = "job.json"
NUM_BLOCKS = 2  # of the model in checks that train
# A CPU computes at most this many operations per step and rank in checks that train, so that they end in seconds.
_MAX_CPU_STEP_FLOPS = 1e10


@dataclass(frozen=True)
class Job:
    """Work of the doctor's processes, in a file that all ranks read."""

    checks: tuple[str, ...]  # names, in order
    failed: tuple[str, ...]  # names of checks that have failed so far
    world_size: int  # of the run: all ranks on all nodes
    num_local: int  # ranks on this machine

    def write(self, folder: Path) -> None:
        write_json(asdict(self), folder / _JOB_FILE)

    @classmethod
    def read(cls, folder: Path) -> Job:
        values = json.loads((folder / _JOB_FILE).read_text(encoding="utf-8"))
        return cls(tuple(values["checks"]), tuple(values["failed"]), values["world_size"], values["num_local"])


class Subject:
    """The config under test. What takes time is computed when a check first asks for it."""

    def __init__(self, config: Config, job: Job) -> None:
        """Raise ConfigError for a device, mesh or precision that this machine doesn't support."""
        from vit_static.parallel.mesh import choose_device, resolve_mesh
        from vit_static.program.precision import choose_precision
        from vit_static.weights.teacher import find_teacher, require_mesh

        self.config, self.job = config, job
        self.variant = variant_of(config.model)
        self.device = choose_device(config.device)
        self.mesh_shape = resolve_mesh(config.parallel, job.world_size, config.data.global_batch_size, self.variant)
        self.image_size = largest_train_size(config.model, config.train)
        self.teacher = find_teacher(config, needs_weights=False)
        require_mesh(self.teacher, config.parallel, self.mesh_shape, config.data.global_batch_size)
        self.precision = choose_precision(config.amp, self.device, config.kernels, config.parallel)
        self.is_connected = False
        self.programs: dict[str, Any] = {}  # of steps.step_program

    @cached_property
    def gpus(self) -> list[Gpu]:
        """The GPUs that are visible to this process."""
        return visible_gpus()

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of all ranks. The first use connects them, and all ranks must take part in it."""
        from vit_static.parallel.mesh import start_mesh

        mesh = start_mesh(self.mesh_shape, self.config.device, self.config.parallel.collective_timeout_s)
        self.is_connected = True
        return mesh

    @property
    def on_gpu(self) -> bool:
        return self.device == "gpu"

    @cached_property
    def device_id(self) -> int | None:
        """The index of this process's GPU; None on a CPU."""
        from paddle.distributed import ParallelEnv

        return int(ParallelEnv().device_id) if self.on_gpu else None

    @property
    def is_half(self) -> bool:
        """Whether products are computed in bfloat16 or float16."""
        return self.precision.level != "O0"

    @property
    def compute_dtype(self) -> str:
        """The dtype of the operands of products."""
        return self.precision.dtype if self.is_half else "float32"

    @property
    def head_dim(self) -> int:
        return self.variant.width // self.variant.num_heads

    @property
    def num_tokens(self) -> int:
        return shape_of(at_size(self.config.model, self.image_size)).num_tokens

    @property
    def num_blocks(self) -> int:
        """The number of blocks of the models in checks that train: one per pipeline stage at least."""
        return max(NUM_BLOCKS, self.config.parallel.pp)

    @cached_property
    def step_teacher(self) -> TeacherSource | None:
        """The teacher of the config with two blocks and random weights, of which no head starts at zero."""
        if self.teacher is None:
            return None
        model = self.teacher.model.model_copy(update={"depth": self.num_blocks, "head_init_std": 0.02})
        return replace(self.teacher, model=model)

    @cached_property
    def step_config(self) -> Config:
        """The config with two blocks and without dropout, whose masks differ between precisions and meshes.

        The head doesn't start at zero, so that the first step has gradients in every layer. A rank's batch is that of
        the run, on CPUs limited by _MAX_CPU_STEP_FLOPS.
        """
        from vit_static.parallel.mesh import num_micro_batches

        config = self.config
        model = config.model.model_copy(
            update={
                "depth": self.num_blocks,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "drop_path_rate": 0.0,
                "head_init_std": 0.02,
            }
        )
        num_parts = self.mesh_shape.dp * num_micro_batches(config.parallel)
        per_part = max(config.data.global_batch_size // num_parts, 1)
        if not self.on_gpu:
            teacher = None if self.step_teacher is None else self.step_teacher.model
            per_image = step_flops(at_size(model, self.image_size), teacher, config.lora)
            num_images = _MAX_CPU_STEP_FLOPS / per_image / num_micro_batches(config.parallel)
            per_part = min(per_part, max(2 * (int(num_images) // 2), 2))
        data = config.data.model_copy(update={"global_batch_size": per_part * num_parts})
        return config.model_copy(update={"model": model, "data": data})


def with_keys(config: Config, **keys: object) -> Config:
    """Return the config with other values of keys, named section__key."""
    sections: dict[str, dict[str, object]] = {}
    for name, value in keys.items():
        section, _, key = name.partition("__")
        sections.setdefault(section, {})[key] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=changed) for name, changed in sections.items()}
    )


def switches(*overrides: str) -> str:
    """Return the remedy that sets these keys."""
    return "set " + _listed([f"-o {override}" for override in overrides])


def _listed(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
