"""Exponential moving average (EMA) of the weights."""

from __future__ import annotations

from typing import Any

from vit_static.config.optim_schema import OptimConfig
from vit_static.optim.sharded_state import StepScalars
from vit_static.parallel.dist_values import assign_to, replicate, reshard

EMA = "ema"  # the name of the average among an optimizer's states


def ema_decay(step: int, optim: OptimConfig) -> float:
    """Return the average's decay in the update that follows `step` completed ones.

    As timm's ModelEmaV3: 0 in the first update, so that the average starts with the weights after it. With warmup, the
    n-th update has 1 - n ** (-2/3), until that exceeds `ema_decay`.
    """
    warmed_up = 1.0 - (step + 1) ** (-2.0 / 3.0) if optim.ema_warmup else optim.ema_decay
    return min(optim.ema_decay, warmed_up) if step > 0 else 0.0


class EmaMixin:
    """Base class of optimizers that may keep the average of the weights as one more state.

    In float32, with w' the updated weight: ema' = w' + decay * (ema - w').
    """

    _scalars: StepScalars
    _has_ema = False

    def enable_ema(self) -> None:
        """Keep the average. Call this before the program is built."""
        self._has_ema = True

    def _create_ema(self, weight: Any) -> None:
        """Create the average of a float32 weight, if there is to be one."""
        if self._has_ema:
            self._add_accumulator(EMA, weight, dtype="float32")  # type: ignore[attr-defined]

    def _update_ema(self, parameter: Any, weight: Any, updated: Any) -> None:
        """Update the average of `weight` (the parameter, or its master copy), whose new value is `updated`."""
        if not self._has_ema:
            return
        average = self._get_accumulator(EMA, weight)  # type: ignore[attr-defined]
        decay = replicate(self._scalars.value("ema_decay"), parameter.process_mesh)
        updated = reshard(updated.astype("float32"), average.placements)
        assign_to(average, updated + decay * (average - updated))
