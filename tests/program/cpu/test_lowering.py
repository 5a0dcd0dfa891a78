"""Programs lowered to oneDNN kernels: the same numbers from fewer and faster operators."""

from __future__ import annotations

from collections import Counter

import numpy as np
import paddle
import pytest
from helpers.small import SMALL, images_and_labels

from vit_static.bench.profile import short_name
from vit_static.config.data_schema import LossConfig
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import KernelsConfig, OptimConfig, ParallelConfig
from vit_static.model.attention import attention_by_matmul
from vit_static.model.loss import Criterion
from vit_static.model.vit import VisionTransformer
from vit_static.program.cpu import lowering
from vit_static.program.cpu.patterns import Broadcast, match_broadcast
from vit_static.program.precision import Precision

pytestmark = pytest.mark.cpu_isa


@pytest.fixture(autouse=True)
def _lower_small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_MIN_PRODUCT", 1)


PLAIN = SMALL.model_copy(update={"layer_scale_init": None, "representation_size": None})
ONE_BLOCK = PLAIN.model_copy(update={"depth": 1})
# Settings that change different operators share a program.
VARIATIONS: dict[str, ModelConfig] = {
    "plain": PLAIN,
    "layer scale, representation": SMALL,
    "pooled": ONE_BLOCK.model_copy(update={"pool": "gap"}),
    "one head, no bias in q, k, v, approximate gelu": ONE_BLOCK.model_copy(
        update={"num_heads": 1, "qkv_bias": False, "gelu": "tanh"}
    ),
    "all tokens, fixed positions": ONE_BLOCK.model_copy(
        update={"pool": "cls_gap", "register_tokens": 2, "class_token_pos_embed": False, "pos_embed": "sincos2d"}
    ),
    "norm after the pooling, one class": ONE_BLOCK.model_copy(
        update={"pool": "gap", "class_token": True, "fc_norm": True, "num_classes": 1}
    ),
    "one patch": ONE_BLOCK.model_copy(update={"patch_size": 4, "image_size": (4, 4), "pool": "gap"}),
    "rotary positions, gated MLP, RMSNorm, attention pooling, patch dropout": ONE_BLOCK.model_copy(
        update={
            **{"rope": "mixed", "qk_norm": True, "norm": "rms", "mlp": "swiglu", "pool": "map", "patch_dropout": 0.5},
            **{"attention_norm": True, "mlp_norm": True, "pre_norm": True, "qkv_bias": "qv", "register_tokens": 1},
        }
    ),
    "moved coordinates, quick gelu": ONE_BLOCK.model_copy(
        update={"rope": "axial", "rope_rescale": 2.0, "gelu": "quick", "qk_norm": True}
    ),
    "dropout": ONE_BLOCK.model_copy(update={"dropout": 0.2, "attention_dropout": 0.2, "drop_path_rate": 0.2}),
    "dropout outside attention": ONE_BLOCK.model_copy(update={"dropout": 0.2}),
}
PARALLEL = {
    "": ParallelConfig(),
    "micro-batches": ParallelConfig(grad_accum_steps=2),
    "recompute": ParallelConfig(recompute="block"),
}


def trained(make_program, config: ModelConfig, onednn: bool, **arguments):
    """Return (losses, weights, evaluation) after a few steps."""
    paddle.seed(3)
    kernels = KernelsConfig(onednn=onednn)
    optim = OptimConfig(name="sgd", lr=0.1, clip_norm=0.5)
    loss = Criterion(LossConfig(name="sigmoid" if config.num_classes == 1 else "softmax"))
    program = make_program(
        VisionTransformer(config, attention_by_matmul),
        8,
        optim,
        kernels=kernels,
        criterion=loss,
        image_size=config.image_size,
        **arguments,
    )
    losses = [program.loss_value(program.train_step(*images_and_labels(8, config, seed=n), n)) for n in range(3)]
    return np.array(losses), program.weights(), program.eval_step(*images_and_labels(8, config, seed=9))


def operators(program, mode: str = "train") -> Counter[str]:
    return Counter(short_name(op.name()) for op in program.compiled(mode).global_block().ops)


@pytest.mark.parametrize(
    ("variation", "parallel"),
    [*((variation, "") for variation in VARIATIONS), ("dropout", "micro-batches"), ("dropout", "recompute")],
)
def test_training_and_evaluation_equal_those_of_paddles_kernels(make_program, variation, parallel) -> None:
    runs = [
        trained(make_program, VARIATIONS[variation], onednn, parallel=PARALLEL[parallel]) for onednn in (False, True)
    ]
    for expected, values in zip(*((losses, evaluation) for losses, _, evaluation in runs), strict=True):
        np.testing.assert_allclose(values, expected, rtol=2e-5)
    for name, weight in runs[0][1].items():
        np.testing.assert_allclose(runs[1][1][name], weight, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.needs_bfloat16
@pytest.mark.parametrize("variation", VARIATIONS)
def test_the_first_ten_losses_in_bfloat16_are_within_a_hundredth_of_float32(make_program, variation) -> None:
    losses = {}
    for precision in (Precision("O0", "float32"), Precision("O1", "bfloat16")):
        paddle.seed(3)
        config = VARIATIONS[variation]
        program = make_program(
            VisionTransformer(config, attention_by_matmul), 8, precision=precision, image_size=config.image_size
        )
        losses[precision.level] = [
            program.loss_value(program.train_step(*images_and_labels(8, config, seed=n), n)) for n in range(10)
        ]
    np.testing.assert_allclose(losses["O1"], losses["O0"], rtol=1e-2)


def test_the_operators_of_a_block(make_program) -> None:
    """Six products forward, twelve backward, and attention; no separate transposition, cast, bias or residual."""
    paddle.seed(3)
    program = make_program(VisionTransformer(PLAIN, attention_by_matmul), 8)
    counts, depth = operators(program), 2
    in_blocks = 6 * depth  # q, k, v, the projection, fc1, fc2
    outside = 2  # the patch embedding, whose images need no gradient, and the head
    assert counts["matmul_float32"] == 3 * in_blocks + 3 * outside - 1
    assert counts["attention_float32"] == counts["attention_backward_float32"] == depth
    assert counts["gelu_float32"] == 2 * depth and counts["gelu_backward_float32"] == depth
    # The last block normalizes the class token, for its query, by itself.
    assert counts["layer_norm_float32"] == counts["layer_norm_backward_float32"] == 2 * depth + 2
    # Biases, and the two parameters that are repeated for every image: class token and position embedding.
    assert counts["column_sum_float32"] == in_blocks + outside + 2
    assert counts["transpose"] == 1  # images to patches
    absent = {"matmul", "matmul_grad", "softmax", "softmax_grad", "add_grad", "transpose_grad", "reshape_grad", "cast"}
    assert not absent & set(counts)


@pytest.mark.needs_bfloat16
def test_mixed_precision_only_casts_weights_and_residual_gradients(make_program) -> None:
    paddle.seed(3)
    program = make_program(VisionTransformer(PLAIN, attention_by_matmul), 8, precision=Precision("O1", "bfloat16"))
    counts, depth = operators(program), 2
    weights = 6 * depth + 2
    residual_gradients = 2 * depth
    outside = 4  # the patches, the head's input, and the gradients of both
    assert counts["convert"] == weights + residual_gradients + outside
    assert counts["cast"] == 0


@pytest.mark.parametrize(
    ("factor", "out", "expected"),
    [
        ([6], [2, 3, 6], Broadcast((6, 6), (1, 6), (1, 1, 6))),
        ([2, 3, 1], [2, 3, 6], Broadcast((6, 6), (6, 1), (2, 3, 1))),
        ([2, 1, 1], [2, 3, 6], Broadcast((2, 18), (2, 1), (2, 1, 1))),
        ([1, 3, 1, 4], [2, 3, 6, 4], Broadcast((2, 72), (1, 72), (1, 3, 6, 4))),  # expanded to one image's heads
        ([3, 1], [1, 3, 6], Broadcast((3, 6), (3, 1), (1, 3, 1))),
        ([2, 1, 6], [2, 3, 6], None),  # neither one row nor one column
        ([2, 3, 6], [2, 3, 6], None),
        ([1], [2, 3, 6], None),
    ],
)
def test_patterns_of_broadcast_factors(factor: list[int], out: list[int], expected: Broadcast | None) -> None:
    assert match_broadcast(factor, out) == expected


def test_broadcast_factors_activations_and_their_gradients_have_kernels(make_program) -> None:
    def kernels_of(config: ModelConfig) -> Counter[str]:
        paddle.seed(3)
        program = make_program(VisionTransformer(config, attention_by_matmul), 8).compiled("train")
        counts = Counter(operation.name() for operation in program.global_block().ops)
        left = {"swiglu", "swiglu_grad", "sigmoid", "sigmoid_grad", "multiply_grad"}
        assert not {f"pd_op.{name}" for name in left} & set(counts)
        return Counter(short_name(name) for name in counts.elements() if name.startswith("py_op."))

    # LayerScale's product also adds the residual; backward only the gradient of the branch has a broadcast factor.
    assert kernels_of(SMALL)["multiply"] == 2 * 2 + 2 * 2
    gated = kernels_of(VARIATIONS["rotary positions, gated MLP, RMSNorm, attention pooling, patch dropout"])
    assert gated["swiglu_float32"] == gated["swiglu_backward_float32"] == 2  # of the block and of the pooling head
    quick = kernels_of(VARIATIONS["moved coordinates, quick gelu"])
    assert quick["sigmoid_float32"] == quick["sigmoid_backward_float32"] == 1


def test_attention_with_rotary_positions_and_normalized_heads_is_fused(make_program) -> None:
    """And so are the pooling head's and all products."""
    paddle.seed(3)
    config = VARIATIONS["rotary positions, gated MLP, RMSNorm, attention pooling, patch dropout"]
    counts = operators(make_program(VisionTransformer(config, attention_by_matmul), 8))
    assert counts["attention_float32"] == counts["attention_backward_float32"] == 2
    assert not {"matmul", "matmul_grad", "softmax", "softmax_grad", "gelu"} & set(counts)


def test_evaluation_keeps_nothing_for_a_backward(make_program) -> None:
    paddle.seed(3)
    program = make_program(VisionTransformer(PLAIN, attention_by_matmul), 8, evaluates_only=True)
    counts = operators(program, "eval")
    assert counts["attention_float32"] == 2 and counts["matmul_float32"] == 14
    assert not {"matmul", "softmax", "gelu", "layer_norm", "attention_backward_float32"} & set(counts)
