"""Export of the PyTorch model to ONNX, for any batch size: `python torch_to_onnx.py SPEC`, run by bench/infer.py."""

from __future__ import annotations

import json
import sys

import torch
from torch_vit import load


def main() -> None:
    """Write the ONNX file."""
    spec = json.loads(sys.argv[1])
    size = spec["model"]["image_size"]
    torch.onnx.export(
        load(spec),
        (torch.randn(2, 3, size, size),),
        spec["onnx"],
        dynamo=False,  # the newer exporter needs onnxscript
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )


if __name__ == "__main__":
    main()
