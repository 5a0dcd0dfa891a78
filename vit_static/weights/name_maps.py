"""Parameter-name maps between other programs' ViT weights and the files' names (state.py), with the conversion of each
array in both directions.

`tables/` has one module per family of formats. To add a format, add a NameMap there, and add it to the list of
formats.py, by which files are detected, and to that of write.py if it can be written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.config.model_schema import ModelConfig
from vit_static.weights.rope_order import RopeOrder
from vit_static.weights.state import State


@dataclass(frozen=True)
class Conversion:
    """Functions that convert an array to our layout and back; the way back also gets the number of heads.

    If one array of theirs is several of ours, `to_ours` returns a list, and `to_theirs` gets one.
    """

    to_ours: Callable[[np.ndarray], Any]
    to_theirs: Callable[[Any, int], np.ndarray]


def concatenated(conversion: Conversion, num_parts: int) -> Conversion:
    """Return the conversion of an array that has several of ours side by side on its first axis, as torch's do."""
    return Conversion(
        lambda x: [conversion.to_ours(part) for part in np.split(x, num_parts)],
        lambda parts, heads: np.concatenate([conversion.to_theirs(part, heads) for part in parts]),
    )


IDENTITY = Conversion(lambda x: x, lambda x, _: x)
TRANSPOSE = Conversion(lambda x: x.T, lambda x, _: x.T)  # torch's linear layers are [out, in]
CHANNELS_LAST = Conversion(lambda x: x.transpose(3, 2, 0, 1), lambda x, _: x.transpose(2, 3, 1, 0))  # [p, p, 3, C]
TO_HEADS = Conversion(lambda x: x.reshape(x.shape[0], -1), lambda x, h: x.reshape(x.shape[0], h, -1))  # [C, H, d]
HEADS = Conversion(lambda x: x.reshape(-1), lambda x, h: x.reshape(h, -1))  # biases [H, d]
FROM_HEADS = Conversion(lambda x: x.reshape(-1, x.shape[-1]), lambda x, h: x.reshape(h, -1, x.shape[-1]))  # [H, d, C]

Ours = str | tuple[str, ...]  # our name, or those of the arrays that are one of theirs
Names = dict[str, tuple[Ours, Conversion]]  # their name -> ours, conversion


@dataclass(frozen=True)
class ConfigJson:
    """A program's description of the model next to a weight file, such as Hugging Face's config.json."""

    read: Callable[[dict[str, Any], Path], dict[str, Any]]  # its content and path -> hints about the model
    # State, model and number of heads -> content; None: it isn't written.
    write: Callable[[Mapping[str, np.ndarray], ModelConfig, int], dict[str, Any]] | None = None
    file_name: str = "config.json"


PUBLISHED = "no array determines it; the published models have"  # a reason for an assumption, with their value

IMAGE_GRID = "image"  # as a hint for `rope_grid`: that of the image at any size, so positions are patch numbers
# What every program has; `NameMap.options` adds to it.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "rope": ("none",),
    "qk_norm": (False,),
    "norm": ("layer",),
    "mlp": ("gelu",),
    "mlp_norm": (False,),
    "attention_norm": (False,),
    "pre_norm": (False,),
    "gelu": ("erf", "tanh"),
    "pos_embed": ("learn", "sincos2d"),
    "pool": ("cls", "gap", "cls_gap"),
    "qkv_bias": (True, False),
    "distillation_token": (False,),
}


@dataclass(frozen=True)
class NameMap:
    """Names of one format. `{}` in a name is a block's number."""

    format: str  # for people
    embedding: str  # name of the patch embedding's weights: what is before it in a file is a prefix of all names
    block: str  # pattern that begins a block's names and captures its number
    names: Mapping[str, tuple[Ours, Conversion]]
    markers: tuple[str, ...] = ()  # patterns of names that a file has beside the embedding if it is of this format
    absent: tuple[str, ...] = ()  # patterns of names that it doesn't have
    ignored: Mapping[str, str] = field(default_factory=dict)  # pattern of names that the model doesn't need -> reason
    outside: Mapping[str, str] = field(default_factory=dict)  # the same for names without the prefix
    # What the program always does, by keys of the `model` section, and what the file's arrays, with those that `unpack`
    # made of them, say beside their shapes (ValueError for what this model doesn't have).
    model_hints: Mapping[str, Any] = field(default_factory=dict)
    find_hints: Callable[[State], dict[str, Any]] = lambda state: {}
    # Keys that neither the arrays nor the program determine -> what is assumed, unless find_hints or config_json has
    # them.
    assumptions: Mapping[str, str] = field(default_factory=dict)
    # Keys that no array determines, and of which the program has several values -> what to say to someone who has to
    # choose one.
    find_undetermined: Callable[[State], dict[str, str]] = lambda state: {}
    rope_order: RopeOrder = "halves"  # of the channels of queries and keys
    config_json: ConfigJson | None = None
    # Arrays that the table can't express: before the names when reading (ValueError if they don't fit), after them when
    # writing, which also gets the number of heads.
    unpack: Callable[[State], State] = lambda state: state
    pack: Callable[[State, int], State] = lambda state, num_heads: state
    # For writing: the prefix of all names but those that begin with the second; what the program has beside a plain
    # ViT, by keys of the `model` section; why it doesn't have a model, if it doesn't.
    prefix: str = ""
    without_prefix: tuple[str, ...] = ()
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    refuses: Callable[[Mapping[str, np.ndarray], ModelConfig], str | None] = lambda state, model: None

    def lacks_option(self, model: ModelConfig) -> str | None:
        """Return the first key of the `model` section whose value the program doesn't have."""
        for key, values in _PLAIN.items():
            if getattr(model, key) not in (*values, *self.options.get(key, ())):
                return key
        return None

    def for_blocks(self, numbers: Iterable[int]) -> dict[str, tuple[tuple[str, ...], Conversion]]:
        """Return the names of a model with these blocks."""
        blocks = list(numbers)
        return {
            theirs.format(number): (tuple(name.format(number) for name in _as_tuple(ours)), conversion)
            for theirs, (ours, conversion) in self.names.items()
            for number in (blocks if "{}" in theirs else [0])
        }

    def blocks_in(self, names: Iterable[str]) -> list[int]:
        """Return the sorted numbers of the blocks that occur in names."""
        return sorted({int(match[1]) for name in names if (match := re.match(self.block, name))})

    def has_markers(self, names: Iterable[str]) -> bool:
        """Return whether names without their prefix have all of the markers and nothing that is absent."""
        lines = "\n".join(names)
        has = [bool(re.search(rf"^{marker}$", lines, re.MULTILINE)) for marker in (*self.markers, *self.absent)]
        return all(has[: len(self.markers)]) and not any(has[len(self.markers) :])


def _as_tuple(ours: Ours) -> tuple[str, ...]:
    return (ours,) if isinstance(ours, str) else ours


def same(*names: str) -> Names:
    """Return arrays that have our name and layout."""
    return {name: (name, IDENTITY) for name in names}


def norms(pairs: Mapping[str, str], weight: str = "weight") -> Names:
    """Return the names of norms, from their prefixes to our layers."""
    return {
        f"{theirs}{suffix}": (f"{ours}.{our_suffix}", IDENTITY)
        for theirs, ours in pairs.items()
        for suffix, our_suffix in ((weight, "weight"), ("bias", "bias"))
    }


def linears(
    pairs: Mapping[str, str] | Mapping[str, Sequence[str]], conversion: Conversion, kernel: str = "weight"
) -> Names:
    """Return the names of linear layers, from their prefixes to our layers; a bias has the same layout everywhere.

    Several of our layers are one of theirs, with the outputs side by side.
    """
    names: Names = {}
    for theirs, ours in pairs.items():
        if isinstance(ours, str):
            names[f"{theirs}{kernel}"] = (f"{ours}.weight", conversion)
            names[f"{theirs}bias"] = (f"{ours}.bias", IDENTITY)
        else:
            names[f"{theirs}{kernel}"] = (
                tuple(f"{layer}.weight" for layer in ours),
                concatenated(conversion, len(ours)),
            )
            names[f"{theirs}bias"] = (tuple(f"{layer}.bias" for layer in ours), concatenated(IDENTITY, len(ours)))
    return names


MAX_BLOCKS = 1000  # in arrays that hold all blocks
PRETRAINING = "is only used in pretraining"
NOT_IN_TOWER = "is not part of the image tower"  # of a model that was trained with images and texts
# Beside the image tower in files of OpenCLIP, where timm's are below visual.trunk, and of EVA-CLIP's authors.
OF_TEXTS = {
    r"(.*\.)?text\..*": NOT_IN_TOWER,
    r"(.*\.)?logit_(scale|bias)": NOT_IN_TOWER,
    r"(.*\.)?visual\.head\..*": "is OpenCLIP's projection behind timm's tower",
}

# Names that timm's ViT and PLSC have in common: timm took them from Google's code, and others from timm.
LAYERS = {
    "blocks.{}.attn.qkv.": "blocks.{}.attn.qkv",
    "blocks.{}.attn.proj.": "blocks.{}.attn.proj",
    "blocks.{}.mlp.fc1.": "blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2.": "blocks.{}.mlp.fc2",
    "head.": "head",
    "head_dist.": "head_dist",
}
NORMS = {"blocks.{}.norm1.": "blocks.{}.norm1", "blocks.{}.norm2.": "blocks.{}.norm2", "norm.": "norm"}
_TOKENS = ("cls_token", "dist_token", "reg_token")
EMBEDDINGS = same(*_TOKENS, "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
SCALES = same("blocks.{}.ls1.gamma", "blocks.{}.ls2.gamma")
BLOCK = r"blocks\.([0-9]{1,4})\."
