"""The training step that the benchmarks repeat, and `bench step`, which measures it on any number of processes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import paddle

from vit_static.bench.peers import protocol
from vit_static.common.hardware import peak_flops
from vit_static.common.text import print_text
from vit_static.config.schema import Config
from vit_static.data.mixup import Mixup
from vit_static.model.draws import at_size
from vit_static.model.lora import add_adapters
from vit_static.model.variants import largest_train_size, step_flops, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.parallel import gloo
from vit_static.parallel.mesh import (
    Mesh,
    device_name,
    gpu_capability,
    rank_and_world_size,
    resolve_mesh,
    seed_everything,
    start_mesh,
)
from vit_static.program.distillation import build_teacher
from vit_static.program.precision import Precision, choose_attention, choose_precision
from vit_static.program.program import Program
from vit_static.weights.teacher import find_teacher, require_mesh

_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Speed:
    """Speed of the training step on one mesh. None means unknown."""

    images_per_s: float  # of all ranks together
    collective_share: float | None  # of the time that rank 0 spends in collectives, 0-1; known only on CPUs
    mfu: float | None = None  # share of the peak rate of the GPUs, 0-1
    peak_bytes: int | None = None  # peak memory of a GPU
    image_size: tuple[int, int] | None = None  # height and width: the largest of train.image_sizes


class MeasuredStep:
    """The training program of a config on this rank, compiled and warmed up; a call runs a step and waits for it.

    The images are always the same noise, or with `real_data` those of data.root. With train.image_sizes they have the
    largest size.
    """

    def __init__(self, config: Config, real_data: bool = False) -> None:
        self.config = config
        _, world_size = rank_and_world_size()
        variant = variant_of(config.model)
        self.batch_size = config.data.global_batch_size
        self.image_size = largest_train_size(config.model, config.train)
        shape = resolve_mesh(config.parallel, world_size, self.batch_size, variant)
        teacher = find_teacher(config)
        require_mesh(teacher, config.parallel, shape, self.batch_size)
        self.flops_per_image = step_flops(
            at_size(config.model, self.image_size), None if teacher is None else teacher.model, config.lora
        )
        self.mesh = start_mesh(shape, config.device, config.parallel.collective_timeout_s, config.kernels.deterministic)
        self.precision = choose_precision(
            config.amp,
            self.mesh.device,
            config.kernels,
            config.parallel,
            gpu_capability=gpu_capability(self.mesh),
        )
        seed_everything(config.seed)
        attention = choose_attention(config.model, self.precision, config.parallel, config.kernels, self.mesh.device)
        model = VisionTransformer(config.model, attention)
        add_adapters(model, config.lora)
        self.program = Program.for_training(
            config,
            model,
            self.mesh,
            self.precision,
            learning_rate=lambda step: config.optim.lr,
            eval_batch_size=self.mesh.dp_size,
            teacher=None if teacher is None else build_teacher(teacher, config, self.precision, self.mesh.device),
            train_image_size=self.image_size,
        )
        self._mixup = Mixup(config.augment, config.model.num_classes, config.seed)
        self.loader = make_train_loader(config, self.mesh) if real_data else None
        rng = np.random.default_rng(self.mesh.dp_rank)
        local_batch_size = self.batch_size // self.mesh.dp_size
        height, width = self.image_size
        noise = rng.standard_normal((local_batch_size, config.model.num_channels, height, width)).astype(np.float32)
        self._images = paddle.to_tensor(noise)
        self._labels = paddle.to_tensor(rng.integers(0, config.model.num_classes, local_batch_size))
        self._num_steps = 0
        for _ in range(_WARM_UP_STEPS):
            self()

    def __call__(self) -> int:
        """Run a step; return its number of images over all ranks."""
        batch = (self._images, self._labels) if self.loader is None else next(self.loader)
        loss = self.program.train_step(*self._mixup(batch, self._num_steps), self._num_steps)
        self.program.loss_value(loss)
        self._num_steps += 1
        return self.batch_size


def make_train_loader(config: Config, mesh: Mesh) -> Any:
    """Return the TrainLoader of this rank, at the first step."""
    from vit_static.data.loader import TrainLoader  # imports DALI, whose memory must not count for a step on noise
    from vit_static.data.open_set import open_set

    return TrainLoader(
        open_set(config.data, "train", config.model.num_classes),
        largest_train_size(config.model, config.train),
        config.data,
        config.augment,
        seed=config.seed,
        start_step=0,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        device_id=mesh.device_id,
    )


def serve(config: Config) -> None:
    """Repeat the training step, as a worker of the harness."""
    protocol.serve(MeasuredStep(config))


def run(config: Config, seconds: float, real_data: bool) -> None:
    """Measure the step for `seconds` on all ranks; rank 0 prints the speed as a line of JSON."""
    step = MeasuredStep(config, real_data)
    mesh = step.mesh
    mesh.barrier()
    gloo.seconds_spent = 0.0
    started, num_images, is_over = time.perf_counter(), 0, False
    while not is_over:
        num_images += step()
        is_over = mesh.any_rank(time.perf_counter() - started > seconds)
    elapsed = time.perf_counter() - started
    if mesh.rank == 0:
        print_text(json.dumps(asdict(_speed(step, num_images / elapsed, elapsed))), flush=True)


def _speed(step: MeasuredStep, images_per_s: float, elapsed: float) -> Speed:
    if step.mesh.device == "cpu":
        return Speed(images_per_s, gloo.seconds_spent / elapsed, image_size=step.image_size)
    mfu = model_flops_utilization(step.flops_per_image, step.mesh, step.precision, images_per_s)
    return Speed(images_per_s, None, mfu, paddle.device.cuda.max_memory_allocated(), step.image_size)


def model_flops_utilization(
    flops_per_image: int, mesh: Mesh, precision: Precision, images_per_s: float
) -> float | None:
    """Return the share of the GPUs' peak rate that training uses at this speed of all ranks together, 0-1.

    `flops_per_image`: of a training step, without recomputation (PaLM, arXiv 2204.02311, appendix B). None on a CPU,
    and for a GPU whose peak rate isn't known.
    """
    peak = peak_flops(device_name(mesh), precision.dtype)
    flops_per_s = images_per_s * flops_per_image / mesh.world_size
    return None if peak is None else flops_per_s / peak
