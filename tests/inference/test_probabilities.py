"""The classes that a prediction names, with and without thresholds, and how `predict` writes them."""

from __future__ import annotations

import csv
import json

import numpy as np

from vit_static.inference.predict import _LINES, _csv_columns, _table_row
from vit_static.inference.predictor import Prediction
from vit_static.inference.probabilities import named_classes

PROBABILITIES = np.array([0.2, 0.7, 0.4, 0.7, 0.05, 0.3, 0.1])
THRESHOLDS = [0.1, 0.8, 0.4, 0.6, 0.1, 0.31, 0.05]


def test_without_thresholds_the_most_probable_classes_are_named() -> None:
    assert named_classes(PROBABILITIES, None, None) == [1, 3, 2, 5, 0]
    assert named_classes(PROBABILITIES, 2, None) == [1, 3]


def test_with_thresholds_all_classes_that_reach_theirs_are_named_unless_a_number_is_given() -> None:
    assert named_classes(PROBABILITIES, None, THRESHOLDS) == [3, 2, 0, 6]
    assert named_classes(PROBABILITIES, None, [0.9] * 7) == []
    assert named_classes(PROBABILITIES, 3, THRESHOLDS) == [1, 3, 2]


def test_any_number_of_classes_is_written_in_every_format() -> None:
    two, none = Prediction([3, 0], ["cat", "a;b"], [0.75, 0.5]), Prediction([], [], [])
    assert json.loads(_LINES["json"]("x.png", none, None)) == {"path": "x.png", "top": []}
    columns = ["path", "error", *_csv_columns(None)]
    (row,) = csv.DictReader([",".join(columns), _LINES["csv"]("x.png", two, None)])
    assert row["classes"] == "3;0" and row["probabilities"] == "0.75;0.5" and row["error"] == ""
    (row,) = csv.DictReader([",".join(columns), _LINES["csv"]("x.png", none, None)])
    assert (row["path"], row["classes"]) == ("x.png", "")
    assert _table_row("x.png", none) == ["x.png", "no class"]
    assert _table_row("x.png", two) == ["x.png", "cat 75.00%", "a;b 50.00%"]
    assert _table_row("x.png", Prediction([1], ["n" * 30], [1.0])) == ["x.png", f"{'n' * 23}… 100.00%"]
