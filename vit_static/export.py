"""Files for Paddle Inference from a trained model, and the proof that they answer as it does; the verb `export`."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

from vit_static import model as model_module
from vit_static.checkpoint import load_weights
from vit_static.config import Config, InitConfig, RunFailed, UserError
from vit_static.data.images import ImageSet
from vit_static.data.sets import open_set
from vit_static.predict import CARD_FILE, MODEL_FILE, Card, FileRecord, Predictor, Preprocessing, manifest, read_pixels
from vit_static.weights import init_from

# Of a logit, by precision: in float32 absolute, in the others times the logits' standard deviation.
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.03}


class ExportError(RunFailed):
    """The exported model doesn't answer as the trained one."""


@dataclass(frozen=True)
class Check:
    """What comparing the two models on real images found."""

    largest_difference: float
    bound: float
    num_images: int


def run(config: Config | None, checkpoint: Path, out: Path, overrides: list[str], *, averaged: bool = False) -> None:
    """The verb: writes model.json, model.pdiparams and vit_static.json into `out`, once the check has passed."""
    loaded = load_weights(checkpoint, averaged=averaged)
    config = config or loaded.config_with(overrides)
    images = open_set(config.data, "val", config.model.num_classes)
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a folder")
    if out.exists() and any(out.iterdir()) and not (out / CARD_FILE).is_file():
        raise UserError(f"{out}: is not empty, and not an exported model; name another folder with --out")
    paddle.set_device("cpu")
    model = model_module.build(config.model)
    keeping = InitConfig(head="keep", pos_embed=config.init.pos_embed)
    init_from(model, config.model, loaded.found, str(loaded.source), keeping, loaded.grid)
    model.eval()

    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(model, config, loaded.class_names or images.class_names, part)
        check = compare(model, part, images, config.export.num_check_images)
        print(
            f"largest difference of a logit from the trained model's: {check.largest_difference:.2e}, over "
            f"{check.num_images} validation images (bound {check.bound:.0e})",
            flush=True,
        )
        if not check.largest_difference <= check.bound:
            raise ExportError(f"the exported model differs from the trained one: nothing was written to {out}")
        before = out.with_name(f".{out.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        if out.exists():
            out.rename(before)
        part.rename(out)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {MODEL_FILE}, model.pdiparams, {CARD_FILE}; './run.sh predict --model {out} IMAGE' uses them")


class _LogitsAndFeatures(nn.Layer):
    """The exported program: images to logits [B, num_classes] and `VisionTransformer.features` [B, C]."""

    def __init__(self, model: model_module.VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        features = self.model.features(images)
        return self.model.logits(features), features


def write(model: model_module.VisionTransformer, config: Config, class_names: list[str], folder: Path) -> None:
    """The inference program (images to logits and features) and its weights, for any batch size, and the card beside
    them. `model`'s parameters are given their own names in it, by which `predict.load_model` finds them again."""
    for name, parameter in model.named_parameters():
        parameter.name = name
    inputs = [InputSpec([None, 3, *config.model.image_size], "float32", "images")]
    paddle.jit.save(_LogitsAndFeatures(model), str(folder / "model"), input_spec=inputs)
    card = card_of(config, class_names, manifest(folder))
    (folder / CARD_FILE).write_text(card.model_dump_json(indent=1), encoding="utf-8")


def card_of(config: Config, class_names: list[str], files: dict[str, FileRecord] | None = None) -> Card:
    """What the card of a config's model, in `files`, says."""
    return Card(
        class_names=class_names,
        preprocessing=Preprocessing(
            image_size=config.model.image_size,
            resize=config.eval.resize,
            crop_ratio=config.eval.crop_ratio,
            interpolation=config.eval.interpolation,
            antialias=config.eval.antialias,
            mean=config.data.mean,
            std=config.data.std,
        ),
        activation=config.loss.name,
        model=config.model,
        precision=config.export.precision,
        files=files or {},
    )


def compare(model: model_module.VisionTransformer, folder: Path, images: ImageSet, num_images: int) -> Check:
    """Runs the trained model, as a dynamic graph, and the exported one on images spread over the validation set."""
    predictor = Predictor(folder)
    chosen = np.unique(np.linspace(0, len(images) - 1, num_images).round().astype(int))
    largest, variances, precision = 0.0, [], predictor.card.precision
    for numbers in np.array_split(chosen, max(len(chosen) // 16, 1)):
        encoded = [(io.BytesIO(images.read(number)[0].tobytes()), images.name(number)) for number in numbers.tolist()]
        inputs = predictor.preprocess([read_pixels(*image) for image in encoded])
        with paddle.no_grad():
            trained = model(paddle.to_tensor(inputs)).numpy()
        variances.append(trained.var())
        difference = np.abs(predictor.logits(inputs) - trained)
        largest = max(largest, float(difference.max()) if np.isfinite(difference).all() else float("inf"))
    scale = 1.0 if precision == "float32" else float(np.sqrt(np.mean(variances)))
    return Check(largest, LARGEST_DIFFERENCE[precision] * scale, len(chosen))
