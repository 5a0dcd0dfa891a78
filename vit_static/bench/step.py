"""The run's training step on images of noise: what the benchmarks repeat; `bench step` measures it by itself."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import paddle

from vit_static.bench.peers import protocol
from vit_static.common.hardware import peak_flops
from vit_static.config.schema import Config
from vit_static.data.mixup import Mixup
from vit_static.model import flops
from vit_static.model.variants import shape_of, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.parallel import gloo
from vit_static.parallel.mesh import Mesh, device_name, rank_and_world_size, resolve_mesh, seed_everything, start_mesh
from vit_static.program.precision import choose_attention, choose_precision
from vit_static.program.program import Program

_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Speed:
    """Of one layout: images a second over all ranks; the share of the time that rank 0 spent in collectives, where it
    can be told (on CPUs); of a card the share of its peak, where that is known, and the most memory in bytes."""

    images_per_s: float
    in_collectives: float | None
    mfu: float | None = None
    peak_bytes: int | None = None


class MeasuredStep:
    """A config's program on this rank, compiled and warm; each call is a step, waited for.

    On images of noise, always the same, or with `real_data` on those of data.root.
    """

    def __init__(self, config: Config, real_data: bool = False) -> None:
        self.config = config
        _, world_size = rank_and_world_size()
        variant = variant_of(config.model)
        self.batch_size = config.data.global_batch_size
        sizes = resolve_mesh(config.parallel, world_size, self.batch_size, variant)
        self.mesh = start_mesh(sizes, config.device)
        self.precision = choose_precision(config.amp, self.mesh.device, config.kernels, config.parallel)
        seed_everything(config.seed)
        attention = choose_attention(config.model, config.parallel, config.kernels, self.mesh.device)
        self.program = Program.for_training(
            config,
            VisionTransformer(config.model, attention),
            self.mesh,
            self.precision,
            learning_rate=lambda step: config.optim.lr,
            eval_batch_size=self.mesh.dp_size,
        )
        self._mixer = Mixup(config.augment, config.model.num_classes, config.seed)
        self.feed = feed_of(config, self.mesh) if real_data else None
        rng = np.random.default_rng(self.mesh.dp_rank)
        part = self.batch_size // self.mesh.dp_size
        self._images = paddle.to_tensor(rng.standard_normal((part, 3, *config.model.image_size)).astype(np.float32))
        self._labels = paddle.to_tensor(rng.integers(0, config.model.num_classes, part))
        self._num_done = 0
        for _ in range(_WARM_UP_STEPS):
            self()

    def __call__(self) -> int:
        """The number of images that the step took, over all ranks."""
        batch = (self._images, self._labels) if self.feed is None else next(self.feed)
        loss = self.program.train_step(*self._mixer(batch, self._num_done), self._num_done)
        self.program.loss_value(loss)
        self._num_done += 1
        return self.batch_size


def feed_of(config: Config, mesh: Mesh) -> Any:
    """Training's images, this rank's part of each batch."""
    from vit_static.data.loader import TrainLoader  # DALI, whose memory is no part of a step on noise
    from vit_static.data.open_set import open_set

    return TrainLoader(
        open_set(config.data, "train", config.model.num_classes),
        config.model.image_size,
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
    """`bench step`: rank 0 prints the speed as a line of JSON."""
    step = MeasuredStep(config, real_data)
    mesh = step.mesh
    mesh.barrier()
    gloo.seconds_spent = 0.0
    started, num_images, enough = time.perf_counter(), 0, False
    while not enough:
        num_images += step()
        enough = mesh.any_rank(time.perf_counter() - started > seconds)
    elapsed = time.perf_counter() - started
    if mesh.rank == 0:
        print(json.dumps(asdict(_speed(step, num_images / elapsed, elapsed))), flush=True)


def _speed(step: MeasuredStep, images_per_s: float, elapsed: float) -> Speed:
    if step.mesh.device == "cpu":
        return Speed(images_per_s, gloo.seconds_spent / elapsed)
    peak = peak_flops(device_name(step.mesh), step.precision.dtype)
    done = images_per_s * flops.train_flops(shape_of(step.config.model)) / step.mesh.world_size
    return Speed(images_per_s, None, None if peak is None else done / peak, paddle.device.cuda.max_memory_allocated())
