"""What a model looks at: attention over the image, its position embedding and its patch filters, as pictures; and the
verb `visualize`.

The pictures are those of figures 6 and 7 of the ViT paper (arXiv 2010.11929). The rollout is Abnar and Zuidema's
(arXiv 2005.00928, section 3).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import paddle

from vit_static.common.drawing import colours, darkened, heat, scaled, sheet, squares, write_png
from vit_static.common.errors import PredictError, UserError
from vit_static.config.schema import Config, InitConfig, ModelConfig
from vit_static.inference.artifact import MODEL_FILE, ModelSpec, Preprocessing, read_spec, spec_of
from vit_static.inference.image_io import find_images
from vit_static.inference.predictor import Preprocessor, batches, probabilities_of
from vit_static.model.variants import shape_of, variant_of
from vit_static.model.vit import AttentionFunction, Dropout, VisionTransformer, attention_by_matmul, flash_attention
from vit_static.weights.formats import split_qkv
from vit_static.weights.load import init_from
from vit_static.weights.source import load_weights

NUM_FILTERS, _FILTER_COLUMNS = 28, 7  # figure 7's
_SIMILARITY_SIDE = 800  # pixels, about, of the grid of grids; more where a pixel each needs it
_TINY = np.finfo(np.float64).tiny
_MAX_IMAGES, _MAX_WEIGHTS = 8, 2**26  # a batch's images, and a layer's attention weights (256 MiB)


class AttentionRecorder:
    """An attention function (model.AttentionFunction) that keeps its weights, on their way through a model's layers.

    What it holds is of the forward passes since `clear`: see Observation. Not for several threads at once.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.layers: list[np.ndarray] = []
        self.last_heads = np.zeros((0, 0, 0, 0), np.float32)

    def __call__(
        self, query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, dropout: Dropout
    ) -> paddle.Tensor:
        return attention_by_matmul(query, key, value, lambda weights: dropout(self._record(weights)))

    def _record(self, weights: paddle.Tensor) -> paddle.Tensor:
        """Keep attention weights [B, H, N, N] of one layer, and return them."""
        self.last_heads = weights.numpy()
        self.layers.append(self.last_heads.mean(axis=1))
        return weights


@dataclass(frozen=True)
class Observation:
    """A forward pass: what came out, and who attended to whom. N tokens: registers, class token, patches."""

    logits: np.ndarray  # [B, num_classes]
    layers: list[np.ndarray]  # of each, the first one first, the heads' mean: [B, N queries, N keys], rows' sum 1
    last_heads: np.ndarray  # of the last: [B, H, N queries, N keys]


def observe(model: VisionTransformer, images: np.ndarray) -> Observation:
    """Runs images [B, 3, height, width], as the preprocessing leaves them, through a model built with an
    AttentionRecorder. From one thread at a time."""
    recorder = model.blocks[0].attn.attention
    if not isinstance(recorder, AttentionRecorder):
        raise TypeError("the model must have been built with an AttentionRecorder as its attention")
    recorder.clear()
    model.eval()
    try:
        with paddle.no_grad():
            logits = model(paddle.to_tensor(images, place=paddle.CPUPlace())).numpy()
        return Observation(logits, recorder.layers, recorder.last_heads)
    finally:
        recorder.clear()


def attention_map(model: VisionTransformer, images: np.ndarray) -> np.ndarray:
    """How much each patch has to say in what the head reads: the rollout, [B, rows, columns] float32, sum 1 an image.

    `images` [B, 3, height, width] float32, as the preprocessing leaves them; `model` as `load_exported` or
    `load_checkpoint` give it. Several threads may call it with one model, if a lock lets in one at a time.
    """
    return map_of(model, observe(model, images))


def map_of(model: VisionTransformer, seen: Observation) -> np.ndarray:
    """`attention_map` of what was seen already."""
    found = rollout(seen.layers, _query(model, seen))[:, model.num_prefix_tokens :]
    # A patch keeps some of itself, but a class token may in theory look at nothing but itself.
    found = found / np.maximum(found.sum(axis=1, keepdims=True), _TINY)
    return found.reshape(-1, *model.grid).astype(np.float32)


def rollout(layers: Sequence[np.ndarray], query: np.ndarray) -> np.ndarray:
    """How the tokens of the last layer, weighed by `query` [N], are made up of those before the first: [B, N] float64.

    `layers` [B, N, N] each, the first one first. The residual beside each is the identity: half of each token comes
    from itself. The product is taken from the query's side, a vector at a time.
    """
    found = np.broadcast_to(query.astype(np.float64), layers[0].shape[:2])  # [B, N]
    for weights in reversed(layers):
        found = 0.5 * found + 0.5 * np.einsum("bq,bqk->bk", found, weights)
    return found


def head_maps(model: VisionTransformer, seen: Observation) -> np.ndarray:
    """How much each head of the last layer attends to each patch, [B, H, rows, columns]; the weights themselves."""
    weights = np.einsum("q,bhqk->bhk", _query(model, seen), seen.last_heads)
    return weights[..., model.num_prefix_tokens :].reshape(*weights.shape[:2], *model.grid).astype(np.float32)


def _query(model: VisionTransformer, seen: Observation) -> np.ndarray:
    """Which tokens' attention is asked for, [N] of sum 1: what the head reads, the class token or the patches alike.

    A class token that no head reads (pool gap) has learned nothing in the last layer. Of both (cls_gap) it is the class
    token, as in DINOv2's pictures.
    """
    num_tokens, prefix = seen.last_heads.shape[-1], model.num_prefix_tokens
    query = np.zeros(num_tokens)
    if model.pool == "gap":
        query[prefix:] = 1.0 / (num_tokens - prefix)
    else:
        query[prefix - 1] = 1.0
    return query


def position_similarity(model: VisionTransformer) -> np.ndarray:
    """The cosine of each patch's position embedding with every other's, [rows, columns, rows, columns]; 0 for one
    that is 0 throughout. The class token's position is left out."""
    table = model.pos_embed.numpy()[0].astype(np.float64)[-math.prod(model.grid) :]  # [rows * columns, C]
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    directions = table / np.where(lengths > 0.0, lengths, 1.0)
    return (directions @ directions.T).reshape(*model.grid, *model.grid)


def patch_filters(model: VisionTransformer, most: int = NUM_FILTERS) -> tuple[np.ndarray, np.ndarray]:
    """The principal components of the patch embedding's filters, [K, 3, patch, patch] of length 1, and each one's share
    of their variance, [K], the largest first.

    Their signs are free: the element that is largest by its absolute value is positive. K is `most`, or as many as so
    many filters and pixels can have.
    """
    kernel = model.patch_embed.proj.weight.numpy().astype(np.float64)  # [C, 3, patch, patch]
    flat = kernel.reshape(len(kernel), -1)
    _, lengths, components = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    num_found = max(min(most, len(flat) - 1, flat.shape[1]), 1)
    components = components[:num_found]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    variances = lengths**2
    shares = variances[:num_found] / max(variances.sum(), _TINY)
    return (components * np.sign(largest)).reshape(num_found, *kernel.shape[1:]), shares


def load_checkpoint(
    config: Config | None, checkpoint: Path, overrides: list[str], *, averaged: bool = False
) -> tuple[VisionTransformer, ModelSpec]:
    """The model of a run, a checkpoint or a file of weights, ready for `attention_map`, and what an export's card would
    say of it. Raises WeightsError or ConfigError for what `eval` would not take either."""
    loaded = load_weights(checkpoint, averaged=averaged)
    config = config or loaded.config_with(overrides)
    paddle.set_device("cpu")
    model = VisionTransformer(config.model, AttentionRecorder())
    keeping = InitConfig(head="keep", pos_embed=config.init.pos_embed)
    init_from(model, config.model, loaded.found, str(loaded.source), keeping, loaded.grid)
    model.eval()
    names = loaded.class_names or []
    if len(names) != config.model.num_classes:
        names = [str(number) for number in range(config.model.num_classes)]
    return model, spec_of(config, names)


def load_exported(folder: Path) -> tuple[VisionTransformer, ModelSpec]:
    """The model of a folder that `export` wrote, ready for `attention_map`, and its card. Raises PredictError."""
    paddle.set_device("cpu")
    return load_model(folder, AttentionRecorder()), read_spec(folder)


def visualize(
    config: Config | None,
    folder: Path | None,
    checkpoint: Path | None,
    images: Sequence[Path],
    out: Path,
    overrides: list[str],
    *,
    averaged: bool = False,
) -> int:
    """The verb: pictures of the model and of each image in `out`, a line a file and a JSON line an image on stdout.

    The model is that of the export in `folder` or of `checkpoint`. An image that can't be read gets a line with `error`
    and exit code 2 at the end; the others are still done.
    """
    if checkpoint is None and (config is not None or overrides or averaged):
        raise UserError("-c, -o and --ema go with --checkpoint; an exported model's config stands in its folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a folder")
    paths = find_images(images)
    if checkpoint is not None:
        model, card = load_checkpoint(config, checkpoint, overrides, averaged=averaged)
    else:
        assert folder is not None
        model, card = load_exported(folder)
    _write(draw_similarity(position_similarity(model)), out / "position_similarity.png")
    _write(draw_filters(*patch_filters(model)), out / "patch_filters.png")

    preprocessor = Preprocessor(card.preprocessing, len(os.sched_getaffinity(0)))
    names = zip(paths, distinct_stems(paths), strict=True)
    num_failed = 0
    for inputs, problems in batches(paths, _batch_size(card.model), preprocessor):
        found = _predictions(model, card, inputs) if len(inputs) else iter(())
        for problem in problems:
            path, name = next(names)
            if problem is not None:
                num_failed += 1
                print(json.dumps({"path": str(path), "error": str(problem)}))
                continue
            answer = next(found)
            title = f"{name}: {answer.class_name}, {100.0 * answer.probability:.1f} %"
            _write(draw_rollout(answer.picture, answer.rolled, title), out / f"{name}_rollout.png")
            _write(draw_heads(answer.picture, answer.heads, title), out / f"{name}_heads.png")
            top = {"class": answer.label, "name": answer.class_name, "probability": round(answer.probability, 6)}
            print(json.dumps({"path": str(path), "top": [top]}, ensure_ascii=False))
    sys.stdout.flush()
    if num_failed:
        print(f"vit_static: {num_failed} images could not be read; their lines say why", file=sys.stderr)
    return 2 if num_failed else 0


def _batch_size(config: ModelConfig) -> int:
    """As many images as memory is meant for: at 518 pixels a B/14's attention is 90 MB an image and layer."""
    a_layer = variant_of(config).num_heads * shape_of(config).num_tokens ** 2
    return min(max(_MAX_WEIGHTS // a_layer, 1), _MAX_IMAGES)


def distinct_stems(paths: Sequence[Path]) -> list[str]:
    """The files' names without their endings, in the same order; a second `cat` is `cat_2`."""
    stems: dict[str, None] = {}  # in their order
    for path in paths:
        tried = (path.stem if number == 1 else f"{path.stem}_{number}" for number in count(1))
        stems[next(stem for stem in tried if stem not in stems)] = None
    return list(stems)


@dataclass(frozen=True)
class _Prediction:
    """What the model says of an image, and where it looked."""

    label: int
    class_name: str
    probability: float
    picture: np.ndarray  # [height, width, 3] uint8: what the model saw
    rolled: np.ndarray  # [rows, columns]
    heads: np.ndarray  # [H, rows, columns]


def _predictions(model: VisionTransformer, card: ModelSpec, images: np.ndarray) -> Iterator[_Prediction]:
    """Of images [B, 3, height, width] as the preprocessing leaves them."""
    seen = observe(model, images)
    chances = probabilities_of(seen.logits, card.activation)
    for image, row, rolled, heads in zip(images, chances, map_of(model, seen), head_maps(model, seen), strict=True):
        best = int(row.argmax())
        picture = pixels_of(image, card.preprocessing)
        yield _Prediction(best, card.class_names[best], float(row[best]), picture, rolled, heads)


def pixels_of(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """The picture [height, width, 3] uint8 that an input of the model [3, height, width] is of."""
    mean, std = (np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    levels = 255.0 * (image * std + mean)
    return levels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def draw_rollout(picture: np.ndarray, rolled: np.ndarray, title: str) -> np.ndarray:
    """The picture, with the rollout [rows, columns] as colours over it, and darkened where it is small (figure 6)."""
    shown, most = scaled(picture, least=300, most=600), rolled.max()
    share = rolled / most
    panels = [shown, heat(shown, share), darkened(shown, share)]
    captions = ["what the model saw", "attention rollout", "the two multiplied"]
    return sheet(panels, captions, 3, title, scale=("0 %", f"{100 * most:.2g} %"))


def draw_heads(picture: np.ndarray, heads: np.ndarray, title: str) -> np.ndarray:
    """The heads' maps [H, rows, columns] over the picture, each light where it is largest."""
    shown = scaled(picture, least=180, most=240)
    columns = math.ceil(math.sqrt(len(heads)))
    panels = [heat(shown, head / max(head.max(), _TINY)) for head in heads]
    captions = [f"head {number}: up to {100 * head.max():.2g} %" for number, head in enumerate(heads)]
    return sheet(panels, captions, columns, f"{title}\nthe last layer's heads", scale=("0", "most"))


def draw_similarity(similarity: np.ndarray) -> np.ndarray:
    """Figure 7's middle: at each patch's place its cosine with all, each a small map [rows, columns]."""
    rows, columns = similarity.shape[:2]
    side = max(_SIMILARITY_SIDE // max(rows**2, columns**2), 1)
    least = min(float(similarity.min()), 0.99)  # of one patch, or of positions that are all the same, a scale
    shown = (similarity - least) / (1.0 - least)
    panels = [squares(colours(shown[row, column]), side) for row in range(rows) for column in range(columns)]
    title = f"position embeddings of {rows} x {columns} patches:\ncosine similarity of each with all"
    return sheet(panels, None, columns, title, gap=min(max(side, 3), 10), scale=(f"{least:.2f}", "1"))


def draw_filters(filters: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Figure 7's left: components [K, 3, patch, patch], each on its own scale, grey where they are 0."""
    largest = np.maximum(np.abs(filters).max(axis=(1, 2, 3), keepdims=True), _TINY)
    levels = (255.0 * (0.5 + 0.5 * filters / largest)).round().astype(np.uint8).transpose(0, 2, 3, 1)
    panels = [squares(level, max(96 // len(level), 1)) for level in levels]
    title = f"patch filters: first {len(filters)} principal components, {100 * shares.sum():.0f} % of their variance"
    captions = [f"{100 * share:.1f} %" for share in shares]
    return sheet(panels, captions, min(_FILTER_COLUMNS, len(panels)), title)


def _write(picture: np.ndarray, path: Path) -> None:
    write_png(picture, path)
    print(path)


# Of the largest logit: what the order of float32's additions may change, and a card of another model does not.
_LARGEST_DIFFERENCE = 1e-3


def load_model(folder: Path, attention: AttentionFunction = flash_attention) -> VisionTransformer:
    """The exported model as a layer of Paddle's, in float32, to look into. Raises PredictError for a folder that an
    earlier version exported, whose parameters have no names."""
    card = read_spec(folder)
    if card.precision == "int8":
        raise PredictError(f"{folder}: int8 can't be looked into; use the run that it is of, or a float32 export")
    model = VisionTransformer(card.model, attention)
    # Paddle puts a number behind each name that it loads.
    program = paddle.jit.load(str(folder / MODEL_FILE.removesuffix(".json")))
    found = {one.name.rpartition("_")[0]: one.astype("float32").numpy() for one in program.parameters()}
    state = split_qkv(found)
    for name, parameter in model.named_parameters():
        if name not in state or list(state[name].shape) != parameter.shape:
            raise PredictError(f"{folder}: has no parameter {name} {parameter.shape}; export the model again")
        parameter.set_value(state[name])
    model.eval()
    if card.precision != "float32":  # whose program this process may not be able to run
        return model
    program.eval()
    size = card.model.image_size
    noise = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32))
    with paddle.no_grad():
        ours, theirs = model(noise).numpy(), program(noise)[0].numpy()
    if not np.abs(ours - theirs).max() <= _LARGEST_DIFFERENCE * np.abs(theirs).max():
        raise PredictError(f"{folder}: its program doesn't compute what its card says; export the model again")
    return model
