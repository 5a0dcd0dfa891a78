"""`bench infer`: exported models, in each precision, against PyTorch and ONNX Runtime with the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from vit_static.bench.harness import (
    Contender,
    Result,
    check_writable,
    peer,
    peers_python,
    print_ratios,
    print_table,
    ratio,
    run_in_turns,
    worker_command,
    write_results,
)
from vit_static.bench.peers import protocol
from vit_static.bench.train import peers_model
from vit_static.common.cpu import cpu_has_bfloat16
from vit_static.common.errors import UserError
from vit_static.config.schema import Config, InferencePrecision
from vit_static.data.open_set import open_set
from vit_static.export import onnx as onnx_export
from vit_static.export.exporter import compare, evenly_spaced, read_batches, write_artifact
from vit_static.inference.artifact import Comparison, spec_of
from vit_static.inference.predictor import Predictor
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import seed_everything
from vit_static.weights.load import file_state, load_into
from vit_static.weights.source import load_weights

BATCH_SIZES = (1, 8, 32)
_DTYPES: dict[str, InferencePrecision] = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
_PEERS = {"fp32": ("pytorch", "onnxruntime"), "bf16": ("pytorch",), "int8": ()}
_FP32 = "pytorch", "onnxruntime"
_NUM_CALIBRATION_IMAGES = 64  # of noise, where there are no weights that have been trained
_SAME_WEIGHTS = 1e-2  # of a logit, in float32
_TARGETS = {"fp32_vs_best_fp32_peer": 1.0, "best_low_vs_best_fp32_peer": 1.7}


def run(
    config: Config,
    checkpoint: Path | None,
    overrides: list[str],
    batch_sizes: tuple[int, ...],
    rounds: int,
    seconds: float,
    json_path: Path | None,
) -> None:
    """Prints latencies, speeds, ours over the best peer's, and with a `checkpoint` each precision's top-1 beside the
    trained model's; writes them to `json_path`. Without one the weights are fresh, which changes no speed."""
    check_writable(json_path)
    onnx_export.check_installed()
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if checkpoint is None:
            comparisons = write_fresh(config, folder, max(batch_sizes))
        else:
            config, comparisons = write_trained(checkpoint, overrides, folder, max(batch_sizes))
        model = peers_model(config)
        for batch_size in batch_sizes:
            group = run_in_turns(contenders_for(model, folder, batch_size), rounds, seconds)
            check_weights(group)
            results |= group
    ratios = ratios_of(results, batch_sizes)
    print_table(results, rounds, latencies=True)
    print_ratios(ratios, _TARGETS)
    print_top1(comparisons)
    top1 = {name: found.model_dump() for name, found in comparisons.items()}
    write_results(json_path, ratios, results, {"top1": top1})


def precisions() -> list[str]:
    """What this machine can be compared in."""
    return [name for name in _DTYPES if name != "bf16" or cpu_has_bfloat16()]


def write_fresh(config: Config, folder: Path, batch_size: int) -> dict[str, Comparison]:
    """The config's model with fresh weights, its head too, and noise for images."""
    paddle.set_device("cpu")
    seed_everything(config.seed)
    model = VisionTransformer(config.model)
    model.head.weight.set_value(paddle.randn(model.head.weight.shape) * model.head.weight.shape[0] ** -0.5)
    model.eval()
    shape = (max(batch_size, _NUM_CALIBRATION_IMAGES), 3, *config.model.image_size)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    names = [str(number) for number in range(config.model.num_classes)]
    _write(model, config, names, folder, images)
    return {}


def write_trained(
    checkpoint: Path, overrides: list[str], folder: Path, batch_size: int
) -> tuple[Config, dict[str, Comparison]]:
    """A checkpoint's model, images of its validation set, and what `export` finds of each precision."""
    loaded = load_weights(checkpoint)
    config = loaded.config_with(overrides)
    paddle.set_device("cpu")
    model = VisionTransformer(config.model)
    load_into(model, config.model, loaded, config.init.pos_embed)
    model.eval()
    validation = open_set(config.data, "val", config.model.num_classes)
    names = loaded.class_names or validation.class_names
    chosen = evenly_spaced(len(validation), config.export.num_calibration_images)
    spec = spec_of(config, names)
    images = np.concatenate([inputs for inputs, *_ in read_batches(validation, chosen, spec)])
    _write(model, config, names, folder, np.resize(images, (max(batch_size, len(images)), *images.shape[1:])))
    comparisons = {}
    for precision in precisions():
        spec = spec.model_copy(update={"precision": _DTYPES[precision]})
        found = compare(model, spec, folder / precision, validation, config.export.num_check_images)
        (comparisons[precision],) = found.values()
    return config, comparisons


def _write(model: VisionTransformer, config: Config, names: list[str], folder: Path, images: np.ndarray) -> None:
    """Ours in each precision, as `export` writes it, images.npy, weights.npz, and the peers' model.onnx."""

    def batches() -> Iterator[np.ndarray]:
        yield from np.array_split(images, max(len(images) // 16, 1))

    for precision in precisions():
        (folder / precision).mkdir()
        spec = spec_of(config, names).model_copy(update={"precision": _DTYPES[precision]})
        write_artifact(model, config, spec, folder / precision, batches())
    np.save(folder / "images.npy", images)
    np.savez(folder / "weights.npz", **file_state(model))  # type: ignore[arg-type]
    maker = peer("onnx", "torch_to_onnx.py", peers_python(), "torch_to_onnx.py", _spec(peers_model(config), folder))
    environ = {**os.environ, **maker.environ}
    finished = subprocess.run(maker.command, env=environ, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{maker.title}: exit code {finished.returncode}:\n{finished.stderr[-4000:]}")


def _spec(model: Mapping[str, int], folder: Path) -> dict[str, Any]:
    files = {"onnx": "model.onnx", "weights": "weights.npz", "images": "images.npy"}
    return {"model": dict(model), **{key: str(folder / name) for key, name in files.items()}}


def contenders_for(model: Mapping[str, int], folder: Path, batch_size: int) -> list[Contender]:
    """Ours and the peers in each precision, each on all cores."""
    contenders = []
    for precision in precisions():
        spec = {
            **_spec(model, folder),
            "batch_size": batch_size,
            "precision": _DTYPES[precision],
            "folder": str(folder / precision),
        }
        title, name = f"{precision}, batch {batch_size},", f"{precision}_batch_{batch_size}"
        ours = worker_command("infer", json.dumps(spec))
        contenders.append(Contender(f"ours_{name}", f"vit_static {title}", ours))
        for of_peer, said, script in (
            ("pytorch", "PyTorch", "pytorch_infer.py"),
            ("onnxruntime", "ONNX Runtime", "onnxruntime_infer.py"),
        ):
            if of_peer in _PEERS[precision]:
                contenders.append(peer(f"{of_peer}_{name}", f"{said} {title}", peers_python(), script, spec))
    return contenders


def check_weights(group: Mapping[str, Result]) -> None:
    """Raises UserError where the peers' model, in float32, isn't ours."""
    logits = {name: np.array(result.known["logits"]) for name, result in group.items() if "_fp32_" in name}
    ours = next(found for name, found in logits.items() if name.startswith("ours"))
    for name, found in logits.items():
        if not np.abs(found - ours).max() <= _SAME_WEIGHTS * max(1.0, np.abs(ours).max()):
            raise UserError(
                f"bench infer: the model is none of the peers', whose ViT is plain ({name} answers otherwise)"
            )


def ratios_of(results: Mapping[str, Result], batch_sizes: tuple[int, ...]) -> dict[str, float]:
    """Ours over the best float32 peer, and in bfloat16 over the best bfloat16 one, by batch size; before them the least
    of each, of low precisions the best's."""

    def over(precision: str, peers: tuple[str, ...], of_peers: str, batch_size: int) -> float:
        best = max(
            (results[f"{name}_{of_peers}_batch_{batch_size}"] for name in peers), key=lambda result: result.median
        )
        return ratio(results[f"ours_{precision}_batch_{batch_size}"], best)

    known = [precision for precision in _DTYPES if f"ours_{precision}_batch_{batch_sizes[0]}" in results]
    over_fp32 = {one: {size: over(one, _FP32, "fp32", size) for size in batch_sizes} for one in known}
    low = [one for one in known if one != "fp32"]
    ratios = {"fp32_vs_best_fp32_peer": min(over_fp32["fp32"].values())}
    if low:
        ratios["best_low_vs_best_fp32_peer"] = min(max(over_fp32[one][size] for one in low) for size in batch_sizes)
    for one in known:
        ratios |= {f"{one}_vs_best_fp32_peer_batch_{size}": over_fp32[one][size] for size in batch_sizes}
    if "bf16" in known:
        own = {size: over("bf16", _PEERS["bf16"], "bf16", size) for size in batch_sizes}
        ratios |= {f"bf16_vs_best_bf16_peer_batch_{size}": value for size, value in own.items()}
    return ratios


def print_top1(comparisons: Mapping[str, Comparison]) -> None:
    if not comparisons:
        print("\ntop-1: the weights are fresh; --checkpoint RUN measures a trained model's, too")
    for precision, found in comparisons.items():
        print(
            f"{precision}: top-1 {found.top1_exported:.2f} %, {found.top1_exported - found.top1_trained:+.2f} from the "
            f"trained model's, the same class for {found.same_class:.2f} % of {found.num_images} images"
        )


def serve(spec: Mapping[str, Any]) -> None:
    """Run the exported model, as a worker of the harness. `spec` has the keys of `contenders_for`."""
    predictor = Predictor(Path(spec["folder"]))
    images, batch_size = np.load(spec["images"]), int(spec["batch_size"])
    logits = predictor.logits(images[:2]).tolist()
    images = np.ascontiguousarray(images[:batch_size])

    def batch() -> int:
        predictor.logits(images)
        return batch_size

    for _ in range(3):
        batch()
    protocol.serve(batch, version=paddle.__version__, logits=logits)
