"""`bench train --device gpu`: the seed's four configs on this machine's cards, beside PLSC's figures."""

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

from vit_static.bench.data import NUM_PHOTO_CLASSES, write_photos
from vit_static.bench.harness import ROOT, check_writable
from vit_static.bench.step import Speed
from vit_static.common.errors import ConfigError
from vit_static.common.io import write_json
from vit_static.config.loader import load_config

# PLSC's images a second and A100, by config.
PLSC = {
    "ViT_base_patch16_224_in1k_1n8c_dp_fp16o2.yaml": 448.0,
    "ViT_base_patch16_384_ft_in1k_1n8c_dp_fp16o2.yaml": 90.0,
    "ViT_large_patch16_224_in21k_4n32c_dp_fp16o2.yaml": 164.0,
    "ViT_large_patch16_384_in1k_ft_4n32c_dp_fp16o2.yaml": 29.0,
}


def run(overrides: Sequence[str], seconds: float, json_path: Path | None) -> None:
    """Prints images/s, MFU and peak memory of each config, a micro-batch of its own on every card, on noise and on
    images that DALI decodes: those of data.root where an override names it, else photographs made for the occasion."""
    check_writable(json_path)
    num_cards = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if num_cards == 0:
        raise ConfigError("bench train --device gpu: this machine has no card that Paddle sees; leave --device out")
    found: dict[str, dict[str, Speed]] = {}
    print(f"{'a card, of ' + str(num_cards):<56}{'noise':>10}{'DALI':>10}{'MFU':>8}{'peak memory':>14}{'PLSC':>8}")
    with tempfile.TemporaryDirectory() as folder:
        made: list[str] = []
        if not any(override.startswith("data.root=") for override in overrides):
            print(write_photos(Path(folder)))
            made = [f"data.root={folder}", f"model.num_classes={NUM_PHOTO_CLASSES}"]
        for name, plsc in PLSC.items():
            given = [*own_batch(name, num_cards), *overrides]
            noise = _measure(name, given, seconds)
            fed = _measure(name, [*given, *made], seconds, "--real-data")
            found[name] = {"noise": noise, "dali": fed}
            mfu = "" if noise.mfu is None else f"{noise.mfu:.1%}"
            print(
                f"{name:<56}{noise.images_per_s / num_cards:10.1f}{fed.images_per_s / num_cards:10.1f}{mfu:>8}"
                f"{(noise.peak_bytes or 0) / 1e9:11.2f} GB{plsc:8.0f}",
                flush=True,
            )
    if json_path is not None:
        speeds = {name: {kind: vars(speed) for kind, speed in kinds.items()} for name, kinds in found.items()}
        write_json({"num_cards": num_cards, "configs": speeds}, json_path)


def own_batch(name: str, num_cards: int) -> list[str]:
    """Overrides that give each of so many cards the micro-batch that the config gives each of its own."""
    config = load_config(ROOT / "configs" / name)
    cards = re.search(r"_\d+n(\d+)c_", name)
    assert cards is not None
    micro_batch = config.data.global_batch_size // (int(cards[1]) * config.parallel.grad_accum_steps)
    return [f"data.global_batch_size={micro_batch * num_cards}", "parallel.grad_accum_steps=1"]


def _measure(name: str, overrides: Sequence[str], seconds: float, *flags: str) -> Speed:
    given = [argument for override in overrides for argument in ("-o", override)]
    command = [sys.executable, "-m", "vit_static.launch", "bench", "step", "-c", str(ROOT / "configs" / name)]
    finished = subprocess.run(
        [*command, *given, "--seconds", str(seconds), *flags],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(f"{name}: the measuring processes ended with exit code {finished.returncode}")
    return Speed(**json.loads(finished.stdout.strip().splitlines()[-1]))
