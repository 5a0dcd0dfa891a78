"""The strategy of Paddle's auto-parallel engine: mixed precision, pipeline, gradient accumulation, recomputation."""

from __future__ import annotations

import paddle
import paddle.distributed as dist

from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import num_micro_batches
from vit_static.program import engine
from vit_static.program.spec import ProgramSpec


def make_strategy(spec: ProgramSpec) -> dist.Strategy:
    """Return the engine's strategy for a program."""
    precision, amp, parallel = spec.precision, spec.amp, spec.parallel
    strategy = dist.Strategy()
    micro_batches = num_micro_batches(parallel)
    if precision.level == "O2":
        strategy.amp.enable = True
        strategy.amp.level = "O2"
        strategy.amp.dtype = precision.dtype
        strategy.amp.init_loss_scaling = amp.init_loss_scaling if precision.dtype == "float16" else 1.0
        strategy.amp.use_dynamic_loss_scaling = precision.dtype == "float16"
        strategy.amp.use_master_grad = amp.master_grad
        strategy.amp.use_promote = True
        strategy.amp.custom_white_list = list(amp.white_list)
        # Paddle's list for O2 leaves softmax, the loss and sums in low precision; its list for O1 doesn't. LayerNorm's
        # kernel computes in float32 for any input dtype.
        in_float32 = paddle.amp.amp_lists.black_list()[precision.dtype]["O1"] | {"logsigmoid", *amp.black_list}
        strategy.amp.custom_black_list = sorted(in_float32 - {"layer_norm", *amp.white_list})
    if parallel.pp > 1:
        batch_size = spec.eval_batch_size if spec.training is None else spec.training.batch_size
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


def recompute_blocks(model: VisionTransformer, recompute: str | int) -> None:
    """Mark every block, or every n-th, for recomputation in the backward pass."""
    if recompute == "none":
        return
    every = 1 if recompute == "block" else int(recompute)
    for segment, block in enumerate(model.blocks):
        if segment % every == 0:
            engine.mark_recompute(block, segment)
