"""Schema of the config's `model` section: the shape of the Vision Transformer and its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vit_static.config.section import (
    ImageSize,
    NonNegativeFloat,
    NonNegativeInt,
    Pixels,
    PositiveFloat,
    PositiveInt,
    Rate,
    Section,
)

Factor = Annotated[float, Field(ge=1.0)]
Grid = tuple[PositiveInt, PositiveInt]  # rows, columns


class ModelConfig(Section):
    """The Vision Transformer."""

    from_: Literal["config", "init"] = Field(
        "config",
        alias="from",
        exclude=True,
        description="init: take the shape from init.from's weights (with --checkpoint: from those) instead of from "
        "`variant`; keys that are set here still win",
    )
    variant: str = Field("B/16", description="size and patch size: a name that './run.sh models' lists")
    image_size: ImageSize = Field((224, 224), description="in pixels: one number for a square, or [height, width]")
    num_channels: Literal[1, 3] = Field(3, description="3: RGB; 1: greyscale, to which colour images are converted")
    num_classes: NonNegativeInt = Field(
        1000, description="width of the classification head; 0: no head, only features (as in timm)"
    )
    pool: Literal["cls", "gap", "cls_gap", "map"] = Field(
        "cls",
        description="input of the head: the class token, the mean of the patch tokens, or both concatenated; map: "
        "attention pooling, a learned query that attends to all tokens, and an MLP (arXiv 2106.04560; SigLIP)",
    )
    class_token: bool | None = Field(None, description="use a class token; null: only if `pool` reads it")
    class_token_pos_embed: bool = Field(True, description="the class token has a position embedding")
    distillation_token: bool = Field(
        False,
        description="a second class token with a head of its own, which learns from a teacher (distill.kind = token); "
        "the logits are the mean of both heads' (DeiT, arXiv 2012.12877)",
    )
    register_tokens: NonNegativeInt = Field(0, description="number of registers (arXiv 2309.16588)")
    fc_norm: bool = Field(False, description="apply the last norm after pooling instead of before it")
    pre_norm: bool = Field(
        False, description="a norm before the first block, and no bias in the patch embedding, as in CLIP (2103.00020)"
    )
    norm: Literal["layer", "rms"] = Field("layer", description="every norm: LayerNorm, or RMSNorm (arXiv 1910.07467)")
    layer_norm_epsilon: PositiveFloat = Field(1e-6, description="epsilon of every norm")
    qk_norm: bool = Field(False, description="a norm of each head's queries and keys (arXiv 2302.05442)")
    attention_norm: bool = Field(
        False, description="a norm before attention's output projection (arXiv 2210.06423; EVA-02's CLIP towers)"
    )
    mlp: Literal["gelu", "swiglu"] = Field(
        "gelu", description="swiglu: the hidden layer is silu(x W) * (x V) (arXiv 2002.05202)"
    )
    mlp_norm: bool = Field(
        False, description="a norm before the MLP's output projection (arXiv 2210.06423; EVA-02 B and L)"
    )
    gelu: Literal["erf", "tanh", "quick"] = Field(
        "erf",
        description="exact GELU, its tanh approximation (Flax's default), or x * sigmoid(1.702 x) (OpenAI's CLIP)",
    )
    pos_embed: Literal["learn", "sincos2d", "none"] = Field(
        "learn", description="absolute position embedding: learned, fixed sines and cosines, or none"
    )
    pos_embed_init: Literal["normal", "sincos2d"] = Field("normal", description="initial values if learned")
    rope: Literal["none", "axial", "mixed"] = Field(
        "none",
        description="rotary positions of queries and keys; axial: half of a head's channels turn with the row and half "
        "with the column (EVA-02, DINOv3); mixed: learned frequencies per block and head (arXiv 2403.13298)",
    )
    rope_base: PositiveFloat | None = Field(
        None,
        description="frequencies fall from 1 towards 1 / rope_base; null: 100 if axial (DINOv3), 10 if mixed; EVA-02 "
        "uses 10000",
    )
    rope_grid: Grid | None = Field(
        None,
        description="[rows, columns]: positions are patch numbers, scaled from the image's grid to this one (EVA-02: "
        "[16, 16]); null: if axial, coordinates from -1 to 1 times 2 pi (DINOv3); if mixed, patch numbers",
    )
    rope_shift: NonNegativeFloat = Field(
        0.0, description="axial, training: each step adds up to this to the coordinates (-1 to 1) of each axis"
    )
    rope_jitter: Factor = Field(
        1.0, description="axial, training: each step scales each axis by a factor between 1 / this and this"
    )
    rope_rescale: Factor = Field(
        1.0,
        description="axial, training: each step scales both axes by a factor between 1 / this and this; DINOv3's "
        "pretraining uses 2 (arXiv 2508.10104)",
    )
    rope_register_base: PositiveFloat | None = Field(
        None,
        description="axial: registers turn too, on a square grid of their own, with this base (ViT-5: 100, arXiv "
        "2602.08071); null: they don't",
    )
    patch_size: Pixels | None = Field(None, description="side of a square patch; null: the variant's")
    width: PositiveInt | None = Field(None, description="embedding dimension; null: the variant's")
    depth: PositiveInt | None = Field(None, description="number of blocks; null: the variant's")
    num_heads: PositiveInt | None = Field(None, description="attention heads per block; null: the variant's")
    mlp_dim: PositiveInt | None = Field(
        None,
        description="hidden width of the MLPs; null: the variant's, with swiglu 2/3 of it rounded up to a multiple of "
        "8, as in DINOv2 (EVA-02 rounds down: 2730 for L; DINOv3 S+ and H+ keep all of it: 1536, 5120)",
    )
    representation_size: PositiveInt | None = Field(None, description="width of a tanh layer before the head, if any")
    head_bias_init: float = Field(0.0, description="initial bias of the head; PLSC uses -10 with its sigmoid loss")
    head_init_std: NonNegativeFloat = Field(0.0, description="standard deviation of the head's initial weights")
    qkv_bias: bool | Literal["qv"] = Field(
        True, description="the query, key and value projections have biases; qv: not the keys (EVA-02, DINOv3)"
    )
    dropout: Rate = Field(0.0, description="dropout rate after the position embedding and in each block")
    attention_dropout: Rate = Field(0.0, description="dropout rate of the attention weights")
    drop_path_rate: Rate = Field(0.0, description="stochastic depth: rate of the last block")
    drop_path_schedule: Literal["linear", "constant"] = Field(
        "linear", description="drop path over the depth: rising linearly from 0, or the same in every block"
    )
    patch_dropout: Rate = Field(
        0.0,
        description="share of each training image's patches that is left out, another one in each step, so that steps "
        "are faster (FLIP, arXiv 2212.00794)",
    )
    layer_scale_init: float | None = Field(None, description="initial LayerScale value; null: no LayerScale")
    compute_unread_tokens: bool = Field(
        False,
        description="with pool = cls, compute the last block for the tokens that no head reads, too: the same logits "
        "and gradients, with more operations",
    )

    @model_validator(mode="after")
    def _check_class_token(self) -> ModelConfig:
        if self.class_token is False and self.pool in ("cls", "cls_gap"):
            raise ValueError(f"class_token = False: pool = {self.pool!r} reads the class token; set pool=gap or map")
        return self

    @model_validator(mode="after")
    def _check_distillation_token(self) -> ModelConfig:
        others = {"pool": "cls", "fc_norm": False, "representation_size": None}
        for key, value in others.items():
            if self.distillation_token and getattr(self, key) != value:
                raise ValueError(
                    f"distillation_token = True: its head and the class token's read a token each, and {key} = "
                    f"{getattr(self, key)!r} has another head; set {key}={'null' if value is None else value}"
                )
        return self

    @model_validator(mode="after")
    def _check_rope(self) -> ModelConfig:
        augments = [key for key in ("rope_shift", "rope_jitter", "rope_rescale") if self.is_changed(key)]
        if augments and (self.rope != "axial" or self.rope_grid is not None):
            raise ValueError(
                f"{augments[0]} = {getattr(self, augments[0])}: changes coordinates from -1 to 1, which only rope = "
                "axial without rope_grid has; remove one of them"
            )
        others = [key for key in ("rope_base", "rope_grid") if self.is_changed(key)]
        if self.rope == "none" and others:
            raise ValueError(f"{others[0]}: without rotary positions it has no effect; set rope=axial or mixed")
        if self.rope_register_base is not None:
            if self.rope != "axial":
                raise ValueError("rope_register_base: only rope = axial rotates registers; set rope=axial")
            if self.register_tokens == 0 or round(self.register_tokens**0.5) ** 2 != self.register_tokens:
                raise ValueError(
                    f"rope_register_base: {self.register_tokens} registers make no square grid; set "
                    "register_tokens=4, or another square number"
                )
        return self

    def is_changed(self, key: str) -> bool:
        """Return whether a key has another value than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def has_class_token(self) -> bool:
        return self.pool in ("cls", "cls_gap") if self.class_token is None else self.class_token

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: registers, class token, distillation token."""
        return self.register_tokens + int(self.has_class_token) + int(self.distillation_token)

    @property
    def num_read_tokens(self) -> int | None:
        """Number of tokens that the last block computes: those that heads read; None: all.

        With other pooling than cls at most the prefix tokens are unread: too few to gain by leaving them out.
        """
        return None if self.pool != "cls" or self.compute_unread_tokens else 1 + int(self.distillation_token)

    @property
    def num_prefix_positions(self) -> int:
        """Number of prefix tokens that have a position embedding."""
        has_positions = self.has_class_token and self.class_token_pos_embed and self.pos_embed != "none"
        return (1 + int(self.distillation_token)) * int(has_positions)
