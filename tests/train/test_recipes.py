"""The recipes of configs/: their headers, their cost, their schedules, and that their settings train."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small import ROOT

from vit_static.common.hardware import GPUS, RESERVED_BYTES
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.model.variants import variant_of
from vit_static.optim import schedule as schedule_module
from vit_static.optim.param_groups import decay_coefficient
from vit_static.optim.schedule import learning_rate
from vit_static.plan.planner import Cluster, Plan, make_plan
from vit_static.train.trainer import train

pytestmark = pytest.mark.early

CONFIGS = ROOT / "configs"
NO_RECIPES = ("quickstart", "bench", "own_images")
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(NO_RECIPES))
NUM_IMAGES = {"data/ILSVRC2012": 1_281_167, "data/ImageNet21K": 14_197_087, "data/cifar10": 50_000}
PLSC_RECIPES = [name for name in RECIPES if name.startswith("ViT_")]
DEVICES = {"A100 40 GB": "a100-40g", "A10 24 GB": "a10"}


def recipe(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def test_the_recipes_that_users_request_exist() -> None:
    assert len(PLSC_RECIPES) == 4
    names = {"vit_s16_i1k_90ep", "vit_s16_i1k_300ep", "deit_s16", "deit_b16", "deit3_s16", "deit3_b16"}
    names |= {"deit_b16_distilled"}
    assert names | {"augreg_b16_384_ft_in1k", "augreg_l16_384_ft_in1k", "augreg_b16_cifar10"} < set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_its_paper_its_command_and_what_to_expect(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    assert re.search(r"arXiv \d{4}\.\d{5}", header)
    command = re.search(r"\./run\.sh (pretrain|finetune) -c (\S+)", header)
    assert command is not None and command[2] == f"configs/{name}.yaml"
    assert (command[1] == "finetune") == (recipe(name).init.from_ is not None)
    assert re.search(r"(Expected: |PLSC's figures: )", header) and "Not run here." in header
    assert machine(name)[0] in (1, 8, 32)


def machine(name: str) -> tuple[int, str]:
    """The number and the kind of GPUs in a recipe's header."""
    match = re.search(r"# Machine: (\d+) x (.+)\.\n", (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert match is not None
    return int(match[1]), DEVICES[match[2]]


def model_size(name: str) -> str:
    """Everything of the model that decides what an image costs."""
    config = recipe(name)
    model = config.model
    return repr((model.variant, model.image_size, model.patch_size, config.train.freeze, config.lora.rank))


def images_per_gpu(name: str) -> int:
    config = recipe(name)
    return config.data.global_batch_size // machine(name)[0] // config.parallel.grad_accum_steps


# of the recipes of a model size, the one with the largest batch
LARGEST = {model_size(name): name for name in sorted(RECIPES, key=images_per_gpu)}.values()


def planned(name: str, *overrides: str) -> Plan:
    """Return the plan of a recipe on the machine of its header."""
    num_gpus, device = machine(name)
    config = recipe(name, *overrides)
    return make_plan(config, config.parallel, num_gpus, Cluster(device, "ib-hdr", 8))


def memory_by_blocks(name: str) -> float:
    """Return the memory of a recipe's plan from plans with two and three blocks: each block adds the same."""
    two, three = (planned(name, f"model.depth={depth}").memory for depth in (2, 3))
    return two + (variant_of(recipe(name).model).depth - 2) * (three - two)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGEST)
def test_a_recipe_fits_its_machine(name: str) -> None:
    assert memory_by_blocks(name) + RESERVED_BYTES <= GPUS[machine(name)[1]].memory


@pytest.mark.slow
def test_the_whole_plan_of_a_recipe() -> None:
    """With all of its blocks."""
    plan = planned("ViT_base_patch16_224_in1k_1n8c_dp_fp16o2")
    assert plan.fits and plan.mesh_shape.world_size == 8
    assert memory_by_blocks("ViT_base_patch16_224_in1k_1n8c_dp_fp16o2") == pytest.approx(plan.memory, rel=0.01)


# The schedules of PLSC's four recipes, in closed form from its ViTLRScheduler and its optimizers' update


def plsc_schedule(name: str, steps: np.ndarray, total_steps: int) -> np.ndarray:
    """The learning rates, from the values in PLSC's configs."""
    peak, warmup_steps, end = {
        "ViT_base_patch16_224_in1k_1n8c_dp_fp16o2": (3e-3, 10_000, None),
        "ViT_base_patch16_384_ft_in1k_1n8c_dp_fp16o2": (3e-3, 500, None),
        "ViT_large_patch16_224_in21k_4n32c_dp_fp16o2": (1e-3, 10_000, 1e-5),
        "ViT_large_patch16_384_in1k_ft_4n32c_dp_fp16o2": (1.5e-2, 500, None),
    }[name]
    progress = np.clip((steps - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
    decayed = peak * (1 + np.cos(np.pi * progress)) / 2 if end is None else end + (peak - end) * (1 - progress)
    return decayed * np.minimum(steps / warmup_steps, 1.0)


@pytest.mark.parametrize("name", PLSC_RECIPES)
def test_plscs_learning_rates_and_weight_decays(name: str) -> None:
    """At 20 points of the run; the decay is the share that a weight with gradient 0 loses, before any momentum."""
    config = recipe(name)
    num_images, batch_size = NUM_IMAGES[config.data.root], config.data.global_batch_size
    epochs, images_per_step = {"224_in1k": (300, 4096), "384": (8, 512), "21k": (90, 4096)}[
        next(part for part in ("224_in1k", "384", "21k") if part in name)
    ]
    total_steps = schedule_module.total_steps(config.train, num_images, batch_size)
    assert total_steps == epochs * num_images // images_per_step
    steps = np.linspace(0, total_steps - 1, 20).astype(int)
    warmup_steps = schedule_module.warmup_steps(config.schedule, num_images, batch_size)
    rates = [learning_rate(int(step), total_steps, config.optim, config.schedule, warmup_steps) for step in steps]
    expected = plsc_schedule(name, steps, total_steps)
    np.testing.assert_allclose(rates, expected, rtol=1e-9, atol=1e-12)
    decay = {"224_in1k": 0.3, "384": 1e-4, "21k": 0.15}[next(p for p in ("224_in1k", "384", "21k") if p in name)]
    shares = [rate * decay_coefficient(config.optim) for rate in rates]
    np.testing.assert_allclose(shares, expected * decay, rtol=1e-9, atol=1e-14)
    assert config.optim.no_decay == ()  # every parameter decays


def test_timms_schedule() -> None:
    """DeiT: a warmup from 1e-6, then a cosine to 1e-5 that counts from step 0 (timm without warmup_prefix)."""
    config = recipe("deit_s16")
    steps_per_epoch = 1_281_167 / 1024
    total_steps = schedule_module.total_steps(config.train, 1_281_167, 1024)
    warmup_steps = schedule_module.warmup_steps(config.schedule, 1_281_167, 1024)
    assert warmup_steps == round(5 * steps_per_epoch)
    for epoch in (0.0, 2.5, 4.99, 5.1, 100.0, 299.9):
        step = int(epoch * steps_per_epoch)
        if step < warmup_steps:
            expected = 1e-6 + (1e-3 - 1e-6) * step / warmup_steps
        else:
            expected = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / total_steps)) / 2
        rate = learning_rate(step, total_steps, config.optim, config.schedule, warmup_steps)
        assert rate == pytest.approx(expected, rel=1e-9)


# Finetuning a digits model with each recipe's settings

# With half the width, one block and batches of 32, the quickstart takes a tenth of the time.
BATCH_SIZE = "data.global_batch_size=32"
SMALLER = ["model.width=64", "model.depth=1", "model.mlp_dim=256", BATCH_SIZE]

# Settings that belong to another model, data set or length of training.
SHORTENED = [
    "device=cpu", "amp.level=O0", "amp.dtype=auto", BATCH_SIZE,
    "data.mean=[0.5, 0.5, 0.5]",
    "data.std=[0.5, 0.5, 0.5]",
    "data.train=train", "data.val=val", "data.multi_label=false", "data.num_threads=2",
    "augment.crop_scale=[0.5, 1.0]", "augment.crop_aspect_ratio=[0.85, 1.18]", "augment.flip_probability=0",
    "train.max_steps=null", "parallel.grad_accum_steps=1", "eval.every_epochs=100", "eval.crop_pct=0.95",
    "eval.resize=short", "log.every_steps=1000", "log.trackers=[]", "checkpoint.keep_last=1",
]  # fmt: skip
# Learning rates for a hundred steps of 32 images; the recipes' own are for 100 times as many or larger batches.
ADJUSTED = {
    # LAMB moves a weight by a share of its norm: a new head grows too slowly here, so the pretrained one stays.
    **{name: ["optim.lr=1e-3", "init.head=keep"] for name in ("deit3_s16", "vit5_s16")},
}


# A recipe's teacher is the digits model, which has no distillation token.
TAUGHT = ["distill.config=null", "distill.kind=hard"]


def mechanisms(name: str) -> set[str]:
    """Return which parts of training a recipe uses: choices by name, and of numbers whether they are the defaults."""
    config, defaults = recipe(name), Config(name="defaults")
    values: dict[str, tuple[Any, Any]] = {}
    for section in ("augment", "loss", "optim", "schedule"):
        for key, default in getattr(defaults, section):
            values[f"{section}.{key}"] = getattr(getattr(config, section), key), default
    values["optim.name, train.freeze"] = f"{config.optim.name}, {config.train.freeze}", ""
    values["distill.kind"] = config.distill.kind, defaults.distill.kind
    values["lora.rank"] = config.lora.rank, defaults.lora.rank
    for key in ("drop_path_schedule", "drop_path_rate"):
        values[f"model.{key}"] = getattr(config.model, key), getattr(defaults.model, key)
    return {
        f"{key}: {value if isinstance(value, str) else value == default}" for key, (value, default) in values.items()
    }


def covering_recipes() -> list[str]:
    """Return recipes that together use everything that any recipe uses, without those that add nothing to the rest.

    Recipes that change few settings are left out first.
    """
    uses = {name: mechanisms(name) for name in RECIPES}
    names = list(RECIPES)
    for name in sorted(RECIPES, key=lambda name: sum(part.endswith(": False") for part in uses[name])):
        if uses[name] <= set[str]().union(*(uses[other] for other in names if other != name)):
            names.remove(name)
    return names


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart run with a smaller model, in a separate process, as a new user starts it."""
    folder = tmp_path_factory.mktemp("recipes")
    overrides = ["train.epochs=12", "eval.every_epochs=12", *SMALLER]
    command = [str(ROOT / "run.sh"), "pretrain", *(word for override in overrides for word in ("-o", override))]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "output/quickstart"


@pytest.mark.slow
@pytest.mark.parametrize("name", covering_recipes())
def test_a_recipes_settings_finetune_the_digits(pretrained: Path, tmp_path: Path, name: str) -> None:
    """Its loss, augmentation, optimizer and schedule reach 70 % on the digits model with a new head.

    In 90 steps; chance is 10 %.
    """
    ours, digits = recipe(name), load_config(pretrained / "config.yaml").model.model_dump(mode="json")
    regularisation = ("drop_path_rate", "drop_path_schedule", "dropout", "head_bias_init", "head_init_std")
    model = [
        f"model.{key}={json.dumps(value)}"
        for key, value in {**digits, **{key: getattr(ours.model, key) for key in regularisation}}.items()
    ]
    config = recipe(
        name,
        *SHORTENED,
        *model,
        "train.epochs=2",
        "schedule.warmup_steps=0",
        "schedule.warmup_epochs=0.5",
        f"data.root={pretrained.parent.parent / 'data/digits'}",
        f"output_dir={tmp_path}",
        f"init.from={pretrained}",
        "init.head=reset",
        *ADJUSTED.get(name, []),
        *([] if ours.distill.teacher is None else [f"distill.teacher={pretrained}", *TAUGHT]),
    )
    assert config.optim.name == ours.optim.name and config.loss == ours.loss
    assert train(config)
    (result,) = [
        line
        for line in map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "eval"
    ]
    print(name, result["top1"])
    assert result["top1"] > 70.0
    if config.loss.name == "softmax":  # the new head is 0, so that at any learning rate its first steps find classes
        assert result["loss"] < 0.9 * math.log(10)
    assert ("ema_top1" in result) == (ours.optim.ema_decay > 0.0)
    report = json.loads((config.run_dir / "init.json").read_text())
    assert report["reinitialized"] == (["head.weight", "head.bias"] if config.init.head == "reset" else [])
