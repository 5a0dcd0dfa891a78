"""Top-1, top-5 and loss over a validation set, every image counted once; and the verb `eval`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vit_static import config as config_module
from vit_static import mesh as mesh_module
from vit_static import model as model_module
from vit_static.checkpoint import load_weights
from vit_static.config import Config, InitConfig
from vit_static.data.feed import Batch, EvalFeed
from vit_static.data.images import ImageSet
from vit_static.data.lists import DataError
from vit_static.data.relabelled import imagenet_v2, with_real_labels
from vit_static.data.sets import open_set
from vit_static.log import RunLog
from vit_static.loss import Criterion
from vit_static.mesh import Mesh, Sizes
from vit_static.step import Program, choose_attention, choose_precision
from vit_static.weights import init_from


@dataclass(frozen=True)
class Evaluation:
    """Per cent, the mean loss, and how many images they are of."""

    top1: float
    top5: float
    loss: float
    num_images: int


def evaluate(program: Program, feed: Iterable[Batch], mesh: Mesh) -> Evaluation:
    """Runs every image of the feed through the program. All ranks call it together and get the same figures, or the
    same DataError where one of them meets an image that can't be read."""
    sums = np.zeros(4)  # top-1 hits, top-5 hits, loss, images
    problem = None
    try:
        for images, labels, weights in feed:
            real = np.asarray(weights) > 0
            losses, ranks = program.eval_step(images, labels)[real].astype(np.float64).T
            sums += [(ranks < 1).sum(), (ranks < 5).sum(), losses.sum(), real.sum()]
    except DataError as error:
        problem = str(error)
    problem = mesh.first(problem)
    if problem is not None:
        raise DataError(problem)
    top1_hits, top5_hits, loss, num_images = mesh.total(sums)
    return Evaluation(
        top1=100.0 * top1_hits / num_images,
        top5=100.0 * top5_hits / num_images,
        loss=loss / num_images,
        num_images=int(num_images),
    )


def eval_batch_size(config: Config, mesh: Mesh) -> int:
    """The evaluation's batch over all ranks: as asked for, or the training micro-batch, made divisible by the ranks."""
    wanted = config.eval.batch_size or config.data.global_batch_size // mesh_module.num_micro_batches(config.parallel)
    return max(wanted // mesh.dp_size, 1) * mesh.dp_size


def eval_feed(config: Config, images: ImageSet, mesh: Mesh) -> EvalFeed:
    return EvalFeed(
        images,
        config.model.image_size,
        eval_batch_size(config, mesh),
        config.data,
        config.eval,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        device_id=mesh.device_id,
    )


def run(
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
    device = (config or config_module.load(None, overrides)).device
    mesh = mesh_module.start(Sizes(dp=mesh_module.rank_and_world_size()[1], mp=1, pp=1), device)
    loaded = load_weights(checkpoint, averaged=averaged)
    config = config or loaded.config_with(overrides)
    num_classes = config.model.num_classes
    if v2 is not None:
        images: ImageSet = imagenet_v2(v2, loaded.class_names or [str(label) for label in range(num_classes)])
    else:
        images = open_set(config.data, "val", num_classes)
    if real is not None:
        images = with_real_labels(images, real, num_classes)
        config = config.with_several_labels()
    attention = choose_attention(config.model, config.parallel, config.kernels, mesh.device)
    model = model_module.build(config.model, attention)
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


def describe(result: Evaluation) -> str:
    return (
        f"top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %  loss {result.loss:.4f}  over {result.num_images} images"
    )
