"""The teacher in the compiled training step: placed on the mesh, in evaluation, without gradients or an optimizer.

Its parameters are tensors of the program under names that begin with TEACHER_PREFIX, and no part of the model: neither
the optimizer nor checkpoints nor exports know of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle

from vit_static.config.distill_schema import DistillConfig
from vit_static.config.schema import Config
from vit_static.model.distill_loss import DistillCriterion
from vit_static.model.layers import linear
from vit_static.model.loss import Criterion
from vit_static.model.teacher import PROJECTOR, Teacher
from vit_static.model.vit import VisionTransformer
from vit_static.parallel import sharding
from vit_static.parallel.mesh import Mesh
from vit_static.program.autocast import FLOAT32_LAYERS, add_biases_in_low_precision
from vit_static.program.precision import Precision, choose_attention
from vit_static.program.recorded_loss import RecordedLoss
from vit_static.program.spec import ProgramSpec
from vit_static.weights.teacher import TeacherSource

TEACHER_PREFIX = "teacher."
LOSS_PARTS = ("label_loss", "distill_loss")
_LOSS_PART = "vit_static_loss_part"  # attribute of operators; the value is the part's index


class Distillation:
    """A teacher's place in a training program, and the two parts of the loss that it computes."""

    def __init__(self, teacher: Teacher, distill: DistillConfig, num_micro_batches: int) -> None:
        self._teacher, self._distill = teacher, distill
        self._parts = {name: RecordedLoss(num_micro_batches) for name in LOSS_PARTS}

    def add_projector(self, model: VisionTransformer) -> None:
        """Give the model the layer that `features` needs. Call it before the model is placed on the mesh."""
        if self._distill.kind == "features":
            widths = [pooled_width(network) for network in (model, self._teacher.network)]
            model.add_sublayer(PROJECTOR, linear(*widths))

    def place(self, mesh: Mesh, spec: ProgramSpec) -> None:
        """Shard the teacher over the mesh as any model, and give it the precision that an evaluation has."""
        network = self._teacher.network
        sharding.shard_model(network, mesh, spec.parallel.sharding_stage)
        tensors = [*network.named_parameters(), *self._teacher.named_buffers()]
        for name, tensor in tensors:
            tensor.name = f"{TEACHER_PREFIX}{name}"
            tensor.stop_gradient = True
        if spec.precision.level == "O1" and mesh.device == "gpu" and spec.kernels.fused_linear:
            add_biases_in_low_precision(network, spec.precision, spec.amp)
        if spec.precision.level == "O2":
            dtype = spec.precision.dtype
            paddle.amp.decorate(network, level="O2", dtype=dtype, excluded_layers=FLOAT32_LAYERS)

    def wrap_forward(self, model: Any) -> None:
        """Let the model's forward return in training what DistillCriterion reads.

        The teacher comes first, so that its activations are free before the model's are kept for the backward pass.
        """
        forward: Callable[[Any], Any] = model.forward

        def distilled(images: paddle.Tensor) -> Any:
            if not model.training:
                return forward(images)
            output = self._teacher(images)
            if self._distill.kind == "features":
                features = model.features(images)
                return model.logits(features), getattr(model, PROJECTOR)(features), output
            if self._distill.kind == "token":
                return *model.logits_of_heads(model.features(images)), output
            return forward(images), output

        model.forward = distilled

    def criterion(self, criterion: Criterion) -> DistillCriterion:
        """Return the training loss, of which `record` finds the parts."""
        return DistillCriterion(criterion, self._distill, _mark_parts)

    def record(self, program: Any) -> None:
        """Store both parts of the loss in variables of the compiled program, where this rank computes the loss."""
        for operation in list(program.global_block().ops):
            if operation.has_attr(_LOSS_PART):
                part = self._parts[LOSS_PARTS[operation.attrs()[_LOSS_PART]]]
                part.record(program, operation.result(0))

    def create_variables(self, place: Any) -> None:
        """Create these variables."""
        for part in self._parts.values():
            part.create(place)

    def loss_parts(self) -> dict[str, Any]:
        """Return the variables' tensors by name, as RecordedLoss.tensor."""
        return {name: part.tensor() for name, part in self._parts.items()}


def build_teacher(source: TeacherSource, config: Config, precision: Precision, device: str) -> Teacher:
    """Return the teacher of a run with this config, with the attention that the run uses for a model of its shape."""
    attention = choose_attention(source.model, precision, config.parallel, config.kernels, device)
    return source.build(config, attention)


def pooled_width(network: VisionTransformer) -> int:
    """Return the number of channels of a model's features."""
    width = int(network.patch_embed.proj.weight.shape[0])
    return 2 * width if network.pool == "cls_gap" or network.dist_token is not None else width


def _mark_parts(label_losses: Any, distill_losses: Any) -> None:
    for index, losses in enumerate((label_losses, distill_losses)):
        losses.get_defining_op().set_int_attr(_LOSS_PART, index)
