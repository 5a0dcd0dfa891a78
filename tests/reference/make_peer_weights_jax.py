"""Make weights/vit_jax*.npz, weights/big_vision_*.npz and weights/jax.npz: Google's ViTs with random weights, saved
under Google's parameter names, and their logits in float64.

Run with two checkouts: python make_peer_weights_jax.py VISION_TRANSFORMER BIG_VISION, of
google-research/vision_transformer (c6de1e5) and google-research/big_vision (0127fb6). The models are those of these
programs. An empty module replaces big_vision's utils, which need TensorFlow and aren't used here.

As in weights/torch.npz: width 20, 2 blocks, 4 heads, mlp_dim 36, patches of 4, 7 classes; for each case `CASE/images`
[2, 3, height, width] and `CASE/logits` [2, 7]. Both programs' GELU is the tanh approximation, Flax's default, and their
LayerNorm's epsilon is 1e-6. vit_jax's blocks compute in float32 nevertheless: its encoder has no option for the dtype.

- vit_jax: class token with a position, a tanh layer of 12 before the head (pre_logits)
- vit_jax_gap: mean of the patches, no class token
- big_vision_tok: class token without a position, a tanh layer; names start with params/, as in its checkpoints
- big_vision_gap_sincos: mean of the patches, a fixed position embedding, which is not in the file
- big_vision_map: pooled by attention
- big_vision_scan: as big_vision_tok without the tanh layer; each array has an axis for the blocks
- big_vision_siglip: two towers as in SigLIP, of one block, in one file below params/; the logits are the features of
  the image tower, which has no head
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


TOWERS = "big_vision_siglip"


def models(vision_transformer: str, big_vision: str) -> dict[str, nn.Module]:
    sys.path[:0] = [vision_transformer, big_vision]
    sys.modules["big_vision.utils"] = types.ModuleType("big_vision.utils")
    import big_vision

    big_vision.utils = sys.modules["big_vision.utils"]
    from big_vision.models import vit
    from big_vision.models.proj.image_text import two_towers
    from vit_jax import models_vit

    size = {"width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_dim": MLP_DIM, "patch_size": (PATCH, PATCH)}
    results = {case: vit.Model(NUM_CLASSES, **size, **changed) for case, changed in BIG_VISION.items()}
    transformer = {"mlp_dim": MLP_DIM, "num_heads": HEADS, "num_layers": DEPTH, "dropout_rate": 0.0}
    for case, changed in VIT_JAX.items():
        patches = types.SimpleNamespace(size=(PATCH, PATCH))
        results[case] = models_vit.VisionTransformer(
            num_classes=NUM_CLASSES, patches=patches, transformer=transformer, hidden_size=WIDTH, **changed
        )
    image = {**size, "depth": 1, "pool_type": "map", "dtype_mm": "float64"}
    text = {"width": 8, "depth": 1, "mlp_dim": 12, "num_heads": 2, "vocab_size": 6}
    results[TOWERS] = two_towers.Model(
        image=image, text=text, out_dim=(None, WIDTH), temperature_init=10, bias_init=-10
    )
    return results


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    FOLDER.mkdir(exist_ok=True)
    results = {}
    for case, model in models(*sys.argv[1:]).items():
        images = peers.images(case, IMAGE_SIZE)
        channels_last = images.transpose(0, 2, 3, 1).astype(np.float64)  # [2, height, width, 3]
        if case in BIG_VISION:
            model = model.clone(dtype_mm="float64")
        inputs = [jnp.asarray(channels_last)]
        inputs += [jnp.zeros((2, 5), jnp.int32)] if case == TOWERS else []
        variables = model.init(jax.random.key(0), *inputs, train=False)
        shapes = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables["params"]), sep="/")
        values = {name: peers.random_values(case, name, value.shape) for name, value in shapes.items()}
        prefix = "params/" if case in ("big_vision_tok", TOWERS) else ""
        np.savez_compressed(FOLDER / f"{case}.npz", **{f"{prefix}{name}": value for name, value in values.items()})
        exact = {name: jnp.asarray(value, jnp.float64) for name, value in values.items()}
        tree = flax.traverse_util.unflatten_dict(exact, sep="/")
        logits = model.apply({"params": tree}, *inputs, train=False)
        if case == TOWERS:  # the first output is normalized
            logits = [logits[2]["img/pre_logits"]]
        results[case] = (images, np.asarray(logits[0] if case in (*BIG_VISION, TOWERS) else logits))
        assert np.abs(results[case][1]).max() > 0.1
    peers.record(results, "jax.npz")


if __name__ == "__main__":
    main()
