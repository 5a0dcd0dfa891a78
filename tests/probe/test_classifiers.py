"""Classifiers on features, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from vit_static.common.errors import UserError
from vit_static.probe import classifiers
from vit_static.probe.classifiers import Samples


def clusters(num_images: int, seed: int, num_classes: int = 4, width: int = 12) -> Samples:
    """Return overlapping clusters of classes of unequal sizes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((num_classes, width))
    labels = rng.choice(num_classes, num_images, p=np.arange(1, num_classes + 1) / 10)
    features = centres[labels] + 1.5 * rng.standard_normal((num_images, width)) + 3.0
    return Samples(features.astype(np.float32), labels.astype(np.int64))


@pytest.fixture(scope="module")
def train() -> Samples:
    return clusters(300, seed=1)


@pytest.fixture(scope="module")
def val() -> Samples:
    return clusters(150, seed=2)


def test_k_nn_is_scikit_learns_with_dinov2s_votes(train: Samples, val: Samples, monkeypatch) -> None:
    accuracies = classifiers.knn_accuracies(train, val)
    assert list(accuracies) == [10, 20, 100, 200] and len(set(accuracies.values())) > 1
    for k, top1 in accuracies.items():
        peer = KNeighborsClassifier(k, weights=lambda distance: np.exp(-distance / 0.07), metric="cosine")
        predicted = peer.fit(train.features, train.labels).predict(val.features)
        assert top1 == pytest.approx(100.0 * np.mean(predicted == val.labels))
    monkeypatch.setattr(classifiers, "_MAX_SIMILARITIES", 1000)  # in several parts
    assert classifiers.knn_accuracies(train, val) == accuracies
    few = classifiers.knn_accuracies(train.take(np.arange(15)), val)
    assert list(few) == [10]  # a k beyond the training set is left out


def test_logistic_regression_is_scikit_learns(train: Samples, val: Samples) -> None:
    result = classifiers.logistic_regression(train, val, seed=0)
    assert result.inverse_regularization in classifiers.INVERSE_REGULARIZATIONS
    peer = LogisticRegression(C=result.inverse_regularization, max_iter=10_000, tol=1e-9)
    predicted = peer.fit(train.features.astype(np.float64), train.labels).predict(val.features)
    assert abs(result.top1 - 100.0 * np.mean(predicted == val.labels)) <= 100.0 / len(val)
    # The value was chosen on a tenth of the training images, each candidate fitted from scratch.
    held_out, fitted = np.split(np.random.default_rng(0).permutation(300), [30])
    scores = []
    for c in (1e-6, result.inverse_regularization, 1e5):
        peer = LogisticRegression(C=c, max_iter=10_000, tol=1e-6).fit(train.features[fitted], train.labels[fitted])
        scores.append(peer.score(train.features[held_out], train.labels[held_out]))
    assert scores[1] == max(scores)
    with pytest.raises(UserError, match="only one class"):
        classifiers.logistic_regression(Samples(train.features, np.zeros(300, np.int64)), val, seed=0)


@pytest.mark.parametrize("num_images", [9, 200])
def test_few_shot_scores_are_those_of_ridge_regression(train: Samples, val: Samples, num_images: int) -> None:
    """With fewer images than features, and with more, by the other normal equation."""
    few = train.take(np.arange(num_images))
    scores = classifiers.least_squares_scores(few, val.features, 4, classifiers.L2)
    mean, std = few.features.mean(axis=0, dtype=np.float64), few.features.std(axis=0, dtype=np.float64) + 1e-5

    def with_bias(features: np.ndarray) -> np.ndarray:
        return np.c_[(features - mean) / std, np.full(len(features), 100.0)]

    targets = np.where(few.labels[:, None] == np.arange(4), 1.0, -1.0)
    peer = Ridge(alpha=1024.0, fit_intercept=False, solver="svd").fit(with_bias(few.features), targets)
    np.testing.assert_allclose(scores, peer.predict(with_bias(val.features)), rtol=1e-6, atol=1e-8)


def test_few_shot_draws_the_same_number_of_each_class(train: Samples, val: Samples) -> None:
    accuracies = classifiers.few_shot_accuracies(train, val)
    assert list(accuracies) == [1, 5, 10, 25] and all(len(values) == 3 for values in accuracies.values())
    assert np.mean(accuracies[25]) > np.mean(accuracies[1])
    largest = np.bincount(train.labels).max()
    whole = classifiers.few_shot_accuracies(train, val, (int(largest),), num_seeds=2)
    assert len(set(next(iter(whole.values())))) == 1  # every draw has all images
    assert not classifiers.few_shot_accuracies(train, val, (int(largest) + 1,))
