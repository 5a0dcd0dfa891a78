"""Sharding of the model over the mesh: the table of tensor parallelism, ZeRO's axes, and pipeline stages.

The model knows nothing of this. Sharding changes neither the names nor the global shapes of its parameters: each one
becomes a distributed tensor, of which a rank holds a part.
"""

from __future__ import annotations

import re
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.parallel.mesh import Mesh

_REPLICATED, _FIRST_AXIS, _LAST_AXIS = "replicated", "first axis", "last axis"

# The axis of each parameter that tensor parallelism splits. q, k, v and fc1 are split by columns (weights are
# [in, out]), so that a rank computes complete heads and hidden channels; proj and fc2 are split by rows, and an
# all-reduce adds up their partial sums (Megatron-LM, arXiv 1909.08053). So are the gate of a gated MLP, the pooling
# head's layers and the frequencies of mixed rotary positions. A norm over split channels gathers them first. Of an
# adapter (LoRA) the matrix that touches the split axis of its layer is split. Every parameter matches exactly one line.
TP_SHARDING_RULES: dict[str, str] = {
    r"(cls|dist|reg)_token|pos_embed|attn_pool\.latent": _REPLICATED,
    r"patch_embed\.proj\.(weight|bias)": _REPLICATED,
    r"(norm_pre|attn_pool\.norm)\.(weight|bias)": _REPLICATED,
    r"blocks\.\d+\.norm[12]\.(weight|bias)": _REPLICATED,
    r"(blocks\.\d+|attn_pool)\.attn\.[qkv]\.(weight|bias)": _LAST_AXIS,
    r"(blocks\.\d+|attn_pool)\.attn\.proj\.weight": _FIRST_AXIS,
    r"(blocks\.\d+|attn_pool)\.attn\.proj\.bias": _REPLICATED,
    r"blocks\.\d+\.attn\.[qk]_norm\.(weight|bias)": _REPLICATED,
    r"blocks\.\d+\.attn\.rope\.frequencies": _LAST_AXIS,
    r"blocks\.\d+\.attn\.norm\.(weight|bias)": _REPLICATED,
    r"(blocks\.\d+|attn_pool)\.mlp\.norm\.(weight|bias)": _REPLICATED,
    r"blocks\.\d+\.ls[12]\.gamma": _REPLICATED,
    r"(blocks\.\d+|attn_pool)\.mlp\.(fc1|gate)\.(weight|bias)": _LAST_AXIS,
    r"(blocks\.\d+|attn_pool)\.mlp\.fc2\.weight": _FIRST_AXIS,
    r"(blocks\.\d+|attn_pool)\.mlp\.fc2\.bias": _REPLICATED,
    r"(blocks\.\d+|attn_pool)\.(attn\.[qkv]|mlp\.(fc1|gate))\.lora_a": _REPLICATED,
    r"(blocks\.\d+|attn_pool)\.(attn\.[qkv]|mlp\.(fc1|gate))\.lora_b": _LAST_AXIS,
    r"(blocks\.\d+|attn_pool)\.(attn\.proj|mlp\.fc2)\.lora_a": _FIRST_AXIS,
    r"(blocks\.\d+|attn_pool)\.(attn\.proj|mlp\.fc2)\.lora_b": _REPLICATED,
    r"norm\.(weight|bias)": _REPLICATED,
    r"head0\.(weight|bias)": _REPLICATED,
    r"head(_dist)?\.(weight|bias)": _LAST_AXIS,
    r"distill_projector\.(weight|bias)": _REPLICATED,
}


def tp_axis(name: str, shape: list[int], mp: int) -> int | None:
    """Return the axis of a parameter that tensor parallelism splits, or None if the parameter is replicated.

    The head is replicated if `mp` doesn't divide the number of classes.
    """
    if mp == 1:
        return None
    rules = [rule for pattern, rule in TP_SHARDING_RULES.items() if re.fullmatch(pattern, name)]
    assert len(rules) == 1, f"{name} matches {len(rules)} lines of TP_SHARDING_RULES"
    axis = {_REPLICATED: None, _FIRST_AXIS: 0, _LAST_AXIS: len(shape) - 1}[rules[0]]
    if axis is not None and name.startswith(("head.", "head_dist.")) and shape[axis] % mp:
        return None
    return axis


def zero_shard_axis(shape: list[int], mp_axis: int | None, mp: int, dp: int) -> int | None:
    """Return the axis along which ZeRO splits a parameter and its state: the first that `dp` divides, or None.

    (Paddle 3.3.1 tries to pad an axis that can't be divided, and fails.)
    """
    local_shape = [size // mp if axis == mp_axis else size for axis, size in enumerate(shape)]
    candidates = (axis for axis, size in enumerate(local_shape) if axis != mp_axis and size % dp == 0 and size > 1)
    return next(candidates, None)


def stage_of_blocks(depth: int, pp: int) -> list[int]:
    """Return the pipeline stage of each block. If they can't be divided evenly, the first stages get one more."""
    return [stage for stage in range(pp) for _ in range(depth // pp + (stage < depth % pp))]


def shard_model(model: nn.Layer, mesh: Mesh, sharding_stage: int) -> dict[str, int]:
    """Replace each parameter by a distributed tensor, and hook transfers between stages into the model's forward.

    Returns the pipeline stage of each layer, by name.
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
    for block, stage, next_stage in zip(blocks, stages, [*stages[1:], *stages[-1:]], strict=True):
        if next_stage != stage:
            block.register_forward_post_hook(_reshard_hook(mesh.stage(next_stage), batch_placements(mesh)))
    if mesh.shape.mp > 1:
        # Gather the logits of a split head once, for all operators that read them.
        for head in (model.head, model.head_dist):
            if head is not None:
                head.register_forward_post_hook(_reshard_hook(mesh.last_stage, batch_placements(mesh)))
    return stage_of_layers


def batch_placements(mesh: Mesh) -> list[Any]:
    """Return the placements of a tensor whose first axis is the batch: split over dp."""
    return _placements(mesh, mp_axis=None, dp_axis=0)


def state_placements(mesh: Mesh, parameter: Any) -> list[Any]:
    """Return ZeRO's placements of what belongs to a parameter: its moments, master copy and summed gradient."""
    axis_of = dict(zip(mesh.axes, parameter.placements, strict=True))
    if axis_of["dp"].is_shard():  # stage 3: the parameter itself is split
        return list(parameter.placements)
    mp = axis_of.get("mp")
    mp_axis = mp.get_dim() if mp is not None and mp.is_shard() else None
    return _placements(mesh, mp_axis, zero_shard_axis(parameter.shape, mp_axis, mesh.shape.mp, mesh.shape.dp))


def _stage_of(layer_name: str, stages_of_blocks: list[int]) -> int:
    """Return a layer's stage: its block's; the first for layers before the blocks, the last for layers after them."""
    block = re.match(r"blocks\.(\d+)", layer_name)
    if block:
        return stages_of_blocks[int(block[1])]
    is_last = layer_name.partition(".")[0] in ("norm", "attn_pool", "head0", "head", "head_dist", "distill_projector")
    return stages_of_blocks[-1] if stages_of_blocks and is_last else 0


def _placements(mesh: Mesh, mp_axis: int | None, dp_axis: int | None) -> list[Any]:
    """Return a tensor's placements on a stage's mesh, given the axes that are split over dp and over mp."""
    axis_of = {"dp": dp_axis, "mp": mp_axis}
    return [dist.Replicate() if axis_of[axis] is None else dist.Shard(axis_of[axis]) for axis in mesh.axes]


def _reshard_hook(mesh: dist.ProcessMesh, placements: list[Any]) -> Any:
    """Return a forward hook that reshards a layer's output."""

    def hook(layer: Any, inputs: Any, output: paddle.Tensor) -> paddle.Tensor:
        return dist.reshard(output, mesh, placements)

    return hook
