"""Inference with ONNX Runtime on a CPU in float32, of the file written by torch_to_onnx.py.

`python onnxruntime_infer.py SPEC` with the SPEC of bench/infer.py, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import onnxruntime
from protocol import serve


def main() -> None:
    """Run the model, as a candidate of `bench infer`."""
    spec = json.loads(sys.argv[1])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    session = onnxruntime.InferenceSession(spec["onnx"], options, providers=["CPUExecutionProvider"])
    images = np.load(spec["images"])[: spec["batch_size"]]

    def batch() -> int:
        session.run(None, {"images": images})
        return spec["batch_size"]

    for _ in range(3):
        batch()
    logits = session.run(None, {"images": np.load(spec["images"])[:2]})[0].tolist()
    serve(batch, version=onnxruntime.__version__, logits=logits)


if __name__ == "__main__":
    main()
