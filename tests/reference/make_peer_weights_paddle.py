"""Make weights/plsc*.pdparams, weights/paddleclas.pdparams and weights/paddle.npz: PLSC's and PaddleClas's ViTs with
random weights, saved with paddle.save as both programs do (PLSC also in half precision), and their logits in float32.

Run in this project's environment with checkouts of PaddlePaddle/PLSC (bd0c824) and PaddlePaddle/PaddleClas (d178931):
python make_peer_weights_paddle.py PLSC PADDLECLAS. The models are the files of these programs. Paddle 3.3.1 can't
import the rest of them, so stubs replace PLSC's base class and initializers (all weights are set here) and
PaddleClas's functions that load files.

Width 20, 2 blocks, 4 heads, mlp_dim 36, patches of 4, 7 classes, epsilon 1e-6, biases for q, k and v, the erf GELU, as
in the base models of both programs; for each case `CASE/images` [2, 3, 12, 12] and `CASE/logits` [2, 7].

- plsc: float32, with the representation layer of 20 (head0)
- plsc_fp16: the same weights in float16; the logits are those of the rounded weights
- plsc_finetuned: without the representation layer
- paddleclas: float32; PaddleClas has no such layer. Its ViT_small is another model: it scales attention by 768**-0.5
  (the model's width, not a head's), which its weights file doesn't tell, has no biases for q, k and v, and an epsilon
  of 1e-5.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import paddle
import peer_weights as peers
from paddle import nn
from peer_weights import DEPTH, FOLDER, HEADS, MLP_DIM, NUM_CLASSES, PATCH, SQUARE, WIDTH

PLSC, PADDLECLAS = "plsc/models/vision_transformer.py", "ppcls/arch/backbone/model_zoo/vision_transformer.py"
CASES = {
    "plsc": (PLSC, 20, "float32"),
    "plsc_fp16": (PLSC, 20, "float16"),
    "plsc_finetuned": (PLSC, None, "float32"),
    "paddleclas": (PADDLECLAS, None, "float32"),
}


def vision_transformer(checkout: Path, file: str) -> type[nn.Layer]:
    """Load the class from a file of PLSC or PaddleClas, under the module name to which relative imports refer."""
    names = ("plsc", "plsc.utils", "plsc.models.base_model", "plsc.nn", "ppcls", "ppcls.utils", "ppcls.utils.save_load")
    stubs = {name: types.ModuleType(name) for name in names}
    stubs["plsc.utils"].logger = None
    stubs["plsc.models.base_model"].Model = nn.Layer
    initializers = {
        name: lambda *_, **__: None for name in ("xavier_uniform_", "normal_", "zeros_", "ones_", "constant_")
    }
    stubs["plsc.nn"].init = types.SimpleNamespace(**initializers)
    load = stubs["ppcls.utils.save_load"]
    load.load_dygraph_pretrain = load.load_dygraph_pretrain_from_url = None
    sys.modules |= stubs
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py").replace("/", "."), checkout / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VisionTransformer


def main() -> None:
    checkouts = dict(zip((PLSC, PADDLECLAS), map(Path, sys.argv[1:]), strict=True))
    classes = {file: vision_transformer(checkout, file) for file, checkout in checkouts.items()}
    results = {}
    for case, (file, representation_size, dtype) in CASES.items():
        model = classes[file](
            img_size=SQUARE[0],
            patch_size=PATCH,
            class_num=NUM_CLASSES,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=MLP_DIM / WIDTH,
            qkv_bias=True,
            epsilon=1e-6,
            representation_size=representation_size,  # PaddleClas's ignores it
        )
        weights = "plsc" if file == PLSC else case
        state = {
            name: paddle.to_tensor(peers.random_values(weights, name, tuple(value.shape))).astype(dtype)
            for name, value in model.state_dict().items()
        }
        for name, tensor in state.items():
            tensor.name = name
        paddle.save(state, str(FOLDER / f"{case}.pdparams"))
        model.set_state_dict({name: value.astype("float32") for name, value in state.items()})
        model.eval()
        images = peers.images(case, SQUARE)
        with paddle.no_grad():
            results[case] = (images, np.asarray(model(paddle.to_tensor(images))))
    peers.record(results, "paddle.npz")


if __name__ == "__main__":
    main()
