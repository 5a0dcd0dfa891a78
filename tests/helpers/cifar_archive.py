"""A miniature archive of CIFAR-10."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.cifar10 import BATCHES, CLASSES

NUM_IMAGES = 30  # per batch


def make_batches() -> dict[str, Any]:
    """Return the contents of the pickles by name."""
    rng = np.random.default_rng(0)
    names = [name for names in BATCHES.values() for name in names]
    contents: dict[str, Any] = {
        name: {
            b"batch_label": b"one of them",
            b"labels": [int(label) for label in rng.permutation(np.arange(NUM_IMAGES) % 10)],
            b"data": rng.integers(0, 256, (NUM_IMAGES, 3072), np.uint8),
            b"filenames": [b"x.png"] * NUM_IMAGES,
        }
        for name in names
    }
    contents["batches.meta"] = {b"label_names": [name.encode() for name in CLASSES], b"num_vis": 3072}
    return contents


def write_archive(path: Path, contents: dict[str, Any], protocol: int = 2) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            pickled = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(pickled)
            tar.addfile(member, io.BytesIO(pickled))
    return path
