"""Inference with PyTorch on a CPU: eager or compiled, bfloat16 with autocast or a cast model, as is fastest here.

`python pytorch_infer.py SPEC` with the SPEC of bench/infer.py, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import copy
import json
import os
import sys

import numpy as np
import torch
from protocol import calls_per_second, serve
from torch_vit import load


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

    compiled = torch.compile(model, dynamic=False)

    def with_compile() -> torch.Tensor:
        return compiled(images)

    in_float32 = {"eager": plain, "compiled": with_compile}
    in_bfloat16 = {"autocast": with_autocast, "cast": with_cast_model}
    variants = in_float32 if spec["precision"] == "float32" else in_bfloat16
    with torch.inference_mode():
        name = max(variants, key=lambda name: calls_per_second(variants[name]))

        def batch() -> int:
            variants[name]()
            return spec["batch_size"]

        logits = model(torch.from_numpy(np.load(spec["images"])[:2])).tolist()
        serve(batch, version=f"{torch.__version__} {name}".strip(), logits=logits)


if __name__ == "__main__":
    main()
