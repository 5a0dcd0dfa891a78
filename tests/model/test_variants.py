"""Shapes that the config's model section gives, and messages for those that are none."""

from __future__ import annotations

import pytest

from vit_static.common.errors import ConfigError
from vit_static.config.model_schema import ModelConfig
from vit_static.model.variants import VARIANTS, grid_of, variant_of


def test_the_message_for_an_unknown_variant_lists_all_variants() -> None:
    with pytest.raises(ConfigError) as error:
        variant_of(ModelConfig(variant="B/17"))
    assert "'B/17'" in str(error.value)
    assert all(name in str(error.value) for name in VARIANTS)


@pytest.mark.parametrize(
    ("size", "patch_size", "valid_size"),
    [
        ((225, 224), 16, [224, 224]),
        ((224, 250), 16, [224, 256]),
        ((3, 224), 16, [16, 224]),
        ((224, 224), 30, [210, 210]),
    ],
)
def test_the_message_for_an_image_size_that_patches_do_not_divide_has_a_valid_size(
    size: tuple[int, int], patch_size: int, valid_size: list[int]
) -> None:
    config = ModelConfig(image_size=size, patch_size=patch_size)
    with pytest.raises(ConfigError) as error:
        variant_of(config)
    assert str(list(size)) in str(error.value) and str(valid_size) in str(error.value)
    rows, columns = grid_of(config.model_copy(update={"image_size": tuple(valid_size)}))
    assert (rows * patch_size, columns * patch_size) == tuple(valid_size)


def test_the_message_for_heads_that_do_not_divide_the_width_has_both_numbers() -> None:
    with pytest.raises(ConfigError) as error:
        variant_of(ModelConfig(num_heads=7))
    assert "model.num_heads = 7" in str(error.value) and "768" in str(error.value)


def test_sincos_needs_a_width_divisible_by_4() -> None:
    for key in ("pos_embed", "pos_embed_init"):
        with pytest.raises(ConfigError) as error:
            variant_of(ModelConfig(width=18, num_heads=3, **{key: "sincos2d"}))
        assert "18" in str(error.value)


def test_single_keys_override_the_variant() -> None:
    variant = variant_of(ModelConfig(variant="S/16", depth=3, mlp_dim=100))
    assert (variant.depth, variant.mlp_dim) == (3, 100)
    assert (variant.patch_size, variant.width, variant.num_heads) == (16, 384, 6)
