"""How the model is split over the mesh: one table of what tensor parallelism splits, and the stages of a pipeline.

The model knows nothing of this. Splitting changes neither the names nor the shapes of its parameters: each becomes a
distributed tensor, of which a rank holds its part.
"""

from __future__ import annotations

import re
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.parallel.mesh import Mesh

_REPLICATED, _FIRST, _LAST = "whole", "first", "last"

# What tensor parallelism does with each parameter: which of its axes is split. q, k, v and fc1 are split by columns
# (a weight is [in, out]), so that a rank has whole heads and hidden channels; proj and fc2 by rows, whose partial sums
# one all-reduce adds up (Megatron-LM, arXiv 1909.08053). Every parameter matches exactly one line.
TP_SHARDING_RULES: dict[str, str] = {
    r"cls_token|reg_token|pos_embed": _REPLICATED,
    r"patch_embed\.proj\.(weight|bias)": _REPLICATED,
    r"blocks\.\d+\.norm[12]\.(weight|bias)": _REPLICATED,
    r"blocks\.\d+\.attn\.[qkv]\.(weight|bias)": _LAST,
    r"blocks\.\d+\.attn\.proj\.weight": _FIRST,
    r"blocks\.\d+\.attn\.proj\.bias": _REPLICATED,
    r"blocks\.\d+\.ls[12]\.gamma": _REPLICATED,
    r"blocks\.\d+\.mlp\.fc1\.(weight|bias)": _LAST,
    r"blocks\.\d+\.mlp\.fc2\.weight": _FIRST,
    r"blocks\.\d+\.mlp\.fc2\.bias": _REPLICATED,
    r"norm\.(weight|bias)": _REPLICATED,
    r"head0\.(weight|bias)": _REPLICATED,
    r"head\.(weight|bias)": _LAST,
}


def tp_axis(name: str, shape: list[int], mp: int) -> int | None:
    """The axis of a parameter that tensor parallelism splits, or None where every rank holds all of it.

    The head's columns, the classes, may not divide by the ranks; then it is whole.
    """
    if mp == 1:
        return None
    kinds = [kind for pattern, kind in TP_SHARDING_RULES.items() if re.fullmatch(pattern, name)]
    assert len(kinds) == 1, f"{name} matches {len(kinds)} lines of the table of placements"
    axis = {_REPLICATED: None, _FIRST: 0, _LAST: len(shape) - 1}[kinds[0]]
    if axis is not None and name.startswith("head.") and shape[axis] % mp:
        return None
    return axis


def zero_shard_axis(shape: list[int], mp_axis: int | None, mp: int, dp: int) -> int | None:
    """The axis along which ZeRO splits what belongs to a parameter: the first that divides, or None.

    (Paddle 3.3.1 pads an axis that doesn't divide, and fails in doing so.)
    """
    local = [size // mp if axis == mp_axis else size for axis, size in enumerate(shape)]
    return next((axis for axis, size in enumerate(local) if axis != mp_axis and size % dp == 0 and size > 1), None)


def stage_of_blocks(depth: int, pp: int) -> list[int]:
    """The pipeline stage of each block: as even as it goes, the first stages one more."""
    return [stage for stage in range(pp) for _ in range(depth // pp + (stage < depth % pp))]


def shard_model(model: nn.Layer, mesh: Mesh, sharding_stage: int) -> dict[str, int]:
    """Makes every parameter a distributed tensor, in place, and puts the hand-overs into the model's forward.

    Returns each layer's pipeline stage.
    """
    blocks = [layer for name, layer in model.named_sublayers() if re.fullmatch(r"blocks\.\d+", name)]
    stages = stage_of_blocks(len(blocks), mesh.shape.pp)
    stage_of_layers = {}
    for layer_name, layer in model.named_sublayers(include_self=True):
        stage = stage_of_layers[layer_name] = _stage_of(layer_name, stages)
        for short_name, parameter in list(layer._parameters.items()):
            if parameter is None:
                continue
            name = f"{layer_name}.{short_name}" if layer_name else short_name
            mp_axis = tp_axis(name, parameter.shape, mesh.shape.mp)
            dp_axis = (
                zero_shard_axis(parameter.shape, mp_axis, mesh.shape.mp, mesh.shape.dp) if sharding_stage == 3 else None
            )
            placements = _placements(mesh, mp_axis, dp_axis)
            setattr(layer, short_name, dist.shard_tensor(parameter, mesh.stage(stage), placements))
    for block, stage, following in zip(blocks, stages, [*stages[1:], *stages[-1:]], strict=True):
        if following != stage:
            block.register_forward_post_hook(_reshard_hook(mesh.stage(following), batch_placements(mesh)))
    if mesh.shape.mp > 1:
        # The logits of a split head, gathered once for all that reads them.
        model.head.register_forward_post_hook(_reshard_hook(mesh.last_stage, batch_placements(mesh)))
    return stage_of_layers


def batch_placements(mesh: Mesh) -> list[Any]:
    """Of what has the images along its first axis: split over dp."""
    return _placements(mesh, mp_axis=None, dp_axis=0)


def state_placements(mesh: Mesh, parameter: Any) -> list[Any]:
    """Of what ZeRO keeps for a parameter, a value of the program: its moments, its master copy, its gradient's sum."""
    axis_of = dict(zip(mesh.axes, parameter.placements, strict=True))
    if axis_of["dp"].is_shard():  # stage 3: the parameter itself is split
        return list(parameter.placements)
    mp = axis_of.get("mp")
    mp_axis = mp.get_dim() if mp is not None and mp.is_shard() else None
    return _placements(mesh, mp_axis, zero_shard_axis(parameter.shape, mp_axis, mesh.shape.mp, mesh.shape.dp))


def _stage_of(layer_name: str, stages_of_blocks: list[int]) -> int:
    """A block's own; before the blocks the first, after them the last."""
    block = re.match(r"blocks\.(\d+)", layer_name)
    if block:
        return stages_of_blocks[int(block[1])]
    return stages_of_blocks[-1] if stages_of_blocks and layer_name.startswith(("norm", "head")) else 0


def _placements(mesh: Mesh, mp_axis: int | None, dp_axis: int | None) -> list[Any]:
    """For a stage's mesh: which axis of the tensor is split over dp, which over mp."""
    axis_of = {"dp": dp_axis, "mp": mp_axis}
    return [dist.Replicate() if axis_of[axis] is None else dist.Shard(axis_of[axis]) for axis in mesh.axes]


def _reshard_hook(to: dist.ProcessMesh, placements: list[Any]) -> Any:
    def hook(layer: Any, inputs: Any, output: paddle.Tensor) -> paddle.Tensor:
        return dist.reshard(output, to, placements)

    return hook
