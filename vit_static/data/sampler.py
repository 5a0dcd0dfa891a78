"""The order of the training images and the random numbers for their augmentation.

Everything is a pure function of the seed and the position. The positions of a run are numbered from 0 without end, and
an epoch is `num_images` of them. A global batch is the next range of positions, and each rank takes its part of that
range. So the order doesn't depend on the number of ranks, and one number says where a run is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from vit_static.config.data_schema import DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.list_file import Labels

NUM_CROP_FLIP_DRAWS = 24  # per image; a multiple of 4, because a step of Philox's counter gives 4 numbers
# Each stream of a seed has random numbers of its own.
(
    _SHUFFLE_STREAM,
    _CROP_FLIP_STREAM,
    _AUGMENTATION_STREAM,
    _MIXUP_STREAM,
    _CLASS_ORDER_STREAM,
    _CLASS_SHUFFLE_STREAM,
    _PATCH_STREAM,
    _COORDINATE_STREAM,
) = range(8)


class Sampler(ABC):
    """An endless sequence of training images, with the random numbers of each position."""

    def __init__(self, num_images: int, seed: int, repeated_aug: int = 1) -> None:
        self.num_images, self.seed, self.repeated_aug = num_images, seed, repeated_aug

    @abstractmethod
    def indices(self, start: int, stop: int) -> np.ndarray:
        """Return the dataset indices of the images at positions `start` to `stop`, [stop - start], int64."""

    def crop_flip_draws(self, start: int, stop: int) -> np.ndarray:
        """Return uniform random numbers in [0, 1) for crops and flips, [stop - start, NUM_CROP_FLIP_DRAWS], float32."""
        return self._uniform(_CROP_FLIP_STREAM, start, stop, NUM_CROP_FLIP_DRAWS)

    def augmentation_draws(self, start: int, stop: int, num_draws: int) -> np.ndarray:
        """Return the same for what follows the crop, [stop - start, num_draws]; `num_draws` is a multiple of 4."""
        return self._uniform(_AUGMENTATION_STREAM, start, stop, num_draws)

    def _uniform(self, stream: int, start: int, stop: int, num_draws: int) -> np.ndarray:
        bits = np.random.Philox(key=[self.seed, stream]).advance(start * num_draws // 4)
        draws = np.random.Generator(bits).random((stop - start, num_draws)).astype(np.float32)
        return np.minimum(draws, np.nextafter(np.float32(1), np.float32(0)))  # float32 rounds the highest ones to 1

    def _without_repetitions(self, positions: np.ndarray) -> np.ndarray:
        """Return the positions whose images are repeated at `positions`: with `repeated_aug` 3, 0 1 0 1 0 1 2 3 2 3 ...

        Two images alternate, so that neighbours, which mixup mixes, aren't the same image.
        """
        if self.repeated_aug == 1:
            return positions
        return positions // (2 * self.repeated_aug) * 2 + positions % 2


class ShuffledSampler(Sampler):
    """Every image once per epoch: position p belongs to epoch p // num_images, which has its own shuffle of the images.

    With `repeated_aug` r, as in arXiv 1901.09335 and DeiT's sampler, an epoch has the same length, but only the first
    of every r images of its shuffle, each r times, so that a batch has an image in several augmentations. Two images
    alternate (a b a b a b), so that neighbours, which mixup mixes, are never the same image. Caches the two shuffles
    used last.
    """

    def __init__(self, num_images: int, seed: int, repeated_aug: int = 1) -> None:
        super().__init__(num_images, seed, repeated_aug)
        self._shuffles: dict[int, np.ndarray] = {}  # by epoch

    def indices(self, start: int, stop: int) -> np.ndarray:
        positions = np.arange(start, stop)
        epochs, offsets = positions // self.num_images, self._without_repetitions(positions % self.num_images)
        indices = np.empty(stop - start, np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            indices[in_epoch] = self._shuffle(int(epoch))[offsets[in_epoch]]
        return indices

    def _shuffle(self, epoch: int) -> np.ndarray:
        if epoch not in self._shuffles:
            self._shuffles = {e: shuffle for e, shuffle in self._shuffles.items() if e == epoch - 1}
            self._shuffles[epoch] = _shuffled(
                np.arange(self.num_images, dtype=np.int32), self.seed, _SHUFFLE_STREAM, epoch
            )
        return self._shuffles[epoch]


class BalancedSampler(Sampler):
    """Every class equally often (`data.sampler: balanced`), so that an epoch repeats the images of rare classes.

    Round r is the positions from r * num_classes on, one for each class, in an order of its own. Its image of a class
    is number r in that class's own sequence of shuffles, each of which has all images of the class once. Only classes
    with images count. An image with several labels belongs to each of their classes; the images without labels are a
    class, too. With `repeated_aug` r, the sequence has each image r times, as in ShuffledSampler; the two images that
    alternate may be the same only if they are the last of a round and the first of the next.
    """

    def __init__(self, labels: Labels, seed: int, repeated_aug: int = 1) -> None:
        super().__init__(len(labels), seed, repeated_aug)
        label_images, values = labels.pairs()
        unlabelled = np.setdiff1d(np.arange(len(labels)), label_images)
        images = np.concatenate([label_images, unlabelled]).astype(np.int32)
        classes = np.concatenate([values, np.full(len(unlabelled), -1, values.dtype)])
        order = np.argsort(classes, kind="stable")
        self._images = images[order]  # by class
        _, self._starts, self._counts = np.unique(classes[order], return_index=True, return_counts=True)
        self._class_orders: dict[int, np.ndarray] = {}  # by round; the two used last
        self._shuffles: dict[int, tuple[int, np.ndarray]] = {}  # by class: the number of the shuffle used last, and it

    def indices(self, start: int, stop: int) -> np.ndarray:
        positions = self._without_repetitions(np.arange(start, stop))
        rounds, slots = np.divmod(positions, len(self._counts))
        pairs = zip(rounds.tolist(), slots.tolist(), strict=True)
        return np.fromiter((self._image(number, slot) for number, slot in pairs), np.int64, stop - start)

    def _image(self, round_number: int, slot: int) -> int:
        label = int(self._class_order(round_number)[slot])
        epoch, offset = divmod(round_number, int(self._counts[label]))
        return int(self._shuffle(label, epoch)[offset])

    def _class_order(self, round_number: int) -> np.ndarray:
        if round_number not in self._class_orders:
            self._class_orders = {r: order for r, order in self._class_orders.items() if r == round_number - 1}
            classes = np.arange(len(self._counts), dtype=np.int32)
            self._class_orders[round_number] = _shuffled(classes, self.seed, _CLASS_ORDER_STREAM, round_number)
        return self._class_orders[round_number]

    def _shuffle(self, label: int, epoch: int) -> np.ndarray:
        cached = self._shuffles.get(label)
        if cached is None or cached[0] != epoch:
            start, count = self._starts[label], self._counts[label]
            images = self._images[start : start + count]
            cached = epoch, _shuffled(images, self.seed, _CLASS_SHUFFLE_STREAM, epoch, label)
            self._shuffles[label] = cached
        return cached[1]


def make_sampler(images: ImageDataset, data: DataConfig, seed: int, repeated_aug: int) -> Sampler:
    """Return the sampler of a run's training images, as `data.sampler` says."""
    if data.sampler == "balanced":
        return BalancedSampler(images.labels(), seed, repeated_aug)
    return ShuffledSampler(len(images), seed, repeated_aug)


def _shuffled(values: np.ndarray, seed: int, stream: int, number: int, part: int = 0) -> np.ndarray:
    """Return a shuffled copy of `values`, a function of the seed, the stream and two numbers."""
    shuffled = values.copy()
    bits = np.random.Philox(key=[seed, stream], counter=[0, 0, part, number])
    np.random.Generator(bits).shuffle(shuffled)
    return shuffled


def nth_batch(n: int, skipped_batches: Iterable[int] = ()) -> int:
    """Return the number of the n-th batch in the order when the batches with the numbers `skipped_batches` are skipped.

    Both count from 0.
    """
    for skipped in sorted(skipped_batches):
        n += skipped <= n
    return n


def patch_draws(seed: int, step: int, start: int, stop: int, num_patches: int) -> np.ndarray:
    """Return uniform numbers for the patches of images `start` to `stop` of a step's global batch, float64.

    [stop - start, num_patches].
    """
    num_draws = math.ceil(num_patches / 4) * 4  # a step of Philox's counter gives 4 numbers
    bits = np.random.Philox(key=[seed, _PATCH_STREAM], counter=[0, 0, 0, step]).advance(start * num_draws // 4)
    return np.random.Generator(bits).random((stop - start, num_draws))[:, :num_patches]


def coordinate_generator(seed: int, step: int) -> np.random.Generator:
    """Return the random number generator of a step's changes of coordinates, the same on every rank."""
    return np.random.Generator(np.random.Philox(key=[seed, _COORDINATE_STREAM], counter=[0, 0, 0, step]))


def mixup_generator(seed: int, step: int) -> np.random.Generator:
    """Return the random number generator of a step's mixup and CutMix, the same on every rank."""
    return np.random.Generator(np.random.Philox(key=[seed, _MIXUP_STREAM], counter=[0, 0, 0, step]))
