"""Make weights/vit_jax*.npz, weights/big_vision_*.npz and weights/jax.npz: Google's ViTs with random weights, saved
under their own names, and their logits in float64.

Run with the two repositories' folders: python make_peer_weights_jax.py VISION_TRANSFORMER BIG_VISION, checkouts of
google-research/vision_transformer (c6de1e5) and google-research/big_vision (0127fb6). The models are these programs'
own; of big_vision's utils, which want TensorFlow, they use nothing here, so an empty module stands in.

As in weights/torch.npz 20 wide, 2 blocks, 4 heads, an MLP of 36, patches of 4, 7 classes, for each case `CASE/images`
[2, 3, height, width] and `CASE/logits` [2, 7]. Both programs' GELU is the tanh approximation, Flax's default, and their
LayerNorm's epsilon 1e-6. vit_jax's blocks compute in float32 even so: its encoder has no way to ask for another type.

- vit_jax: class token with a position, a tanh layer of 12 before the head (pre_logits)
- vit_jax_gap: the patches' mean, no class token
- big_vision_tok: class token without a position, a tanh layer; names below params/, as its checkpoints have them
- big_vision_gap_sincos: the patches' mean, a fixed position, which is not in the file
- big_vision_map: pooled by attention; no logits, for it is refused
- big_vision_scan: as big_vision_tok without the layer, blocks along an axis of each array
"""

import sys
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import peer_weights as peers
from flax import linen as nn
from peer_weights import DEPTH, FOLDER, HEADS, IMAGE_SIZE, MLP_DIM, NUM_CLASSES, PATCH, WIDTH

BIG_VISION = {
    "big_vision_tok": {"pool_type": "tok", "posemb": "learn", "rep_size": True},
    "big_vision_gap_sincos": {"pool_type": "gap", "posemb": "sincos2d"},
    "big_vision_map": {"pool_type": "map", "posemb": "learn"},
    "big_vision_scan": {"pool_type": "tok", "posemb": "learn", "scan": True},
}
VIT_JAX = {
    "vit_jax": {"classifier": "token", "representation_size": 12},
    "vit_jax_gap": {"classifier": "gap", "representation_size": None},
}


def models(vision_transformer: str, big_vision: str) -> dict[str, nn.Module]:
    sys.path[:0] = [vision_transformer, big_vision]
    sys.modules["big_vision.utils"] = types.ModuleType("big_vision.utils")
    import big_vision

    big_vision.utils = sys.modules["big_vision.utils"]
    from big_vision.models import vit
    from vit_jax import models_vit

    size = {"width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_dim": MLP_DIM, "patch_size": (PATCH, PATCH)}
    found = {case: vit.Model(NUM_CLASSES, **size, **changed) for case, changed in BIG_VISION.items()}
    transformer = {"mlp_dim": MLP_DIM, "num_heads": HEADS, "num_layers": DEPTH, "dropout_rate": 0.0}
    for case, changed in VIT_JAX.items():
        patches = types.SimpleNamespace(size=(PATCH, PATCH))
        found[case] = models_vit.VisionTransformer(
            num_classes=NUM_CLASSES, patches=patches, transformer=transformer, hidden_size=WIDTH, **changed
        )
    return found


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    FOLDER.mkdir(exist_ok=True)
    found = {}
    for case, model in models(*sys.argv[1:]).items():
        images = peers.images(case, IMAGE_SIZE)
        last = images.transpose(0, 2, 3, 1).astype(np.float64)  # [2, height, width, 3]
        more = {"train": False}
        if case in BIG_VISION:
            model = model.clone(dtype_mm="float64")
        variables = model.init(jax.random.key(0), jnp.asarray(last), **more)
        shapes = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables["params"]), sep="/")
        values = {name: peers.random_values(case, name, value.shape) for name, value in shapes.items()}
        prefix = "params/" if case == "big_vision_tok" else ""
        np.savez_compressed(FOLDER / f"{case}.npz", **{f"{prefix}{name}": value for name, value in values.items()})
        if case == "big_vision_map":
            continue
        exact = {name: jnp.asarray(value, jnp.float64) for name, value in values.items()}
        tree = flax.traverse_util.unflatten_dict(exact, sep="/")
        logits = model.apply({"params": tree}, jnp.asarray(last), **more)
        found[case] = (images, np.asarray(logits[0] if case in BIG_VISION else logits))
        assert np.abs(found[case][1]).max() > 0.1
    peers.record(found, "jax.npz")


if __name__ == "__main__":
    main()
