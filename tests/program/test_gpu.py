"""Tests that need a GPU: './run.sh test -m gpu' runs them where there is one. Skipped otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.small import SMALL, images_and_labels

from vit_static.checkpoint.sharded_state import ShardedReader, rank_shard, write_shard
from vit_static.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    LossConfig,
    OptimConfig,
    ParallelConfig,
)
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import Mesh, MeshShape, start_mesh
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
        names = {op.name() for op in operators(program)}
        assert any("check_finite_and_unscale" in name for name in names) == is_scaled, dtype
        assert any("update_loss_scaling" in name for name in names) == is_scaled, dtype
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
    write_shard(rank_shard(first.state(), rank=0), tmp_path / "rank_0.safetensors", {})
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
