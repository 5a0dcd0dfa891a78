"""What a run says of itself before it begins: one screen."""

from __future__ import annotations

import textwrap
from datetime import datetime, timedelta
from typing import Any

from vit_static.common.text import duration
from vit_static.config.schema import AugmentConfig, Config
from vit_static.model import flops
from vit_static.model.variants import variant_of

_WIDTH, _LABEL = 100, 11


def start_screen(
    config: Config,
    shape: flops.Shape,
    num_parameters: int,
    start: str,
    num_images: tuple[int, int],
    total_steps: int,
    warmup_steps: int,
    done_steps: int,
    mesh: dict[str, Any],
    device: str,
) -> str:
    """`num_images`: for training and validation; `mesh`: environment.describe's; `start`: where the weights are from;
    `device`: a card's or the CPU's name."""
    variant, model, parallel = variant_of(config.model), config.model, config.parallel
    height, width = model.image_size
    epochs = total_steps * config.data.global_batch_size / num_images[0]
    every = config.checkpoint.every_steps
    rows = {
        "model": f"ViT {model.variant}, {variant.width} wide, {variant.depth} deep, {variant.num_heads} heads, patches "
        f"of {variant.patch_size} pixels, images of {height}x{width}, {model.num_classes} classes",
        "size": f"{num_parameters / 1e6:.2f} M parameters; {2 * flops.forward_macs(shape) / 1e9:.2f} GFLOP an image, "
        f"{flops.train_flops(shape) / 1e9:.2f} with its backward pass",
        "start": start,
        "data": f"{num_images[0]} training and {num_images[1]} validation images in {config.data.root}; "
        f"{_augmentation(config.augment)}",
        "batch": f"{mesh['batch_size']} images, {mesh['batch_size_per_rank']} a data-parallel rank"
        + (f", in {mesh['micro_batches']} parts" if mesh["micro_batches"] > 1 else ""),
        "mesh": f"{mesh['world_size']} x {mesh['device']} ({device}): dp {mesh['dp']}, mp {mesh['mp']}, pp {mesh['pp']}"
        f", sharding stage {mesh['sharding_stage']}, recompute {parallel.recompute}",
        "precision": str(mesh["precision"]),
        "passes": ", ".join(mesh["passes"]) or "none of ours",
        "optimizer": _optimizer(config, warmup_steps),
        "steps": f"{total_steps} ({epochs:.4g} epochs)"
        + (f", from step {done_steps} on" if done_steps else "")
        + f"; evaluated every {config.eval.every_epochs} epochs, logged every {config.log.every_steps} steps, saved "
        + ("at every evaluation" if every is None else f"every {every} steps"),
        "folder": f"{config.run_dir}",
    }
    indent = " " * (_LABEL + 2)
    lines = [
        textwrap.fill(
            text,
            _WIDTH,
            initial_indent=f"  {label:<{_LABEL}}",
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for label, text in rows.items()
    ]
    return "\n".join([config.name, *lines])


def _augmentation(augment: AugmentConfig) -> str:
    named = {
        f"crops of {augment.crop_scale[0]:g} to {augment.crop_scale[1]:g} of the area": augment.crop_scale
        != (1.0, 1.0),
        f"flips {augment.flip_probability:g}": augment.flip_probability > 0.0,
        f"RandAugment({augment.num_ops}, {augment.magnitude:g})": augment.policy == "randaugment",
        augment.policy: augment.policy not in ("none", "randaugment"),
        f"colour jitter {augment.color_jitter:g}": augment.color_jitter > 0.0,
        f"erasing {augment.random_erasing_probability:g}": augment.random_erasing_probability > 0.0,
        f"mixup {augment.mixup_alpha:g}": augment.mixup_alpha > 0.0,
        f"CutMix {augment.cutmix_alpha:g}": augment.cutmix_alpha > 0.0,
        f"each {augment.repeated_aug} times": augment.repeated_aug > 1,
    }
    return ", ".join(name for name, is_on in named.items() if is_on) or "as they are"


def _optimizer(config: Config, warmup_steps: int) -> str:
    optim, schedule = config.optim, config.schedule
    parts = [f"{optim.name}, lr {optim.lr:g}, {schedule.name}"]
    parts += [f"{warmup_steps} steps of warmup"] if warmup_steps else []
    parts += [f"weight decay {optim.weight_decay:g}"] if optim.weight_decay else []
    parts += [f"layer decay {optim.layer_decay:g}"] if optim.layer_decay != 1.0 else []
    parts += ["gradients not clipped" if optim.clip_norm is None else f"gradients clipped to {optim.clip_norm:g}"]
    parts += [f"moving average {optim.ema_decay:g}"] if optim.ema_decay else []
    return ", ".join(parts)


def expected_end(seconds_left: float, now: datetime | None = None) -> str:
    """When a run that takes so much longer will be done."""
    end = (now or datetime.now().astimezone()) + timedelta(seconds=seconds_left)
    return f"expected end {end:%a %d %b %H:%M:%S}, in {duration(seconds_left)}"
