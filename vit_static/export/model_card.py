"""Model card of an exported model, MODEL_CARD.md."""

from __future__ import annotations

import re

from vit_static.common.errors import escape
from vit_static.common.text import counted, flops_text
from vit_static.config.schema import Config
from vit_static.export.card_parts import class_rows, header, limits, recipe_rows
from vit_static.inference.artifact import (
    MODEL_FILE,
    ONNX_FILE,
    PIXELS_FILE,
    SPEC_FILE,
    WEIGHTS_FILE,
    Comparison,
    ModelSpec,
)
from vit_static.model import flops
from vit_static.model.variants import model_name
from vit_static.report.class_metrics import ClassCounts
from vit_static.weights.loaded import Weights

_MAX_CLASS_NAMES = 20  # shown in the text
_LICENSE_HINT = ": nobody has said under which license these weights may be used (`export.license`)"

_PADDLE_EXAMPLE = """```python
from paddle import inference

config = inference.Config("{model}", "{weights}")
config.enable_mkldnn()  # on a CPU; on a GPU: config.enable_use_gpu(256, 0)
predictor = inference.create_predictor(config)
images = predictor.get_input_handle("images")
images.copy_from_cpu(batch)  # {shape} float32
predictor.run()
logits = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
```"""

_ONNX_EXAMPLE = """```python
import onnxruntime

session = onnxruntime.InferenceSession("{onnx}")
logits, features = session.run(["logits", "features"], {{"images": batch}})  # {shape} float32
```"""


def model_card_text(
    spec: ModelSpec,
    config: Config,
    weights: Weights,
    shape: flops.Shape,
    num_parameters: int,
    counts: ClassCounts | None,
) -> str:
    """Return the model card in Markdown, with Hugging Face's header; `counts` are those of the validation images."""
    colours = "grey" if spec.model.num_channels == 1 else "RGB"
    input_shape = "[B, {}, {}, {}]".format(spec.model.num_channels, *spec.model.image_size)
    parts = [
        header(config, spec, next(iter(spec.comparisons.values()), None), counts),
        f"# {_escape_markdown(config.name)}",
        _introduction(spec, config, str(weights.source), shape, num_parameters),
        "## Accuracy",
        *_accuracy(spec),
        *_by_class(spec, counts),
        "## Training",
        *_training(config, weights),
        "## Input and output",
        f"`images` {input_shape} float32, any B: {colours}, {_describe_preprocessing(spec)}. "
        f"{_describe_decoding(spec)} {_describe_outputs(spec)}",
    ]
    if spec.temperature != 1.0:
        parts.append(f"The logits are divided by a temperature of {spec.temperature:.4f}, fitted on validation images.")
    if spec.thresholds is not None:
        parts.append(
            f"An image has every class whose probability reaches its threshold in `{SPEC_FILE}`; the thresholds have "
            "the highest F1 on the validation images."
        )
    if PIXELS_FILE in spec.files:
        parts.append(
            f"`{PIXELS_FILE}` (with `{WEIGHTS_FILE}`) includes the preprocessing: from `pixels` [B, height, width, 3] "
            "uint8 of any size to probabilities and features."
        )
    parts += ["## Limits", "\n".join(f"- {sentence}" for sentence in limits(spec, counts))]
    parts += [
        "## License",
        f"{code_span(config.export.license)}{_LICENSE_HINT if config.export.license == 'unknown' else ''}",
    ]
    parts += ["## Usage", "`./run.sh predict --model DIR IMAGE` or `./run.sh serve --model DIR`, or"]
    if MODEL_FILE in spec.files:
        parts.append(_PADDLE_EXAMPLE.format(model=MODEL_FILE, weights=WEIGHTS_FILE, shape=input_shape))
    if ONNX_FILE in spec.files:
        parts.append(_ONNX_EXAMPLE.format(onnx=ONNX_FILE, shape=input_shape))
    parts.append(f"`{SPEC_FILE}` holds the class names, in order, and the preprocessing for programs.")
    return "\n\n".join(parts) + "\n"


def _introduction(spec: ModelSpec, config: Config, source: str, shape: flops.Shape, num_parameters: int) -> str:
    height, width = spec.model.image_size
    variant = model_name(spec.model).removeprefix("ViT")
    return (
        f"A Vision Transformer{variant} of width {shape.width} and depth {shape.depth}, with "
        f"{num_parameters / 1e6:.2f} million parameters and {flops_text(2 * flops.forward_macs(shape))} per image "
        f"of {height}x{width} pixels, for {counted(len(spec.class_names), 'class')} "
        f"({_escape_markdown(_list_names(spec.class_names))}). Weights: {code_span(source)}."
    )


def _by_class(spec: ModelSpec, counts: ClassCounts | None) -> list[str]:
    if counts is None:
        return []
    rows, macro = class_rows(counts, spec.class_names)
    escaped = [[_escape_markdown(name), *values] for name, *values in rows]
    return ["### By class", macro, _table(["class", "precision %", "recall %", "F1 %", "images"], escaped)]


def _training(config: Config, weights: Weights) -> list[str]:
    """Return where the data are and how the weights were trained, as far as it is known."""
    origin = "this recipe; keys that are not in the table have their defaults"
    if weights.config is None:
        origin = "a recipe that is not known: no config is beside them. That of the export is"
    data, start = config.data, config.init.from_
    sentences = [
        f"Images: {code_span(data.root)}, of which {code_span(data.train)} for training and "
        f"{code_span(data.val)} for metrics; {'several labels' if data.multi_label else 'one label'} each.",
        f"The weights were trained with {origin}:",
        _table(["key", "value"], [[f"`{key}`", _escape_markdown(value)] for key, value in recipe_rows(config)]),
    ]
    if start is not None:
        sentences.insert(1, f"Training started from {code_span(start)}, whose license applies, too.")
    return sentences


def _accuracy(spec: ModelSpec) -> list[str]:
    """Return the table of comparisons with the trained model, and a sentence about it."""
    rows = [
        [
            name,
            "float32" if name == ONNX_FILE and spec.precision != "int8" else spec.precision,
            *("-" if value is None else f"{value:.2f}" for value in _agreement(comparison)),
            f"{comparison.largest_difference:.1e}",
        ]
        for name, comparison in spec.comparisons.items()
    ]
    num_images = max((comparison.num_images for comparison in spec.comparisons.values()), default=0)
    return [
        _table(["file", "precision", "top-1 %", "the trained model's", "same class %", "largest difference"], rows),
        f"Measured on {num_images} validation images. The difference is that of a logit from the trained model's in "
        "float32, or of a probability if the program includes the preprocessing.",
    ]


def _describe_outputs(spec: ModelSpec) -> str:
    if not spec.class_names:
        return "Output: features, the pooled state after the last norm, float32; there is no classification head."
    activation = "softmax" if spec.activation == "softmax" else "sigmoid"
    return (
        f"Outputs: logits [B, {len(spec.class_names)}], whose {activation} gives the probabilities, and features, the "
        "input of the classification head; both float32."
    )


def _agreement(comparison: Comparison) -> tuple[float | None, ...]:
    return comparison.top1_exported, comparison.top1_trained, comparison.same_class


def _describe_preprocessing(spec: ModelSpec) -> str:
    preprocessing = spec.preprocessing
    height, width = preprocessing.image_size
    kernel = f"{preprocessing.interpolation}{', antialiased' if preprocessing.antialias else ''}"
    if preprocessing.resize == "direct":
        resized = f"resized to {height}x{width} ({kernel})"
    else:
        min_height, min_width = round(height / preprocessing.crop_pct), round(width / preprocessing.crop_pct)
        resized = f"resized to cover {min_height}x{min_width} ({kernel}), cropped to the central {height}x{width}"
    return f"{resized}, (pixel / 255 - {list(preprocessing.mean)}) / {list(preprocessing.std)}"


def _describe_decoding(spec: ModelSpec) -> str:
    options = spec.preprocessing.to_decode_options()
    orientation = "applied" if options.orientation == "apply" else "ignored"
    transparency = "dropped" if options.background is None else f"composed onto RGB {list(options.background)}"
    return f"When image files are decoded, their orientation (EXIF) is {orientation} and transparency {transparency}."


def _list_names(names: list[str]) -> str:
    listed = ", ".join(names[:_MAX_CLASS_NAMES])
    return listed if len(names) <= _MAX_CLASS_NAMES else f"{listed}, ..."


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def code_span(text: str) -> str:
    """Return text as a code span, in which nothing but the end mark has a meaning. Not for tables."""
    shown = escape(text)
    mark = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    space = " " if "`" in shown or not shown.strip() else ""
    return f"{mark}{space}{shown}{space}{mark}"


def _escape_markdown(text: str) -> str:
    """Escape text, so that a class name from elsewhere can't contain a link or a tag."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+!|<>~&" else letter for letter in escape(text))
