"""Attention rollout, per-head attention, position-embedding similarity and patch filters as pictures; verb `visualize`.

The pictures follow figures 6 and 7 of the ViT paper (arXiv 2010.11929). The rollout is that of Abnar and Zuidema
(arXiv 2005.00928, section 3).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import paddle

from vit_static.common.drawing import (
    apply_colormap,
    darken,
    enlarge_pixels,
    fit_for_display,
    image_grid,
    overlay_heatmap,
    write_png,
)
from vit_static.common.errors import PredictError, UserError, escape
from vit_static.common.text import counted, json_line, path_fields, print_line, say
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import Config
from vit_static.inference.artifact import MODEL_FILE, SPEC_FILE, ModelSpec, Preprocessing, read_spec, spec_of
from vit_static.inference.image_io import find_images
from vit_static.inference.predictor import Preprocessor, prefetch_batches
from vit_static.inference.probabilities import to_probabilities
from vit_static.model.attention import AttentionFunction, attention_by_matmul
from vit_static.model.layers import Dropout
from vit_static.model.variants import shape_of, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.infer import config_for
from vit_static.weights.load import load_into
from vit_static.weights.source import WhichWeights, load_weights
from vit_static.weights.state import split_qkv

MAX_FILTERS, _NUM_FILTER_COLUMNS = 28, 7  # as in figure 7
_SIMILARITY_SIDE = 800  # pixels, about, of the similarity picture; larger if it needs one pixel per patch
_TINY = np.finfo(np.float64).tiny
_MAX_BATCH_SIZE, _MAX_BATCH_WEIGHTS = 8, 2**26  # images; attention weights of a layer (256 MiB)
# Relative to the largest logit: above float32's rounding, and far below the difference between two models.
_MAX_DIFFERENCE = 1e-3


class AttentionRecorder:
    """Attention function (`attention.AttentionFunction`) that records the weights of each layer of a model.

    It holds the weights of the forward passes since `clear`. Not for use by several threads at once.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the recorded weights."""
        self.layers: list[np.ndarray] = []
        self.last_heads = np.zeros((0, 0, 0, 0), np.float32)

    def __call__(
        self, query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, dropout: Dropout
    ) -> paddle.Tensor:
        return attention_by_matmul(query, key, value, lambda weights: dropout(self._record(weights)))

    def _record(self, weights: paddle.Tensor) -> paddle.Tensor:
        """Record the attention weights [B, H, N, N] of one layer, and return them."""
        self.last_heads = weights.numpy()
        self.layers.append(self.last_heads.mean(axis=1))
        return weights


@dataclass(frozen=True)
class RecordedAttention:
    """Logits and attention weights of a forward pass over N tokens: registers, class token, patches."""

    logits: np.ndarray  # [B, num_classes]
    layers: list[np.ndarray]  # first layer first: means over the heads, [B, N queries, N keys]; each row sums to 1
    last_heads: np.ndarray  # of the last layer, or of attention pooling, which has one query: [B, H, N queries, N keys]
    pooling: np.ndarray | None = None  # mean over the heads of attention pooling, [B, N keys]


def record_attention(model: VisionTransformer, images: np.ndarray) -> RecordedAttention:
    """Run preprocessed images [B, 3, height, width] through a model built with an AttentionRecorder.

    Only one thread at a time may use the model.
    """
    recorder = model.blocks[0].attn.attention
    if not isinstance(recorder, AttentionRecorder):
        raise TypeError("the model must have been built with an AttentionRecorder as its attention")
    recorder.clear()
    model.eval()
    read_tokens, model.read_tokens = model.read_tokens, None  # the last layer's attention of all tokens
    try:
        with paddle.no_grad():
            logits = model(paddle.to_tensor(images, place=paddle.CPUPlace())).numpy()
        pooling = recorder.layers.pop()[:, 0] if model.pool == "map" else None
        return RecordedAttention(logits, recorder.layers, recorder.last_heads, pooling)
    finally:
        model.read_tokens = read_tokens
        recorder.clear()


def attention_map(model: VisionTransformer, images: np.ndarray) -> np.ndarray:
    """Return each patch's share in what the head reads, by attention rollout: [B, rows, columns] float32, sum 1.

    `images` are preprocessed, [B, 3, height, width] float32; `model` comes from `load_exported` or `load_checkpoint`.
    Only one thread at a time may use the model.
    """
    return rollout_map(model, record_attention(model, images))


def rollout_map(model: VisionTransformer, recorded: RecordedAttention) -> np.ndarray:
    """Return `attention_map` from attention that has been recorded."""
    shares = rollout(recorded.layers, _query_weights(model, recorded))[:, model.num_prefix_tokens :]
    # The sum is 0 only for a class token that attends to nothing but itself in every layer.
    shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), _TINY)
    return shares.reshape(-1, *model.grid).astype(np.float32)


def rollout(layers: Sequence[np.ndarray], query_weights: np.ndarray) -> np.ndarray:
    """Return the share of each input token in the output tokens, averaged with `query_weights`: [B, N] float64.

    The weights are [N], or [B, N] if images differ.

    `layers` are [B, N, N] each, first layer first. The residual connection counts as the identity, so half of each
    token comes from itself. The product is a vector times matrices, starting from the last layer.
    """
    shares = np.broadcast_to(query_weights.astype(np.float64), layers[0].shape[:2])  # [B, N]
    for weights in reversed(layers):
        shares = 0.5 * shares + 0.5 * np.einsum("bq,bqk->bk", shares, weights)
    return shares


def head_maps(model: VisionTransformer, recorded: RecordedAttention) -> np.ndarray:
    """Return the attention weights of each head of the last layer to each patch, [B, H, rows, columns] float32."""
    query_weights = np.ones(1) if recorded.pooling is not None else _query_weights(model, recorded)
    weights = np.einsum("q,bhqk->bhk", query_weights, recorded.last_heads)
    return weights[..., model.num_prefix_tokens :].reshape(*weights.shape[:2], *model.grid).astype(np.float32)


def _query_weights(model: VisionTransformer, recorded: RecordedAttention) -> np.ndarray:
    """Return the weight of each token in what the head reads, sum 1: the class token, or the patches equally, [N].

    With a distillation token both have the same weight.
    With attention pooling, [B, N], they are its own weights.

    With pool gap the head doesn't read the class token, so its attention in the last layer is untrained. With cls_gap,
    which reads both, it is the class token, as in DINOv2's pictures.
    """
    if recorded.pooling is not None:
        return recorded.pooling
    num_tokens, num_prefix = recorded.last_heads.shape[-1], model.num_prefix_tokens
    query_weights = np.zeros(num_tokens)
    if model.pool == "gap":
        query_weights[num_prefix:] = 1.0 / (num_tokens - num_prefix)
    else:
        query_weights[model.class_tokens] = 1.0
        query_weights /= query_weights.sum()
    return query_weights


def position_similarity(model: VisionTransformer) -> np.ndarray:
    """Return the cosine similarity of each patch's position embedding with all others, [rows, columns, rows, columns].

    It is 0 for an embedding of zeros. The class token's position is left out. Raises ValueError for a model without a
    position embedding (`pos_embed: none`).
    """
    if model.pos_embed is None:
        raise ValueError("the model has no position embedding")
    table = model.pos_embed.numpy()[0].astype(np.float64)[-math.prod(model.grid) :]  # [rows * columns, C]
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    directions = table / np.where(norms > 0.0, norms, 1.0)
    return (directions @ directions.T).reshape(*model.grid, *model.grid)


def patch_filters(model: VisionTransformer, max_filters: int = MAX_FILTERS) -> tuple[np.ndarray, np.ndarray]:
    """Return the principal components of the patch embedding's filters, and each one's share of their variance.

    The components are [K, channels, patch, patch] with norm 1, the shares [K], the largest first. K is `max_filters`,
    or fewer if the filters have fewer components. Signs are arbitrary; here the element with the largest absolute value
    is positive.
    """
    kernel = model.patch_embed.proj.weight.numpy().astype(np.float64)  # [C, channels, patch, patch]
    flat = kernel.reshape(len(kernel), -1)
    _, singular_values, components = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    num_components = max(min(max_filters, len(flat) - 1, flat.shape[1]), 1)
    components = components[:num_components]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    variances = singular_values**2
    shares = variances[:num_components] / max(variances.sum(), _TINY)
    return (components * np.sign(largest)).reshape(num_components, *kernel.shape[1:]), shares


def load_checkpoint(
    config: Config | None,
    checkpoint: Path,
    overrides: list[str],
    *,
    ema: bool = False,
    which: WhichWeights = "last",
    attention: AttentionFunction | None = None,
) -> tuple[VisionTransformer, ModelSpec]:
    """Load the model of a run, a checkpoint or a file of weights, with its description.

    Without `attention`, it is for `attention_map`.
    `which` selects among the weights of a run's folder, `ema` the moving average of the weights. Raises WeightsError or
    ConfigError as the verb `eval` does.
    """
    loaded = load_weights(checkpoint, ema=ema, which=which, overrides=overrides)
    config = config_for(config, loaded, overrides)
    paddle.set_device("cpu")
    model = VisionTransformer(config.model, attention or AttentionRecorder())
    load_into(model, config.model, loaded, config.init.pos_embed)
    model.eval()
    names = loaded.class_names or []
    if len(names) != config.model.num_classes:
        names = [str(label) for label in range(config.model.num_classes)]
    return model, spec_of(config, names)


def load_exported(folder: Path) -> tuple[VisionTransformer, ModelSpec]:
    """Load a model that `export` wrote for `attention_map`, with its description. Raises PredictError."""
    paddle.set_device("cpu")
    return load_as_layer(folder, AttentionRecorder()), read_spec(folder)


def load_as_layer(folder: Path, attention: AttentionFunction = attention_by_matmul) -> VisionTransformer:
    """Load an exported model as a Paddle layer in float32.

    Raises PredictError for an int8 model, and for a folder whose program doesn't fit its description.
    """
    spec = read_spec(folder)
    if spec.precision == "int8":
        raise PredictError(
            f"{folder}: an int8 model gives no attention; use the run that it was exported from, or a float32 export"
        )
    model = VisionTransformer(spec.model, attention)
    program = paddle.jit.load(str(folder / MODEL_FILE.removesuffix(".json")))
    # Paddle appends a number to the name of each parameter that it loads.
    loaded = {tensor.name.rpartition("_")[0]: tensor.astype("float32").numpy() for tensor in program.parameters()}
    state = split_qkv(loaded)
    for name, parameter in model.named_parameters():
        if name not in state or list(state[name].shape) != parameter.shape:
            raise PredictError(f"{folder}: has no parameter {name} {parameter.shape}; export the model again")
        parameter.set_value(state[name])
    model.eval()
    if spec.precision != "float32":  # this machine may not be able to run the program
        return model
    program.eval()
    shape = (1, spec.model.num_channels, *spec.model.image_size)
    noise = paddle.to_tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    with paddle.no_grad():
        outputs = program(noise)  # of a model without a head only the features
        layer_logits = model(noise).numpy()
        program_logits = (outputs[0] if isinstance(outputs, list | tuple) else outputs).numpy()
    if not np.abs(layer_logits - program_logits).max() <= _MAX_DIFFERENCE * np.abs(program_logits).max():
        raise PredictError(f"{folder}: {MODEL_FILE} computes another model than {SPEC_FILE} describes; export it again")
    return model


def visualize(
    config: Config | None,
    folder: Path | None,
    checkpoint: Path | None,
    images: Sequence[Path],
    out: Path,
    overrides: list[str],
    *,
    ema: bool = False,
    which: WhichWeights = "last",
) -> int:
    """Write pictures of the model and of each image to `out`, and return the exit code.

    A model with `pos_embed: none` gets no picture of its position embedding, which is said on stderr.
    The model is the export in `folder`, or that of `checkpoint`. On stdout there is a line per file and a JSON line per
    image. An image that can't be read gets a line with `error`, the others are still drawn, and the exit code is 2.
    """
    if checkpoint is None and (config is not None or overrides or ema):
        raise UserError("-c, -o and --ema need --checkpoint; an exported model has its config in its folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a folder")
    paths = find_images(images)
    if checkpoint is not None:
        model, spec = load_checkpoint(config, checkpoint, overrides, ema=ema, which=which)
    else:
        assert folder is not None
        model, spec = load_exported(folder)
    if model.pos_embed is None:
        say("no position_similarity.png: with model.pos_embed=none, the model has no position embedding")
    else:
        _write(draw_similarity(position_similarity(model)), out / "position_similarity.png")
    _write(draw_filters(*patch_filters(model)), out / "patch_filters.png")

    preprocessor = Preprocessor(spec.preprocessing, len(os.sched_getaffinity(0)))
    options = spec.preprocessing.to_decode_options()
    named_paths = zip(paths, unique_stems(paths), strict=True)
    num_failed = 0
    for inputs, errors in prefetch_batches(paths, _batch_size(spec.model), options, preprocessor):
        results = explain(model, spec, inputs) if len(inputs) else iter(())
        for error in errors:
            path, stem = next(named_paths)
            if error is not None:
                num_failed += 1
                print_line(json_line({**path_fields(str(path)), "error": str(error)}))
                continue
            result = next(results)
            title = f"{stem}: {result.class_name}, {100.0 * result.probability:.1f} %" if result.class_name else stem
            title = escape(title)  # one line of the picture
            _write(draw_rollout(result.pixels, result.rollout, title), out / f"{stem}_rollout.png")
            _write(draw_heads(result.pixels, result.heads, title), out / f"{stem}_heads.png")
            top = [{"class": result.label, "name": result.class_name, "probability": round(result.probability, 6)}]
            print_line(json_line({**path_fields(str(path)), "top": top if result.class_name else []}))
    sys.stdout.flush()
    if num_failed:
        say(f"{counted(num_failed, 'image')} could not be read; see above for the reason")
    return 2 if num_failed else 0


def _batch_size(config: ModelConfig) -> int:
    """Return how many images fit into memory: for a B/14 at 518 pixels, a layer's attention is 90 MB per image."""
    weights_per_image = variant_of(config).num_heads * shape_of(config).num_tokens ** 2
    return min(max(_MAX_BATCH_WEIGHTS // weights_per_image, 1), _MAX_BATCH_SIZE)


def unique_stems(paths: Sequence[Path]) -> list[str]:
    """Return the file names without their suffixes, in the same order; a second `cat` is `cat_2`."""
    stems: dict[str, None] = {}  # a set that keeps the order
    for path in paths:
        candidates = (path.stem if number == 1 else f"{path.stem}_{number}" for number in count(1))
        stems[next(stem for stem in candidates if stem not in stems)] = None
    return list(stems)


@dataclass(frozen=True)
class Explanation:
    """The predicted class of an image (no name without a head), and the attention behind it."""

    label: int
    class_name: str | None
    probability: float
    pixels: np.ndarray  # [height, width, 3] uint8, as the model received them
    rollout: np.ndarray  # [rows, columns]
    heads: np.ndarray  # [H, rows, columns]


def explain(model: VisionTransformer, spec: ModelSpec, images: np.ndarray) -> Iterator[Explanation]:
    """Yield the explanation of each preprocessed image of [B, 3, height, width]."""
    recorded = record_attention(model, images)
    probabilities = to_probabilities(recorded.logits, spec.activation)
    maps = zip(images, probabilities, rollout_map(model, recorded), head_maps(model, recorded), strict=True)
    for image, row, shares, heads in maps:
        label = int(row.argmax())
        pixels = denormalize(image, spec.preprocessing)
        name = spec.class_names[label] if spec.class_names else None
        yield Explanation(label, name, float(row[label]), pixels, shares, heads)


def denormalize(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return the pixels [height, width, 3] uint8 of a preprocessed image [3, height, width], or [1, height, width]."""
    mean, std = (np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    levels = 255.0 * (image * std + mean)
    return _to_rgb(levels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Repeat the grey channel of pixels [..., 1]; return [..., 3] as they are."""
    return pixels if pixels.shape[-1] == 3 else np.repeat(pixels, 3, axis=-1)


def draw_rollout(pixels: np.ndarray, shares: np.ndarray, title: str) -> np.ndarray:
    """Draw an image, its rollout `shares` [rows, columns] as colours over it, and the two multiplied (figure 6)."""
    image, max_share = fit_for_display(pixels, min_side=300, max_side=600), shares.max()
    values = shares / max_share
    panels = [image, overlay_heatmap(image, values), darken(image, values)]
    captions = ["what the model saw", "attention rollout", "the two multiplied"]
    return image_grid(panels, captions, 3, title, colour_bar=("0 %", f"{100 * max_share:.2g} %"))


def draw_heads(pixels: np.ndarray, heads: np.ndarray, title: str) -> np.ndarray:
    """Draw the heads' maps [H, rows, columns] over an image, each scaled to its maximum."""
    image = fit_for_display(pixels, min_side=180, max_side=240)
    num_columns = math.ceil(math.sqrt(len(heads)))
    panels = [overlay_heatmap(image, head / max(head.max(), _TINY)) for head in heads]
    captions = [f"head {index}: up to {100 * head.max():.2g} %" for index, head in enumerate(heads)]
    return image_grid(panels, captions, num_columns, f"{title}\nthe last layer's heads", colour_bar=("0", "most"))


def draw_similarity(similarity: np.ndarray) -> np.ndarray:
    """Draw a map [rows, columns] of cosine similarities per patch, at the patch's place (figure 7, middle)."""
    rows, columns = similarity.shape[:2]
    side = max(_SIMILARITY_SIDE // max(rows**2, columns**2), 1)
    lowest = min(float(similarity.min()), 0.99)  # avoids a division by 0 where all positions are equal
    values = (similarity - lowest) / (1.0 - lowest)
    panels = [
        enlarge_pixels(apply_colormap(values[row, column]), side) for row in range(rows) for column in range(columns)
    ]
    title = f"position embeddings of {rows} x {columns} patches:\ncosine similarity of each with all"
    return image_grid(panels, None, columns, title, gap=min(max(side, 3), 10), colour_bar=(f"{lowest:.2f}", "1"))


def draw_filters(filters: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Draw components [K, channels, patch, patch], each scaled to its maximum, with 0 as grey (figure 7, left)."""
    largest = np.maximum(np.abs(filters).max(axis=(1, 2, 3), keepdims=True), _TINY)
    levels = (255.0 * (0.5 + 0.5 * filters / largest)).round().astype(np.uint8).transpose(0, 2, 3, 1)
    panels = [enlarge_pixels(_to_rgb(level), max(96 // len(level), 1)) for level in levels]
    title = f"patch filters: first {len(filters)} principal components, {100 * shares.sum():.0f} % of their variance"
    captions = [f"{100 * share:.1f} %" for share in shares]
    return image_grid(panels, captions, min(_NUM_FILTER_COLUMNS, len(panels)), title)


def _write(picture: np.ndarray, path: Path) -> None:
    write_png(picture, path)
    print_line(path)
