"""`bench train`: the training step against PyTorch, torch.compile, JAX, and a dynamic-graph Paddle loop like PLSC's."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vit_static.bench.harness import (
    Candidate,
    Result,
    check_writable,
    config_spec,
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
from vit_static.common.cpu import cpu_has_bfloat16
from vit_static.common.errors import ConfigError
from vit_static.common.text import print_text
from vit_static.config.schema import Config
from vit_static.model.variants import model_name, variant_of

# Against the best peer; memory against PyTorch's eager mode
TARGETS = {
    "fp32_vs_best_peer": 1.12,
    "bf16_vs_best_peer": 1.35,
    "bf16_vs_dynamic_fp32": 6.0,
    "memory_vs_pytorch": 0.9,
}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_LEVELS = {"fp32": "O0", "bf16": "O1"}
# By name: title, script, package. `dynamic` runs in the environment of the project, in float32 only.
PEERS = {
    "pytorch": ("PyTorch", "pytorch_train.py", "torch"),
    "torch-compile": ("torch.compile", "pytorch_train.py", "torch"),
    "jax": ("JAX", "jax_train.py", "jax"),
    "dynamic": ("dynamic-graph Paddle", "plsc_like.py", ""),
}
DEFAULT_PEERS = ("pytorch", "torch-compile", "jax")


def run(
    config: Config,
    num_rounds: int,
    seconds: float,
    json_path: Path | None,
    peers: Sequence[str] = DEFAULT_PEERS,
    peer_python: Path | None = None,
) -> None:
    """Print speeds and their ratios, and write them to `json_path`. A CPU without bfloat16 only measures float32.

    A peer that isn't installed is named and left out.
    """
    check_writable(json_path)
    description = machine(precisions())
    print_text(machine_line(description), flush=True)
    if "bf16" not in description["precisions"]:
        print_text("this CPU has no bfloat16 instructions: only float32 is measured")
    check_config(config)
    python = peers_python(peer_python) if any(PEERS[peer][2] for peer in peers) else sys.executable
    absent = missing_packages(python, [PEERS[peer][2] for peer in peers if PEERS[peer][2]])
    missing = {PEERS[peer][0]: PEERS[peer][2] for peer in peers if PEERS[peer][2] in absent}
    present = [peer for peer in peers if PEERS[peer][2] not in absent]
    results = measure_interleaved(make_candidates(config, present, python), num_rounds, seconds)
    ratios = ratios_of(results)
    print_table(results, num_rounds)
    print_missing(missing)
    print_ratios(ratios, TARGETS)
    if "memory_vs_pytorch" in ratios:
        print_text("(memory_vs_pytorch: the largest ratio of all precisions)")
    others = {
        "bench": "train",
        "model": model_name(config.model),
        "batch_size": config.data.global_batch_size,
        "machine": description,
        "missing": missing,
        "targets": {name: TARGETS[name] for name in ratios if name in TARGETS},
    }
    write_results(json_path, ratios, results, others)


def precisions() -> list[str]:
    """Return the precisions that this CPU can be measured in."""
    return ["fp32", "bf16"] if cpu_has_bfloat16() else ["fp32"]


def ratios_of(results: Mapping[str, Result]) -> dict[str, float]:
    """Return the ratios of our speeds to the best peer's and to each peer's, and of the peak memory to PyTorch's."""
    ratios, memory = {}, []
    for precision in _DTYPES:
        ours = results.get(f"ours_{precision}")
        theirs = {name: results[f"{name}_{precision}"] for name in DEFAULT_PEERS if f"{name}_{precision}" in results}
        if ours is None or not theirs:
            continue
        ratios[f"{precision}_vs_best_peer"] = ratio(ours, max(theirs.values(), key=lambda result: result.median))
        ratios |= {f"{precision}_vs_{name}": ratio(ours, result) for name, result in theirs.items()}
        if "pytorch" in theirs:
            memory.append(ours.peak_bytes / theirs["pytorch"].peak_bytes)
    for precision in _DTYPES:
        if f"ours_{precision}" in results and "dynamic_fp32" in results:
            ratios[f"{precision}_vs_dynamic_fp32"] = ratio(results[f"ours_{precision}"], results["dynamic_fp32"])
    if memory:
        ratios["memory_vs_pytorch"] = max(memory)
    return ratios


def check_config(config: Config) -> None:
    """Raise ConfigError for a config that the peers can't follow."""
    if config.optim.name != "adamw":
        raise ConfigError("bench train: the peers only have AdamW; set -o optim.name=adamw")
    peers_model(config)


def make_candidates(config: Config, peers: Sequence[str], python: str) -> list[Candidate]:
    """Return our step and the peers': same model, batch and optimizer, each on all cores."""
    spec = {
        "model": peers_model(config),
        "batch_size": config.data.global_batch_size,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "clip_norm": config.optim.clip_norm or float("inf"),
    }
    candidates = []
    for precision in precisions():
        ours = config.model_copy(update={"amp": config.amp.model_copy(update={"level": _LEVELS[precision]})})
        candidates.append(
            Candidate(f"ours_{precision}", f"vit_static {precision}", worker_command("step", config_spec(ours)))
        )
        for peer in peers:
            title, script, package = PEERS[peer]
            if not package and precision != "fp32":
                continue
            peer_spec = {**spec, "precision": _DTYPES[precision], "compile": peer == "torch-compile"}
            interpreter = python if package else sys.executable
            candidates.append(
                peer_candidate(f"{peer}_{precision}", f"{title} {precision}", interpreter, script, peer_spec)
            )
    return candidates


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
