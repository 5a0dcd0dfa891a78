"""Paddle's settings for the whole process: read before a test, restored after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _settings() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How each setting is read and set, in the order in which they are restored."""
    import paddle
    from paddle import pir, pir_utils
    from paddle.base import core, executor, framework
    from paddle.pir import core as pir_core

    amp = core._get_amp_attrs()

    def use_pir(is_used: bool) -> None:
        paddle.set_flags({"FLAGS_enable_pir_api": is_used})
        framework.global_var._use_pir_api_ = is_used
        (pir_utils._switch_to_pir_ if is_used else pir_utils._switch_to_old_ir_)()

    def use_amp_level(level: Any) -> None:
        amp._amp_level = level

    def use_amp_dtype(dtype: str) -> None:
        amp._amp_dtype = dtype

    return [
        (lambda: paddle.get_flags("FLAGS_enable_pir_api")["FLAGS_enable_pir_api"], use_pir),
        # A new dynamic mode has a new tracer, whose own autocast is off.
        (paddle.in_dynamic_mode, lambda is_dynamic: (paddle.disable_static if is_dynamic else paddle.enable_static)()),
        (lambda: pir_core._main_program_, pir_core.switch_main_program),
        (lambda: pir_core._startup_program_, pir_core.switch_startup_program),
        (pir.get_op_role, pir.set_op_role),
        (paddle.static.global_scope, executor._switch_scope),
        (lambda: amp._amp_level, use_amp_level),
        (lambda: amp._amp_dtype, use_amp_dtype),
        (core._has_grad, core._set_has_grad),
        (paddle.get_default_dtype, paddle.set_default_dtype),
    ]


def read() -> list[Any]:
    return [get() for get, _ in _settings()]


def restore(values: list[Any]) -> None:
    """Set those settings that differ from `values`, as `read` returned them."""
    for (get, set_value), value in zip(_settings(), values, strict=True):
        if get() != value:
            set_value(value)
