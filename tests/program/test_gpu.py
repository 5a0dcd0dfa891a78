"""What only a card can run. Skipped without one: './run.sh test -m gpu' on a machine that has one runs these."""

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
def card() -> Mesh:
    return start_mesh(MeshShape(1, 1, 1), "gpu")


CONFIG = SMALL.model_copy(update={"width": 48})  # heads of 16 channels, which flash attention takes


def program_on(card: Mesh, precision: Precision, **changed: Any) -> Program:
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
        VisionTransformer(config, choose_attention(config, parallel, kernels, "gpu")),
        card,
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
def test_o2_trains_as_float32_does(card: Mesh, dtype: str) -> None:
    expected = train(program_on(card, Precision("O0", "float32")))
    found = train(program_on(card, Precision("O2", dtype)))
    np.testing.assert_allclose(found, expected, rtol=3e-2)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_o2_computes_products_in_low_precision_and_the_loss_in_float32(card: Mesh, dtype: str, loss: str) -> None:
    found = operators(program_on(card, Precision("O2", dtype), loss=loss, kernels=KernelsConfig(fused_linear=False)))
    dtypes = {
        name: {str(op.operand_source(0).dtype) for op in found if op.name() == f"pd_op.{name}"}
        for name in ("matmul", "flash_attn", "log_softmax", "logsigmoid", "sum")
    }
    assert dtypes["matmul"] == dtypes["flash_attn"] == {f"paddle.{dtype}"}
    assert dtypes["log_softmax" if loss == "softmax" else "logsigmoid"] == dtypes["sum"] == {"paddle.float32"}


def test_o2_keeps_float32_masters_and_scales_float16s_loss(card: Mesh) -> None:
    for dtype, is_scaled in (("float16", True), ("bfloat16", False)):
        program = program_on(card, Precision("O2", dtype))
        names = {op.name() for op in operators(program)}
        assert any("check_finite_and_unscale" in name for name in names) == is_scaled, dtype
        assert any("update_loss_scaling" in name for name in names) == is_scaled, dtype
        state = {name: value for name, value in program.state().items() if not name.startswith("@")}
        assert all(value.dtype == paddle.float32 for value in state.values())


def test_fused_kernels_are_used(card: Mesh) -> None:
    names = [op.name() for op in operators(program_on(card, Precision("O2", "bfloat16")))]
    depth = CONFIG.depth or 0
    assert names.count("pd_op.flash_attn") == depth
    assert names.count("pd_op.fused_gemm_epilogue") == 6 * depth + 3  # patches, the tanh layer and the head
    config = CONFIG.model_copy(update={"dropout": 0.1, "layer_scale_init": None})
    names = [op.name() for op in operators(program_on(card, Precision("O2", "bfloat16"), config=config))]
    assert names.count("pd_op.fused_dropout_add") == 2 * depth


def test_fused_kernels_compute_the_same(card: Mesh) -> None:
    plain = KernelsConfig(flash_attention=False, fused_linear=False, fused_dropout=False)
    expected = train(program_on(card, Precision("O2", "bfloat16"), kernels=plain))
    np.testing.assert_allclose(train(program_on(card, Precision("O2", "bfloat16"))), expected, rtol=1e-2)


@pytest.mark.parametrize("precision", [Precision("O0", "float32"), Precision("O2", "float16")], ids=["O0", "O2"])
def test_training_goes_on_from_a_state_to_the_same_losses(card: Mesh, precision: Precision, tmp_path: Path) -> None:
    first = program_on(card, precision)
    train(first, range(3))
    write_shard(rank_shard(first.state(), rank=0), tmp_path / "part.safetensors", {})
    expected = train(first, range(3, 6))
    second = program_on(card, precision)
    second.restore(ShardedReader([tmp_path / "part.safetensors"]))
    assert train(second, range(3, 6)) == expected


def test_accumulation_on_the_card(card: Mesh) -> None:
    whole = train(program_on(card, Precision("O0", "float32")))
    parts = train(program_on(card, Precision("O0", "float32"), parallel=ParallelConfig(grad_accum_steps=2)))
    np.testing.assert_allclose(parts, whole, rtol=1e-3)


@pytest.mark.parametrize("policy", ["crop and flip", "randaugment", "trivialaugment", "three_augment", "erasing"])
def test_the_cards_pixels_are_the_cpus(small_digits: Path, policy: str) -> None:
    """Other decoders, the same operations: a mean difference below 2 of 255 levels."""
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
    for on_cpu, on_card in zip(batches[None], batches[0], strict=True):
        assert np.abs(on_cpu - on_card).mean() * 127.5 < 2.0
