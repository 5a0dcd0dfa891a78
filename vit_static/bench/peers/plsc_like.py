"""A training step of a dynamic-graph Paddle loop in float32 on a CPU, with a model written like PLSC's.

It has a fused qkv layer, explicit attention (matrix products and a softmax), and an optimizer that updates one
parameter at a time.

`python plsc_like.py SPEC` with the SPEC of bench/train.py, in the environment of the project.
"""

from __future__ import annotations

import json
import sys

import paddle
import paddle.nn.functional as F
from paddle import nn
from protocol import serve


class Block(nn.Layer):
    def __init__(self, width: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)

    def attention(self, x: paddle.Tensor) -> paddle.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape([batch, tokens, 3, self.num_heads, width // self.num_heads])
        query, key, value = qkv.transpose([2, 0, 3, 1, 4]).unbind(0)  # [B, H, N, d]
        weights = F.softmax(paddle.matmul(query, key, transpose_y=True) * self.scale, axis=-1)
        return self.proj(paddle.matmul(weights, value).transpose([0, 2, 1, 3]).reshape([batch, tokens, width]))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DynamicViT(nn.Layer):
    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        num_tokens = 1 + (image_size // patch_size) ** 2
        self.patch_embed = nn.Conv2D(3, width, patch_size, patch_size)
        self.cls_token = self.create_parameter([1, 1, width])
        self.pos_embed = self.create_parameter([1, num_tokens, width])
        self.blocks = nn.LayerList([Block(width, num_heads, mlp_dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        x = self.patch_embed(images).flatten(2).transpose([0, 2, 1])  # [B, N, C]
        x = paddle.concat([self.cls_token.expand([x.shape[0], -1, -1]), x], axis=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def main() -> None:
    """Train, as a candidate of `bench train`."""
    spec = json.loads(sys.argv[1])
    paddle.set_device("cpu")
    paddle.seed(0)
    model = DynamicViT(**spec["model"])
    optimizer = paddle.optimizer.AdamW(
        spec["lr"],
        parameters=model.parameters(),
        weight_decay=spec["weight_decay"],
        grad_clip=nn.ClipGradByGlobalNorm(spec["clip_norm"]),
    )
    batch, size = spec["batch_size"], spec["model"]["image_size"]
    images = paddle.randn([batch, 3, size, size])
    labels = paddle.randint(0, spec["model"]["num_classes"], [batch])

    def step() -> int:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        float(loss)
        return batch

    step()
    serve(step, version=paddle.__version__)


if __name__ == "__main__":
    main()
