"""Inference with PyTorch on a CPU; bfloat16 runs with autocast or a cast model, whichever is faster on this machine.

`python pytorch_infer.py SPEC` with the SPEC of bench/infer.py, in the environment of .requirements/bench.txt.
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

TRIAL_SECONDS = 1.0


def calls_per_second(work: Callable[[], object]) -> float:
    """Measure how often `work` can be called per second, after one call as warm-up."""
    work()
    started, num_calls = time.perf_counter(), 0
    while time.perf_counter() - started < TRIAL_SECONDS:
        work()
        num_calls += 1
    return num_calls / (time.perf_counter() - started)


def main() -> None:
    """Run the model, as a candidate of `bench infer`."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = load(spec)
    images = torch.from_numpy(np.load(spec["images"])[: spec["batch_size"]])
    cast = copy.deepcopy(model).bfloat16()

    def plain() -> torch.Tensor:
        return model(images)

    def with_autocast() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images).float()

    def with_cast_model() -> torch.Tensor:
        return cast(images.bfloat16()).float()

    variants = {"": plain} if spec["precision"] == "float32" else {"autocast": with_autocast, "cast": with_cast_model}
    with torch.inference_mode():
        name = max(variants, key=lambda name: calls_per_second(variants[name]))

        def batch() -> int:
            variants[name]()
            return spec["batch_size"]

        logits = model(torch.from_numpy(np.load(spec["images"])[:2])).tolist()
        serve(batch, version=f"{torch.__version__} {name}".strip(), logits=logits)


if __name__ == "__main__":
    main()
