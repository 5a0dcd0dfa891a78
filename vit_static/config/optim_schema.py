"""Config schema of the optimizer and of the learning rate over time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vit_static.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, Rate, Section


class OptimConfig(Section):
    """The optimizer. `schedule` has the learning rate over time."""

    name: Literal["adamw", "sgd", "lamb", "lion", "adafactor", "schedule_free_adamw", "muon"] = Field(
        "adamw",
        description="which optimizer; schedule_free_adamw (arXiv 2405.15682): the learning rate stays constant after "
        "the warmup, and an average of the weights is evaluated, exported and used; muon (arXiv 2502.16982): the "
        "layers' matrices by orthogonalized momentum, all other parameters and the head by AdamW",
    )
    lr: NonNegativeFloat = Field(1e-3, description="peak learning rate")
    betas: tuple[Rate, Rate] = Field(
        (0.9, 0.999),
        description="decay rates of the moments; lion's paper uses [0.9, 0.99]; adafactor: momentum, and the upper "
        "limit of the second moment's decay rate; schedule_free_adamw: interpolation between the steps and their "
        "average, and the second moment",
    )
    epsilon: PositiveFloat = Field(
        1e-8, description="of adamw, schedule_free_adamw, muon and lamb; lamb's paper uses 1e-6"
    )
    momentum: Rate = Field(0.9, description="of sgd and muon; timm's and the author's muon use 0.95")
    nesterov: bool = Field(False, description="muon: Nesterov momentum; its author uses it")
    newton_schulz: Literal["quintic", "original"] = Field(
        "quintic", description="muon: coefficients of the orthogonalization: timm's default, or its author's"
    )
    muon_scale: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="muon: size of a matrix's update: as AdamW's, 0.2 sqrt(max(inputs, outputs)) (arXiv 2502.16982), "
        "or its author's, sqrt(max(1, outputs / inputs))",
    )
    adamw_lr_scale: PositiveFloat = Field(1.0, description="muon: AdamW's learning rate, as a multiple of lr")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="decoupled, multiplied by the learning rate; sgd: an L2 term, added to the clipped gradient"
    )
    decay_times_lr: bool = Field(
        True, description="false: multiply the weight decay by lr(step) / lr instead of lr(step); not for sgd and lamb"
    )
    no_decay: tuple[Literal["bias", "norm", "embedding"], ...] = Field(
        (),
        description="parameters without weight decay; norm: LayerNorm and LayerScale; embedding: class token, "
        "registers and position embedding",
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="layer-wise decay: the learning rate is multiplied by layer_decay ** (number of layers above)"
    )
    clip_norm: PositiveFloat | None = Field(1.0, description="maximum global gradient norm; null: no clipping")
    ema_decay: Rate = Field(0.0, description="of a moving average of the weights, which is evaluated too; 0: none")
    ema_warmup: bool = Field(True, description="start the moving average with a lower decay (optim/optimizers.py)")

    @model_validator(mode="after")
    def _check_decay_times_lr(self) -> OptimConfig:
        if not self.decay_times_lr and (self.name in ("sgd", "lamb") or self.lr == 0.0):
            raise ValueError(
                "decay_times_lr = False: needs lr above 0 and decoupled weight decay, which sgd and lamb don't have"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule_free(self) -> OptimConfig:
        if self.name == "schedule_free_adamw":
            if self.ema_decay > 0.0:
                raise ValueError(
                    f"ema_decay = {self.ema_decay:g}: name = 'schedule_free_adamw' has an average of the weights "
                    "already; set ema_decay=0"
                )
            if self.betas[0] == 0.0:
                raise ValueError(
                    f"betas = {list(self.betas)}: the first one of schedule_free_adamw must be above 0; its paper uses "
                    "0.9"
                )
        return self


class ScheduleConfig(Section):
    """The learning rate over time: a linear warmup to `optim.lr`, then the named decay."""

    name: Literal["cosine", "linear", "rsqrt", "constant"] = Field("cosine", description="shape of the decay")
    warmup_steps: NonNegativeInt = Field(0, description="optimizer steps of the warmup")
    warmup_epochs: NonNegativeFloat | None = Field(None, description="length of the warmup, instead of warmup_steps")
    warmup_start_lr: NonNegativeFloat = Field(0.0, description="learning rate at the start of the warmup")
    end_lr: NonNegativeFloat = Field(0.0, description="learning rate at the end of cosine and linear")
    decay_begins: Literal["after_warmup", "at_start"] = Field(
        "after_warmup", description="where cosine and linear begin; at_start: under the warmup, as in timm"
    )
    timescale: PositiveFloat = Field(10_000.0, description="rsqrt: lr / sqrt(1 + steps after warmup / timescale)")
    cooldown_steps: NonNegativeInt = Field(0, description="steps at the end in which the rate falls linearly to 0")

    @model_validator(mode="after")
    def _check_warmup(self) -> ScheduleConfig:
        if self.warmup_steps and self.warmup_epochs is not None:
            raise ValueError("warmup_steps and warmup_epochs are both set; remove one of them")
        return self
