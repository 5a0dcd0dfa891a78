"""Weights from any format into another, with an account of every array; the verb `convert`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import paddle

from vit_static.common.errors import WeightsError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config, InitConfig, ModelConfig
from vit_static.model.variants import VARIANTS, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.formats import ExternalWeights, FormatName, State, computed_otherwise, write_weights
from vit_static.weights.load import LoadReport, adapt_state, check_state, model_of, position_counts, write_pdparams
from vit_static.weights.source import load_weights

SUFFIXES: dict[str, FormatName] = {".pdparams": "plsc", ".npz": "google", ".safetensors": "timm"}


def convert_weights(
    config: Config | None,
    source: Path,
    target: Path,
    overrides: list[str],
    *,
    to: FormatName | None,
    head: str,
    image_size: tuple[int, int] | None,
    fold_layer_scale: bool,
    averaged: bool,
) -> None:
    """The verb. The model is the config's, or else what the weights tell of theirs, with the overrides on top.

    `image_size` is what the weights were trained at, for a grid of patches that is no square. Raises WeightsError
    unless every array is accounted for, and where the target's program has no such model.
    """
    if target.is_dir() or not target.name:
        raise WeightsError(f"{target}: is a folder; --to takes a file, such as {target / 'model.safetensors'}")
    to = to or SUFFIXES.get(target.suffix)
    if to is None:
        raise WeightsError(f"{target}: which format is it to be? End its name with {', '.join(SUFFIXES)}, or --format")
    loaded = load_weights(source, averaged=averaged)
    found = loaded.found
    if config is None and loaded.config is not None:
        config = loaded.config_with(overrides)
    elif config is None:
        config = config_of(found, str(source), overrides, image_size)
    model = config.model
    if fold_layer_scale:
        model = model.model_copy(update={"layer_scale_init": None})
    grid = loaded.grid
    if image_size is not None:
        patch = variant_of(model).patch_size
        grid = (image_size[0] // patch, image_size[1] // patch)
    init = InitConfig(head="keep" if head == "keep" else "reset", pos_embed=config.init.pos_embed)
    state, report = convert_state(found, model, str(source), init, grid)
    report.notes += [] if to == "plsc" and loaded.config else computed_otherwise(state, model, to)
    write_converted(state, model, target, to)
    report.write(target.with_name(f"{target.name}.report.json"))
    print(f"convert: {source}: {report.format}")
    for line in report.lines():
        print(f"  {line}")
    print(f"convert: written {target} ({to}), and what became of each array in {target.name}.report.json")
    print(f"convert: its model: {describe(model)}")


def convert_state(
    found: ExternalWeights, model: ModelConfig, source: str, init: InitConfig, grid: tuple[int, int] | None
) -> tuple[State, LoadReport]:
    """The state of a model, and what became of each array of the file. Raises WeightsError unless all fit."""
    state, report = adapt_state(found, model, source, init, grid)
    check_state(state, expected_shapes(model, with_head=init.head == "keep"), source, found, model)
    return state, report


def write_converted(state: State, model: ModelConfig, target: Path, to: FormatName) -> None:
    """Raises WeightsError where the target's program has no such model."""
    if to == "plsc":
        write_pdparams(state, target)
    else:
        write_weights(state, model, variant_of(model).num_heads, target, to)


def config_of(found: ExternalWeights, source: str, overrides: list[str], image_size: tuple[int, int] | None) -> Config:
    """The model that weights are of, as far as they tell it, with ``section.key=value`` overrides on top."""
    told: dict[str, Any] = model_of(found)
    for key in ("patch_size", "width", "depth", "mlp_dim"):
        if not told.get(key):
            raise WeightsError(f"{source}: is no whole Vision Transformer: it doesn't tell its {key}")
    hints = {key: value for key, value in found.model_hints.items() if key in ModelConfig.model_fields}
    values = {"num_heads": _num_heads(told), **told, **hints, "class_token": "cls_token" in found.state}
    size = image_size or _image_size(found, told["patch_size"])
    if size is not None:
        values["image_size"] = list(size)
    if "pos_embed" not in found.state:
        values["pos_embed"] = "sincos2d"
    elif "class_token_pos_embed" not in hints and size is not None:
        num_patches = size[0] // told["patch_size"] * (size[1] // told["patch_size"])
        values["class_token_pos_embed"] = found.state["pos_embed"].shape[1] > num_patches
    lines = [f"model.{key}={_yaml(value)}" for key, value in values.items() if value is not None]
    for key, remedy in (("num_heads", "-o model.num_heads=N"), ("image_size", "--image-size HEIGHT WIDTH")):
        if not any(line.startswith(f"model.{key}=") for line in [*lines, *overrides]):
            raise WeightsError(f"{source}: doesn't tell its {key}; set it, {remedy}")
    return load_config(None, [*lines, *overrides])


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value).replace(" ", "")


def _num_heads(told: dict[str, Any]) -> int | None:
    """Of the published variant of this shape: else nothing tells it, and a guess would be another model's."""
    for variant in VARIANTS.values():
        if (variant.width, variant.depth, variant.mlp_dim) == (told["width"], told["depth"], told["mlp_dim"]):
            return variant.num_heads
    return None


def _image_size(found: ExternalWeights, patch_size: int) -> tuple[int, int] | None:
    """A square's, if the position embedding is of one."""
    embedding = found.state.get("pos_embed")
    if embedding is None or embedding.ndim != 3:
        return None
    for prefix in position_counts(found):
        side = math.isqrt(max(embedding.shape[1] - prefix, 0))
        if side and side * side == embedding.shape[1] - prefix:
            return side * patch_size, side * patch_size
    return None


def expected_shapes(model: ModelConfig, with_head: bool) -> dict[str, list[int]]:
    """Of the model's weights, by the layers' names, without making them."""
    with paddle.LazyGuard():
        built = VisionTransformer(model)
    shapes = {name: list(value.shape) for name, value in built.named_parameters()}
    return {name: shape for name, shape in shapes.items() if with_head or not name.startswith(("head.", "head0."))}


def describe(model: ModelConfig) -> str:
    """As overrides, what differs from the defaults."""
    default = ModelConfig()
    changed = {key: value for key, value in model if value != getattr(default, key)}
    return " ".join(f"-o model.{key}={_yaml(value)}" for key, value in changed.items())
