"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Constant, Uniform

from vit_static.common.errors import ConfigError
from vit_static.config.lora_schema import LoraConfig, LoraTarget
from vit_static.model.layers import Dropout
from vit_static.model.vit import VisionTransformer

A, B = "lora_a", "lora_b"  # names of an adapter's matrices, beside the layer's `weight` and `bias`
_HEADS = ("head.", "head0.", "head_dist.")


class LoraLinear(nn.Layer):
    """Linear layer with an adapter: x W + b + scale (x A) B. Weight and bias are those of `base`.

    As in the paper's code and in peft, A starts uniform within 1 / sqrt(inputs), which is Kaiming's with a = sqrt(5),
    and B with zeros, so that at first the layer computes the same as `base`.
    """

    def __init__(self, base: nn.Linear, lora: LoraConfig) -> None:
        super().__init__()
        num_inputs, num_outputs = base.weight.shape
        bound = num_inputs**-0.5
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = self.create_parameter([num_inputs, lora.rank], default_initializer=Uniform(-bound, bound))
        self.lora_b = self.create_parameter([lora.rank, num_outputs], default_initializer=Constant(0.0))
        self.drop = Dropout(lora.dropout)
        self.scale = lora.scale

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        low_rank = paddle.matmul(self.drop(x), self.lora_a) * self.scale  # [B, N, rank]
        return F.linear(x, self.weight, self.bias) + paddle.matmul(low_rank, self.lora_b)


def add_adapters(model: VisionTransformer, lora: LoraConfig, newly_initialized: Iterable[str] = ()) -> None:
    """Give the target layers of a model adapters, and freeze all but these, the heads and what is newly initialized.

    `newly_initialized`: names of parameters; such layers are trained themselves, without an adapter. Does nothing if
    the config has no LoRA. Raises ConfigError for a rank above the model's width.
    """
    if lora.rank == 0:
        return
    width = int(model.norm.weight.shape[0])
    if lora.rank > width:
        raise ConfigError(f"lora.rank = {lora.rank}: is above the model's width of {width}; set a rank of 4 to 64")
    trained = set(newly_initialized)
    layers = dict(model.named_sublayers(include_self=True))
    for name, layer in layers.items():
        if target_of(name) in lora.targets and f"{name}.weight" not in trained:
            parent, _, short_name = name.rpartition(".")
            setattr(layers[parent], short_name, LoraLinear(layer, lora))
    for name, parameter in model.named_parameters():
        is_trained = name in trained or is_adapter(name) or name.startswith(_HEADS)
        parameter.stop_gradient = not is_trained


def target_of(layer_name: str) -> LoraTarget | None:
    """Return which of `lora.targets` a layer is, by its name; None if it gets no adapter."""
    match = re.fullmatch(r"(?:blocks\.\d+|attn_pool)\.(?:attn\.(q|k|v|proj)|mlp\.(?:fc1|fc2|gate))", layer_name)
    return None if match is None else match[1] or "mlp"  # type: ignore[return-value]


def is_adapter(name: str) -> bool:
    """Return whether a parameter, by its name, belongs to an adapter."""
    return name.endswith((f".{A}", f".{B}"))


def frozen_names(model: nn.Layer) -> Iterator[str]:
    """Yield the names of the parameters that aren't trained."""
    return (name for name, parameter in model.named_parameters() if parameter.stop_gradient)


def count_parameters(model: nn.Layer) -> tuple[int, int]:
    """Return how many numbers of a model's parameters are trained, and how many are frozen."""
    counts = [0, 0]
    for parameter in model.parameters():
        counts[int(parameter.stop_gradient)] += math.prod(parameter.shape)
    return counts[0], counts[1]
