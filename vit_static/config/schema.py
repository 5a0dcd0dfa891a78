"""What a run can be told: typed, frozen sections, with every default; YAML files, ``-o`` overrides, validation.

A config file holds only what differs from the defaults below. `load` puts file and overrides together and raises
`ConfigError`, in one line that names the key and the remedy, for anything that it doesn't know.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vit_static.common.errors import format_value
from vit_static.config.yaml_loader import WrittenFloat, WrittenInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
CountOrNone = Annotated[int, Field(ge=0, lt=2**63)]  # which may be 0
Pixels = Annotated[int, Field(ge=1, le=100_000)]
CropPct = Annotated[float, Field(ge=0.05, le=1.0)]  # less would enlarge an image to hundreds of megapixels
Interpolation = Literal["bilinear", "bicubic"]
PosEmbedResampling = Literal["bicubic", "bilinear", "antialias"]

_MAX_PROFILED_STEPS = 1000  # steps, each of thousands of operators


def _height_and_width(value: Any) -> Any:
    """An image size may be one number, for a square."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


ImageSize = Annotated[tuple[Pixels, Pixels], BeforeValidator(_height_and_width)]


def _folder_name(name: str) -> str:
    """That of a run's folder, which must not lead out of `output_dir`."""
    if not name or "/" in name or "\\" in name or not (name[0].isalnum() or name[0] == "_"):
        raise ValueError(
            f"{format_value(name)} must be a folder's name: a letter, a digit or _ first, no slash; set name=NAME"
        )
    if len(os.fsencode(name)) > 200:
        raise ValueError(f"{format_value(name)} is longer than a folder's name may be; set name=NAME")
    return name


class Section(BaseModel):
    """A part of the config: frozen, no key but those declared, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError(f"{value} is no value for this key")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, value: Any, info: ValidationInfo) -> Any:
        """A name of digits is a name; one that no file can have is none."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, WrittenInt | WrittenFloat) and (annotation is str or str in get_args(annotation)):
            value = value.text
        if isinstance(value, str):
            try:
                os.fsencode(value)
            except UnicodeEncodeError:
                raise ValueError(f"{value!a} is no text") from None
            if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in value):
                raise ValueError(f"{format_value(value)} has a control character in it")
        return value


class ModelConfig(Section):
    variant: str = Field("B/16", description="a name of model.VARIANTS; `patch_size` to `mlp_dim` override it")
    image_size: ImageSize = Field((224, 224), description="pixels: a number, or [height, width]")
    num_classes: Count = 1000
    pool: Literal["cls", "gap", "cls_gap"] = Field(
        "cls", description="what the head reads: the class token's state, the patches' mean, both side by side"
    )
    class_token: bool | None = Field(None, description="null: where `pool` reads it")
    class_token_pos_embed: bool = Field(True, description="the class token has a position embedding, too")
    register_tokens: CountOrNone = Field(0, description="without a position (arXiv 2309.16588)")
    fc_norm: bool = Field(False, description="the last norm is of the pooled state, not of the tokens'")
    layer_norm_epsilon: Positive = 1e-6
    gelu: Literal["erf", "tanh"] = Field("erf", description="exact, or the approximation that Flax has by default")
    pos_embed: Literal["learn", "sincos2d"] = Field("learn", description="sincos2d is fixed")
    pos_embed_init: Literal["normal", "sincos2d"] = Field("normal", description="what a learned one begins as")
    patch_size: Pixels | None = None
    width: Count | None = None
    depth: Count | None = None
    num_heads: Count | None = None
    mlp_dim: Count | None = None
    representation_size: Count | None = Field(None, description="width of a tanh layer before the head")
    head_bias_init: float = Field(0.0, description="-10 for the seed's sigmoid loss")
    head_init_std: NotNegative = Field(0.0, description="of its normally distributed weights; 0: zeros, as Google's")
    qkv_bias: bool = True
    dropout: Rate = 0.0
    attention_dropout: Rate = 0.0
    drop_path_rate: Rate = Field(0.0, description="the last block's")
    drop_path_schedule: Literal["linear", "constant"] = Field("linear", description="over the depth, from 0 or alike")
    layer_scale_init: float | None = None

    @model_validator(mode="after")
    def _has_the_tokens_it_needs(self) -> ModelConfig:
        if self.class_token is False and self.pool != "gap":
            raise ValueError(f"class_token = False: pool = {self.pool!r} reads it; set pool=gap")
        return self

    @property
    def has_class_token(self) -> bool:
        return self.pool != "gap" if self.class_token is None else self.class_token

    @property
    def num_prefix_tokens(self) -> int:
        """The tokens before the patches: class, then registers."""
        return int(self.has_class_token) + self.register_tokens

    @property
    def num_prefix_positions(self) -> int:
        """How many of those have a position embedding."""
        return int(self.has_class_token and self.class_token_pos_embed)


class DataConfig(Section):
    root: str = Field("data/imagenet", description="folder that `train` and `val` lie in")
    train: str = Field("train", description="below root: class folders, a list file, or a folder of WebDataset shards")
    val: str = "val"
    multi_label: bool = Field(False, description="images may have several labels; needs loss.name = sigmoid or bce")
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="skip: leave out what `data check` has listed; a file that can't be decoded always stops"
    )
    global_batch_size: Count = Field(1024, description="images an optimizer step, over all ranks and micro-batches")
    num_threads: Count = Field(4, description="DALI's CPU threads a rank")
    num_readers: Count = Field(4, description="threads a rank that read files, ahead of DALI")
    prefetch_batches: Count = 2
    read_timeout_s: Positive = Field(120.0, description="seconds after which a read that gives nothing is an error")
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="of pixels in 0-1, RGB")
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)


class AugmentConfig(Section):
    """Training images: a random crop of an area and an aspect ratio, resized; a flip; a policy's operations and colour
    jitter (data/augment.py); erasing; and images mixed with each other in the step (mixing.py)."""

    crop_scale: tuple[Fraction, Fraction] = Field((0.08, 1.0), description="share of the image, least and most")
    crop_aspect_ratio: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="width / height, least and most")
    interpolation: Interpolation = "bicubic"
    antialias: bool = True
    flip_probability: Fraction = 0.5
    policy: Literal["none", "randaugment", "trivialaugment", "three_augment"] = "none"
    num_ops: Count = Field(2, description="randaugment's n: operations one after the other")
    magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = Field(9.0, description="randaugment's m, of 10")
    magnitude_std: NotNegative = Field(0.0, description="of a normal distribution about it; 0.5 in DeiT's recipe")
    op_probability: Fraction = Field(1.0, description="that an operation of randaugment is done; timm's is 0.5")
    op_set: Literal["google", "timm"] = Field("google", description="randaugment's operations and their ranges")
    color_jitter: Fraction = Field(0.0, description="c: brightness, contrast, saturation times 1 - c to 1 + c")
    random_erasing_probability: Fraction = 0.0
    random_erasing_area: tuple[Fraction, Fraction] = Field(
        (0.02, 1 / 3), description="share of the image, least and most"
    )
    random_erasing_aspect_ratio: tuple[Positive, Positive] = Field(
        (0.3, 3.3), description="height / width, least and most"
    )
    random_erasing_with: Literal["noise", "mean"] = "noise"
    mixup_alpha: NotNegative = Field(0.0, description="of the Beta distribution that shares are drawn from; 0: none")
    cutmix_alpha: NotNegative = 0.0
    mix_probability: Fraction = Field(1.0, description="that a batch is mixed at all")
    mixup_switch_prob: Fraction = Field(0.5, description="that cutmix is chosen where both are on")
    repeated_aug: Count = Field(
        1, description="how often an image comes at a time; an epoch then has so many times fewer"
    )

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        for name in ("crop_scale", "crop_aspect_ratio", "random_erasing_area", "random_erasing_aspect_ratio"):
            least, most = getattr(self, name)
            if not 0.0 < least <= most:
                raise ValueError(f"{name}: [{least}, {most}] must be [least, most], both above 0")
        return self


class LossConfig(Section):
    name: Literal["softmax", "sigmoid", "bce"] = Field(
        "softmax", description="sigmoid: binary cross-entropy summed over the classes, as the seed; bce: its mean"
    )
    label_smoothing: Rate = Field(
        0.0,
        description="e; softmax and bce: targets y*(1-e) + e/classes; sigmoid, as the seed: y*(1-e) + e",
    )
    target_threshold: Rate | None = Field(None, description="sigmoid, bce: targets above it become 1, others 0")

    @model_validator(mode="after")
    def _threshold_is_of_independent_classes(self) -> LossConfig:
        if self.target_threshold is not None and self.name == "softmax":
            raise ValueError("target_threshold: is for sigmoid and bce, whose classes don't exclude each other")
        return self


class OptimConfig(Section):
    name: Literal["adamw", "sgd", "lamb", "lion", "adafactor"] = "adamw"
    lr: NotNegative = Field(1e-3, description="the schedule's peak")
    betas: tuple[Rate, Rate] = Field(
        (0.9, 0.999), description="lion's are (0.9, 0.99) in its paper; adafactor: momentum, most of the second moment"
    )
    epsilon: Positive = Field(1e-8, description="adamw's and lamb's; lamb's is 1e-6 in its paper")
    momentum: Rate = Field(0.9, description="sgd's")
    weight_decay: NotNegative = Field(
        0.0, description="decoupled, times the step's lr; sgd: an L2 term in the gradient, after clipping"
    )
    decay_times_lr: bool = Field(
        True, description="false: the decay goes with lr(step) / lr instead; not for sgd and lamb"
    )
    no_decay: tuple[Literal["bias", "norm", "embedding"], ...] = Field(
        (), description="left out of it; norm: LayerNorm, LayerScale; embedding: class token, registers, position"
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="lr times layer_decay ** (layers above); the head has none above, the embeddings all"
    )
    clip_norm: Positive | None = Field(1.0, description="of all gradients together; null: no clipping")
    ema_decay: Rate = Field(0.0, description="of the weights' moving average, evaluated beside them; 0: none")
    ema_warmup: bool = Field(True, description="at first less, so that early weights are forgotten (optim.ema_decay)")

    @model_validator(mode="after")
    def _decay_has_a_rate(self) -> OptimConfig:
        if not self.decay_times_lr and (self.name in ("sgd", "lamb") or self.lr == 0.0):
            raise ValueError("decay_times_lr = False: wants a decoupled decay (not sgd's or lamb's) and an lr above 0")
        return self


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup_steps: CountOrNone = 0
    warmup_epochs: NotNegative | None = Field(None, description="in place of warmup_steps")
    warmup_start_lr: NotNegative = Field(0.0, description="what the warmup begins at")
    end_lr: NotNegative = Field(0.0, description="what cosine and linear end at")
    decay_begins: Literal["after_warmup", "at_start"] = Field(
        "after_warmup", description="from where cosine and linear count; at_start, as timm: the warmup hides a part"
    )
    timescale: Positive = Field(10_000.0, description="rsqrt: lr / sqrt(1 + steps after the warmup / timescale)")
    cooldown_steps: CountOrNone = Field(0, description="at the end, linearly to 0")

    @model_validator(mode="after")
    def _one_warmup(self) -> ScheduleConfig:
        if self.warmup_steps and self.warmup_epochs is not None:
            raise ValueError("warmup_steps and warmup_epochs are both set; take one out")
        return self


class TrainConfig(Section):
    """How long: whichever of the first three is reached first. And what becomes of a run that loses a part of it."""

    epochs: Positive = 300.0
    max_steps: Count | None = Field(None, description="optimizer steps")
    max_images: Count | None = None
    freeze: Literal["none", "backbone"] = Field(
        "none", description="backbone: only the head is trained, a linear probe"
    )
    profile_steps: tuple[Count, Count] | None = Field(
        None, description="first and last step, from 1, of which a trace is written into the run's folder"
    )
    on_nonfinite: Literal["stop", "rollback"] = Field(
        "stop", description="gradients that aren't finite; rollback: go on from the last checkpoint without that batch"
    )
    max_rollbacks: Count = Field(3, description="in a whole run; one more stops it")
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        0, description="how often the launcher starts the processes again after a failure, from the latest checkpoint"
    )
    node_timeout_s: Annotated[float, Field(gt=0.0, le=86_400.0)] = Field(
        24.0, description="seconds of silence after which a node is taken for gone; from 30 gloo fails first"
    )

    @model_validator(mode="after")
    def _few_in_order(self) -> TrainConfig:
        if (
            self.profile_steps is not None
            and not 0 <= self.profile_steps[1] - self.profile_steps[0] < _MAX_PROFILED_STEPS
        ):
            raise ValueError(
                f"profile_steps = {list(self.profile_steps)}: set [first, last], {_MAX_PROFILED_STEPS} steps at most"
            )
        return self


class ParallelConfig(Section):
    dp: Count | Literal["auto"] = Field("auto", description="data-parallel ranks; auto: what is left of the world")
    mp: Count = Field(1, description="tensor parallel: ranks that share each layer")
    pp: Count = Field(1, description="pipeline parallel: stages of consecutive blocks")
    pp_schedule: Literal["1F1B", "FThenB"] = Field("1F1B", description="1F1B holds fewer micro-batches at a time")
    sharding_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="ZeRO over the data-parallel ranks: 1 optimizer state, 2 and gradients, 3 and parameters"
    )
    bucket_mb: NotNegative = Field(
        64.0, description="what ranks exchange together in the update, in MB; 0: each parameter's by itself"
    )
    overlap_gradients: bool = Field(True, description="begin those exchanges in the backward; needs bucket_mb > 0")
    reduce_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="gradients' on their way between ranks; needs bucket_mb > 0"
    )
    grad_accum_steps: Count = Field(1, description="micro-batches of a step; a pipeline's too, where 1 means pp")
    recompute: Literal["none", "block"] | Count = Field(
        "none", description="block: each block's activations are computed again in the backward; n: every n-th block's"
    )


class AmpConfig(Section):
    level: Literal["auto", "O0", "O1", "O2"] = Field(
        "auto", description="auto: O2 on a card; on a CPU O1 if it multiplies bfloat16 (AVX512-BF16, AMX), else O0"
    )
    dtype: Literal["auto", "bfloat16", "float16"] = Field("auto", description="auto: bfloat16")
    init_loss_scaling: Positive = Field(65536.0, description="float16's, which then follows; bfloat16 needs none")
    master_grad: bool = Field(True, description="O2: gradients in float32 for the update")
    white_list: tuple[str, ...] = Field(
        (), description="operators, by Paddle's names, in low precision besides its own"
    )
    black_list: tuple[str, ...] = Field((), description="operators that stay in float32 besides Paddle's own list")

    @model_validator(mode="after")
    def _one_list_each(self) -> AmpConfig:
        both = sorted(set(self.white_list) & set(self.black_list))
        if both:
            raise ValueError(f"white_list and black_list both name {', '.join(both)}; take it out of one")
        return self


class KernelsConfig(Section):
    """What computes the model, where Paddle's plain operators are not the quickest."""

    onednn: bool = Field(True, description="CPUs: products, attention, GELU, softmax, LayerNorm (cpu_kernels.py)")
    flash_attention: bool = Field(True, description="cards: F.scaled_dot_product_attention, pd_op.flash_attn")
    fused_linear: bool = Field(True, description="cards, O1 and O2: bias in the product; fused_gemm_epilogue_pass")
    fused_gelu: bool = Field(False, description="with its activation, by the tanh approximation")
    fused_dropout: bool = Field(True, description="cards: dropout and residual at once; fused_dropout_add_pass")


class InitConfig(Section):
    from_: str | None = Field(
        None, alias="from", description="weights: a run, a checkpoint, a .pdparams, .npz or .safetensors file"
    )
    head: Literal["reset", "keep"] = Field("reset", description="reset: a new head; keep: the file's")
    pos_embed: PosEmbedResampling = Field(
        "bicubic", description="to another grid: as the seed (bicubic), Google's (bilinear) or timm's (antialias)"
    )


class EvalConfig(Section):
    every_epochs: Positive = 1.0
    resize: Literal["short", "direct"] = Field(
        "short", description="short: the short side to image_size / crop_pct, centre crop; direct: to image_size"
    )
    crop_pct: CropPct = Field(0.875, description="224 / 0.875 = 256")
    interpolation: Interpolation = "bicubic"
    antialias: bool = True
    batch_size: Count | None = Field(None, description="over all ranks; null: the training batch size")


class CheckpointConfig(Section):
    every_steps: Count | None = Field(None, description="null: at every evaluation")
    keep_last: Count = 2
    keep_every: Count | None = Field(None, description="steps, whose multiples' checkpoints are never removed")
    on_failure: Literal["continue", "stop"] = Field(
        "continue", description="where one can't be written: train on, and try the next, or stop with exit code 1"
    )


class LogConfig(Section):
    every_steps: Count = 50
    tensorboard: bool = True


InferencePrecision = Literal["float32", "bfloat16", "float16", "int8"]


class ExportConfig(Section):
    precision: InferencePrecision = Field(
        "float32",
        description="of weights and program; bfloat16: on a CPU that multiplies it, or a card; float16: on a card; "
        "int8: weights and products, calibrated on validation images, as an ONNX file",
    )
    image_sizes: tuple[ImageSize, ...] = Field(
        (), description="() is the model's own; several are a folder each, DIR/HEIGHTxWIDTH"
    )
    pixels: bool = Field(
        False, description="also pixels.json: uint8 [B, height, width, 3] of any size to probabilities"
    )
    num_check_images: Count | None = Field(
        None, description="validation images that the export is compared on, spread over the set; null: all"
    )
    num_calibration_images: Count = Field(256, description="validation images that int8's ranges are of")


class Config(Section):
    """Everything. `name` is the run's; its folder is `output_dir`/`name`."""

    name: Annotated[str, AfterValidator(_folder_name)]
    output_dir: str = "output"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    amp: AmpConfig = AmpConfig()
    kernels: KernelsConfig = KernelsConfig()
    init: InitConfig = InitConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        parallel = self.parallel
        if parallel.reduce_dtype != "float32" and parallel.bucket_mb == 0.0:
            raise ValueError("parallel.reduce_dtype: is for exchanges in buckets; set parallel.bucket_mb above 0")
        if parallel.reduce_dtype == "float16" and self.amp.dtype == "float16":
            raise ValueError(
                "parallel.reduce_dtype = 'float16': a sum that overflows would pass float16's check of the scaled "
                "gradients, which comes before; set float32 or bfloat16"
            )
        if self.data.multi_label and self.loss.name == "softmax":
            raise ValueError("data.multi_label: an image of several labels has no softmax; set loss.name=sigmoid")
        if self.mixes and self.data.global_batch_size % 2:
            raise ValueError(
                f"data.global_batch_size = {self.data.global_batch_size}: augment.mixup_alpha and cutmix_alpha mix "
                "images in pairs; set an even one"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with each other, and so have shares of several classes."""
        return self.augment.mixup_alpha > 0.0 or self.augment.cutmix_alpha > 0.0

    @property
    def train_targets(self) -> int | None:
        """The number of classes where the training step takes targets [B, num_classes], None where labels [B]."""
        return self.model.num_classes if self.mixes or self.data.multi_label else None

    @property
    def eval_targets(self) -> int | None:
        """The same for the evaluation, which mixes nothing."""
        return self.model.num_classes if self.data.multi_label else None

    def with_several_labels(self) -> Config:
        """For evaluating images that have several labels, whatever the loss is."""
        return self.model_copy(update={"data": self.data.model_copy(update={"multi_label": True})})

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name
