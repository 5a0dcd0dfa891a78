"""Weights into a model: from a file's arrays to the model that a config describes, with every key accounted for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from vit_static.common.errors import WeightsError
from vit_static.common.io import write_atomically, write_json
from vit_static.config.schema import InitConfig, ModelConfig
from vit_static.model.pos_embed import resample_pos_embed
from vit_static.model.variants import grid_of, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.formats import PLSC, ExternalWeights, State, fuse_qkv, split_qkv

_HEAD, _HEAD_RESET = ("head.", "head0."), "init.head = reset"


def write_pdparams(state: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a state as Paddle's own `paddle.save` does; `paddle.load` and PLSC read it."""
    tensors = {
        name: paddle.to_tensor(np.asarray(value, np.float32), place=paddle.CPUPlace()) for name, value in state.items()
    }
    for name, tensor in tensors.items():
        tensor.name = name  # it is saved too, and would else differ from file to file
    with write_atomically(path) as temporary:
        paddle.save(tensors, str(temporary))


def file_state(model: nn.Layer) -> State:
    """A plain (not distributed) model's weights in the files' names and layout."""
    return fuse_qkv({name: value.numpy() for name, value in model.state_dict().items()})


@dataclass
class LoadReport:
    """What became of each of a file's arrays, and of each of the model's, by the files' names."""

    format: str = ""
    used: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    folded: dict[str, str] = field(default_factory=dict)  # into what
    dropped: dict[str, str] = field(default_factory=dict)  # of the file, and why
    reinitialized: list[str] = field(default_factory=list)  # the model's, which stay as they were initialised
    notes: list[str] = field(default_factory=list)  # in what the model computes otherwise than the file's program

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"{len(self.used)} used",
            f"resampled: {', '.join(self.resampled) or 'none'}",
            f"fresh: {', '.join(self.reinitialized) or 'none'}",
        ]
        if self.folded:
            found.append(f"folded: {_listed(self.folded)}")
        if self.dropped:
            found.append(f"dropped: {_listed(self.dropped)}")
        return [*found, "missing: none", "unexpected: none", *(f"note: {note}" for note in self.notes)]

    def describe(self) -> str:
        """The same in short, without what the config asked for by `init.head`."""
        parts = [f"{len(self.used)} used", f"resampled: {', '.join(self.resampled) or 'none'}"]
        parts.append(f"fresh: {', '.join(self.reinitialized) or 'none'}")
        dropped = {name: why for name, why in self.dropped.items() if why != _HEAD_RESET}
        for what, names in (("folded", self.folded), ("dropped", dropped)):
            if names:
                parts.append(f"{what}: {_listed(names)}")
        return "; ".join(parts)

    def write(self, path: Path) -> None:
        """All of it, as JSON; what is missing or unexpected is never here, but an error."""
        write_json({**asdict(self), "missing": [], "unexpected": []}, path)


def _listed(names: Mapping[str, str], most: int = 3) -> str:
    shown = [f"{name} ({why})" for name, why in list(names.items())[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def load_state(model: VisionTransformer, state: Mapping[str, np.ndarray], source: str) -> None:
    """Sets every weight of a plain model from a state in the files' layout. Raises WeightsError unless all fit."""
    given = split_qkv(state)
    check_state(given, {name: list(value.shape) for name, value in model.state_dict().items()}, source)
    model.set_state_dict({name: paddle.to_tensor(value) for name, value in given.items()})


def init_from(
    model: VisionTransformer,
    config: ModelConfig,
    found: ExternalWeights,
    source: str,
    init: InitConfig,
    source_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Starts a model, which is `config`'s, from other weights.

    `init.head` reset leaves out the file's head and representation layer, and the model keeps its fresh ones. The rest
    is `adapted`, whose arguments and errors these are.
    """
    state, report = adapt_state(found, config, source, init, source_grid)
    own = model.state_dict()
    given = split_qkv(state)
    if init.head == "reset":
        report.reinitialized = [name for name in own if name.startswith(_HEAD)]
        given.update({name: own[name].numpy() for name in report.reinitialized})
    check_state(given, {name: list(value.shape) for name, value in own.items()}, source, found, config)
    model.set_state_dict({name: paddle.to_tensor(value) for name, value in given.items()})
    return report


def adapt_state(
    found: ExternalWeights,
    config: ModelConfig,
    source: str,
    init: InitConfig,
    source_grid: tuple[int, int] | None = None,
) -> tuple[State, LoadReport]:
    """A file's state made that of the config's model: the position embedding resampled to its grid, what it has not
    folded into what it has, the head kept or left out.

    `source_grid` is that of the file's patches, a square if None. Raises WeightsError where the grid can't be known.
    """
    report = LoadReport(found.format, dropped=dict(found.dropped))
    state = dict(found.state)
    if init.head == "reset":
        for name in [name for name in state if name.startswith(_HEAD)]:
            del state[name]
            report.dropped[name] = _HEAD_RESET
    if config.layer_scale_init is None:
        fold_layer_scale(state, report, source)
    if "pos_embed" in state:
        _fit_positions(state, report, found, config, source, init, source_grid)
    num_heads = _value_of(config, "num_heads")
    if found.model_hints.get("num_heads", num_heads) != num_heads:
        raise WeightsError(
            f"{source}: has {found.model_hints['num_heads']} heads, and this model {num_heads}; these are another "
            f"model's weights: set -o model.num_heads={found.model_hints['num_heads']}"
        )
    for key in ("gelu", "layer_norm_epsilon", "pool", "fc_norm"):
        fact, wanted = found.model_hints.get(key), _value_of(config, key)
        if fact is not None and fact != wanted and not (key in ("pool", "fc_norm") and init.head == "reset"):
            report.notes.append(f"the file's program has model.{key}={fact}, and this model {wanted}")
    taken = set(report.resampled) | {into for into in report.folded.values() if into in state}
    report.used = [name for name in state if name not in taken] + sorted(taken)
    return state, report


def _value_of(config: ModelConfig, key: str) -> Any:
    value = getattr(config, key)
    return getattr(variant_of(config), key) if value is None else value


def fold_layer_scale(state: State, report: LoadReport, source: str) -> None:
    """Multiplies LayerScale's factors into the layers before them, which gives the same sums without it."""
    for name in [name for name in state if name.endswith(".gamma")]:
        layer = name.replace(".ls1.gamma", ".attn.proj").replace(".ls2.gamma", ".mlp.fc2")
        gamma, weight = state[name].astype(np.float64), state.get(f"{layer}.weight")
        if gamma.ndim != 1 or weight is None or weight.shape[-1:] != gamma.shape:
            raise WeightsError(f"{source}: {name} is {list(gamma.shape)}, which doesn't fit {layer}")
        del state[name]
        for part in (f"{layer}.weight", f"{layer}.bias"):
            if part in state:
                state[part] = (state[part] * gamma).astype(np.float32)
        report.folded[name] = f"{layer}.weight"


def _fit_positions(
    state: State,
    report: LoadReport,
    found: ExternalWeights,
    config: ModelConfig,
    source: str,
    init: InitConfig,
    source_grid: tuple[int, int] | None,
) -> None:
    """The position embedding on the model's grid, with the class token's row where the model has one."""
    embedding = state["pos_embed"]
    if embedding.ndim != 3 or len(embedding) != 1 or ("cls_token" not in state and config.has_class_token):
        return  # what is wrong is told by the comparison of all shapes
    if "cls_token" in state and state["cls_token"].shape != (1, 1, embedding.shape[2]):
        return
    if config.pos_embed != "learn":
        del state["pos_embed"]
        report.dropped["pos_embed"] = f"model.pos_embed = {config.pos_embed}"
        return
    grid = grid_of(config)
    num_patches = None if source_grid is None else math.prod(source_grid)
    prefix = _num_prefix_positions(embedding.shape[1], num_patches, found, config, grid)
    if prefix is None:
        raise WeightsError(
            f"{source}: pos_embed has {embedding.shape[1]} rows, which are no square of patches; give the weights' own "
            "grid by the image size that they were trained at (convert --image-size)"
        )
    if source_grid is None:
        side = math.isqrt(embedding.shape[1] - prefix)
        is_square = side * side == embedding.shape[1] - prefix
        if is_square and side * side == math.prod(grid) and grid != (side, side):
            raise WeightsError(
                f"{source}: pos_embed may be of {side}x{side} patches or of the model's {grid[0]}x{grid[1]}; say which "
                "by the image size that it is of (convert --image-size)"
            )
        source_grid = (side, side) if is_square else grid
    if source_grid != grid:
        embedding = resample_pos_embed(embedding, source_grid, grid, init.pos_embed)
        report.resampled = ["pos_embed"]
    if prefix and not config.has_class_token:
        report.dropped["pos_embed of the class token"] = "this model has none"
        embedding = embedding[:, 1:]
    elif prefix and not config.class_token_pos_embed:
        state["cls_token"] = state["cls_token"] + embedding[:, :1]
        embedding = embedding[:, 1:]
        report.folded["pos_embed of the class token"] = "cls_token"
    elif not prefix and config.num_prefix_positions:
        embedding = np.concatenate([np.zeros_like(embedding[:, :1]), embedding], axis=1)
        report.notes.append("pos_embed has 0 for the class token, which has no position in the file")
    state["pos_embed"] = embedding
    if "cls_token" in state and not config.has_class_token:
        del state["cls_token"]
        report.dropped["cls_token"] = "this model has none"


def position_counts(found: ExternalWeights) -> list[int]:
    """How many of the prefix tokens may have a position in the file, the likelier first: the class token has one but in
    DeiT III and later models, which have LayerScale or registers."""
    if "cls_token" not in found.state:
        return [0]
    if "class_token_pos_embed" in found.model_hints:
        return [int(found.model_hints["class_token_pos_embed"])]
    return [1, 0] if found.state.keys() & {"blocks.0.ls1.gamma", "reg_token"} else [1]


def _num_prefix_positions(
    num_rows: int, num_patches: int | None, found: ExternalWeights, config: ModelConfig, grid: tuple[int, int]
) -> int | None:
    """By the file's grid, if it is known, else by what leaves a square, else by what fits the model; None if nothing
    does."""
    candidates = position_counts(found)
    if not config.class_token_pos_embed and 0 not in candidates and "class_token_pos_embed" not in found.model_hints:
        candidates.append(0)
    if num_patches is not None:
        return next((prefix for prefix in candidates if num_rows - prefix == num_patches), None)
    for prefix in candidates:
        if num_rows > prefix and math.isqrt(num_rows - prefix) ** 2 == num_rows - prefix:
            return prefix
    return next((prefix for prefix in candidates if num_rows - prefix == math.prod(grid)), None)


def check_state(
    state: Mapping[str, np.ndarray],
    own: Mapping[str, list[int]],
    source: str,
    found: ExternalWeights | None = None,
    config: ModelConfig | None = None,
) -> None:
    """Raises WeightsError unless a state, in either layout, has just these arrays, by the layers' names; what is to be
    set, if `found` in a file and the config's model tell."""
    given = split_qkv(state)
    remedy = "these are another model's weights: set model.* as they were trained"
    if found is not None and config is not None:
        differing = differing_keys(found, config)
        if differing:
            remedy += f" ({' '.join(f'-o model.{key}={value}' for key, value in differing.items())})"
    missing = sorted(own.keys() - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model has not"
        count = len(missing) + len(unexpected)
        more = f" (and {count - 1} more keys differ)" if count > 1 else ""
        raise WeightsError(f"{source}: {what}{more}; {remedy}")
    for name, shape in own.items():
        if list(given[name].shape) != shape:
            raise WeightsError(f"{source}: {name} is {list(given[name].shape)} and the model's {shape}; {remedy}")


def differing_keys(found: ExternalWeights, config: ModelConfig) -> dict[str, Any]:
    """What of the config's model the arrays contradict, and what they are of."""
    of_file = model_of(found)
    of_config = {key: _value_of(config, key) if key in _SHAPE_KEYS else getattr(config, key) for key in of_file}
    of_config["layer_scale_init"] = None if config.layer_scale_init is None else of_file.get("layer_scale_init", 1e-5)
    return {key: "null" if value is None else value for key, value in of_file.items() if of_config[key] != value}


_SHAPE_KEYS = ("patch_size", "width", "depth", "num_heads", "mlp_dim")


def model_of(found: ExternalWeights) -> dict[str, Any]:
    """Of the config's `model` section what the arrays tell; nothing of what is not there."""
    state = found.state
    told: dict[str, Any] = {}
    embedding, first = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if embedding is not None and embedding.ndim == 4:
        told |= {"width": embedding.shape[0], "patch_size": embedding.shape[2]}
    if first is not None and first.ndim == 2:
        told["mlp_dim"] = first.shape[1]
    told["pos_embed"] = "learn" if "pos_embed" in state else "sincos2d"
    told["depth"] = len(PLSC.blocks_in(state))
    told["qkv_bias"] = "blocks.0.attn.qkv.bias" in state
    told["layer_scale_init"] = 1e-5 if "blocks.0.ls1.gamma" in state else None
    told["register_tokens"] = state["reg_token"].shape[1] if state.get("reg_token", np.zeros(0)).ndim == 3 else 0
    if "head.bias" in state:
        told["num_classes"] = len(state["head.bias"])
        told["representation_size"] = len(state["head0.bias"]) if "head0.bias" in state else None
    return told
