"""`bench profile`: the time of a training step by operator."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle

from vit_static.bench.harness import check_writable
from vit_static.bench.step import MeasuredStep
from vit_static.common.io import write_json
from vit_static.common.terminal import print_table
from vit_static.common.text import print_text
from vit_static.config.schema import Config
from vit_static.model.variants import model_name
from vit_static.program.cpu import primitives
from vit_static.program.cpu.fuse_update import update_bytes
from vit_static.program.cpu.onednn import dense
from vit_static.program.cpu.product_choice import choices

NUM_LINES = 25
_NUM_COPIES = 9


@dataclass(frozen=True)
class OperatorTime:
    """Calls of an operator in a step, and their total time."""

    name: str
    num_calls: float
    seconds: float


class Bandwidth(NamedTuple):
    """Speeds of memory in GB/s, read and written bytes together: of the update, and of a copy of as many bytes."""

    update: float
    copy: float


def run(config: Config, num_steps: int, json_path: Path | None) -> None:
    """Print the time of a step by operator, and the share that is neither matrix products nor attention.

    Paddle's profiler times each operator as the executor runs it; the rest of a step is between operators. On a GPU
    these are times of the host, not of the GPU.
    """
    check_writable(json_path)
    step = MeasuredStep(config)
    seconds, operators = profile(step, num_steps)
    height, width = step.image_size
    size = f"{height} px" if height == width else f"{height}x{width} px"
    size += " (the largest of train.image_sizes)" if len(config.train.image_sizes) > 1 else ""
    print_text(
        f"{model_name(config.model)}, {size}, batch {step.batch_size}, {step.precision.level} "
        f"{step.precision.dtype}: {1e3 * seconds:.1f} ms per step, {step.batch_size / seconds:.2f} images/s\n"
    )
    rest = sum(op.seconds for op in operators[NUM_LINES:])
    in_operators = sum(op.seconds for op in operators)
    times = [
        *((op.name, f"{op.num_calls:.0f}", op.seconds) for op in operators[:NUM_LINES]),
        (f"{max(len(operators) - NUM_LINES, 0)} others", "", rest),
        ("between operators", "", seconds - in_operators),
    ]
    rows = [(name, calls, f"{1e3 * time:.2f}", f"{time / seconds:.1%}") for name, calls, time in times]
    print_table(("operator", "calls", "ms per step", "share"), rows, right=(1, 2, 3))
    products = sum(op.seconds for op in operators if is_product(op.name))
    print_text(f"\nneither matrix products nor attention: {1 - products / seconds:.1%}")
    bandwidth = _update_bandwidth(step, operators)
    if bandwidth is not None:
        print_text(f"the update: {bandwidth.update:.1f} GB/s; a copy of as many bytes: {bandwidth.copy:.1f} GB/s")
    record = choices.record()
    if record is not None:
        print_text(f"\nproducts that both libraries can compute ({record.machine}):")
        print_table(("rows x depth x columns, orders", "library"), [*record.libraries.items()])
    if json_path is not None:
        values: dict[str, Any] = {
            "seconds": seconds,
            "neither_product_nor_attention": 1 - products / seconds,
            "products": None if record is None else record.libraries,
            "operators": {op.name: {"calls": op.num_calls, "seconds": op.seconds} for op in operators},
        }
        if bandwidth is not None:
            values |= {"update_gb_per_s": bandwidth.update, "copy_gb_per_s": bandwidth.copy}
        write_json(values, json_path)


def _update_bandwidth(step: MeasuredStep, operators: list[OperatorTime]) -> Bandwidth | None:
    """Return how fast the update reads and writes memory; None if it isn't one operator of ours."""
    num_bytes = update_bytes(step.program.compiled("train"))
    if not num_bytes:
        return None
    seconds = sum(op.seconds for op in operators if op.name == "adamw")
    return Bandwidth(num_bytes / seconds / 1e9, num_bytes / _copy_seconds(num_bytes) / 1e9)


def _copy_seconds(num_bytes: int) -> float:
    """Return how long a copy on all threads that reads and writes `num_bytes` in all takes: the median of several."""
    length = num_bytes // 8
    source, target = np.ones(length, np.float32), np.ones(length, np.float32)
    copy = primitives.convert(dense("float32", length), dense("float32", length))
    times = []
    for _ in range(_NUM_COPIES):
        started = time.perf_counter()
        copy(source.ctypes.data, target.ctypes.data)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def profile(step: MeasuredStep, num_steps: int) -> tuple[float, list[OperatorTime]]:
    """Return the seconds of a step, and the operators in it, the slowest first: averages over `num_steps`."""
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
    seconds_by_name: dict[str, list[float]] = defaultdict(list)
    total = 0.0
    for event in events:
        name = re.sub(r"\[.*", "", event["name"]) if event.get("ph") == "X" else ""
        if event.get("cat") == "Operator" and not name.endswith("kernel launch"):
            seconds_by_name[short_name(name)].append(event["dur"] / 1e6)
        elif name == "StandaloneExecutor::run":
            total += event["dur"] / 1e6
    operators = [
        OperatorTime(name, len(calls) / num_steps, sum(calls) / num_steps) for name, calls in seconds_by_name.items()
    ]
    return total / num_steps, sorted(operators, key=lambda op: -op.seconds)


def short_name(name: str) -> str:
    """Strip the prefix of an operator's name, the number of one of our operators, and the suffix of an in-place one."""
    return re.sub(r"^(pd_op\.|py_op\.vit_static_)", "", re.sub(r"(_\d+|_)$", "", name))


def is_product(name: str) -> bool:
    """Return whether an operator is a matrix product, a convolution or attention, by its short name."""
    return name.startswith(("matmul", "attention", "flash_attn", "fused_gemm", "conv2d"))
