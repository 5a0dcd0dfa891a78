"""The first screen of a run: model, data, mesh, optimizer and steps."""

from __future__ import annotations

import textwrap
from datetime import datetime, timedelta
from typing import Any

from vit_static.common.errors import escape
from vit_static.common.text import counted, duration, flops_text
from vit_static.config.data_schema import AugmentConfig, LossConfig
from vit_static.config.lora_schema import LoraConfig
from vit_static.config.schema import Config
from vit_static.data.image_formats import describe_left_out
from vit_static.model import flops
from vit_static.model.variants import model_name, shape_of, variant_of
from vit_static.train.run_spec import RunSpec

_MAX_WIDTH, _LABEL = 100, 11


def start_screen(
    spec: RunSpec,
    done_steps: int,
    start: str,
    num_parameters: int,
    info: dict[str, Any],
    num_columns: int = _MAX_WIDTH,
    teacher: str | None = None,
) -> str:
    """Describe a run in one screen before its first step. `start`: where the weights come from; `info`: of
    run_info.describe_run; `num_columns`: the terminal's width; `teacher`: the row about it."""
    config, mesh = spec.config, info["mesh"]
    device = info["environment"]["gpu"] or info["environment"]["cpu"]
    variant, model, parallel = variant_of(config.model), config.model, config.parallel
    shape = shape_of(model)
    height, width = model.image_size
    every = config.checkpoint.every_steps
    rows = {
        "model": f"{model_name(model)}, {variant.width} wide, {variant.depth} deep, {variant.num_heads} heads, patches "
        f"of {variant.patch_size} pixels, images of {height}x{width}, {counted(model.num_classes, 'class')}",
        **_image_sizes(spec),
        "size": f"{num_parameters / 1e6:.2f} M parameters; {flops_text(2 * flops.forward_macs(shape))} per image"
        f"{_share_of_all_tokens(shape)}, {flops_text(flops.train_flops(shape, config.lora))} with the backward pass",
        **({} if config.lora.rank == 0 else {"LoRA": _lora(config.lora)}),
        "start": start,
        "data": f"{len(spec.train_images)} training and {counted(len(spec.val_images), 'validation image')} in "
        f"{config.data.root}{'; each class equally often' if config.data.sampler == 'balanced' else ''}; "
        f"{_augmentation(config.augment)}",
        "loss": _loss(config.loss),
        **({} if teacher is None else {"teacher": teacher}),
        **_left_out(spec),
        "batch": f"{counted(mesh['batch_size'], 'image')}, {mesh['batch_size_per_rank']} per data-parallel rank"
        + (f", in {mesh['micro_batches']} micro-batches" if mesh["micro_batches"] > 1 else ""),
        "mesh": f"{mesh['world_size']} x {mesh['device']} ({device}): dp {mesh['dp']}, mp {mesh['mp']}, pp {mesh['pp']}"
        f", sharding stage {mesh['sharding_stage']}, recompute {parallel.recompute}",
        "precision": str(mesh["precision"]),
        "passes": ", ".join(mesh["passes"]) or "none of this program",
        "optimizer": _optimizer(config, spec.warmup_steps),
        "steps": f"{spec.total_steps} ({_amount(spec.epoch(spec.total_steps), 'epoch')})"
        + (f", starting after step {done_steps}" if done_steps else "")
        + f"; evaluated {_every(config.eval.every_epochs, 'epoch')}, logged {_every(config.log.every_steps, 'step')}, "
        + f"saved {'at every evaluation' if every is None else _every(every, 'step')}",
        "folder": f"{config.run_dir}",
    }
    indent = " " * (_LABEL + 2)
    lines = [
        textwrap.fill(
            escape(text),
            min(num_columns, _MAX_WIDTH),
            initial_indent=f"  {label:<{_LABEL}}",
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for label, text in rows.items()
    ]
    return "\n".join([escape(config.name), *lines])


def _share_of_all_tokens(shape: flops.Shape) -> str:
    share = flops.share_of_all_tokens(shape)
    return f" ({100 * share:.1f} % of the count for all tokens)" if share < 1.0 else ""


def _image_sizes(spec: RunSpec) -> dict[str, str]:
    """Return a row about the sizes of the training images; none if all have the model's."""
    if not spec.config.train.image_sizes:
        return {}
    sizes = ["{}x{} until step {}".format(*phase.image_size, phase.end) for phase in spec.phases]
    return {"trained on": f"images of {', '.join(sizes)}"}


def _amount(number: float, noun: str) -> str:
    return f"{number:.4g} {noun}{'' if number == 1 else 's'}"


def _every(number: float, noun: str) -> str:
    return f"every {noun}" if number == 1 else f"every {_amount(number, noun)}"


def _left_out(spec: RunSpec) -> dict[str, str]:
    """Return a row about what is no image in the class folders; none if there is nothing."""
    data = spec.config.data
    parts = [
        f"of {name}: {describe_left_out(images.left_out)}"
        for name, images in ((data.train, spec.train_images), (data.val, spec.val_images))
        if images.left_out
    ]
    return {"left out": "; ".join(parts)} if parts else {}


def _lora(lora: LoraConfig) -> str:
    return (
        f"rank {lora.rank}, alpha {lora.alpha:g}, of {', '.join(lora.targets)}; all but the adapters and the head is "
        "frozen"
    )


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
    return ", ".join(name for name, is_on in named.items() if is_on) or "no augmentation"


def _loss(loss: LossConfig) -> str:
    named = {
        f"label smoothing {loss.label_smoothing:g}": loss.label_smoothing > 0.0,
        f"class weights {loss.class_weights}": loss.class_weights != "none",
        f"weight of positives {loss.pos_weight}": loss.pos_weight_number != 1.0,
        f"focal gamma {loss.focal_gamma:g}": loss.focal_gamma > 0.0,
    }
    return ", ".join([loss.name, *(name for name, is_on in named.items() if is_on)])


def _optimizer(config: Config, warmup_steps: int) -> str:
    optim, schedule = config.optim, config.schedule
    parts = [f"{optim.name}, lr {optim.lr:g}, {schedule.name}"]
    parts += [f"{counted(warmup_steps, 'step')} of warmup"] if warmup_steps else []
    parts += [f"weight decay {optim.weight_decay:g}"] if optim.weight_decay else []
    parts += [f"layer decay {optim.layer_decay:g}"] if optim.layer_decay != 1.0 else []
    parts += ["gradients not clipped" if optim.clip_norm is None else f"gradients clipped to {optim.clip_norm:g}"]
    parts += [f"moving average {optim.ema_decay:g}"] if optim.ema_decay else []
    return ", ".join(parts)


def expected_end(seconds_left: float, now: datetime | None = None) -> str:
    """Return the line that tells when a run that takes `seconds_left` more will end."""
    end = (now or datetime.now().astimezone()) + timedelta(seconds=seconds_left)
    return f"expected end {end:%a %d %b %H:%M:%S}, in {duration(seconds_left)}"
