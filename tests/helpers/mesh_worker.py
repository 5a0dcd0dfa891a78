"""Worker process of helpers/mesh_cases.py: runs training cases, each on its mesh.

`main` gets a JSON file of `Case`s, a folder to which each rank writes its `Outcome` of each case (NAME.RANK, pickled),
and a folder of images.
"""

from __future__ import annotations

import gc
import hashlib
import pickle
from collections import defaultdict
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import pir
from paddle.static import MetaTensor
from paddle.static.python_op import register_op
from pydantic import BaseModel, TypeAdapter

from helpers.small import images_and_labels
from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig, LossConfig
from vit_static.config.distill_schema import DistillConfig, DistillKind
from vit_static.config.lora_schema import LoraConfig
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config, InitConfig, OptimConfig, ParallelConfig, TrainConfig
from vit_static.data.loader import EvalLoader
from vit_static.data.mixup import Mixup
from vit_static.data.open_set import open_set
from vit_static.model.draws import at_size
from vit_static.model.lora import add_adapters
from vit_static.model.loss_weights import NO_WEIGHTS, LossWeights
from vit_static.model.teacher import Normalization, Teacher
from vit_static.model.variants import variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.parallel import gloo
from vit_static.parallel.gloo import Traffic
from vit_static.parallel.mesh import Mesh, MeshShape, make_mesh, rank_and_world_size, resolve_mesh, start_mesh
from vit_static.plan.costs import Collective, program_costs
from vit_static.program.precision import Precision
from vit_static.program.program import Program
from vit_static.report.predictions import Predictions
from vit_static.train.evaluate import EvalMetrics, evaluate, predict_all

BATCH_SIZE = 20
EVAL_BATCH_SIZE = 8


class Case(BaseModel):
    """A short training run, with the same images and labels on every mesh."""

    name: str
    model: ModelConfig
    optim: OptimConfig
    parallel: ParallelConfig  # `dp` a number
    steps: list[int] = list(range(6))  # passed to `train_step`
    evaluates: bool = False  # after the last step
    records_masks: bool = False
    distills: DistillKind | None = None  # with a teacher of another width, size of images and normalization
    image_sizes: list[tuple[int, int]] = []  # of each step; empty: the model's
    lora: LoraConfig = LoraConfig()
    mixes: bool = False  # applies mixup and CutMix, and so has targets instead of labels; with weights in the loss

    @property
    def world_size(self) -> int:
        return int(self.parallel.dp) * self.parallel.mp * self.parallel.pp


@dataclass
class Part:
    """The part of a tensor that one rank holds."""

    local: np.ndarray
    shape: tuple[int, ...]  # of the entire tensor
    num_parts: tuple[int, ...]  # along each axis of the tensor
    index: tuple[int, ...]  # of this part along each axis


@dataclass
class Outcome:
    """Results of a case on one rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)  # NaN on ranks that don't compute it
    state: dict[str, Part] = field(default_factory=dict)
    # for each step: the masks by the number of the dropout layer, in the order of execution
    masks: list[dict[int, list[np.ndarray]]] = field(default_factory=list)
    evaluation: EvalMetrics | None = None
    predictions: Predictions | None = None  # from which the evaluation is computed
    ema_evaluation: EvalMetrics | None = None
    loss_parts: list[dict[str, float]] = field(default_factory=list)  # of each step
    teacher_digests: list[str] = field(default_factory=list)  # of this rank's part, before and after the steps
    collectives: tuple[Collective, ...] = ()
    traffic: dict[str, Traffic] = field(default_factory=dict)  # of the last step, by kind of collective


class RecordingProgram(Program):
    """Program that records the mask of each dropout in `masks`, each time that it draws one."""

    def _run_passes(self, mode: str, compiled: Any) -> None:
        super()._run_passes(mode, compiled)
        with paddle.static.program_guard(compiled):
            for operation in list(compiled.global_block().ops):
                # The engine passes a program without a pipeline twice.
                if operation.name() == "pd_op.dropout" and not operation.has_attr("recorded"):
                    operation.set_bool_attr("recorded", True)
                    pir.set_insertion_point_after(operation)
                    recorded = record(operation.result(1), operation.attrs()["vit_static_dropout"])
                    recorded.get_defining_op().op_role = operation.op_role


masks: dict[int, list[np.ndarray]] = defaultdict(list)


def _like(x: MetaTensor, dropout: int) -> MetaTensor:
    return MetaTensor(shape=x.shape, dtype=x.dtype)


@register_op(name="test_record", infer_meta=_like, input_names=["x"], output_names=["out"])
def record(x: paddle.Tensor, dropout: int) -> paddle.Tensor:
    masks[dropout].append(np.array(x))
    return x


def run(case: Case, mesh: Mesh, images_root: Path) -> Outcome:
    paddle.seed(3)
    model = VisionTransformer(case.model)
    config = Config(
        name=case.name,
        seed=5,
        model=case.model,
        data=DataConfig(global_batch_size=BATCH_SIZE),
        augment=AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0) if case.mixes else AugmentConfig(),
        loss=LossConfig(name="bce", focal_gamma=1.5) if case.mixes else LossConfig(),
        optim=case.optim,
        parallel=case.parallel,
        distill=DistillConfig()
        if case.distills is None
        else DistillConfig(teacher="t", kind=case.distills, weight=0.3),
        train=TrainConfig(image_sizes=tuple((size, 1.0) for size in case.image_sizes[:1])),
        init=InitConfig.model_validate({"from": "the weights drawn above"}),
        lora=case.lora,
    )
    add_adapters(model, case.lora)
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_b"):  # not zeros, with which A gets no gradient
            parameter.set_value(paddle.normal(0.0, 0.1, parameter.shape))
    teacher = None if case.distills is None else make_teacher(config)
    weights = np.linspace(0.5, 2.0, case.model.num_classes, dtype=np.float32)
    program = (RecordingProgram if case.records_masks else Program).for_training(
        config,
        model,
        mesh,
        Precision("O0", "float32"),
        learning_rate=lambda step: case.optim.lr,
        eval_batch_size=EVAL_BATCH_SIZE,
        loss_weights=LossWeights(weights, weights[::-1].copy()) if case.mixes else NO_WEIGHTS,
        count_costs=program_costs,
        teacher=teacher,
        train_image_size=next(iter(case.image_sizes), None),
    )
    mixup = Mixup(config.augment, 6, seed=5)
    outcome = Outcome()
    size = BATCH_SIZE // mesh.dp_size
    local = slice(mesh.dp_rank * size, (mesh.dp_rank + 1) * size)
    for number, step in enumerate(case.steps):
        model_at_size = at_size(case.model, case.image_sizes[number]) if case.image_sizes else case.model
        images, labels = images_and_labels(BATCH_SIZE, model_at_size, seed=step)
        masks.clear()
        gloo.traffic.clear()
        batch = mixup((images[local], labels[local]), step)
        loss = program.loss_value(program.train_step(*batch, step))
        outcome.traffic = deepcopy(dict(gloo.traffic))
        outcome.losses.append(mesh.mean(loss))
        outcome.loss_parts.append({name: mesh.mean(value) for name, value in program.loss_parts().items()})
        outcome.teacher_digests.append(teacher_digest(teacher))
        outcome.grad_norms.append(program.grad_norm())
        outcome.masks.append(dict(masks))
        program.shard()  # finds the slices; the one at the end copies only
    is_schedule_free = case.optim.name == "schedule_free_adamw"
    if case.evaluates:
        with program.schedule_free_weights() if is_schedule_free else nullcontext():
            outcome.predictions = predict_all(program, eval_loader(case, mesh, images_root), mesh)
        outcome.evaluation = EvalMetrics.of(outcome.predictions)
    if case.evaluates and case.optim.ema_decay:
        before = program.weights()
        with program.ema_weights():
            outcome.ema_evaluation = evaluate(program, eval_loader(case, mesh, images_root), mesh)
        after = program.weights()
        assert all(np.array_equal(before[name], after[name]) for name in before)
    outcome.state = {name: part for name, tensor in program.state().items() if (part := part_of(tensor, mesh))}
    assert_shard_is_of(program, outcome.state)
    outcome.collectives = program.costs().collectives
    return outcome


def make_teacher(config: Config) -> Teacher:
    """Return a teacher that differs from the student in all that it may differ in, with random weights."""
    changed = {"width": 48, "mlp_dim": 64, "image_size": (16, 20), "pool": "gap", "qkv_bias": False}
    model = config.model.model_copy(update={**changed, "pos_embed": "sincos2d", "distillation_token": False})
    network = VisionTransformer(model)
    rng = np.random.default_rng(7)
    for parameter in network.parameters():
        parameter.set_value(rng.normal(0.0, 0.5, parameter.shape).astype(np.float32))
    return Teacher(
        network,
        Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        Normalization(config.data.mean, config.data.std),
        [config.model.image_size],
        returns_features=config.distill.kind == "features",
    )


def teacher_digest(teacher: Teacher | None) -> str:
    """Return the digest of this rank's parts of the teacher's parameters in the program's scope."""
    digest = hashlib.sha256()
    scope = paddle.static.global_scope()
    for parameter in [] if teacher is None else teacher.network.parameters():
        variable = scope.find_var(parameter.name)
        if variable is not None and variable.get_tensor()._is_initialized():
            digest.update(np.array(variable.get_tensor()).tobytes())
    return digest.hexdigest()


def assert_shard_is_of(program: Program, state: dict[str, Part]) -> None:
    """Assert that what this rank writes into a checkpoint has the values of Paddle's distributed tensors."""
    shard = program.shard()
    assert shard.arrays, "the rank writes nothing"
    for name, array in shard.arrays.items():
        part = state[name]
        assert array.tobytes() == part.local.tobytes(), name
        start = tuple(index * size for index, size in zip(part.index, part.local.shape, strict=True))
        assert shard.slices[name] == (start, part.shape), name


def eval_loader(case: Case, mesh: Mesh, images_root: Path) -> EvalLoader:
    data = DataConfig(root=str(images_root), num_threads=1)
    return EvalLoader(
        open_set(data, "val", case.model.num_classes),
        case.model.image_size,
        EVAL_BATCH_SIZE,
        data,
        EvalConfig(),
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        device_id=None,
    )


def part_of(tensor: paddle.Tensor, mesh: Mesh) -> Part | None:
    """Return this rank's part, or None of a tensor of another pipeline stage."""
    ranks = np.reshape(tensor.process_mesh.process_ids, tensor.process_mesh.shape)
    if mesh.rank not in ranks:
        return None
    num_parts, index = [1] * len(tensor.shape), [0] * len(tensor.shape)
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            num_parts[placement.get_dim()] = ranks.shape[axis]
            index[placement.get_dim()] = int(np.argwhere(ranks == mesh.rank)[0][axis])
    return Part(np.array(tensor._local_value()), tuple(tensor.shape), tuple(num_parts), tuple(index))


def main(cases: Path, folder: Path, images_root: Path) -> None:
    rank, world_size = rank_and_world_size()
    start_mesh(MeshShape(world_size, 1, 1), "cpu")
    for case in TypeAdapter(list[Case]).validate_json(cases.read_bytes()):
        mesh_shape = resolve_mesh(case.parallel, world_size, BATCH_SIZE, variant_of(case.model))
        # Paddle gives the parameters of all models the same names, and would reuse those that are in the scope.
        with paddle.static.scope_guard(paddle.static.Scope()):
            outcome = run(case, make_mesh(rank, mesh_shape, "cpu"), images_root)
        (folder / f"{case.name}.{rank}").write_bytes(pickle.dumps(outcome))
        gc.collect()
        gc.freeze()  # Paddle keeps 100,000 objects per program, which each collection would visit
