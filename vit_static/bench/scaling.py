"""`bench train --scaling`: the same batch on one process and on several, as ratios that one run has measured."""

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
from vit_static.config.loader import load_config
from vit_static.model.variants import variant_of
from vit_static.parallel.mesh import choose_device, resolve_mesh


@dataclass(frozen=True)
class Layout:
    """A way to train the same global batch on the same cores."""

    name: str
    num_processes: int
    overrides: tuple[str, ...] = ()


def scaling_layouts(num_cores: int) -> list[Layout]:
    """One process with all cores, and as many processes of one core: data-parallel, and in tensor-parallel pairs."""
    layouts = [Layout(f"1 process, {num_cores} threads", 1)]
    if num_cores > 1:
        layouts.append(Layout(f"dp {num_cores}: {num_cores} processes, a core each", num_cores))
    if num_cores > 1 and num_cores % 2 == 0:
        pairs = "mp 2" if num_cores == 2 else f"dp {num_cores // 2} x mp 2"
        layouts.append(Layout(f"{pairs}: {num_cores} processes, a core each", num_cores, ("parallel.mp=2",)))
    return layouts


def run(config_path: Path, overrides: Sequence[str], rounds: int, seconds: float) -> None:
    """`bench train --scaling`: every layout in turn, several times over, and the ratios of their medians."""
    layouts = scaling_layouts(len(os.sched_getaffinity(0)))
    for layout in layouts:  # before any is measured
        tried = load_config(config_path, [*overrides, *layout.overrides])
        if choose_device(tried.device) == "gpu":
            raise ConfigError("bench train --scaling: measures CPU processes; set VIT_STATIC_DEVICE=cpu and device=cpu")
        variant = variant_of(tried.model)
        resolve_mesh(tried.parallel, layout.num_processes, tried.data.global_batch_size, variant)
    found: dict[str, list[Speed]] = {layout.name: [] for layout in layouts}
    for number in range(rounds):
        for layout in layouts:
            speed = _measure_in_processes(layout, config_path, overrides, seconds)
            found[layout.name].append(speed)
            print(f"round {number + 1}  {layout.name:<36} {speed.images_per_s:8.1f} images/s", flush=True)
    print(f"\n{'median of ' + str(rounds) + ' rounds':<44} images/s   ratio to the first   in collectives")
    first = statistics.median(speed.images_per_s for speed in found[layouts[0].name])
    for name, speeds in found.items():
        images_per_s = statistics.median(speed.images_per_s for speed in speeds)
        shares = [speed.in_collectives for speed in speeds if speed.in_collectives is not None]
        share = f"{100 * statistics.median(shares):.1f} %" if shares else "not known"
        print(f"{name:<44} {images_per_s:8.1f} {images_per_s / first:20.2f} {share:>16}")


def _measure_in_processes(layout: Layout, config_path: Path, overrides: Sequence[str], seconds: float) -> Speed:
    given = [argument for override in (*overrides, *layout.overrides) for argument in ("-o", override)]
    command = [sys.executable, "-m", "vit_static.launch", "bench", "step", "-c", str(config_path), *given]
    environ = {**os.environ, "NPROC": str(layout.num_processes)}
    environ.pop("OMP_NUM_THREADS", None)  # of this process; the launcher shares out the cores
    finished = subprocess.run(
        [*command, "--seconds", str(seconds)], env=environ, stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{layout.name}: the measuring processes ended with exit code {finished.returncode}")
    return Speed(**json.loads(finished.stdout.strip().splitlines()[-1]))
