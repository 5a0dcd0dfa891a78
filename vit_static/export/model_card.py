"""The card of an exported model for people, MODEL_CARD.md."""

from __future__ import annotations

from vit_static.config.schema import Config
from vit_static.inference.artifact import MODEL_FILE, ONNX_FILE, PIXELS_FILE, SPEC_FILE, WEIGHTS_FILE, ModelSpec
from vit_static.model import flops

_MAX_NAMES = 20  # of classes, in the text

_PADDLE = """```python
from paddle import inference

config = inference.Config("{model}", "{weights}")
config.enable_mkldnn()  # a CPU; on a card config.enable_use_gpu(256, 0)
predictor = inference.create_predictor(config)
images = predictor.get_input_handle("images")
images.copy_from_cpu(batch)  # {shape} float32
predictor.run()
logits = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
```"""

_ONNX = """```python
import onnxruntime

session = onnxruntime.InferenceSession("{onnx}")
logits, features = session.run(["logits", "features"], {{"images": batch}})  # {shape} float32
```"""


def model_card_text(card: ModelSpec, config: Config, source: str, shape: flops.Shape, num_parameters: int) -> str:
    """The whole file, in Markdown. `source`: where the weights are from."""
    height, width = card.model.image_size
    batch = f"[B, 3, {height}, {width}]"
    parts = [
        f"# {_plain(config.name)}",
        f"A Vision Transformer {card.model.variant}, {shape.width} wide, {shape.depth} deep, of "
        f"{num_parameters / 1e6:.2f} million parameters and {2 * flops.forward_macs(shape) / 1e9:.2f} GFLOP an image "
        f"of {height}x{width} pixels, for {len(card.class_names)} classes ({_plain(_names(card.class_names))}). The "
        f"weights: `{_plain(source)}`; the images that it was trained on: `{_plain(config.data.root)}`.",
        "## What it does",
        _table(
            ["file", "precision", "top-1 %", "the trained model's", "same class %", "largest difference"],
            [
                [
                    name,
                    "float32" if name == ONNX_FILE and card.precision != "int8" else card.precision,
                    f"{found.top1_exported:.2f}",
                    f"{found.top1_trained:.2f}",
                    f"{found.same_class:.2f}",
                    f"{found.largest_difference:.1e}",
                ]
                for name, found in card.comparisons.items()
            ],
        ),
        f"Over {max((found.num_images for found in card.comparisons.values()), default=0)} images of the validation "
        "set. The difference is that of a logit, or where the program has the preprocessing in it of a probability, "
        "from the trained model in float32.",
        "## Input and output",
        f"`images` {batch} float32, any B: RGB, {_preprocessing(card)}. Outputs: logits [B, {len(card.class_names)}], "
        f"whose {'softmax' if card.activation == 'softmax' else 'sigmoid'} are the probabilities, and features, what "
        "the head reads; both float32.",
    ]
    if PIXELS_FILE in card.files:
        parts.append(
            f"`{PIXELS_FILE}` (with `{WEIGHTS_FILE}`) has all of that in itself: `pixels` [B, height, width, 3] uint8 "
            "of any size to probabilities and features."
        )
    parts += ["## How to use it", "`./run.sh predict --model DIR IMAGE` or `./run.sh serve --model DIR`, or"]
    if MODEL_FILE in card.files:
        parts.append(_PADDLE.format(model=MODEL_FILE, weights=WEIGHTS_FILE, shape=batch))
    if ONNX_FILE in card.files:
        parts.append(_ONNX.format(onnx=ONNX_FILE, shape=batch))
    parts.append(f"The classes' names, in order, and the preprocessing stand in `{SPEC_FILE}`, for programs.")
    return "\n\n".join(parts) + "\n"


def _preprocessing(card: ModelSpec) -> str:
    asked = card.preprocessing
    height, width = asked.image_size
    kernel = f"{asked.interpolation}{', antialiased' if asked.antialias else ''}"
    if asked.resize == "direct":
        resized = f"resized to {height}x{width} ({kernel})"
    else:
        least = round(height / asked.crop_pct), round(width / asked.crop_pct)
        resized = f"resized until it covers {least[0]}x{least[1]} ({kernel}), the middle {height}x{width} cut out"
    return f"{resized}, (pixel / 255 - {list(asked.mean)}) / {list(asked.std)}"


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown}, ..."


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _plain(given: str) -> str:
    """A name as text in Markdown: of a stranger's class names nothing is a link or a tag."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+!|<>~&" else letter for letter in given)
    return " ".join(escaped.split())
