"""Classifiers on frozen features with the published settings of DINOv2 (k-NN, logistic regression) and big_vision
(few-shot).

Features are [num_images, width], and labels [num_images] integers. Accuracies are top-1 in per cent.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_static.common.errors import UserError

# DINOv2 (arXiv 2304.07193), dinov2/eval/knn.py and log_regression.py
NEIGHBOURS, TEMPERATURE = (10, 20, 100, 200), 0.07
INVERSE_REGULARIZATIONS = 10.0 ** np.linspace(-6, 5, 45)  # C: the weight of the loss against |w|^2 / 2
SELECTION_SHARE = 10  # C is chosen on a tenth of the training images
_MAX_ITERATIONS, _TOLERANCE = 1000, 1e-6
# big_vision, big_vision/configs/common_fewshot.py and evaluators/fewshot_lsr.py
SHOTS, L2, NUM_SEEDS = (1, 5, 10, 25), 2.0**10, 3
_BIAS = 100.0  # a constant feature, so large that its weight is hardly regularized
_MIN_STD = 1e-5

_MAX_SIMILARITIES = 2**26  # computed at once (256 MiB)


@dataclass(frozen=True)
class Samples:
    """Features [num_images, width] float32 and labels [num_images] int64 of a set."""

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Samples:
        """Return the samples with these indices."""
        return Samples(self.features[indices], self.labels[indices])


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of equal labels in per cent."""
    return 100.0 * float((predicted == labels).mean())


def knn_accuracies(
    train: Samples, val: Samples, neighbours: Sequence[int] = NEIGHBOURS, temperature: float = TEMPERATURE
) -> dict[int, float]:
    """Return the accuracy of k-nearest-neighbour classification for each k that the training set has.

    The k training images with the largest cosine similarity s vote for their classes with the weight exp(s / T).
    """
    fitting = [k for k in neighbours if k <= len(train)]
    if not fitting:
        return {}
    keys, queries = _unit_length(train.features), _unit_length(val.features)
    num_classes = int(train.labels.max()) + 1
    num_correct = dict.fromkeys(fitting, 0)
    for start in range(0, len(val), max(_MAX_SIMILARITIES // len(train), 1)):
        rows = slice(start, start + max(_MAX_SIMILARITIES // len(train), 1))
        similarities = queries[rows] @ keys.T  # [rows, num_train]
        nearest = np.argpartition(-similarities, max(fitting) - 1, axis=1)[:, : max(fitting)]
        values = np.take_along_axis(similarities, nearest, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        nearest, values = np.take_along_axis(nearest, order, axis=1), np.take_along_axis(values, order, axis=1)
        weights = np.exp((values.astype(np.float64) - 1.0) / temperature)
        votes = np.zeros((len(values), num_classes))
        first = 0
        for k in sorted(fitting):
            for column in range(first, k):
                votes[np.arange(len(votes)), train.labels[nearest[:, column]]] += weights[:, column]
            first = k
            num_correct[k] += int((votes.argmax(axis=1) == val.labels[rows]).sum())
    return {k: 100.0 * num_correct[k] / len(val) for k in fitting}


def _unit_length(features: np.ndarray) -> np.ndarray:
    """Scale each row to length 1; a row of zeros stays."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norms > 0.0, norms, 1.0)


@dataclass(frozen=True)
class LogisticRegressionResult:
    """Accuracy of the final classifier, and the C that was chosen for it."""

    top1: float
    inverse_regularization: float


def has_scikit_learn() -> bool:
    """Return whether scikit-learn, which `logistic_regression` needs, is installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError:
        return False
    return True


def logistic_regression(
    train: Samples, val: Samples, seed: int, candidates: np.ndarray = INVERSE_REGULARIZATIONS
) -> LogisticRegressionResult:
    """Fit L2-regularized logistic regression by L-BFGS, with the C that does best on a tenth of the training images.

    The tenth is drawn by `seed`; of equally good values the smallest C is chosen. The final classifier is fitted to all
    training images. Raises UserError if there is only one class.
    """
    if len(np.unique(train.labels)) < 2:
        raise UserError("probe: the training images have only one class, and a classifier needs at least two")
    order = np.random.default_rng(seed).permutation(len(train))
    held_out, fitted = np.split(order, [max(len(train) // SELECTION_SHARE, 1)])
    best_accuracy, chosen = -1.0, float(candidates[0])
    if len(np.unique(train.labels[fitted])) > 1:
        model = None
        for c in candidates:  # ascending, so that each fit starts close to its solution
            model = _fit(train.take(fitted), float(c), model)
            result = accuracy(model.predict(train.features[held_out]), train.labels[held_out])
            if result > best_accuracy:
                best_accuracy, chosen = result, float(c)
    predicted = _fit(train, chosen).predict(val.features)
    return LogisticRegressionResult(accuracy(predicted, val.labels), chosen)


def _fit(train: Samples, inverse_regularization: float, previous: Any = None) -> Any:
    """Fit a classifier, starting from the weights of a previous one if there is one."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = previous or LogisticRegression(max_iter=_MAX_ITERATIONS, tol=_TOLERANCE, warm_start=True)
    model.set_params(C=inverse_regularization)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is part of the setting
        return model.fit(train.features.astype(np.float64), train.labels)


def few_shot_accuracies(
    train: Samples, val: Samples, shots: Sequence[int] = SHOTS, l2: float = L2, num_seeds: int = NUM_SEEDS
) -> dict[int, list[float]]:
    """Return the accuracies of L2-regularized least squares on `shots` images per class, one per seed.

    The images are drawn by the seeds 0, 1, ...; a class with fewer images contributes all of them. Numbers of shots
    that no class has are left out.
    """
    classes = range(int(max(train.labels.max(), val.labels.max())) + 1)
    most = int(np.bincount(train.labels).max())
    accuracies: dict[int, list[float]] = {number: [] for number in shots if number <= most}
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        drawn = [rng.permutation(np.flatnonzero(train.labels == label)) for label in classes]
        for number, results in accuracies.items():
            few = train.take(np.concatenate([indices[:number] for indices in drawn]))
            scores = least_squares_scores(few, val.features, len(classes), l2)
            results.append(accuracy(scores.argmax(axis=1), val.labels))
    return accuracies


def least_squares_scores(train: Samples, queries: np.ndarray, num_classes: int, l2: float) -> np.ndarray:
    """Return the scores [num_queries, num_classes] of regularized least squares for targets of 1 and -1.

    Features are standardized by the training images' mean and standard deviation. The weights are the solution of
    min |X W - Y|^2 + l2 |W|^2, by the smaller of its two normal equations.
    """
    features = train.features.astype(np.float64)
    mean, std = features.mean(axis=0), features.std(axis=0) + _MIN_STD

    def standardize(values: np.ndarray) -> np.ndarray:
        scaled = (values.astype(np.float64) - mean) / std
        return np.concatenate([scaled, np.full((len(scaled), 1), _BIAS)], axis=1)

    x, y = standardize(train.features), 2.0 * np.eye(num_classes)[train.labels] - 1.0
    num_images, width = x.shape
    if num_images >= width:
        weights = np.linalg.solve(x.T @ x + l2 * np.eye(width), x.T @ y)
    else:
        weights = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(num_images), y)
    return standardize(queries) @ weights
