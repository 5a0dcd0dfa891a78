"""Model config from weights: what their arrays, their program and this program's record determine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from vit_static.common.errors import ConfigError, WeightsError, truncate
from vit_static.common.text import say
from vit_static.config.loader import load_config
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config
from vit_static.model.rope import DEFAULT_BASES
from vit_static.model.variants import grid_of, variant_of
from vit_static.weights.formats import ExternalWeights
from vit_static.weights.loaded import Weights
from vit_static.weights.name_maps import IMAGE_GRID
from vit_static.weights.published import published_num_heads
from vit_static.weights.tables.plsc import PLSC

_HEAD = ("num_classes", "representation_size")
_READ_BY_HEAD = ("pool", "fc_norm")
# What a model is trained with or adapted to, and no property of its weights.
_NOT_IN_WEIGHTS = (
    *("variant", "from_", "image_size", "pos_embed_init", "head_bias_init", "head_init_std"),
    *("dropout", "attention_dropout", "drop_path_rate", "drop_path_schedule"),
    *("patch_dropout", "rope_shift", "rope_jitter", "rope_rescale", "compute_unread_tokens"),
)
# Keys that must agree with the weights for their blocks to be loaded. The others can be adapted: another grid of
# positions, a folded or new LayerScale, the class token.
_BLOCKS = (
    *("num_channels", "patch_size", "width", "depth", "mlp_dim", "qkv_bias"),
    *("register_tokens", "distillation_token"),
)
_OF_ROPE = ("rope_base", "rope_grid", "rope_register_base")
# Keys that some files leave open: their numbers of heads and image size, and `ExternalWeights.undetermined`.
_OPEN = ("num_heads", "image_size", "rope", "pool")


def infer_model(external: ExternalWeights) -> dict[str, Any]:
    """Return the keys of the `model` section that the weights determine, with their values.

    The arrays decide where they can, then the record or the config beside the file, then what the program that wrote
    the file always does.
    """
    state = external.state
    model = {key: value for key, value in external.model_hints.items() if key in ModelConfig.model_fields}
    if external.model is not None:
        # A size that only the variant gives is of no use without it.
        model |= {**dict(external.model), "num_heads": variant_of(external.model).num_heads}
        for key in ("variant", "from_", "class_token", "patch_size", "width", "depth", "mlp_dim", *_HEAD):
            model.pop(key, None)
    embedding, fc1 = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if embedding is not None and embedding.ndim == 4:
        model |= {"width": embedding.shape[0], "patch_size": embedding.shape[2]}
        model["num_channels"] = embedding.shape[1]
        query_norm = state.get("blocks.0.attn.q_norm.weight")
        if query_norm is not None and query_norm.size:
            model["num_heads"] = embedding.shape[0] // query_norm.size
    if fc1 is not None and fc1.ndim == 2:
        model["mlp_dim"] = fc1.shape[1]
    without = "none" if model.get("pos_embed") == "none" else "sincos2d"
    model["pos_embed"] = "learn" if "pos_embed" in state else without
    model["depth"] = len(PLSC.blocks_in(state))
    model["qkv_bias"] = "qv" if "blocks.0.attn.q.bias" in state else "blocks.0.attn.qkv.bias" in state
    model |= _optional_layers(state)
    if model.get("rope", "none") == "none":
        model = {key: value for key, value in model.items() if key not in _OF_ROPE}
    if model.get("rope_base") == DEFAULT_BASES.get(model.get("rope", "none")):
        model["rope_base"] = None
    has_scale = "blocks.0.ls1.gamma" in state
    model["layer_scale_init"] = (model.get("layer_scale_init") or 1e-5) if has_scale else None
    model["register_tokens"] = state["reg_token"].shape[1] if state.get("reg_token", np.zeros(0)).ndim == 3 else 0
    model["class_token"] = "cls_token" in state
    model["distillation_token"] = "dist_token" in state
    model["num_classes"] = len(state["head.bias"]) if "head.bias" in state else 0
    model["representation_size"] = len(state["head0.bias"]) if "head0.bias" in state else None
    return model


def _optional_layers(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the keys that say which optional layers the model has."""
    model: dict[str, Any] = {
        "norm": "rms" if "norm.weight" in state and "norm.bias" not in state else "layer",
        "mlp": "swiglu" if "blocks.0.mlp.gate.weight" in state else "gelu",
        "mlp_norm": "blocks.0.mlp.norm.weight" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "attention_norm": "blocks.0.attn.norm.weight" in state,
        "pre_norm": "norm_pre.weight" in state,
    }
    if "blocks.0.attn.rope.frequencies" in state:
        model["rope"] = "mixed"
    if "attn_pool.latent" in state:
        model["pool"] = "map"
    return model


def differing_keys(external: ExternalWeights, config: ModelConfig, *, with_head: bool) -> dict[str, Any]:
    """Return the keys of the `model` section in which the weights' model differs, with the weights' values.

    Without `with_head` the model has a new head: its keys, and what it reads, are then free.
    """
    inferred = infer_model(external)
    if inferred.get("rope_grid") == IMAGE_GRID:
        inferred["rope_grid"] = grid_of(config)
    if inferred.get("rope", "none") == "none":
        inferred = {key: value for key, value in inferred.items() if key not in _OF_ROPE}
    if config.rope_base == DEFAULT_BASES.get(config.rope):
        config = config.model_copy(update={"rope_base": None})
    has_class_token = inferred.pop("class_token")
    layer_scale_init = inferred.pop("layer_scale_init")
    free = set(_NOT_IN_WEIGHTS)
    if config.pos_embed != "learn":
        free.add("pos_embed")  # a learned embedding is dropped
    if config.num_channels == 1 and inferred.get("num_channels") == 3:
        free.add("num_channels")  # the filters' channels are added up
    if not with_head:
        free.update(_HEAD if config.has_class_token and not has_class_token else (*_HEAD, *_READ_BY_HEAD))
    sizes = vars(variant_of(config))
    differing = {
        key: value
        for key, value in inferred.items()
        if key not in free and value != sizes.get(key, getattr(config, key))
    }
    if config.layer_scale_init is not None and layer_scale_init is None:
        differing["layer_scale_init"] = None
    if config.model_copy(update=differing).has_class_token != has_class_token:
        differing["class_token"] = has_class_token
    return differing


def fits_blocks(external: ExternalWeights, config: ModelConfig) -> bool:
    """Return whether the weights' blocks have the config's shapes."""
    return not differing_keys(external, config, with_head=False).keys() & set(_BLOCKS)


def format_override(value: Any) -> str:
    """Return a value as it is written after `-o model.KEY=`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value).replace(" ", "")


def infer_config(
    external: ExternalWeights,
    source: str,
    overrides: Iterable[str],
    image_size: tuple[int, int] | None = None,
    image_size_remedy: str = "--image-size HEIGHT WIDTH",
) -> Config:
    """Return a config whose model fits the weights, with ``section.key=value`` overrides.

    `image_size` (height, width) is what the weights were trained at, if they don't determine it; `image_size_remedy` is
    how a user gives it. Raises WeightsError for what neither the weights nor the overrides determine.
    """
    overrides = list(overrides)
    if external.model is not None and not differing_keys(external, external.model, with_head=True):
        values = {key: value for key, value in external.model if key in external.model.model_fields_set - {"from_"}}
        if image_size is not None:
            values["image_size"] = list(image_size)
        return load_config(None, [*_as_overrides(values), *overrides])
    values = _complete_model(external, source, image_size)
    if "model.rope=none" in overrides:
        values = {key: value for key, value in values.items() if key not in _OF_ROPE}
    has_image_grid = values.get("rope_grid") == IMAGE_GRID
    if has_image_grid:
        del values["rope_grid"]
    lines = [*_as_overrides({key: value for key, value in values.items() if value is not None}), *overrides]
    for key, why in external.undetermined.items():
        if not any(line.startswith(f"model.{key}=") for line in overrides):
            raise WeightsError(f"{source}: {why}; set -o model.{key}=...")
    for key, remedy in (("num_heads", "-o model.num_heads=N"), ("image_size", image_size_remedy)):
        if not any(line.startswith(f"model.{key}=") for line in lines):
            raise WeightsError(f"{source}: no array determines its {key}; set {remedy}")
    config = load_config(None, lines)
    return config.with_model(_with_image_grid(config.model)) if has_image_grid else config


def _with_image_grid(model: ModelConfig) -> ModelConfig:
    """Return the model with coordinates that are patch numbers at any image size, unless it sets `rope_grid`."""
    return model if model.rope_grid is not None else model.model_copy(update={"rope_grid": grid_of(model)})


def _as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"model.{key}={format_override(value)}" for key, value in values.items()]


def _complete_model(
    external: ExternalWeights, source: str, image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return `infer_model` with the image size and the number of heads, as far as they can be determined."""
    model = infer_model(external)
    for key in ("patch_size", "width", "depth", "mlp_dim"):
        if not model.get(key):
            raise WeightsError(f"{source}: is no complete Vision Transformer: no array determines its {key}")
    if model["num_channels"] not in (1, 3):
        raise WeightsError(
            f"{source}: is for images of {model['num_channels']} channels, and this program reads 3 (RGB) or 1 (grey); "
            "use other weights"
        )
    shape = model["width"], model["depth"], model["mlp_dim"], model["mlp"]
    model = {"num_heads": published_num_heads(*shape), **model}
    usual = model.get("image_size")  # of the program's published models; without meaning for other patches
    if external.model is None and usual is not None and any(side % model["patch_size"] for side in usual):
        usual = None
    size = image_size or usual or _square_image_size(external, model["patch_size"])
    model["image_size"] = None if size is None else list(size)
    if "pos_embed" in external.state and "class_token_pos_embed" not in model and size is not None:
        num_patches = size[0] // model["patch_size"] * (size[1] // model["patch_size"])
        num_positions = external.state["pos_embed"].shape[1] - num_register_positions(external, num_patches)
        model["class_token_pos_embed"] = num_positions > num_patches
    return model


def _square_image_size(external: ExternalWeights, patch_size: int) -> tuple[int, int] | None:
    """Return the image size for which the position embedding's grid is square, if there is one."""
    embedding = external.state.get("pos_embed")
    if embedding is None or embedding.ndim != 3:
        return None
    num_positions = embedding.shape[1] - num_register_positions(external)
    for prefix in position_counts(external):
        side = math.isqrt(max(num_positions - prefix, 0))
        if side and side * side == num_positions - prefix:
            return side * patch_size, side * patch_size
    return None


def position_counts(external: ExternalWeights) -> list[int]:
    """Return how many prefix tokens can have a position in the file, the most likely number first.

    A distillation token has one if the class token does.
    The class token has a position, except in DeiT III and later models, which have LayerScale or registers.
    """
    if "cls_token" not in external.state:
        return [0]
    num_tokens = 1 + int("dist_token" in external.state)
    if "class_token_pos_embed" in external.model_hints:
        return [num_tokens * int(external.model_hints["class_token_pos_embed"])]
    if external.model is not None:
        return [num_tokens * int(external.model.class_token_pos_embed)]
    if num_tokens == 2:
        return [2, 0]
    return [1, 0] if external.state.keys() & {"blocks.0.ls1.gamma", "reg_token"} else [1]


def num_register_positions(external: ExternalWeights, num_patches: int | None = None) -> int:
    """Return how many registers have a position: all if no other number leaves a square, or `num_patches` if known."""
    registers, positions = external.state.get("reg_token"), external.state.get("pos_embed")
    if registers is None or positions is None or registers.ndim != 3 or positions.ndim != 3:
        return 0
    if external.model is not None or "class_token_pos_embed" in external.model_hints:
        return 0
    without = [positions.shape[1] - count for count in position_counts(external)]
    with_all = positions.shape[1] - registers.shape[1] - int("cls_token" in external.state)

    def is_grid(count: int) -> bool:
        return count > 0 and (math.isqrt(count) ** 2 == count if num_patches is None else count == num_patches)

    return registers.shape[1] if is_grid(with_all) and not any(map(is_grid, without)) else 0


# -- configs -----------------------------------------------------------------------------------------------------------


def config_for(config: Config | None, weights: Weights, overrides: list[str]) -> Config:
    """Return the config for weights: the given one (-c), else the one next to them, else one inferred from them.

    With ``model.from: init`` its model is that of the weights. Raises ConfigError or WeightsError for mistakes in it,
    and for what the weights don't determine.
    """
    if config is None and weights.config is None:
        try:
            remedy = "-o model.image_size=[HEIGHT,WIDTH]"
            config = infer_config(weights.external, str(weights.source), overrides, image_size_remedy=remedy)
        except WeightsError as error:
            raise WeightsError(f"{error}, or name the config of its run with -c") from None
        say(
            f"{weights.source}: no config.yaml next to it; the model is inferred from the weights, and all other keys "
            "have their defaults (data.mean, data.std, eval.*, ...): set them with -o, or a config with -c"
        )
        return config
    config = weights.config_with(overrides) if config is None else config
    if config.model.from_ == "config":
        return config
    return with_shape(config, shape_of_weights(weights), str(weights.source), with_head=True)


def with_shape(config: Config, shape: Mapping[str, Any], source: str, *, with_head: bool) -> Config:
    """Return the config with a model of this shape (keys of the `model` section); `source` is where it is from.

    Keys that the config sets win, except for the variant. The head's keys are the config's unless `with_head`. Raises
    ConfigError for what neither determines, and if the keys don't go together.
    """
    explicit = config.model.model_fields_set | set(_NOT_IN_WEIGHTS) - {"image_size"}
    taken = {key: value for key, value in shape.items() if key not in explicit and (with_head or key not in _HEAD)}
    if not with_head and taken.get("pool", "") is None:
        del taken["pool"]  # a new head reads what the config says
    for key in _OPEN:
        if key in taken and taken[key] is None:
            raise ConfigError(f"model.from = 'init': {source} doesn't determine {key}; set model.{key} too")
    if config.model.rope == "none" and "rope" in explicit:
        taken = {key: value for key, value in taken.items() if key not in _OF_ROPE}
    has_image_grid = taken.get("rope_grid") == IMAGE_GRID
    if has_image_grid:
        del taken["rope_grid"]
    try:
        model = ModelConfig.model_validate({**config.model.model_dump(), **taken})
        return config.with_model(_with_image_grid(model) if has_image_grid else model)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"model.from = 'init': with the shape of {source}, {truncate(mistake, 200)}") from None


def shape_of_config(config: Config) -> dict[str, Any]:
    """Return the keys of a config's `model` section with all sizes, for `with_shape`."""
    return {**dict(config.model), **vars(variant_of(config.model)), "class_token": config.model.has_class_token}


def shape_of_weights(weights: Weights) -> dict[str, Any]:
    """Return the keys of the `model` section with all sizes, as far as weights determine them, for `with_shape`."""
    if weights.config is not None:
        return shape_of_config(weights.config)
    shape = {"num_heads": None, **_complete_model(weights.external, str(weights.source))}
    return shape | dict.fromkeys(weights.external.undetermined)
