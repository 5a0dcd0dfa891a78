"""A training step of JAX on a CPU: a plain ViT as a function of its parameters, AdamW and clipping, in one jit.

For bfloat16, parameters stay float32, and products have bfloat16 factors, as with autocast. `python jax_train.py SPEC`
with the SPEC of bench/train.py, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
from protocol import serve

Params = dict[str, Any]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def init_params(key: jax.Array, model: dict[str, int]) -> Params:
    """Return parameters; those of the blocks are stacked along the first axis, which `forward` scans."""
    width, depth, mlp_dim, patch = model["width"], model["depth"], model["mlp_dim"], model["patch_size"]
    num_tokens = 1 + (model["image_size"] // patch) ** 2
    keys = iter(jax.random.split(key, 8))

    def weights(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / math.sqrt(shape[-2])

    def norm(*leading: int) -> Params:
        return {"scale": jnp.ones((*leading, width)), "bias": jnp.zeros((*leading, width))}

    def linear(size_in: int, size_out: int, *leading: int) -> Params:
        return {"weight": weights(*leading, size_in, size_out), "bias": jnp.zeros((*leading, size_out))}

    return {
        "patch_embed": linear(3 * patch * patch, width),
        "cls_token": jnp.zeros((1, 1, width)),
        "pos_embed": 0.02 * jax.random.normal(next(keys), (1, num_tokens, width)),
        "blocks": {
            "norm1": norm(depth),
            "qkv": linear(width, 3 * width, depth),
            "proj": linear(width, width, depth),
            "norm2": norm(depth),
            "fc1": linear(width, mlp_dim, depth),
            "fc2": linear(mlp_dim, width, depth),
        },
        "norm": norm(),
        "head": linear(width, model["num_classes"]),
    }


def layer_norm(x: jax.Array, params: Params) -> jax.Array:
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def forward(params: Params, images: jax.Array, model: dict[str, int], dtype: Any) -> jax.Array:
    """Return the logits [B, num_classes] of images [B, height, width, 3]."""
    batch, heads, patch = len(images), model["num_heads"], model["patch_size"]

    def linear(x: jax.Array, layer: Params) -> jax.Array:
        product = jnp.matmul(x.astype(dtype), layer["weight"].astype(dtype), preferred_element_type=jnp.float32)
        return product + layer["bias"]

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        qkv = linear(layer_norm(x, layer["norm1"]), layer["qkv"]).reshape(batch, x.shape[1], 3, heads, -1)
        query, key, value = jnp.moveaxis(qkv.astype(dtype), 2, 0)  # [B, N, H, d]
        attention = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        x = x + linear(attention, layer["proj"])
        hidden = jax.nn.gelu(linear(layer_norm(x, layer["norm2"]), layer["fc1"]), approximate=False)
        return x + linear(hidden, layer["fc2"]), None

    grid = images.shape[1] // patch
    patches = images.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = linear(patches.reshape(batch, grid * grid, -1), params["patch_embed"])  # [B, N, C]
    token = jnp.broadcast_to(params["cls_token"], (batch, 1, x.shape[-1]))
    x = jnp.concatenate([token, x], axis=1) + params["pos_embed"]
    x, _ = jax.lax.scan(block, x, params["blocks"])
    return linear(layer_norm(x, params["norm"])[:, 0], params["head"])


def make_step(spec: dict[str, Any]) -> Any:
    """Return a jitted function from (params, moments, step, images, labels) to the new first three and the loss."""
    dtype = jnp.dtype(spec["precision"])

    def loss_of(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(forward(params, images, spec["model"], dtype))
        return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()

    def step(params: Params, moments: Any, number: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
        norm = jnp.sqrt(sum((grad * grad).sum() for grad in jax.tree.leaves(grads)))
        scale = jnp.minimum(1.0, spec["clip_norm"] / (norm + 1e-6))
        number = number + 1.0
        first = jax.tree.map(lambda m, g: BETA1 * m + (1.0 - BETA1) * scale * g, moments[0], grads)
        second = jax.tree.map(lambda v, g: BETA2 * v + (1.0 - BETA2) * (scale * g) ** 2, moments[1], grads)

        def update(value: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            direction = m / (1.0 - BETA1**number) / (jnp.sqrt(v / (1.0 - BETA2**number)) + EPSILON)
            return value - spec["lr"] * (direction + spec["weight_decay"] * value)

        return jax.tree.map(update, params, first, second), (first, second), number, loss

    return jax.jit(step, donate_argnums=(0, 1))


def main() -> None:
    """Train, as a candidate of `bench train`."""
    spec = json.loads(sys.argv[1])
    jax.config.update("jax_platforms", "cpu")
    model, batch = spec["model"], spec["batch_size"]
    params = init_params(jax.random.key(0), model)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moments, number = (zeros, jax.tree.map(jnp.zeros_like, params)), jnp.zeros(())
    images = jax.random.normal(jax.random.key(1), (batch, model["image_size"], model["image_size"], 3))
    labels = jax.random.randint(jax.random.key(2), (batch,), 0, model["num_classes"])
    run = make_step(spec)

    def step() -> int:
        nonlocal params, moments, number
        params, moments, number, loss = run(params, moments, number, images, labels)
        float(loss)
        return batch

    for _ in range(2):
        step()
    serve(step, version=jax.__version__)


if __name__ == "__main__":
    main()
