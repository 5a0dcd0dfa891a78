"""The compiled program: training, evaluation and state, with each optimizer and each kind of kernel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.small import SMALL, images_and_labels
from paddle import nn

from vit_static.checkpoint.sharded_state import ShardedReader, write_shard
from vit_static.common.errors import ConfigError
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import AmpConfig, KernelsConfig, OptimConfig, ParallelConfig
from vit_static.model.attention import attention_by_matmul
from vit_static.model.rope import RotaryPositions
from vit_static.model.vit import VisionTransformer
from vit_static.optim.optimizers import AdamW, RuleOptimizer
from vit_static.program.precision import Precision, choose_precision
from vit_static.weights.load import file_state

ONE_BLOCK = SMALL.model_copy(update={"depth": 1})
OPTIMIZERS = {"adamw": OptimConfig(name="adamw", weight_decay=0.1), "sgd": OptimConfig(name="sgd", lr=0.1)}
ALL_OPTIMIZERS = {
    **OPTIMIZERS,
    "lamb": OptimConfig(name="lamb", weight_decay=0.1, no_decay=("bias",)),
    "lion": OptimConfig(name="lion", lr=1e-4, betas=(0.9, 0.99)),
    "adafactor": OptimConfig(name="adafactor", weight_decay=0.1, decay_times_lr=False, ema_decay=0.9),
    "schedule_free_adamw": OptimConfig(name="schedule_free_adamw"),
    "muon": OptimConfig(name="muon"),
}


@pytest.mark.parametrize(
    ("amp", "kernels", "message"),
    [
        (AmpConfig(dtype="bfloat16"), KernelsConfig(), "amp.dtype = bfloat16: this GPU has compute capability 7.5"),
        (AmpConfig(), KernelsConfig(), "kernels.flash_attention = true: this GPU has compute capability 7.5"),
    ],
)
def test_what_a_gpu_before_ampere_lacks_is_refused(amp: AmpConfig, kernels: KernelsConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose_precision(amp, "gpu", kernels, gpu_capability=(7, 5))
    without_flash = KernelsConfig(flash_attention=False)
    assert choose_precision(AmpConfig(), "gpu", without_flash, gpu_capability=(7, 5)) == Precision("O2", "float16")
    assert choose_precision(AmpConfig(), "gpu", kernels, gpu_capability=(8, 0)) == Precision("O2", "bfloat16")


def trained(make_program, steps: int, *, batch_size: int = 8, model_seed: int = 3, **program_arguments):
    """Return (losses, weights, norms of the gradients) of a new small model, with other random images in each step."""
    config = program_arguments.pop("config", ONE_BLOCK)
    paddle.seed(model_seed)
    model = VisionTransformer(config, attention_by_matmul)
    program = make_program(model, batch_size, **program_arguments)
    losses, norms = [], []
    for step in range(steps):
        loss = program.train_step(*images_and_labels(batch_size, config, seed=step), step)
        losses.append(program.loss_value(loss))
        norms.append(program.grad_norm())
    return np.array(losses), program.weights(), np.array(norms)


@pytest.mark.cpu_isa
@pytest.mark.parametrize(("pool", "name"), [("cls", "adamw"), ("gap", "sgd")])
def test_every_parameter_moves_alike_with_and_without_onednn(make_program, name, pool) -> None:
    """Except k's bias: softmax is invariant to it, so its gradient is a rounding error or 0."""
    config = ONE_BLOCK.model_copy(update={"pool": pool})
    paddle.seed(3)
    before = file_state(VisionTransformer(config))
    runs = [
        trained(make_program, 5, config=config, optim=OPTIMIZERS[name], kernels=KernelsConfig(onednn=onednn))
        for onednn in (False, True)
    ]
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-4)
    width = 24
    for _, after, _ in runs:
        for key, old in before.items():
            has_moved = after[key] != old
            if key.endswith("attn.qkv.bias"):
                has_moved = np.delete(has_moved, np.arange(width, 2 * width))
            assert has_moved.mean() > 0.9, key


def apply_as_mixed_precision(self, loss, startup_program, params_grads, param_group_idx=0):
    """Apply gradients as O2's optimizer wrapper does, which only runs on GPUs."""
    return self.apply_gradients(params_grads)


@pytest.mark.parametrize(
    ("name", "as_mixed_precision"),
    [("adamw", False), ("lamb", False), ("adamw", True), ("sgd", True)],
)
def test_accumulated_gradients_equal_those_of_one_batch(make_program, monkeypatch, name, as_mixed_precision) -> None:
    """4 micro-batches give the losses, weights and norms of one batch, with active clipping.

    Of AdamW and of RuleOptimizer, which average them for all other optimizers. The epsilon isn't small compared to the
    gradients: otherwise AdamW would hide a wrong scale.
    """
    if as_mixed_precision:
        for optimizer in (AdamW, RuleOptimizer):
            monkeypatch.setattr(optimizer, "_apply_optimize", apply_as_mixed_precision)
    optim = OptimConfig(name=name, lr=0.1, epsilon=1.0, clip_norm=0.1)
    one_batch = trained(make_program, 4, optim=optim)
    accumulated = trained(make_program, 4, optim=optim, parallel=ParallelConfig(grad_accum_steps=4))
    for values, expected in ((accumulated[0], one_batch[0]), (accumulated[2], one_batch[2])):
        np.testing.assert_allclose(values, expected, rtol=1e-5)
    for name, expected in one_batch[1].items():
        value = accumulated[1][name]
        if name.endswith("attn.qkv.bias"):  # k's gradient is a rounding error
            value, expected = (np.delete(array, np.arange(24, 48)) for array in (value, expected))
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_gradient_norm_is_measured_before_clipping(make_program) -> None:
    """And so are the norms by block, which are stored in case the gradients of a step aren't finite."""
    programs = []
    for clip_norm in (1e-3, None):
        paddle.seed(3)
        programs.append(
            make_program(VisionTransformer(ONE_BLOCK), 8, OptimConfig(name="sgd", lr=0.0, clip_norm=clip_norm))
        )
        programs[-1].train_step(*images_and_labels(8), 0)
    clipped, unclipped = programs
    assert clipped.grad_norm() == pytest.approx(unclipped.grad_norm(), rel=1e-6)
    assert clipped.grad_norm() > 0.1
    for program in programs:
        norms = program._clip._recorded("nonfinite_norms")
        assert np.sqrt(np.square(norms).sum()) == pytest.approx(program.grad_norm(), rel=1e-6)


def test_dynamic_static_and_compiled_models_agree(make_program) -> None:
    """The layers, `to_static`, and the distributed engine's evaluation give the same output."""
    paddle.seed(3)
    model = VisionTransformer(SMALL.model_copy(update={"dropout": 0.3, "drop_path_rate": 0.3}))
    model.eval()
    images, labels = images_and_labels(8)
    dynamic = model(images).numpy().astype(np.float64)
    static = paddle.jit.to_static(model, full_graph=True)(images).numpy()
    np.testing.assert_allclose(static, dynamic, rtol=1e-5, atol=1e-6)
    log_softmax = dynamic - np.log(np.exp(dynamic).sum(axis=1, keepdims=True))
    expected = -log_softmax[np.arange(8), labels.numpy()]
    paddle.seed(3)
    fresh = VisionTransformer(SMALL.model_copy(update={"dropout": 0.3, "drop_path_rate": 0.3}))
    program = make_program(fresh, 8, evaluates_only=True)
    np.testing.assert_allclose(program.eval_step(images, labels)[:, 0], expected, rtol=1e-5)


def test_evaluation_between_steps_changes_nothing(make_program) -> None:
    optim, config = OPTIMIZERS["adamw"], ONE_BLOCK.model_copy(update={"dropout": 0.1})
    losses, weights, _ = trained(make_program, 3, optim=optim, config=config)
    paddle.seed(3)
    program = make_program(VisionTransformer(config), 8, optim)
    for step in range(3):
        loss = program.train_step(*images_and_labels(8, seed=step), step)
        assert program.loss_value(loss) == losses[step]
        program.eval_step(*images_and_labels(8, seed=100))
    assert all(np.array_equal(program.weights()[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "random",
    [
        {"dropout": 0.3, "attention_dropout": 0.2, "drop_path_rate": 0.3},
        {"patch_dropout": 0.5},
        {"rope": "axial", "rope_jitter": 1.5},
    ],
    ids=["dropout", "patch dropout", "rotary coordinates"],
)
def test_random_choices_are_a_function_of_seed_and_step(make_program, random: dict[str, Any]) -> None:
    """Programs that start at different steps make the same choices in the same step, and others in others."""
    config = ModelConfig.model_validate({**ONE_BLOCK.model_dump(by_alias=True), "num_heads": 2, **random})

    def losses_at(*steps: int, seed: int = 0) -> list[float]:
        paddle.seed(3)
        program = make_program(VisionTransformer(config, attention_by_matmul), 8, OptimConfig(lr=0.0), seed=seed)
        return [program.loss_value(program.train_step(*images_and_labels(8), step)) for step in steps]

    first, other = losses_at(5, 6)
    assert first != other
    assert losses_at(0, 1, 5)[2] == first
    assert losses_at(5, seed=1) != [first]


def save_state(program, folder: Path) -> ShardedReader:
    """Write a program's state as a shard of a checkpoint, and return a reader of it."""
    folder.mkdir(parents=True)
    write_shard(program.shard(), folder / "rank_0.safetensors", {})
    return ShardedReader([folder / "rank_0.safetensors"])


def test_training_resumes_from_a_restored_state_with_the_same_bits(make_program, tmp_path: Path) -> None:
    """`state` contains everything that training changes: another program continues from it like the first."""
    for name, optim in OPTIMIZERS.items():
        paddle.seed(3)
        first = make_program(VisionTransformer(ONE_BLOCK), 8, optim)
        for step in range(3):
            first.train_step(*images_and_labels(8, seed=step), step)
        shards = save_state(first, tmp_path / name)
        first_loss = first.train_step(*images_and_labels(8, seed=9), 3)
        paddle.seed(77)
        second = make_program(VisionTransformer(ONE_BLOCK), 8, optim)
        assert set(second.state()) == set(shards), name
        second.restore(shards)
        second_loss = second.train_step(*images_and_labels(8, seed=9), 3)
        assert second.loss_value(second_loss) == first.loss_value(first_loss), name
        assert all(np.array_equal(second.weights()[key], value) for key, value in first.weights().items()), name


def test_o2_state_is_float32_and_resumes_in_any_precision(
    make_program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU Paddle's `decorate` keeps the weights in float32, so the test casts them. AdamW doesn't accept that."""

    def cast(model: paddle.nn.Layer, optimizer: Any, *, dtype: str, **others: Any) -> tuple[paddle.nn.Layer, Any]:
        return model.to(dtype=dtype), optimizer

    monkeypatch.setattr(paddle.amp, "decorate", cast)
    optim = OptimConfig(name="sgd", lr=1e-1, ema_decay=0.5)
    half = {"precision": Precision("O2", "bfloat16"), "amp": AmpConfig(level="O2", dtype="bfloat16")}
    first = make_program(VisionTransformer(ONE_BLOCK), 8, optim, **half)
    for step in range(3):
        first.train_step(*images_and_labels(8, seed=step), step)
    shards = save_state(first, tmp_path / "half")
    with first.ema_weights():
        pass  # restores the half-precision weights afterwards
    batch = images_and_labels(8, seed=9)
    loss = first.loss_value(first.train_step(*batch, 3))  # before variables of other programs get the same names
    assert {shards.read(name).dtype for name in shards} == {np.dtype("float32")}
    weight, average = shards.read("head.weight"), shards.read("head.weight@ema")
    assert not np.array_equal(weight, average)
    assert np.any(weight.view(np.uint32) & 0xFFFF)  # bits of the float32 master, which bfloat16 doesn't have

    second = make_program(VisionTransformer(ONE_BLOCK), 8, optim, **half)
    second.restore(shards)
    assert second.loss_value(second.train_step(*batch, 3)) == loss
    full = make_program(VisionTransformer(ONE_BLOCK), 8, optim)  # float32
    assert set(full.state()) == set(shards)
    full.restore(shards)
    assert np.array_equal(full.weights()["head.weight"], weight)
    assert np.array_equal(full.weights(ema=True)["head.weight"], average)
    assert full.loss_value(full.train_step(*batch, 3)) == pytest.approx(loss, rel=0.1)


def test_the_loss_scale_of_float16_is_part_of_the_state(make_program) -> None:
    half = {"precision": Precision("O2", "float16"), "amp": AmpConfig(level="O2", dtype="float16")}
    state = make_program(VisionTransformer(ONE_BLOCK), 8, OPTIMIZERS["sgd"], **half).state()
    names = {"@loss_scaling", "@num_good_steps", "@num_bad_steps", "@num_skipped_steps"}
    assert {name for name in state if name.startswith("@")} == names


def test_the_first_step_with_nonfinite_gradients_is_remembered(make_program) -> None:
    """Also some steps later, when the weights have become NaN, and with the norms by block."""
    program = make_program(VisionTransformer(SMALL), 8, OptimConfig(name="sgd", lr=1e-3, clip_norm=1.0))
    images, labels = images_and_labels(8)
    for step in range(2):
        program.train_step(images, labels, step)
    assert program.first_nonfinite_step() is None
    broken = images.clone()
    broken[3, 0, 0, 0] = float("inf")
    program.train_step(broken, labels, 2)
    for step in (3, 4):
        program.train_step(images, labels, step)
    nonfinite = program.first_nonfinite_step()
    assert nonfinite is not None and nonfinite[0] == 3
    assert set(nonfinite[1]) == {
        "patch_embed",
        "cls_token",
        "pos_embed",
        "blocks.0",
        "blocks.1",
        "norm",
        "head0",
        "head",
    }
    assert not np.isfinite(nonfinite[1]["patch_embed"])
    program.clear_nonfinite()
    assert program.first_nonfinite_step() is None


def dtypes_by_kernel(program, mode: str) -> dict[str, set[str]]:
    """Return the dtypes in which our operators run, by kernel."""
    dtypes: dict[str, set[str]] = {}
    for op in program.compiled(mode).global_block().ops:
        match = re.fullmatch(r"py_op\.vit_static_(\w+)_(float32|bfloat16)_\d+", op.name())
        if match:
            dtypes.setdefault(match[1], set()).add(match[2])
    return dtypes


@pytest.mark.needs_bfloat16
def test_mixed_precision_multiplies_in_bfloat16_and_normalises_in_float32(make_program) -> None:
    """All products of the compiled program. Softmax is part of attention, whose scores are float32."""
    paddle.seed(3)
    program = make_program(VisionTransformer(SMALL, attention_by_matmul), 8, precision=Precision("O1", "bfloat16"))
    dtypes = dtypes_by_kernel(program, "train")
    for kernel in ("matmul", "attention", "attention_backward", "gelu", "gelu_backward"):
        assert dtypes[kernel] == {"bfloat16"}, kernel
    assert dtypes["layer_norm"] == dtypes["layer_norm_backward"] == {"float32"}
    names = [op.name() for op in program.compiled("train").global_block().ops]
    assert not {"pd_op.matmul", "pd_op.matmul_grad", "pd_op.softmax", "pd_op.cast"} & set(names)
    losses = [op for op in program.compiled("train").global_block().ops if op.name() == "pd_op.log_softmax"]
    assert [op.result(0).dtype for op in losses] == [paddle.float32]
    assert all(value.dtype == paddle.float32 for value in program.state().values())


def test_paddles_own_list_keeps_softmax_in_float32(make_program) -> None:
    """In the program without oneDNN kernels; attention dropout prevents the fusion of attention."""
    paddle.seed(3)
    model = VisionTransformer(SMALL.model_copy(update={"attention_dropout": 0.1}), attention_by_matmul)
    program = make_program(model, 8, precision=Precision("O1", "bfloat16"), kernels=KernelsConfig(onednn=False))
    operations = program.compiled("train").global_block().ops
    dtypes = {
        name: {op.operand_source(0).dtype for op in operations if op.name() == f"pd_op.{name}"}
        for name in ("matmul", "softmax", "layer_norm", "log_softmax", "tanh")
    }
    assert dtypes["matmul"] == {paddle.bfloat16}
    assert dtypes["softmax"] == dtypes["layer_norm"] == dtypes["log_softmax"] == {paddle.float32}


@pytest.mark.parametrize(
    ("amp", "device", "has_bfloat16", "chosen"),
    [
        (AmpConfig(), "cpu", True, Precision("O1", "bfloat16")),
        (AmpConfig(), "cpu", False, Precision("O0", "float32")),
        (AmpConfig(), "gpu", False, Precision("O2", "bfloat16")),
        (AmpConfig(level="O1"), "cpu", True, Precision("O1", "bfloat16")),
        (AmpConfig(level="O2", dtype="float16"), "gpu", True, Precision("O2", "float16")),
        (AmpConfig(level="O0", dtype="float16"), "gpu", True, Precision("O0", "float32")),
    ],
)
def test_precision_is_resolved(amp, device, has_bfloat16, chosen) -> None:
    assert choose_precision(amp, device, cpu_has_bfloat16=has_bfloat16) == chosen


def test_auto_without_onednn_is_float32() -> None:
    precision = choose_precision(AmpConfig(), "cpu", KernelsConfig(onednn=False), cpu_has_bfloat16=True)
    assert precision == Precision("O0", "float32")


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize(
    "amp", [AmpConfig(level="O2"), AmpConfig(level="O1", dtype="float16"), AmpConfig(dtype="float16")]
)
def test_a_precision_that_no_cpu_supports_is_an_error(amp, has_bfloat16) -> None:
    with pytest.raises(ConfigError, match=r"set amp\.level=O1"):
        choose_precision(amp, "cpu", cpu_has_bfloat16=has_bfloat16)


def test_sharded_parameters_are_float32_on_a_cpu() -> None:
    """Paddle's CPU build can't gather them in bfloat16."""
    third = ParallelConfig(sharding_stage=3)
    assert choose_precision(AmpConfig(), "cpu", None, third, cpu_has_bfloat16=True) == Precision("O0", "float32")
    with pytest.raises(ConfigError, match="sharding_stage below 3"):
        choose_precision(AmpConfig(level="O1"), "cpu", None, third, cpu_has_bfloat16=True)
    assert choose_precision(AmpConfig(), "gpu", None, third).level == "O2"


def test_requested_bfloat16_is_an_error_without_support() -> None:
    with pytest.raises(ConfigError, match=r"set amp\.level=O0"):
        choose_precision(AmpConfig(level="O1"), "cpu", cpu_has_bfloat16=False)
    with pytest.raises(ConfigError, match=r"set kernels\.onednn=true"):
        choose_precision(AmpConfig(level="O1"), "cpu", KernelsConfig(onednn=False), cpu_has_bfloat16=True)


@pytest.mark.parametrize(
    ("dtype", "scaling"), [("float16", (True, 1024.0)), ("bfloat16", (False, 1.0))], ids=["float16", "bfloat16"]
)
def test_the_settings_of_o2_on_a_gpu(make_program, monkeypatch, dtype, scaling) -> None:
    """All fields of the strategy and the arguments of `decorate`: a CPU can't compile the program itself."""
    decorated: list[dict] = []

    def decorate(model: Any, optimizer: Any, **arguments: Any) -> tuple[Any, Any]:
        decorated.append(arguments)
        return model, optimizer

    monkeypatch.setattr(paddle.amp, "decorate", decorate)
    amp = AmpConfig(level="O2", dtype=dtype, init_loss_scaling=1024.0, white_list=("softmax",), black_list=("tanh",))
    paddle.seed(3)
    program = make_program(
        VisionTransformer(SMALL, attention_by_matmul), 8, precision=choose_precision(amp, "gpu"), amp=amp
    )
    strategy = program._program._engine._strategy.amp.to_dict()
    in_float32 = set(strategy.pop("custom_black_list"))
    assert {"tanh", "log_softmax", "logsigmoid", "reduce_sum", "reduce_mean", "exp", "log"} <= in_float32
    assert not {"softmax", "layer_norm", "matmul_v2", "gelu"} & in_float32
    assert strategy == {
        "enable": True,
        "dtype": dtype,
        "level": "O2",
        "init_loss_scaling": scaling[1],
        "use_dynamic_loss_scaling": scaling[0],
        "incr_every_n_steps": 1000,
        "incr_ratio": 2.0,
        "decr_every_n_nan_or_inf": 2,
        "decr_ratio": 0.8,
        "custom_white_list": ["softmax"],
        "custom_black_varnames": [],
        "use_fp16_guard": False,
        "use_bf16_guard": False,
        "use_master_grad": True,
        "use_promote": True,
    }
    arguments = {"level": "O2", "dtype": dtype, "master_weight": True, "master_grad": True}
    assert decorated == [{**arguments, "excluded_layers": [RotaryPositions]}]


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_low_precision_parameters_get_float32_masters_and_moments(cpu_mesh, name) -> None:
    """The optimizer by itself, on bfloat16 parameters."""
    from vit_static.optim.optimizers import make_optimizer

    layer = nn.Linear(3, 4)
    layer.to(dtype="bfloat16")
    optimizer, *_ = make_optimizer(layer, ALL_OPTIMIZERS[name], lambda step: 1e-3, low_precision=True)
    main, startup = paddle.static.Program(), paddle.static.Program()
    assert optimizer._multi_precision
    with paddle.pir_utils.IrGuard(), paddle.static.program_guard(main, startup):
        parameter = paddle.pir.core.create_parameter(
            "bfloat16", [3, 4], name=layer.weight.name, initializer=nn.initializer.Constant(0.0)
        )
        optimizer._create_accumulators(main.global_block(), [parameter])
    state = [*optimizer._master_weights.values()]
    state += [value for values in optimizer._accumulators.values() for value in values.values()]
    assert len(state) >= 2 and all(value.dtype == paddle.float32 for value in state)


def test_parameters_keep_their_names_in_the_state(make_program) -> None:
    paddle.seed(3)
    model = VisionTransformer(ONE_BLOCK)
    model_names = set(model.state_dict())
    state = make_program(model, 8, OPTIMIZERS["adamw"]).state()
    assert {name for name in state if "@" not in name} == model_names
    assert {name.split("@")[0] for name in state} == model_names
    kinds = {name.split("@")[1] for name in state if "@" in name}
    assert kinds == {"moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc"}
