"""AdamW for all parameters as one operator: against NumPy in float64, the same bits for all numbers of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers.small import SMALL, images_and_labels

from vit_static.config.data_schema import DataConfig
from vit_static.config.optim_schema import OptimConfig
from vit_static.config.schema import Config, KernelsConfig, ParallelConfig
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import MeshShape, make_mesh
from vit_static.plan.fake_world import fake_world
from vit_static.program import pass_list
from vit_static.program.cpu import adamw
from vit_static.program.cpu.adamw import AdamWUpdate, Parameter
from vit_static.program.cpu.fuse_update import fuse_update
from vit_static.program.ir import UPDATE
from vit_static.program.precision import Precision
from vit_static.program.program import Program

pytestmark = pytest.mark.cpu_isa

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-6
ONE_BLOCK = SMALL.model_copy(update={"depth": 1})


def arrays(length: int, seed: int) -> dict[str, np.ndarray]:
    """Return a parameter, its gradient, its state and its average."""
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal(length) for name in ("weight", "gradient", "moment1", "average")}
    values["moment2"] = rng.random(length) * 10.0 ** rng.uniform(-12, 2, length)
    values["gradient"] *= 10.0 ** rng.uniform(-6, 2, length)
    return {name: value.astype(np.float32) for name, value in values.items()}


def run_updates(lengths: list[int], num_steps: int, factors: list[float]) -> list[dict[str, np.ndarray]]:
    """Return the parameters after some updates. Every second one has no decay, and the double learning rate."""
    parameters = [arrays(length, seed) for seed, length in enumerate(lengths)]
    for each in parameters:
        each |= {"power1": np.float32([BETA1]), "power2": np.float32([BETA2])}
    shared = [np.float32([value]) for value in (1e-2, 2e-2, 1.0, 0.9)]  # rates, clipping, decay of the average
    names = ("weight", "gradient", "moment1", "moment2", "power1", "power2", "average")
    described = []
    for number, length in enumerate(lengths):
        positions = {name: 4 + number * len(names) + place for place, name in enumerate(names)}
        decay = 0.0 if number % 2 else 0.3
        described.append(
            Parameter(length, decay, **positions, learning_rate=number % 2, clip_factor=2, average_decay=3)
        )
    update = AdamWUpdate(described, BETA1, BETA2, EPSILON)
    for step in range(num_steps):
        shared[2][:] = factors[step]
        for each in parameters:
            each["gradient"] = each["gradient"] * np.float32(-0.9)  # other memory in each step
        operands = [*shared, *(each[name] for each in parameters for name in names)]
        update(*(operand.ctypes.data for operand in operands))
    return parameters


def expected_after(length: int, number: int, num_steps: int, factors: list[float]) -> dict[str, np.ndarray]:
    """Return the same in float64."""
    values = {name: value.astype(np.float64) for name, value in arrays(length, number).items()}
    weight, moment1, moment2, average = (values[name] for name in ("weight", "moment1", "moment2", "average"))
    rate, decay = (2e-2, 0.0) if number % 2 else (1e-2, 0.3)
    for step in range(num_steps):
        values["gradient"] = values["gradient"] * -0.9
        clipped = factors[step] * values["gradient"]
        moment1 = BETA1 * moment1 + (1 - BETA1) * clipped
        moment2 = BETA2 * moment2 + (1 - BETA2) * clipped**2
        ratio = moment1 / (1 - BETA1 ** (step + 1)) / (np.sqrt(moment2 / (1 - BETA2 ** (step + 1))) + EPSILON)
        weight = weight - rate * decay * weight - rate * ratio
        average = weight + 0.9 * (average - weight)
    return {"weight": weight, "moment1": moment1, "moment2": moment2, "average": average}


def test_updates_equal_numpys_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """With parameters of one number, of odd lengths, and of several tiles."""
    monkeypatch.setattr(adamw, "TILE", 64)
    lengths, factors = [1, 5, 64, 65, 150], [1.0, 0.25, 1e-4]
    for number, each in enumerate(run_updates(lengths, 3, factors)):
        expected = expected_after(lengths[number], number, 3, factors)
        np.testing.assert_allclose(each["power1"], BETA1**4, rtol=1e-6)
        np.testing.assert_allclose(each["power2"], BETA2**4, rtol=1e-6)
        for name, value in expected.items():
            # Rounding relative to the largest term of each sum.
            scale = np.maximum(np.abs(value), 0.1 if name == "moment1" else 0.0 if name == "moment2" else 1.0)
            assert (np.abs(each[name] - value) <= 2e-6 * scale).all(), name


def test_decay_may_leave_nothing_of_a_weight() -> None:
    """With lr * decay = 1 the new weight is the update alone."""
    values = arrays(9, 0) | {"power1": np.float32([BETA1]), "power2": np.float32([BETA2]), "rate": np.float32([0.5])}
    values["moment1"][:], values["moment2"][:] = 0.0, 0.0
    names = ("weight", "gradient", "moment1", "moment2", "power1", "power2", "rate")
    update = AdamWUpdate([Parameter(9, 2.0, *range(7))], BETA1, BETA2, 1e-30)
    gradient = values["gradient"].copy()
    update(*(values[name].ctypes.data for name in names))
    np.testing.assert_allclose(values["weight"], -0.5 * np.sign(gradient), rtol=1e-5)


def test_the_number_of_threads_changes_no_bit() -> None:
    script = (
        "from vit_static.common.startup import prepare_process; prepare_process(); import hashlib, sys; "
        "from program.cpu.test_adamw import run_updates; "
        "parameters = run_updates([7, 1000, 70001, 300001], 2, [1.0, 0.5]); "
        "digest = hashlib.sha256(b''.join(value.tobytes() for each in parameters for value in each.values())); "
        "print(digest.hexdigest())"
    )
    folder = str(Path(__file__).parents[2])
    results = set()
    for threads in (1, 2, 3):
        environ = os.environ | {"OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "0"}
        environ["PYTHONPATH"] = os.pathsep.join([folder, environ.get("PYTHONPATH", "")])
        done = subprocess.run([sys.executable, "-c", script], env=environ, check=True, capture_output=True, text=True)
        results.add(done.stdout.split()[-1])
    assert len(results) == 1


# -- in a program ----------------------------------------------------------------------------------------------------


def update_operators(compiled) -> Counter[str]:
    return Counter(
        op.name().rstrip("0123456789").split(".")[-1] for op in compiled.global_block().ops if op.op_role == UPDATE
    )


def test_the_update_is_one_operator(make_program) -> None:
    """With clipping, the average of the weights, and several learning rates."""
    optim = OptimConfig(weight_decay=0.1, layer_decay=0.7, ema_decay=0.9, clip_norm=0.5)
    compiled = make_program(VisionTransformer(ONE_BLOCK), 8, optim).compiled("train")
    operators = update_operators(compiled)
    assert operators["vit_static_adamw_"] == 1
    assert not operators["adamw_"] and not operators["subtract"]
    assert operators["multiply"] <= 3  # learning rates of two layers, none of gradients
    assert operators["assign_out_"] == 3  # the recorded norms


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(grad_accum_steps=2)], ids=["", "micro-batches"])
def test_the_model_trains_as_with_paddles_operators(make_program, parallel: ParallelConfig) -> None:
    """Losses, weights, state and average of four steps agree within rounding; a repetition has the same bits."""
    optim = OptimConfig(lr=1e-2, epsilon=1e-3, weight_decay=0.1, layer_decay=0.7, ema_decay=0.9, clip_norm=0.5)
    results = []
    for onednn in (False, True, True):
        paddle.seed(3)
        program = make_program(
            VisionTransformer(ONE_BLOCK), 8, optim, kernels=KernelsConfig(onednn=onednn), parallel=parallel
        )
        losses = [program.loss_value(program.train_step(*images_and_labels(8, seed=step), step)) for step in range(4)]
        state = {name: np.asarray(value) for name, value in program.state().items()}
        results.append((losses, state))
    (plain_losses, plain), (losses, state), (repeated_losses, repeated) = results
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-5)
    assert state.keys() == plain.keys() and any("ema" in name for name in state)
    for name, value in state.items():
        np.testing.assert_allclose(value, plain[name], rtol=1e-3, atol=2e-5, err_msg=name)
        assert value.tobytes() == repeated[name].tobytes(), name
    assert losses == repeated_losses


@pytest.mark.parametrize("stage", [1, 3])
def test_parts_of_parameters_are_gathered_after_the_update(stage: int) -> None:
    """ZeRO: the operator updates a rank's part of each parameter, and its results are gathered."""
    recorded: list[tuple[str, list[int], list[int]]] = []
    with fake_world(0, 2), pytest.MonkeyPatch.context() as patch:

        def fuse_and_record(program) -> None:
            fuse_update(program)
            for op in program.global_block().ops:
                operands = [value.id for value in op.operands_source() if value.initialized()]
                recorded.append((op.name(), operands, [value.id for value in op.results()]))

        patch.setattr(pass_list, "fuse_update", fuse_and_record)
        with paddle.LazyGuard():
            model = VisionTransformer(ONE_BLOCK)
        optim = OptimConfig(ema_decay=0.9)
        parallel = ParallelConfig(dp=2, sharding_stage=stage)
        config = Config(
            name="sharded", model=ONE_BLOCK, data=DataConfig(global_batch_size=8), optim=optim, parallel=parallel
        )
        mesh = make_mesh(0, MeshShape(dp=2, mp=1, pp=1), "cpu")
        program = Program.for_training(
            config, model, mesh, Precision("O0", "float32"), learning_rate=lambda step: 1e-3, eval_batch_size=8
        )
        program.compiled("train")
    names = [name for name, _, _ in recorded]
    assert "pd_op.adamw_" not in names and sum("vit_static_adamw" in name for name in names) == 1
    known: set[int] = set()
    for name, operands, results in recorded:
        assert known.issuperset(operands), name
        known |= set(results)
    update = next(position for position, name in enumerate(names) if "vit_static_adamw" in name)
    assert (stage == 3) != any("all_gather" in name for name in names[update:])
