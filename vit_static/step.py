"""The compiled program: the one place of `dist.to_static`, of the engine's strategy and of mixed precision.

From a model, a loss, an optimizer and a mesh to three callables: a training step, an evaluation step, the state.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static import model as model_module
from vit_static import paddle_internals as internals
from vit_static.config import AmpConfig, ConfigError, OptimConfig
from vit_static.loss import Criterion
from vit_static.mesh import Mesh
from vit_static.optim import make_optimizer
from vit_static.weights import State, fuse_qkv

# Below this width Paddle's own CPU kernels are quicker than oneDNN's, whose calls cost more than they save.
ONEDNN_LEAST_WIDTH = 256


@dataclass(frozen=True)
class Precision:
    """What runs, where `amp` may say auto: the level, and the low precision's dtype (float32 for O0)."""

    level: str
    dtype: str


def choose_precision(amp: AmpConfig, device: str) -> Precision:
    """Raises ConfigError for what the device can't do: nothing becomes another precision by itself."""
    level = {"gpu": "O2", "cpu": "O0"}[device] if amp.level == "auto" else amp.level
    if level == "O0":
        return Precision("O0", "float32")
    dtype = "bfloat16" if amp.dtype == "auto" else amp.dtype
    if device == "cpu" and (level == "O2" or dtype == "float16"):
        raise ConfigError(
            f"amp = {level} in {dtype}: a CPU has bfloat16 autocast alone; "
            "set amp.level=O1 with amp.dtype=bfloat16, or amp.level=O0 (or auto)"
        )
    if level == "O1" and dtype == "float16":
        raise ConfigError(
            "amp = O1 in float16: its loss would go unscaled in this version; set amp.dtype=bfloat16, or amp.level=O2"
        )
    return Precision(level, dtype)


def use_onednn(device: str, width: int) -> bool:
    """Whether to run oneDNN's kernels; sets Paddle's flag for this process, before anything is built."""
    use = device == "cpu" and width >= ONEDNN_LEAST_WIDTH
    paddle.set_flags({"FLAGS_use_mkldnn": use})
    return use


class Program:
    """The model as a static program of this rank, compiled for training and evaluation.

    `learning_rate` gives the rate of the n-th update; without it the program only evaluates. `batch_size` and
    `eval_batch_size` are global. Batches are this rank's part.
    """

    def __init__(
        self,
        model: model_module.VisionTransformer,
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
        grad_accum_steps: int = 1,
        seed: int = 0,
        onednn: bool = False,
    ) -> None:
        self._model, self._criterion, self._mesh = model, criterion, mesh
        self._grad_accum_steps = grad_accum_steps
        self._seed = seed
        self._mode: str | None = None
        self._specs = {"eval": self._input_specs(eval_batch_size, image_size)}
        _open_in_forward(model, precision, mesh.device, onednn)
        # The model alone: Paddle's wrapper of the optimizer takes only AdamW and SGD without momentum, and what it adds
        # (sharding the optimizer's state) isn't asked for.
        model, _ = dist.parallelize(model, None, config={"dp_config": {"sharding_level": 0}})
        strategy = _strategy(precision, amp or AmpConfig(), grad_accum_steps)
        if learning_rate is None or optim is None or batch_size is None:
            optimizer = None
        else:
            # A micro-batch: the executor cuts what it is fed into as many.
            self._specs["train"] = self._input_specs(batch_size // grad_accum_steps, image_size)
            low_precision = precision.level == "O2"
            optimizer, self._scheduler, self._clip = make_optimizer(
                model, optim, learning_rate, grad_accum_steps=grad_accum_steps, low_precision=low_precision
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
        self._enter("train")
        self._scheduler.step(step)
        # Masks are a function of the seed, the step and the rank's data, so a resumed run draws the same.
        draw = np.random.SeedSequence([self._seed, step, self._mesh.dp_rank]).generate_state(1)
        paddle.seed(int(draw[0]))
        return self._program(images, labels)

    def scalar(self, loss: Any) -> float:
        """A loss of `train_step` as a number: over its micro-batches, the mean. Waits for the device."""
        return float(np.mean(np.asarray(loss)))

    def grad_norm(self) -> float:
        """The norm of the last update's gradients, all together and before clipping. Waits for the device."""
        return self._clip.norm() / self._grad_accum_steps

    def eval_step(self, images: paddle.Tensor, labels: paddle.Tensor) -> np.ndarray:
        """Losses and label ranks of this rank's images, [B, 2]. Waits for the device."""
        self._enter("eval")
        return np.asarray(self._program(images, labels))

    def compiled(self, mode: str) -> Any:
        """The program of `train` or `eval` as this rank executes it, for looking at."""
        self._enter(mode)
        return internals.compiled_program(self._program)

    def state(self, weights_only: bool = False) -> dict[str, paddle.Tensor]:
        """All that training changes, as distributed tensors, by names that don't depend on the layout of layers.

        Weights go by the model's own names, what the optimizer keeps of each by ``name@moment``.
        """
        return {name: tensor for name, (_, tensor) in self._named_state("param" if weights_only else "all").items()}

    def set_state(self, state: dict[str, paddle.Tensor]) -> None:
        """The inverse of `state`, for tensors that came from it."""
        program_names = {name: program_name for name, (program_name, _) in self._named_state("all").items()}
        self._program.set_state_dict({program_names[name]: tensor for name, tensor in state.items()})

    def _named_state(self, which: str) -> dict[str, tuple[str, paddle.Tensor]]:
        """By canonical name, the program's own name of each tensor and the tensor."""
        self._enter(self._main_mode)  # the evaluation's program knows nothing of the optimizer
        names = internals.structured_names(self._program)
        longest_first = sorted(names, key=len, reverse=True)  # linear_1.w_0 is no part of linear_11.w_0
        named = {}
        for key, tensor in self._program.state_dict(which).items():
            layer_name = next((name for name in longest_first if key.startswith(name)), None)
            if key in names.values():
                named[key] = (key, tensor)
            elif layer_name is not None:
                # linear_3.w_0_moment1_7, say, of which the 7 counts the programs built in this process
                kept = re.sub(r"_\d+$", "", key[len(layer_name) + 1 :])
                named[f"{names[layer_name]}@{kept}"] = (key, tensor)
            # What is left is computed, not trained: the learning rate, a fixed position embedding.
        return named

    def weights(self) -> State:
        """The weights in the files' layout, on this rank whole."""
        return fuse_qkv(
            {name: internals.local_array(tensor).astype(np.float32) for name, tensor in self.state(True).items()}
        )

    def _enter(self, mode: str) -> None:
        """Makes `mode` the current one; builds and compiles it the first time."""
        if self._mode == mode:
            return
        for layer in (self._model, self._criterion):
            layer.train() if mode == "train" else layer.eval()
        internals.set_input_specs(self._program, *self._specs[mode])
        if mode == "train":
            self._program.train()
        else:
            self._program.eval()
            internals.ready_to_evaluate(self._program)
        self._mode = mode

    def _input_specs(self, batch_size: int, image_size: tuple[int, int]) -> list[list[Any]]:
        mesh, split = self._mesh.process_mesh, [dist.Shard(0)]
        return [
            [internals.input_spec("images", [batch_size, 3, *image_size], "float32", mesh, split)],
            [internals.input_spec("labels", [batch_size], "int64", mesh, split)],
        ]


def _strategy(precision: Precision, amp: AmpConfig, grad_accum_steps: int) -> dist.Strategy:
    strategy = dist.Strategy()
    # Reading a result is what waits for the device; those of micro-batches Paddle merges, which it does only in NumPy.
    strategy.return_numpy = grad_accum_steps > 1
    if precision.level == "O2":
        strategy.amp.enable = True
        strategy.amp.level = "O2"
        strategy.amp.dtype = precision.dtype
        strategy.amp.init_loss_scaling = amp.init_loss_scaling
        strategy.amp.use_dynamic_loss_scaling = precision.dtype == "float16"
        strategy.amp.use_master_grad = amp.master_grad
        strategy.amp.use_promote = True
    if grad_accum_steps > 1:
        strategy.gradient_merge.enable = True
        strategy.gradient_merge.k_steps = grad_accum_steps
        strategy.gradient_merge.avg = True
    return strategy


def _open_in_forward(model: nn.Layer, precision: Precision, device: str, onednn: bool) -> None:
    """Wraps the model's forward in what must be open while it is traced.

    On a CPU, Paddle refuses an auto_cast that is opened before the tracing, as the engine does from its strategy;
    on a card the engine's is used for O2, and O1 shares these lines. oneDNN's gradient of a product crashes where
    the first operand, here the images, asks for none.
    """
    forward = model.forward
    autocast = precision.level == "O1"

    def traced(images: paddle.Tensor) -> paddle.Tensor:
        if onednn:
            images.stop_gradient = False
        with paddle.amp.auto_cast(enable=autocast, level="O1", dtype=precision.dtype if autocast else "float16"):
            return forward(images)

    if onednn or autocast:
        model.forward = traced
