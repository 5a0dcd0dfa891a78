"""The compiled program: the one place of `dist.to_static`, of the engine's strategy and of mixed precision.

From a model, a loss, an optimizer and a mesh to three callables: a training step, an evaluation step, the state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.checkpoint.sharded_state import ShardedReader, slice_on_rank
from vit_static.common.errors import ConfigError
from vit_static.config.schema import AmpConfig, KernelsConfig, OptimConfig, ParallelConfig
from vit_static.model.loss import Criterion
from vit_static.model.vit import Dropout, VisionTransformer
from vit_static.optim.optimizers import EMA, make_optimizer, step_scalars
from vit_static.optim.param_groups import freeze_backbone
from vit_static.parallel import gloo, sharding
from vit_static.parallel.dist_values import local_array, local_tensor
from vit_static.parallel.mesh import Mesh, num_micro_batches
from vit_static.plan.costs import FLOAT32, CostModel, Costs, program_costs
from vit_static.program import engine, grad_buckets, passes, seeded_dropout
from vit_static.program.cpu import lowering
from vit_static.program.grad_buckets import GradSyncConfig
from vit_static.program.precision import Precision, _seeds_dropout
from vit_static.weights.formats import State, fuse_qkv

_MASTER = "@master"  # of a weight in half precision, among the names of the state


class Program:
    """The model as a static program of this rank, compiled for training and evaluation.

    `learning_rate` gives the rate of the n-th update; without it the program only evaluates. `batch_size` and
    `eval_batch_size` are global. Batches are this rank's part. `train_targets`, `eval_targets`: None where labels are
    [B], the number of classes where they are targets [B, num_classes] (loss.py). `counting`: how `costs` counts.
    """

    def __init__(
        self,
        model: VisionTransformer,
        criterion: Criterion,
        mesh: Mesh,
        precision: Precision,
        *,
        image_size: tuple[int, int],
        eval_batch_size: int,
        batch_size: int | None = None,
        optim: OptimConfig | None = None,
        amp: AmpConfig | None = None,
        learning_rate: Callable[[int], float] | None = None,
        parallel: ParallelConfig | None = None,
        seed: int = 0,
        kernels: KernelsConfig | None = None,
        train_targets: int | None = None,
        eval_targets: int | None = None,
        freeze: str = "none",
        counting: CostModel = FLOAT32,
    ) -> None:
        parallel, kernels = parallel or ParallelConfig(), kernels or KernelsConfig()
        self._model, self._criterion, self._mesh = model, criterion, mesh
        self._num_micro_batches = num_micro_batches(parallel)
        self._seed = seed
        self._mode: str | None = None
        self._built: dict[str, Any] = {}
        self._costs: Costs | None = None
        self._counting = counting
        self._sharding_stage = parallel.sharding_stage
        self._exchange = _exchange(parallel, mesh)
        self._kernels = kernels
        self._skips_unsound = precision.dtype == "float16"
        self._specs = {"eval": self._input_specs(eval_batch_size, image_size, eval_targets)}
        stages = sharding.shard_model(model, mesh, parallel.sharding_stage)
        self._dropout = None
        if learning_rate is not None:
            self._dropout = _place_dropouts(model, mesh, seed, stages, _seeds_dropout(parallel, mesh.device))
        _recompute_blocks(model, parallel.recompute)
        amp = amp or AmpConfig()
        _open_in_forward(model, precision, amp, self._dropout)
        strategy = _strategy(precision, amp, parallel, batch_size or eval_batch_size)
        if freeze == "backbone":
            freeze_backbone(model)
        if learning_rate is None or optim is None or batch_size is None:
            optimizer = None
        else:
            # A micro-batch: the executor cuts what it is fed into as many.
            micro_batch_size = batch_size // self._num_micro_batches
            self._specs["train"] = self._input_specs(micro_batch_size, image_size, train_targets)
            low_precision = precision.level == "O2"
            self._optim = optim
            optimizer, self._scheduler, self._clip, self._numbers = make_optimizer(
                model,
                optim,
                learning_rate,
                num_micro_batches=self._num_micro_batches,
                low_precision=low_precision,
                sharding_stage=parallel.sharding_stage,
                state_placements=partial(sharding.state_placements, mesh),
            )
            if low_precision:
                model, optimizer = paddle.amp.decorate(
                    model,
                    optimizer,
                    level="O2",
                    dtype=precision.dtype,
                    master_weight=True,
                    master_grad=strategy.amp.use_master_grad,
                )
        self._main_mode = "eval" if optimizer is None else "train"
        first = self._specs[self._main_mode]
        self._program = dist.to_static(model, None, criterion, optimizer, strategy=strategy, input_spec=first)

    def train_step(self, images: paddle.Tensor, labels: paddle.Tensor, step: int) -> Any:
        """One update, the one after `step` done ones: this rank's loss, which isn't waited for (`scalar` reads it)."""
        self._set_mode("train")
        self._scheduler.step(step)
        self._numbers.set(step_scalars(step, self._optim))
        # Masks are a function of the seed, the step and the rank's data, so a resumed run draws the same.
        if self._dropout is not None:
            self._dropout.set_step(step)
        else:
            draw = np.random.SeedSequence([self._seed, step, self._mesh.dp_rank, self._mesh.pp_rank]).generate_state(1)
            paddle.seed(int(draw[0]))
        return self._program(images, _as_input(labels))

    def loss_value(self, loss: Any) -> float:
        """A loss of `train_step` as a number: over its micro-batches, the mean. Waits for the device.

        0 on a rank of a pipeline's earlier stages, which has no loss (Mesh.mean doesn't count it).
        """
        return 0.0 if loss is None else float(np.mean(np.asarray(loss)))

    def grad_norm(self) -> float:
        """The norm of the last update's gradients, all together and before clipping. Waits for the device.

        NaN on a rank of a pipeline's later stages, which doesn't know it.
        """
        return self._clip.norm()

    def first_nonfinite_step(self) -> tuple[int, dict[str, float]] | None:
        """The number, from 1, of the first step whose gradients weren't finite, and their norms by block; None where
        there is none. Waits for the device.

        None with float16, too, whose scale of the loss passes such steps over, and on later stages of a pipeline.
        """
        return None if self._skips_unsound else self._clip.first_nonfinite_step()

    def clear_nonfinite(self) -> None:
        """Once what such a step has done to the state has been undone."""
        self._clip.clear_nonfinite()

    def eval_step(self, images: paddle.Tensor, labels: paddle.Tensor) -> np.ndarray:
        """What loss.Criterion gives of this rank's images, [B, 4]. Waits for the device.

        Zeros on a rank of a pipeline's earlier stages, which has none of it (Mesh.total doesn't count them).
        """
        self._set_mode("eval")
        found = self._program(images, _as_input(labels))
        return np.zeros((images.shape[0], 4), np.float32) if found is None else np.asarray(found)

    def compiled(self, mode: str) -> Any:
        """The program of `train` or `eval` as this rank executes it, for looking at."""
        self._set_mode(mode)
        return engine.compiled_program(self._program)

    def state(self) -> dict[str, paddle.Tensor]:
        """All that training changes, as distributed tensors, by names that don't depend on the layout of layers, nor on
        the precision: weights are float32, their master copies in O2.

        Weights go by the model's own names, what the optimizer keeps of each by ``name@moment``, float16's scale of
        the loss by ``@loss_scaling``.
        """
        named = self._named_state()
        masters = {name.removesuffix(_MASTER): name for name in named if name.endswith(_MASTER)}
        return {name: named[masters.get(name, name)][1] for name, _ in named.items() if not name.endswith(_MASTER)}

    def restore(self, parts: ShardedReader) -> None:
        """Fills the state from a checkpoint's parts, whatever mesh and precision wrote them.

        Raises WeightsError where they lack something.
        """
        named = self._named_state()
        for name, (_, tensor) in named.items():
            region = slice_on_rank(tensor, self._mesh.rank)
            if region is not None and (name.removesuffix(_MASTER) in parts or not name.startswith("@")):
                self._put(tensor, paddle.to_tensor(parts.read(name.removesuffix(_MASTER), region)))
        self._program.set_state_dict(dict(named.values()))

    def _named_state(self) -> dict[str, tuple[str, paddle.Tensor]]:
        """By canonical name, the program's own name of each tensor and the tensor."""
        self._set_mode(self._main_mode)  # the evaluation's program knows nothing of the optimizer
        names = engine.structured_names(self._program)
        longest_first = sorted(names, key=len, reverse=True)  # linear_1.w_0 is no part of linear_11.w_0
        named = {}
        for key, tensor in self._program.state_dict("all").items():
            layer_name = next((name for name in longest_first if key.startswith(name)), None)
            of_loss = re.fullmatch(r"(loss_scaling|num_good_steps|num_bad_steps)_\d+", key)
            if key in names.values():
                named[key] = (key, tensor)
            elif layer_name is not None:
                # linear_3.w_0_moment1_7, say, of which the 7 counts the programs built in this process; of what has
                # a master copy, linear_3.w_0_fp32_master_0_moment1_7.
                kept = re.sub(r"_\d+$", "", key[len(layer_name) + 1 :])
                kept = re.sub(r"^fp32_master_\d+_", "", kept)
                named[f"{names[layer_name]}{_MASTER if kept == 'fp32_master' else f'@{kept}'}"] = (key, tensor)
            elif of_loss is not None:
                named[f"@{of_loss[1]}"] = (key, tensor)
            # What is left is computed, not trained: the learning rate, a fixed position embedding.
        return named

    def weights(self, averaged: bool = False) -> State:
        """The weights, or their moving average, in the files' layout, on this rank whole."""
        suffix = f"@{EMA}" if averaged else ""
        state = {name: tensor for name, tensor in self.state().items() if averaged or "@" not in name}
        return fuse_qkv(
            {
                name.removesuffix(suffix): local_array(tensor).astype(np.float32)
                for name, tensor in state.items()
                if name.endswith(suffix)
            }
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their moving average, for evaluating it. All ranks come and go together."""
        named = self._named_state()
        averages = {name: f"{name}@{EMA}" for name in named if f"{name}@{EMA}" in named}
        weights = {name: named[name][1] for name in averages}
        before = {name: local_tensor(tensor) for name, tensor in weights.items()}
        before = {name: tensor.clone() for name, tensor in before.items() if tensor._is_initialized()}
        by_program = dict(named[name] for name in averages)
        try:
            for name, tensor in weights.items():
                self._put(tensor, paddle.to_tensor(self._gathered(named[averages[name]][1], tensor)))
            self._program.set_state_dict(by_program)
            yield
        finally:
            for name, values in before.items():
                self._put(weights[name], values)
            self._set_mode(self._main_mode)
            self._program.set_state_dict(by_program)

    def _put(self, tensor: paddle.Tensor, values: paddle.Tensor) -> None:
        local = local_tensor(tensor)
        if local._is_initialized():  # another stage's isn't
            paddle.assign(values.astype(local.dtype), output=local)

    def _gathered(self, part: paddle.Tensor, like: paddle.Tensor) -> np.ndarray:
        """Of what ZeRO splits over the data-parallel ranks, as much as this rank has of `like`."""
        local = local_array(part)
        dp = list(part.process_mesh.dim_names).index("dp")
        if part.placements == like.placements:
            return local
        # A sum over all ranks of what each has, and zeros: of each tensor-parallel rank by itself.
        mesh, axis = self._mesh, part.placements[dp].get_dim()
        of_rank = list(local.shape)
        of_rank[axis] *= mesh.dp_size
        whole = np.zeros([mesh.shape.mp, *of_rank], np.float32)
        if mesh.rank in part.process_mesh.process_ids:
            start = mesh.dp_rank * local.shape[axis]
            np.moveaxis(whole[mesh.mp_rank], axis, 0)[start : start + local.shape[axis]] = np.moveaxis(local, axis, 0)
        summed = paddle.to_tensor(whole)
        dist.all_reduce(summed)
        return summed[mesh.mp_rank].numpy()

    def _set_mode(self, mode: str) -> None:
        """Makes `mode` the current one; builds and compiles it the first time."""
        if self._mode == mode:
            return
        for layer in (self._model, self._criterion):
            layer.train() if mode == "train" else layer.eval()
        if mode not in self._built:
            self._entering = mode
            engine.set_input_specs(self._program, *self._specs[mode])
            self._built[mode] = engine.build_mode(self._program, mode, self._run_passes)
        engine.use_mode(self._program, mode, self._built[mode])
        self._mode = mode

    def costs(self) -> Costs:
        """What a training step costs this rank."""
        self._set_mode("train")
        assert self._costs is not None
        return self._costs

    def _run_passes(self, compiled: Any) -> None:
        """What Paddle's passes leave to be done in a program of this rank."""
        seeded_dropout.seed_dropouts(compiled)
        if self._sharding_stage == 3:
            passes.regather_params_in_backward(compiled)
        if self._entering == "train" and self._exchange.bucket_bytes > 0:
            grad_buckets.bucket_gradients(compiled, self._exchange)
        if self._entering == "train" and self._costs is None:
            self._costs = program_costs(compiled, engine.structured_names(self._program), self._counting)
        if self._mesh.device == "cpu" and self._mesh.world_size > 1:
            gloo.replace_collectives(compiled)
        if self._mesh.device == "cpu" and self._kernels.onednn:
            lowering.lower(compiled)
        if self._mesh.device == "gpu" and self._kernels.fused_linear:
            passes.fuse_linears(compiled, self._kernels.fused_gelu)
        if self._mesh.device == "gpu" and self._kernels.fused_dropout:
            passes.fuse_dropouts(compiled)

    def _input_specs(self, batch_size: int, image_size: tuple[int, int], targets: int | None) -> list[list[Any]]:
        mesh = self._mesh
        split = sharding.batch_placements(mesh)
        shape, dtype = ([batch_size], paddle.int64) if targets is None else ([batch_size, targets], paddle.float32)
        return [
            [engine.input_spec("images", [batch_size, 3, *image_size], paddle.float32, mesh.first_stage, split)],
            [engine.input_spec("labels", shape, dtype, mesh.last_stage, split)],
        ]


def _as_input(labels: paddle.Tensor) -> paddle.Tensor:
    """Labels as they are, zeros and ones of any type as float32."""
    return labels if labels.ndim == 1 else labels.astype("float32")


def _exchange(parallel: ParallelConfig, mesh: Mesh) -> GradSyncConfig:
    if parallel.reduce_dtype == "bfloat16" and mesh.device == "cpu" and mesh.world_size > 1:
        raise ConfigError(
            "parallel.reduce_dtype = bfloat16: Paddle's CPU build compiles no exchange of it; set float32 or float16"
        )
    dtype = "" if parallel.reduce_dtype == "float32" else parallel.reduce_dtype
    return GradSyncConfig(int(parallel.bucket_mb * 1e6), parallel.overlap_gradients, dtype)


def _strategy(precision: Precision, amp: AmpConfig, parallel: ParallelConfig, batch_size: int) -> dist.Strategy:
    strategy = dist.Strategy()
    micro_batches = num_micro_batches(parallel)
    # Reading a result is what waits for the device; those of micro-batches Paddle merges, which it does only in NumPy.
    strategy.return_numpy = micro_batches > 1
    if precision.level == "O2":
        strategy.amp.enable = True
        strategy.amp.level = "O2"
        strategy.amp.dtype = precision.dtype
        strategy.amp.init_loss_scaling = amp.init_loss_scaling if precision.dtype == "float16" else 1.0
        strategy.amp.use_dynamic_loss_scaling = precision.dtype == "float16"
        strategy.amp.use_master_grad = amp.master_grad
        strategy.amp.use_promote = True
        strategy.amp.custom_white_list = list(amp.white_list)
        # Paddle's own list for O2 leaves softmax, the loss and sums in low precision; that for O1 doesn't. LayerNorm's
        # kernel computes in float32 whatever it reads.
        in_float32 = paddle.amp.amp_lists.black_list()[precision.dtype]["O1"] | {"logsigmoid", *amp.black_list}
        strategy.amp.custom_black_list = sorted(in_float32 - {"layer_norm", *amp.white_list})
    if parallel.pp > 1:
        strategy.pipeline.enable = True
        strategy.pipeline.schedule_mode = parallel.pp_schedule
        strategy.pipeline.pp_degree = parallel.pp
        strategy.pipeline.accumulate_steps = micro_batches
        strategy.pipeline.micro_batch_size = batch_size // micro_batches
    elif micro_batches > 1:
        strategy.gradient_merge.enable = True
        strategy.gradient_merge.k_steps = micro_batches
    strategy._recompute.enable = parallel.recompute != "none"
    return strategy


def _recompute_blocks(model: VisionTransformer, recompute: str | int) -> None:
    """Marks every block, or every n-th, for being computed again in the backward."""
    if recompute == "none":
        return
    every = 1 if recompute == "block" else int(recompute)
    for segment, block in enumerate(model.blocks):
        if segment % every == 0:
            engine.mark_recompute(block, segment)


def _place_dropouts(
    model: nn.Layer, mesh: Mesh, seed: int, stages: dict[str, int], seeded: bool
) -> seeded_dropout.SeededDropout | None:
    """Has every dropout of the model draw its masks on its stage, from a seed of its own where `seeded`."""
    dropouts = [(layer, stages[name]) for name, layer in model.named_sublayers() if isinstance(layer, Dropout)]
    if not any(layer.p > 0.0 for layer, _ in dropouts):
        return None
    meshes = [mesh.stage(stage) for stage in range(mesh.shape.pp)]
    seeds = seeded_dropout.SeededDropout(seed, mesh.rank, meshes, [stage for _, stage in dropouts])
    for index, (layer, stage) in enumerate(dropouts):
        layer.function = seeds.function(index) if seeded else seeded_dropout.placed_dropout(meshes[stage])
    return seeds if seeded else None


def _open_in_forward(
    model: nn.Layer, precision: Precision, amp: AmpConfig, seeds: seeded_dropout.SeededDropout | None
) -> None:
    """Wraps the model's forward in what must be open while it is traced.

    On a CPU, Paddle refuses an auto_cast that is opened before the tracing, as the engine does from its strategy;
    on a card the engine's is used for O2, and O1 shares these lines.
    """
    forward = model.forward
    autocast = precision.level == "O1"

    def traced(images: paddle.Tensor) -> paddle.Tensor:
        if seeds is not None and model.training:
            seeds.begin()
        if not autocast:  # nor one that is off: that would switch O2's off, which the engine has opened
            return forward(images)
        with paddle.amp.auto_cast(
            level="O1",
            dtype=precision.dtype,
            custom_white_list=set(amp.white_list),
            custom_black_list=set(amp.black_list),
        ):
            return forward(images)

    if autocast or seeds is not None:
        model.forward = traced
