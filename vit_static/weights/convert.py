"""Conversion of weights from any format to another, with a report of every array: the verb `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import paddle

from vit_static.common.errors import WeightsError
from vit_static.common.text import print_line
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config, InitConfig
from vit_static.model.variants import variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.adapter_file import ADAPTER_FILE, write_adapters
from vit_static.weights.formats import ExternalWeights, FormatName
from vit_static.weights.infer import format_override, infer_config
from vit_static.weights.load import HEAD, LoadReport, adapt_state, check_state, write_pdparams
from vit_static.weights.source import load_adapters, load_weights
from vit_static.weights.state import State
from vit_static.weights.write import list_differences, write_weights

SUFFIXES: dict[str, FormatName] = {".pdparams": "plsc", ".npz": "google", ".safetensors": "timm"}


def convert_weights(
    config: Config | None,
    source: Path,
    target: Path,
    overrides: list[str],
    *,
    to: FormatName | None,
    head: Literal["keep", "drop"],
    image_size: tuple[int, int] | None,
    fold_layer_scale: bool,
    ema: bool,
    lora: Literal["merged", "adapters"] | None = None,
) -> None:
    """Convert weights, print a report, and write it as JSON next to `target`.

    The model is that of `config`, or of the config next to the weights with `overrides`, or what the arrays determine
    with `overrides`. `to` defaults to the format of the target's suffix. `image_size` (height, width) is what the
    weights were trained at, for a grid of patches that isn't square. `lora` requires weights of a run with LoRA:
    `adapters` writes only what it has trained, in peft's layout. Raises WeightsError unless every array is accounted
    for, and if the target's program doesn't have this model.
    """
    if target.is_dir() or not target.name:
        raise WeightsError(f"{target}: is a folder; --to takes a file, such as {target / 'model.safetensors'}")
    if lora == "adapters":
        _convert_adapters(source, target, ema=ema)
        return
    to = to or SUFFIXES.get(target.suffix)
    if to is None:
        raise WeightsError(
            f"{target}: its name doesn't determine a format; end it with {', '.join(SUFFIXES)}, or set --format"
        )
    loaded = load_weights(source, ema=ema, overrides=overrides)
    if lora == "merged" and not loaded.has_adapters:
        raise WeightsError(f"--lora merged: {source} has no adapters; leave the option out")
    external = loaded.external
    if config is None and loaded.config is not None:
        config = loaded.config_with(overrides)
    elif config is None:
        config = infer_config(external, str(source), overrides, image_size)
    model = config.model
    if fold_layer_scale:
        model = model.model_copy(update={"layer_scale_init": None})
    if head == "drop":
        model = model.model_copy(update={"num_classes": 0, "representation_size": None})
    grid = loaded.grid
    if image_size is not None:
        patch_size = variant_of(model).patch_size
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
    init = InitConfig(head="keep" if head == "keep" else "reset", pos_embed=config.init.pos_embed)
    state, report = convert_state(external, model, str(source), init, grid)
    report.notes += [] if to == "plsc" and loaded.config else list_differences(state, model, to)
    write_converted(state, model, target, to)
    report_path = target.with_name(f"{target.name}.report.json")
    report.write(report_path)
    print_line(f"convert: {source}: {report.format}")
    for line in report.lines():
        print_line(f"  {line}")
    print_line(f"convert: written to {target} ({to}), with a report of every array in {report_path.name}")
    print_line(f"convert: its model: {describe_model(model)}")


def _convert_adapters(source: Path, target: Path, *, ema: bool) -> None:
    """Write the adapters and the head of a LoRA run as a file."""
    if target.name != ADAPTER_FILE:
        raise WeightsError(
            f"--to {target}: peft reads adapters from a file of one name; set --to {target.parent / ADAPTER_FILE}"
        )
    trained, config, base = load_adapters(source, ema=ema)
    write_adapters(trained, config, base, target)
    print_line(
        f"convert: adapters and head written to {target}, with adapter_config.json beside it; the weights that they "
        f"belong to are {base.source}"
    )


def convert_state(
    external: ExternalWeights, model: ModelConfig, source: str, init: InitConfig, grid: tuple[int, int] | None
) -> tuple[State, LoadReport]:
    """Return the state of a model and a report of the file's arrays. Raises WeightsError unless all of them fit."""
    state, report = adapt_state(external, model, source, init, grid)
    with_head = init.head == "keep"
    check_state(state, expected_shapes(model, with_head=with_head), source, external, model, with_head=with_head)
    return state, report


def write_converted(state: State, model: ModelConfig, target: Path, to: FormatName) -> None:
    """Write a state in any format. Raises WeightsError if the target's program doesn't have this model."""
    if to == "plsc":
        write_pdparams(state, target, model)
    else:
        write_weights(state, model, variant_of(model).num_heads, target, to)


def expected_shapes(model: ModelConfig, with_head: bool) -> dict[str, list[int]]:
    """Return the shapes of a model's weights by the layers' names, without allocating them."""
    with paddle.LazyGuard():
        built = VisionTransformer(model)
    shapes = {name: list(value.shape) for name, value in built.named_parameters()}
    return {name: shape for name, shape in shapes.items() if with_head or not name.startswith(HEAD)}


def describe_model(model: ModelConfig) -> str:
    """Return what differs from the default model, as overrides."""
    default = ModelConfig()
    changed = {key: value for key, value in model if value != getattr(default, key)}
    return " ".join(f"-o model.{key}={format_override(value)}" for key, value in changed.items())
