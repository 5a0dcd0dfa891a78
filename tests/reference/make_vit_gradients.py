"""Make vit_gradients.npz: every gradient of a small ViT, by torch's autograd in float64.

Image 12x16 (height x width), patch 4, width 24, depth 2, 3 heads, MLP hidden 48, class token,
LayerScale, representation layer (head0 and tanh), 5 classes, LayerNorm epsilon 1e-6, erf GELU, no
dropout; the loss is the mean softmax cross-entropy of a batch of 3.

`images` [3, 3, 12, 16] float32; `labels` [3] int64; `logits` [3, 5]; `loss` []; for each parameter
`param/NAME` and `grad/NAME`, with the names of PLSC's state dict and Paddle's layout (a Linear
weight is [in, out]). The columns of `attn.qkv` are q, k, v, each of them head after head.

Inputs and parameters are exact in float32; results are float64 rounded to float32. The gradient
of the k third of `attn.qkv.bias` is 0 except for rounding, since softmax ignores what all keys share:
compare with a tolerance relative to the norm of the tensor, not to each element.
"""

from pathlib import Path

import golden
import numpy as np
import numpy.typing as npt
import torch
from torch_vit import Array, TorchViT, load_paddle, loss_and_gradients, paddle_shapes

SEED = 20240817
BATCH_SIZE = 3
IMAGE_SIZE = (12, 16)
NUM_CLASSES = 5


def random_parameter(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Return float32 values unlike any initialization, and so large that attention isn't uniform."""
    normal = rng.standard_normal(shape)
    if name.endswith(".gamma"):
        value = 0.5 + 0.1 * normal
    elif name.endswith(".weight") and len(shape) == 1:  # LayerNorm
        value = 1 + 0.3 * normal
    elif name.endswith(".weight"):
        fan_in = shape[0] if len(shape) == 2 else np.prod(shape[1:])
        value = 1.5 * normal / np.sqrt(fan_in)
    else:  # biases, cls_token, pos_embed
        value = 0.5 * normal
    return value.astype(np.float32)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    model = TorchViT(
        image_size=IMAGE_SIZE,
        patch_size=4,
        width=24,
        depth=2,
        num_heads=3,
        mlp_hidden=48,
        num_classes=NUM_CLASSES,
        layer_scale=True,
        representation=True,
    )
    parameters = {n: random_parameter(rng, n, s) for n, s in paddle_shapes(model).items()}
    load_paddle(model, parameters)
    images = rng.standard_normal((BATCH_SIZE, 3, *IMAGE_SIZE)).astype(np.float32)
    labels = rng.permutation(NUM_CLASSES)[:BATCH_SIZE]
    logits, loss, gradients = loss_and_gradients(model, images, labels)
    arrays: dict[str, npt.ArrayLike] = {"images": images, "labels": labels, "logits": logits, "loss": loss}
    arrays.update((f"param/{name}", value) for name, value in parameters.items())
    arrays.update((f"grad/{name}", value) for name, value in gradients.items())
    golden.write(Path(__file__).with_name("vit_gradients.npz"), arrays)


if __name__ == "__main__":
    main()
