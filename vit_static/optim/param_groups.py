"""Per-parameter learning-rate multiplier and weight-decay flag."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paddle import nn

from vit_static.config.schema import OptimConfig

# -- each parameter's own --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParamGroup:
    """What is different for a parameter."""

    rate: float  # times the step's
    decays: bool


def param_group(name: str, depth: int, optim: OptimConfig) -> ParamGroup:
    """Of a parameter by the model's name for it, in a model of `depth` blocks.

    The rate falls by `layer_decay` with each layer above, as in BEiT and MAE: the last norm and the head have none
    above, block i has depth - i, patch embedding, position and tokens have depth + 1.
    """
    kinds = set()
    if re.fullmatch(r"(.*\.)?(norm[12]?|ls[12])\.\w+", name):
        kinds.add("norm")
    if name.endswith(".bias"):
        kinds.add("bias")
    if name in ("cls_token", "reg_token", "pos_embed"):
        kinds.add("embedding")
    block = re.match(r"blocks\.(\d+)\.", name)
    above = depth - int(block[1]) if block else 0 if name.startswith(("norm.", "head")) else depth + 1
    return ParamGroup(optim.layer_decay**above, not kinds & set(optim.no_decay))


def layer_index(name: str) -> str:
    """What a parameter's gradient is added up with for people to read: its block, or what it belongs to outside."""
    return ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])


def freeze_backbone(model: nn.Layer) -> None:
    """Leaves only the head to be trained: a linear probe."""
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = not name.startswith("head")


def decay_coefficient(optim: OptimConfig) -> float:
    """What is multiplied by the step's rate."""
    return optim.weight_decay if optim.decay_times_lr else optim.weight_decay / optim.lr
