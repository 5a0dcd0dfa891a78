"""Training cases on meshes, and the real processes that run them (helpers/mesh_worker.py).

All cases with the same number of processes run in the same ones, so that Paddle starts only once.
"""

from __future__ import annotations

import os
import pickle
import socket
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from multiprocessing.connection import wait as wait_until_ready
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from helpers import mesh_worker
from helpers.forked_verbs import redirect_output, start_forked
from helpers.mesh_worker import Case, Outcome
from helpers.small import MESH_MODEL
from vit_static.config.lora_schema import LoraConfig
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import OptimConfig, ParallelConfig
from vit_static.data import fork_server
from vit_static.launch import launcher

TIME_LIMIT_S = 900
NUM_EVAL_IMAGES = 101


def changed(**update: object) -> ModelConfig:
    """Return the model with changed config keys."""
    return MESH_MODEL.model_copy(update=update)


# As few blocks as a case needs, since each one more nearly doubles the time to compile and of the first step: one, two
# where a pipeline has stages or drop path drops, three where the stages differ or every second block is recomputed.
MODELS = {
    "cls": changed(depth=1),
    "three_blocks": MESH_MODEL,
    "gap": changed(depth=2, pool="gap", pos_embed="sincos2d", representation_size=24),
    # 7 classes, which 2 ranks can't split
    "seven": changed(depth=1, num_classes=7, qkv_bias=False, layer_scale_init=None),
    "distillation_token": changed(depth=2, distillation_token=True),
    "dropped_paths": changed(depth=2, pool="gap", drop_path_rate=0.3),
    "tokens": changed(depth=2, pool="cls_gap", register_tokens=2, class_token_pos_embed=False),
    "one_block": changed(depth=1, pool="cls_gap", register_tokens=2, class_token_pos_embed=False),
    # Norms of single heads and rotary frequencies, which tensor parallelism splits in other ways than the rest.
    "options": changed(
        **{"depth": 1, "rope": "mixed", "qk_norm": True, "norm": "rms", "mlp": "swiglu", "pool": "map"},
        **{"patch_dropout": 0.5, "register_tokens": 4, "qkv_bias": "qv"},
    ),
    # class token with a position, a learned table and rotary positions; a table of sines, and patches left out
    "sized": changed(depth=1, rope="axial"),
    "sized_two_blocks": changed(depth=2, rope="mixed", pos_embed="sincos2d", patch_dropout=0.5, register_tokens=2),
    "lora": changed(depth=2, mlp="swiglu", pool="map"),
    "dropout": changed(dropout=0.1, attention_dropout=0.1, drop_path_rate=0.3),
    "dropout_two_blocks": changed(depth=2, dropout=0.1, attention_dropout=0.1, drop_path_rate=0.3),
}
OPTIMIZERS = {
    "adamw": OptimConfig(name="adamw", weight_decay=0.1),
    "sgd": OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip_norm=0.3),  # below the norm of every step
}


def mesh(dp: int = 1, mp: int = 1, pp: int = 1, **others: Any) -> ParallelConfig:
    """Return the config of a mesh."""
    return ParallelConfig(dp=dp, mp=mp, pp=pp, **others)


MESHES = {
    "accum2": (mesh(grad_accum_steps=2), "gap"),
    "recompute": (mesh(recompute="block"), "gap"),
    "recompute_every_2nd": (mesh(recompute=2), "three_blocks"),
    "dp2": (mesh(dp=2, bucket_mb=0.02), "cls"),  # several buckets
    "mp2": (mesh(mp=2), "cls"),
    "mp2_replicated_head": (mesh(mp=2), "seven"),
    "pp2_1F1B_accum4": (mesh(pp=2, grad_accum_steps=4), "three_blocks"),
    "pp2_FThenB_accum4": (mesh(pp=2, grad_accum_steps=4, pp_schedule="FThenB"), "gap"),
    "dp2_sharding2": (mesh(dp=2, sharding_stage=2), "gap"),
    "dp2_sharding3": (mesh(dp=2, sharding_stage=3), "seven"),
    "dp2_accum2_sharding2": (mesh(dp=2, grad_accum_steps=2, sharding_stage=2), "cls"),
    "dp2_mp2": (mesh(dp=2, mp=2, bucket_mb=0), "gap"),
    "mp2_pp2": (mesh(mp=2, pp=2), "three_blocks"),
    "dp2_pp2_sharding3": (mesh(dp=2, pp=2, sharding_stage=3), "gap"),
    "dp2_mp2_sharding1": (mesh(dp=2, mp=2, sharding_stage=1), "cls"),
    "dp2_mp2_accum2_sharding3": (mesh(dp=2, mp=2, grad_accum_steps=2, sharding_stage=3), "options"),
}
# The meshes of plain AdamW: one for each mechanism that involves the optimizer's state. SGD trains on all meshes, since
# its weights can be compared (AdamW divides by small numbers); the recipes' AdamW, below, on five kinds of mesh.
ADAMW_MESHES = {
    "recompute": (mesh(recompute="block"), "gap"),
    "dp2_sharding1": (mesh(dp=2, sharding_stage=1), "cls"),
    "dp2_sharding3": (mesh(dp=2, sharding_stage=3), "seven"),
    "pp2_1F1B": (mesh(pp=2), "gap"),
}
EVALUATED_EMA = ["one", "dp2_sharding2", "pp2", "dp2_mp2_sharding1"]
EVALUATED = ["dp2", "mp2", "pp2_1F1B_accum4", "dp2_mp2", "mp2_pp2", "dp2_sharding2"]
# the optimizers of recipes with all of their options, for a few steps
RECIPES = {
    "adamw": OptimConfig(weight_decay=0.1, no_decay=("bias", "norm"), layer_decay=0.7, ema_decay=0.9),
    "lamb": OptimConfig(name="lamb", epsilon=1e-3, weight_decay=0.1, no_decay=("bias",), ema_decay=0.9),
    "lion": OptimConfig(name="lion", lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1, decay_times_lr=False),
    "adafactor": OptimConfig(name="adafactor", betas=(0.9, 0.99), weight_decay=0.1, ema_decay=0.9),
    "muon": OptimConfig(name="muon", weight_decay=0.1, epsilon=1e-3, newton_schulz="original", nesterov=True),
    "schedule_free_adamw": OptimConfig(name="schedule_free_adamw", weight_decay=0.1, no_decay=("bias",), epsilon=1e-3),
}
RECIPE_MESHES = {
    "pp2": mesh(pp=2),
    "accum2": mesh(grad_accum_steps=2),
    "dp2_sharding2": mesh(dp=2, sharding_stage=2),
    "dp2_sharding3": mesh(dp=2, sharding_stage=3),
    "dp2_mp2_sharding1": mesh(dp=2, mp=2, sharding_stage=1),
}
# AdamW on every kind of mesh. LAMB, Adafactor and Muon compute norms, means and products of tensors, so they have a
# case for each way to split a tensor: by tensor parallelism, with only the state split, with the parameters split too.
# Lion and schedule-free AdamW, as AdamW, update each number by itself. All of these but AdamW and Muon train a model of
# one block: their programs have many small operators.
RECIPES_ON = {
    "adamw": ["pp2", "accum2", "dp2_sharding2", "dp2_sharding3", "dp2_mp2_sharding1"],
    "lamb": ["dp2_sharding3", "dp2_mp2_sharding1"],
    "adafactor": ["dp2_sharding3", "dp2_mp2_sharding1"],
    "lion": ["dp2_sharding2"],
    "schedule_free_adamw": ["dp2_sharding2"],
    "muon": ["pp2", "dp2_sharding3", "dp2_mp2_sharding1"],
}
# with only drop path: the mesh, and the case with one process that draws the same masks
DROP_PATH = {
    "paths_dp2": (mesh(dp=2), "paths_one"),
    "paths_pp2": (mesh(pp=2), "paths_accum2"),
}
# with mixup, CutMix, and a focal loss with weights of the classes and of the positives
MIXUP = {
    "mixed_dp2": mesh(dp=2),
    "mixed_pp2": mesh(pp=2),
    "mixed_accum2": mesh(grad_accum_steps=2),
}
# With a teacher of as many blocks; the last two have layers of their own.
DISTILLED = {
    "soft": {"dp2_sharding3": mesh(dp=2, sharding_stage=3)},
    "features": {"dp2_mp2_accum2": mesh(dp=2, mp=2, grad_accum_steps=2)},
    "token": {"mp2_pp2": mesh(mp=2, pp=2)},
}
DISTILLED_ON = [(kind, name) for kind, meshes in DISTILLED.items() for name in meshes]
# with images of two sizes, of which the model's is the second, for two steps each
SIZES = {
    "sizes_one": (mesh(), "sized"),
    "sizes_dp2_sharding3": (mesh(dp=2, sharding_stage=3), "sized"),
    "sizes_dp2_mp2_accum2_sharding3": (mesh(dp=2, mp=2, grad_accum_steps=2, sharding_stage=3), "sized"),
    "sizes_two_blocks_one": (mesh(), "sized_two_blocks"),
    "sizes_two_blocks_pp2": (mesh(pp=2), "sized_two_blocks"),
}
STEP_SIZES = [(16, 8), (16, 8), (12, 16), (12, 16)]
# with all kinds of dropout, for a few steps, of which one is repeated
DROPOUT = {
    "dropout_one": mesh(),
    "dropout_accum2": mesh(grad_accum_steps=2),
    "dropout_recompute": mesh(recompute="block"),
    "dropout_recompute_accum2": mesh(recompute=2, grad_accum_steps=2),
    "dropout_pp2": mesh(pp=2),
    "dropout_pp2_recompute": mesh(pp=2, recompute="block"),
    "dropout_dp2_mp2": mesh(dp=2, mp=2),
}
STEPS_WITH_A_REPETITION = [0, 1, 2, 1]


# with adapters of all linear layers, those of a gated MLP and of attention pooling among them
LORA = {
    "lora_mp2_recompute": mesh(mp=2, recompute="block"),
    "lora_pp2_accum2": mesh(pp=2, grad_accum_steps=2),
    "lora_dp2_mp2_accum2_sharding3": mesh(dp=2, mp=2, grad_accum_steps=2, sharding_stage=3),
}


# pairs of a mesh and an optimizer
TRAINED = [*((name, "sgd") for name in MESHES), *((name, "adamw") for name in ADAMW_MESHES)]
MESHES_OF = {"sgd": MESHES, "adamw": ADAMW_MESHES}
RECIPES_TRAINED = [(name, optimizer) for optimizer, names in RECIPES_ON.items() for name in names]


def all_cases() -> list[Case]:
    """Return the meshes with their optimizers, and the cases with drop path, mixup, recipes and dropout."""
    named: list[tuple[str, ModelConfig, OptimConfig, ParallelConfig, dict[str, Any]]] = []
    for name, optimizer in TRAINED:
        parallel, model = MESHES_OF[optimizer][name]
        named.append((f"{name}_{optimizer}", MODELS[model], OPTIMIZERS[optimizer], parallel, {}))
    for model, optimizer in {(MESHES_OF[optimizer][name][1], optimizer): None for name, optimizer in TRAINED}:
        named.append((f"one_{model}_{optimizer}", MODELS[model], OPTIMIZERS[optimizer], mesh(), {}))
    for name, parallel in {"paths_one": mesh(), "paths_accum2": mesh(grad_accum_steps=2)}.items():
        named.append((name, MODELS["dropped_paths"], OPTIMIZERS["adamw"], parallel, {}))
    for name, (parallel, _) in DROP_PATH.items():
        named.append((name, MODELS["dropped_paths"], OPTIMIZERS["adamw"], parallel, {}))
    sized = {"steps": list(range(len(STEP_SIZES))), "image_sizes": STEP_SIZES}
    for name, (parallel, model) in SIZES.items():
        named.append((name, MODELS[model], OPTIMIZERS["sgd"], parallel, sized))
    for name, parallel in {"mixed_one": mesh(), **MIXUP}.items():
        named.append((name, MODELS["gap"], OPTIMIZERS["sgd"], parallel, {"mixes": True}))
    for kind, meshes in DISTILLED.items():
        for name, parallel in {"one": mesh(), **meshes}.items():
            options = {"distills": kind, "mixes": True, "steps": [0, 1]}
            model = MODELS["distillation_token" if kind == "token" else "cls"]
            named.append((f"{kind}_{name}", model, OPTIMIZERS["sgd"], parallel, options))
    for name, optimizer in [*(("one", optimizer) for optimizer in RECIPES), *RECIPES_TRAINED]:
        parallel = mesh() if name == "one" else RECIPE_MESHES[name]
        four_steps = {"steps": list(range(4))}
        model = MODELS["tokens"] if optimizer in ("adamw", "muon") else MODELS["one_block"]
        named.append((f"recipe_{name}_{optimizer}", model, RECIPES[optimizer], parallel, four_steps))
    for name, parallel in {"lora_one": mesh(), **LORA}.items():
        rank_4 = {"lora": LoraConfig(rank=4, alpha=8.0), "steps": list(range(4))}
        named.append((name, MODELS["lora"], OPTIMIZERS["sgd"], parallel, rank_4))
    for name, parallel in DROPOUT.items():
        recorded = {"steps": STEPS_WITH_A_REPETITION, "records_masks": True}
        model = MODELS["dropout" if parallel.mp == 1 else "dropout_two_blocks"]
        named.append((name, model, OPTIMIZERS["sgd"], parallel, recorded))
    evaluated = {f"recipe_{name}_adamw" for name in EVALUATED_EMA}
    evaluated |= {f"recipe_{name}_schedule_free_adamw" for name in ("one", "dp2_sharding2")}
    for name in EVALUATED:
        evaluated |= {f"{name}_sgd", f"one_{MESHES[name][1]}_sgd"}
    return [
        Case(name=name, model=model, optim=optim, parallel=parallel, evaluates=name in evaluated, **others)
        for name, model, optim, parallel, others in named
    ]


CASES = {case.name: case for case in all_cases()}


class Runs:
    """Outcomes of the cases, by rank. All cases with the same number of processes run when one of them is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logs: dict[int, str] = {}  # the end of the processes' output, by world size
        make_images(folder / "images", NUM_EVAL_IMAGES, MESH_MODEL.num_classes)

    def __call__(self, name: str) -> list[Outcome]:
        world_size = CASES[name].world_size
        if world_size not in self._logs:
            self._logs[world_size] = self._run([case for case in CASES.values() if case.world_size == world_size])
        paths = [self._folder / f"{name}.{rank}" for rank in range(world_size)]
        if not all(path.is_file() for path in paths):
            pytest.fail(f"{name} has no outcome; the end of the output:\n{self._logs[world_size]}", pytrace=False)
        return [pickle.loads(path.read_bytes()) for path in paths]

    def one(self, name: str) -> Outcome:
        """Return the outcome of a case with one process."""
        (outcome,) = self(name)
        return outcome

    def _run(self, cases: list[Case]) -> str:
        """Run all cases of one world size, and return the end of their processes' output."""
        world_size = cases[0].world_size
        path = self._folder / f"cases_{world_size}.json"
        path.write_bytes(TypeAdapter(list[Case]).dump_json(cases, by_alias=True))
        environs = environments(world_size)
        logs = [self._folder / f"log_{world_size}.{rank}" for rank in range(world_size)]
        processes = [
            start_forked(run_rank, environ, path, self._folder, self._folder / "images", log)
            for environ, log in zip(environs, logs, strict=True)
        ]
        with ThreadPoolExecutor(world_size) as threads:
            waits = [threads.submit(wait_for, process) for process in processes]
            wait(waits, TIME_LIMIT_S, return_when=FIRST_EXCEPTION)
            for process in processes:  # those that wait for a failed one
                process.kill()
        return "\n".join(f"rank {rank}: {log.read_text(errors='replace')[-2000:]}" for rank, log in enumerate(logs))


def environments(world_size: int) -> list[dict[str, str]]:
    """Return the environment of each rank, as the launcher sets it."""
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(world_size + 1)]
        store, *endpoints = [f"127.0.0.1:{listening.getsockname()[1]}" for listening in free]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "SLURM_"))}
    common = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": launcher.interface_of("127.0.0.1") or "",
        "PADDLE_DISTRI_BACKEND": "gloo",
        "PADDLE_MASTER": store,
        "PADDLE_NNODES": "1",
        "PADDLE_TRAINERS_NUM": str(world_size),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
    }
    per_rank = [{"PADDLE_TRAINER_ID": str(rank), "PADDLE_CURRENT_ENDPOINT": at} for rank, at in enumerate(endpoints)]
    return [inherited | common | values for values in per_rank]


def run_rank(environ: dict[str, str], cases: Path, folder: Path, images: Path, log: Path) -> None:
    """Run the cases as one rank, in a forked process that ends with the one it is forked from."""
    launcher.stop_with_parent()
    redirect_output(log, log)
    os.environ.clear()
    os.environ.update(environ)
    mesh_worker.main(cases, folder, images)


def wait_for(process: ForkServerProcess) -> None:
    """Wait for the process to end; raise ChildProcessError if it failed."""
    wait_until_ready([process.sentinel])
    if fork_server.exit_code(process):
        raise ChildProcessError


def make_images(root: Path, num_images: int, num_classes: int) -> None:
    """Create a validation set of noise whose classes have different sizes."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        folder = root / "val" / str(number % num_classes)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(pixels).resize((20, 16), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
