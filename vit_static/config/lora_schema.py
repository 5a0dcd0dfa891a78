"""Config schema of LoRA: low-rank adapters of a frozen model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vit_static.config.section import NonNegativeInt, PositiveFloat, Rate, Section

LoraTarget = Literal["q", "k", "v", "proj", "mlp"]
LORA_TARGETS: tuple[LoraTarget, ...] = ("q", "k", "v", "proj", "mlp")


class LoraConfig(Section):
    """LoRA (arXiv 2106.09685): train low-rank adapters of linear layers, and the head; all else stays as in init.from.

    A layer x W + b becomes x W + b + alpha / rank * (x A) B, with A [inputs, rank] and B [rank, outputs].
    """

    rank: NonNegativeInt = Field(0, description="rank of the adapters; 0: no LoRA, all weights are trained")
    alpha: PositiveFloat = Field(16.0, description="the adapters' output is multiplied by alpha / rank")
    targets: tuple[LoraTarget, ...] = Field(
        LORA_TARGETS,
        description="layers with an adapter, in the blocks and in attention pooling: queries, keys, values and the "
        "output projection of attention; mlp: all layers of the MLP",
    )
    dropout: Rate = Field(0.0, description="of an adapter's input")

    @model_validator(mode="after")
    def _check_targets(self) -> LoraConfig:
        if self.rank > 0 and not self.targets:
            raise ValueError(f"targets = []: name at least one of {', '.join(LORA_TARGETS)}")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets = {list(self.targets)}: names a layer twice; remove one of them")
        return self

    @property
    def scale(self) -> float:
        """The factor of the adapters' output."""
        return self.alpha / max(self.rank, 1)
