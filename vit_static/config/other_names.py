"""Names that other programs and papers have for config keys, and the search for a word in any of its forms."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Names that timm, torchvision, PLSC and Hugging Face have for keys of this program.
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "optimizer": "optim.name",
    "opt": "optim.name",
    "wd": "optim.weight_decay",
    "clip_grad": "optim.clip_norm",
    "grad_clip": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "model_ema_decay": "optim.ema_decay",
    "scheduler": "schedule.name",
    "lr_scheduler": "schedule.name",
    "batch_size": "data.global_batch_size",
    "train_batch_size": "data.global_batch_size",
    "bs": "data.global_batch_size",
    "workers": "data.num_threads",
    "num_workers": "data.num_threads",
    "data_path": "data.root",
    "data_dir": "data.root",
    "dataset": "data.root",
    "img_size": "model.image_size",
    "input_size": "model.image_size",
    "resolution": "model.image_size",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "drop_path": "model.drop_path_rate",
    "drop": "model.dropout",
    "smoothing": "loss.label_smoothing",
    "mixup": "augment.mixup_alpha",
    "cutmix": "augment.cutmix_alpha",
    "reprob": "augment.random_erasing_probability",
    "random_erasing": "augment.random_erasing_probability",
    "hflip": "augment.flip_probability",
    "aa": "augment.policy",
    "auto_augment": "augment.policy",
    "accumulation_steps": "parallel.grad_accum_steps",
    "gradient_accumulation_steps": "parallel.grad_accum_steps",
    "fp16": "amp.dtype",
    "pretrained": "init.from",
    "finetune": "init.from",
    "output": "output_dir",
    "teacher_model": "distill.teacher",
    "teacher_path": "distill.teacher",
    "distillation_type": "distill.kind",
    "distillation_alpha": "distill.weight",
    "distillation_tau": "distill.temperature",
}

# What the field also calls the keys that have these names, or begin with them and an underscore.
SYNONYMS = {
    "cutout, erase": ["augment.random_erasing"],
    "dropout": ["model.attention_dropout", "kernels.fused_dropout"],
    "optimizer, optimiser": ["optim"],
    "save, saving, checkpointing, save every": ["checkpoint"],
    "stochastic depth, drop path, droppath, layer dropout": ["model.drop_path"],
    "warm up, warmup": ["schedule.warmup", "optim.ema_warmup"],
    "learning rate": ["optim.lr", "optim.layer_decay", "schedule"],
    "learning rate schedule, learning rate decay, lr schedule, lr decay, scheduler, annealing": ["schedule"],
    "weight decay, l2, regularization, regularisation": [
        "optim.weight_decay",
        "optim.no_decay",
        "optim.decay_times_lr",
    ],
    "layer wise decay, layerwise decay, llrd": ["optim.layer_decay"],
    "gradient clipping, grad clip, clipping": ["optim.clip_norm"],
    "ema, moving average, weight averaging": ["optim.ema"],
    "early stopping": ["train.patience", "train.min_delta", "eval.metric"],
    "batch, batch size": ["data.global_batch_size", "eval.batch_size", "parallel.grad_accum_steps"],
    "gradient accumulation, accumulation, micro batch": ["parallel.grad_accum_steps"],
    "gradient checkpointing, activation checkpointing, remat": ["parallel.recompute"],
    "mixed precision, precision, half precision, bf16, fp16": ["amp", "export.precision"],
    "zero, fsdp": ["parallel.sharding_stage"],
    "tensor parallel, tensor parallelism, model parallel, tp": ["parallel.mp"],
    "pipeline parallel, pipeline parallelism": ["parallel.pp"],
    "data parallel, data parallelism, ddp": ["parallel.dp"],
    "random resized crop, rrc": ["augment.crop"],
    "flip, mirror": ["augment.flip_probability"],
    "auto augment, autoaugment, rand augment, augmentation": ["augment"],
    "color jitter, colour jitter, brightness, contrast": ["augment.color_jitter"],
    "mixup, cutmix, mix": ["augment.mixup", "augment.cutmix", "augment.mix"],
    "imbalance, class imbalance, rare classes": [
        "data.sampler",
        "loss.class_weights",
        "loss.pos_weight",
    ],
    "workers, loader": ["data.num_threads", "data.num_readers", "data.prefetch_batches"],
    "normalization, normalisation": ["data.mean", "data.std"],
    "resolution, input size": ["model.image_size"],
    "pretrained, pretrained weights, finetuning, transfer learning": ["init", "model.from"],
    "linear probe, linear probing, frozen": ["train.freeze"],
    "position embedding, positional embedding": ["model.pos", "model.class_token_pos_embed", "init.pos_embed"],
    "pooling, global average pooling": ["model.pool", "model.fc_norm"],
    "wandb, logging": ["log"],
    "distillation, knowledge distillation, teacher": ["distill", "model.distillation_token"],
    "center crop, centre crop": ["eval.crop_pct", "eval.resize"],
    "reproducibility, determinism": ["seed", "kernels.deterministic"],
}

_ENDINGS = re.compile(r"(ations?|ings?|ers?|ed|es|e|s)$")


def keys_also_called(query: str, keys: Iterable[str]) -> set[str]:
    """Return those of the keys that the field, or another program, calls by the words of a query."""
    names = [OTHER_NAMES[query]] if query in OTHER_NAMES else []
    for terms, prefixes in SYNONYMS.items():
        if any(_stems(term) == _stems(query) for term in terms.split(", ")):
            names += prefixes
    return {key for key in keys if any(key == name or key.startswith((f"{name}_", f"{name}.")) for name in names)}


def has_words(text: str, query: str) -> bool:
    """Return whether a text has all words of a query, in any order and form: erase, erasing; step, steps."""
    return bool(_stems(query)) and _stems(query) <= _stems(text)


def _stems(text: str) -> set[str]:
    return {_stem(word) for word in re.findall(r"[a-z0-9]+", text.lower())}


def _stem(word: str) -> str:
    stem = _ENDINGS.sub("", word)
    return stem if len(stem) >= 3 else word
