"""ONNX Runtime's forward pass on a CPU, in float32, of the file that torch_to_onnx.py has written.

`python onnxruntime_infer.py SPEC`, SPEC as bench/infer.py writes it, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import onnxruntime
from protocol import serve


def main() -> None:
    spec = json.loads(sys.argv[1])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    session = onnxruntime.InferenceSession(spec["onnx"], options, providers=["CPUExecutionProvider"])
    size = spec["model"]["image_size"]
    images = np.random.default_rng(0).standard_normal((spec["batch_size"], 3, size, size)).astype(np.float32)

    def batch() -> int:
        session.run(None, {"images": images})
        return spec["batch_size"]

    for _ in range(3):
        batch()
    serve(batch, version=onnxruntime.__version__)


if __name__ == "__main__":
    main()
