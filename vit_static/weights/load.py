"""Loading of weights into a model, with a report of every array of the file and of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from vit_static.common.errors import WeightsError
from vit_static.common.io import write_atomically, write_json
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import InitConfig, PosEmbedResampling
from vit_static.model.pos_embed import resample_pos_embed
from vit_static.model.rope import DEFAULT_BASES
from vit_static.model.variants import grid_of, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.formats import ExternalWeights
from vit_static.weights.infer import (
    differing_keys,
    fits_blocks,
    format_override,
    num_register_positions,
    position_counts,
)
from vit_static.weights.loaded import Weights
from vit_static.weights.model_record import record_after_pickle
from vit_static.weights.name_maps import IMAGE_GRID
from vit_static.weights.rope_order import from_rope_order
from vit_static.weights.state import State, fuse_qkv, split_qkv

HEAD, _HEAD_RESET = ("head.", "head0.", "head_dist."), "init.head = reset"
_POOLING = "attn_pool."


def write_pdparams(state: Mapping[str, np.ndarray], path: Path, model: ModelConfig | None = None) -> None:
    """Write a state with `paddle.save`, in float32, and a record of its model; `paddle.load` and PLSC read it."""
    tensors = {
        name: paddle.to_tensor(np.asarray(state[name], np.float32), place=paddle.CPUPlace())
        for name in sorted(state)  # so that the same weights give the same file
    }
    for name, tensor in tensors.items():
        tensor.name = name  # is saved too; without it two files of the same weights would differ
    with write_atomically(path, 4 * sum(map(np.size, state.values()))) as temporary:
        paddle.save(tensors, str(temporary))
        if model is not None:
            with temporary.open("ab") as file:
                file.write(record_after_pickle(model))


def file_state(model: nn.Layer) -> State:
    """Return the weights of a model that isn't distributed, in the files' names and layout (formats.py)."""
    return fuse_qkv({name: value.numpy() for name, value in model.state_dict().items()})


@dataclass
class LoadReport:
    """Report of a load: how each array of the file and of the model was treated, by the names in files."""

    format: str = ""
    used: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    folded: dict[str, str] = field(default_factory=dict)  # array of the file -> array that it was folded into
    dropped: dict[str, str] = field(default_factory=dict)  # array of the file -> reason
    reinitialized: list[str] = field(default_factory=list)  # of the model: initial values were left in place
    notes: list[str] = field(default_factory=list)  # where the model computes something else than the file's program

    def lines(self) -> list[str]:
        """Return the report as lines for people."""
        lines = [
            f"{len(self.used)} used",
            f"resampled: {', '.join(self.resampled) or 'none'}",
            f"reinitialized: {', '.join(self.reinitialized) or 'none'}",
        ]
        if self.folded:
            lines.append(f"folded: {_listed(self.folded)}")
        if self.dropped:
            lines.append(f"dropped: {_listed_by_reason(self.dropped)}")
        return [*lines, "missing: none", "unexpected: none", *(f"note: {note}" for note in self.notes)]

    def describe(self) -> str:
        """Return a short form in one line, without what `init.head` requested."""
        parts = [f"{len(self.used)} used", f"resampled: {', '.join(self.resampled) or 'none'}"]
        parts.append(f"reinitialized: {', '.join(self.reinitialized) or 'none'}")
        dropped = {name: reason for name, reason in self.dropped.items() if reason != _HEAD_RESET}
        if self.folded:
            parts.append(f"folded: {_listed(self.folded)}")
        if dropped:
            parts.append(f"dropped: {_listed_by_reason(dropped)}")
        return "; ".join(parts)

    def write(self, path: Path) -> None:
        """Write the whole report as JSON. Missing and unexpected arrays are always empty: either one is an error."""
        write_json({**asdict(self), "missing": [], "unexpected": []}, path)


def _listed(names: Mapping[str, str], max_names: int = 3) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(names.items())[:max_names]]
    return ", ".join(shown) + (f" and {len(names) - max_names} more" if len(names) > max_names else "")


def _listed_by_reason(dropped: Mapping[str, str], max_names: int = 3) -> str:
    groups: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        groups.setdefault(reason, []).append(name)
    listed = []
    for reason, names in groups.items():
        more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
        listed.append(f"{', '.join(sorted(names)[:max_names])}{more} ({reason})")
    return "; ".join(listed)


def load_into(
    model: VisionTransformer, config: ModelConfig, weights: Weights, pos_embed: PosEmbedResampling
) -> LoadReport:
    """Set all of a model's weights, the head included, from loaded weights; `config` is the model's.

    `pos_embed` is how a position embedding is resampled to another grid. Raises WeightsError as `adapt_state` does.
    """
    init = InitConfig(head="keep", pos_embed=pos_embed)
    return init_from(model, config, weights.external, str(weights.source), init, weights.grid)


def init_from(
    model: VisionTransformer,
    config: ModelConfig,
    external: ExternalWeights,
    source: str,
    init: InitConfig,
    source_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Initialise a model, which `config` describes, from weights as `init` says; `source` names them in messages.

    With `init.head` = reset the file's head and representation layer are left out, and the model keeps its own initial
    ones, and those of attention pooling if the file has none. Otherwise as `adapt_state`, with its errors.
    """
    state, report = adapt_state(external, config, source, init, source_grid)
    arrays = split_qkv(state)
    if init.head == "reset":
        initial = model.state_dict()
        is_new = HEAD if any(name.startswith(_POOLING) for name in state) else (*HEAD, _POOLING)
        report.reinitialized = [name for name in initial if name.startswith(is_new)]
        arrays.update({name: initial[name].numpy() for name in report.reinitialized})
    check_state(arrays, _shapes(model), source, external, config, with_head=init.head == "keep")
    model.set_state_dict({name: paddle.to_tensor(value) for name, value in arrays.items()})
    return report


def _shapes(model: VisionTransformer) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def adapt_state(
    external: ExternalWeights,
    config: ModelConfig,
    source: str,
    init: InitConfig,
    source_grid: tuple[int, int] | None = None,
) -> tuple[State, LoadReport]:
    """Adapt a file's state to the model that `config` describes, and report what happened to each array.

    Resamples the position embedding to the model's grid, folds layers that the model doesn't have into those that it
    has, and leaves out the head with `init.head` = reset. `source_grid` is the rows and columns of patches that the
    weights were trained on; None if unknown, which means a square. Raises WeightsError if the grid is ambiguous.
    """
    report = LoadReport(external.format, dropped=dict(external.dropped))
    state = dict(external.state)
    if init.head == "reset":
        for name in [name for name in state if name.startswith(HEAD)]:
            del state[name]
            report.dropped[name] = _HEAD_RESET
        for name in [name for name in state if name.startswith(_POOLING) and config.pool != "map"]:
            del state[name]
            report.dropped[name] = f"model.pool = {config.pool}"
    num_heads, file_heads = variant_of(config).num_heads, external.model_hints.get("num_heads")
    if file_heads not in (None, num_heads):
        raise WeightsError(
            f"{source}: has {file_heads} attention heads, and this model {num_heads}; set model.* as they were trained"
            + _keys_to_set(external, config, with_head=init.head == "keep")
        )
    state = from_rope_order(state, external.rope_order, num_heads)
    if fits_blocks(external, config):  # else check_state names all that is wrong
        if config.layer_scale_init is None:
            _fold_layer_scale(state, report, source)
        _add_up_channels(state, report, config)
        if "pos_embed" in state:
            _adapt_pos_embed(state, report, external, config, source, init, source_grid)
    report.notes += _list_differences(external, config, with_head=init.head == "keep")
    for key, reason in external.assumptions.items():
        if ("head.bias" in state) if key == "num_classes" else (config.rope != "none" or not key.startswith("rope_")):
            report.notes.append(f"model.{key}={format_override(getattr(config, key))}: {reason}")
    report.notes += [
        f"no array determines model.{key}, which is {format_override(getattr(config, key))} here"
        for key in external.undetermined
        if key != "pool" or init.head == "keep"
    ]
    changed = set(report.resampled) | {target for target in report.folded.values() if target in state}
    report.used = [name for name in state if name not in changed] + sorted(changed)
    return state, report


def _list_differences(external: ExternalWeights, config: ModelConfig, *, with_head: bool) -> list[str]:
    """Return a note for each key of which no array shows that the file's program computes something else."""
    hints = ({} if external.model is None else dict(external.model)) | external.model_hints
    keys = ["gelu", "layer_norm_epsilon", *(("pool", "fc_norm") if with_head else ()), "rope"]
    if config.rope != "none" and hints.get("rope", config.rope) == config.rope:
        keys += ["rope_base", "rope_grid", "rope_register_base"]
    expected = {key: getattr(config, key) for key in keys}
    for values in (hints, expected):
        if "rope_base" in keys and "rope_base" in values:
            values["rope_base"] = values["rope_base"] or DEFAULT_BASES[config.rope]
    if hints.get("rope_grid") == IMAGE_GRID:
        hints["rope_grid"] = grid_of(config)
    return [
        f"the file's program has model.{key}={format_override(hints[key])}, and this model "
        f"{format_override(expected[key])}"
        for key in keys
        if key in hints and key not in external.undetermined and hints[key] != expected[key]
    ]


def _keys_to_set(external: ExternalWeights, config: ModelConfig, *, with_head: bool) -> str:
    """Return the overrides that give the file's model, in parentheses; "" if no key differs."""
    differing = differing_keys(external, config, with_head=with_head)
    overrides = " ".join(f"-o model.{key}={format_override(value)}" for key, value in differing.items())
    return f" ({overrides})" if overrides else ""


def _fold_layer_scale(state: State, report: LoadReport, source: str) -> None:
    """Multiply LayerScale's factors into the layers before them, in place: the model computes the same without it."""
    for name in [name for name in state if name.endswith(".gamma")]:
        layer = name.replace(".ls1.gamma", ".attn.proj").replace(".ls2.gamma", ".mlp.fc2")
        gamma, weight = state[name].astype(np.float64), state.get(f"{layer}.weight")
        bias = state.get(f"{layer}.bias", gamma)
        if gamma.ndim != 1 or weight is None or {weight.shape[-1:], bias.shape} != {gamma.shape}:
            raise WeightsError(f"{source}: {name} has the shape {list(gamma.shape)}, which doesn't fit {layer}")
        del state[name]
        for scaled in (f"{layer}.weight", f"{layer}.bias"):
            if scaled in state:
                state[scaled] = (state[scaled] * gamma).astype(np.float32)
        report.folded[name] = f"{layer}.weight"


def _add_up_channels(state: State, report: LoadReport, config: ModelConfig) -> None:
    """Add up the filters of R, G and B for greyscale images, in place, as timm does: grey has the same value in all."""
    filters = state.get("patch_embed.proj.weight")
    if config.num_channels == 1 and filters is not None and filters.ndim == 4 and filters.shape[1] == 3:
        state["patch_embed.proj.weight"] = filters.sum(axis=1, keepdims=True, dtype=np.float32)
        report.folded["R, G and B of patch_embed.proj.weight"] = "patch_embed.proj.weight"


def _adapt_pos_embed(
    state: State,
    report: LoadReport,
    external: ExternalWeights,
    config: ModelConfig,
    source: str,
    init: InitConfig,
    source_grid: tuple[int, int] | None,
) -> None:
    """Resample the position embedding to the model's grid, and add or fold the class token's row, in place."""
    embedding = state["pos_embed"]
    if embedding.ndim != 3 or len(embedding) != 1 or ("cls_token" not in state and config.has_class_token):
        return  # check_state names what is wrong
    if "cls_token" in state and state["cls_token"].shape != (1, 1, embedding.shape[2]):
        return
    if config.pos_embed != "learn":
        del state["pos_embed"]
        report.dropped["pos_embed"] = f"model.pos_embed = {config.pos_embed}"
        return
    grid = grid_of(config)
    num_patches = None if source_grid is None else math.prod(source_grid)
    embedding = _fold_positions_of_registers(state, report, external, num_patches)
    prefix = _num_prefix_positions(embedding.shape[1], num_patches, external, config, grid)
    if prefix is None:
        raise WeightsError(
            f"{source}: pos_embed has {embedding.shape[1]} positions, which is no square of patches; set the image "
            "size that the weights were trained at (convert --image-size)"
        )
    if source_grid is None:
        side = math.isqrt(embedding.shape[1] - prefix)
        is_square = side * side == embedding.shape[1] - prefix
        if is_square and side * side == math.prod(grid) and grid != (side, side):
            raise WeightsError(
                f"{source}: pos_embed may be for {side}x{side} patches or for the model's {grid[0]}x{grid[1]}; set the "
                "image size that the weights were trained at (convert --image-size)"
            )
        source_grid = (side, side) if is_square else grid
    if source_grid != grid:
        embedding = resample_pos_embed(embedding, source_grid, grid, init.pos_embed)
        report.resampled = ["pos_embed"]
    if prefix and not config.has_class_token:
        report.dropped["pos_embed of the class token"] = "this model has none"
        embedding = embedding[:, 1:]
    elif prefix and not config.class_token_pos_embed:
        for row, name in enumerate(("cls_token", "dist_token")[:prefix]):
            state[name] = state[name] + embedding[:, row : row + 1]
        embedding = embedding[:, prefix:]
        report.folded["pos_embed of the class token"] = "cls_token"
    elif not prefix and config.num_prefix_positions:
        zeros = np.zeros_like(embedding[:, : config.num_prefix_positions])
        embedding = np.concatenate([zeros, embedding], axis=1)
        report.notes.append("the class token has no position in the file, and gets 0 in pos_embed")
    state["pos_embed"] = embedding
    if "cls_token" in state and not config.has_class_token:
        del state["cls_token"]
        report.dropped["cls_token"] = "this model has none"


def _fold_positions_of_registers(
    state: State, report: LoadReport, external: ExternalWeights, num_patches: int | None
) -> np.ndarray:
    """Add the positions that registers have, after the class token's, to the registers, and return the others."""
    embedding, num_registers = state["pos_embed"], num_register_positions(external, num_patches)
    if not num_registers or state["reg_token"].shape != (1, num_registers, embedding.shape[2]):
        return embedding
    first = int("cls_token" in state)
    state["reg_token"] = state["reg_token"] + embedding[:, first : first + num_registers]
    report.folded["pos_embed of the registers"] = "reg_token"
    return np.concatenate([embedding[:, :first], embedding[:, first + num_registers :]], axis=1)


def _num_prefix_positions(
    num_rows: int, num_patches: int | None, external: ExternalWeights, config: ModelConfig, grid: tuple[int, int]
) -> int | None:
    """Return how many prefix tokens have a position in the file: by its grid, if that is known (`num_patches`), else
    by which number leaves a square, else by which fits the model; None if none does."""
    candidates = position_counts(external)
    if not config.class_token_pos_embed and 0 not in candidates and "class_token_pos_embed" not in external.model_hints:
        candidates.append(0)
    if num_patches is not None:
        return next((prefix for prefix in candidates if num_rows - prefix == num_patches), None)
    for prefix in candidates:
        if num_rows > prefix and math.isqrt(num_rows - prefix) ** 2 == num_rows - prefix:
            return prefix
    return next((prefix for prefix in candidates if num_rows - prefix == math.prod(grid)), None)


def check_state(
    state: Mapping[str, np.ndarray],
    shapes: Mapping[str, list[int]],
    source: str,
    external: ExternalWeights | None = None,
    config: ModelConfig | None = None,
    *,
    with_head: bool = True,
) -> None:
    """Raise WeightsError unless a state, in either layout, has exactly the names (the layers') and shapes of `shapes`.

    With the file that it is from, the model's config, and whether the model has the file's head, the message gives all
    keys to set for the file's model.
    """
    arrays = split_qkv(state)
    remedy = "these are another model's weights: set model.* as they were trained"
    if external is not None and config is not None:
        remedy += _keys_to_set(external, config, with_head=with_head)
        remedy += ", or -o model.from=init to take the shape from the weights"
    missing = sorted(shapes.keys() - arrays.keys())
    unexpected = sorted(arrays.keys() - shapes.keys())
    if missing or unexpected:
        difference = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model doesn't have"
        num_others = len(missing) + len(unexpected) - 1
        others = f" (and {num_others} more keys differ)" if num_others else ""
        raise WeightsError(f"{source}: {difference}{others}; {remedy}")
    for name, shape in shapes.items():
        if list(arrays[name].shape) != shape:
            raise WeightsError(
                f"{source}: {name} has the shape {list(arrays[name].shape)}, and the model's has {shape}; {remedy}"
            )
