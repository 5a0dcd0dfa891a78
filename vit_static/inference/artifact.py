"""The folder that `export` writes: its files and their description, `vit_static.json`; needs no Paddle."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from vit_static.checkpoint.folder import MERGED, META
from vit_static.common.errors import ConfigError, PredictError, newer_format, truncate
from vit_static.common.io import FileRecord, file_record
from vit_static.config.data_schema import EvalConfig
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config, InferencePrecision
from vit_static.config.section import (
    CropPct,
    Fraction,
    ImageSize,
    Level,
    PerChannel,
    PositiveFloat,
    PositivePerChannel,
    Section,
)
from vit_static.data.image_pixels import MAX_PIXELS, DecodeOptions
from vit_static.model.variants import num_parameters

MODEL_FILE, WEIGHTS_FILE = "model.json", "model.pdiparams"  # the program and the weights, for Paddle Inference
PIXELS_FILE = "pixels.json"  # the program with its preprocessing; uses the same weights
ONNX_FILE = "model.onnx"
OPENVINO_CHECK = "model.onnx in OpenVINO"  # the name of the comparison of ONNX_FILE as OpenVINO runs it
SPEC_FILE = "vit_static.json"  # the description for programs
MODEL_CARD_FILE = "MODEL_CARD.md"  # the description for people

# Format 1 had no such field. Since 2 a file's size is `num_bytes`, and `model` and `preprocessing` have today's keys.
SPEC_FORMAT: Literal[2] = 2
# A lower bound on a parameter's size in an exported file
_MIN_BYTES_PER_VALUE: dict[InferencePrecision, int] = {"float32": 2, "bfloat16": 2, "float16": 2, "int8": 1}
REMEDY = "export it again: './run.sh export --checkpoint RUN --out DIR'"
_NOT_EXPORTED = "no such file; --model takes a folder that './run.sh export' wrote"


class Preprocessing(Section):
    """Preprocessing from an image file to the model's input; the keys mean what they mean in `eval` and `data`.

    Without a record of orientation and background, a model was trained with orientations ignored and transparency
    dropped, as an earlier version read images.
    """

    image_size: ImageSize
    resize: Literal["short", "direct"]
    crop_pct: CropPct
    interpolation: Literal["bilinear", "bicubic"]
    antialias: bool
    mean: PerChannel
    std: PositivePerChannel
    orientation: Literal["apply", "ignore"] = "ignore"
    background: tuple[Level, Level, Level] | None = None

    def to_decode_options(self) -> DecodeOptions:
        """Return how image files are decoded."""
        return DecodeOptions(self.orientation, self.background)

    def to_eval_config(self) -> EvalConfig:
        """Return the keys that belong to the config's `eval` section."""
        return EvalConfig(
            resize=self.resize,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )


class Comparison(Section):
    """Difference between an exported file and the trained model in float32, measured on validation images.

    A model without a head has no classes to compare.
    """

    num_images: int
    largest_difference: float  # of a logit, or without a head of a feature; for PIXELS_FILE, of a probability
    bound: float  # the largest difference that was allowed
    same_class: float | None = None  # per cent of the images for which both predict the same class
    top1_trained: float | None = None  # per cent
    top1_exported: float | None = None  # per cent


class ModelSpec(Section):
    """Description of an exported model: preprocessing, classes, architecture, and a record of each file.

    Paddle Inference doesn't validate its files, and a damaged one ends the process. Therefore each file is compared
    with its record before it is opened.
    """

    format: Literal[2]
    name: str = Field("", description="of the run; an earlier version wrote none")
    class_names: list[str]
    preprocessing: Preprocessing
    activation: Literal["softmax", "sigmoid", "bce"]
    temperature: PositiveFloat = Field(1.0, description="by which the logits of all files are divided already")
    thresholds: list[Fraction] | None = Field(
        None, description="by class: the probability from which it is returned; None: the most likely classes are"
    )
    model: ModelConfig
    precision: InferencePrecision = "float32"
    int8_weight_bits: Literal[7] | None = Field(
        None, description="of an int8 model; None: 8 bits, written by an earlier version, which saturate without VNNI"
    )
    files: dict[str, FileRecord]
    comparisons: dict[str, Comparison] = Field({}, description="by file, and for OPENVINO_CHECK")

    @model_validator(mode="after")
    def _check_consistency(self) -> ModelSpec:
        if self.preprocessing.image_size != self.model.image_size:
            raise ValueError("the image sizes of its preprocessing and its model differ")
        if not len(self.preprocessing.mean) == len(self.preprocessing.std) == self.model.num_channels:
            raise ValueError("the number of channels of its preprocessing and its model differ")
        if math.prod(self.model.image_size) > MAX_PIXELS:
            raise ValueError(f"its images have more than {MAX_PIXELS} pixels")
        if len(self.class_names) != self.model.num_classes:
            raise ValueError(f"it names {len(self.class_names)} classes, and its model has {self.model.num_classes}")
        if self.thresholds is not None and len(self.thresholds) != len(self.class_names):
            raise ValueError(f"it has {len(self.thresholds)} thresholds for {len(self.class_names)} classes")
        return self

    @property
    def program_files(self) -> tuple[str, ...]:
        """The files that prediction needs: an int8 model runs in ONNX Runtime, all others in Paddle Inference."""
        return (ONNX_FILE,) if self.precision == "int8" else (MODEL_FILE, WEIGHTS_FILE)


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Return the records of those program files that are in `folder`, by name."""
    names = (MODEL_FILE, WEIGHTS_FILE, PIXELS_FILE, ONNX_FILE)
    return {name: file_record(folder / name) for name in names if (folder / name).is_file()}


def read_spec(folder: Path) -> ModelSpec:
    """Read an exported model's description and verify its files.

    Raises PredictError if a file is missing or damaged, or if the folder isn't one that `export` wrote.
    """
    path = folder / SPEC_FILE
    if not path.is_file():
        sizes = sorted(file.parent.name for file in folder.glob(f"*/{SPEC_FILE}"))
        if sizes:
            raise PredictError(f"{folder}: contains one model per image size; name one of them: {', '.join(sizes)}")
        if any((folder / name).exists() for name in (MERGED, "checkpoints", META)):
            raise PredictError(
                f"{folder}: is a run, not an exported model; export it first: "
                f"'./run.sh export --checkpoint {shlex.quote(str(folder))} --out DIR'"
            )
        raise PredictError(f"{path}: {_NOT_EXPORTED}")
    content = path.read_bytes()
    try:
        spec = ModelSpec.model_validate_json(content)
    except ValidationError as error:
        if newer := newer_format(_format_in(content), SPEC_FORMAT):
            raise PredictError(f"{path}: {newer}; use that version, or {REMEDY}") from None
        mistake = error.errors(include_input=False, include_url=False)[0]
        if mistake["loc"] == ("format",):
            raise PredictError(
                f"{path}: is from another version's export, and this version reads format {SPEC_FORMAT}; {REMEDY}"
            ) from None
        key = truncate(".".join(map(str, mistake["loc"]))) or "all of it"
        reason = truncate(mistake["msg"].removeprefix("Value error, "))
        raise PredictError(f"{path}: does not describe an exported model ({key}: {reason}); {REMEDY}") from None
    for name in spec.program_files:
        if not (folder / name).is_file():
            raise PredictError(f"{folder / name}: {_NOT_EXPORTED}")
        if name not in spec.files:
            raise PredictError(f"{path}: has no record of {name}; {REMEDY}")
        if file_record(folder / name) != spec.files[name]:
            raise PredictError(
                f"{folder / name}: is damaged, or belongs to another export than {SPEC_FILE} beside it; copy the "
                f"folder again, or {REMEDY}"
            )
    _check_size(spec, path)
    return spec


def _check_size(spec: ModelSpec, path: Path) -> None:
    """Raise PredictError unless the file of weights is large enough for the model, before anybody builds the model."""
    name = ONNX_FILE if spec.precision == "int8" else WEIGHTS_FILE
    try:
        # Fixed position embeddings are in the file too.
        update = {} if spec.model.pos_embed == "none" else {"pos_embed": "learn"}
        num_values = num_parameters(spec.model.model_copy(update=update))
    except ConfigError as error:
        raise PredictError(f"{path}: does not describe an exported model ({error}); {REMEDY}") from None
    num_bytes = spec.files[name].num_bytes
    if num_values * _MIN_BYTES_PER_VALUE[spec.precision] > num_bytes:
        raise PredictError(
            f"{path}: describes a larger model than the weights of {num_bytes} bytes in {name}; {REMEDY}"
        )


def _format_in(content: bytes) -> Any:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return values.get("format") if isinstance(values, dict) else None


def spec_of(config: Config, class_names: list[str]) -> ModelSpec:
    """Return the description of the config's model, without file records."""
    return ModelSpec(
        format=SPEC_FORMAT,
        name=config.name,
        class_names=class_names,
        preprocessing=Preprocessing(
            image_size=config.model.image_size,
            resize=config.eval.resize,
            crop_pct=config.eval.crop_pct,
            interpolation=config.eval.interpolation,
            antialias=config.eval.antialias,
            mean=config.data.mean,
            std=config.data.std,
            orientation=config.data.orientation,
            background=config.data.background,
        ),
        activation=config.loss.name,
        model=config.model,
        precision=config.export.precision,
        files={},
    )
