"""Which image comes when, and the random numbers that go with it: pure functions of the seed and the position.

The positions of a run are one line: position p belongs to epoch p // num_images, which shuffles the images anew. A
global batch is the next stretch of the line, a rank's batch is its part of the stretch. So every image comes exactly
once an epoch, the order doesn't depend on the number of ranks, and the place where a run is, is one number.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NUM_CROP_FLIP_DRAWS = (
    24  # random numbers an image's crop and flip take; a multiple of 4: a step of Philox's counter gives 4
)
_SHUFFLES, _DRAWS, _AUGMENTATIONS, _MIXES = range(4)  # the streams of a seed


class ShuffledSampler:
    """The shuffled, endless line of training images. Keeps the two shuffles last asked for.

    With `repeated_aug` r, as in arXiv 1901.09335 and DeiT's sampler, an epoch is as long, but holds the
    first of every r images of its shuffle alone, each r times, so that a batch sees an image in several augmentations. Two images take turns
    (a b a b a b), so that neighbours, which mixup mixes, are never the same image.
    """

    def __init__(self, num_images: int, seed: int, repeated_aug: int = 1) -> None:
        self.num_images = num_images
        self.seed = seed
        self.repeated_aug = repeated_aug
        self._shuffles: dict[int, np.ndarray] = {}

    def indices(self, start: int, stop: int) -> np.ndarray:
        """The numbers of the images at positions `start` to `stop`, [stop - start], int64."""
        positions = np.arange(start, stop)
        epochs, places = positions // self.num_images, positions % self.num_images
        if self.repeated_aug > 1:
            places = places // (2 * self.repeated_aug) * 2 + places % 2
        found = np.empty(stop - start, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._shuffle(int(epoch))[places[here]]
        return found

    def crop_flip_draws(self, start: int, stop: int) -> np.ndarray:
        """Uniform numbers in [0, 1) for the positions' crops and flips, [stop - start, NUM_CROP_FLIP_DRAWS], float32."""
        return self._uniform(_DRAWS, start, stop, NUM_CROP_FLIP_DRAWS)

    def augmentation_draws(self, start: int, stop: int, num_draws: int) -> np.ndarray:
        """The same for what comes after the crop, [stop - start, num_draws]; `num_draws` is a multiple of 4."""
        return self._uniform(_AUGMENTATIONS, start, stop, num_draws)

    def _uniform(self, stream: int, start: int, stop: int, num_draws: int) -> np.ndarray:
        bits = np.random.Philox(key=[self.seed, stream]).advance(start * num_draws // 4)
        draws = np.random.Generator(bits).random((stop - start, num_draws)).astype(np.float32)
        return np.minimum(draws, np.nextafter(np.float32(1), np.float32(0)))  # float32 rounds the last few to 1

    def _shuffle(self, epoch: int) -> np.ndarray:
        if epoch not in self._shuffles:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, _SHUFFLES], counter=[0, 0, 0, epoch]))
            self._shuffles = {e: order for e, order in self._shuffles.items() if e == epoch - 1}
            order = np.arange(self.num_images, dtype=np.int32)
            generator.shuffle(order)
            self._shuffles[epoch] = order
        return self._shuffles[epoch]


def nth_batch(n: int, skipped_batches: Iterable[int] = ()) -> int:
    """Of the order's batches but those left out, the n-th's number."""
    for number in sorted(skipped_batches):
        n += number <= n
    return n


def mixup_generator(seed: int, step: int) -> np.random.Generator:
    """The random numbers of a step's mixing, the same on every rank."""
    return np.random.Generator(np.random.Philox(key=[seed, _MIXES], counter=[0, 0, 0, step]))
