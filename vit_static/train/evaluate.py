"""Top-1, top-5 and loss over a validation set, every image counted once; and the verb `eval`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config, InitConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.imagenet_eval import imagenet_v2, with_real_labels
from vit_static.data.loader import EvalLoader
from vit_static.data.open_set import open_set
from vit_static.model.loss import Criterion
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import Mesh, MeshShape, num_micro_batches, rank_and_world_size, start_mesh
from vit_static.program.precision import choose_attention, choose_precision
from vit_static.program.program import Program
from vit_static.report.error_analysis import ErrorAnalysis, Predictions, Sample, analyze_errors, worst_images
from vit_static.train.metrics import RunLog
from vit_static.weights.load import init_from
from vit_static.weights.source import load_weights


@dataclass(frozen=True)
class EvalMetrics:
    """Per cent, the mean loss, and how many images they are of."""

    top1: float
    top5: float
    loss: float
    num_images: int

    @classmethod
    def of(cls, answers: Predictions) -> EvalMetrics:
        return cls(
            top1=100.0 * float((answers.label_ranks < 1).mean()),
            top5=100.0 * float((answers.label_ranks < 5).mean()),
            loss=float(answers.losses.mean()),
            num_images=len(answers.label_ranks),
        )


def evaluate(program: Program, feed: EvalLoader, mesh: Mesh) -> EvalMetrics:
    """The figures of `all_answers`."""
    return EvalMetrics.of(predict_all(program, feed, mesh))


def predict_all(program: Program, feed: EvalLoader, mesh: Mesh) -> Predictions:
    """Runs every image of the feed through the program. All ranks call it together and get the same of all images, or
    the same DataError where one of them meets an image that can't be read."""
    # Of each image: how often it came, loss, label's rank, first class, its probability, label. A rank fills in its
    # own, so that their sum over the ranks is everybody's: 48 bytes an image.
    found = np.zeros((6, len(feed.images)))
    has_one_label = True
    problem = None
    try:
        for n, (images, labels, weights) in enumerate(feed):
            real = np.asarray(weights) > 0
            numbers = feed.indices(n)[0][real]
            has_one_label = labels.ndim == 1
            found[0, numbers] += 1.0
            found[1:5, numbers] = program.eval_step(images, labels)[real].T
            if has_one_label:
                found[5, numbers] = np.asarray(labels)[real]
    except DataError as error:
        problem = str(error)
    problem = mesh.first_non_none(problem)
    if problem is not None:
        raise DataError(problem)
    counts, losses, ranks, classes, probabilities, labels_of_all = mesh.all_reduce_sum(found)
    assert (counts == 1.0).all()
    return Predictions(
        losses,
        ranks,
        classes.astype(np.int64),
        probabilities,
        labels_of_all.astype(np.int64) if has_one_label else None,
    )


def analyze_errors_of(
    answers: Predictions, feed: EvalLoader, num_classes: int, step: int, of_average: bool
) -> ErrorAnalysis:
    """What the answers after `step` steps have wrong, with pictures of the worst images, as far as they can be read."""
    worst = worst_images(answers)
    encoded, labels = [], []
    if len(worst):
        with suppress(DataError):  # a disk that has failed since; the next step will tell
            read = feed.read(worst)
            encoded, labels = read.encoded, read.labels
    return analyze_errors(
        answers,
        feed.images.class_names,
        num_classes,
        [
            Sample(feed.images.relative_name(int(number)), *of_image)
            for number, *of_image in zip_longest(worst, encoded, labels)
        ],
        step,
        of_average,
    )


def eval_batch_size(config: Config, mesh: Mesh) -> int:
    """The evaluation's batch over all ranks: as asked for, or the training micro-batch, made divisible by the ranks."""
    wanted = config.eval.batch_size or config.data.global_batch_size // num_micro_batches(config.parallel)
    return max(wanted // mesh.dp_size, 1) * mesh.dp_size


def eval_feed(config: Config, images: ImageDataset, mesh: Mesh) -> EvalLoader:
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
    averaged: bool = False,
    real: Path | None = None,
    v2: Path | None = None,
) -> None:
    """The verb: evaluates a checkpoint, with the config that it was trained with unless another is given.

    `averaged`: the weights' moving average. `real`: ReaL's labels, `v2`: ImageNet-V2's images (data/relabelled.py).
    """
    # Every rank evaluates the whole model on its part, whatever mesh trained it and whatever batch it trained with.
    # The processes come first: a sharded checkpoint is read by all of them together.
    device = (config or load_config(None, overrides)).device
    mesh = start_mesh(MeshShape(dp=rank_and_world_size()[1], mp=1, pp=1), device)
    loaded = load_weights(checkpoint, averaged=averaged)
    config = config or loaded.config_with(overrides)
    num_classes = config.model.num_classes
    if v2 is not None:
        images: ImageDataset = imagenet_v2(v2, loaded.class_names or [str(label) for label in range(num_classes)])
    else:
        images = open_set(config.data, "val", num_classes)
    if real is not None:
        images = with_real_labels(images, real, num_classes)
        config = config.with_several_labels()
    attention = choose_attention(config.model, config.parallel, config.kernels, mesh.device)
    model = VisionTransformer(config.model, attention)
    keeping = InitConfig(head="keep", pos_embed=config.init.pos_embed)
    init_from(model, config.model, loaded.found, str(loaded.source), keeping, loaded.grid)
    program = Program(
        model,
        Criterion(config.loss),
        mesh,
        choose_precision(config.amp, mesh.device, config.kernels),
        image_size=config.model.image_size,
        eval_batch_size=eval_batch_size(config, mesh),
        kernels=config.kernels,
        eval_targets=config.eval_targets,
    )
    result = evaluate(program, eval_feed(config, images, mesh), mesh)
    found = asdict(result)
    if real is not None:
        del found["loss"]  # of several labels that exclude each other it says nothing
    with RunLog(None, mesh.rank) as log:
        log.say(describe(result) if real is None else describe(result).replace(f"  loss {result.loss:.4f}", "  ReaL"))
        log.say_json(found)


def describe(result: EvalMetrics) -> str:
    return (
        f"top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %  loss {result.loss:.4f}  over {result.num_images} images"
    )
