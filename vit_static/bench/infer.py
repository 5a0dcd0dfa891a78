"""`bench infer`: the exported model through Paddle Inference against PyTorch and ONNX Runtime."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from vit_static import export, runtime
from vit_static import mesh as mesh_module
from vit_static import model as model_module
from vit_static.bench.contenders import (
    Contender,
    Result,
    check_writable,
    our_python,
    peer,
    peers_python,
    print_ratios,
    print_table,
    ratio,
    take_turns,
    write_json,
)
from vit_static.bench.peers import protocol
from vit_static.bench.train import peers_model
from vit_static.config import Config
from vit_static.predict import Predictor

BATCH_SIZES = (1, 8)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_PEERS = {"fp32": ("pytorch", "onnxruntime"), "bf16": ("pytorch",)}


def run(config: Config, rounds: int, seconds: float, json_path: Path | None) -> None:
    """Prints speeds and ours over the best peer's, and writes them to `json_path`. The weights are fresh: their values
    don't change the speed. On a CPU without bfloat16, float32 alone."""
    check_writable(json_path)
    model = peers_model(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(config, model, folder)
        results = take_turns(contenders_for(model, folder), rounds, seconds)
    ratios = ratios_of(results)
    print_table(results, rounds)
    print_ratios(ratios)
    write_json(json_path, ratios, results)


def write_models(config: Config, model: Mapping[str, int], folder: Path) -> None:
    """Ours, as `export` writes it, and the peers' as model.onnx, into `folder`."""
    paddle.set_device("cpu")
    mesh_module.seed_everything(config.seed)
    ours = model_module.build(config.model)
    ours.eval()
    card = export.card_of(config, [str(number) for number in range(config.model.num_classes)])
    export.write(ours, config, card, folder)
    spec = {"model": dict(model), "onnx": str(folder / "model.onnx")}
    maker = peer("onnx", "torch_to_onnx.py", peers_python(), "torch_to_onnx.py", spec)
    environ = {**os.environ, **maker.environ}
    finished = subprocess.run(maker.command, env=environ, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{maker.title}: exit code {finished.returncode}:\n{finished.stderr[-4000:]}")


def contenders_for(model: Mapping[str, int], folder: Path) -> list[Contender]:
    """Ours and the peers, in both precisions and at both batch sizes, each on all cores."""
    precisions = list(_DTYPES)
    if not runtime.cpu_has_bfloat16():
        print("this CPU multiplies no bfloat16: float32 alone is measured")
        precisions.remove("bf16")
    contenders = []
    for batch_size in BATCH_SIZES:
        for precision in precisions:
            spec = {
                "model": dict(model),
                "batch_size": batch_size,
                "precision": _DTYPES[precision],
                "folder": str(folder),
                "onnx": str(folder / "model.onnx"),
            }
            title, name = f"{precision}, batch {batch_size},", f"{precision}_batch_{batch_size}"
            ours = (our_python(), "-m", "vit_static", "bench", "infer", "--serve", json.dumps(spec))
            contenders.append(Contender(f"ours_{name}", f"vit_static {title}", ours))
            contenders.append(peer(f"pytorch_{name}", f"PyTorch {title}", peers_python(), "pytorch_infer.py", spec))
            if "onnxruntime" in _PEERS[precision]:
                title = f"ONNX Runtime {title}"
                contenders.append(peer(f"onnxruntime_{name}", title, peers_python(), "onnxruntime_infer.py", spec))
    return contenders


def ratios_of(results: Mapping[str, Result]) -> dict[str, float]:
    """Ours over the best peer's: for each precision the lesser of the batch sizes', then each of them."""
    ratios: dict[str, float] = {}
    for precision, peers in _PEERS.items():
        found = {}
        for batch_size in BATCH_SIZES:
            case = f"{precision}_batch_{batch_size}"
            if f"ours_{case}" in results:
                best = max((results[f"{name}_{case}"] for name in peers), key=lambda result: result.median)
                found[f"{precision}_vs_best_peer_batch_{batch_size}"] = ratio(results[f"ours_{case}"], best)
        if found:
            ratios |= {f"{precision}_vs_best_peer": min(found.values()), **found}
    return ratios


def serve(spec_text: str) -> None:
    """`bench infer --serve SPEC`: the exported model at work, as a contender of bench/contenders.py."""
    spec: dict[str, Any] = json.loads(spec_text)
    predictor = Predictor(Path(spec["folder"]), precision=spec["precision"])
    size, batch_size = spec["model"]["image_size"], spec["batch_size"]
    images = np.random.default_rng(0).standard_normal((batch_size, 3, size, size)).astype(np.float32)

    def batch() -> int:
        predictor.logits(images)
        return int(batch_size)

    for _ in range(3):
        batch()
    protocol.serve(batch, version=paddle.__version__)
