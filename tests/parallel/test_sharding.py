"""Sharding rules and the validation of meshes, without starting processes."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import paddle
import pytest

from vit_static.common.errors import ConfigError
from vit_static.config.lora_schema import LoraConfig
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import ParallelConfig
from vit_static.model.lora import add_adapters
from vit_static.model.teacher import PROJECTOR
from vit_static.model.variants import VARIANTS, Variant
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import MeshShape, resolve_mesh, why_invalid
from vit_static.parallel.sharding import TP_SHARDING_RULES, stage_of_blocks, tp_axis, zero_shard_axis

# Configs that add parameters to those of a variant, or remove some.
KINDS = {
    "plain": {},
    "additional": {"layer_scale_init": 0.1, "representation_size": 24},
    "fewer": {"pool": "gap", "pos_embed": "sincos2d", "qkv_bias": False},
    "two heads": {"distillation_token": True},
    "norms": {"norm": "rms", "pre_norm": True, "qk_norm": True, "attention_norm": True, "mlp_norm": True},
    "rotary, gated, attention pooling": {
        **{"rope": "mixed", "mlp": "swiglu", "mlp_norm": True, "pool": "map", "qkv_bias": "qv"},
        **{"width": 48, "num_heads": 4},
    },
}
SMALL = Variant(patch_size=4, width=24, depth=3, num_heads=6, mlp_dim=54)


def parameter_shapes(variant: str, kind: str) -> dict[str, list[int]]:
    """Return the shapes of a model's parameters and of adapters of its layers, without creating them."""
    config = ModelConfig(variant=variant, image_size=VARIANTS[variant].patch_size * 3, **KINDS[kind])
    with paddle.LazyGuard():
        model = VisionTransformer(config)
        add_adapters(model, LoraConfig(rank=2))
        return {name: list(value.shape) for name, value in model.named_parameters()}


def matching_rules(name: str) -> list[str]:
    return [pattern for pattern in TP_SHARDING_RULES if re.fullmatch(pattern, name)]


# Kinds of every variant; the others need one, since each block has the same names.
OF_EVERY_VARIANT = ("plain", "additional", "fewer")


@pytest.mark.parametrize(
    ("variant", "kind"),
    [(variant, kind) for variant in VARIANTS for kind in KINDS if variant == "Ti/16" or kind in OF_EVERY_VARIANT],
)
def test_every_parameter_matches_exactly_one_rule(variant: str, kind: str) -> None:
    for name in parameter_shapes(variant, kind):
        assert len(matching_rules(name)) == 1, name


def test_every_rule_matches_a_parameter() -> None:
    names = {name for kind in KINDS for name in parameter_shapes("Ti/16", kind)} | {f"{PROJECTOR}.weight"}
    assert {rule for name in names for rule in matching_rules(name)} == set(TP_SHARDING_RULES)


def test_a_rank_has_complete_heads_and_hidden_channels() -> None:
    """Layers before attention and activation are split by columns, layers after them by rows."""
    by_columns, by_rows = ["attn.q", "attn.k", "attn.v", "mlp.fc1"], ["attn.proj", "mlp.fc2"]
    for name, shape in parameter_shapes("B/16", "additional").items():
        layer = ".".join(name.split(".")[2:-1])
        axis = len(shape) - 1 if layer in by_columns or name.startswith("head.") else None
        if name.endswith(".lora_a"):  # [inputs, rank], beside lora_b [rank, outputs]
            axis = None
        if layer in by_rows and name.endswith((".weight", ".lora_a")):
            axis = 0
        assert tp_axis(name, shape, mp=4) == axis, name
        assert tp_axis(name, shape, mp=1) is None


def test_a_head_with_an_indivisible_number_of_classes_is_replicated() -> None:
    assert tp_axis("head.weight", [24, 7], mp=2) is None and tp_axis("head.bias", [7], mp=2) is None
    assert tp_axis("head.weight", [24, 6], mp=2) == 1 and tp_axis("head.bias", [6], mp=2) == 0


@pytest.mark.parametrize(
    ("shape", "mp_axis", "mp", "dp", "axis"),
    [
        ([32, 6], None, 1, 2, 0),
        ([7, 32], None, 1, 2, 1),
        ([1, 13, 32], None, 1, 4, 2),
        ([7], None, 1, 2, None),
        ([6], None, 1, 4, None),
        ([32, 6], 1, 2, 2, 0),
        ([56, 32], 0, 2, 2, 1),  # tensor parallelism splits one of two axes
        ([6], 0, 2, 2, None),
    ],
)
def test_zero_splits_the_first_divisible_axis(shape: list, mp_axis: int, mp: int, dp: int, axis: int) -> None:
    assert zero_shard_axis(shape, mp_axis, mp, dp) == axis


@pytest.mark.parametrize(
    ("depth", "pp", "stages"),
    [(3, 1, [0, 0, 0]), (3, 2, [0, 0, 1]), (4, 4, [0, 1, 2, 3]), (8, 3, [0, 0, 0, 1, 1, 1, 2, 2])],
)
def test_blocks_are_distributed_evenly_over_stages(depth: int, pp: int, stages: list[int]) -> None:
    assert stage_of_blocks(depth, pp) == stages


HEADS_4 = replace(SMALL, num_heads=4)


@pytest.mark.parametrize(
    ("variant", "parallel", "world_size", "batch_size", "message"),
    [
        (SMALL, {"mp": 4}, 8, 24, r"parallel\.mp = 4: .* num_heads of 6 and mlp_dim of 54; .* 1, 2, 3 or 6$"),
        (HEADS_4, {"mp": 4}, 4, 24, r"parallel\.mp = 4: .* num_heads of 4 and mlp_dim of 54; .* 1 or 2$"),
        (SMALL, {"mp": 7}, 7, 24, r"parallel\.mp = 7: .* 1, 2, 3 or 6$"),
        (SMALL, {"pp": 4}, 4, 24, r"parallel\.pp = 4: .* only 3 blocks; set it to 3 or less$"),
        (SMALL, {"mp": 2}, 3, 24, r"dp = auto, mp = 2, pp = 1: .* 2 processes, .* has 3; .*NPROC=2.* product is 3$"),
        (SMALL, {"dp": 3}, 4, 6, r"dp = 3, mp = 1, pp = 1: .* 3 processes, .* has 4; .*NPROC=3.* product is 4$"),
        (SMALL, {}, 4, 6, r"data\.global_batch_size = 6: .* 4 data-parallel ranks x 1 micro-batch; .*=8$"),
        (SMALL, {"grad_accum_steps": 3}, 2, 15, r"data\.global_batch_size = 15: .* 2 .* x 3 micro-batches; .*=12$"),
        (SMALL, {"pp": 2}, 4, 6, r"data\.global_batch_size = 6: .* 2 .* x 2 micro-batches; .*=8$"),
        (SMALL, {}, 8, 3, r"data\.global_batch_size = 3: .* 8 .* x 1 micro-batch; .*=8$"),
    ],
)
def test_an_invalid_mesh_is_refused_with_the_valid_sizes(
    variant: Variant, parallel: dict, world_size: int, batch_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_mesh(ParallelConfig(**parallel), world_size, batch_size, variant)


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("mp", [1, 2, 3, 4])
@pytest.mark.parametrize("dp", ["auto", 1, 2, 3])
def test_every_named_remedy_works(dp: int | str, mp: int, pp: int) -> None:
    for world_size, batch_size, others in itertools.product(
        range(1, 9), (6, 20, 24), ({}, {"grad_accum_steps": 3}, {"sharding_stage": 1})
    ):
        config = ParallelConfig(dp=dp, mp=mp, pp=pp, **others)
        shape = MeshShape(max(world_size // (mp * pp), 1) if dp == "auto" else dp, mp, pp)
        reason = why_invalid(config, shape, world_size, batch_size, SMALL)
        if reason is None:
            assert shape.world_size == world_size
            continue
        remedy = reason.partition("; ")[2]
        if reason.startswith("parallel.mp"):
            for size in map(int, re.findall(r"\d+", remedy)):
                after = why_invalid(config, replace(shape, mp=size), world_size, batch_size, SMALL)
                assert after is None or not after.startswith("parallel.mp")
        elif reason.startswith("parallel.pp"):
            after = why_invalid(config, replace(shape, pp=SMALL.depth), world_size, batch_size, SMALL)
            assert after is None or not after.startswith("parallel.pp")
        elif reason.startswith("data.global_batch_size"):
            batch_size = int(remedy.rpartition("=")[2])
            after = why_invalid(config, shape, world_size, batch_size, SMALL)
            assert after is None or "NPROC" in after
            assert why_invalid(config, shape, shape.world_size, batch_size, SMALL) is None
        else:
            num_processes = int(re.search(r"NPROC=(\d+)", remedy)[1])
            assert resolve_mesh(config, num_processes, batch_size, SMALL) == shape


@pytest.mark.parametrize(
    ("parallel", "world_size", "shape"),
    [({}, 1, (1, 1, 1)), ({}, 4, (4, 1, 1)), ({"mp": 2}, 8, (4, 2, 1)), ({"mp": 2, "pp": 3}, 12, (2, 2, 3))],
)
def test_auto_data_parallelism_takes_the_remaining_ranks(parallel: dict, world_size: int, shape: tuple) -> None:
    assert resolve_mesh(ParallelConfig(**parallel), world_size, 24, SMALL) == MeshShape(*shape)
