"""`bench train --scaling`: the same global batch on one process and on several, as ratios of one run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_static.bench.step import Speed
from vit_static.common.errors import ConfigError
from vit_static.common.terminal import print_table
from vit_static.common.text import counted, print_text
from vit_static.config.loader import load_config
from vit_static.model.variants import variant_of
from vit_static.parallel.mesh import choose_device, resolve_mesh


@dataclass(frozen=True)
class ProcessLayout:
    """A division of the same global batch over processes that share the same cores."""

    name: str
    num_processes: int
    overrides: tuple[str, ...] = ()


def scaling_layouts(num_cores: int) -> list[ProcessLayout]:
    """Return the layouts to compare: one process with all cores; one process per core, data-parallel; and the same in
    tensor-parallel pairs, if the number of cores is even."""
    layouts = [ProcessLayout(f"1 process, {num_cores} threads", 1)]
    if num_cores > 1:
        layouts.append(ProcessLayout(f"dp {num_cores}: {num_cores} processes, 1 core each", num_cores))
    if num_cores > 1 and num_cores % 2 == 0:
        pairs = "mp 2" if num_cores == 2 else f"dp {num_cores // 2} x mp 2"
        layouts.append(ProcessLayout(f"{pairs}: {num_cores} processes, 1 core each", num_cores, ("parallel.mp=2",)))
    return layouts


def run(config_path: Path, overrides: Sequence[str], num_rounds: int, seconds: float) -> None:
    """Measure all layouts in interleaved rounds; print the medians of the speeds and their ratios.

    Raise ConfigError, before anything is measured, for a GPU or for a config that a layout doesn't divide.
    """
    layouts = scaling_layouts(len(os.sched_getaffinity(0)))
    for layout in layouts:
        config = load_config(config_path, [*overrides, *layout.overrides])
        if choose_device(config.device) == "gpu":
            raise ConfigError("bench train --scaling: measures CPU processes; set VIT_STATIC_DEVICE=cpu and device=cpu")
        variant = variant_of(config.model)
        resolve_mesh(config.parallel, layout.num_processes, config.data.global_batch_size, variant)
    speeds_by_layout: dict[str, list[Speed]] = {layout.name: [] for layout in layouts}
    for number in range(1, num_rounds + 1):
        for layout in layouts:
            speed = _measure_in_processes(layout, config_path, overrides, seconds)
            speeds_by_layout[layout.name].append(speed)
            print_text(f"round {number}  {layout.name:<36} {speed.images_per_s:8.1f} images/s", flush=True)
    rows = []
    first = statistics.median(speed.images_per_s for speed in speeds_by_layout[layouts[0].name])
    for name, speeds in speeds_by_layout.items():
        images_per_s = statistics.median(speed.images_per_s for speed in speeds)
        shares = [speed.collective_share for speed in speeds if speed.collective_share is not None]
        share = f"{100 * statistics.median(shares):.1f} %" if shares else "unknown"
        rows.append((name, f"{images_per_s:.1f}", f"{images_per_s / first:.2f}", share))
    print_text("")
    head = f"median of {counted(num_rounds, 'round')}"
    print_table((head, "images/s", "ratio to the first", "in collectives"), rows, right=(1, 2, 3))


def _measure_in_processes(layout: ProcessLayout, config_path: Path, overrides: Sequence[str], seconds: float) -> Speed:
    flags = [argument for override in (*overrides, *layout.overrides) for argument in ("-o", override)]
    command = [sys.executable, "-m", "vit_static.launch", "bench", "step", "-c", str(config_path), *flags]
    environ = {**os.environ, "NPROC": str(layout.num_processes)}
    environ.pop("OMP_NUM_THREADS", None)  # set for this process; the launcher divides the cores
    finished = subprocess.run(
        [*command, "--seconds", str(seconds)], env=environ, stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{layout.name}: `bench step` ended with exit code {finished.returncode}")
    return Speed(**json.loads(finished.stdout.strip().splitlines()[-1]))
