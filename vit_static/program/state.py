"""The training state of a program: canonical names, restoring from a checkpoint, the moving average of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.checkpoint.sharded_state import RankShard, ShardedReader, Slices, assign_slices, slice_on_rank
from vit_static.model.lora import is_adapter
from vit_static.model.teacher import PROJECTOR
from vit_static.optim.ema import EMA
from vit_static.optim.schedule_free import OFFSET, averaged_weights
from vit_static.parallel.dist_values import local_array, local_tensor, variable_array
from vit_static.parallel.mesh import Mesh
from vit_static.program import engine
from vit_static.weights.state import State, fuse_qkv, split_qkv

_MASTER = "@master"  # suffix of the float32 master copy of a low-precision weight


class ProgramState:
    """All tensors that training changes, by names that depend neither on the layers' order nor on the precision.

    A weight has the model's own name, an optimizer state of it ``name@moment``, and float16's loss scale
    ``@loss_scaling``. In O2 the float32 master copy takes the weight's name.
    """

    def __init__(
        self,
        dist_model: dist.DistModel,
        mesh: Mesh,
        enter_main_mode: Callable[[], None],
        beta1: float | None,
        unsaved: Iterable[str] = (),
    ) -> None:
        """`enter_main_mode` makes the mode with the optimizer current: the evaluation program doesn't know it.

        `beta1` is the optimizer's, if there is one. `unsaved`: the weights that checkpoints don't have.
        """
        self._dist_model, self._mesh, self._enter_main_mode, self._beta1 = dist_model, mesh, enter_main_mode, beta1
        self._unsaved = frozenset(unsaved)
        self._slices: Slices | None = None  # that this rank writes into checkpoints
        self._variables: dict[str, str] = {}  # the variables of these slices

    def tensors(self) -> dict[str, paddle.Tensor]:
        """Return the distributed tensors by canonical name."""
        return {name: tensor for name, (_, tensor) in self._without_rounded().items()}

    def shard(self) -> RankShard:
        """Copy to the host what this rank writes into a checkpoint.

        Which slices these are doesn't change during training, so they are found once: Paddle creates the distributed
        tensors by copying the whole state.
        """
        if self._slices is None:
            named = {name: value for name, value in self._without_rounded().items() if name not in self._unsaved}
            self._slices = assign_slices({name: tensor for name, (_, tensor) in named.items()}, self._mesh.rank)
            layer_names = {structured: name for name, structured in engine.structured_names(self._dist_model).items()}
            self._variables = {name: layer_names.get(named[name][0], named[name][0]) for name in self._slices}
        return RankShard({name: variable_array(key) for name, key in self._variables.items()}, self._slices)

    def restore(self, shards: ShardedReader) -> None:
        """Load the state from a checkpoint, whatever mesh and precision wrote it.

        Raises WeightsError if the checkpoint lacks a tensor or has it in another shape.
        """
        named = {name: value for name, value in self._named().items() if name not in self._unsaved}
        for name, (_, tensor) in named.items():
            tensor_slice = slice_on_rank(tensor, self._mesh.rank)
            stored_name = name.removesuffix(_MASTER)
            # The loss scale may be missing: a checkpoint of another precision has none.
            if tensor_slice is not None and (stored_name in shards or not name.startswith("@")):
                _assign(tensor, paddle.to_tensor(shards.read(stored_name, tensor_slice)))
        self._dist_model.set_state_dict(dict(named.values()))

    def start_masters(self, weights: Mapping[str, paddle.Tensor]) -> None:
        """Start the float32 master copies from these weights (`float32_weights`), before they were rounded.

        Paddle starts them from the rounded ones.
        """
        named = self._named()
        masters = {name: named[f"{name}{_MASTER}"] for name in weights if f"{name}{_MASTER}" in named}
        for name, (_, tensor) in masters.items():
            _assign(tensor, self._part_of(weights[name], tensor))
        self._dist_model.set_state_dict(dict(masters.values()))

    def _part_of(self, weight: paddle.Tensor, like: paddle.Tensor) -> paddle.Tensor:
        """Return this rank's part of a state, of a weight that ZeRO may not split."""
        shape = local_tensor(like).shape
        for axis, size in enumerate(shape):
            if weight.shape[axis] != size:
                start = self._mesh.dp_rank * size
                weight = weight.slice([axis], [start], [start + size])
        return weight

    def weights(self, ema: bool = False) -> State:
        """Return the weights (or their moving average) that this rank holds, as float32, in the file layout.

        A projector isn't among them; adapters (LoRA) keep the layers' names. The weights of schedule_free_adamw are its
        average. All ranks call this together.
        """
        suffix = f"@{EMA}" if ema else ""
        tensors = {name: tensor for name, tensor in self.tensors().items() if not name.startswith(f"{PROJECTOR}.")}
        state = {name: tensor for name, tensor in tensors.items() if ema or "@" not in name}
        arrays = {
            name.removesuffix(suffix): local_array(tensor).astype(np.float32)
            for name, tensor in state.items()
            if name.endswith(suffix)
        }
        if not ema:
            arrays |= {name: self._schedule_free_average(name, tensors) for name in _schedule_free_names(tensors)}
        adapters = {name: array for name, array in arrays.items() if is_adapter(name)}
        return fuse_qkv({name: array for name, array in arrays.items() if name not in adapters}) | adapters

    def set_weights(self, state: State) -> None:
        """Set all weights from a state in the file layout, where every rank holds the entire model."""
        named = self._named()
        arrays = split_qkv(state)
        for name, value in arrays.items():
            _assign(named[name][1], paddle.to_tensor(value))
        self._dist_model.set_state_dict(dict(named[name] for name in arrays))

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Replace the weights by their moving average within the context. All ranks must enter and leave together."""
        named = self._named()
        averages = {name: f"{name}@{EMA}" for name in named if f"{name}@{EMA}" in named}
        with self._replaced(averages, lambda name, weight: self._gather(named[averages[name]][1], weight)):
            yield

    @contextmanager
    def schedule_free_weights(self) -> Iterator[None]:
        """Replace the weights by schedule_free_adamw's average within the context, as `ema_weights` does."""
        tensors = self.tensors()
        names = _schedule_free_names(tensors)
        with self._replaced(names, lambda name, weight: self._schedule_free_average(name, tensors, weight)):
            yield

    @contextmanager
    def _replaced(self, names: Iterable[str], value_of: Callable[[str, paddle.Tensor], np.ndarray]) -> Iterator[None]:
        """Replace the weights of these names by other values within the context.

        `value_of` returns this rank's part of the value from the name and the weight.
        """
        named = self._named()
        weights = {name: named[name][1] for name in names}
        local_weights = {name: local_tensor(tensor) for name, tensor in weights.items()}
        saved = {name: tensor.clone() for name, tensor in local_weights.items() if tensor._is_initialized()}
        program_state = dict(named[name] for name in weights)
        try:
            for name, tensor in weights.items():
                _assign(tensor, paddle.to_tensor(value_of(name, tensor)))
            self._dist_model.set_state_dict(program_state)
            yield
        finally:
            for name, values in saved.items():
                _assign(weights[name], values)
            self._enter_main_mode()
            self._dist_model.set_state_dict(program_state)

    def _schedule_free_average(
        self, name: str, tensors: Mapping[str, paddle.Tensor], like: paddle.Tensor | None = None
    ) -> np.ndarray:
        """Return this rank's part of the average that is computed from a weight and its offset, among `tensors()`.

        `like`: a tensor with the placements of that part; None: the weight, or its master copy in O2.
        """
        assert self._beta1 is not None
        weight, offset = tensors[name], tensors[f"{name}@{OFFSET}"]
        like = weight if like is None else like
        return averaged_weights(self._gather(weight, like), self._gather(offset, like), self._beta1)

    def _named(self) -> dict[str, tuple[str, paddle.Tensor]]:
        """Return by canonical name the program's own name of each tensor, and the tensor."""
        self._enter_main_mode()
        model_names = engine.structured_names(self._dist_model)
        longest_first = sorted(model_names, key=len, reverse=True)  # linear_11.w_0 also starts with linear_1
        named = {}
        for key, tensor in self._dist_model.state_dict("all").items():
            layer_name = next((name for name in longest_first if key.startswith(name)), None)
            loss_scale = re.fullmatch(r"(loss_scaling|num_good_steps|num_bad_steps|num_skipped_steps)_\d+", key)
            if key in model_names.values():
                named[key] = (key, tensor)
            elif layer_name is not None:
                # Such as linear_3.w_0_moment1_7, where 7 counts the programs built in this process; for a weight with
                # a master copy linear_3.w_0_fp32_master_0_moment1_7.
                kind = re.sub(r"_\d+$", "", key[len(layer_name) + 1 :])
                kind = re.sub(r"^fp32_master_\d+_", "", kind)
                suffix = _MASTER if kind == "fp32_master" else f"@{kind}"
                named[f"{model_names[layer_name]}{suffix}"] = (key, tensor)
            elif loss_scale is not None:
                named[f"@{loss_scale[1]}"] = (key, tensor)
            # All others are computed, not trained: the learning rate, a fixed position embedding.
        return named

    def _without_rounded(self) -> dict[str, tuple[str, paddle.Tensor]]:
        """Return `_named` with the master copies in the place of the weights that are rounded from them."""
        named = self._named()
        masters = {name.removesuffix(_MASTER): name for name in named if name.endswith(_MASTER)}
        return {name: named[masters.get(name, name)] for name in named if not name.endswith(_MASTER)}

    def _gather(self, tensor: paddle.Tensor, like: paddle.Tensor) -> np.ndarray:
        """Return the part of `tensor` that this rank holds of `like`, gathered from the data-parallel ranks if ZeRO
        splits it."""
        local = local_array(tensor)
        dp = list(tensor.process_mesh.dim_names).index("dp")
        if tensor.placements == like.placements:
            return local
        # All ranks sum arrays that are zero except for their own part, one array per tensor-parallel rank.
        mesh, axis = self._mesh, tensor.placements[dp].get_dim()
        gathered_shape = list(local.shape)
        gathered_shape[axis] *= mesh.dp_size
        parts = np.zeros([mesh.shape.mp, *gathered_shape], np.float32)
        if mesh.rank in tensor.process_mesh.process_ids:
            start = mesh.dp_rank * local.shape[axis]
            np.moveaxis(parts[mesh.mp_rank], axis, 0)[start : start + local.shape[axis]] = np.moveaxis(local, axis, 0)
        total = paddle.to_tensor(parts)
        dist.all_reduce(total)
        return total[mesh.mp_rank].numpy()


def _schedule_free_names(tensors: Mapping[str, paddle.Tensor]) -> list[str]:
    """Return the names of the weights that schedule_free_adamw trains."""
    return [name for name in tensors if f"{name}@{OFFSET}" in tensors]


def float32_weights(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """Return copies of this rank's parts of a model's trained weights, by name, without other pipeline stages'."""
    trained = {name: parameter for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    parts = {name: local_tensor(parameter) for name, parameter in trained.items()}
    return {name: part.clone().detach() for name, part in parts.items() if part._is_initialized()}


def _assign(tensor: paddle.Tensor, values: paddle.Tensor) -> None:
    """Copy values into this rank's part, if it has one: tensors of other pipeline stages are uninitialized."""
    local = local_tensor(tensor)
    if local._is_initialized():
        paddle.assign(values.astype(local.dtype), output=local)
