"""Operation counts, against published figures and against the matrix products that a model executes."""

from __future__ import annotations

import math
from typing import Any

import paddle
import pytest
from helpers.small import SMALL, images_and_labels

from vit_static.common.hardware import peak_flops
from vit_static.config.model_schema import ModelConfig
from vit_static.model.attention import attention_by_matmul
from vit_static.model.flops import forward_macs, share_of_all_tokens, train_flops
from vit_static.model.patches import PatchProjection
from vit_static.model.variants import shape_of
from vit_static.model.vit import VisionTransformer


@pytest.mark.parametrize(("side", "published"), [(224, 17.58), (384, 55.54)])
def test_b16_matches_published_figures(side: int, published: float) -> None:
    """The figures are fvcore's, in GMACs, of all tokens. They include 5 per element of each LayerNorm: 0.1 %."""
    macs = forward_macs(shape_of(ModelConfig(variant="B/16", image_size=(side, side))).with_all_tokens)
    norms = 5 * (2 * 12 + 1) * ((side // 16) ** 2 + 1) * 768
    assert round((macs + norms) / 1e9, 2) == published
    assert macs == pytest.approx(1e9 * published, rel=1.01e-3)


def test_training_costs_three_forward_passes_of_two_operations_per_mac() -> None:
    shape = shape_of(ModelConfig(variant="B/16", compute_unread_tokens=True))
    assert train_flops(shape) == 6 * forward_macs(shape)
    assert train_flops(shape) == pytest.approx(6 * 17.58e9, rel=1e-3)


def executed_macs(config: ModelConfig) -> int:
    """Return the multiply-adds of one image's forward pass, by hooks: rows x inner x columns of each product."""
    products: list[tuple[int, int, int]] = []

    def attention(query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, *rest: object) -> paddle.Tensor:
        _, num_queries, num_heads, head_dim = query.shape
        products.append((num_heads * num_queries, head_dim, key.shape[1]))
        products.append((num_heads * num_queries, value.shape[1], head_dim))
        return attention_by_matmul(query, key, value, *rest)

    def record(layer: paddle.nn.Layer, inputs: tuple[paddle.Tensor, ...], output: paddle.Tensor) -> None:
        inner = inputs[0].shape[-1]
        products.append((math.prod(inputs[0].shape) // inner, inner, output.shape[-1]))

    model = VisionTransformer(config, attention)
    for layer in model.sublayers():
        if isinstance(layer, (paddle.nn.Linear, PatchProjection)):
            layer.register_forward_post_hook(record)
    model(images_and_labels(1, config)[0])
    return sum(math.prod(product) for product in products)


def test_twelve_blocks_save_seven_per_cent_where_only_the_class_token_is_read() -> None:
    """By hand: 196 of 197 tokens of the twelfth block need neither q, scores, output projection nor MLP."""
    shape, width = shape_of(ModelConfig(variant="S/16")), 384
    saved = 196 * (2 * width**2 + 2 * 197 * width + 8 * width**2)
    assert forward_macs(shape) == forward_macs(shape.with_all_tokens) - saved
    assert 1.0 - share_of_all_tokens(shape) == pytest.approx(0.07, abs=0.002)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"representation_size": None},
        {"compute_unread_tokens": True},
        {"register_tokens": 3, "mlp": "swiglu"},
        {"distillation_token": True, "representation_size": None},
        {"pool": "gap"},
        {"pool": "gap", "representation_size": None},
        {"pool": "cls_gap"},
        {"pool": "map"},
    ],
    ids=str,
)
def test_the_count_equals_the_executed_products(changed: dict[str, Any]) -> None:
    config = SMALL.model_copy(update=changed)
    assert forward_macs(shape_of(config)) == executed_macs(config)


@pytest.mark.parametrize(
    ("device_name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "float32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float16", 989e12),
        ("NVIDIA A10", "bfloat16", 125e12),
        ("NVIDIA L4", "float16", 121e12),
        ("NVIDIA L40", "float16", 181e12),
        ("NVIDIA L40S", "float16", 362e12),
        ("Tesla V100-SXM2-32GB", "float16", 125e12),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("NVIDIA RTX A1000", "bfloat16", None),  # a workstation GPU with 6.7 TFLOP/s, not an A100
        ("NVIDIA A10G", "bfloat16", None),  # slower than the A10, in some clouds
        ("NVIDIA GeForce RTX 4090", "bfloat16", None),
        ("AMD EPYC 7B13", "float32", None),
        ("", "float32", None),
    ],
)
def test_peak_flops_by_device_name(device_name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(device_name, dtype) == peak
