"""Tests that need a GPU: './run.sh test -m gpu' runs them where there is one. Skipped otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.jobs import TINY
from helpers.runs import metrics
from helpers.small import ROOT, SMALL, images_and_labels

from vit_static.checkpoint.sharded_state import ShardedReader, write_shard
from vit_static.config.data_schema import DataConfig, EvalConfig, LossConfig
from vit_static.config.schema import AmpConfig, Config, KernelsConfig, OptimConfig, ParallelConfig
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import Mesh, MeshShape, make_mesh, start_mesh
from vit_static.plan.fake_world import fake_world
from vit_static.program.ir import BACKWARD, FORWARD, UPDATE
from vit_static.program.precision import Precision, choose_attention
from vit_static.program.program import Program

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu_mesh() -> Mesh:
    return start_mesh(MeshShape(1, 1, 1), "gpu")


CONFIG = SMALL.model_copy(update={"width": 48})  # heads of 16 channels, which FlashAttention supports


def make_gpu_program(mesh: Mesh, precision: Precision, **changed: Any) -> Program:
    paddle.seed(3)
    kernels = changed.pop("kernels", KernelsConfig())
    parallel = changed.pop("parallel", ParallelConfig())
    config = changed.pop("config", CONFIG)
    return Program.for_training(
        Config(
            name="gpu",
            model=config,
            data=DataConfig(global_batch_size=8),
            loss=LossConfig(name=changed.pop("loss", "softmax")),
            optim=OptimConfig(weight_decay=0.1),
            parallel=parallel,
            kernels=kernels,
        ),
        VisionTransformer(config, choose_attention(config, precision, parallel, kernels, "gpu")),
        mesh,
        precision,
        learning_rate=lambda step: 1e-3,
        eval_batch_size=8,
    )


def train(program: Program, steps: range = range(10)) -> list[float]:
    losses = []
    for step in steps:
        images, labels = images_and_labels(8, CONFIG, seed=step)
        losses.append(program.loss_value(program.train_step(images.cuda(), labels.cuda(), step)))
    return losses


def operators(program: Program) -> list[Any]:
    return list(program.compiled("train").global_block().ops)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_o2_trains_like_float32(gpu_mesh: Mesh, dtype: str) -> None:
    expected = train(make_gpu_program(gpu_mesh, Precision("O0", "float32")))
    losses = train(make_gpu_program(gpu_mesh, Precision("O2", dtype)))
    np.testing.assert_allclose(losses, expected, rtol=3e-2)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_o2_computes_products_in_low_precision_and_the_loss_in_float32(gpu_mesh: Mesh, dtype: str, loss: str) -> None:
    compiled = operators(
        make_gpu_program(gpu_mesh, Precision("O2", dtype), loss=loss, kernels=KernelsConfig(fused_linear=False))
    )
    dtypes = {
        name: {str(op.operand_source(0).dtype) for op in compiled if op.name() == f"pd_op.{name}"}
        for name in ("matmul", "flash_attn", "log_softmax", "logsigmoid", "sum")
    }
    assert dtypes["matmul"] == dtypes["flash_attn"] == {f"paddle.{dtype}"}
    assert dtypes["log_softmax" if loss == "softmax" else "logsigmoid"] == dtypes["sum"] == {"paddle.float32"}


def test_o2_keeps_float32_masters_and_scales_the_loss_in_float16(gpu_mesh: Mesh) -> None:
    for dtype, is_scaled in (("float16", True), ("bfloat16", False)):
        program = make_gpu_program(gpu_mesh, Precision("O2", dtype))
        stored = [op.attrs()["name"] for op in operators(program) if op.name() == "pd_op.data"]
        assert any(name.startswith("loss_scaling") for name in stored) == is_scaled, dtype
        state = {name: value for name, value in program.state().items() if not name.startswith("@")}
        assert all(value.dtype == paddle.float32 for value in state.values())


def test_fused_kernels_are_used(gpu_mesh: Mesh) -> None:
    names = [op.name() for op in operators(make_gpu_program(gpu_mesh, Precision("O2", "bfloat16")))]
    depth = CONFIG.depth or 0
    assert names.count("pd_op.flash_attn") == depth
    assert names.count("pd_op.fused_gemm_epilogue") == 6 * depth + 2  # patch embedding, tanh layer; no head of 5
    config = CONFIG.model_copy(update={"dropout": 0.1, "layer_scale_init": None})
    names = [op.name() for op in operators(make_gpu_program(gpu_mesh, Precision("O2", "bfloat16"), config=config))]
    assert names.count("pd_op.fused_dropout_add") == 2 * depth


def test_fused_kernels_compute_the_same(gpu_mesh: Mesh) -> None:
    plain = KernelsConfig(flash_attention=False, fused_linear=False, fused_dropout=False)
    expected = train(make_gpu_program(gpu_mesh, Precision("O2", "bfloat16"), kernels=plain))
    np.testing.assert_allclose(train(make_gpu_program(gpu_mesh, Precision("O2", "bfloat16"))), expected, rtol=1e-2)


@pytest.mark.parametrize("precision", [Precision("O0", "float32"), Precision("O2", "float16")], ids=["O0", "O2"])
def test_training_resumes_from_a_state_with_the_same_losses(
    gpu_mesh: Mesh, precision: Precision, tmp_path: Path
) -> None:
    first = make_gpu_program(gpu_mesh, precision)
    train(first, range(3))
    write_shard(first.shard(), tmp_path / "rank_0.safetensors", {})
    expected = train(first, range(3, 6))
    second = make_gpu_program(gpu_mesh, precision)
    second.restore(ShardedReader([tmp_path / "rank_0.safetensors"]))
    assert train(second, range(3, 6)) == expected


def test_gradient_accumulation_on_a_gpu(gpu_mesh: Mesh) -> None:
    one_batch = train(make_gpu_program(gpu_mesh, Precision("O0", "float32")))
    accumulated = train(
        make_gpu_program(gpu_mesh, Precision("O0", "float32"), parallel=ParallelConfig(grad_accum_steps=2))
    )
    np.testing.assert_allclose(accumulated, one_batch, rtol=1e-3)


FOUR_HEADS = CONFIG.model_copy(update={"width": 64, "num_heads": 4})  # which two ranks can split


def gathers(program: Program, mode: str) -> list[Any]:
    """Return the all-gathers, except for that of the gradient of the images' losses, one number per image."""
    gathered = [op for op in program.compiled(mode).global_block().ops if "all_gather" in op.name()]
    return [op for op in gathered if "pd_op.mean_grad" not in [reader.name() for reader in op.result(0).all_used_ops()]]


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
@pytest.mark.parametrize("parallel", [ParallelConfig(dp=2), ParallelConfig(mp=2)], ids=["dp 2", "mp 2"])
def test_no_program_gathers_queries_keys_or_values(level: str, parallel: ParallelConfig) -> None:
    """Compiled for the first of two GPUs, of which one may be missing: training, its evaluation, and the verb `eval`.

    The kernel that Paddle takes for float32, memory_efficient_attention, has no sharding rule.
    """
    precision = Precision(level, "float32" if level == "O0" else "bfloat16")
    with fake_world(0, 2):
        mesh = make_mesh(0, MeshShape(2 // parallel.mp, parallel.mp, 1), "gpu", 0)
        program = make_gpu_program(mesh, precision, parallel=parallel, config=FOUR_HEADS)
        attention = choose_attention(FOUR_HEADS, precision, ParallelConfig(), KernelsConfig(), "gpu")
        config = Config(name="gpu", model=FOUR_HEADS, amp=AmpConfig(level=level))
        model = VisionTransformer(FOUR_HEADS, attention)
        eval_only = Program.for_eval(config, model, mesh, precision, eval_batch_size=8)
        compiled = [(program, "train"), (program, "eval"), (eval_only, "eval")]
        for one, mode in compiled:
            names = [op.name() for op in one.compiled(mode).global_block().ops]
            assert not any("memory_efficient_attention" in name for name in names)
            assert names.count("pd_op.flash_attn") == (0 if level == "O0" else FOUR_HEADS.depth)
            activations = [op for op in gathers(one, mode) if len(op.operand_source(0).shape) > 2]
            assert not activations, [op.operand_source(0).shape for op in activations]


@pytest.mark.parametrize(("stage", "roles"), [(0, set()), (1, {UPDATE}), (2, {UPDATE}), (3, {FORWARD, BACKWARD})])
def test_only_zero_gathers_and_only_parameters(stage: int, roles: set[int]) -> None:
    """Stages 1 and 2 gather parameters after the update, stage 3 before each use."""
    with fake_world(0, 2):
        mesh = make_mesh(0, MeshShape(2, 1, 1), "gpu", 0)
        parallel = ParallelConfig(dp=2, sharding_stage=stage)
        program = make_gpu_program(mesh, Precision("O2", "float16"), parallel=parallel)
        gather_roles = {op.op_role for op in gathers(program, "train")}
    assert gather_roles == roles


# -- two GPUs, each with a process that the launcher starts ------------------------------------------------------------

needs_two_gpus = pytest.mark.skipif(paddle.device.cuda.device_count() < 2, reason="fewer than two GPUs")


class Runs:
    """Calls of verbs in a folder, on one or two GPUs."""

    def __init__(self, folder: Path, digits: Path) -> None:
        self.folder = folder
        (folder / "tiny.yaml").write_text(TINY.replace("root: ROOT", f"root: {digits}"))

    def call(self, *arguments: str, num_processes: int) -> str:
        """Call a verb, which must succeed, and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "vit_static.launch", *arguments],
            cwd=self.folder,
            env={**os.environ, "NPROC": str(num_processes), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def train(self, name: str, *overrides: str, num_processes: int = 2) -> dict[str, np.ndarray]:
        """Train for six steps; return losses and gradient norms, from the first step that wasn't skipped."""
        flags = [argument for override in (f"name={name}", *overrides) for argument in ("-o", override)]
        self.call("pretrain", "-c", "tiny.yaml", *flags, num_processes=num_processes)
        steps = metrics(self.folder / "output" / name, "train")
        return {key: np.array([step[key] for step in steps]) for key in ("loss", "grad_norm")}


@pytest.fixture
def runs(tmp_path: Path, small_digits: Path) -> Runs:
    return Runs(tmp_path, small_digits)


FLOAT16 = ("amp.level=O2", "amp.dtype=float16", "amp.init_loss_scaling=1024")  # which no gradient exceeds


@needs_two_gpus
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_zero_in_float16_trains_like_stage_0(runs: Runs, stage: int, accumulation: int) -> None:
    """Gradients that are still scaled, or exchanged twice, change the norm; Adam's losses would hardly differ."""
    steps = f"parallel.grad_accum_steps={accumulation}"
    expected = runs.train("stage_0", steps, *FLOAT16)
    sharded = runs.train(f"stage_{stage}", steps, f"parallel.sharding_stage={stage}", *FLOAT16)
    np.testing.assert_allclose(sharded["grad_norm"], expected["grad_norm"], rtol=0.05)
    np.testing.assert_allclose(sharded["loss"], expected["loss"], rtol=0.03)


@needs_two_gpus
@pytest.mark.parametrize("precision", [("amp.level=O0",), FLOAT16], ids=["float32", "float16"])
def test_zero_3_trains_like_one_gpu(runs: Runs, precision: tuple[str, ...]) -> None:
    expected = runs.train("one", "amp.level=O0", num_processes=1)
    sharded = runs.train("two", "parallel.sharding_stage=3", *precision)
    rtol = {"grad_norm": 1e-3, "loss": 1e-3} if precision == ("amp.level=O0",) else {"grad_norm": 0.05, "loss": 0.03}
    for key, values in sharded.items():
        np.testing.assert_allclose(values, expected[key], rtol=rtol[key])


@needs_two_gpus
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_eval_on_two_gpus_gives_the_values_of_one(runs: Runs, level: str) -> None:
    runs.train("trained", num_processes=1)
    command = ("eval", "--checkpoint", "output/trained", "-o", f"amp.level={level}")
    one, two = (json.loads(runs.call(*command, num_processes=n).splitlines()[-1]) for n in (1, 2))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5 if level == "O0" else 1e-2)
    assert two["top1"] == pytest.approx(one["top1"], abs=0.0 if level == "O0" else 7.0)  # two of 30 images


@pytest.mark.parametrize("policy", ["crop and flip", "randaugment", "trivialaugment", "three_augment", "erasing"])
def test_gpu_pixels_are_those_of_the_cpu(small_digits: Path, policy: str) -> None:
    """The decoders differ, the operations don't: the mean difference is below 2 of 255 levels."""
    from vit_static.bench.data_gpu import POLICIES
    from vit_static.data.loader import EvalLoader, TrainLoader
    from vit_static.data.open_set import open_set

    data = DataConfig(root=str(small_digits), global_batch_size=16)
    images = open_set(data, "train", 10)
    batches = {}
    for device_id in (None, 0):
        feed = TrainLoader(
            images, (32, 32), data, POLICIES[policy], seed=0, start_step=0, dp_rank=0, dp_size=1, device_id=device_id
        )
        evaluation = EvalLoader(images, (32, 32), 16, data, EvalConfig(), dp_rank=0, dp_size=1, device_id=device_id)
        batches[device_id] = [next(feed)[0].numpy(), next(iter(evaluation))[0].numpy()]
    for on_cpu, on_gpu in zip(batches[None], batches[0], strict=True):
        assert np.abs(on_cpu - on_gpu).mean() * 127.5 < 2.0
