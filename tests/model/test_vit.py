"""The model, against closed forms, NumPy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from helpers.numpy_vit import logits as numpy_logits
from helpers.small import REFERENCE, SMALL, images_and_labels, set_weights
from reference import closed_form

from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import KernelsConfig, OptimConfig
from vit_static.model.layers import DropPath
from vit_static.model.pos_embed import resample_pos_embed, sincos2d_pos_embed
from vit_static.model.variants import VARIANTS, num_parameters, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.program.precision import Precision
from vit_static.weights.load import file_state
from vit_static.weights.state import fuse_qkv, split_qkv


def randomized_model(config: ModelConfig, seed: int = 0):
    """Return a model whose weights are all random: initialization would leave some at 0 or 1."""
    model = VisionTransformer(config)
    rng = np.random.default_rng(seed)
    for name, value in model.state_dict().items():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value.set_value((mean + 0.2 * rng.standard_normal(value.shape)).astype(np.float32))
    model.eval()
    return model


def count_parameters(model: paddle.nn.Layer) -> int:
    return sum(int(np.prod(parameter.shape)) for parameter in model.parameters())


# From the tests of vit_jax. For the other variants, the test sums up the shapes of the layers.
PUBLISHED = {"S/16": 22_050_664, "B/16": 86_567_656, "L/16": 304_326_632, "H/14": 632_045_800}


def sum_of_layer_shapes(name: str) -> int:
    patch, width, depth, _, mlp = (getattr(VARIANTS[name], key) for key in VARIANTS[name].__dataclass_fields__)
    tokens = (224 // patch) ** 2 + 1
    norms = 2 * 2 * width
    attention = 4 * (width * width + width)
    block = norms + attention + 2 * width * mlp + mlp + width
    return (3 * patch**2 + 1) * width + width + tokens * width + depth * block + 2 * width + 1000 * (width + 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name: str) -> None:
    with paddle.LazyGuard():  # shapes without values, which for 6B/14 would need 24 GB
        counted = count_parameters(VisionTransformer(ModelConfig(variant=name)))
    assert counted == PUBLISHED.get(name, sum_of_layer_shapes(name))
    assert sum_of_layer_shapes(name) == counted == num_parameters(ModelConfig(variant=name))


@pytest.mark.parametrize(
    "changed",
    [
        {"pos_embed": "sincos2d", "pool": "gap"},
        {"register_tokens": 3, "layer_scale_init": 1e-5, "qkv_bias": False, "num_channels": 1},
        {"pool": "cls_gap", "fc_norm": True, "representation_size": 20, "class_token_pos_embed": False},
        {"num_classes": 0, "pool": "cls_gap", "representation_size": 20},
    ],
)
def test_parameter_counts_of_options(changed: dict[str, Any]) -> None:
    config = SMALL.model_copy(update=changed)
    assert num_parameters(config) == count_parameters(VisionTransformer(config))


def test_every_variant_is_pinned() -> None:
    """Dimensions as in the papers' tables; a variant that isn't listed here makes the test fail."""
    assert {name: (v.patch_size, v.width, v.depth, v.num_heads, v.mlp_dim) for name, v in VARIANTS.items()} == {
        "Ti/16": (16, 192, 12, 3, 768),
        "S/16": (16, 384, 12, 6, 1536),
        "S/32": (32, 384, 12, 6, 1536),
        "B/16": (16, 768, 12, 12, 3072),
        "B/32": (32, 768, 12, 12, 3072),
        "L/16": (16, 1024, 24, 16, 4096),
        "L/32": (32, 1024, 24, 16, 4096),
        "H/14": (14, 1280, 32, 16, 5120),
        "g/14": (14, 1408, 40, 16, 6144),
        "G/14": (14, 1664, 48, 16, 8192),
        "6B/14": (14, 2320, 80, 16, 11495),
    }


@pytest.mark.parametrize("representation_size", [None, 20], ids=["plain head", "representation"])
@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_logits_match_the_equations(pool, representation_size) -> None:
    config = SMALL.model_copy(update={"pool": pool, "representation_size": representation_size})
    model = randomized_model(config)
    images, _ = images_and_labels(4)
    expected = numpy_logits(file_state(model), images.numpy(), patch_size=4, num_heads=3)
    np.testing.assert_allclose(model(images).numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_logits_without_layer_scale_and_qkv_bias() -> None:
    model = randomized_model(SMALL.model_copy(update={"layer_scale_init": None, "qkv_bias": False}))
    images, _ = images_and_labels(2)
    expected = numpy_logits(file_state(model), images.numpy(), patch_size=4, num_heads=3)
    np.testing.assert_allclose(model(images).numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_parameter_names_in_files_are_those_of_plsc() -> None:
    config = SMALL.model_copy(update={"layer_scale_init": None, "depth": 1})
    state = file_state(VisionTransformer(config))
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *(f"blocks.0.{layer}" for layer in block), "norm", "head0", "head"]
    assert set(state) == {"cls_token", "pos_embed"} | {
        f"{layer}.{part}" for layer in layers for part in ("weight", "bias")
    }
    assert state["patch_embed.proj.weight"].shape == (24, 3, 4, 4)
    assert state["blocks.0.attn.qkv.weight"].shape == (24, 72)
    assert state["cls_token"].shape == (1, 1, 24)
    assert state["pos_embed"].shape == (1, 1 + 3 * 4, 24)


def test_split_qkv_inverts_fuse_qkv() -> None:
    state = {name: value.numpy() for name, value in randomized_model(SMALL).state_dict().items()}
    again = split_qkv(fuse_qkv(state))
    assert set(again) == set(state)
    assert all(np.array_equal(again[name], state[name]) for name in state)


def test_initial_weights_are_distributed_as_in_plsc() -> None:
    """Maximum and standard deviation, estimated from the 590,000 elements of a matrix of B/16."""
    paddle.seed(0)
    model = VisionTransformer(ModelConfig(variant="B/16", depth=1, representation_size=768, head_bias_init=-10.0))
    state = file_state(model)

    def limit(fan_in: int, fan_out: int) -> float:
        return (6.0 / (fan_in + fan_out)) ** 0.5

    for name, fans in {
        "blocks.0.attn.qkv.weight": (768, 3 * 768),
        "blocks.0.attn.proj.weight": (768, 768),
        "blocks.0.mlp.fc1.weight": (768, 3072),
        "blocks.0.mlp.fc2.weight": (3072, 768),
        "head0.weight": (768, 768),
        "head.weight": (768, 1000),
    }.items():
        assert np.abs(state[name]).max() == pytest.approx(limit(*fans), rel=1e-3), name
        assert state[name].std() == pytest.approx(limit(*fans) / 3**0.5, rel=1e-2), name
    assert state["blocks.0.mlp.fc1.bias"].std() == pytest.approx(1e-6, rel=0.1)
    assert state["pos_embed"].std() == pytest.approx(0.02, rel=1e-2)
    assert not state["cls_token"].any() and not state["blocks.0.attn.qkv.bias"].any()
    assert (state["head.bias"] == -10.0).all()
    without_representation = VisionTransformer(SMALL.model_copy(update={"representation_size": None}))
    assert not without_representation.head.weight.numpy().any()


def test_drop_path_drops_entire_images_and_preserves_the_mean() -> None:
    paddle.seed(1)
    layer = DropPath(0.25)
    layer.train()
    out = layer(paddle.ones([4000, 3, 2])).numpy().reshape(4000, 6)
    assert set(np.unique(out)) == {np.float32(0.0), np.float32(1 / 0.75)}
    assert (out == out[:, :1]).all()
    assert (out[:, 0] == 0).mean() == pytest.approx(0.25, abs=0.03)
    layer.eval()
    assert (layer(paddle.ones([8, 3, 2])).numpy() == 1).all()


def test_drop_path_rises_linearly_to_the_last_block() -> None:
    model = VisionTransformer(SMALL.model_copy(update={"depth": 5, "drop_path_rate": 0.2}))
    assert [block.drop_path1.drop.p for block in model.blocks] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    constant = VisionTransformer(
        SMALL.model_copy(update={"depth": 3, "drop_path_rate": 0.2, "drop_path_schedule": "constant"})
    )
    assert [block.drop_path2.drop.p for block in constant.blocks] == [0.2] * 3


@pytest.mark.parametrize("case", ["4x4_to_6x6", "4x6_to_7x5", "8x8_to_5x5"])
def test_position_embedding_is_resampled_like_in_torch(case: str) -> None:
    golden = np.load(REFERENCE / "pos_embed.npz")
    old, new = golden[f"{case}/input"], golden[f"{case}/bicubic"]
    prefix = np.full((1, 1, 6), 7.0, np.float32)
    flat = np.concatenate([prefix, old.reshape(1, -1, 6)], axis=1)
    got = resample_pos_embed(flat, old.shape[1:3], new.shape[1:3])
    assert (got[:, :1] == prefix).all()
    np.testing.assert_allclose(got[:, 1:], new.reshape(1, -1, 6), atol=5e-6)


def test_sincos_position_embedding() -> None:
    """The reference is the formula of the paper's code, written out for single entries."""
    table = sincos2d_pos_embed((3, 5), 16, num_prefix_tokens=1)
    assert table.shape == (1, 16, 16)
    assert not table[0, 0].any()
    for row, column, k in [(0, 0, 0), (2, 4, 3), (1, 3, 1)]:
        frequency = 1.0 / 10000 ** (k / 3)
        entry = table[0, 1 + row * 5 + column]
        expected = [
            np.sin(column * frequency),
            np.cos(column * frequency),
            np.sin(row * frequency),
            np.cos(row * frequency),
        ]
        np.testing.assert_allclose(entry[[k, 4 + k, 8 + k, 12 + k]], expected, atol=1e-6)


def test_gradients_match_torch(make_program, kernels) -> None:
    """Of every parameter, through the compiled program: one SGD step with learning rate 1 subtracts the gradient."""
    golden = np.load(REFERENCE / "vit_gradients.npz")
    weights = {name.removeprefix("param/"): golden[name] for name in golden if name.startswith("param/")}
    model = VisionTransformer(SMALL)
    set_weights(model, weights)
    program = make_program(model, 3, OptimConfig(name="sgd", lr=1.0, momentum=0.0, clip_norm=None), kernels=kernels)
    loss = program.train_step(paddle.to_tensor(golden["images"]), paddle.to_tensor(golden["labels"]), 0)
    assert program.loss_value(loss) == pytest.approx(float(golden["loss"]), rel=1e-5)
    after = program.weights()
    squares = 0.0
    for name, before in weights.items():
        expected = golden[f"grad/{name}"].astype(np.float64)
        squares += (expected**2).sum()
        got = before.astype(np.float64) - after[name]
        # The subtraction loses accuracy: weights are around 1, gradients around 0.01.
        assert np.abs(got - expected).max() < 3e-7 + 1e-4 * np.linalg.norm(expected), name
    assert program.grad_norm() == pytest.approx(squares**0.5, rel=1e-4)


FLOAT32, BFLOAT16 = Precision("O0", "float32"), Precision("O1", "bfloat16")


@pytest.mark.parametrize(
    ("onednn", "precision", "tolerance"),
    [
        pytest.param(False, FLOAT32, 2e-4, id="paddle float32"),
        pytest.param(True, FLOAT32, 2e-4, id="onednn float32", marks=pytest.mark.cpu_isa),
        pytest.param(True, BFLOAT16, 2e-2, id="onednn bfloat16", marks=pytest.mark.needs_bfloat16),
    ],
)
def test_gradients_at_s16_width_match_torch(make_program, onednn, precision, tolerance) -> None:
    """Norms and projections of each gradient, at width 384 with 197 tokens.

    Paddle's own oneDNN operators give wrong results there without an error.
    """
    golden = np.load(REFERENCE / "vit_s16_gradients.npz")
    config = ModelConfig(variant="S/16", depth=1, num_classes=10)
    model = VisionTransformer(config)
    shapes = {name: value.shape for name, value in file_state(model).items()}
    weights = {name: closed_form.vit_parameter(name, shape).astype(np.float32) for name, shape in shapes.items()}
    set_weights(model, weights, config)
    program = make_program(
        model,
        2,
        OptimConfig(name="sgd", lr=100.0, momentum=0.0, clip_norm=None),
        kernels=KernelsConfig(onednn=onednn),
        precision=precision,
        image_size=(224, 224),
    )
    images = closed_form.uniform("images", (2, 3, 224, 224)).astype(np.float32)
    loss = program.train_step(paddle.to_tensor(images), paddle.to_tensor(golden["labels"]), 0)
    assert program.loss_value(loss) == pytest.approx(float(golden["loss"]), rel=tolerance / 5)
    after = program.weights()
    for name in weights:
        got = (weights[name].astype(np.float64) - after[name]) / 100.0
        norm = float(golden[f"grad_norm/{name}"])
        assert np.linalg.norm(got) == pytest.approx(norm, rel=tolerance), name
        projections = closed_form.project(name, got)
        np.testing.assert_allclose(
            projections, golden[f"grad_projection/{name}"], atol=5 * tolerance * norm, err_msg=name
        )


def test_variant_keys_can_be_overridden() -> None:
    variant = variant_of(ModelConfig(variant="S/16", depth=3, patch_size=8))
    assert (variant.patch_size, variant.width, variant.depth) == (8, 384, 3)
