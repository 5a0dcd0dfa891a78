"""The verb `probe`: how well frozen features classify a data set, as a table."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.errors import UserError
from vit_static.common.io import write_json
from vit_static.common.terminal import print_table
from vit_static.common.text import counted, duration, print_line
from vit_static.config.schema import Config
from vit_static.probe import classifiers
from vit_static.probe.classifiers import Samples
from vit_static.probe.features import FeatureExtractor, cached_features, open_split

METHODS = ("knn", "logistic", "fewshot")
Row = tuple[str, str, str]  # method, setting, top-1


def probe(
    extractor: FeatureExtractor,
    config: Config,
    *,
    only: Collection[str] = (),
    json_path: Path | None = None,
    refresh: bool = False,
) -> None:
    """Extract the features of the config's training and validation images, and print the classifiers' accuracies.

    `only` selects among METHODS. Raises UserError if logistic regression is selected and scikit-learn isn't installed,
    and DataError for images that can't be used.
    """
    if "logistic" in only and not classifiers.has_scikit_learn():
        raise UserError("--only logistic: needs scikit-learn; install it with 'pip install scikit-learn'")
    started = time.monotonic()
    splits = {split: open_split(config, split) for split in ("train", "val")}
    samples = {split: cached_features(extractor, images, refresh=refresh) for split, images in splits.items()}
    (train, is_train_cached), (val, is_val_cached) = samples["train"], samples["val"]
    is_cached = is_train_cached and is_val_cached
    print_line(
        f"{extractor.description}: {train.features.shape[1]} features of {len(train)} training and {len(val)} "
        f"validation images in {config.data.root}, {'from the cache' if is_cached else 'extracted'} in "
        f"{duration(time.monotonic() - started)}",
        flush=True,
    )
    selected = only or METHODS
    results: dict[str, Any] = {}
    rows: list[Row] = []
    for method in METHODS:
        if method in selected:
            results[method], more = _MEASURE[method](train, val, config.seed)
            rows += more
    _print_table(rows)
    if json_path is not None:
        facts = {
            "model": extractor.description,
            "data": config.data.root,
            "num_train": len(train),
            "num_val": len(val),
            "num_features": train.features.shape[1],
            "is_cached": is_cached,
        }
        write_json(facts | results, json_path)


def _measure_knn(train: Samples, val: Samples, seed: int) -> tuple[Any, list[Row]]:
    accuracies = classifiers.knn_accuracies(train, val)
    rows = [("k-NN", f"k = {k}", f"{top1:.2f}") for k, top1 in accuracies.items()]
    if not rows:
        rows = [("k-NN", f"not run: fewer than {min(classifiers.NEIGHBOURS)} training images", "-")]
    return {str(k): top1 for k, top1 in accuracies.items()}, rows


def _measure_logistic(train: Samples, val: Samples, seed: int) -> tuple[Any, list[Row]]:
    method = "logistic regression"
    if not classifiers.has_scikit_learn():
        return None, [(method, "not run: needs scikit-learn ('pip install scikit-learn')", "-")]
    result = classifiers.logistic_regression(train, val, seed)
    values = {"top1": result.top1, "C": result.inverse_regularization}
    return values, [(method, f"C = {result.inverse_regularization:.2g}", f"{result.top1:.2f}")]


def _measure_few_shot(train: Samples, val: Samples, seed: int) -> tuple[Any, list[Row]]:
    accuracies = classifiers.few_shot_accuracies(train, val)
    rows = []
    for number, values in accuracies.items():
        images = counted(number, "image")
        rows.append(("few-shot", f"{images} per class", f"{np.mean(values):.2f} +- {np.std(values):.2f}"))
    return {str(number): values for number, values in accuracies.items()}, rows


_MEASURE = {"knn": _measure_knn, "logistic": _measure_logistic, "fewshot": _measure_few_shot}


def _print_table(rows: list[Row]) -> None:
    print_table(("Method", "Setting", "Top-1 in %"), rows, right=(2,))
