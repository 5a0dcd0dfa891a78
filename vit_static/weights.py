"""Weights from files and into them: plain state dicts in PLSC's names and layout.

A state here is a dict of float32 arrays by name. In files ``attn.qkv`` is one matrix; in a model's own state it is
three (`model.fuse_qkv`, `model.split_qkv`).
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from vit_static.config import InitConfig, UserError
from vit_static.files import write_atomically
from vit_static.model import VisionTransformer, fuse_qkv, resample_pos_embed, split_qkv

State = dict[str, np.ndarray]

# What a state dict of arrays needs to be unpickled; whatever else a file asks for is refused.
_HARMLESS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
}


class WeightsError(UserError):
    """A file of weights that can't be read, or doesn't fit the model."""


class _StateUnpickler(pickle.Unpickler):
    """Reads arrays and containers; refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of weights has no use for")
        return _HARMLESS[module, name]


def read_pdparams(path: Path) -> State:
    """The arrays of a ``.pdparams`` file (`paddle.save` of a state dict, float16 or float32), as float32.

    Raises WeightsError for a file that isn't one. Never runs code from it.
    """
    try:
        with path.open("rb") as file:
            content = _StateUnpickler(file).load()
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from None
    except Exception as error:  # a broken pickle can raise anything
        raise WeightsError(f"{path}: is not a Paddle state dict ({type(error).__name__}: {error})") from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds {type(content).__name__}, not a state dict")
    state = {}
    for name, value in content.items():
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value  # a pickled Tensor: name, data
        if isinstance(name, str) and isinstance(array, np.ndarray) and array.dtype.kind == "f":
            state[name] = array.astype(np.float32)
    if not state:
        raise WeightsError(f"{path}: holds no arrays of weights")
    return state


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
    """What became of a file's weights."""

    used: int = 0
    resampled: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)

    def describe(self) -> str:
        return f"resampled: {', '.join(self.resampled) or 'none'}; fresh: {', '.join(self.reset) or 'none'}"


def load_state(model: VisionTransformer, state: Mapping[str, np.ndarray], source: str) -> None:
    """Sets every weight of a plain model from a state in the files' layout. Raises WeightsError unless all fit."""
    own = model.state_dict()
    given = split_qkv(state)
    _check_fit({name: list(value.shape) for name, value in own.items()}, given, source)
    model.set_state_dict({name: paddle.to_tensor(value) for name, value in given.items()})


def init_from(
    model: VisionTransformer,
    state: Mapping[str, np.ndarray],
    source: str,
    init: InitConfig,
    source_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Starts a model from other weights: the body's, its position embedding resampled to the model's grid.

    `init.head` reset leaves out the file's head and representation layer, and the model keeps its fresh ones.
    `source_grid` is that of the file's patches, a square if None. Raises WeightsError for a key or shape that
    this doesn't explain.
    """
    report = LoadReport()
    own = {name: value.numpy() for name, value in model.state_dict().items()}
    given = split_qkv(state)
    if init.head == "reset":
        given = {name: value for name, value in given.items() if not name.startswith(("head.", "head0."))}
        report.reset = [name for name in own if name.startswith(("head.", "head0."))]
        given.update({name: own[name] for name in report.reset})
    same_grid = source_grid in (None, model.grid)
    if (
        "pos_embed" in given
        and "pos_embed" in own
        and not (same_grid and given["pos_embed"].shape == own["pos_embed"].shape)
    ):
        num_prefix_tokens = own["pos_embed"].shape[1] - model.grid[0] * model.grid[1]
        side = round((given["pos_embed"].shape[1] - num_prefix_tokens) ** 0.5)
        old_grid = source_grid or (side, side)
        if old_grid[0] * old_grid[1] + num_prefix_tokens == given["pos_embed"].shape[1]:
            given["pos_embed"] = resample_pos_embed(given["pos_embed"], old_grid, model.grid)
            report.resampled = ["pos_embed"]
    _check_fit({name: list(value.shape) for name, value in own.items()}, given, source)
    report.used = len(given) - len(report.reset)
    model.set_state_dict({name: paddle.to_tensor(value) for name, value in given.items()})
    return report


def _check_fit(own: Mapping[str, list[int]], given: Mapping[str, np.ndarray], source: str) -> None:
    missing = sorted(own.keys() - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model has not"
        count = len(missing) + len(unexpected)
        more = f" (and {count - 1} more keys differ)" if count > 1 else ""
        raise WeightsError(
            f"{source}: {what}{more}; these are another model's weights: set model.* as they were trained"
        )
    for name, shape in own.items():
        if list(given[name].shape) != shape:
            raise WeightsError(
                f"{source}: {name} is {list(given[name].shape)} and the model's {shape}; "
                "these are another model's weights: set model.* as they were trained"
            )
