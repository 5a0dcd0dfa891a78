"""Training on images of several sizes: the step of each size, and the variables that the programs share."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.small import SMALL, images_and_labels

from vit_static.checkpoint.sharded_state import ShardedReader, write_shard
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import KernelsConfig, OptimConfig, PosEmbedResampling
from vit_static.model.draws import ImageSize, at_size
from vit_static.model.pos_embed import resample_pos_embed, resampling_matrix
from vit_static.model.vit import VisionTransformer
from vit_static.program.program import Program
from vit_static.weights.load import file_state

ONE_BLOCK = SMALL.model_copy(update={"depth": 1})  # 12 x 16 pixels in patches of 4
OTHER_SIZE = (20, 8)
BATCH_SIZE = 8
SGD = OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=None)


def gradients(program: Program, config: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the gradients of a step of SGD on images of the other size, by the names of the files."""
    program.prepare_training(OTHER_SIZE)
    program.set_weights(weights)
    program.train_step(*images_and_labels(BATCH_SIZE, at_size(config, OTHER_SIZE), seed=1), 0)
    return {name: weights[name].astype(np.float64) - value for name, value in program.weights().items()}


@pytest.mark.parametrize(
    ("mode", "changed", "onednn"),
    [
        ("bicubic", {"distillation_token": True, "representation_size": None}, False),
        ("bilinear", {"register_tokens": 2, "pool": "cls_gap"}, True),
        ("antialias", {"pool": "gap", "rope": "axial", "rope_grid": (2, 3)}, False),
        ("bicubic", {"class_token_pos_embed": False, "rope": "axial", "rope_jitter": 1.5}, True),
        ("bicubic", {"pos_embed": "sincos2d", "rope": "mixed"}, False),
    ],
)
def test_the_step_at_another_size_is_that_of_a_model_of_this_size_with_resampled_positions(
    make_program: Any, mode: PosEmbedResampling, changed: dict[str, Any], onednn: bool
) -> None:
    """The gradient of the positions is the transposed resampling, in float64, of those at the other size."""
    config = ONE_BLOCK.model_copy(update=changed)
    paddle.seed(3)
    weights = file_state(VisionTransformer(config))
    rng = np.random.default_rng(0)
    for value in weights.values():
        value += 0.1 * rng.standard_normal(value.shape).astype(np.float32)
    grid, other_grid = (3, 4), (5, 2)
    resampled = dict(weights)
    if config.pos_embed == "learn":
        resampled["pos_embed"] = resample_pos_embed(weights["pos_embed"], grid, other_grid, mode)
    kernels = KernelsConfig(onednn=onednn)
    of_this_size = VisionTransformer(at_size(config, OTHER_SIZE))
    program = make_program(of_this_size, BATCH_SIZE, SGD, image_size=OTHER_SIZE, kernels=kernels)
    expected = gradients(program, config, resampled)
    model = VisionTransformer(config)
    model.pos_embed_resampler.mode = mode
    with paddle.static.scope_guard(paddle.static.Scope()):
        program = make_program(model, BATCH_SIZE, SGD, train_image_size=OTHER_SIZE, kernels=kernels)
        computed = gradients(program, config, weights)
    if config.pos_embed == "learn":
        prefix = weights["pos_embed"].shape[1] - 12
        of_table = expected["pos_embed"][0, prefix:].reshape(5, 2, -1)
        rows, columns = (resampling_matrix(old, new, mode) for old, new in zip(grid, other_grid, strict=True))
        of_table = np.einsum("ri,cj,rck->ijk", rows, columns, of_table).reshape(1, 12, -1)
        expected["pos_embed"] = np.concatenate([expected["pos_embed"][:, :prefix], of_table], axis=1)
    assert computed.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(computed[name], gradient, rtol=1e-3, atol=2e-6, err_msg=name)


def state_of(program: Program) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in program.shard().arrays.items()}


def test_training_resumes_in_each_size_and_at_the_border_with_the_same_bits(make_program: Any, tmp_path: Path) -> None:
    """With a moving average, dropout and patch dropout; the sizes end with the first one again, as after a rollback."""
    config = ONE_BLOCK.model_copy(
        update={"dropout": 0.1, "drop_path_rate": 0.2, "patch_dropout": 0.5, "rope": "axial", "pos_embed": "sincos2d"}
    )
    sizes: list[ImageSize] = [(20, 8), (20, 8), (12, 16), (12, 16), (20, 8)]

    def make() -> Program:
        paddle.seed(3)
        rates = {"learning_rate": lambda step: 1e-3 * (step + 1), "seed": 5}
        sized = {"train_image_size": sizes[0], "image_size_varies": True}
        return make_program(VisionTransformer(config), BATCH_SIZE, OptimConfig(ema_decay=0.9), **rates, **sized)

    def steps(program: Program, start: int) -> list[float]:
        losses = []
        for step in range(start, len(sizes)):
            if program is uninterrupted:
                write_shard(program.shard(), tmp_path / f"{step}.safetensors", {})
            images, labels = images_and_labels(BATCH_SIZE, at_size(config, sizes[step]), seed=step)
            losses.append(program.loss_value(program.train_step(images, labels, step)))
        return losses

    uninterrupted = make()
    losses = steps(uninterrupted, 0)
    state = state_of(uninterrupted)
    evaluation = uninterrupted.eval_step(*images_and_labels(BATCH_SIZE, config, seed=9))
    for start in (1, 2, 3):
        with paddle.static.scope_guard(paddle.static.Scope()):
            program = make()
            program.restore(ShardedReader([tmp_path / f"{start}.safetensors"]))
            assert steps(program, start) == losses[start:]
            assert state_of(program) == state
            np.testing.assert_array_equal(program.eval_step(*images_and_labels(BATCH_SIZE, config, seed=9)), evaluation)


def test_the_variables_stay_where_they_are_when_the_size_changes(make_program: Any) -> None:
    """Nothing is copied: the next program finds them by their names. The learning rate is that of the step."""
    config = ONE_BLOCK
    program = make_program(
        VisionTransformer(config), BATCH_SIZE, OptimConfig(), train_image_size=(8, 8), image_size_varies=True,
        learning_rate=lambda step: float(step + 1),
    )  # fmt: skip
    program.prepare_training((8, 8))
    assert program.compile_seconds > 0.0
    program.train_step(*images_and_labels(BATCH_SIZE, at_size(config, (8, 8))), 0)
    scope, state = paddle.static.global_scope(), state_of(program)
    variables = program._state._variables.values()
    pointers = [scope.find_var(name).get_tensor()._ptr() for name in variables]
    last_executor = weakref.ref(program._built["train"][0])
    program.prepare_training((12, 16))
    assert last_executor() is None  # and with it the memory of its steps
    assert state_of(program) == state
    assert [scope.find_var(name).get_tensor()._ptr() for name in variables] == pointers
    program.train_step(*images_and_labels(BATCH_SIZE, config), 1)
    assert all(array.tobytes() != state[name] for name, array in program.shard().arrays.items() if "moment1" in name)


def test_a_program_for_one_size_is_the_same_as_without_the_option(make_program: Any) -> None:
    """At the model's own size the compiled program has the same operators, and its steps give the same bits."""
    results = []
    for varies in (False, True):
        with paddle.static.scope_guard(paddle.static.Scope()):
            paddle.seed(3)
            program = make_program(VisionTransformer(ONE_BLOCK), BATCH_SIZE, SGD, image_size_varies=varies)
            program.train_step(*images_and_labels(BATCH_SIZE), 0)
            names = [op.name() for op in program.compiled("train").global_block().ops]
            results.append((names, state_of(program)))
    assert results[0] == results[1]
