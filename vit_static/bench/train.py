"""`bench train`: the training step against PyTorch, and against a dynamic-graph Paddle loop like PLSC's."""

from __future__ import annotations

import sys
from pathlib import Path

from vit_static.bench.harness import (
    Candidate,
    check_writable,
    config_spec,
    measure_interleaved,
    peer_candidate,
    peers_python,
    print_ratios,
    print_table,
    ratio,
    worker_command,
    write_results,
)
from vit_static.common.cpu import cpu_has_bfloat16
from vit_static.common.errors import ConfigError
from vit_static.common.text import print_text
from vit_static.config.schema import Config
from vit_static.model.variants import variant_of

TARGETS = {
    "fp32_vs_pytorch": 1.3,
    "bf16_vs_pytorch": 1.0,
    "bf16_vs_dynamic_fp32": 6.0,
    "memory_vs_pytorch": 1.0,
}


def run(config: Config, num_rounds: int, seconds: float, json_path: Path | None) -> None:
    """Print speeds and their ratios, and write them to `json_path`. A CPU without bfloat16 only measures float32."""
    check_writable(json_path)
    results = measure_interleaved(make_candidates(config), num_rounds, seconds)
    ratios = {"fp32_vs_pytorch": ratio(results["ours_fp32"], results["pytorch_fp32"])}
    memory_ratios = [results["ours_fp32"].peak_bytes / results["pytorch_fp32"].peak_bytes]
    if "ours_bf16" in results:
        ratios["bf16_vs_pytorch"] = ratio(results["ours_bf16"], results["pytorch_bf16"])
        ratios["bf16_vs_dynamic_fp32"] = ratio(results["ours_bf16"], results["dynamic_fp32"])
        memory_ratios.append(results["ours_bf16"].peak_bytes / results["pytorch_bf16"].peak_bytes)
    ratios["memory_vs_pytorch"] = max(memory_ratios)
    print_table(results, num_rounds)
    print_ratios(ratios, TARGETS)
    print_text("(memory_vs_pytorch: the larger ratio of the two precisions)")
    write_results(json_path, ratios, results)


def make_candidates(config: Config) -> list[Candidate]:
    """Return our step, PyTorch's and the dynamic-graph loop: same model, batch and optimizer, each on all cores.

    Raise ConfigError for a config that the peers can't follow.
    """
    if config.optim.name != "adamw":
        raise ConfigError("bench train: the peers only have AdamW; set -o optim.name=adamw")
    spec = {
        "model": peers_model(config),
        "batch_size": config.data.global_batch_size,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "clip_norm": config.optim.clip_norm or float("inf"),
    }
    python = peers_python()
    candidates = []
    for precision, level in (("fp32", "O0"), ("bf16", "O1")):
        if precision == "bf16" and not cpu_has_bfloat16():
            print_text("this CPU has no bfloat16 instructions: only float32 is measured")
            continue
        ours = config.model_copy(update={"amp": config.amp.model_copy(update={"level": level})})
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
        peer_spec = {**spec, "precision": dtype}
        candidates += [
            Candidate(f"ours_{precision}", f"vit_static {precision}", worker_command("step", config_spec(ours))),
            peer_candidate(f"pytorch_{precision}", f"PyTorch {precision}", python, "pytorch_train.py", peer_spec),
        ]
    dynamic = peer_candidate("dynamic_fp32", "dynamic-graph Paddle fp32", sys.executable, "plsc_like.py", spec)
    return [*candidates, dynamic]


def peers_model(config: Config) -> dict[str, int]:
    """Return the sizes of the peers' ViT. Raise ConfigError for a model that the peers don't have."""
    variant = variant_of(config.model)
    height, width = config.model.image_size
    if height != width or config.model.pool != "cls":
        raise ConfigError(
            "bench: the peers only have square images and a class token; set model.image_size and model.pool"
        )
    return {
        "image_size": height,
        "patch_size": variant.patch_size,
        "width": variant.width,
        "depth": variant.depth,
        "num_heads": variant.num_heads,
        "mlp_dim": variant.mlp_dim,
        "num_classes": config.model.num_classes,
    }
