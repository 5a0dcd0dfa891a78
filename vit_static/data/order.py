"""Which image comes when, and the random numbers that go with it: pure functions of the seed and the position.

The positions of a run are one line: position p is image p % num_images of epoch p // num_images in that epoch's
shuffle. A global batch is the next stretch of the line, a rank's batch is its part of the stretch. So every image
comes exactly once an epoch, the order doesn't depend on the number of ranks, and the place where a run is, is one
number.
"""

from __future__ import annotations

import numpy as np

NUM_DRAWS = 24  # random numbers an image; a multiple of 4, which is what one step of Philox's counter gives
_SHUFFLES, _DRAWS = 0, 1  # the streams of a seed


class TrainOrder:
    """The shuffled, endless line of training images. Keeps the two shuffles last asked for."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._shuffles: dict[int, np.ndarray] = {}

    def images(self, start: int, stop: int) -> np.ndarray:
        """The numbers of the images at positions `start` to `stop`, [stop - start], int64."""
        positions = np.arange(start, stop)
        epochs, places = positions // self.num_images, positions % self.num_images
        found = np.empty(stop - start, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._shuffle(int(epoch))[places[here]]
        return found

    def draws(self, start: int, stop: int) -> np.ndarray:
        """Uniform numbers in [0, 1) for the positions' augmentations, [stop - start, NUM_DRAWS], float32."""
        bits = np.random.Philox(key=[self.seed, _DRAWS]).advance(start * NUM_DRAWS // 4)
        draws = np.random.Generator(bits).random((stop - start, NUM_DRAWS)).astype(np.float32)
        return np.minimum(draws, np.nextafter(np.float32(1), np.float32(0)))  # float32 rounds the last few to 1

    def _shuffle(self, epoch: int) -> np.ndarray:
        if epoch not in self._shuffles:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, _SHUFFLES], counter=[0, 0, 0, epoch]))
            self._shuffles = {e: order for e, order in self._shuffles.items() if e == epoch - 1}
            self._shuffles[epoch] = generator.permutation(self.num_images)
        return self._shuffles[epoch]
