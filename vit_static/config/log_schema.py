"""The config's section of logs and experiment trackers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vit_static.config.section import PositiveInt, Section


class LogConfig(Section):
    """Metrics during training."""

    every_steps: PositiveInt = Field(50, description="steps between two entries; step 1 always has one")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab"], ...] = Field(
        ("tensorboard",), description="experiment trackers; all but TensorBoard's event file need their packages"
    )
    tracker_timeout_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = Field(
        60.0, description="seconds that the end of a run waits until trackers have sent everything"
    )

    @model_validator(mode="before")
    @classmethod
    def _read_tensorboard(cls, values: Any) -> Any:
        """Read `tensorboard`, the key of configs and runs before there were other trackers."""
        if not isinstance(values, dict) or "tensorboard" not in values:
            return values
        values = dict(values)
        has_tensorboard = values.pop("tensorboard")
        if "trackers" in values or not isinstance(has_tensorboard, bool):
            raise ValueError(f"tensorboard = {has_tensorboard!r}: is now trackers; set trackers=[tensorboard], or []")
        return {**values, "trackers": ["tensorboard"] if has_tensorboard else []}
