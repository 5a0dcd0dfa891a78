"""A training step of PyTorch on a CPU: timm's recipe with AdamW and gradient clipping; autocast for bfloat16.

The optimizer is the fused or the default one, whichever is faster here; with `compile` in SPEC the model is compiled.

`python pytorch_train.py SPEC` with the SPEC of bench/train.py, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.nn.functional as F
from protocol import calls_per_second, serve
from torch_vit import TorchViT


def main() -> None:
    """Train, as a candidate of `bench train`."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    model = TorchViT(**spec["model"])
    forward = torch.compile(model, dynamic=False) if spec["compile"] else model
    batch, size = spec["batch_size"], spec["model"]["image_size"]
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(0, spec["model"]["num_classes"], (batch,))
    is_bfloat16 = spec["precision"] == "bfloat16"

    def step(optimizer: torch.optim.Optimizer) -> int:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip_norm"])
        optimizer.step()
        loss.item()
        return batch

    def make_optimizer(fused: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), spec["lr"], weight_decay=spec["weight_decay"], fused=fused or None)

    def speed(fused: bool) -> float:
        optimizer = make_optimizer(fused)
        return calls_per_second(lambda: step(optimizer), 2.0)

    fused = max((False, True), key=speed)
    optimizer = make_optimizer(fused)
    step(optimizer)
    serve(lambda: step(optimizer), version=f"{torch.__version__}{' fused AdamW' if fused else ''}")


if __name__ == "__main__":
    main()
