"""Config schema of distillation: a teacher whose outputs are part of the training loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vit_static.config.model_schema import ModelConfig
from vit_static.config.section import PositiveFloat, Section

DistillKind = Literal["soft", "hard", "token", "features"]


class DistillConfig(Section):
    """Distillation: the loss is (1 - weight) * that of the labels + weight * that of the teacher's outputs."""

    teacher: str | None = Field(
        None,
        description="a run folder, a checkpoint or a file of weights in any format that init.from reads; null: none",
    )
    config: str | None = Field(
        None,
        description="the teacher's config, for a file of weights without one beside it: model, data.mean, data.std; "
        "null: the one beside the weights, else what the arrays determine",
    )
    kind: DistillKind = Field(
        "soft",
        description="soft: KL divergence of probabilities (arXiv 1503.02531); hard: cross-entropy with the teacher's "
        "class (arXiv 2012.12877); token: either of them for a distillation token with a head of its own (DeiT; needs "
        "model.distillation_token); features: regression of the teacher's normalized features (arXiv 2205.14141)",
    )
    token_label: Literal["hard", "soft"] = Field("hard", description="token: what its head learns; hard is DeiT's")
    temperature: PositiveFloat = Field(
        1.0, description="soft: logits are divided by it, and the loss multiplied by its square; DeiT's paper: 3"
    )
    weight: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="of the teacher's part in the loss; DeiT: 0.5 for hard labels, 0.1 for soft ones"
    )

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        changed = [key for key in type(self).model_fields if getattr(self, key) != type(self).model_fields[key].default]
        if self.teacher is None and changed:
            raise ValueError(f"{changed[0]}: without a teacher it has no effect; set teacher=PATH")
        if self.token_label != "hard" and self.kind != "token":
            raise ValueError(f"token_label = {self.token_label!r}: kind = {self.kind!r} has no token; set kind=token")
        if self.temperature != 1.0 and not self.has_soft_labels:
            raise ValueError(
                f"temperature = {self.temperature:g}: kind = {self.kind!r} has no temperature; set temperature=1, or "
                f"{'token_label' if self.kind == 'token' else 'kind'}=soft"
            )
        return self

    @property
    def has_soft_labels(self) -> bool:
        """Return whether the student learns the teacher's probabilities."""
        return self.kind == "soft" or (self.kind == "token" and self.token_label == "soft")

    def why_invalid(self, model: ModelConfig, *, multi_label: bool, freezes_backbone: bool) -> str | None:
        """Return why a run with this model and these labels can't be distilled, and what to change; None if it can."""
        if self.teacher is None:
            return None
        if self.kind == "token" and not model.distillation_token:
            return "distill.kind = 'token': needs a token to learn with; set model.distillation_token=true"
        if self.kind != "token" and model.distillation_token:
            return (
                f"distill.kind = {self.kind!r}: model.distillation_token has a head for the teacher's labels; set "
                "distill.kind=token"
            )
        if multi_label and self.kind != "features":
            return (
                f"distill.kind = {self.kind!r}: takes one label per image, and data.multi_label has several; set "
                "distill.kind=features"
            )
        if freezes_backbone and self.kind == "features":
            return "distill.kind = 'features': train.freeze = 'backbone' leaves the features as they are; set kind=soft"
        return None
