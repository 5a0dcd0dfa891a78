"""A training step of PyTorch on a CPU: timm's recipe with AdamW and gradient clipping; autocast for bfloat16.

`python pytorch_train.py SPEC` with the SPEC of bench/train.py, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.nn.functional as F
from protocol import serve
from torch_vit import TorchViT


def main() -> None:
    """Train, as a candidate of `bench train`."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    model = TorchViT(**spec["model"])
    optimizer = torch.optim.AdamW(model.parameters(), spec["lr"], weight_decay=spec["weight_decay"])
    batch, size = spec["batch_size"], spec["model"]["image_size"]
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(0, spec["model"]["num_classes"], (batch,))
    is_bfloat16 = spec["precision"] == "bfloat16"

    def step() -> int:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip_norm"])
        optimizer.step()
        loss.item()
        return batch

    for _ in range(2):
        step()
    serve(step, version=torch.__version__)


if __name__ == "__main__":
    main()
