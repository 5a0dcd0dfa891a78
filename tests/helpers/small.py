"""The small model of the tests, inputs and weights for it, and the folders of the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle

from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import InitConfig
from vit_static.model.variants import grid_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.formats import ExternalWeights, read_weights
from vit_static.weights.load import file_state, init_from
from vit_static.weights.state import State

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference"

# No two dimensions are equal by chance: 12 x 16 pixels, patches of 4, width 24, 3 heads, 5 classes.
SMALL = ModelConfig(
    variant="Ti/16",
    image_size=(12, 16),
    patch_size=4,
    width=24,
    depth=2,
    num_heads=3,
    mlp_dim=48,
    num_classes=5,
    representation_size=24,
    layer_scale_init=0.5,
)

# For meshes, where again no two dimensions are equal by chance: 2 and 4 divide num_heads and mlp_dim, and 2 divides
# num_classes. Of two stages, the first has two blocks and the second has one.
MESH_MODEL = ModelConfig(
    variant="Ti/16",
    image_size=(12, 16),
    patch_size=4,
    width=32,
    depth=3,
    num_heads=4,
    mlp_dim=56,
    num_classes=6,
    layer_scale_init=0.5,
)


def images_and_labels(
    num_images: int, config: ModelConfig = SMALL, seed: int = 0
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return normally distributed images and uniformly distributed labels."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((num_images, config.num_channels, *config.image_size)).astype(np.float32)
    return paddle.to_tensor(images), paddle.to_tensor(rng.integers(0, config.num_classes, num_images))


def read_state(path: Path) -> State:
    """Return the arrays of a weights file."""
    return read_weights(path).state


def set_weights(
    model: VisionTransformer, state: State, config: ModelConfig = SMALL, source: str = "the test's weights"
) -> None:
    """Set all weights of a model, which `config` describes, from a state in the files' layout."""
    init_from(model, config, ExternalWeights(dict(state), "test"), source, InitConfig(head="keep"), grid_of(config))


def model_logits(model: paddle.nn.Layer, images: paddle.Tensor) -> np.ndarray:
    """Return the logits of a model in evaluation."""
    model.eval()
    with paddle.no_grad():
        return model(images).numpy()


def random_state(seed: int = 0, **changed: object) -> dict[str, np.ndarray]:
    """Return random weights for the small model with changed config keys, as they are in files."""
    rng = np.random.default_rng(seed)
    state = file_state(VisionTransformer(SMALL.model_copy(update=changed)))
    return {name: (0.1 * rng.standard_normal(value.shape)).astype(np.float32) for name, value in state.items()}
