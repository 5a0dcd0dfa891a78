"""Architectures that this program doesn't have, recognised by the names of their arrays.

To support one of them, remove its rows; to refuse another one by name, add a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Architecture(NamedTuple):
    """An architecture other than the plain ViT of this program."""

    array: str  # pattern of the name, without prefix, of an array that only this architecture has
    description: str  # what it is and how it differs from this program's model


_BLOCK = r"(blocks|layers?|resblocks)\.\d+\."
_SWIN = "a Swin Transformer, which attends within shifted windows on several scales"

# The first row that matches decides, so an architecture stands above the parts that others have too.
UNSUPPORTED: tuple[Architecture, ...] = (
    Architecture(r"layers\.\d+\.blocks\.\d+\..*relative_position_bias_table", _SWIN),
    Architecture(r"layers\.\d+\.blocks\.\d+\.attn\.(logit_scale|cpb_mlp\..*)", _SWIN),
    Architecture(r"layers\.\d+\.downsample\.reduction\.weight", _SWIN),
    Architecture(r".*relative_position_bias_table", "BEiT, which adds a bias for relative positions to its attention"),
    Architecture(r"cls_norm\..*", "a DINOv3 with a norm of its own for the class token, and this model has one norm"),
    Architecture(
        r"blocks\.\d+\.(attn\.(gate|[qkv]_proj)\..*|attn\.[qv]_bias|gamma_[12])",
        "a relative of EVA or BEiT whose attention this model doesn't have",
    ),
    Architecture(r"attn_pool(_contrastive)?\.query", "CoCa, whose pooling has many queries and other widths"),
    Architecture(
        r"embeds\.(proj\.weight|pos_embed)", "timm's NaFlexVit; Hugging Face's files of the same SigLIP 2 can be read"
    ),
    Architecture(r"blocks_token_only\.\d+\..*", "CaiT, whose class token has blocks of its own"),
    Architecture(r"blocks\.\d+\.mlp_tokens\..*", "MLP-Mixer, which has no attention"),
    Architecture(r"stages\.\d+\.(blocks\.\d+\.conv_dw|layers\.\d+\.dwconv)\..*", "ConvNeXt, a convolutional network"),
    Architecture(r"layer[1-4]\.\d+\.conv1\.weight", "ResNet, a convolutional network"),
)


def is_residual_post_norm(names: Iterable[str], architecture: str | None) -> bool:
    """Return whether a file with timm's names is of a ViT whose norms come after attention and MLP (vit_*_rpn_*).

    Its names are those of a plain ViT. `architecture` of timm's config.json decides; without one, what only these of
    timm's models have: a norm after the mean of the patches, and neither a class token nor biases of queries, keys and
    values nor LayerScale nor qk-norm.
    """
    if architecture is not None:
        return "_rpn_" in architecture
    lines = "\n".join(names)
    others = r"(cls_token|blocks\.\d+\.(attn\.(qkv\.bias|[qk]_norm\.weight)|ls1\.gamma|gamma_1))$"
    return bool(re.search(r"\bfc_norm\.bias$", lines, re.MULTILINE) and not re.search(others, lines, re.MULTILINE))


def unsupported_reason(names: Iterable[str]) -> str | None:
    """Return which array is from which other architecture; None if the names may be those of a plain ViT."""
    lines = "\n".join(names)
    for array, description in UNSUPPORTED:
        # A prefix, such as DataParallel's, ends with a dot or, in Flax's names, with a slash.
        match = re.search(rf"^(?:.*[./])?{array}$", lines, re.MULTILINE)
        if match:
            return f"{match[0]} is from {description}"
    return None
