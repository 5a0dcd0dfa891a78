"""Config schema: every key with its type, its default and its description.

A config file holds only what differs from these defaults; `loader.load_config` reads it. The schema checks keys and
values on their own; what depends on the data or on the number of processes is checked when the run starts.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig, LossConfig, SelectionMetric
from vit_static.config.distill_schema import DistillConfig
from vit_static.config.log_schema import LogConfig
from vit_static.config.lora_schema import LoraConfig
from vit_static.config.model_schema import ModelConfig
from vit_static.config.optim_schema import OptimConfig, ScheduleConfig
from vit_static.config.section import (
    Fraction,
    ImageSize,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RunName,
    Section,
)

PosEmbedResampling = Literal["bicubic", "bilinear", "antialias"]
InferencePrecision = Literal["float32", "bfloat16", "float16", "int8"]
BackendChoice = Literal["auto", "paddle", "onnxruntime", "openvino"]  # what runs an exported model

_MAX_PROFILED_STEPS = 1000  # each step adds thousands of operators to the trace


class TrainConfig(Section):
    """Length of the run (the shortest of epochs, max_steps and max_images), and its reaction to failures."""

    epochs: PositiveFloat = Field(300.0, description="passes over the training images; may be fractional")
    max_steps: PositiveInt | None = Field(None, description="limit in optimizer steps")
    max_images: PositiveInt | None = Field(None, description="limit in images")
    image_sizes: tuple[tuple[ImageSize, Fraction], ...] = Field(
        (),
        description="progressive sizes, [[SIZE, UNTIL], ...]: train on images of SIZE (as model.image_size) until this "
        "share of the steps; the last is 1.0; (): model.image_size in all of them",
    )
    patience: PositiveInt | None = Field(
        None,
        description="early stopping: evaluations without an improvement of eval.metric that end the run; null: off",
    )
    min_delta: NonNegativeFloat = Field(
        0.0, description="an improvement must be larger than this: in per cent, or in units of the loss"
    )
    freeze: Literal["none", "backbone"] = Field("none", description="backbone: train only the head (linear probe)")
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="[first, last]: write a trace of these steps, counted from 1, into the run folder"
    )
    on_nonfinite: Literal["stop", "rollback"] = Field(
        "stop", description="NaN or infinite gradients; rollback: resume from the last checkpoint, without that batch"
    )
    max_rollbacks: PositiveInt = Field(3, description="rollbacks per run; one more stops it")
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        0, description="how often the launcher restarts all processes after a failure, from the latest checkpoint"
    )
    stop_timeout_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = Field(
        600.0,
        description="seconds that a stop on a signal may take, for the current step, an evaluation under way and the "
        "checkpoint; then the process ends without saving, with exit code 1",
    )
    node_timeout_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = Field(
        24.0, description="seconds without an answer from its machine after which a node counts as lost"
    )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The sizes of image_sizes; empty if all images have the model's."""
        return [size for size, _ in self.image_sizes]

    @field_validator("image_sizes", mode="before")
    @classmethod
    def _check_form_of_image_sizes(cls, value: Any) -> Any:
        is_list = isinstance(value, (list, tuple))
        if is_list and all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in value):
            return value
        sizes = list(value) if is_list and all(isinstance(size, int) for size in value) else [128, 224]
        ends = [f"{(number + 1) / len(sizes):.3g}" for number in range(len(sizes) - 1)]
        example = ", ".join(f"[{size}, {end}]" for size, end in zip(sizes, [*ends, "1.0"], strict=True))
        raise ValueError(
            f"must be [[SIZE, UNTIL], ...], each with the share of the steps at which images of this size end, such as "
            f"[{example}]"
        )

    @model_validator(mode="after")
    def _check_image_sizes(self) -> TrainConfig:
        shares = [share for _, share in self.image_sizes]
        if shares and (shares[-1] != 1.0 or any(end <= start for start, end in pairwise([0.0, *shares]))):
            raise ValueError(
                f"image_sizes: sizes change after the shares {shares} of the steps, which must increase from above 0 "
                "to 1.0, such as [[128, 0.4], [224, 1.0]]"
            )
        return self

    @model_validator(mode="after")
    def _check_profile_steps(self) -> TrainConfig:
        if self.profile_steps is None:
            return self
        first, last = self.profile_steps
        if not 0 <= last - first < _MAX_PROFILED_STEPS:
            raise ValueError(
                f"profile_steps = [{first}, {last}]: must be [first, last], at most {_MAX_PROFILED_STEPS} steps"
            )
        return self


class ParallelConfig(Section):
    """The mesh of ranks, and what they exchange. dp * mp * pp is the number of processes."""

    dp: PositiveInt | Literal["auto"] = Field(
        "auto", description="data parallel: ranks with different images; auto: the number of processes / (mp * pp)"
    )
    mp: PositiveInt = Field(1, description="tensor parallel: ranks that split each layer")
    pp: PositiveInt = Field(1, description="pipeline parallel: stages of consecutive blocks")
    collective_timeout_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = Field(
        1800.0,
        description="seconds that ranks wait for another one, on CPUs and GPUs, before the run ends with exit code 1 "
        "and names it",
    )
    pp_schedule: Literal["1F1B", "FThenB"] = Field("1F1B", description="1F1B stores fewer micro-batches' activations")
    sharding_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        0,
        description="ZeRO over the data-parallel ranks: 1 shards optimizer state, 2 also gradients, 3 also parameters",
    )
    bucket_mb: NonNegativeFloat = Field(64.0, description="MB of gradients per exchange; 0: one exchange per parameter")
    overlap_gradients: bool = Field(True, description="start exchanges in the backward pass; needs bucket_mb")
    reduce_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of gradients in these exchanges; needs bucket_mb > 0"
    )
    grad_accum_steps: PositiveInt = Field(1, description="micro-batches per step; in a pipeline, 1 means pp of them")
    recompute: Literal["none", "block"] | PositiveInt = Field(
        "none", description="recompute activations in the backward pass: of every block, or of every n-th block"
    )


class AmpConfig(Section):
    """Automatic mixed precision."""

    level: Literal["auto", "O0", "O1", "O2"] = Field(
        "auto", description="auto: O2 on a GPU; O1 on a CPU with bfloat16 products (AVX512-BF16, AMX), else O0"
    )
    dtype: Literal["auto", "bfloat16", "float16"] = Field("auto", description="low precision; auto: bfloat16")
    init_loss_scaling: PositiveFloat = Field(65536.0, description="initial dynamic loss scale of float16")
    master_grad: bool = Field(True, description="O2: convert gradients to float32 for the update")
    white_list: tuple[str, ...] = Field((), description="operators in low precision, in addition to Paddle's list")
    black_list: tuple[str, ...] = Field((), description="operators in float32, in addition to Paddle's list")

    @model_validator(mode="after")
    def _check_lists(self) -> AmpConfig:
        both = sorted(set(self.white_list) & set(self.black_list))
        if both:
            raise ValueError(f"white_list and black_list both name {', '.join(both)}; remove it from one of them")
        return self


class KernelsConfig(Section):
    """Faster kernels instead of Paddle's plain operators."""

    onednn: bool = Field(True, description="CPU: oneDNN for products, attention, activations, norms")
    measure_products: bool = Field(True, description="CPU: oneDNN or MKLML for a product, whichever measures faster")
    flash_attention: bool = Field(True, description="GPU, O1 and O2: FlashAttention")
    fused_linear: bool = Field(True, description="GPU, O1 and O2: product and bias in one kernel")
    fused_gelu: bool = Field(False, description="GPU: GELU in that kernel too, as its tanh approximation")
    fused_dropout: bool = Field(True, description="GPU: dropout and residual addition in one kernel")
    deterministic: bool = Field(
        False, description="GPU: the same bits in every run; FlashAttention's backward pass is slower"
    )


class InitConfig(Section):
    """Weights that a run starts from."""

    from_: str | None = Field(None, alias="from", description="a run folder, a checkpoint or a file of weights")
    head: Literal["reset", "keep"] = Field("reset", description="reset: a new head; keep: the head of these weights")
    pos_embed: PosEmbedResampling = Field(
        "bicubic", description="resampling to another grid: as PLSC (bicubic), Google (bilinear) or timm (antialias)"
    )


class CheckpointConfig(Section):
    """Checkpoints of a run."""

    every_steps: PositiveInt | None = Field(None, description="steps between two; null: at every evaluation")
    keep_last: PositiveInt = Field(2, description="number of latest checkpoints to keep; the best is kept too")
    keep_every: PositiveInt | None = Field(None, description="also keep checkpoints of multiples of this many steps")
    on_failure: Literal["continue", "stop"] = Field(
        "continue", description="if a checkpoint can't be written: continue to train, or stop with exit code 1"
    )
    write_timeout_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = Field(
        3600.0,
        description="seconds that the next checkpoint, or the end of the run, waits for one that is being written; "
        "then the run ends with exit code 1",
    )


class ExportConfig(Section):
    """Exported models."""

    precision: InferencePrecision = Field(
        "float32",
        description="of weights and computation; bfloat16: a GPU, or a CPU that supports it; float16: a GPU; int8: "
        "an ONNX file, calibrated on validation images",
    )
    image_sizes: tuple[ImageSize, ...] = Field((), description="(): the model's; several: each to DIR/HEIGHTxWIDTH")
    pixels: bool = Field(False, description="also write pixels.json: uint8 images of any size to probabilities")
    temperature: Literal["none", "fit"] = Field(
        "none", description="fit: divide the logits by the temperature that calibrates them on the validation images"
    )
    thresholds: Literal["none", "max_f1"] = Field(
        "max_f1",
        description="data.multi_label: a threshold per class, with the highest F1 on the validation images, from which "
        "predict and serve return the class; none: they return the most likely classes",
    )
    num_check_images: PositiveInt | None = Field(None, description="validation images of the check; null: all")
    num_calibration_images: PositiveInt = Field(256, description="validation images that calibrate int8")
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=60)] = Field(
        "unknown",
        description="of the weights, for MODEL_CARD.md: an identifier of Hugging Face's list, such as apache-2.0, "
        "cc-by-nc-4.0 or other",
    )


class Config(Section):
    """The whole config of a run."""

    name: RunName = Field(description="the run folder is output_dir/name")
    output_dir: str = Field("output", description="folder of all runs")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of initialisation, data order, dropout, ...")
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: the GPU if Paddle sees one")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    amp: AmpConfig = AmpConfig()
    kernels: KernelsConfig = KernelsConfig()
    init: InitConfig = InitConfig()
    lora: LoraConfig = LoraConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="before")
    @classmethod
    def _normalise_one_channel(cls, values: Any) -> Any:
        """Give mean and std one value by default if images have one channel."""
        model, data = (values.get(key) for key in ("model", "data")) if isinstance(values, dict) else (None, None)
        num_channels = model.get("num_channels") if isinstance(model, dict) else getattr(model, "num_channels", None)
        if num_channels != 1 or not (data is None or isinstance(data, dict)):
            return values
        return {**values, "data": {"mean": (0.5,), "std": (0.5,), **(data or {})}}

    @model_validator(mode="before")
    @classmethod
    def _normalise_schedule_free(cls, values: Any) -> Any:
        """Let the learning rate of schedule_free_adamw be constant by default."""
        optim, schedule = (
            (values.get(key) for key in ("optim", "schedule")) if isinstance(values, dict) else (None, None)
        )
        name = optim.get("name") if isinstance(optim, dict) else getattr(optim, "name", None)
        if str(name).lower() != "schedule_free_adamw" or not (schedule is None or isinstance(schedule, dict)):
            return values
        return {**values, "schedule": {"name": "constant", **(schedule or {})}}

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        parallel = self.parallel
        for key in ("mean", "std"):
            num_values, num_channels = len(getattr(self.data, key)), self.model.num_channels
            if num_values != num_channels:
                raise ValueError(
                    f"data.{key}: has {num_values} value{'s' * (num_values > 1)}, and model.num_channels is "
                    f"{num_channels}; set {'one value' if num_channels == 1 else 'three values'}"
                )
        if parallel.reduce_dtype != "float32" and parallel.bucket_mb == 0.0:
            raise ValueError("parallel.reduce_dtype: applies to buckets only; set parallel.bucket_mb above 0")
        if parallel.reduce_dtype == "float16" and self.amp.dtype == "float16":
            raise ValueError(
                "parallel.reduce_dtype = 'float16': with amp.dtype=float16 gradients are scaled, and their sum over "
                "the ranks would overflow; set float32 or bfloat16"
            )
        if self.data.multi_label and self.loss.name == "softmax":
            raise ValueError("data.multi_label: softmax takes one label per image; set loss.name=sigmoid")
        self._check_metric()
        self._check_schedule()
        self._check_lora()
        if self.data.sampler == "balanced" and "balanced" in (self.loss.class_weights, self.loss.pos_weight):
            key = "class_weights" if self.loss.class_weights == "balanced" else "pos_weight"
            raise ValueError(
                f"data.sampler and loss.{key} are both balanced, so rare classes would count twice; remove one of them"
            )
        reason = self.distill.why_invalid(
            self.model, multi_label=self.data.multi_label, freezes_backbone=self.train.freeze == "backbone"
        )
        if reason is not None:
            raise ValueError(reason)
        if self.mixes and self.data.global_batch_size % 2:
            raise ValueError(
                f"data.global_batch_size = {self.data.global_batch_size}: augment.mixup_alpha and cutmix_alpha mix "
                "images in pairs; set an even number"
            )
        return self

    def _check_schedule(self) -> None:
        schedule = self.schedule
        values = {"name": "constant", "warmup_start_lr": 0.0, "cooldown_steps": 0}
        for key, value in values.items():
            if self.optim.name == "schedule_free_adamw" and getattr(schedule, key) != value:
                raise ValueError(
                    f"schedule.{key} = {getattr(schedule, key)!r}: the learning rate of optim.name = "
                    "'schedule_free_adamw' rises from 0 in the warmup and then stays constant; set "
                    f"schedule.{key}={value}, or another optimizer"
                )

    def _check_lora(self) -> None:
        if self.lora.rank == 0:
            return
        if self.init.from_ is None:
            raise ValueError(f"lora.rank = {self.lora.rank}: adapters need the weights that they adapt; set init.from")
        if self.train.freeze != "none":
            raise ValueError(
                f"lora.rank = {self.lora.rank}, train.freeze = {self.train.freeze!r}: with LoRA only the adapters and "
                "the head are trained anyway; remove train.freeze"
            )

    def _check_metric(self) -> None:
        metric, multi_label = self.eval.metric, self.data.multi_label
        if metric == "map" and not multi_label:
            raise ValueError(
                "eval.metric = 'map': needs images with several labels; set data.multi_label=true, or another metric"
            )
        if self.eval.also and multi_label:
            raise ValueError("eval.also: needs one label per image; remove it, or data.multi_label")
        if metric == "balanced_accuracy" and multi_label:
            raise ValueError(
                "eval.metric = 'balanced_accuracy': needs one label per image; set map or macro_f1 for data.multi_label"
            )

    @property
    def selection_metric(self) -> SelectionMetric:
        """The metric that decides which checkpoint is the best: eval.metric or, if that is null, the default."""
        return self.eval.metric or ("map" if self.data.multi_label else "top1")

    @property
    def mixes(self) -> bool:
        """Return whether training images are mixed (mixup, CutMix), which gives their targets several classes."""
        return self.augment.mixup_alpha > 0.0 or self.augment.cutmix_alpha > 0.0

    @property
    def train_targets(self) -> int | None:
        """Width of the training step's targets [B, num_classes]; None if it takes labels [B]."""
        return self.model.num_classes if self.mixes or self.data.multi_label else None

    @property
    def eval_targets(self) -> int | None:
        """Width of the evaluation's targets [B, num_classes]; None if it takes labels [B]."""
        return self.model.num_classes if self.data.multi_label else None

    def with_model(self, model: ModelConfig) -> Config:
        """Return a copy with another model, validated again. Raises pydantic's ValidationError."""
        values = self.model_dump(by_alias=True, exclude_unset=True)
        return Config.model_validate({**values, "model": model.model_dump()})

    @property
    def evaluates_logits(self) -> bool:
        """Return whether evaluations need the logits of all classes, not only the loss and the top class."""
        return self.data.multi_label or bool(self.eval.also)

    def with_several_labels(self) -> Config:
        """Return a copy that evaluates images with several labels, whichever loss it trains with."""
        return self.model_copy(update={"data": self.data.model_copy(update={"multi_label": True})})

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name
