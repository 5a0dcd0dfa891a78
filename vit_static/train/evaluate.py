"""Evaluation on a validation set, every image counted once; the verb `eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from vit_static.common.errors import DataError, UserError
from vit_static.common.text import print_line
from vit_static.config.loader import load_config
from vit_static.config.schema import Config, ParallelConfig
from vit_static.data.extra_sets import ExtraSet, open_extra_sets
from vit_static.data.image_set import ImageDataset
from vit_static.data.imagenet_eval import imagenet_v2, with_real_labels
from vit_static.data.loader import EvalLoader
from vit_static.data.open_set import open_set
from vit_static.model.draws import at_size
from vit_static.model.variants import check_image_sizes, require_head
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import Mesh, MeshShape, gpu_capability, num_micro_batches, rank_and_world_size, start_mesh
from vit_static.program.precision import choose_attention, choose_precision
from vit_static.program.program import Program
from vit_static.report.class_quality import class_quality, write_class_quality
from vit_static.report.error_analysis import ErrorAnalysis, Sample, analyze_errors, example_images, worst_images
from vit_static.report.predictions import Predictions
from vit_static.train.extra_eval import ExtraResult, evaluate_extra_sets
from vit_static.train.metrics import EvalMetrics
from vit_static.weights.infer import config_for
from vit_static.weights.load import load_into
from vit_static.weights.loaded import Weights
from vit_static.weights.source import WhichWeights, describe_choice, load_weights

_MAX_SUMMED_VALUES = 1 << 22  # over the ranks at once


def evaluate(program: Program, loader: EvalLoader, mesh: Mesh) -> EvalMetrics:
    """Return the metrics of `predict_all`."""
    return EvalMetrics.of(predict_all(program, loader, mesh))


def predict_all(program: Program, loader: EvalLoader, mesh: Mesh) -> Predictions:
    """Run every image of the loader through the program.

    All ranks call it together and get the same predictions for all images. Raises DataError, the same on all ranks,
    where one of them can't read an image.
    """
    # Per image: how often it came, loss, rank of the label, top class, its probability, label. Each rank fills in its
    # own images, so the sum over the ranks covers the whole set, with 48 bytes per image.
    columns = np.zeros((6, len(loader.images)))
    by_class: _ByClass | None = None
    has_one_label = True
    problem = None
    try:
        for n, (images, labels, weights) in enumerate(loader):
            is_real = np.asarray(weights) > 0
            numbers = loader.indices(n)[0][is_real]
            has_one_label = labels.ndim == 1
            values = program.eval_step(images, labels)[is_real]
            columns[0, numbers] += 1.0
            columns[1:5, numbers] = values[:, :4].T
            if has_one_label:
                columns[5, numbers] = np.asarray(labels)[is_real]
            elif values.shape[1] > 4:
                by_class = by_class or _ByClass.empty(len(loader.images), values.shape[1] - 4)
                by_class.logits[numbers], by_class.is_label[numbers] = values[:, 4:], np.asarray(labels)[is_real] > 0
    except DataError as error:
        problem = str(error)
    problem = mesh.first_non_none(problem)
    if problem is not None:
        raise DataError(problem)
    counts, losses, ranks, classes, probabilities, all_labels = mesh.all_reduce_sum(columns)
    assert (counts == 1.0).all()
    if by_class is not None:
        by_class.add_other_ranks(mesh)
    return Predictions(
        losses,
        ranks,
        classes.astype(np.int64),
        probabilities,
        all_labels.astype(np.int64) if has_one_label else None,
        None if by_class is None else by_class.logits,
        None if by_class is None else by_class.is_label,
    )


@dataclass(frozen=True)
class _ByClass:
    """Logits and labels of every class, [num_images, num_classes] each, of this rank's images, else 0."""

    logits: np.ndarray
    is_label: np.ndarray

    @classmethod
    def empty(cls, num_images: int, num_classes: int) -> _ByClass:
        return cls(np.zeros((num_images, num_classes), np.float32), np.zeros((num_images, num_classes), bool))

    def add_other_ranks(self, mesh: Mesh) -> None:
        """Add the values of all ranks, a part at a time: the sum is computed in float64."""
        num_rows = max(_MAX_SUMMED_VALUES // self.logits.shape[1], 1)
        for start in range(0, len(self.logits), num_rows):
            rows = slice(start, start + num_rows)
            self.logits[rows] = mesh.all_reduce_sum(self.logits[rows])
            self.is_label[rows] = mesh.all_reduce_sum(self.is_label[rows].astype(np.float32)) > 0.0


@dataclass(frozen=True)
class EvalResult:
    """One evaluation: the metrics of the weights, those of their moving average if there is one, and the predictions
    of what people will use, the average where there is one."""

    metrics: EvalMetrics
    ema: EvalMetrics | None
    predictions: Predictions
    extra: list[ExtraResult]  # on eval.also

    @property
    def selection_metrics(self) -> EvalMetrics:
        """The metrics that decide which checkpoint is the best."""
        return self.ema or self.metrics


class Evaluator:
    """Evaluates a run's weights on its validation images."""

    def __init__(self, config: Config, images: ImageDataset, mesh: Mesh, extra_sets: Sequence[ExtraSet] = ()) -> None:
        self._config, self._mesh, self._extra_sets = config, mesh, extra_sets
        self._loader = eval_loader(config, images, mesh)

    def evaluate(self, program: Program) -> EvalResult:
        """Evaluate the weights and their moving average; on the further sets, only what people will use. Raises
        DataError, the same on all ranks.

        The weights of schedule_free_adamw are its average.
        """
        threshold, has_ema = self._config.eval.threshold, self._config.optim.ema_decay > 0.0
        is_schedule_free = self._config.optim.name == "schedule_free_adamw"
        with program.schedule_free_weights() if is_schedule_free else nullcontext():
            predictions = predict_all(program, self._loader, self._mesh)
            metrics, ema = EvalMetrics.of(predictions, threshold), None
            with program.ema_weights() if has_ema else nullcontext():
                if has_ema:
                    predictions = predict_all(program, self._loader, self._mesh)
                    ema = EvalMetrics.of(predictions, threshold)
                extra = evaluate_extra(program, self._extra_sets, self._config, self._mesh)
        return EvalResult(metrics, ema, predictions, extra)

    def analyze_errors(self, result: EvalResult, step: int) -> ErrorAnalysis:
        """Summarize what the model gets wrong, with the worst images, and correct ones to compare them with, as far as
        they can be read."""
        predictions, images = result.predictions, self._loader.images
        worst = worst_images(predictions)
        numbers = np.concatenate([worst, example_images(predictions, worst)])
        encoded, labels = [], []
        if len(numbers):
            with suppress(DataError):  # a disk that has failed meanwhile; the next step reports it
                batch = self._loader.read(numbers)
                encoded, labels = batch.encoded, batch.labels
        samples = [
            Sample(images.relative_name(int(number)), *fields)
            for number, *fields in zip_longest(numbers, encoded, labels)
        ]
        return analyze_errors(
            predictions,
            images.class_names,
            self._config.model.num_classes,
            samples[: len(worst)],
            step,
            result.ema is not None,
            self._config.eval.threshold,
            samples[len(worst) :],
        )


def evaluate_extra(program: Program, sets: Sequence[ExtraSet], config: Config, mesh: Mesh) -> list[ExtraResult]:
    """Evaluate the program on the further validation sets, which are read as the validation images are."""

    def make_loader(images: ImageDataset, has_several_labels: bool) -> EvalLoader:
        return eval_loader(config.with_several_labels() if has_several_labels else config, images, mesh)

    return evaluate_extra_sets(program, sets, mesh, make_loader)


def load_program(config: Config, weights: Weights, mesh: Mesh, *, returns_logits: bool) -> Program:
    """Return a program that evaluates these weights, the whole model on every rank.

    `returns_logits` as in `Program.for_eval`.
    """
    precision = choose_precision(config.amp, mesh.device, config.kernels, gpu_capability=gpu_capability(mesh))
    attention = choose_attention(config.model, precision, ParallelConfig(), config.kernels, mesh.device)
    model = VisionTransformer(config.model, attention)
    load_into(model, config.model, weights, config.init.pos_embed)
    batch_size = eval_batch_size(config, mesh)
    return Program.for_eval(config, model, mesh, precision, eval_batch_size=batch_size, returns_logits=returns_logits)


def eval_batch_size(config: Config, mesh: Mesh) -> int:
    """Return the evaluation's batch size over all ranks: eval.batch_size, or the training micro-batch, rounded down to
    a multiple of the data-parallel ranks."""
    batch_size = config.eval.batch_size or config.data.global_batch_size // num_micro_batches(config.parallel)
    return max(batch_size // mesh.dp_size, 1) * mesh.dp_size


def eval_loader(config: Config, images: ImageDataset, mesh: Mesh) -> EvalLoader:
    return EvalLoader(
        images,
        config.model.image_size,
        eval_batch_size(config, mesh),
        config.data,
        config.eval,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        device_id=mesh.device_id,
    )


def evaluate_checkpoint(
    config: Config | None,
    checkpoint: Path,
    overrides: list[str],
    *,
    ema: bool = False,
    which: WhichWeights = "last",
    real: Path | None = None,
    v2: Path | None = None,
    per_class: Path | None = None,
    image_sizes: Sequence[tuple[int, int]] = (),
) -> None:
    """Evaluate a checkpoint with the config that it was trained with, unless another is given (the verb `eval`).

    `ema`: the weights' moving average. `which`: among the weights of a run's folder. `real`: the file of ReaL labels,
    `v2`: the folder of ImageNet-V2's images (data/imagenet_eval.py). `per_class`: a CSV file to write, with the quality
    of each class. `image_sizes`: evaluate once per size; (): at the model's.
    """
    if per_class is not None and len(set(image_sizes)) > 1:
        raise UserError("--per-class: writes the classes of one evaluation; give one --image-size")
    if per_class is not None and real is not None:
        raise UserError(
            "--per-class: needs one label per image, or several that hold together; ReaL's exclude each other"
        )
    if per_class is not None and not per_class.absolute().parent.is_dir():
        raise UserError(f"--per-class {per_class}: the folder {per_class.parent} doesn't exist; make it first")
    # Every rank evaluates the whole model on its share of the images, whatever mesh and batch size trained it. The
    # processes connect first, since all of them read a sharded checkpoint together.
    given = config or load_config(None, overrides)
    shape = MeshShape(dp=rank_and_world_size()[1], mp=1, pp=1)
    mesh = start_mesh(shape, given.device, given.parallel.collective_timeout_s)
    loaded = load_weights(checkpoint, ema=ema, which=which, overrides=overrides)
    config = config_for(config, loaded, overrides)
    require_head(config.model)
    num_classes = config.model.num_classes
    if v2 is not None:
        images: ImageDataset = imagenet_v2(v2, loaded.class_names or [str(label) for label in range(num_classes)])
    else:
        images = open_set(config.data, "val", num_classes)
    extra_sets: tuple[ExtraSet, ...] = ()
    if real is None and v2 is None:
        extra_sets = open_extra_sets(config.eval.also, config.data, images)
    if real is not None:
        images = with_real_labels(images, real, num_classes)
        config = config.with_several_labels()
    sizes = [*dict.fromkeys(image_sizes)] or [config.model.image_size]
    check_image_sizes(config.model, sizes, "--image-size")
    target = _Target(loaded, images, extra_sets, mesh, is_real=real is not None, per_class=per_class)
    choice = describe_choice(checkpoint, which)
    if mesh.rank == 0 and choice is not None:
        print_line(choice, flush=True)
    results = []
    for height, width in sizes:
        at_this_size = config.model_copy(update={"model": at_size(config.model, (height, width))})
        # Programs share the variables of a scope by their names.
        with paddle.static.scope_guard(paddle.static.Scope()):
            lines, values = target.evaluate(at_this_size)
        prefix = f"{height}x{width}  " if len(sizes) > 1 else ""
        results.append({"image_size": [height, width], **values} if prefix else values)
        for line in lines if mesh.rank == 0 else []:
            print_line(prefix + line, flush=True)
    if mesh.rank == 0:
        print_line(json.dumps({"image_sizes": results} if len(sizes) > 1 else results[0]), flush=True)


@dataclass(frozen=True)
class _Target:
    """Weights, and the images that the verb `eval` evaluates them on."""

    weights: Weights
    images: ImageDataset
    extra_sets: tuple[ExtraSet, ...]
    mesh: Mesh
    is_real: bool  # with ReaL labels
    per_class: Path | None  # the file to write

    def evaluate(self, config: Config) -> tuple[list[str], dict[str, Any]]:
        """Return the results in lines and as JSON values, and write the quality of each class if asked to."""
        num_classes = config.model.num_classes
        returns_logits = config.evaluates_logits and not self.is_real
        program = load_program(config, self.weights, self.mesh, returns_logits=returns_logits)
        predictions = predict_all(program, eval_loader(config, self.images, self.mesh), self.mesh)
        metrics = EvalMetrics.of(predictions, config.eval.threshold)
        text = metrics.describe(config.selection_metric, num_classes=num_classes)
        values: dict[str, Any] = dict(metrics.values())
        if self.is_real:
            del values["loss"]  # meaningless for several labels that exclude each other
            text = text.replace(f"  loss {metrics.loss:.4f}", "  ReaL")
        if self.per_class is not None and self.mesh.rank == 0:
            classes = class_quality(predictions, self.images.class_names, num_classes, config.eval.threshold)
            assert classes is not None
            write_class_quality(classes, self.per_class)
        extra = evaluate_extra(program, self.extra_sets, config, self.mesh)
        if extra:
            values["also"] = {result.name: result.values() for result in extra}
        return [text, *(result.describe(num_classes) for result in extra)], values
