"""`bench train --device gpu`: the four configs of PLSC on this machine's GPUs, beside PLSC's published speeds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import paddle

from vit_static.bench.harness import check_writable
from vit_static.bench.photos import NUM_PHOTO_CLASSES, write_photos
from vit_static.bench.step import Speed
from vit_static.common.errors import ConfigError
from vit_static.common.installation import CONFIGS
from vit_static.common.io import write_json
from vit_static.common.terminal import print_table
from vit_static.common.text import print_text
from vit_static.config.loader import load_config

# Images per second per A100 as PLSC publishes them, by config.
PLSC_IMAGES_PER_S = {
    "ViT_base_patch16_224_in1k_1n8c_dp_fp16o2.yaml": 448.0,
    "ViT_base_patch16_384_ft_in1k_1n8c_dp_fp16o2.yaml": 90.0,
    "ViT_large_patch16_224_in21k_4n32c_dp_fp16o2.yaml": 164.0,
    "ViT_large_patch16_384_in1k_ft_4n32c_dp_fp16o2.yaml": 29.0,
}


def run(overrides: Sequence[str], seconds: float, json_path: Path | None) -> None:
    """Print images/s per GPU, MFU and peak memory of each config, with its micro-batch on every GPU.

    Each is measured on noise and on images that DALI decodes: those of data.root if an override names it, otherwise
    photographs generated for this run. Raise ConfigError if Paddle finds no GPU.
    """
    check_writable(json_path)
    num_gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if num_gpus == 0:
        raise ConfigError("bench train --device gpu: Paddle finds no GPU here; leave out --device to measure the CPU")
    speeds: dict[str, dict[str, Speed]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photo_overrides: list[str] = []
        if not any(override.startswith("data.root=") for override in overrides):
            print_text(write_photos(Path(folder)))
            photo_overrides = [f"data.root={folder}", f"model.num_classes={NUM_PHOTO_CLASSES}"]
        for name, plsc_images_per_s in PLSC_IMAGES_PER_S.items():
            all_overrides = [*micro_batch_overrides(name, num_gpus), *overrides]
            noise = _measure(name, all_overrides, seconds)
            real = _measure(name, [*all_overrides, *photo_overrides], seconds, "--real-data")
            speeds[name] = {"noise": noise, "dali": real}
            mfu = "" if noise.mfu is None else f"{noise.mfu:.1%}"
            print_text(f"{name}  {noise.images_per_s / num_gpus:.1f} images/s per GPU", flush=True)
            per_gpu = [f"{speed.images_per_s / num_gpus:.1f}" for speed in (noise, real)]
            rows.append((name, *per_gpu, mfu, f"{(noise.peak_bytes or 0) / 1e9:.2f} GB", f"{plsc_images_per_s:.0f}"))
    print_text("")
    head = f"images/s per GPU, of {num_gpus}"
    print_table((head, "noise", "DALI", "MFU", "peak memory", "PLSC"), rows, right=(1, 2, 3, 4, 5))
    if json_path is not None:
        configs = {name: {kind: vars(speed) for kind, speed in by_kind.items()} for name, by_kind in speeds.items()}
        write_json({"num_gpus": num_gpus, "configs": configs}, json_path)


def micro_batch_overrides(name: str, num_gpus: int) -> list[str]:
    """Return overrides that give each of `num_gpus` GPUs the micro-batch that the config gives to one of its GPUs.

    The config's number of GPUs is part of its name: 4n32c means 4 nodes and 32 GPUs.
    """
    config = load_config(CONFIGS / name)
    gpus_in_name = re.search(r"_\d+n(\d+)c_", name)
    assert gpus_in_name is not None
    micro_batch_size = config.data.global_batch_size // (int(gpus_in_name[1]) * config.parallel.grad_accum_steps)
    return [f"data.global_batch_size={micro_batch_size * num_gpus}", "parallel.grad_accum_steps=1"]


def _measure(name: str, overrides: Sequence[str], seconds: float, *flags: str) -> Speed:
    override_flags = [argument for override in overrides for argument in ("-o", override)]
    command = [sys.executable, "-m", "vit_static.launch", "bench", "step", "-c", str(CONFIGS / name)]
    finished = subprocess.run(
        [*command, *override_flags, "--seconds", str(seconds), *flags],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{name}: `bench step` ended with exit code {finished.returncode}")
    return Speed(**json.loads(finished.stdout.strip().splitlines()[-1]))
