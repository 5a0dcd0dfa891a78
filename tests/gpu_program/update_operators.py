"""Operators of compiled programs: the update of the weights.

operators.py explains how an operator is written.
"""

from __future__ import annotations

import numpy as np

from gpu_program.array_operators import Array


def adamw(
    param: Array,
    grad: Array,
    learning_rate: Array,
    moment1: Array,
    moment2: Array,
    moment2_max: Array | None,
    beta1_pow: Array,
    beta2_pow: Array,
    master: Array | None,
    skip_update: Array | None,
    beta1: Array,
    beta2: Array,
    epsilon: Array,
    *,
    lr_ratio: float,
    coeff: float,
    with_decay: bool,
    lazy_mode: bool,
    multi_precision: bool,
    use_global_beta_pow: bool,
    amsgrad: bool,
    min_row_size_to_use_multithread: int,
) -> tuple[Array | None, ...]:
    """Return the new param, moment1, moment2, None, beta1_pow, beta2_pow, and master copy (AdamW, arXiv 1711.05101).

    The master copy, float32, is the weight that is updated, and `param` its rounded copy. All scalars are [1];
    beta1_pow is beta1^n in the n-th update. coeff: of the weight decay.
    """
    assert moment2_max is None and skip_update is None and not (lazy_mode or use_global_beta_pow or amsgrad)
    assert multi_precision == (master is not None)
    rate = learning_rate.reshape([1]) * np.float32(lr_ratio)
    weight = (param if master is None else master) * (1 - rate * np.float32(coeff if with_decay else 0.0))
    moment1 = beta1 * moment1 + (1 - beta1) * grad
    moment2 = beta2 * moment2 + (1 - beta2) * grad * grad
    denominator = np.sqrt(moment2) / np.sqrt(1 - beta2_pow) + epsilon
    weight = weight - moment1 / denominator * (rate / (1 - beta1_pow))
    return weight, moment1, moment2, None, beta1 * beta1_pow, beta2 * beta2_pow, weight
