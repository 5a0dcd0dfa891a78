"""Mixed precision: O1's autocast in the model's forward, entered while it is traced, and what O2 leaves float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import paddle
from paddle import nn

from vit_static.config.schema import AmpConfig
from vit_static.model.lora import LoraLinear
from vit_static.model.patches import PatchProjection
from vit_static.model.rope import RotaryPositions
from vit_static.program import seeded_dropout
from vit_static.program.precision import Precision

# Layers whose parameters and buffers stay float32 in O2: in bfloat16 an angle of many turns would be off by degrees.
FLOAT32_LAYERS = [RotaryPositions]


def wrap_forward(
    model: nn.Layer, precision: Precision, amp: AmpConfig, seeds: seeded_dropout.SeededDropout | None
) -> None:
    """Wrap the model's forward with O1's autocast and with the start of the dropout seeds.

    On a CPU, Paddle rejects an auto_cast that is entered before the forward is traced, as the engine does from its
    strategy; on a GPU the engine's is used for O2, and O1 is entered here too.
    """
    forward = model.forward
    autocast = precision.level == "O1"

    def traced(images: paddle.Tensor) -> paddle.Tensor:
        if seeds is not None and model.training:
            seeds.create_seeds()
        if not autocast:  # a disabled auto_cast would also disable O2's, which the engine has entered
            return forward(images)
        with _autocast(precision, amp):
            return forward(images)

    if autocast or seeds is not None:
        model.forward = traced
    if precision.level != "O0":
        _resample_in_float32(model)


def _resample_in_float32(model: Any) -> None:
    """Let a position embedding be resampled in float32, whose matrix products would run in low precision."""
    forward = model.pos_embed_resampler.forward

    def in_float32(*arguments: Any) -> paddle.Tensor:
        with paddle.amp.auto_cast(enable=False):
            return forward(*arguments)

    model.pos_embed_resampler.forward = in_float32


def add_biases_in_low_precision(model: nn.Layer, precision: Precision, amp: AmpConfig) -> None:
    """Let O1 add the bias of a linear layer in low precision, as the fused kernel does.

    Otherwise it adds the float32 bias to the product in float32, which no fused kernel does.
    """
    kinds = (nn.Linear, LoraLinear, PatchProjection)
    layers: list[Any] = [layer for layer in model.sublayers() if isinstance(layer, kinds)]
    for layer in layers:
        layer.forward = _with_autocast(layer.forward, precision, amp)


def _with_autocast(forward: Callable[..., Any], precision: Precision, amp: AmpConfig) -> Callable[..., Any]:
    def autocast_forward(x: paddle.Tensor) -> paddle.Tensor:
        with _autocast(precision, amp, "elementwise_add"):
            return forward(x)

    return autocast_forward


def _autocast(precision: Precision, amp: AmpConfig, *operators: str) -> AbstractContextManager[None]:
    """Return O1's autocast, in which these operators, too, run in low precision unless the config says otherwise."""
    black_list = set(amp.black_list)
    return paddle.amp.auto_cast(
        level="O1",
        dtype=precision.dtype,
        custom_white_list={*amp.white_list, *operators} - black_list,
        custom_black_list=black_list,
    )
