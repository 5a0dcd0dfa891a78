"""Make weights/plsc*.pdparams, weights/paddleclas.pdparams and weights/paddle.npz: PLSC's and PaddleClas's ViTs with
random weights, saved by paddle.save as both save (PLSC in half precision, too), and their logits in float32.

Run with this project's own environment and checkouts of PaddlePaddle/PLSC (bd0c824) and PaddlePaddle/PaddleClas
(d178931): python make_peer_weights_paddle.py PLSC PADDLECLAS. The models are these programs' own files; of the rest of
them, which Paddle 3.3.1 doesn't import, stand-ins are enough: for PLSC's base class and initialisers (what they set is
set anew here), and for PaddleClas's functions that load files.

20 wide, 2 blocks, 4 heads, an MLP of 36, patches of 4, 7 classes, epsilon 1e-6, a bias of q, k and v, the erf GELU, all
as both programs' base models have them; for each case `CASE/images` [2, 3, 12, 12] and `CASE/logits` [2, 7].

- plsc: float32, with the representation layer of 20 (head0)
- plsc_fp16: the same weights in float16; the logits are those of the rounded ones
- plsc_finetuned: without the layer
- paddleclas: float32; PaddleClas has no such layer. Its ViT_small is another model: it scales attention by 768**-0.5
  (the model's width, not a head's), which its file of weights doesn't tell, has no bias of q, k and v, and an epsilon
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
    """The class of PLSC's or PaddleClas's file; under its own name, for PaddleClas imports relative to it."""
    names = ("plsc", "plsc.utils", "plsc.models.base_model", "plsc.nn", "ppcls", "ppcls.utils", "ppcls.utils.save_load")
    stand_ins = {name: types.ModuleType(name) for name in names}
    stand_ins["plsc.utils"].logger = None
    stand_ins["plsc.models.base_model"].Model = nn.Layer
    nothing = {name: lambda *_, **__: None for name in ("xavier_uniform_", "normal_", "zeros_", "ones_", "constant_")}
    stand_ins["plsc.nn"].init = types.SimpleNamespace(**nothing)
    load = stand_ins["ppcls.utils.save_load"]
    load.load_dygraph_pretrain = load.load_dygraph_pretrain_from_url = None
    sys.modules |= stand_ins
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py").replace("/", "."), checkout / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VisionTransformer


def main() -> None:
    checkouts = dict(zip((PLSC, PADDLECLAS), map(Path, sys.argv[1:]), strict=True))
    classes = {file: vision_transformer(checkout, file) for file, checkout in checkouts.items()}
    found = {}
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
            found[case] = (images, np.asarray(model(paddle.to_tensor(images))))
    peers.record(found, "paddle.npz")


if __name__ == "__main__":
    main()
