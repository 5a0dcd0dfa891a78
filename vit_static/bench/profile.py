"""`bench profile`: where a training step's time goes, operator by operator."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import paddle

from vit_static.bench.harness import check_writable
from vit_static.bench.step import MeasuredStep
from vit_static.common.io import write_json
from vit_static.config.schema import Config

NUM_LINES = 25


@dataclass(frozen=True)
class Share:
    """An operator's part of a step: all of its calls together."""

    name: str
    num_calls: float
    seconds: float


def run(config: Config, num_steps: int, json_path: Path | None) -> None:
    """Prints the step's time by operator, and how much of it is neither product nor attention.

    Paddle's profiler times each operator as the executor runs it; what is left of a step is between operators. On a
    card that is the host's time, not the card's.
    """
    check_writable(json_path)
    step = MeasuredStep(config)
    seconds, shares = profile(step, num_steps)
    print(
        f"{config.model.variant}, {config.model.image_size[0]} px, batch {step.batch_size}, {step.precision.level} "
        f"{step.precision.dtype}: {1e3 * seconds:.1f} ms a step, {step.batch_size / seconds:.2f} images/s\n"
    )
    print(f"{'operator':<40}{'calls':>7}{'ms a step':>12}{'share':>9}")
    for share in shares[:NUM_LINES]:
        print(f"{share.name:<40}{share.num_calls:7.0f}{1e3 * share.seconds:12.2f}{share.seconds / seconds:9.1%}")
    rest = sum(share.seconds for share in shares[NUM_LINES:])
    print(f"{f'{max(len(shares) - NUM_LINES, 0)} others':<47}{1e3 * rest:12.2f}{rest / seconds:9.1%}")
    counted = sum(share.seconds for share in shares)
    print(f"{'between operators':<47}{1e3 * (seconds - counted):12.2f}{1 - counted / seconds:9.1%}")
    products = sum(share.seconds for share in shares if is_product(share.name))
    print(f"\nneither product nor attention: {1 - products / seconds:.1%}")
    if json_path is not None:
        found = {
            "seconds": seconds,
            "neither_product_nor_attention": 1 - products / seconds,
            "operators": {share.name: {"calls": share.num_calls, "seconds": share.seconds} for share in shares},
        }
        write_json(found, json_path)


def profile(step: MeasuredStep, num_steps: int) -> tuple[float, list[Share]]:
    """Seconds of a step, and of each operator in it, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler = paddle.profiler.Profiler(
            targets=[paddle.profiler.ProfilerTarget.CPU], on_trace_ready=lambda finished: None
        )
        profiler.start()
        for _ in range(num_steps):
            step()
        profiler.stop()
        profiler.export(str(trace), "json")
        events = json.loads(trace.read_text())["traceEvents"]
    by_name: dict[str, list[float]] = defaultdict(list)
    total = 0.0
    for event in events:
        name = re.sub(r"\[.*", "", event["name"]) if event.get("ph") == "X" else ""
        if event.get("cat") == "Operator" and not name.endswith("kernel launch"):
            by_name[plain(name)].append(event["dur"] / 1e6)
        elif name == "StandaloneExecutor::run":
            total += event["dur"] / 1e6
    shares = [Share(name, len(spent) / num_steps, sum(spent) / num_steps) for name, spent in by_name.items()]
    return total / num_steps, sorted(shares, key=lambda share: -share.seconds)


def plain(name: str) -> str:
    """An operator's name without Paddle's prefix, the number of ours, and the mark of those that write in place."""
    return re.sub(r"^(pd_op\.|py_op\.vit_static_)", "", re.sub(r"(_\d+|_)$", "", name))


def is_product(name: str) -> bool:
    return name.startswith(("matmul", "attention", "flash_attn", "fused_gemm", "conv2d"))
