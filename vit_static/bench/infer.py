"""`bench infer`: exported models in each precision against PyTorch, ONNX Runtime and OpenVINO, of the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from vit_static.bench.harness import (
    Candidate,
    Result,
    check_writable,
    machine,
    machine_line,
    measure_interleaved,
    missing_packages,
    peer_candidate,
    peers_python,
    print_missing,
    print_ratios,
    print_table,
    ratio,
    worker_command,
    write_results,
)
from vit_static.bench.peers import protocol
from vit_static.bench.train import peers_model
from vit_static.common.cpu import cpu_has_bfloat16
from vit_static.common.errors import UserError
from vit_static.common.startup import user_environ
from vit_static.common.text import print_text
from vit_static.config.schema import Config, InferencePrecision
from vit_static.data.open_set import open_set
from vit_static.export import onnx as onnx_export
from vit_static.export.exporter import compare, evenly_spaced, read_batches, write_artifact
from vit_static.inference.artifact import Comparison, spec_of
from vit_static.inference.backends import BACKEND_TITLES
from vit_static.inference.predictor import Predictor
from vit_static.model.variants import model_name, require_head
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import seed_everything
from vit_static.weights.infer import config_for
from vit_static.weights.load import file_state, load_into
from vit_static.weights.source import load_weights

BATCH_SIZES = (1, 8, 32)
_DTYPES: dict[str, InferencePrecision] = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
_PEERS = {"fp32": ("pytorch", "onnxruntime", "openvino"), "bf16": ("pytorch", "openvino"), "int8": ()}
_PEER_TITLES = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_PACKAGES = {"pytorch": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
DEFAULT_PEERS = tuple(_PEER_TITLES)
_NUM_CALIBRATION_IMAGES = 64  # of noise, for an untrained model
_LOGIT_TOLERANCE = 1e-2  # relative to the largest logit, in float32: models with the same weights agree within it
_TARGETS = {
    "fp32_vs_best_fp32_peer": 1.0,
    "best_low_vs_best_fp32_peer": 1.7,
    "memory_vs_onnxruntime_batch_32": 1.3,
}
_LEAST_GAIN = 1.1  # of a low precision that is worth its rounding


def run(
    config: Config,
    checkpoint: Path | None,
    overrides: list[str],
    batch_sizes: tuple[int, ...],
    num_rounds: int,
    seconds: float,
    json_path: Path | None,
    peers: Sequence[str] = DEFAULT_PEERS,
    peer_python: Path | None = None,
) -> None:
    """Print latencies, speeds, and the ratios of our speeds to the best peer's; write them to `json_path`.

    With a `checkpoint`, also compare the top-1 of each precision with that of the trained model. Without one, the
    weights are random, which doesn't change the speeds. A peer that isn't installed is named and left out.
    """
    check_writable(json_path)
    onnx_export.check_installed()
    description = machine(precisions())
    print_text(machine_line(description), flush=True)
    python = peers_python(peer_python) if peers else ""
    # PyTorch also writes the ONNX file that the others read.
    absent = missing_packages(python, ["torch", *(_PACKAGES[peer] for peer in peers)]) if peers else []
    needs = {peer: "torch" if "torch" in absent else _PACKAGES[peer] for peer in peers}
    missing = {_PEER_TITLES[peer]: package for peer, package in needs.items() if package in absent}
    present = [peer for peer in peers if needs[peer] not in absent]
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if checkpoint is None:
            comparisons = export_untrained(config, folder, max(batch_sizes))
        else:
            config, comparisons = export_trained(checkpoint, overrides, folder, max(batch_sizes))
        model = peers_model(config)
        if present:
            write_peers_onnx(model, folder, python)
        for batch_size in batch_sizes:
            candidates = make_candidates(model, folder, batch_size, present, python)
            choose_backends(candidates)
            group = measure_interleaved(candidates, num_rounds, seconds)
            check_weights(group)
            results |= group
    ratios = ratios_of(results, batch_sizes)
    print_table(results, num_rounds, latencies=True)
    print_missing(missing)
    print_ratios(ratios, _TARGETS)
    gains = low_precision_gains(results, batch_sizes)
    for line in advice(gains):
        print_text(line)
    print_top1(comparisons)
    others = {
        "bench": "infer",
        "model": model_name(config.model),
        "machine": description,
        "missing": missing,
        "targets": {name: target for name, target in _TARGETS.items() if name in ratios},
        "gains": gains,
        "backends": {name: result.ready_info.get("backend") for name, result in results.items() if "ours" in name},
        "top1": {name: comparison.model_dump() for name, comparison in comparisons.items()},
    }
    write_results(json_path, ratios, results, others)


def precisions() -> list[str]:
    """Return the precisions that this CPU can be measured in."""
    return [name for name in _DTYPES if name != "bf16" or cpu_has_bfloat16()]


def export_untrained(config: Config, folder: Path, batch_size: int) -> dict[str, Comparison]:
    """Write the config's model with random weights, including the head, and noise as images."""
    paddle.set_device("cpu")
    seed_everything(config.seed)
    model = VisionTransformer(config.model)
    assert model.head is not None
    model.head.weight.set_value(paddle.randn(model.head.weight.shape) * model.head.weight.shape[0] ** -0.5)
    model.eval()
    shape = (max(batch_size, _NUM_CALIBRATION_IMAGES), config.model.num_channels, *config.model.image_size)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    names = [str(number) for number in range(config.model.num_classes)]
    _write(model, config, names, folder, images)
    return {}


def export_trained(
    checkpoint: Path, overrides: list[str], folder: Path, batch_size: int
) -> tuple[Config, dict[str, Comparison]]:
    """Write a checkpoint's model and images of its validation set.

    Return its config, and the comparison of each precision with the trained model.
    """
    loaded = load_weights(checkpoint, overrides=overrides)
    config = config_for(None, loaded, overrides)
    require_head(config.model)
    paddle.set_device("cpu")
    model = VisionTransformer(config.model)
    load_into(model, config.model, loaded, config.init.pos_embed)
    model.eval()
    validation = open_set(config.data, "val", config.model.num_classes)
    names = loaded.class_names or validation.class_names
    chosen = evenly_spaced(len(validation), config.export.num_calibration_images)
    model_spec = spec_of(config, names)
    images = np.concatenate([inputs for inputs, *_ in read_batches(validation, chosen, model_spec)])
    _write(model, config, names, folder, np.resize(images, (max(batch_size, len(images)), *images.shape[1:])))
    comparisons = {}
    for precision in precisions():
        model_spec = model_spec.model_copy(update={"precision": _DTYPES[precision]})
        checks = compare(model, model_spec, folder / precision, validation, config.export.num_check_images)
        (comparisons[precision],) = checks.values()
    return config, comparisons


def _write(model: VisionTransformer, config: Config, names: list[str], folder: Path, images: np.ndarray) -> None:
    """Write our exported model in each precision, images.npy and weights.npz."""

    def batches() -> Iterator[np.ndarray]:
        yield from np.array_split(images, max(len(images) // 16, 1))

    for precision in precisions():
        (folder / precision).mkdir()
        model_spec = spec_of(config, names).model_copy(update={"precision": _DTYPES[precision]})
        write_artifact(model, config, model_spec, folder / precision, batches(), onnx=precision == "fp32")
    np.save(folder / "images.npy", images)
    np.savez(folder / "weights.npz", **file_state(model))  # type: ignore[arg-type]


def write_peers_onnx(model: Mapping[str, int], folder: Path, python: str) -> None:
    """Write the peers' model.onnx with PyTorch."""
    script = "torch_to_onnx.py"
    exporter = peer_candidate("onnx", script, python, script, _spec(model, folder))
    environ = {**os.environ, **exporter.environ}
    finished = subprocess.run(exporter.command, env=environ, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{script}: exit code {finished.returncode}:\n{finished.stderr[-4000:]}")


def _spec(model: Mapping[str, int], folder: Path) -> dict[str, Any]:
    files = {"onnx": "model.onnx", "weights": "weights.npz", "images": "images.npy"}
    return {"model": dict(model), **{key: str(folder / name) for key, name in files.items()}}


def make_candidates(
    model: Mapping[str, int], folder: Path, batch_size: int, peers: Sequence[str], python: str
) -> list[Candidate]:
    """Return our model and the peers in each precision, each on all cores. `model` has the keys of `peers_model`.

    In float32 ours is measured twice: as a user gets it (--backend auto), and in Paddle Inference.
    """
    candidates = []
    for precision in precisions():
        spec = {
            **_spec(model, folder),
            "batch_size": batch_size,
            "precision": _DTYPES[precision],
            "folder": str(folder / precision),
        }
        title, name = f"{precision}, batch {batch_size},", f"{precision}_batch_{batch_size}"
        ours = worker_command("infer", json.dumps(spec))
        candidates.append(Candidate(f"ours_{name}", f"vit_static {title}", ours))
        if precision == "fp32":
            paddle_only = worker_command("infer", json.dumps({**spec, "backend": "paddle"}))
            candidates.append(Candidate(f"paddle_{name}", f"vit_static {title} --backend paddle,", paddle_only))
        for peer in _PEERS[precision]:
            if peer in peers:
                peer_title = f"{_PEER_TITLES[peer]} {title}"
                candidates.append(peer_candidate(f"{peer}_{name}", peer_title, python, f"{peer}_infer.py", spec))
    return candidates


def choose_backends(candidates: Sequence[Candidate]) -> None:
    """Have our float32 models choose their backend, so that the memory of choosing isn't measured with them."""
    for candidate in candidates:
        if candidate.name.startswith("ours_fp32"):
            environ = {**user_environ(), "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
            subprocess.run(candidate.command, stdin=subprocess.DEVNULL, capture_output=True, env=environ, check=False)


def check_weights(group: Mapping[str, Result]) -> None:
    """Raise UserError if the float32 logits of a peer differ from ours."""
    logits = {name: np.array(result.ready_info["logits"]) for name, result in group.items() if "_fp32_" in name}
    ours = next(values for name, values in logits.items() if name.startswith("ours"))
    for name, values in logits.items():
        if not np.abs(values - ours).max() <= _LOGIT_TOLERANCE * max(1.0, np.abs(ours).max()):
            raise UserError(
                f"bench infer: the logits of {name} differ from ours; the peers only have a plain ViT, so measure a "
                "model without LayerScale, registers and other extras"
            )


def ratios_of(results: Mapping[str, Result], batch_sizes: tuple[int, ...]) -> dict[str, float]:
    """Return the ratios of our speeds to the best peer's.

    First the minima over the batch sizes: of float32, and of our best low precision. Then, by batch size, each
    precision against the best float32 peer, and bfloat16 also against the best bfloat16 peer.
    """

    def ratio_to_best(precision: str, peer_precision: str, batch_size: int) -> float:
        names = (f"{name}_{peer_precision}_batch_{batch_size}" for name in _PEERS[peer_precision])
        peers = [results[name] for name in names if name in results]
        best = max(peers, key=lambda result: result.median)
        return ratio(results[f"ours_{precision}_batch_{batch_size}"], best)

    if not any(f"{peer}_fp32_batch_{batch_sizes[0]}" in results for peer in _PEERS["fp32"]):
        return {}
    measured = [precision for precision in _DTYPES if f"ours_{precision}_batch_{batch_sizes[0]}" in results]
    to_fp32 = {name: {size: ratio_to_best(name, "fp32", size) for size in batch_sizes} for name in measured}
    low = [name for name in measured if name != "fp32"]
    ratios = {"fp32_vs_best_fp32_peer": min(to_fp32["fp32"].values())}
    if low:
        ratios["best_low_vs_best_fp32_peer"] = min(max(to_fp32[name][size] for name in low) for size in batch_sizes)
    for name in measured:
        ratios |= {f"{name}_vs_best_fp32_peer_batch_{size}": to_fp32[name][size] for size in batch_sizes}
    for size in batch_sizes:
        theirs = results.get(f"onnxruntime_fp32_batch_{size}")
        if theirs is not None and theirs.peak_bytes:
            ratios[f"memory_vs_onnxruntime_batch_{size}"] = (
                results[f"ours_fp32_batch_{size}"].peak_bytes / theirs.peak_bytes
            )
    if any(f"{peer}_bf16_batch_{batch_sizes[0]}" in results for peer in _PEERS["bf16"]):
        ratios |= {f"bf16_vs_best_bf16_peer_batch_{n}": ratio_to_best("bf16", "bf16", n) for n in batch_sizes}
    return ratios


def low_precision_gains(results: Mapping[str, Result], batch_sizes: Sequence[int]) -> dict[str, float]:
    """Return the least ratio over the batch sizes of our speed in each low precision to our speed in float32."""
    return {
        name: min(ratio(results[f"ours_{name}_batch_{n}"], results[f"ours_fp32_batch_{n}"]) for n in batch_sizes)
        for name in _DTYPES
        if name != "fp32" and f"ours_{name}_batch_{batch_sizes[0]}" in results
    }


def advice(gains: Mapping[str, float]) -> list[str]:
    """Return a line for each low precision: how much faster it is than float32 here, and whether that is worth it."""
    return [
        f"{name}: {gain:.2f} times as fast as fp32{'' if gain >= _LEAST_GAIN else ': not recommended on this CPU'}"
        for name, gain in gains.items()
    ]


def print_top1(comparisons: Mapping[str, Comparison]) -> None:
    """Print the top-1 of each precision beside that of the trained model."""
    if not comparisons:
        print_text("\ntop-1: not measured, because the weights are random; name a trained model with --checkpoint RUN")
    for precision, comparison in comparisons.items():
        assert comparison.top1_exported is not None and comparison.top1_trained is not None
        difference = comparison.top1_exported - comparison.top1_trained
        print_text(
            f"{precision}: top-1 {comparison.top1_exported:.2f} %, {difference:+.2f} from the trained model, the same "
            f"class for {comparison.same_class:.2f} % of {comparison.num_images} images"
        )


def serve(spec: Mapping[str, Any]) -> None:
    """Run the exported model, as a worker of the harness. `spec` has the keys of `make_candidates`."""
    images, batch_size = np.load(spec["images"]), int(spec["batch_size"])
    predictor = Predictor(Path(spec["folder"]), backend=spec.get("backend", "auto"), usual_batch_size=batch_size)
    logits = predictor.logits(images[:2]).tolist()
    images = np.ascontiguousarray(images[:batch_size])

    def batch() -> int:
        predictor.logits(images)
        return batch_size

    for _ in range(3):
        batch()
    protocol.serve(batch, version=BACKEND_TITLES[predictor.backend], logits=logits, backend=predictor.backend)
