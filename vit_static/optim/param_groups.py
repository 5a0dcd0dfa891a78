"""Per-parameter learning-rate multiplier and weight-decay flag; freezing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paddle import nn

from vit_static.config.optim_schema import OptimConfig

_EMBEDDINGS = ("cls_token", "dist_token", "reg_token", "pos_embed", "attn_pool.latent")
_OUTPUTS = ("head.", "head_dist.", "distill_projector.")


@dataclass(frozen=True)
class ParamGroup:
    """Settings of a parameter that differ from those of others."""

    lr_multiplier: float
    decays: bool
    is_matrix: bool  # the kernel of a layer other than the head and a projector, which Muon orthogonalizes


def param_group(name: str, depth: int, optim: OptimConfig, num_axes: int = 1) -> ParamGroup:
    """Return the settings of a parameter, by its name, and its number of axes, in a model of `depth` blocks.

    The learning rate is multiplied by `layer_decay` for each layer above the parameter, as in BEiT and MAE. The last
    norm, attention pooling and the head have no layer above them, block i has depth - i, and the patch embedding, the
    position embedding and the tokens have depth + 1.
    """
    kinds = set()
    if re.fullmatch(r"(.*\.)?(norm([12]|_pre)?|[qk]_norm|ls[12])\.\w+", name):
        kinds.add("norm")
    if name.endswith(".bias"):
        kinds.add("bias")
    if name in _EMBEDDINGS or name.endswith(".rope.frequencies"):
        kinds.add("embedding")
    block = re.match(r"blocks\.(\d+)\.", name)
    if name.startswith(("norm.", "attn_pool.", "head", "distill_projector.")):
        num_layers_above = 0
    elif block:
        num_layers_above = depth - int(block[1])
    else:
        num_layers_above = depth + 1
    is_matrix = name.endswith(".weight") and num_axes >= 2 and not name.startswith(_OUTPUTS)
    return ParamGroup(optim.layer_decay**num_layers_above, not kinds & set(optim.no_decay), is_matrix)


def norm_group(name: str) -> str:
    """Return the group in which a parameter's gradient norm is reported: its block, or its layer outside the blocks."""
    return ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])


def freeze_backbone(model: nn.Layer) -> None:
    """Stop the gradients of all parameters except the head's: a linear probe."""
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = not name.startswith("head")


def decay_coefficient(optim: OptimConfig) -> float:
    """Return the factor that, times the step's learning rate, is the weight decay of the step."""
    return optim.weight_decay if optim.decay_times_lr else optim.weight_decay / optim.lr
