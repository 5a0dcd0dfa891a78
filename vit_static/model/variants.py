"""Named model sizes (B/16, L/16, ...) and the shapes that follow from a config."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vit_static.common.errors import ConfigError
from vit_static.config.schema import ModelConfig
from vit_static.model.flops import Shape


@dataclass(frozen=True)
class Variant:
    """The shape of one published ViT, the image and the head left open."""

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int


VARIANTS: dict[str, Variant] = {
    "Ti/16": Variant(16, 192, 12, 3, 768),
    "S/16": Variant(16, 384, 12, 6, 1536),
    "S/32": Variant(32, 384, 12, 6, 1536),
    "B/16": Variant(16, 768, 12, 12, 3072),
    "B/32": Variant(32, 768, 12, 12, 3072),
    "L/16": Variant(16, 1024, 24, 16, 4096),
    "L/32": Variant(32, 1024, 24, 16, 4096),
    "H/14": Variant(14, 1280, 32, 16, 5120),
    "g/14": Variant(14, 1408, 40, 16, 6144),
    "G/14": Variant(14, 1664, 48, 16, 8192),
    "6B/14": Variant(14, 2320, 80, 16, 11495),
}


def variant_of(config: ModelConfig) -> Variant:
    """The config's variant with the keys that override it. Raises ConfigError for what no ViT can be."""
    if config.variant not in VARIANTS:
        raise ConfigError(f"model.variant = {config.variant!r}: there are {', '.join(VARIANTS)}")
    named = asdict(VARIANTS[config.variant])
    variant = Variant(**{key: getattr(config, key) or value for key, value in named.items()})
    height, width = config.image_size
    patch = variant.patch_size
    if height % patch or width % patch:
        sizes = [max(round(side / patch), 1) * patch for side in (height, width)]
        raise ConfigError(
            f"model.image_size = {[height, width]}: patches of {patch} pixels don't tile it; {sizes} would do"
        )
    if variant.width % variant.num_heads:
        raise ConfigError(
            f"model.num_heads = {variant.num_heads}: doesn't divide the width of {variant.width}; set another"
        )
    if "sincos2d" in (config.pos_embed, config.pos_embed_init) and variant.width % 4:
        raise ConfigError(f"model.pos_embed: sincos2d wants a width that 4 divides, not {variant.width}")
    return variant


def grid_of(config: ModelConfig) -> tuple[int, int]:
    """Rows and columns of patches."""
    patch_size = variant_of(config).patch_size
    return config.image_size[0] // patch_size, config.image_size[1] // patch_size


def shape_of(config: ModelConfig) -> Shape:
    """What the model's operations are counted from."""
    variant, (rows, columns) = variant_of(config), grid_of(config)
    return Shape(
        num_patches=rows * columns,
        num_tokens=rows * columns + config.num_prefix_tokens,
        patch_dim=3 * variant.patch_size**2,
        width=variant.width,
        depth=variant.depth,
        mlp_dim=variant.mlp_dim,
        num_classes=config.num_classes,
        representation_size=config.representation_size,
        num_pooled=2 if config.pool == "cls_gap" else 1,
    )
