"""The report's section on misclassified images: confusion matrix, worst classes, confusions, gallery."""

from __future__ import annotations

from dataclasses import dataclass

from vit_static.report.charts import format_number
from vit_static.report.error_analysis import ErrorAnalysis, MisclassifiedImage
from vit_static.report.reliability_chart import reliability_chart
from vit_static.report.tables import MAX_NAME_LENGTH, Table, shorten

MAX_QUALITY_ROWS = 200  # classes of the table


@dataclass(frozen=True)
class MatrixCell:
    """The images of one class that were predicted as another or the same one. `opacity` of the colour is 0-1."""

    count: int
    css_classes: str
    opacity: str
    tooltip: str


@dataclass(frozen=True)
class MatrixRow:
    """The images of one class, by predicted class; None where there are none."""

    name: str
    cells: list[MatrixCell | None]


@dataclass(frozen=True)
class CorrectExample:
    """A correctly classified image beside a misclassified one; `thumbnail` as there."""

    thumbnail: str
    label: str
    path: str


@dataclass(frozen=True)
class GalleryImage:
    """A misclassified image and its caption. `thumbnail` is a JPEG file in base64, empty if the image is unreadable."""

    thumbnail: str
    labels: str
    predicted: str
    probability: str
    loss: str
    path: str
    correct: list[CorrectExample]  # of its class and of the one that it is mistaken for, where there are any


@dataclass(frozen=True)
class ErrorSection:
    """The texts of templates/errors.html.j2."""

    step: str
    of_average: str  # says that the moving average was evaluated, if it was
    has_errors: bool
    num_errors: str
    num_images: str
    has_several_labels: bool
    matrix: list[MatrixRow]
    worst_classes: Table
    confusions: Table
    gallery: list[GalleryImage]
    class_quality: Table  # all classes, or those with the lowest F1
    num_classes: str
    reliability: str  # HTML


def error_section(analysis: ErrorAnalysis) -> ErrorSection:
    """Format an error analysis for the template."""
    return ErrorSection(
        step=f"{analysis.step:,}",
        of_average=" (of the moving average of the weights)" if analysis.is_ema else "",
        has_errors=analysis.num_correct < analysis.num_images,
        num_errors=f"{analysis.num_images - analysis.num_correct:,}",
        num_images=f"{analysis.num_images:,}",
        has_several_labels=analysis.has_several_labels,
        matrix=_matrix(analysis),
        worst_classes=_worst_classes(analysis),
        confusions=_confusions(analysis),
        gallery=[_gallery_image(analysis, image) for image in analysis.images],
        class_quality=_class_quality(analysis),
        num_classes=f"{analysis.num_classes:,}",
        reliability=_reliability(analysis),
    )


def _matrix(analysis: ErrorAnalysis) -> list[MatrixRow]:
    counts = analysis.matrix or []
    names = [_class_name(analysis, label) for label in range(len(counts))]
    rows = []
    for label, row in enumerate(counts):
        total = sum(row)
        cells: list[MatrixCell | None] = []
        for predicted, count in enumerate(row):
            share = count / max(total, 1)
            colour = "hit" if label == predicted else "miss"
            cell = MatrixCell(
                count,
                css_classes=f"{colour} much" if share > 0.5 else colour,
                opacity=f"{0.12 + 0.88 * share:.2f}",
                tooltip=f"{names[label]} predicted as {names[predicted]}: {count:,} of {total:,}",
            )
            cells.append(cell if count else None)
        rows.append(MatrixRow(names[label], cells))
    return rows


def _worst_classes(analysis: ErrorAnalysis) -> Table:
    rows = [
        [
            _class_name(analysis, entry.label),
            f"{100 * entry.num_correct / max(entry.num_images, 1):.1f}",
            f"{entry.num_images:,}",
        ]
        for entry in analysis.classes or ()
        if entry.num_correct < entry.num_images
    ]
    return Table(["class", "top-1 %", "images"], rows, 1)


def _confusions(analysis: ErrorAnalysis) -> Table:
    rows = [
        [_class_name(analysis, entry.label), _class_name(analysis, entry.predicted), f"{entry.num_images:,}"]
        for entry in analysis.confusions or ()
    ]
    return Table(["class", "predicted as", "images"], rows, 2)


def _class_quality(analysis: ErrorAnalysis) -> Table:
    """Precision, recall and F1 by class, the lowest F1 first; of equal ones the larger class."""
    classes = sorted(analysis.per_class or (), key=lambda each: (each.f1, -each.support))
    classes = [each for each in classes if each.support][:MAX_QUALITY_ROWS]
    head = ["class", "precision %", "recall %", "F1 %", "images"]
    has_average_precision = any(each.average_precision is not None for each in classes)
    rows = []
    for each in classes:
        shares = [each.precision, each.recall, each.f1]
        shares += [each.average_precision or 0.0] if has_average_precision else []
        figures = [f"{100.0 * share:.1f}" for share in shares]
        rows.append([shorten(each.name, MAX_NAME_LENGTH), *figures[:3], f"{each.support:,}", *figures[3:]])
    return Table([*head, *(["AP %"] if has_average_precision else [])], rows, 1)


def _reliability(analysis: ErrorAnalysis) -> str:
    if analysis.calibration is None:
        return ""
    if analysis.has_several_labels:
        return reliability_chart(analysis.calibration, "share of images with the label", "probability of a class")
    return reliability_chart(analysis.calibration, "accuracy by confidence", "probability of the top class")


def _gallery_image(analysis: ErrorAnalysis, image: MisclassifiedImage) -> GalleryImage:
    return GalleryImage(
        thumbnail=image.thumbnail,
        labels=", ".join(_class_name(analysis, label) for label in image.labels) or "?",
        predicted=_class_name(analysis, image.predicted),
        probability="" if image.probability is None else f" ({100 * image.probability:.1f} %)",
        loss="not finite" if image.loss is None else format_number(image.loss),
        path=image.path,
        correct=_correct_examples(analysis, image),
    )


def _correct_examples(analysis: ErrorAnalysis, image: MisclassifiedImage) -> list[CorrectExample]:
    by_label = {example.label: example for example in analysis.examples}
    examples = [by_label[label] for label in (*image.labels, image.predicted) if label in by_label]
    return [CorrectExample(each.thumbnail, _class_name(analysis, each.label), each.path) for each in examples]


def _class_name(analysis: ErrorAnalysis, label: int) -> str:
    return shorten(analysis.class_names.get(label, str(label)), MAX_NAME_LENGTH)
