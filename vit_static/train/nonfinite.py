"""Reports on steps with non-finite gradients."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from vit_static.checkpoint.progress import DataPosition
from vit_static.common.io import write_json
from vit_static.data.image_set import ImageDataset
from vit_static.data.sampler import ShuffledSampler


@dataclass(frozen=True)
class NonFiniteReport:
    """What is to be looked at where a step's gradients aren't finite."""

    step: int
    lr: float
    grad_norms: dict[str, float]  # by block
    batch: int  # its number in the order of the images
    batch_size: int

    def write(self, run_dir: Path, images: ImageDataset, position: DataPosition) -> Path:
        """With the names of the batch's images; the file."""
        order = ShuffledSampler(position.num_images, position.seed, position.repeated_aug)
        numbers = order.indices(self.batch * self.batch_size, (self.batch + 1) * self.batch_size)
        # JSON has none for what is no number.
        norms = {block: norm if math.isfinite(norm) else str(norm) for block, norm in self.grad_norms.items()}
        names = [images.name(int(number)) for number in numbers]
        path = run_dir / f"nonfinite_step_{self.step:08d}.json"
        write_json({**asdict(self), "grad_norms": norms, "images": names}, path)
        return path
