"""Options of newer Vision Transformers: rotary positions, norms, gated MLPs, attention pooling, patch dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from helpers.numpy_vit import logits as numpy_logits
from helpers.numpy_vit import rotary_angles
from helpers.small import REFERENCE, images_and_labels, model_logits, set_weights
from pydantic import ValidationError
from reference import closed_form, option_cases
from reference.option_cases import COMMON, OURS

from vit_static.common.errors import ConfigError
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import OptimConfig
from vit_static.model.draws import coordinate_box, kept_tokens
from vit_static.model.layers import RMSNorm
from vit_static.model.rope import random_frequencies
from vit_static.model.variants import num_kept_patches, num_parameters, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.load import file_state


def config_of(case: str, **changed: Any) -> ModelConfig:
    """Return the config of a case of the reference file."""
    return ModelConfig.model_validate({**COMMON, **OURS[case]["keys"], **changed})


def weights_of(case: str) -> dict[str, np.ndarray]:
    return {name: closed_form.vit_parameter(name, shape) for name, shape in OURS[case]["shapes"].items()}


# -- parameter counts ------------------------------------------------------------------------------------------------

DINOV3 = {
    "num_classes": 0,
    "register_tokens": 4,
    "rope": "axial",
    "pos_embed": "none",
    "layer_scale_init": 1e-5,
    "qkv_bias": "qv",
}
EVA02 = {"num_classes": 0, "patch_size": 14, "rope": "axial", "mlp": "swiglu", "mlp_norm": True, "qkv_bias": "qv"}
VIT5 = {
    **{"norm": "rms", "qk_norm": True, "qkv_bias": False, "layer_scale_init": 1e-4, "class_token_pos_embed": False},
    **{"rope": "axial", "rope_base": 10000.0, "rope_grid": (14, 14), "register_tokens": 4, "rope_register_base": 100.0},
}
# Towers without their projections, but for the last, whose projection has no bias in CLIP's own files (timm: 512 more).
CLIP = {"num_classes": 0, "pre_norm": True}
SIGLIP = {"num_classes": 0, "pool": "map", "image_size": 256}
CLIP_AND_SIGLIP: list[tuple[dict[str, Any], int]] = [
    ({"variant": "B/32", **CLIP}, 87_456_000),
    ({"variant": "B/16", **CLIP}, 85_799_424),
    ({"variant": "L/16", "patch_size": 14, **CLIP}, 303_179_776),
    ({"variant": "H/14", **CLIP}, 630_766_080),
    ({"variant": "g/14", **CLIP}, 1_011_203_840),
    ({"variant": "G/14", **CLIP}, 1_842_777_344),
    ({"variant": "B/32", **SIGLIP}, 94_552_320),
    ({"variant": "L/16", **SIGLIP}, 315_956_224),
    ({"width": 1152, "depth": 27, "num_heads": 16, "mlp_dim": 4304, **SIGLIP}, 427_888_064),
    ({"width": 1536, "depth": 40, "num_heads": 16, "mlp_dim": 6144, **SIGLIP}, 1_163_168_256),
    ({"variant": "B/32", **CLIP, "num_classes": 512}, 87_849_216 + 512),
]
BACKBONE: dict[str, Any] = {"num_classes": 0}
SCALE: dict[str, Any] = {"layer_scale_init": 1e-5}
MEDIUM: dict[str, Any] = {"width": 512, "num_heads": 8, "mlp_dim": 2048}
NO_BIAS: dict[str, Any] = {"qkv_bias": False}
REG4_GAP: dict[str, Any] = {"register_tokens": 4, "pool": "gap", "fc_norm": True, "image_size": 256, **SCALE}
ROPE_GAP: dict[str, Any] = {
    **REG4_GAP,
    **{"register_tokens": 1, "rope": "axial", "rope_grid": (16, 16), "pos_embed": "none", "qkv_bias": "qv"},
}
# Counted on timm's models (1.0.31) without a head, or with one where classes are given; of the DINOv3 paper's table:
# 21, 29, 86, 300 and 840 million; of ViT-5's table: 22 and 87 million.
PUBLISHED: list[tuple[dict[str, Any], int]] = [
    ({"variant": "S/16", **DINOV3}, 21_596_160),
    ({"variant": "S/16", "mlp": "swiglu", "mlp_dim": 1536, **DINOV3}, 28_692_480),
    ({"variant": "B/16", **DINOV3}, 85_659_648),
    ({"variant": "L/16", **DINOV3}, 303_128_576),
    (
        {"variant": "H/14", "patch_size": 16, "num_heads": 20, "mlp": "swiglu", "mlp_dim": 5120, **DINOV3},
        840_591_360,
    ),
    ({"variant": "B/16", **EVA02}, 85_758_720),
    ({"variant": "L/16", "mlp_dim": 2730, **EVA02}, 303_268_800),
    ({"variant": "B/16", **EVA02, "patch_size": 16, "attention_norm": True, "num_classes": 512}, 86_263_040),
    ({"variant": "B/16", "pool": "map", "num_classes": 0}, 92_884_224),
    ({"variant": "B/16", "pool": "map", "num_classes": 0, "image_size": 512}, 93_520_128),
    ({"variant": "B/16", "pre_norm": True}, 86_568_424),
    *CLIP_AND_SIGLIP,
    ({"variant": "Ti/16", "distillation_token": True}, 5_910_800),
    ({"variant": "B/16", "distillation_token": True}, 87_338_192),
    ({"variant": "B/16", "rope": "mixed", "pos_embed": "none", "layer_scale_init": 1e-5}, 86_444_008),
    ({"variant": "B/16", "rope": "axial", "rope_grid": (14, 14), "pos_embed": "none", **SCALE}, 86_434_792),
    ({"variant": "B/16", **ROPE_GAP}, 86_425_576),
    (
        {"variant": "B/16", "width": 512, "depth": 20, "num_heads": 8, "mlp_dim": 2048, **ROPE_GAP, **NO_BIAS},
        63_945_704,
    ),
    ({"variant": "B/16", "width": 640, "num_heads": 10, "mlp_dim": 2560, **REG4_GAP}, 60_398_440),
    ({"variant": "B/16", "width": 320, "depth": 14, "num_heads": 5, "mlp_dim": 1792, **REG4_GAP}, 22_516_008),
    (
        {"variant": "g/14", "width": 1536, "num_heads": 24, "mlp": "swiglu", "image_size": 518, **BACKBONE, **SCALE},
        1_136_479_232,
    ),
    ({"variant": "Ti/16", **EVA02, "mlp_norm": False}, 5_502_144),
    ({"variant": "S/16", **EVA02, "mlp_norm": False}, 21_621_120),
]


@pytest.mark.parametrize(("keys", "published"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(keys: dict[str, Any], published: int) -> None:
    assert num_parameters(ModelConfig.model_validate(keys)) == published


@pytest.mark.parametrize(("variant", "millions"), [("S/16", 22), ("B/16", 87)])
def test_vit_5_has_the_size_in_its_paper(variant: str, millions: int) -> None:
    assert round(num_parameters(ModelConfig.model_validate({"variant": variant, **VIT5})) / 1e6) == millions


@pytest.mark.parametrize("case", OURS)
def test_a_model_has_the_parameters_of_its_count(case: str) -> None:
    config = config_of(case)
    model = VisionTransformer(config)
    assert {name: list(value.shape) for name, value in file_state(model).items()} == {
        name: list(shape) for name, shape in OURS[case]["shapes"].items()
    }
    assert num_parameters(config) == sum(int(np.prod(parameter.shape)) for parameter in model.parameters())


def test_the_hidden_width_of_a_gated_mlp_is_rounded_as_in_dinov2() -> None:
    """Of its giant model, 4096 for a plain MLP of 6144."""
    for variant, mlp_dim in (("g/14", 4096), ("B/16", 2048), ("L/16", 2736), ("S/16", 1024)):
        assert variant_of(ModelConfig(variant=variant, mlp="swiglu")).mlp_dim == mlp_dim


def test_the_epsilon_of_rms_norm_is_added_to_the_mean_square() -> None:
    """x / sqrt(mean(x^2) + epsilon), arXiv 1910.07467; at 0 there would be no number without it."""
    x = np.full((2, 8), 1e-3, np.float32)
    x[1] = 0.0
    values = RMSNorm(8, 1e-6)(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(values, x / np.sqrt(2e-6), rtol=1e-6)


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OURS)
def test_logits_and_gradients_match_timm(make_program, case: str) -> None:
    """Of every parameter, through the compiled program: one SGD step with learning rate 1 subtracts the gradient."""
    golden = np.load(REFERENCE / "option_gradients.npz")
    config, weights = config_of(case), weights_of(case)
    model = VisionTransformer(config)
    set_weights(model, weights, config)
    images = paddle.to_tensor(closed_form.uniform("images", (3, 3, *option_cases.IMAGE_SIZE)))
    expected = golden[f"{case}/logits"]
    np.testing.assert_allclose(model_logits(model, images), expected, atol=2e-6 * max(np.abs(expected).max(), 1.0))
    optim = OptimConfig(name="sgd", lr=1.0, momentum=0.0, clip_norm=None)
    program = make_program(model, 3, optim, image_size=config.image_size)
    loss = program.train_step(images, paddle.to_tensor(option_cases.labels()), 0)
    assert program.loss_value(loss) == pytest.approx(float(golden[f"{case}/loss"]), rel=1e-5)
    after = program.weights()
    assert after.keys() == weights.keys()
    for name, before in weights.items():
        gradient = golden[f"{case}/{name}"].astype(np.float64)
        got = before.astype(np.float64) - after[name]
        assert np.abs(got - gradient).max() < 3e-7 + 1e-4 * np.linalg.norm(gradient), name


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("dinov3", {}),
        ("dinov3", {"image_size": (20, 8)}),  # weights of one size at another
        ("eva02", {}),
        ("mixed", {}),
        ("mixed", {"rope_grid": (6, 6)}),
        ("rms", {"register_tokens": 4, "rope_register_base": 30.0}),
        ("siglip", {}),
        ("clip", {}),
    ],
)
def test_logits_match_the_equations(case: str, changed: dict[str, Any]) -> None:
    config = config_of(case, **changed)
    paddle.seed(2)
    model = VisionTransformer(config)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.set_value((mean + 0.3 * closed_form.uniform(name, parameter.shape)).astype(np.float32))
    state, (images, _) = file_state(model), images_and_labels(2, config)
    expected = numpy_logits(
        state,
        images.numpy(),
        patch_size=4,
        num_heads=3,
        angles=rotary_angles(config, state),
        gelu=config.gelu,
        epsilon=config.layer_norm_epsilon,
    )
    np.testing.assert_allclose(model_logits(model, images), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_scores_of_rotated_heads_depend_on_differences_of_positions() -> None:
    """Moving all patches by the same rows and columns changes no score between patches."""
    config = config_of("eva02", rope_grid=(3, 4), class_token=False, pool="gap")
    rope = VisionTransformer(config).blocks[0].attn.rope
    cos, sin = (table.numpy()[0, :, 0] for table in rope())
    x = closed_form.uniform("x", (2, 8))
    half = 4
    turned = [value * cos + np.roll(value, half) * sin for value in x]  # at every position
    scores = (turned[0] @ turned[1].T).reshape(3, 4, 3, 4)
    np.testing.assert_allclose(scores[0, 0, 1, 2], scores[1, 1, 2, 3], rtol=1e-5)
    np.testing.assert_allclose(scores[2, 3, 0, 1], scores[2, 2, 0, 0], rtol=1e-5)
    assert abs(scores[0, 0, 1, 2] - scores[0, 0, 2, 1]) > 1e-3


def test_mixed_frequencies_start_along_two_perpendicular_directions() -> None:
    """Their squares add up to those of the axial frequencies (arXiv 2403.13298, eq. 14 and its code)."""
    variant = variant_of(config_of("mixed"))
    rows, columns = random_frequencies(variant, 10.0, np.random.default_rng(0)).reshape(2, 3, 2, 2)
    np.testing.assert_allclose(rows**2 + columns**2, np.broadcast_to([1.0, 10.0**-1], (3, 2, 2)), rtol=1e-6)
    np.testing.assert_allclose(rows[:, 0] * rows[:, 1] + columns[:, 0] * columns[:, 1], 0.0, atol=1e-7)


# -- draws -----------------------------------------------------------------------------------------------------------


def test_patch_dropout_keeps_a_uniform_share_of_the_patches() -> None:
    config = config_of("dinov3", patch_dropout=0.75)
    assert num_kept_patches(config) == 3 and num_kept_patches(config_of("dinov3", patch_dropout=0.99)) == 1
    tokens = kept_tokens(config, np.random.default_rng(0).random((4000, 12)))
    assert tokens.shape == (4000, 5 + 3) and (tokens[:, :5] == np.arange(5)).all()
    assert (np.diff(tokens, axis=1) > 0).all() and tokens.max() == 16
    counts = np.bincount(tokens[:, 5:].ravel(), minlength=17)[5:]
    np.testing.assert_allclose(counts / 4000, 3 / 12, atol=0.03)


def test_boxes_are_shifted_and_scaled_as_in_dinov3() -> None:
    config = config_of("dinov3", rope_shift=0.2, rope_jitter=1.5, rope_rescale=2.0)
    np.testing.assert_allclose(coordinate_box(config, np.full(5, 0.5)), [[1.0, 1.0], [0.0, 0.0]])
    factor, summand = coordinate_box(config, np.array([1.0, 0.0, 1.0, 0.0, 1.0]))
    np.testing.assert_allclose(factor, [3.0, 2.0 / 1.5])
    np.testing.assert_allclose(summand, factor * [0.2, -0.2], rtol=1e-6)


@pytest.mark.parametrize("case", ["dinov3", "mixed"])
def test_a_model_trains_on_the_patches_that_remain(case: str) -> None:
    """With weights at another size: an image whose left-out patches change gives the same logits, others don't."""
    config = config_of(case, patch_dropout=0.5)
    model = VisionTransformer(config)
    set_weights(model, weights_of(case), config)
    model.train()
    draws = model.draws(2, config.image_size)
    model.draws = lambda num_images, image_size: draws
    images, _ = images_and_labels(2, config)
    kept = draws[0].tokens.numpy()[0, config.num_prefix_tokens :] - config.num_prefix_tokens
    before = model(images).numpy()
    for patch in range(12):
        changed = images.clone()
        row, column = divmod(patch, 4)
        changed[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 3.0
        after = model(changed).numpy()
        assert (np.abs(after - before)[0].max() > 1e-3) == (patch in kept)
        np.testing.assert_array_equal(after[1], before[1])


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope": "mixed", "rope_rescale": 2.0}, "rope_rescale = 2.0: changes coordinates from -1 to 1"),
        ({"rope": "axial", "rope_grid": (14, 14), "rope_shift": 0.1}, "rope_shift = 0.1"),
        ({"rope_base": 100.0}, "rope_base: without rotary positions it has no effect; set rope=axial or mixed"),
        ({"rope": "axial", "rope_register_base": 100.0, "register_tokens": 3}, "3 registers make no square grid"),
        ({"rope": "mixed", "rope_register_base": 100.0, "register_tokens": 4}, "only rope = axial rotates registers"),
        ({"class_token": False}, "pool = 'cls' reads the class token; set pool=gap or map"),
    ],
)
def test_contradicting_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig.model_validate(keys)
    assert message in str(error.value)


def test_rotary_positions_need_heads_of_a_multiple_of_4_channels() -> None:
    with pytest.raises(ConfigError, match=r"model\.rope = 'axial': needs a multiple of 4 channels per head, not 6"):
        variant_of(ModelConfig(width=24, num_heads=4, rope="axial"))
