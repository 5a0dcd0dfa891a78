"""What a model has wrong, for a run's page: the matrix, classes, confusions, images."""

from __future__ import annotations

from vit_static.report import charts
from vit_static.report.error_analysis import ErrorAnalysis
from vit_static.report.html import LONGEST, escaped, table

_SEVERAL_LABELS = (
    "<p>Images may have several labels here, and a hit is one whose likeliest class is among them. Which label was "
    "taken for which can't be told, so there are no confusions.</p>"
)


def section(found: ErrorAnalysis | None) -> str:
    if found is None:
        return ""
    whose = "the weights' moving average" if found.is_ema else "the weights"
    parts = [
        f"<h2>Mistakes</h2><p>Of the last evaluation, at step {found.step:,}, of {whose}: "
        f"{found.num_images - found.num_correct:,} of {found.num_images:,} images.</p>",
        _SEVERAL_LABELS if found.classes is None else "",
        _matrix(found),
        f'<div class="beside">{_classes(found)}{_confusions(found)}</div>',
        _gallery(found),
    ]
    return "".join(parts)


def _matrix(found: ErrorAnalysis) -> str:
    if found.matrix is None:
        return ""
    names = [_named(found, number) for number in range(len(found.matrix))]
    rows = []
    for label, counts in enumerate(found.matrix):
        total = sum(counts)
        cells = []
        for predicted, count in enumerate(counts):
            share = count / max(total, 1)
            colour = "hit" if label == predicted else "miss"
            title = f"{names[label]} taken for {names[predicted]}: {count:,} of {total:,}"
            cells.append(
                f'<td class="{colour}{" much" if share > 0.5 else ""}" style="--share:{0.12 + 0.88 * share:.2f}" '
                f'title="{escaped(title)}">{count}</td>'
                if count
                else "<td></td>"
            )
        rows.append(f"<tr><th>{escaped(names[label])}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escaped(name)}</th>" for name in names)
    return (
        '<h3>Images by class (rows) and by what they were taken for (columns)</h3><div class="wide">'
        f'<table class="matrix"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _classes(found: ErrorAnalysis) -> str:
    rows = [
        [_named(found, one.label), f"{100 * one.num_correct / max(one.num_images, 1):.1f}", f"{one.num_images:,}"]
        for one in found.classes or ()
    ]
    return f"<div><h3>The worst classes</h3>{table(['class', 'top-1 %', 'images'], rows, 1)}</div>" if rows else ""


def _confusions(found: ErrorAnalysis) -> str:
    rows = [
        [_named(found, one.label), _named(found, one.predicted), f"{one.num_images:,}"]
        for one in found.confusions or ()
    ]
    head = ["class", "taken for", "images"]
    return f"<div><h3>The most frequent confusions</h3>{table(head, rows, 2)}</div>" if rows else ""


def _gallery(found: ErrorAnalysis) -> str:
    if not found.images:
        return ""
    figures = []
    for image in found.images:
        labels = escaped(", ".join(_named(found, label) for label in image.labels) or "?")
        predicted = escaped(_named(found, image.predicted))
        probability = "" if image.probability is None else f" ({100 * image.probability:.1f} %)"
        loss = "no number" if image.loss is None else charts.number(image.loss)
        picture = (
            f'<img alt="{labels}, taken for {predicted}" src="data:image/jpeg;base64,{image.thumbnail}">'
            if image.thumbnail
            else '<span class="none"></span>'
        )
        figures.append(
            f"<figure>{picture}<figcaption><b>{labels}</b> taken for <b>{predicted}</b>{probability}<br>"
            f"loss {loss}<br>{escaped(image.path)}</figcaption></figure>"
        )
    return f'<h3>The wrong images of the greatest loss</h3><div class="gallery">{"".join(figures)}</div>'


def _named(found: ErrorAnalysis, number: int) -> str:
    name = found.class_names.get(number, str(number))
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}…"
