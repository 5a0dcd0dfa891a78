"""PyTorch's forward pass on a CPU; in bfloat16 by autocast or with the model cast, whichever is the quicker here.

`python pytorch_infer.py SPEC`, SPEC as bench/infer.py writes it, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from protocol import serve
from torch_vit import load

TRIED_SECONDS = 1.0


def speed(work: Callable[[], object]) -> float:
    """Calls a second."""
    work()
    started, num_calls = time.perf_counter(), 0
    while time.perf_counter() - started < TRIED_SECONDS:
        work()
        num_calls += 1
    return num_calls / (time.perf_counter() - started)


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = load(spec)
    images = torch.from_numpy(np.load(spec["images"])[: spec["batch_size"]])
    cast = copy.deepcopy(model).bfloat16()

    def plain() -> torch.Tensor:
        return model(images)

    def by_autocast() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images).float()

    def by_cast_model() -> torch.Tensor:
        return cast(images.bfloat16()).float()

    ways = {"": plain} if spec["precision"] == "float32" else {"autocast": by_autocast, "cast": by_cast_model}
    with torch.inference_mode():
        name = max(ways, key=lambda name: speed(ways[name]))

        def batch() -> int:
            ways[name]()
            return spec["batch_size"]

        logits = model(torch.from_numpy(np.load(spec["images"])[:2])).tolist()
        serve(batch, version=f"{torch.__version__} {name}".strip(), logits=logits)


if __name__ == "__main__":
    main()
