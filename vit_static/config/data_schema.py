"""Config schema of images and labels: how they are read, augmented and evaluated, and the loss."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vit_static.config.section import (
    CropPct,
    Fraction,
    FractionRange,
    Level,
    NonNegativeFloat,
    PerChannel,
    PositiveFloat,
    PositiveInt,
    PositivePerChannel,
    Range,
    Rate,
    Section,
)
from vit_static.config.yaml_loader import WrittenFloat, WrittenInt

Interpolation = Literal["bilinear", "bicubic"]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
SelectionMetric = Literal["top1", "map", "macro_f1", "balanced_accuracy", "loss"]


class DataConfig(Section):
    """The data set and how it is read."""

    root: str = Field("data/imagenet", description="folder that contains `train` and `val`")
    prepare: Literal["digits", "digits_parity"] | None = Field(
        None,
        description="create this data set as `root` if that folder doesn't exist; null: don't. -o data.root=DIR turns "
        "it off",
    )
    train: str = Field(
        "train", description="below root: class folders, a list file, a table, or a folder of WebDataset shards"
    )
    val: str = Field("val", description="below root, in the same formats")
    path_column: str = Field(
        "path", description="tables (.csv, .tsv, .parquet): column of the images' paths below root"
    )
    label_column: str | tuple[str, ...] = Field(
        "label", description="tables: column of the labels; or a list of columns, one per class, that have 0 or 1"
    )
    label_separator: str | None = Field(None, description="tables: what separates several labels in a cell")
    label_type: Literal["auto", "number", "name"] = Field(
        "auto", description="tables: labels are numbers of classes or names; auto: numbers if all of them are"
    )
    first_label: Annotated[int, Field(ge=0, le=1)] = Field(0, description="lists, tables: the first class's number")
    multi_label: bool = Field(False, description="an image may have several labels; needs loss.name = sigmoid or bce")
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="skip: omit images that `data check` has listed; an unlisted unreadable image always stops"
    )
    sampler: Literal["shuffle", "balanced"] = Field(
        "shuffle", description="shuffle: each image once per epoch; balanced: images of each class equally often"
    )
    orientation: Literal["apply", "ignore"] = Field(
        "apply", description="the orientation of a photo (EXIF, XMP, TIFF): turn the image upright, or ignore it"
    )
    background: tuple[Level, Level, Level] | None = Field(
        (255, 255, 255), description="RGB, 0 to 255, behind transparent pixels; null: show their hidden colours"
    )
    global_batch_size: PositiveInt = Field(1024, description="images per optimizer step, over all ranks")
    num_threads: PositiveInt = Field(4, description="DALI's CPU threads per rank")
    num_readers: PositiveInt = Field(4, description="threads per rank that read files ahead of DALI")
    prefetch_batches: PositiveInt = Field(2, description="batches that DALI prepares ahead")
    hw_decoder_load: Fraction = Field(
        0.65, description="share of the images that a GPU's JPEG hardware decodes, where it has any (A100, H100)"
    )
    read_timeout_s: PositiveFloat = Field(120.0, description="seconds after which a stalled read is an error")
    mean: PerChannel = Field(
        (0.5, 0.5, 0.5),
        description="of RGB pixels in 0-1, or one value with model.num_channels=1 (default: 0.5); inputs are (pixel - "
        "mean) / std",
    )
    std: PositivePerChannel = Field(
        (0.5, 0.5, 0.5), description="of RGB pixels in 0-1, or one value with model.num_channels=1, likewise"
    )

    @property
    def num_channels(self) -> int:
        """Number of channels of the model's inputs: 1 for greyscale, 3 for RGB."""
        return len(self.mean)

    @field_validator("label_column", mode="before")
    @classmethod
    def _columns_as_written(cls, value: Any) -> Any:
        """Accept numbers as names of columns, as they were written."""
        if not isinstance(value, list | tuple):
            return value
        return [item.text if isinstance(item, WrittenInt | WrittenFloat) else item for item in value]

    @model_validator(mode="after")
    def _check_label_columns(self) -> DataConfig:
        columns = self.label_column
        if not columns or (not isinstance(columns, str) and len(set(columns)) < len(columns)):
            raise ValueError("label_column: must be the name of a column, or a list of different ones")
        if self.label_separator == "":
            raise ValueError("label_separator: is empty; set the text between labels, in quotes ('\"|\"'), or null")
        return self


class AugmentConfig(Section):
    """Augmentation of training images, in this order: random resized crop, flip, the policy's operations, colour
    jitter, random erasing; then mixup or CutMix of a batch."""

    crop_scale: FractionRange = Field((0.08, 1.0), description="share of the image's area: [min, max]")
    crop_aspect_ratio: Range = Field((3 / 4, 4 / 3), description="width / height: [min, max]")
    crop_method: Literal["torchvision", "plsc"] = Field(
        "torchvision",
        description="torchvision: the aspect ratio is uniform in its logarithm, and crops that don't fit are drawn "
        "again, ten times at most; plsc: it is uniform, and the area is limited to what fits",
    )
    interpolation: Interpolation = Field("bicubic", description="filter that resizes the crop")
    antialias: bool = Field(True, description="low-pass filter when reducing the size, as Pillow does")
    flip_probability: Fraction = Field(0.5, description="probability of a horizontal flip")
    policy: Literal["none", "randaugment", "trivialaugment", "three_augment"] = Field(
        "none", description="which operations are drawn for each image"
    )
    num_ops: PositiveInt = Field(2, description="randaugment's n: number of operations per image")
    magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = Field(9.0, description="randaugment's m, 0 to 10")
    magnitude_std: NonNegativeFloat = Field(0.0, description="standard deviation of the magnitude; 0.5 in DeiT")
    op_probability: Fraction = Field(1.0, description="probability of applying each of randaugment's operations")
    op_set: Literal["google", "timm"] = Field("google", description="randaugment's operations and their ranges")
    color_jitter: Fraction = Field(0.0, description="c: brightness, contrast and saturation times 1 - c to 1 + c")
    random_erasing_probability: Fraction = Field(0.0, description="probability of erasing a rectangle of an image")
    random_erasing_area: FractionRange = Field((0.02, 1 / 3), description="share of the image: [min, max]")
    random_erasing_aspect_ratio: Range = Field((0.3, 3.3), description="height / width of the rectangle: [min, max]")
    random_erasing_with: Literal["noise", "mean"] = Field("noise", description="content of the erased rectangle")
    mixup_alpha: NonNegativeFloat = Field(0.0, description="parameter of mixup's Beta distribution; 0: no mixup")
    cutmix_alpha: NonNegativeFloat = Field(0.0, description="parameter of CutMix's Beta distribution; 0: no CutMix")
    mix_probability: Fraction = Field(1.0, description="probability that a batch is mixed")
    mixup_switch_prob: Fraction = Field(0.5, description="probability of CutMix for a batch if both are enabled")
    repeated_aug: PositiveInt = Field(
        1, description="repeated augmentation: an image occurs this often in a row; an epoch then has fewer images"
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> AugmentConfig:
        for name in ("crop_scale", "crop_aspect_ratio", "random_erasing_area", "random_erasing_aspect_ratio"):
            minimum, maximum = getattr(self, name)
            if not 0.0 < minimum <= maximum:
                raise ValueError(f"{name}: [{minimum}, {maximum}] must be [min, max], both above 0")
        return self


class LossConfig(Section):
    """The training loss."""

    name: Literal["softmax", "sigmoid", "bce"] = Field(
        "softmax", description="sigmoid: binary cross-entropy summed over the classes, as in PLSC; bce: its mean"
    )
    label_smoothing: Rate = Field(
        0.0, description="e; targets are y*(1-e) + e/classes for softmax and bce, y*(1-e) + e for sigmoid, as in PLSC"
    )
    target_threshold: Rate | None = Field(None, description="sigmoid, bce: targets above it become 1, others 0")
    class_weights: str = Field(
        "none",
        description="weights of the classes' images: none, balanced (images / (classes * images of the class)), or a "
        "file with one number per line in the order of the classes, or a class's name and its number",
    )
    pos_weight: str = Field(
        "1",
        description="sigmoid, bce: weight of a class's positives: a number, balanced (negatives / positives) or "
        "a file as for class_weights",
    )
    focal_gamma: NonNegativeFloat = Field(0.0, description="focal loss's gamma (arXiv 1708.02002); 0: off")

    @model_validator(mode="after")
    def _check_target_threshold(self) -> LossConfig:
        if self.target_threshold is not None and self.name == "softmax":
            raise ValueError("target_threshold: needs independent classes; set name=sigmoid or name=bce, or remove it")
        return self

    @model_validator(mode="after")
    def _check_pos_weight(self) -> LossConfig:
        number = self.pos_weight_number
        if number is not None and not 0.0 < number < math.inf:
            raise ValueError(f"pos_weight = {self.pos_weight}: must be above 0")
        if number != 1.0 and self.name == "softmax":
            raise ValueError("pos_weight: needs independent classes; set name=sigmoid or name=bce, or class_weights")
        return self

    @property
    def pos_weight_number(self) -> float | None:
        """The positives' weight if it is the same number for all classes, else None."""
        try:
            return float(self.pos_weight)
        except ValueError:
            return None


class EvalConfig(Section):
    """Evaluation on the validation images."""

    every_epochs: PositiveFloat = Field(1.0, description="epochs between two evaluations; may be fractional")
    resize: Literal["short", "direct"] = Field(
        "short",
        description="short: resize the short side to image_size / crop_pct, then crop the centre; "
        "direct: resize to image_size",
    )
    crop_pct: CropPct = Field(0.875, description="image_size / short side before the crop: 224 / 0.875 = 256")
    interpolation: Interpolation = Field("bicubic", description="filter that resizes the image")
    antialias: bool = Field(True, description="low-pass filter when reducing the size, as Pillow does")
    batch_size: PositiveInt | None = Field(None, description="over all ranks; null: data.global_batch_size")
    metric: SelectionMetric | None = Field(
        None,
        description="decides which checkpoint is `best`, and when train.patience ends a run; null: top1, or map with "
        "data.multi_label",
    )
    also: dict[SetName, str] = Field(
        {},
        description="further validation sets, {NAME: PATH}: ReaL's real.json, or class folders (all or some of the "
        "classes, ImageNet-V2, or ImageNet-C); each is evaluated with the validation images",
    )
    threshold: Fraction = Field(
        0.5, description="data.multi_label: probability from which a class is predicted, for precision, recall and F1"
    )
