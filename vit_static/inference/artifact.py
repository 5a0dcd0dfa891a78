"""The folder that `export` writes: its files, and the card that says what they are; without Paddle."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from vit_static.common.errors import PredictError, truncate
from vit_static.config.schema import (
    Config,
    CropPct,
    EvalConfig,
    ImageSize,
    InferencePrecision,
    ModelConfig,
    Positive,
    Section,
)
from vit_static.data.image_set import MAX_PIXELS

MODEL_FILE, WEIGHTS_FILE = "model.json", "model.pdiparams"  # Paddle Inference's
PIXELS_FILE = "pixels.json"  # the same with its preprocessing, and the same weights
ONNX_FILE = "model.onnx"
SPEC_FILE, MODEL_CARD_FILE = "vit_static.json", "MODEL_CARD.md"  # for programs, for people

REMEDY = "export it again: './run.sh export --checkpoint RUN --out DIR'"


class Preprocessing(Section):
    """How a decoded image becomes the model's input; `eval` and `data` say what the keys mean."""

    image_size: ImageSize
    resize: Literal["short", "direct"]
    crop_pct: CropPct
    interpolation: Literal["bilinear", "bicubic"]
    antialias: bool
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]

    def as_evaluation(self) -> EvalConfig:
        return EvalConfig(
            resize=self.resize,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )


class ArtifactFile(Section):
    """What a file is known by."""

    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: str


class Comparison(Section):
    """What `export` found when it ran the trained model, in float32, and a file of the folder on validation images."""

    num_images: int
    largest_difference: float  # of a logit
    bound: float  # that it was held to
    same_class: float  # per cent of the images whose likeliest class is the same
    top1_trained: float  # per cent
    top1_exported: float


class ModelSpec(Section):
    """The small file beside the exported model: what its input and its classes are, and what its files are known by.

    Paddle Inference trusts its files, and dies of a damaged one: none is given to it that isn't what was written.
    """

    class_names: list[str]
    preprocessing: Preprocessing
    activation: Literal["softmax", "sigmoid", "bce"]
    model: ModelConfig
    precision: InferencePrecision = "float32"
    files: dict[str, ArtifactFile]
    comparisons: dict[str, Comparison] = Field({}, description="by file")

    @model_validator(mode="after")
    def _of_one_model(self) -> ModelSpec:
        if self.preprocessing.image_size != self.model.image_size:
            raise ValueError("its preprocessing and its model have other image sizes")
        if math.prod(self.model.image_size) > MAX_PIXELS:
            raise ValueError(f"its images have more than {MAX_PIXELS} pixels")
        if len(self.class_names) != self.model.num_classes:
            raise ValueError(f"it names {len(self.class_names)} classes, and its model has {self.model.num_classes}")
        return self

    @property
    def program_files(self) -> tuple[str, ...]:
        """What predicting needs of the folder: an int8 model is ONNX Runtime's, all others are Paddle Inference's."""
        return (ONNX_FILE,) if self.precision == "int8" else (MODEL_FILE, WEIGHTS_FILE)


def manifest(folder: Path) -> dict[str, ArtifactFile]:
    """What the files of an exported model are known by, for its card."""
    known = (MODEL_FILE, WEIGHTS_FILE, PIXELS_FILE, ONNX_FILE)
    return {name: file_record(folder / name) for name in known if (folder / name).is_file()}


def file_record(path: Path) -> ArtifactFile:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return ArtifactFile(size=path.stat().st_size, sha256=digest.hexdigest())


def read_spec(folder: Path) -> ModelSpec:
    """Raises PredictError where a file is missing, isn't what `export` writes, or isn't what it wrote."""
    path = folder / SPEC_FILE
    if not path.is_file():
        sizes = sorted(inside.parent.name for inside in folder.glob(f"*/{SPEC_FILE}"))
        if sizes:
            raise PredictError(f"{folder}: holds a model for each of several image sizes: {', '.join(sizes)}; name one")
        raise PredictError(f"{path}: no such file; --model takes a folder that './run.sh export' wrote")
    try:
        card = ModelSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        mistake = error.errors(include_input=False, include_url=False)[0]
        if mistake["loc"] == ("files",) and mistake["type"] == "missing":
            raise PredictError(
                f"{path}: is of an older version's export, without the sizes and digests of its files; {REMEDY}"
            ) from None
        place = truncate(".".join(map(str, mistake["loc"]))) or "it"
        said = truncate(mistake["msg"].removeprefix("Value error, "))
        raise PredictError(f"{path}: is not a card of an exported model ({place}: {said}); {REMEDY}") from None
    for name in card.program_files:
        if not (folder / name).is_file():
            raise PredictError(f"{folder / name}: no such file; --model takes a folder that './run.sh export' wrote")
        if name not in card.files:
            raise PredictError(f"{path}: has no record of {name}; {REMEDY}")
        if file_record(folder / name) != card.files[name]:
            raise PredictError(
                f"{folder / name}: is damaged, or of another export than {SPEC_FILE} beside it; copy the folder again, "
                f"or {REMEDY}"
            )
    return card


pass


def spec_of(config: Config, class_names: list[str]) -> ModelSpec:
    """What the card of a config's model says, before there are files."""
    return ModelSpec(
        class_names=class_names,
        preprocessing=Preprocessing(
            image_size=config.model.image_size,
            resize=config.eval.resize,
            crop_pct=config.eval.crop_pct,
            interpolation=config.eval.interpolation,
            antialias=config.eval.antialias,
            mean=config.data.mean,
            std=config.data.std,
        ),
        activation=config.loss.name,
        model=config.model,
        precision=config.export.precision,
        files={},
    )
