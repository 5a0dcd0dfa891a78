"""ViT of plain torch.nn layers with PLSC's parameter names, for reference gradients.

PLSC: plsc/models/vision_transformer.py of PaddlePaddle/PLSC. LayerScale (Touvron et al. 2021,
"Going deeper with Image Transformers") is not in PLSC; its names are timm's.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Array = npt.NDArray[np.generic]


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, N, D], patches row by row


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))  # [B, T, D]


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="none"))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_hidden: int, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_hidden)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TorchViT(nn.Module):
    """Pre-norm ViT with a class token; images [B, 3, H, W] to logits [B, num_classes], float64.

    `representation` adds head0 and a tanh before the head. Parameters are uninitialized: set all of them
    with `load_paddle`.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],  # height, width
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_hidden: int,
        num_classes: int,
        layer_scale: bool,
        representation: bool,
    ) -> None:
        super().__init__()
        num_patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads, mlp_hidden, layer_scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head0 = nn.Linear(width, width) if representation else None
        self.head = nn.Linear(width, num_classes)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        cls_token = self.cls_token.expand(len(images), -1, -1)
        x = torch.cat([cls_token, patches], dim=1) + self.pos_embed  # [B, 1 + N, D]
        x = self.norm(self.blocks(x))[:, 0]  # [B, D]
        if self.head0 is not None:
            x = torch.tanh(self.head0(x))
        return self.head(x)


def _other_layout(tensor: Tensor) -> Tensor:
    """Convert between torch's and Paddle's layout: only Linear weights have two axes."""
    return tensor.T if tensor.ndim == 2 else tensor


def paddle_shapes(model: TorchViT) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter in Paddle's layout, by name, in the model's order."""
    return {name: tuple(_other_layout(p).shape) for name, p in model.named_parameters()}


def load_paddle(model: TorchViT, parameters: Mapping[str, Array]) -> None:
    """Set every parameter from its value in Paddle's layout."""
    model.load_state_dict({name: _other_layout(torch.from_numpy(value)) for name, value in parameters.items()})


def loss_and_gradients(model: TorchViT, images: Array, labels: Array) -> tuple[Array, Array, dict[str, Array]]:
    """Return logits [B, num_classes], the mean cross-entropy [], and gradients by name in Paddle's layout."""
    logits = model(torch.from_numpy(images).double())
    loss = F.cross_entropy(logits, torch.from_numpy(labels))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return (
        logits.detach().numpy(),
        loss.detach().numpy(),
        {n: _other_layout(g).numpy() for n, g in zip(names, gradients, strict=True)},
    )
