"""Run specification resolved from the config: datasets, mesh shape, number of steps, learning rate, and the schedule
of logging, evaluation and checkpoints (`due`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from vit_static.checkpoint.progress import DataPosition, Progress
from vit_static.common.errors import ConfigError
from vit_static.config.schema import Config
from vit_static.data.class_balance import loss_weights
from vit_static.data.extra_sets import ExtraSet, open_extra_sets
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import describe_empty_classes, open_set, split_path
from vit_static.model.loss_weights import NO_WEIGHTS, LossWeights
from vit_static.optim.schedule import Phase, learning_rate, limiting_key, phases, total_steps, warmup_steps
from vit_static.train.notes import config_notes

if TYPE_CHECKING:
    from vit_static.parallel.mesh import MeshShape


@dataclass(frozen=True)
class Due:
    """Which of logging, evaluation and saving is due before the next step, and whether the run has ended."""

    log: bool
    eval: bool
    save: bool
    last: bool

    @property
    def any(self) -> bool:
        return self.log or self.eval or self.save or self.last


@dataclass(frozen=True)
class RunSpec:
    """A run's config together with its images, its mesh shape and its number of steps."""

    config: Config
    rank: int
    mesh_shape: MeshShape
    train_images: ImageDataset
    val_images: ImageDataset
    total_steps: int
    warmup_steps: int
    loss_weights: LossWeights = NO_WEIGHTS
    extra_sets: tuple[ExtraSet, ...] = ()  # eval.also

    @classmethod
    def resolve(cls, config: Config) -> RunSpec:
        """Derive the spec of a run. Raise UserError for every mistake that can be found before anything is built."""
        # Imported here so that the rest of this module is usable without Paddle.
        from vit_static.model.variants import check_image_sizes, require_head, variant_of
        from vit_static.parallel.mesh import rank_and_world_size, resolve_mesh

        require_head(config.model)
        check_image_sizes(config.model, config.train.sizes, "train.image_sizes")
        rank, world_size = rank_and_world_size()
        batch_size = config.data.global_batch_size
        mesh_shape = resolve_mesh(config.parallel, world_size, batch_size, variant_of(config.model))
        if config.mixes and batch_size // mesh_shape.dp % 2:
            raise ConfigError(
                f"data.global_batch_size = {batch_size}: each of the {mesh_shape.dp} data-parallel ranks gets an odd "
                "number of images, and augment.mixup_alpha and cutmix_alpha mix images in pairs; set a multiple of "
                f"{2 * mesh_shape.dp}"
            )
        train_images = open_set(config.data, "train", config.model.num_classes)
        val_images = open_set(config.data, "val", config.model.num_classes)
        return cls(
            config,
            rank,
            mesh_shape,
            train_images,
            val_images,
            total_steps(config.train, len(train_images), batch_size),
            warmup_steps(config.schedule, len(train_images), batch_size),
            loss_weights(config.loss, train_images),
            open_extra_sets(config.eval.also, config.data, val_images),
        )

    @property
    def batch_size(self) -> int:
        """Images per optimizer step, over all ranks."""
        return self.config.data.global_batch_size

    def epoch(self, step: int) -> float:
        """Return the epochs done after `step` optimizer steps."""
        return step * self.batch_size / len(self.train_images)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` done ones."""
        return learning_rate(step, self.total_steps, self.config.optim, self.config.schedule, self.warmup_steps)

    @cached_property
    def phases(self) -> list[Phase]:
        """The phases of the run by the size of its images (train.image_sizes)."""
        return phases(self.config.train, self.config.model.image_size, self.total_steps)

    @property
    def largest_image_size(self) -> tuple[int, int]:
        """Return the largest height and the largest width of the training images."""
        heights, widths = zip(*(phase.image_size for phase in self.phases), strict=True)
        return max(heights), max(widths)

    def phase_at(self, step: int) -> Phase:
        """Return the phase of the update that follows `step` done ones."""
        return next((phase for phase in self.phases if step < phase.end), self.phases[-1])

    def image_size_at(self, step: int) -> tuple[int, int]:
        """Return height and width of the images of the update that follows `step` done ones."""
        return self.phase_at(step).image_size

    @property
    def limiting_key(self) -> str:
        """The key of the config's section `train` that decides the number of steps."""
        return limiting_key(self.config.train, len(self.train_images), self.config.data.global_batch_size)

    def stops_early(self, progress: Progress) -> bool:
        """Return whether eval.metric hasn't improved for train.patience evaluations."""
        patience = self.config.train.patience
        is_same_metric = progress.metric == self.config.selection_metric
        return patience is not None and is_same_metric and progress.num_stale_evals >= patience

    def has_ended(self, progress: Progress) -> bool:
        """Return whether no step follows: at the end of the schedule, or after an early stop."""
        return progress.step >= self.total_steps or self.stops_early(progress)

    def due(self, progress: Progress, logged_step: int) -> Due:
        """Return the work that is due after `progress.step` steps; `logged_step` is the last one that was logged.

        An evaluation that a stop prevented is due again after resuming.
        """
        step, every = progress.step, self.config
        is_last = self.has_ended(progress)
        num_images = step * self.batch_size
        images_per_eval = every.eval.every_epochs * len(self.train_images)
        passes_eval = num_images // images_per_eval > max(num_images - self.batch_size, 0) // images_per_eval
        save_steps = every.checkpoint.every_steps
        return Due(
            log=logged_step < step and (step == 1 or step % every.log.every_steps == 0 or is_last),
            eval=(passes_eval or is_last) and progress.evaluated_step < step,
            save=passes_eval if save_steps is None else step > 0 and step % save_steps == 0,
            last=is_last,
        )

    @property
    def notes(self) -> list[str]:
        """Lines about settings that may be mistakes (config_notes), and about classes without images."""
        return [*config_notes(self.config, self.total_steps), *self._data_notes]

    @property
    def _data_notes(self) -> list[str]:
        """Lines that name the classes without images."""
        data = self.config.data
        sets = {"train": self.train_images, "val": self.val_images}
        lines = [
            describe_empty_classes(images, split_path(data, split), data.first_label) for split, images in sets.items()
        ]
        return [line for line in lines if line is not None]

    @cached_property
    def images_digest(self) -> str:
        """Identifies the training images' names and labels."""
        return self.train_images.digest()

    def data_position(self, progress: Progress) -> DataPosition:
        """Return the position of the next batch, and the properties of the set and order that it belongs to."""
        return DataPosition(
            progress.next_batch_index() * self.batch_size,
            len(self.train_images),
            self.images_digest,
            self.config.seed,
            self.config.augment.repeated_aug,
            self.config.data.sampler,
        )
