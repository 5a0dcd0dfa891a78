"""Make vit_s16_gradients.npz: gradients at the width of ViT-S/16, by torch's autograd in float64.

Image 224x224, patch 16 (197 tokens), width 384, 6 heads, MLP hidden 1536, ONE block, class token,
no LayerScale, no representation layer, 10 classes, LayerNorm epsilon 1e-6, erf GELU, no dropout;
the loss is the mean softmax cross-entropy of a batch of 2.

Nothing large is stored. The images are closed_form.uniform("images", (2, 3, 224, 224)) and the
parameters closed_form.vit_parameter(NAME, shape), under PLSC's names and in Paddle's layout (a
Linear weight is [in, out]).

`labels` [2] int64; `logits` [2, 10]; `loss` []; for each parameter's gradient `grad_norm/NAME` []
(L2), `grad_projection/NAME` [8] (closed_form.project) and, up to 2,000 elements, the gradient
itself as `grad/NAME`. Results are float64 rounded to float32. The gradient of the k third of
`attn.qkv.bias` is 0 except for rounding (see make_vit_gradients.py).
"""

from pathlib import Path

import closed_form
import golden
import numpy as np
import numpy.typing as npt
import torch
from torch_vit import TorchViT, load_paddle, loss_and_gradients, paddle_shapes

MAX_STORED_GRADIENT = 2000  # elements
IMAGES_SHAPE = (2, 3, 224, 224)
LABELS = np.array([3, 8])


def main() -> None:
    torch.set_num_threads(1)
    model = TorchViT(
        image_size=(224, 224),
        patch_size=16,
        width=384,
        depth=1,
        num_heads=6,
        mlp_hidden=1536,
        num_classes=10,
        layer_scale=False,
        representation=False,
    )
    load_paddle(model, {n: closed_form.vit_parameter(n, s) for n, s in paddle_shapes(model).items()})
    images = closed_form.uniform("images", IMAGES_SHAPE)
    logits, loss, gradients = loss_and_gradients(model, images, LABELS)
    arrays: dict[str, npt.ArrayLike] = {"labels": LABELS, "logits": logits, "loss": loss}
    for name, gradient in gradients.items():
        arrays[f"grad_norm/{name}"] = np.sqrt(np.sum(np.square(gradient)))
        arrays[f"grad_projection/{name}"] = closed_form.project(name, gradient)
        if gradient.size <= MAX_STORED_GRADIENT:
            arrays[f"grad/{name}"] = gradient
    golden.write(Path(__file__).with_name("vit_s16_gradients.npz"), arrays)


if __name__ == "__main__":
    main()
