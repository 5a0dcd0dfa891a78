"""The benchmarks of `bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vit_static import verbs
from vit_static.cli.arguments import (
    Handler,
    HelpFormatter,
    Parser,
    Subparsers,
    add_config,
    add_json,
    add_rounds,
    add_verb,
    add_verbose,
    positive_float,
    positive_int,
)
from vit_static.config.loader import CONFIGS


def add_all(subparsers: Subparsers) -> None:
    """Add the verb `bench` with its benchmarks."""
    summary = "Measure speeds, as ratios within one run."
    verb = subparsers.add_parser(
        "bench",
        help=summary,
        description=f"{summary} Each benchmark has its own arguments.",
        epilog=f"Examples:\n  {subparsers._prog_prefix} bench train --rounds 3\n"
        f"  {subparsers._prog_prefix} bench infer --help",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    verb.example = f"{subparsers._prog_prefix} bench train --rounds 3"
    benches = verb.add_subparsers(dest="bench", required=True, metavar="BENCHMARK", parser_class=Parser)
    _add_train(benches)
    _add_data(benches)
    _add_infer(benches)
    _add_profile(benches)
    _add_step(benches)


def _add_bench(
    benches: Subparsers,
    name: str,
    summary: str,
    handler: Handler,
    examples: Sequence[str],
    config: Path = CONFIGS / "bench_s16.yaml",
) -> argparse.ArgumentParser:
    bench = add_verb(benches, name, summary, handler, examples=examples)
    add_verbose(bench)
    add_config(bench, config)
    return bench


def _add_peers(bench: argparse.ArgumentParser, peers: Sequence[str], default: str) -> None:
    """Add --peers and --peer-python."""
    bench.add_argument(
        "--peers",
        nargs="+",
        choices=peers,
        metavar="PEER",
        help=f"Compare with these: {', '.join(peers)} (default: {default}).",
    )
    bench.add_argument(
        "--peer-python",
        type=Path,
        metavar="PYTHON",
        help="Run the peers with this interpreter, without those that it can't import (default: .venv-bench, which is "
        "created).",
    )


def _add_train(benches: Subparsers) -> None:
    bench = _add_bench(
        benches,
        "train",
        "Compare the training step with PyTorch's, torch.compile's and JAX's.",
        verbs.run_bench_train,
        ["--rounds 3 --peers pytorch jax", "--scaling -c configs/quickstart.yaml"],
    )
    add_rounds(bench)
    _add_peers(bench, ("pytorch", "torch-compile", "jax", "dynamic"), "all but dynamic, a dynamic-graph Paddle loop")
    bench.add_argument(
        "--device",
        choices=["cpu", "gpu"],
        default="cpu",
        help="gpu: Measure the four configs of PLSC on this machine's GPUs.",
    )
    bench.add_argument(
        "--scaling",
        action="store_true",
        help="Instead, compare one process with several, data-parallel and tensor-parallel.",
    )


def _add_data(benches: Subparsers) -> None:
    bench = _add_bench(
        benches,
        "data",
        "Compare DALI's training images with PIL's and torchvision's, and measure how long training waits for them.",
        verbs.run_bench_data,
        ["--rounds 3", "--scale"],
    )
    add_rounds(bench)
    _add_peers(bench, ("pil", "torchvision"), "both")
    bench.add_argument(
        "--device",
        choices=["cpu", "gpu"],
        default="cpu",
        help="gpu: Compare pixels and speed of a GPU with the CPU's.",
    )
    bench.add_argument(
        "--scale",
        action="store_true",
        help="Instead, measure the cost of lists of 1.28 and 14.2 million images.",
    )


def _add_infer(benches: Subparsers) -> None:
    bench = _add_bench(
        benches,
        "infer",
        "Compare the exported model with PyTorch, ONNX Runtime and OpenVINO.",
        verbs.run_bench_infer,
        ["--batch-size 1 --batch-size 8", "-c configs/quickstart.yaml --checkpoint output/quickstart"],
    )
    add_rounds(bench)
    _add_peers(bench, ("pytorch", "onnxruntime", "openvino"), "all")
    bench.add_argument(
        "--checkpoint", type=Path, help="Also measure the top-1 of this trained model, on its validation images."
    )
    bench.add_argument(
        "--batch-size",
        type=positive_int,
        action="append",
        dest="batch_sizes",
        metavar="N",
        help="Measure this batch size; can be repeated (default: 1, 8 and 32).",
    )


def _add_profile(benches: Subparsers) -> None:
    bench = _add_bench(
        benches,
        "profile",
        "Measure the time of a training step, by operator.",
        verbs.run_bench_profile,
        ["--steps 5", "-c configs/quickstart.yaml --json profile.json"],
    )
    bench.add_argument("--steps", type=positive_int, default=3, help="Number of steps to average over (default: 3).")
    add_json(bench)


def _add_step(benches: Subparsers) -> None:
    bench = _add_bench(
        benches,
        "step",
        "Measure the training step of this mesh alone, and print a line of JSON.",
        verbs.run_bench_step,
        ["--seconds 5", "-c configs/deit_s16.yaml --real-data"],
        CONFIGS / "quickstart.yaml",
    )
    bench.add_argument("--seconds", type=positive_float, default=10.0, help="Measure for this long (default: 10).")
    bench.add_argument("--real-data", action="store_true", help="Train on images of data.root instead of noise.")
