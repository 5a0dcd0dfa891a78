"""Dropout in the compiled program: masks that follow the data over any mesh, and that recomputation draws again.

Written for Paddle 3.3.1, behind whose public interface it reaches for the operators' attributes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F

from vit_static.parallel.dist_values import assign_to, persistable

_DROPOUT, _SEED_OF_DROPOUT = "vit_static_dropout", "vit_static_seed_of_dropout"  # attributes of operators


def placed_dropout(mesh: dist.ProcessMesh) -> Any:
    """F.dropout(x, p), its masks from the rank's one generator."""

    def dropout(x: Any, p: float, training: bool = True) -> Any:
        return F.dropout(_placed(x, mesh), p, training=True)

    return dropout


def _placed(x: Any, mesh: dist.ProcessMesh) -> Any:
    """A constant, which isn't placed yet, the same on all ranks of a stage."""
    return x if x.is_dist() else dist.shard_tensor(x, mesh, [dist.Replicate()] * mesh.ndim)


class SeededDropout:
    """Dropout whose masks follow the data: the same on ranks that hold the same activations, others on others.

    Each dropout of the program has a seed of its own, an element of a variable that is set before each step; so a
    block that is computed again draws its mask again. Micro-batches count up from it. (Paddle's dropout takes the next
    numbers of the rank's one generator: the halves of a split activation would get the same mask, and a recomputed
    block another than before, without an error.)

    The seeds are put in when the program is cut for this rank: Paddle's rule for how a dropout is split wants none.
    """

    def __init__(self, seed: int, rank: int, meshes: list[dist.ProcessMesh], stages: list[int]) -> None:
        """`meshes` are those of the pipeline's stages, `stages` that of each dropout."""
        self._seed, self._rank, self._meshes, self._stages = seed, rank, meshes, stages
        self._names: dict[int, tuple[str, str]] = {}  # of a stage's variables: the seeds, the micro-batches done
        self._split_axes: list[tuple[str, ...]] = [()] * len(stages)  # over which each dropout's activation is split

    def begin(self) -> None:
        """Called first of all in the forward, outside of all that is computed again."""
        for stage in set(self._stages):
            mesh = self._meshes[stage]
            whole = [dist.Replicate()] * mesh.ndim
            seeds = persistable("dropout_seeds", [len(self._stages)], "int32", mesh, whole)
            done = persistable("dropout_micro_batches", [1], "int32", mesh, whole)
            self._names[stage] = (seeds.name, done.name)
            current = seeds + done
            for index, stage_of_dropout in enumerate(self._stages):
                if stage_of_dropout == stage:
                    current[index : index + 1].get_defining_op().set_int_attr(_SEED_OF_DROPOUT, index)
            assign_to(done, done + 1)

    def function(self, index: int) -> Any:
        """F.dropout(x, p) for the `index`-th dropout."""

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
        """Sets the seeds for the step after `step` done ones: functions of the seed, the step, the dropout, and this
        rank's place along the axes over which the activation is split."""
        coordinates = dict(zip(*self._place(), strict=True))
        scope = paddle.static.global_scope()
        for stage, names in self._names.items():
            if self._rank not in self._meshes[stage].process_ids:
                continue
            seeds = np.array([self._seed_of(index, step, coordinates) for index in range(len(self._stages))], np.int32)
            for name, value in zip(names, (seeds, np.zeros(1, np.int32)), strict=True):
                scope.find_var(name).get_tensor().set(value, paddle.framework._current_expected_place_())

    def _seed_of(self, index: int, step: int, coordinates: dict[str, int]) -> int:
        place = [coordinates[axis] if axis in self._split_axes[index] else 0 for axis in ("dp", "mp")]
        drawn = np.random.SeedSequence([self._seed, step, index, *place]).generate_state(1)
        return int(drawn[0] % 2**30) + 1  # 0 would mean none, and micro-batches are added

    def _place(self) -> tuple[list[str], list[int]]:
        """The axes of a stage's mesh and this rank's place along them."""
        mesh = next(mesh for mesh in self._meshes if self._rank in mesh.process_ids)
        return mesh.dim_names, [int(np.argwhere(mesh.mesh == self._rank)[0][axis]) for axis in range(mesh.ndim)]


def seed_dropouts(program: Any) -> None:
    """Gives every marked dropout of a program its seed, those that are computed again too."""
    operations = list(program.global_block().ops)
    seeds = {op.attrs()[_SEED_OF_DROPOUT]: op.result(0) for op in operations if op.has_attr(_SEED_OF_DROPOUT)}
    for operation in operations:
        if operation.name() == "pd_op.dropout" and operation.has_attr(_DROPOUT):
            operation.operand(1).set_source(seeds[operation.attrs()[_DROPOUT]])
