"""Named model sizes (B/16, L/16, ...) and the dimensions that follow from a config."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from vit_static.common.errors import ConfigError
from vit_static.common.terminal import print_table, with_words
from vit_static.config.lora_schema import LoraConfig
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import TrainConfig
from vit_static.model.flops import Shape, forward_macs, train_flops


@dataclass(frozen=True)
class Variant:
    """Dimensions of a ViT, except for those of its images and its head."""

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
    """Return the config's variant, with the keys that override it. Raises ConfigError if no such ViT exists."""
    if config.from_ == "init":  # weights/infer.py replaces it where weights are read
        raise ConfigError("model.from = 'init': no weights are read here; set model.from=config and model.variant")
    if config.variant not in VARIANTS:
        raise ConfigError(
            f"model.variant = {config.variant!r}: is unknown; set one of {', '.join(VARIANTS)}"
            f"{_similar_variant(config.variant)}"
        )
    named = asdict(VARIANTS[config.variant])
    if config.mlp == "swiglu":  # 2/3 of the width, for three matrices instead of two; as DINOv2 rounds it
        named["mlp_dim"] = math.ceil(named["mlp_dim"] * 2 // 3 / 8) * 8
    variant = Variant(**{key: getattr(config, key) or value for key, value in named.items()})
    nearest = _nearest_size(config.image_size, variant.patch_size)
    if nearest is not None:
        raise ConfigError(
            f"model.image_size = {[*config.image_size]}: can't be divided into patches of {variant.patch_size} pixels; "
            f"set model.image_size={nearest}"
        )
    if variant.width % variant.num_heads:
        raise ConfigError(
            f"model.num_heads = {variant.num_heads}: must divide the width of {variant.width}; "
            "set another model.num_heads or model.width"
        )
    head_dim = variant.width // variant.num_heads
    if config.rope != "none" and head_dim % 4:
        raise ConfigError(
            f"model.rope = {config.rope!r}: needs a multiple of 4 channels per head, not {head_dim}; set another "
            "model.num_heads or model.width"
        )
    if "sincos2d" in (config.pos_embed, config.pos_embed_init) and variant.width % 4:
        key = "pos_embed" if config.pos_embed == "sincos2d" else "pos_embed_init"
        raise ConfigError(
            f"model.{key} = 'sincos2d': needs a width that is a multiple of 4, not {variant.width}; set model.width"
        )
    return variant


def _nearest_size(image_size: tuple[int, int], patch_size: int) -> list[int] | None:
    """Return the nearest size that can be divided into patches, or None if this one can."""
    nearest = [max(round(side / patch_size), 1) * patch_size for side in image_size]
    return None if nearest == [*image_size] else nearest


def check_image_sizes(config: ModelConfig, sizes: Iterable[tuple[int, int]], key: str) -> None:
    """Raise ConfigError, which names the key or option, for a size that can't be divided into patches."""
    patch_size = variant_of(config).patch_size
    for size in sizes:
        nearest = _nearest_size(size, patch_size)
        if nearest is not None:
            raise ConfigError(
                f"{key}: images of {size[0]}x{size[1]} can't be divided into patches of {patch_size} pixels; set "
                f"{nearest[0] if nearest[0] == nearest[1] else nearest}"
            )


def largest_train_size(config: ModelConfig, train: TrainConfig) -> tuple[int, int]:
    """Return the size of the training images with most pixels. Raises ConfigError for one that has no whole patches."""
    check_image_sizes(config, train.sizes, "train.image_sizes")
    return max(train.sizes or [config.image_size], key=math.prod)


def _similar_variant(name: str) -> str:
    by_lower_case = {each.lower(): each for each in VARIANTS}
    similar = difflib.get_close_matches(name[:100].lower().replace("-", "/"), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[similar[0]]}?" if similar else ""


def model_name(config: ModelConfig) -> str:
    """Return "ViT S/16", or only "ViT" if the config changes a dimension of the variant that it names."""
    return f"ViT {config.variant}" if variant_of(config) == VARIANTS[config.variant] else "ViT"


def print_variants(image_size: int, num_classes: int, words: Sequence[str] = ()) -> None:
    """Print all variants with their dimensions, parameters and operations for square images of `image_size` pixels.

    The operations are those of blocks that compute all tokens, as publications count them. For the patches of 14 pixels
    the size is rounded to a multiple of 14. `words`: print only the variants whose names have all of them. Raises
    UserError if there are none.
    """
    rows = []
    names = [
        name
        for (name,) in with_words(
            [(name,) for name in VARIANTS], words, "variant", f"the variants are {', '.join(VARIANTS)}"
        )
    ]
    for name, variant in ((name, VARIANTS[name]) for name in names):
        side = max(round(image_size / variant.patch_size), 1) * variant.patch_size
        model = ModelConfig(variant=name, image_size=(side, side), num_classes=num_classes)
        size = (
            f"{num_parameters(model) / 1e6:,.1f} M",
            f"{2 * forward_macs(shape_of(model).with_all_tokens) / 1e9:,.1f}",
        )
        dimensions = variant.width, variant.depth, variant.num_heads, variant.mlp_dim
        rows.append((name, *size, *dimensions, variant.patch_size, side))
    headers = ("Variant", "Parameters", "GFLOP per image", "Width", "Depth", "Heads", "MLP", "Patch", "Image")
    print_table(headers, rows, right=range(1, len(headers)))


def require_head(config: ModelConfig) -> None:
    """Raise ConfigError for a model without a head, which has no loss."""
    if config.num_classes == 0:
        raise ConfigError(
            "model.num_classes = 0: a model without a head can't be trained or evaluated, only exported and drawn; set "
            "model.num_classes"
        )


def grid_of(config: ModelConfig) -> tuple[int, int]:
    """Return the rows and columns of patches."""
    patch_size = variant_of(config).patch_size
    return config.image_size[0] // patch_size, config.image_size[1] // patch_size


def num_kept_patches(config: ModelConfig) -> int:
    """Return how many patches of each image remain in training."""
    rows, columns = grid_of(config)
    return max(int(rows * columns * (1.0 - config.patch_dropout)), 1)


def shape_of(config: ModelConfig) -> Shape:
    """Return the dimensions from which `flops` counts the model's operations."""
    variant, (rows, columns) = variant_of(config), grid_of(config)
    return Shape(
        num_patches=rows * columns,
        num_tokens=rows * columns + config.num_prefix_tokens,
        patch_dim=config.num_channels * variant.patch_size**2,
        width=variant.width,
        depth=variant.depth,
        mlp_dim=variant.mlp_dim,
        num_classes=config.num_classes,
        representation_size=config.representation_size if config.num_classes else None,
        num_pooled=2 if config.pool == "cls_gap" or config.distillation_token else 1,
        num_kept_patches=num_kept_patches(config),
        num_mlp_products=3 if config.mlp == "swiglu" else 2,
        pools_by_attention=config.pool == "map",
        num_read_tokens=config.num_read_tokens,
    )


def step_flops(
    config: ModelConfig,
    teacher: ModelConfig | None = None,
    lora: LoraConfig | None = None,
    *,
    counts_all_tokens: bool = False,
) -> int:
    """Return the operations of a training step per image: the model's, and the forward pass of a teacher.

    `counts_all_tokens`: as if the last block computed all tokens.
    """
    shapes = [shape_of(each) for each in (config, teacher) if each is not None]
    if counts_all_tokens:
        shapes = [shape.with_all_tokens for shape in shapes]
    return train_flops(shapes[0], lora) + sum(2 * forward_macs(shape) for shape in shapes[1:])


def num_parameters(config: ModelConfig) -> int:
    """Return the number of elements of all parameters, without creating them. Raises ConfigError as `variant_of`."""
    shape, variant = shape_of(config), variant_of(config)
    width, pooled_width = shape.width, shape.num_pooled * shape.width
    per_channel = 2 if config.norm == "layer" else 1  # of a norm
    norm = per_channel * width
    embedding = (shape.patch_dim + int(not config.pre_norm) + config.num_prefix_tokens) * width
    if config.pos_embed == "learn":
        embedding += (config.num_prefix_positions + shape.num_patches) * width
    num_biases = {True: 4, "qv": 3, False: 1}[config.qkv_bias]
    attention = 4 * width**2 + num_biases * width
    mlp = shape.num_mlp_products * width * shape.mlp_dim + (shape.num_mlp_products - 1) * shape.mlp_dim + width
    mlp += per_channel * shape.mlp_dim if config.mlp_norm else 0
    block = attention + mlp + 2 * norm
    block += norm if config.attention_norm else 0
    block += 2 * per_channel * (width // variant.num_heads) if config.qk_norm else 0
    block += 2 * width // 2 * int(config.rope == "mixed")
    block += 0 if config.layer_scale_init is None else 2 * width
    last = per_channel * (pooled_width if config.fc_norm else width) + (norm if config.pre_norm else 0)
    if config.pool == "map":
        last += width + attention + norm + mlp
    head = _num_head_parameters(shape) + (shape.num_classes if config.distillation_token else 0)  # a second bias
    return embedding + shape.depth * block + last + head


def _num_head_parameters(shape: Shape) -> int:
    if not shape.num_classes:
        return 0
    pooled_width = shape.num_pooled * shape.width
    head = ((shape.representation_size or pooled_width) + 1) * shape.num_classes
    return head + ((pooled_width + 1) * shape.representation_size if shape.representation_size is not None else 0)
