"""Make weights/plsc*.pdparams and weights/paddle.npz: PLSC's ViT with random weights, saved by paddle.save as PLSC
saves (in half precision, too), and its logits in float32.

Run with this project's own environment and a checkout of PaddlePaddle/PLSC (bd0c824):
python make_peer_weights_paddle.py PLSC. The model is PLSC's own file; of the rest of PLSC, which Paddle 3.3.1 doesn't
import, stand-ins for its base class and its initialisers (what they set is set anew here) are enough. PaddleClas's
files have the same names and layout.

20 wide, 2 blocks, 4 heads, an MLP of 36, patches of 4, 7 classes, epsilon 1e-6; for each case `CASE/images`
[2, 3, 12, 12] and `CASE/logits` [2, 7].

- plsc: float32, with the representation layer of 20 (head0)
- plsc_fp16: the same weights in float16; the logits are those of the rounded ones
- plsc_finetuned: without the layer
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

CASES = {"plsc": (20, "float32"), "plsc_fp16": (20, "float16"), "plsc_finetuned": (None, "float32")}


def vision_transformer(plsc: Path) -> type[nn.Layer]:
    stand_ins = {name: types.ModuleType(name) for name in ("plsc", "plsc.utils", "plsc.models.base_model", "plsc.nn")}
    stand_ins["plsc.utils"].logger = None
    stand_ins["plsc.models.base_model"].Model = nn.Layer
    nothing = {name: lambda *_, **__: None for name in ("xavier_uniform_", "normal_", "zeros_", "ones_", "constant_")}
    stand_ins["plsc.nn"].init = types.SimpleNamespace(**nothing)
    sys.modules |= stand_ins
    spec = importlib.util.spec_from_file_location("plsc_vit", plsc / "plsc/models/vision_transformer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VisionTransformer


def main() -> None:
    make = vision_transformer(Path(sys.argv[1]))
    found = {}
    for case, (representation_size, dtype) in CASES.items():
        model = make(
            img_size=SQUARE[0],
            patch_size=PATCH,
            class_num=NUM_CLASSES,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=MLP_DIM / WIDTH,
            qkv_bias=True,
            epsilon=1e-6,
            representation_size=representation_size,
        )
        state = {
            name: paddle.to_tensor(peers.random_values("plsc", name, tuple(value.shape))).astype(dtype)
            for name, value in model.state_dict().items()
        }
        for name, tensor in state.items():
            tensor.name = name
        paddle.save(state, str(FOLDER / f"{case}.pdparams"))
        model.set_state_dict({name: value.astype("float32") for name, value in state.items()})
        model.eval()
        images = peers.images(case, SQUARE)
        with paddle.no_grad():
            found[case] = (images, np.asarray(model(paddle.to_tensor(images))))
    peers.record(found, "paddle.npz")


if __name__ == "__main__":
    main()
