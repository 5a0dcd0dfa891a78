"""What a run can be told: typed, frozen sections, with every default; YAML files, ``-o`` overrides, validation.

A config file holds only what differs from the defaults below. `load` puts file and overrides together and raises
`ConfigError`, in one line that names the key and the remedy, for anything that it doesn't know.
"""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vit_static.files import write_atomically
from vit_static.yaml_text import DuplicateKeyError, WrittenFloat, WrittenInt, YamlError, read_yaml

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
CountOrNone = Annotated[int, Field(ge=0, lt=2**63)]  # which may be 0
Pixels = Annotated[int, Field(ge=1, le=100_000)]
CropRatio = Annotated[float, Field(ge=0.05, le=1.0)]  # less would enlarge an image to hundreds of megapixels
Interpolation = Literal["bilinear", "bicubic"]
PosEmbedResampling = Literal["bicubic", "bilinear", "antialias"]

_MOST_PROFILED = 1000  # steps, each of thousands of operators
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT_CONFIGS = {"pretrain": CONFIGS / "quickstart.yaml", "finetune": CONFIGS / "quickstart_finetune.yaml"}  # by verb


class UserError(ValueError):
    """A user's mistake: a message of one line that names the thing and the remedy, whatever a name in it holds.

    What a terminal would obey is shown by its escape.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(
            line
            if line.isprintable()
            else "".join(
                character if character.isprintable() else character.encode("unicode_escape").decode()
                for character in line
            )
        )


class RunFailed(RuntimeError):
    """What ends a run though the command was right, in words for people: exit code 1."""


class ConfigError(UserError):
    """A mistake in a config file or an override."""


def shortened(text: str, most: int = 100) -> str:
    """A text as a message has it: its beginning."""
    return text if len(text) <= most else f"{text[:most]}..."


def shown(value: Any, most: int = 100) -> str:
    """A value as a message has it: its beginning, whatever it is; aliases in YAML make 2**60 values of a few lines."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    return shortened(text, most)


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 3, 12, 6, 90, 90, 90


def _height_and_width(value: Any) -> Any:
    """An image size may be one number, for a square."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


ImageSize = Annotated[tuple[Pixels, Pixels], BeforeValidator(_height_and_width)]


def _folder_name(name: str) -> str:
    """That of a run's folder, which must not lead out of `output_dir`."""
    if not name or "/" in name or "\\" in name or not (name[0].isalnum() or name[0] == "_"):
        raise ValueError(
            f"{shown(name)} must be a folder's name: a letter, a digit or _ first, no slash; set name=NAME"
        )
    if len(os.fsencode(name)) > 200:
        raise ValueError(f"{shown(name)} is longer than a folder's name may be; set name=NAME")
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
                raise ValueError(f"{shown(value)} has a control character in it")
        return value


class ModelConfig(Section):
    variant: str = Field("B/16", description="a name of model.VARIANTS; `patch_size` to `mlp_dim` override it")
    image_size: ImageSize = Field((224, 224), description="pixels: a number, or [height, width]")
    num_classes: Count = 1000
    pool: Literal["cls", "gap", "cls_gap"] = Field(
        "cls", description="what the head reads: the class token's state, the patches' mean, both side by side"
    )
    class_token: bool | None = Field(None, description="null: where `pool` reads it")
    class_position: bool = Field(True, description="the class token has a position embedding, too")
    register_tokens: CountOrNone = Field(0, description="without a position (arXiv 2309.16588)")
    norm_after_pool: bool = Field(False, description="the last norm is of the pooled state, not of the tokens'")
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
        return int(self.has_class_token and self.class_position)


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

    crop_area: tuple[Fraction, Fraction] = Field((0.08, 1.0), description="share of the image, least and most")
    crop_aspect: tuple[Positive, Positive] = Field((3 / 4, 4 / 3), description="width / height, least and most")
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
    erase_probability: Fraction = 0.0
    erase_area: tuple[Fraction, Fraction] = Field((0.02, 1 / 3), description="share of the image, least and most")
    erase_aspect: tuple[Positive, Positive] = Field((0.3, 3.3), description="height / width, least and most")
    erase_with: Literal["noise", "mean"] = "noise"
    mixup_alpha: NotNegative = Field(0.0, description="of the Beta distribution that shares are drawn from; 0: none")
    cutmix_alpha: NotNegative = 0.0
    mix_probability: Fraction = Field(1.0, description="that a batch is mixed at all")
    mix_switch: Fraction = Field(0.5, description="that cutmix is chosen where both are on")
    repeats: Count = Field(1, description="how often an image comes at a time; an epoch then has so many times fewer")

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        for name in ("crop_area", "crop_aspect", "erase_area", "erase_aspect"):
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
    frozen: Literal["none", "body"] = Field("none", description="body: only the head is trained, a linear probe")
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
        if self.profile_steps is not None and not 0 <= self.profile_steps[1] - self.profile_steps[0] < _MOST_PROFILED:
            raise ValueError(
                f"profile_steps = {list(self.profile_steps)}: must be [first, last], of {_MOST_PROFILED} steps at most"
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
        "short", description="short: the short side to image_size / crop_ratio, centre crop; direct: to image_size"
    )
    crop_ratio: CropRatio = Field(0.875, description="224 / 0.875 = 256")
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


def load(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """The config of a YAML file (or of the defaults alone) with ``section.key=value`` overrides on top.

    Raises ConfigError for a file that can't be read, and for keys, types and values that aren't right.
    """
    values = {} if path is None else _read_yaml(path)
    values.setdefault("name", "run" if path is None else path.stem)
    overridden = {tuple(_apply_override(values, override)): override for override in overrides}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        place = error.errors()[0]["loc"]
        override = next((text for key, text in overridden.items() if place[: len(key)] == key), None)
        origin = f"-o {shortened(override or '')}" if override is not None or path is None else path
        raise ConfigError(f"{origin}: {_first_mistake(error)}") from None


def dump(config: Config, path: Path) -> None:
    """Writes the resolved config, every key of it, so that `load` gives it back."""
    with write_atomically(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False))


_MOST_BYTES = 256 * 1024  # of a config file


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path}: is longer than {_MOST_BYTES // 1024} KiB, which no config is")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read ({error.strerror}); -c takes a YAML file, such as those in configs/"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; -c takes a YAML file") from None
    try:
        values = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold keys and values, not {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> list[str]:
    """Sets the override's key in `values`; returns the key's path."""
    key, separator, text = override.partition("=")
    said = f"-o {shortened(override)}"
    if not separator or not key:
        raise ConfigError(f"{said}: must be section.key=value, such as -o optim.lr=3e-3")
    try:
        value = read_yaml(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{said}: {error}") from None
    except YamlError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        found = values.setdefault(section, {})
        if not isinstance(found, dict):
            raise ConfigError(f"{said}: {shortened(section)} is not a section")
        values[section] = dict(found)  # which an alias in the file may have made another section's, too
        values = values[section]
    values[last] = value
    return [*sections, last]


def _first_mistake(error: ValidationError) -> str:
    """One line for the first of pydantic's errors: the key's path, its value, what is wrong, the nearest key."""
    mistake = error.errors()[0]
    path = [shortened(str(part)) for part in mistake["loc"][: 2 if _section(mistake["loc"][:1]) else 1]]
    key = ".".join(path)
    if mistake["type"] == "extra_forbidden":
        siblings = [field.alias or name for name, field in (_section(path[:-1]) or Config).model_fields.items()]
        nearest = difflib.get_close_matches(path[-1], siblings, n=1)
        if nearest:
            return f"{key} is not a key; did you mean {'.'.join([*path[:-1], *nearest])}?"
        return f"{key} is not a key; there are {', '.join(siblings)}"
    if mistake["type"] in ("model_type", "dict_type"):
        return f"{key} = {shown(mistake['input'])}: is a section, whose keys stand below it, as in -o {key}.KEY=VALUE"
    problem = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{key}: {problem}" if key else problem
    return f"{key} = {shown(mistake['input'])}: {problem[0].lower()}{problem[1:]}"


def _section(path: Sequence[Any]) -> type[Section] | None:
    """The section that a path of one name leads to, if it is one."""
    annotation = Config.model_fields[str(path[0])].annotation if path and path[0] in Config.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


_ENDLESS = 2.0**62  # images; more epochs than that make no whole number of steps


def total_steps(train: TrainConfig, num_images: int, global_batch_size: int) -> int:
    """Optimizer steps of a run: whole batches of the images that it has, at least one."""
    images = min(train.epochs * num_images, _ENDLESS)
    if train.max_images is not None:
        images = min(images, train.max_images)
    steps = max(1, math.floor(images / global_batch_size + 1e-9))
    return steps if train.max_steps is None else min(steps, train.max_steps)


def warmup_steps(schedule: ScheduleConfig, num_images: int, global_batch_size: int) -> int:
    """Optimizer steps of the warmup."""
    if schedule.warmup_epochs is None:
        return schedule.warmup_steps
    return round(min(schedule.warmup_epochs * num_images, _ENDLESS) / global_batch_size)
