"""The compiled program: training and evaluation steps from a model, a loss, an optimizer and a mesh.

The only place that calls `dist.to_static`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.checkpoint.sharded_state import RankShard, ShardedReader
from vit_static.common.errors import ConfigError
from vit_static.config.schema import Config, ParallelConfig
from vit_static.model.distill_loss import DistillCriterion
from vit_static.model.lora import frozen_names
from vit_static.model.loss import Criterion
from vit_static.model.loss_weights import NO_WEIGHTS, LossWeights
from vit_static.model.teacher import Teacher
from vit_static.model.variants import require_head
from vit_static.model.vit import VisionTransformer
from vit_static.optim.optimizers import make_optimizer, step_scalars
from vit_static.optim.param_groups import freeze_backbone
from vit_static.parallel import sharding
from vit_static.parallel.mesh import Mesh, num_micro_batches
from vit_static.program import engine, seeded_dropout
from vit_static.program.autocast import FLOAT32_LAYERS, add_biases_in_low_precision, wrap_forward
from vit_static.program.cpu import product_choice
from vit_static.program.distillation import Distillation
from vit_static.program.grad_buckets import GradSyncConfig
from vit_static.program.pass_list import PassContext, run_passes
from vit_static.program.precision import Precision, newton_schulz_dtype, uses_seeded_dropout
from vit_static.program.recorded_loss import RecordedLoss
from vit_static.program.seeded_draws import place_draws
from vit_static.program.spec import CountCosts, ProgramSpec, TrainingSpec
from vit_static.program.state import ProgramState, float32_weights
from vit_static.program.strategy import make_strategy, recompute_blocks
from vit_static.weights.state import State


class Program:
    """The model as a static program of this rank, compiled for training and evaluation.

    Batches are this rank's part of the global batch. Labels are int64 [B], or targets [B, K] where the spec has
    `target_classes`.
    """

    def __init__(
        self,
        model: VisionTransformer,
        criterion: Criterion,
        mesh: Mesh,
        spec: ProgramSpec,
        teacher: Teacher | None = None,
    ) -> None:
        """Shard the model over the mesh and prepare it for compilation, which happens when a mode is first used.

        `teacher`: that of the training spec's `distill`. Raises ConfigError for settings that the device doesn't
        support.
        """
        self._model, self._mesh, self._spec = model, mesh, spec
        self._criterion: Criterion | DistillCriterion = criterion
        self._grad_sync = _grad_sync_config(spec.parallel, mesh)
        self.compile_seconds = 0.0  # of the training program
        self._mode: str | None = None
        self._built: dict[str, Any] = {}
        self._costs: Any = None
        self._initial_weights: dict[str, paddle.Tensor] = {}  # in float32, until the program is built for training
        self._loss = RecordedLoss(num_micro_batches(spec.parallel))
        training = spec.training
        self._distillation = None
        if teacher is not None and training is not None:
            self._distillation = Distillation(teacher, training.distill, num_micro_batches(spec.parallel))
            self._distillation.add_projector(model)
            self._distillation.place(mesh, spec)
            self._criterion = self._distillation.criterion(criterion)
        stages = sharding.shard_model(model, mesh, spec.parallel.sharding_stage)
        self._dropout = None
        self._draws = None
        if training is not None:
            seeded = uses_seeded_dropout(spec.parallel, mesh.device)
            self._dropout = seeded_dropout.place_dropouts(model, mesh, spec.seed, stages, seeded)
            micro_batches = num_micro_batches(spec.parallel)
            self._draws = place_draws(model, mesh, spec.seed, stages, training.batch_size, micro_batches)
        recompute_blocks(model, spec.parallel.recompute)
        if spec.precision.level == "O1" and mesh.device == "gpu" and spec.kernels.fused_linear:
            add_biases_in_low_precision(model, spec.precision, spec.amp)
        if self._distillation is not None:
            self._distillation.wrap_forward(model)
        wrap_forward(model, spec.precision, spec.amp, self._dropout)
        layer, optimizer, strategy = model, None, make_strategy(spec)
        self._train_size = spec.image_size
        if training is not None:
            layer, optimizer = self._make_optimizer(training, master_grad=strategy.amp.use_master_grad)
            self._train_size = training.image_size or spec.image_size
        elif spec.precision.level == "O2":
            layer = paddle.amp.decorate(model, level="O2", dtype=spec.precision.dtype, excluded_layers=FLOAT32_LAYERS)
        self._main_mode = "eval" if optimizer is None else "train"
        arguments: dict[str, Any] = {"strategy": strategy, "input_spec": self._input_specs(self._main_mode)}
        self._program = dist.to_static(layer, None, self._criterion, optimizer, **arguments)
        self._several: engine.SeveralTrainingPrograms | None = None
        if training is not None and training.image_size_varies:
            layers = [model] if teacher is None else [model, teacher]
            self._several = engine.SeveralTrainingPrograms(self._program, layers, (self._clip, self._scheduler))
        beta1 = None if training is None else training.optim.betas[0]
        unsaved = () if training is None or training.saves_frozen else frozen_names(model)
        self._state = ProgramState(self._program, mesh, partial(self._set_mode, self._main_mode), beta1, unsaved)

    @classmethod
    def for_training(
        cls,
        config: Config,
        model: VisionTransformer,
        mesh: Mesh,
        precision: Precision,
        *,
        learning_rate: Callable[[int], float],
        eval_batch_size: int,
        warmup_steps: int = 0,
        loss_weights: LossWeights = NO_WEIGHTS,
        count_costs: CountCosts | None = None,
        teacher: Teacher | None = None,
        train_image_size: tuple[int, int] | None = None,
    ) -> Program:
        """Make the program of a run, which trains and evaluates.

        `learning_rate` maps the number of completed updates to the rate of the next; `warmup_steps` are those of it.
        `eval_batch_size` is global.
        `loss_weights` are those of the training loss. `count_costs` is called with the compiled training program;
        `costs` returns its result. `teacher` is that of distill.teacher. `train_image_size`: that of the first step's
        images; None: model.image_size.
        """
        require_head(config.model)
        assert (teacher is None) == (config.distill.teacher is None), "the teacher of the config"
        training = TrainingSpec(
            optim=config.optim,
            learning_rate=learning_rate,
            batch_size=config.data.global_batch_size,
            target_classes=config.train_targets,
            freeze=config.train.freeze,
            saves_frozen=config.lora.rank == 0,
            warmup_steps=warmup_steps,
            count_costs=count_costs,
            distill=config.distill,
            image_size=train_image_size,
            image_size_varies=bool(config.train.image_sizes),
        )
        model.pos_embed_resampler.mode = config.init.pos_embed
        spec = ProgramSpec(
            precision=precision,
            image_size=config.model.image_size,
            eval_batch_size=eval_batch_size,
            eval_target_classes=config.eval_targets,
            num_channels=config.model.num_channels,
            parallel=config.parallel,
            amp=config.amp,
            kernels=config.kernels,
            seed=config.seed,
            training=training,
        )
        criterion = Criterion(config.loss, loss_weights, returns_logits=config.evaluates_logits)
        return cls(model, criterion, mesh, spec, teacher)

    @classmethod
    def for_eval(
        cls,
        config: Config,
        model: VisionTransformer,
        mesh: Mesh,
        precision: Precision,
        *,
        eval_batch_size: int,
        returns_logits: bool = False,
    ) -> Program:
        """Make a program that only evaluates, the whole model on every rank. `eval_batch_size` is global.

        `returns_logits`: in addition to the other values (loss.Criterion).
        """
        spec = ProgramSpec(
            precision=precision,
            image_size=config.model.image_size,
            eval_batch_size=eval_batch_size,
            eval_target_classes=config.eval_targets,
            num_channels=config.model.num_channels,
            amp=config.amp,
            kernels=config.kernels,
        )
        return cls(model, Criterion(config.loss, returns_logits=returns_logits), mesh, spec)

    def train_step(self, images: paddle.Tensor, labels: paddle.Tensor, step: int) -> Any:
        """Start the update that follows `step` completed ones and return its loss, without waiting for the device.

        `loss_value` reads the loss, until the next step overwrites it. Images of another size than the last step's
        need a spec with `image_size_varies`.
        """
        training = self._training()
        self.prepare_training((images.shape[2], images.shape[3]))
        self._scheduler.step(step)
        self._scalars.set(step_scalars(step, training.optim, training.warmup_steps))
        # Masks are a function of the seed, the step and the rank's data, so a resumed run draws the same masks.
        if self._draws is not None:
            self._draws.set_step(step)
        if self._dropout is not None:
            self._dropout.set_step(step)
        else:
            entropy = [self._spec.seed, step, self._mesh.dp_rank, self._mesh.pp_rank]
            paddle.seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        with self._mesh.waiting_for_device():  # if it has still too much to do
            engine.run_without_results(self._program, [images, _as_input(labels)])
        return self._loss.tensor()

    def prepare_training(self, image_size: tuple[int, int]) -> None:
        """Make the training program for images of this height and width the current one; compile it if it isn't yet.

        The one of another size is given up; weights and optimizer state stay where they are.
        """
        if image_size != self._train_size:
            assert self._several is not None, "images of another size than the program's"
            self._train_size = image_size
            if self._built.pop("train", None) is not None:
                self._mode = None
                gc.collect()  # its programs refer to each other
        self._set_mode("train")

    def loss_value(self, loss: Any) -> float:
        """Return a loss of `train_step` as a number, averaged over the micro-batches. Waits for the device.

        Returns 0 on every pipeline stage but the last, which computes the loss; Mesh.mean ignores these zeros.
        """
        with self._mesh.waiting_for_device():
            return 0.0 if loss is None else float(np.mean(np.asarray(loss)))

    def loss_parts(self) -> dict[str, float]:
        """Return the label loss and the distillation loss of the last step, by name; empty without a teacher.

        They are averaged as `loss_value`'s, and read until the next step overwrites them. Waits for the device.
        """
        parts = {} if self._distillation is None else self._distillation.loss_parts()
        return {name: self.loss_value(part) for name, part in parts.items()}

    def grad_norm(self) -> float:
        """Return the global norm of the last update's gradients before clipping. Waits for the device.

        Returns NaN on later pipeline stages, where the norm isn't available.
        """
        return self._clip.norm()

    def first_nonfinite_step(self) -> tuple[int, dict[str, float]] | None:
        """Return the number (from 1) of the first step with non-finite gradients and their norms by block, or None.

        Waits for the device. Always None with float16, whose loss scaling skips such steps, and on later stages.
        """
        return None if self._spec.precision.dtype == "float16" else self._clip.first_nonfinite_step()

    def clear_nonfinite(self) -> None:
        """Clear the record of a non-finite step, after the state has been restored."""
        self._clip.clear_nonfinite()

    def eval_step(self, images: paddle.Tensor, labels: paddle.Tensor) -> np.ndarray:
        """Return loss.Criterion's values for this rank's images, [B, 4], or [B, 4 + K] with logits.

        Waits for the device. Returns zeros on every pipeline stage but the last; Mesh.all_reduce_sum ignores them.
        """
        self._set_mode("eval")
        with self._mesh.waiting_for_device():
            values = self._program(images, _as_input(labels))
            if values is not None:
                return np.asarray(values)
        head = self._model.head
        num_logits = int(head.weight.shape[-1]) if self._criterion.returns_logits and head is not None else 0
        return np.zeros((images.shape[0], 4 + num_logits), np.float32)

    def compiled(self, mode: str) -> Any:
        """Return the program of `train` or `eval` as this rank executes it, for inspection."""
        self._set_mode(mode)
        return engine.compiled_program(self._program)

    def state(self) -> dict[str, paddle.Tensor]:
        """Return all weights and all else that training changes, distributed, by name (program/state.py)."""
        return self._state.tensors()

    def shard(self) -> RankShard:
        """Copy to the host what this rank writes into a checkpoint."""
        return self._state.shard()

    def restore(self, shards: ShardedReader) -> None:
        """Load the state from a checkpoint of any mesh and precision. Raises WeightsError if tensors don't match.

        Frozen weights that checkpoints don't have (LoRA's) stay.
        """
        self._state.restore(shards)

    def weights(self, ema: bool = False) -> State:
        """Return the weights (or their moving average) that this rank holds, as float32, in the file layout."""
        return self._state.weights(ema)

    def set_weights(self, state: State) -> None:
        """Set all weights from a state in the file layout, where every rank holds the entire model (`for_eval`)."""
        self._state.set_weights(state)

    def ema_weights(self) -> AbstractContextManager[None]:
        """Replace the weights by their moving average within a context. All ranks must enter and leave together."""
        return self._state.ema_weights()

    def schedule_free_weights(self) -> AbstractContextManager[None]:
        """Replace the weights by schedule_free_adamw's average within a context, as `ema_weights` does."""
        return self._state.schedule_free_weights()

    def costs(self) -> Any:
        """Return the result of `count_costs` for the training program, which is compiled if it hasn't been."""
        self._set_mode("train")
        return self._costs

    def _training(self) -> TrainingSpec:
        assert self._spec.training is not None, "a program that only evaluates"
        return self._spec.training

    def _make_optimizer(self, training: TrainingSpec, master_grad: bool) -> tuple[nn.Layer, Any]:
        """Return the model and its optimizer, decorated for O2 if the precision is O2."""
        spec, model = self._spec, self._model
        if training.freeze == "backbone":
            freeze_backbone(model)
        low_precision = spec.precision.level == "O2"
        optimizer, self._scheduler, self._clip, self._scalars = make_optimizer(
            model,
            training.optim,
            training.learning_rate,
            num_micro_batches=num_micro_batches(spec.parallel),
            low_precision=low_precision,
            stages=[self._mesh.stage(stage) for stage in range(self._mesh.shape.pp)],
            scales_loss=low_precision and spec.precision.dtype == "float16",
            newton_schulz_dtype=newton_schulz_dtype(spec.precision, self._mesh.device),
            sharding_stage=spec.parallel.sharding_stage,
            state_placements=partial(sharding.state_placements, self._mesh),
        )
        if not low_precision:
            return model, optimizer
        self._initial_weights = float32_weights(model)
        layer, optimizer = paddle.amp.decorate(
            model,
            optimizer,
            level="O2",
            dtype=spec.precision.dtype,
            master_weight=True,
            master_grad=master_grad,
            excluded_layers=FLOAT32_LAYERS,
        )
        return layer, optimizer

    def _set_mode(self, mode: str) -> None:
        """Make `mode`, train or eval, the current one. Compiles its program the first time."""
        if self._mode == mode:
            return
        for layer in (self._model, self._criterion):
            layer.train() if mode == "train" else layer.eval()
        if mode not in self._built:
            self._build(mode)
        engine.use_mode(self._program, mode, self._built[mode])
        self._mode = mode
        if mode == "train" and self._initial_weights:
            weights, self._initial_weights = self._initial_weights, {}
            if engine.can_run(self._built[mode]):
                self._state.start_masters(weights)

    def _build(self, mode: str) -> None:
        started = time.perf_counter()
        engine.set_input_specs(self._program, *self._input_specs(mode))
        several = self._several
        if mode == "train":
            self._scalars.start_program()
        with several.building_training() if several is not None and mode == "train" else nullcontext():
            self._built[mode] = engine.build_mode(self._program, mode, partial(self._run_passes, mode))
        if several is not None and engine.can_run(self._built[mode]):
            several.restore_buffers()
        if self._mesh.device == "cpu" and engine.can_run(self._built[mode]):
            product_choice.choices.settle(self._mesh.all_gather_object)
        if mode == "train":
            self._loss.create(engine.place_of(self._program))
            if self._distillation is not None:
                self._distillation.create_variables(engine.place_of(self._program))
            self.compile_seconds = time.perf_counter() - started

    def _run_passes(self, mode: str, compiled: Any) -> None:
        """Run our own passes over the program that Paddle has compiled for this rank and `mode`."""
        spec, training = self._spec, self._spec.training
        context = PassContext(
            is_training=mode == "train",
            device=self._mesh.device,
            world_size=self._mesh.world_size,
            dp_ranks=self._mesh.dp_ranks,
            sharding_stage=spec.parallel.sharding_stage,
            grad_sync=self._grad_sync,
            kernels=spec.kernels,
            count_costs=None if training is None or training.count_costs is None else self._count_costs,
            record_loss=self._record_loss,
        )
        run_passes(compiled, context)

    def _count_costs(self, compiled: Any) -> None:
        count = self._training().count_costs
        if count is not None and self._costs is None:
            self._costs = count(compiled, engine.structured_names(self._program))

    def _record_loss(self, compiled: Any) -> None:
        loss = engine.loss_of(self._program, compiled)
        if loss is not None:
            self._loss.record(compiled, loss)
        if self._distillation is not None:
            self._distillation.record(compiled)

    def _input_specs(self, mode: str) -> list[list[Any]]:
        """Return the engine's input specs of images and of labels or targets, for a global batch."""
        spec, mesh = self._spec, self._mesh
        batch_size, target_classes, image_size = spec.eval_batch_size, spec.eval_target_classes, spec.image_size
        if mode == "train":
            training = self._training()
            # The executor splits a batch into micro-batches.
            batch_size = training.batch_size // num_micro_batches(spec.parallel)
            target_classes, image_size = training.target_classes, self._train_size
        split = sharding.batch_placements(mesh)
        images = [batch_size, spec.num_channels, *image_size]
        labels = [batch_size] if target_classes is None else [batch_size, target_classes]
        dtype = paddle.int64 if target_classes is None else paddle.float32
        return [
            [engine.input_spec("images", images, paddle.float32, mesh.first_stage, split)],
            [engine.input_spec("labels", labels, dtype, mesh.last_stage, split)],
        ]


def _as_input(labels: paddle.Tensor) -> paddle.Tensor:
    """Return class labels unchanged, and targets of any dtype as float32."""
    return labels if labels.ndim == 1 else labels.astype("float32")


def _grad_sync_config(parallel: ParallelConfig, mesh: Mesh) -> GradSyncConfig:
    """Return how gradients are exchanged. Raises ConfigError for a dtype that the device can't reduce."""
    if parallel.reduce_dtype == "bfloat16" and mesh.device == "cpu" and mesh.world_size > 1:
        raise ConfigError(
            "parallel.reduce_dtype = bfloat16: Paddle's CPU build can't reduce bfloat16; set float32 or float16"
        )
    dtype = "" if parallel.reduce_dtype == "float32" else parallel.reduce_dtype
    return GradSyncConfig(int(parallel.bucket_mb * 1e6), parallel.overlap_gradients, dtype)
