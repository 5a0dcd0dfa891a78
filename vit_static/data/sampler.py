"""The order of the training images and the random numbers for their augmentation.

Everything is a pure function of the seed and the position. The positions of a run are numbered from 0 without end:
position p belongs to epoch p // num_images, and each epoch has its own shuffle of the images. A global batch is the
next range of positions, and each rank takes its part of that range. So every epoch has every image exactly once, the
order doesn't depend on the number of ranks, and one number says where a run is.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NUM_CROP_FLIP_DRAWS = 24  # per image; a multiple of 4, because a step of Philox's counter gives 4 numbers
# Each stream of a seed has random numbers of its own.
_SHUFFLE_STREAM, _CROP_FLIP_STREAM, _AUGMENTATION_STREAM, _MIXUP_STREAM = range(4)


class ShuffledSampler:
    """An endless, shuffled sequence of training images. Caches the two shuffles used last.

    With `repeated_aug` r, as in arXiv 1901.09335 and DeiT's sampler, an epoch has the same length, but only the first
    of every r images of its shuffle, each r times, so that a batch has an image in several augmentations. Two images
    alternate (a b a b a b), so that neighbours, which mixup mixes, are never the same image.
    """

    def __init__(self, num_images: int, seed: int, repeated_aug: int = 1) -> None:
        self.num_images = num_images
        self.seed = seed
        self.repeated_aug = repeated_aug
        self._shuffles: dict[int, np.ndarray] = {}  # by epoch

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Return the dataset indices of the images at positions `start` to `stop`, [stop - start], int64."""
        positions = np.arange(start, stop)
        epochs, offsets = positions // self.num_images, positions % self.num_images
        if self.repeated_aug > 1:
            offsets = offsets // (2 * self.repeated_aug) * 2 + offsets % 2
        indices = np.empty(stop - start, np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            indices[in_epoch] = self._shuffle(int(epoch))[offsets[in_epoch]]
        return indices

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

    def _shuffle(self, epoch: int) -> np.ndarray:
        if epoch not in self._shuffles:
            bits = np.random.Philox(key=[self.seed, _SHUFFLE_STREAM], counter=[0, 0, 0, epoch])
            self._shuffles = {e: shuffle for e, shuffle in self._shuffles.items() if e == epoch - 1}
            shuffle = np.arange(self.num_images, dtype=np.int32)
            np.random.Generator(bits).shuffle(shuffle)
            self._shuffles[epoch] = shuffle
        return self._shuffles[epoch]


def nth_batch(n: int, skipped_batches: Iterable[int] = ()) -> int:
    """Return the number of the n-th batch in the order when the batches with the numbers `skipped_batches` are skipped.

    Both count from 0.
    """
    for skipped in sorted(skipped_batches):
        n += skipped <= n
    return n


def mixup_generator(seed: int, step: int) -> np.random.Generator:
    """Return the random number generator of a step's mixup and CutMix, the same on every rank."""
    return np.random.Generator(np.random.Philox(key=[seed, _MIXUP_STREAM], counter=[0, 0, 0, step]))
