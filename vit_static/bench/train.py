"""`bench train`: the training step against PyTorch's, and against a dynamic-graph Paddle loop as PLSC has it."""

from __future__ import annotations

from pathlib import Path

from vit_static.bench.harness import (
    Contender,
    check_writable,
    config_spec,
    our_python,
    peer,
    peers_python,
    print_ratios,
    print_table,
    ratio,
    run_in_turns,
    worker_command,
    write_results,
)
from vit_static.common.cpu import cpu_has_bfloat16
from vit_static.common.errors import ConfigError
from vit_static.config.schema import Config
from vit_static.model.variants import variant_of

TARGETS = {
    "fp32_vs_pytorch": 1.3,
    "bf16_vs_pytorch": 1.0,
    "bf16_vs_dynamic_fp32": 6.0,
    "memory_vs_pytorch": 1.0,
}


def run(config: Config, rounds: int, seconds: float, json_path: Path | None) -> None:
    """Prints speeds and their ratios, and writes them to `json_path`. On a CPU without bfloat16, float32 alone."""
    check_writable(json_path)
    contenders = contenders_for(config)
    results = run_in_turns(contenders, rounds, seconds)
    ratios = {"fp32_vs_pytorch": ratio(results["ours_fp32"], results["pytorch_fp32"])}
    memory = [results["ours_fp32"].peak_bytes / results["pytorch_fp32"].peak_bytes]
    if "ours_bf16" in results:
        ratios["bf16_vs_pytorch"] = ratio(results["ours_bf16"], results["pytorch_bf16"])
        ratios["bf16_vs_dynamic_fp32"] = ratio(results["ours_bf16"], results["dynamic_fp32"])
        memory.append(results["ours_bf16"].peak_bytes / results["pytorch_bf16"].peak_bytes)
    ratios["memory_vs_pytorch"] = max(memory)
    print_table(results, rounds)
    print_ratios(ratios, TARGETS)
    print("(memory: the greater of the two precisions' ratios)")
    write_results(json_path, ratios, results)


def contenders_for(config: Config) -> list[Contender]:
    """Ours, PyTorch's and the dynamic loop, on the same model, batch and optimizer, each on all cores."""
    if config.optim.name != "adamw":
        raise ConfigError("bench train: the peers have AdamW; set optim.name=adamw")
    spec = {
        "model": peers_model(config),
        "batch_size": config.data.global_batch_size,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "clip_norm": config.optim.clip_norm or float("inf"),
    }
    peers = peers_python()
    contenders = []
    for precision, level in (("fp32", "O0"), ("bf16", "O1")):
        if precision == "bf16" and not cpu_has_bfloat16():
            print("this CPU multiplies no bfloat16: float32 alone is measured")
            continue
        ours = config.model_copy(update={"amp": config.amp.model_copy(update={"level": level})})
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
        contenders += [
            Contender(f"ours_{precision}", f"vit_static {precision}", worker_command("step", config_spec(ours))),
            peer(
                f"pytorch_{precision}",
                f"PyTorch {precision}",
                peers,
                "pytorch_train.py",
                {**spec, "precision": dtype},
            ),
        ]
    return [*contenders, peer("dynamic_fp32", "dynamic-graph Paddle fp32", our_python(), "plsc_like.py", spec)]


def peers_model(config: Config) -> dict[str, int]:
    """The sizes of the peers' ViT. Raises ConfigError for a model that they don't have."""
    variant = variant_of(config.model)
    height, width = config.model.image_size
    if height != width or config.model.pool != "cls":
        raise ConfigError("bench: the peers have square images and a class token; set model.image_size and model.pool")
    return {
        "image_size": height,
        "patch_size": variant.patch_size,
        "width": variant.width,
        "depth": variant.depth,
        "num_heads": variant.num_heads,
        "mlp_dim": variant.mlp_dim,
        "num_classes": config.model.num_classes,
    }
