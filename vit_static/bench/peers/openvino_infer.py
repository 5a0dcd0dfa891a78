"""Inference with OpenVINO on a CPU, of the file written by torch_to_onnx.py, in float32 or bfloat16.

Its own settings for latency, with as many threads as cores, pinned to them or not, whichever is faster here.
`python openvino_infer.py SPEC` with the SPEC of bench/infer.py, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import openvino
from protocol import calls_per_second, serve


def main() -> None:
    """Run the model, as a candidate of `bench infer`."""
    spec = json.loads(sys.argv[1])
    images = np.load(spec["images"])[: spec["batch_size"]]
    requests = {}
    for name, is_pinned in {"pinned": True, "not pinned": False}.items():
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[spec["precision"]],
            "ENABLE_CPU_PINNING": is_pinned,
        }
        compiled = openvino.Core().compile_model(spec["onnx"], "CPU", properties)
        requests[name] = compiled.create_infer_request()
    name = max(requests, key=lambda name: calls_per_second(lambda: requests[name].infer({"images": images})))
    request = requests.pop(name)
    requests.clear()

    def batch() -> int:
        request.infer({"images": images})
        return spec["batch_size"]

    logits = request.infer({"images": np.load(spec["images"])[:2]})[0].tolist()
    serve(batch, version=f"{openvino.__version__.split('-')[0]} {name}", logits=logits)


if __name__ == "__main__":
    main()
