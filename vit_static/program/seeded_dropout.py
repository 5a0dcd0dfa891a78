"""Dropout in the compiled program: masks that follow the data over any mesh and that recomputation draws again.

Written for Paddle 3.3.1; uses the private attributes of its operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle import nn

from vit_static.model.layers import Dropout
from vit_static.parallel.dist_values import assign_to, create_variable, set_variable
from vit_static.parallel.mesh import Mesh

# Attributes of operators; the value is the dropout's index.
_DROPOUT, _DROPOUT_SEED = "vit_static_dropout", "vit_static_seed_of_dropout"


def place_dropouts(
    model: nn.Layer, mesh: Mesh, seed: int, stages: dict[str, int], seeded: bool
) -> SeededDropout | None:
    """Place every dropout of the model on its pipeline stage; with `seeded`, give each a seed of its own.

    Returns the seeds, or None where the model has no dropout or the rank's one generator draws the masks.
    """
    dropouts = [(layer, stages[name]) for name, layer in model.named_sublayers() if isinstance(layer, Dropout)]
    if not any(layer.p > 0.0 for layer, _ in dropouts):
        return None
    meshes = [mesh.stage(stage) for stage in range(mesh.shape.pp)]
    seeds = SeededDropout(seed, mesh.rank, meshes, [stage for _, stage in dropouts])
    for index, (layer, stage) in enumerate(dropouts):
        layer.function = seeds.function(index) if seeded else placed_dropout(meshes[stage])
    return seeds if seeded else None


def placed_dropout(mesh: dist.ProcessMesh) -> Any:
    """Return F.dropout(x, p) on a mesh, with masks from the rank's one generator."""

    def dropout(x: Any, p: float, training: bool = True) -> Any:
        return F.dropout(_placed(x, mesh), p, training=True)

    return dropout


def _placed(x: Any, mesh: dist.ProcessMesh) -> Any:
    """Replicate a constant, which has no placement yet, on all ranks of a stage."""
    return x if x.is_dist() else dist.shard_tensor(x, mesh, [dist.Replicate()] * mesh.ndim)


class SeededDropout:
    """Dropout whose masks follow the data: equal on ranks that hold the same activations, different on others.

    Each dropout of the program has a seed of its own: an element of a variable that is set before each step, plus the
    number of completed micro-batches. So a recomputed block draws its mask again. (Paddle's dropout takes the next
    numbers of the rank's one generator. Without an error, both parts of a split activation would get the same mask,
    and a recomputed block another mask than before.)

    The seeds are connected when the program has been cut for this rank (`seed_dropouts`): Paddle's rule for how a
    dropout is sharded accepts none.
    """

    def __init__(self, seed: int, rank: int, meshes: list[dist.ProcessMesh], stages: list[int]) -> None:
        """`meshes`: of each pipeline stage. `stages`: of each dropout."""
        self._seed, self._rank, self._meshes, self._stages = seed, rank, meshes, stages
        # By stage the names of its variables: the seeds, the number of completed micro-batches.
        self._names: dict[int, tuple[str, str]] = {}
        self._split_axes: list[tuple[str, ...]] = [()] * len(stages)  # mesh axes that split each dropout's activation

    def create_seeds(self) -> None:
        """Create the seeds. Call it first in the forward, outside of everything that is recomputed."""
        for stage in set(self._stages):
            mesh = self._meshes[stage]
            replicated = [dist.Replicate()] * mesh.ndim
            seeds = create_variable("dropout_seeds", [len(self._stages)], "int32", mesh, replicated)
            num_done = create_variable("dropout_micro_batches", [1], "int32", mesh, replicated)
            self._names[stage] = (seeds.name, num_done.name)
            current = seeds + num_done
            for index, dropout_stage in enumerate(self._stages):
                if dropout_stage == stage:
                    current[index : index + 1].get_defining_op().set_int_attr(_DROPOUT_SEED, index)
            assign_to(num_done, num_done + 1)

    def function(self, index: int) -> Any:
        """Return F.dropout(x, p) for the dropout `index`."""

        def dropout(x: Any, p: float, training: bool = True) -> Any:
            mesh = self._meshes[self._stages[index]]
            x = _placed(x, mesh)
            self._split_axes[index] = tuple(
                axis for axis, placement in zip(mesh.dim_names, x.placements, strict=True) if placement.is_shard()
            )
            out = F.dropout(x, p, training=True)
            out.get_defining_op().set_int_attr(_DROPOUT, index)
            return out

        return dropout

    def set_step(self, step: int) -> None:
        """Set the seeds for the step after `step` completed ones.

        They are functions of the run's seed, the step, the dropout, and this rank's coordinates along the axes that
        split the activation.
        """
        coordinates = self._coordinates()
        for stage, names in self._names.items():
            if self._rank not in self._meshes[stage].process_ids:
                continue
            seeds = np.array([self._seed_at(index, step, coordinates) for index in range(len(self._stages))], np.int32)
            for name, value in zip(names, (seeds, np.zeros(1, np.int32)), strict=True):
                set_variable(name, value)

    def _seed_at(self, index: int, step: int, coordinates: dict[str, int]) -> int:
        place = [coordinates[axis] if axis in self._split_axes[index] else 0 for axis in ("dp", "mp")]
        seed = int(np.random.SeedSequence([self._seed, step, index, *place]).generate_state(1)[0])
        return seed % 2**30 + 1  # Paddle takes 0 for no seed; micro-batches are added

    def _coordinates(self) -> dict[str, int]:
        """Return this rank's coordinates in its stage's mesh, by axis."""
        mesh = next(mesh for mesh in self._meshes if self._rank in mesh.process_ids)
        coordinates = np.argwhere(mesh.mesh == self._rank)[0]
        return {axis: int(coordinates[index]) for index, axis in enumerate(mesh.dim_names)}


def seed_dropouts(program: Any) -> None:
    """Connect every marked dropout of a program to its seed, including recomputed dropouts."""
    operations = list(program.global_block().ops)
    seeds = {op.attrs()[_DROPOUT_SEED]: op.result(0) for op in operations if op.has_attr(_DROPOUT_SEED)}
    for operation in operations:
        if operation.name() == "pd_op.dropout" and operation.has_attr(_DROPOUT):
            operation.operand(1).set_source(seeds[operation.attrs()[_DROPOUT]])
