"""Patch dropout and changed coordinates in the compiled program: the same for an image on any mesh and after a resume.

Before each step the choices (model/draws.py) are computed on the host from the seed, the step and the image's place in
the global batch, and copied to variables of the program. Each pipeline stage has variables of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from vit_static.config.model_schema import ModelConfig
from vit_static.data.sampler import coordinate_generator, patch_draws
from vit_static.model.draws import (
    NUM_BOX_NUMBERS,
    Draw,
    ImageSize,
    at_size,
    coordinate_box,
    kept_tokens,
    uses_box,
    uses_patch_dropout,
)
from vit_static.model.variants import grid_of, num_kept_patches
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.dist_values import assign_to, create_variable, set_variable
from vit_static.parallel.mesh import Mesh
from vit_static.parallel.sharding import batch_placements


def place_draws(
    model: VisionTransformer, mesh: Mesh, seed: int, stages: dict[str, int], batch_size: int, num_micro_batches: int
) -> SeededDraws | None:
    """Let a model take its draws from variables; None if it has none.

    `stages`: of each layer, by name. `batch_size` is global.
    """
    if not model.has_draws:
        return None
    of_blocks = [stages[f"blocks.{index}"] for index in range(len(model.blocks))]
    draws = SeededDraws(model.config, seed, mesh, of_blocks, batch_size, num_micro_batches)
    model.draws = draws.function
    return draws


class SeededDraws:
    """The draws of a model's training steps, as variables of its program."""

    def __init__(
        self, model: ModelConfig, seed: int, mesh: Mesh, stages: list[int], batch_size: int, num_micro_batches: int
    ) -> None:
        """`stages`: of each block."""
        self._model, self._seed, self._mesh, self._stages = model, seed, mesh, stages
        self._batch_size, self._num_micro_batches = batch_size, num_micro_batches
        # By stage the names of its variables: the tokens, the number of completed micro-batches, the box.
        self._names: dict[int, dict[str, str]] = {}

    def function(self, num_images: int, image_size: ImageSize) -> list[Draw]:
        """Create the variables, and return the draw of each block. `set_step` sets them for images of this size."""
        self._model = at_size(self._model, image_size)
        draws = {stage: self._create(stage) for stage in sorted(set(self._stages))}
        return [draws[stage] for stage in self._stages]

    def _create(self, stage: int) -> Draw:
        mesh, names = self._mesh.stage(stage), self._names.setdefault(stage, {})
        tokens: Any = None
        box: Any = None
        if uses_box(self._model):
            box = create_variable("coordinate_box", [2, 2], "float32", mesh, [dist.Replicate()] * mesh.ndim)
            names["box"] = box.name
        if uses_patch_dropout(self._model):
            num_tokens = self._model.num_prefix_tokens + num_kept_patches(self._model)
            # The first axis is that of the images, which dp splits.
            shape = [self._batch_size // self._num_micro_batches, self._num_micro_batches, num_tokens]
            is_split = self._mesh.dp_size > 1  # one rank's batch loses its placement on the way to the patches
            placements = batch_placements(self._mesh) if is_split else [dist.Replicate()] * mesh.ndim
            tokens = create_variable("kept_tokens", shape, "int32", mesh, placements)
            names["tokens"] = tokens.name
            tokens = tokens[:, 0] if self._num_micro_batches == 1 else self._of_micro_batch(tokens, mesh, names)
        return Draw(tokens, box)

    def _of_micro_batch(self, tokens: Any, mesh: dist.ProcessMesh, names: dict[str, str]) -> Any:
        """Select the tokens of the current micro-batch, [B, N], and count it."""
        replicated = [dist.Replicate()] * mesh.ndim
        num_done = create_variable("draws_micro_batches", [1], "int32", mesh, replicated)
        names["num_done"] = num_done.name
        numbers = dist.shard_tensor(paddle.arange(self._num_micro_batches, dtype="int32"), mesh, replicated)
        is_current = (numbers == num_done).astype("int32")  # [micro-batches]
        selected = (tokens * is_current.unsqueeze(-1)).sum(axis=1).astype("int32")
        assign_to(num_done, num_done + 1)
        return selected

    def set_step(self, step: int) -> None:
        """Set the variables for the step after `step` completed ones."""
        values: dict[str, np.ndarray] = {"num_done": np.zeros(1, np.int32)}
        if uses_box(self._model):
            uniform = coordinate_generator(self._seed, step).random(NUM_BOX_NUMBERS)
            values["box"] = coordinate_box(self._model, uniform)
        if uses_patch_dropout(self._model):
            values["tokens"] = self._tokens(step)
        for stage, names in self._names.items():
            if self._mesh.rank in self._mesh.stage(stage).process_ids:
                for name, variable in names.items():
                    set_variable(variable, values[name])

    def _tokens(self, step: int) -> np.ndarray:
        """Return the tokens of this rank's images, [images of a micro-batch, micro-batches, N] int32."""
        rows, columns = grid_of(self._model)
        num_local = self._batch_size // self._mesh.dp_size
        start = self._mesh.dp_rank * num_local
        tokens = kept_tokens(self._model, patch_draws(self._seed, step, start, start + num_local, rows * columns))
        by_micro_batch = tokens.reshape(self._num_micro_batches, -1, tokens.shape[1])
        return np.ascontiguousarray(by_micro_batch.swapaxes(0, 1))
