"""A last block that computes only the tokens that the head reads, against the computation of all tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from helpers.small import REFERENCE, SMALL, images_and_labels, set_weights

from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import KernelsConfig, OptimConfig
from vit_static.model.vit import VisionTransformer

SGD = OptimConfig(name="sgd", lr=1.0, momentum=0.0, clip_norm=None)
PLAIN = {"representation_size": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "one block with a representation": {"depth": 1},
    "a norm after pooling": {**PLAIN, "fc_norm": True},
    "two heads": {**PLAIN, "distillation_token": True, "register_tokens": 1, "rope": "axial"},
    "registers that turn": {**PLAIN, "rope": "axial", "register_tokens": 4, "rope_register_base": 30.0},
    "mixed positions and more norms": {
        **{**PLAIN, "rope": "mixed", "qk_norm": True, "norm": "rms", "attention_norm": True, "mlp_norm": True},
        **{"mlp": "swiglu", "qkv_bias": "qv"},
    },
}


def both_models(config: ModelConfig) -> tuple[VisionTransformer, VisionTransformer]:
    """Return a model that computes what is read and one that computes all, in float64, with the same random weights."""
    models = [VisionTransformer(config.model_copy(update={"compute_unread_tokens": each})) for each in (False, True)]
    rng = np.random.default_rng(3)
    values = {name: 0.4 * rng.standard_normal(each.shape) for name, each in models[0].named_parameters()}
    for model in models:
        model.to(dtype="float64")
        for name, parameter in model.named_parameters():
            parameter.set_value(values[name] + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return models[0], models[1]


@pytest.mark.parametrize("changed", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_every_gradient_are_those_of_all_tokens(changed: dict[str, Any]) -> None:
    """In float64, where rounding is far below any error; rotary positions and RMSNorm compute in float32."""
    config = SMALL.model_copy(update=changed)
    images, labels = images_and_labels(3, config)
    tolerance = 1e-5 if config.rope != "none" else 1e-12
    logits, gradients = [], []
    for model in both_models(config):
        outputs = model(images.astype("float64"))
        paddle.nn.functional.cross_entropy(outputs, labels).backward()
        logits.append(outputs.numpy())
        gradients.append({name: each.grad.numpy() for name, each in model.named_parameters()})
    np.testing.assert_allclose(*logits, rtol=tolerance, atol=tolerance * np.abs(logits[1]).max())
    for name, expected in gradients[1].items():
        # The gradient of the keys' bias is 0 but for rounding, since softmax ignores what all keys share.
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(gradients[0][name], expected, atol=tolerance * scale, err_msg=name)
        assert np.abs(expected).max() > 1e-6 or name.endswith("attn.k.bias"), name


def test_the_last_block_computes_only_what_is_read() -> None:
    shapes: dict[str, list[int]] = {}
    config = SMALL.model_copy(update={**PLAIN, "distillation_token": True, "register_tokens": 2})
    model = VisionTransformer(config)
    for name, layer in model.named_sublayers():
        if isinstance(layer, paddle.nn.Linear):
            layer.register_forward_post_hook(
                lambda layer, inputs, output, name=name: shapes.__setitem__(name, output.shape[:-1])
            )
    model(images_and_labels(3, config)[0])
    num_tokens = 2 + 2 + 3 * 4
    for layer in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert shapes[f"blocks.0.{layer}"] == [3, num_tokens]
        assert shapes[f"blocks.1.{layer}"] == [3, num_tokens if layer in ("attn.k", "attn.v") else 2]


def test_gradients_of_the_computation_of_all_tokens_match_torch(make_program, kernels) -> None:
    """Of every parameter, in float64; test_vit.py compares those of the default with the same file."""
    golden = np.load(REFERENCE / "vit_gradients.npz")
    weights = {name.removeprefix("param/"): golden[name] for name in golden if name.startswith("param/")}
    model = VisionTransformer(SMALL.model_copy(update={"compute_unread_tokens": True}))
    set_weights(model, weights)
    program = make_program(model, 3, SGD, kernels=kernels)
    program.train_step(paddle.to_tensor(golden["images"]), paddle.to_tensor(golden["labels"]), 0)
    after = program.weights()
    for name, before in weights.items():
        expected = golden[f"grad/{name}"].astype(np.float64)
        got = before.astype(np.float64) - after[name]
        assert np.abs(got - expected).max() < 3e-7 + 1e-4 * np.linalg.norm(expected), name


@pytest.mark.cpu_isa
def test_attention_of_one_query_is_fused_on_cpus(make_program) -> None:
    """One operator per block and direction, none of Paddle's softmax, with scores [B, H, 1, N] in the last block."""
    model = VisionTransformer(SMALL.model_copy(update={"rope": "axial", "qk_norm": True}))
    program = make_program(model, 3, SGD, kernels=KernelsConfig(onednn=True)).compiled("train")
    operators = list(program.global_block().ops)
    names = [operator.name() for operator in operators]
    forward = [name for name in names if name.startswith("py_op.vit_static_attention_float32")]
    backward = [name for name in names if name.startswith("py_op.vit_static_attention_backward")]
    assert (len(forward), len(backward)) == (2, 2)
    assert not any("softmax" in name and "attention" not in name and "log" not in name for name in names)
    num_queries = sorted(
        operator.result(0).shape[1]
        for operator in operators
        if operator.name().startswith("py_op.vit_static_attention_float32")
    )
    assert num_queries == [1, 13]


def test_dropout_has_the_same_distribution() -> None:
    """Mean and deviation of the logits of 6,000 equal images: each element of a token still has a mask of its own."""
    dropped = {"dropout": 0.2, "attention_dropout": 0.2, "drop_path_rate": 0.2, "drop_path_schedule": "constant"}
    config = SMALL.model_copy(update={**PLAIN, **dropped, "depth": 1})
    image = images_and_labels(1, config)[0].expand([6000, -1, -1, -1])
    logits = []
    for model in both_models(config):
        paddle.seed(5)
        model.to(dtype="float32")
        with paddle.no_grad():
            logits.append(model(image).numpy().astype(np.float64))
    (mean, deviation), (expected_mean, expected_deviation) = ((each.mean(0), each.std(0)) for each in logits)
    assert (expected_deviation > 0.1).all()
    assert (np.abs(mean - expected_mean) < 5 * expected_deviation * (2 / 6000) ** 0.5).all()
    np.testing.assert_allclose(deviation, expected_deviation, rtol=0.06)


@pytest.mark.parametrize("pool", ["gap", "cls_gap", "map"])
def test_other_pooling_computes_all_tokens(pool: str) -> None:
    config = SMALL.model_copy(update={"pool": pool, "register_tokens": 2})
    assert VisionTransformer(config).read_tokens is None
    assert VisionTransformer(SMALL).read_tokens == slice(0, 1)


def test_weights_and_initial_values_are_the_same() -> None:
    states = []
    for computes_all in (False, True):
        paddle.seed(1)
        states.append(VisionTransformer(SMALL.model_copy(update={"compute_unread_tokens": computes_all})).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all((states[0][name].numpy() == value.numpy()).all() for name, value in states[1].items())
