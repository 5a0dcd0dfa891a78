"""A trained model as a Paddle layer: prediction and attention maps from weights, without an export."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
from PIL import Image

from vit_static.common.errors import PredictError, escape
from vit_static.config.schema import Config
from vit_static.inference.artifact import ModelSpec
from vit_static.inference.attention_maps import (
    AttentionRecorder,
    attention_map,
    draw_rollout,
    explain,
    load_checkpoint,
)
from vit_static.inference.image_io import ImageLike, require_several, to_pixels
from vit_static.inference.predictor import Pool, Predictor, Preprocessor
from vit_static.model.attention import attention_by_matmul
from vit_static.model.vit import VisionTransformer
from vit_static.weights.source import WhichWeights


class LayerSession:
    """A Paddle layer as the `backends.Session` of a Predictor."""

    place = "the CPU, as a Paddle layer"

    def __init__(self, layer: VisionTransformer, *, has_head: bool) -> None:
        self._layer, self._has_head = layer, has_head

    def run(self, images: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Return logits [B, num_classes] and features [B, width] for preprocessed images [B, 3, height, width]."""
        with paddle.no_grad():
            features = self._layer.features(paddle.to_tensor(images))
            logits = self._layer.logits(features).numpy() if self._has_head else np.empty((len(images), 0), np.float32)
        return logits, features.numpy() if with_features else None


class TrainedModel(Predictor):
    """Trained weights with their preprocessing: predicts as an exported model does, in float32 on the CPU.

    `layer` is the `paddle.nn.Layer`, in evaluation mode; what is changed in it counts. `spec` has the class names and
    the preprocessing.
    """

    def __init__(self, layer: VisionTransformer, spec: ModelSpec) -> None:
        self.layer, self.spec = layer, spec
        threads = len(os.sched_getaffinity(0))
        self._decode_options = spec.preprocessing.to_decode_options()
        self._sessions = Pool(1, lambda: LayerSession(layer, has_head=spec.model.num_classes > 0))
        self._preprocessors = Pool(1, lambda: Preprocessor(spec.preprocessing, threads))
        self.description = f"float32 on {LayerSession.place}"

    def attention(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Return each patch's share in what the head reads, by attention rollout: [B, rows, columns] float32, sum 1.

        Raise PredictError, with the image's path, for one that can't be read.
        """
        if not images:
            raise PredictError("no images; pass at least one")
        return attention_map(self._recording_layer(), self._inputs(images))

    def draw_attention(self, image: ImageLike, title: str | None = None) -> Image.Image:
        """Draw an image as the model saw it, beside the attention rollout over it; by default under its class."""
        (result,) = explain(self._recording_layer(), self.spec, self._inputs([image]))
        of_class = f"{result.class_name}, {100.0 * result.probability:.1f} %" if result.class_name else "features"
        return Image.fromarray(draw_rollout(result.pixels, result.rollout, escape(title or of_class)))

    def _inputs(self, images: Sequence[ImageLike]) -> np.ndarray:
        require_several(images)
        return self.preprocess([to_pixels(image, self._decode_options) for image in images])

    def _recording_layer(self) -> VisionTransformer:
        """Return a copy of the layer, with its present weights, that records its attention."""
        layer = VisionTransformer(self.spec.model, AttentionRecorder())
        layer.set_state_dict(self.layer.state_dict())
        layer.eval()
        return layer


def load_trained(
    source: Path, config: Config | None, overrides: list[str], *, ema: bool = False, which: WhichWeights = "last"
) -> TrainedModel:
    """Load the model of a run, a checkpoint or a file of weights; the arguments and errors of `load_checkpoint`."""
    layer, spec = load_checkpoint(config, source, overrides, ema=ema, which=which, attention=attention_by_matmul)
    return TrainedModel(layer, spec)
