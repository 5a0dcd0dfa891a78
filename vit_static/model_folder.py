"""The folder that `export` writes: its files, and the card that says what they are; without Paddle."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from vit_static.config import (
    CropRatio,
    EvalConfig,
    ImageSize,
    InferencePrecision,
    ModelConfig,
    Positive,
    Section,
    UserError,
    shortened,
)
from vit_static.data.images import MOST_PIXELS

MODEL_FILE, WEIGHTS_FILE = "model.json", "model.pdiparams"  # Paddle Inference's
PIXELS_FILE = "pixels.json"  # the same with its preprocessing, and the same weights
ONNX_FILE = "model.onnx"
CARD_FILE, MODEL_CARD_FILE = "vit_static.json", "MODEL_CARD.md"  # for programs, for people

REMEDY = "export it again: './run.sh export --checkpoint RUN --out DIR'"


class PredictError(UserError):
    """A model folder that can't be used, or an image that can't be read."""


class Preprocessing(Section):
    """How a decoded image becomes the model's input; `eval` and `data` say what the keys mean."""

    image_size: ImageSize
    resize: Literal["short", "direct"]
    crop_ratio: CropRatio
    interpolation: Literal["bilinear", "bicubic"]
    antialias: bool
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]

    def as_evaluation(self) -> EvalConfig:
        return EvalConfig(
            resize=self.resize,
            crop_ratio=self.crop_ratio,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )


class FileRecord(Section):
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


class Card(Section):
    """The small file beside the exported model: what its input and its classes are, and what its files are known by.

    Paddle Inference trusts its files, and dies of a damaged one: none is given to it that isn't what was written.
    """

    class_names: list[str]
    preprocessing: Preprocessing
    activation: Literal["softmax", "sigmoid", "bce"]
    model: ModelConfig
    precision: InferencePrecision = "float32"
    int8_weight_bits: Literal[7] | None = Field(
        None, description="of an int8 model; None: 8 bits, of an earlier version, whose products saturate without VNNI"
    )
    files: dict[str, FileRecord]
    comparisons: dict[str, Comparison] = Field({}, description="by file")

    @model_validator(mode="after")
    def _of_one_model(self) -> Card:
        if self.preprocessing.image_size != self.model.image_size:
            raise ValueError("its preprocessing and its model have other image sizes")
        if math.prod(self.model.image_size) > MOST_PIXELS:
            raise ValueError(f"its images have more than {MOST_PIXELS} pixels")
        if len(self.class_names) != self.model.num_classes:
            raise ValueError(f"it names {len(self.class_names)} classes, and its model has {self.model.num_classes}")
        return self

    @property
    def program_files(self) -> tuple[str, ...]:
        """What predicting needs of the folder: an int8 model is ONNX Runtime's, all others are Paddle Inference's."""
        return (ONNX_FILE,) if self.precision == "int8" else (MODEL_FILE, WEIGHTS_FILE)


def manifest(folder: Path) -> dict[str, FileRecord]:
    """What the files of an exported model are known by, for its card."""
    known = (MODEL_FILE, WEIGHTS_FILE, PIXELS_FILE, ONNX_FILE)
    return {name: record(folder / name) for name in known if (folder / name).is_file()}


def record(path: Path) -> FileRecord:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(size=path.stat().st_size, sha256=digest.hexdigest())


def read_card(folder: Path) -> Card:
    """Raises PredictError where a file is missing, isn't what `export` writes, or isn't what it wrote."""
    path = folder / CARD_FILE
    if not path.is_file():
        sizes = sorted(inside.parent.name for inside in folder.glob(f"*/{CARD_FILE}"))
        if sizes:
            raise PredictError(f"{folder}: holds a model for each of several image sizes: {', '.join(sizes)}; name one")
        raise PredictError(f"{path}: no such file; --model takes a folder that './run.sh export' wrote")
    try:
        card = Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        mistake = error.errors(include_input=False, include_url=False)[0]
        if mistake["loc"] == ("files",) and mistake["type"] == "missing":
            raise PredictError(
                f"{path}: is of an older version's export, without the sizes and digests of its files; {REMEDY}"
            ) from None
        place = shortened(".".join(map(str, mistake["loc"]))) or "it"
        said = shortened(mistake["msg"].removeprefix("Value error, "))
        raise PredictError(f"{path}: is not a card of an exported model ({place}: {said}); {REMEDY}") from None
    for name in card.program_files:
        if not (folder / name).is_file():
            raise PredictError(f"{folder / name}: no such file; --model takes a folder that './run.sh export' wrote")
        if name not in card.files:
            raise PredictError(f"{path}: has no record of {name}; {REMEDY}")
        if record(folder / name) != card.files[name]:
            raise PredictError(
                f"{folder / name}: is damaged, or of another export than {CARD_FILE} beside it; copy the folder again, "
                f"or {REMEDY}"
            )
    return card
