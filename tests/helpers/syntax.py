"""Dotted names in syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Mapping


def dotted_path(node: ast.AST, names: Mapping[str, str]) -> str | None:
    """Return what a chain of attributes stands for, such as paddle.pir.core for `pir.core` (names: pir -> paddle.pir).

    None for a chain that doesn't start with one of `names`.
    """
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    outer = dotted_path(node.value, names)
    return None if outer is None else f"{outer}.{node.attr}"
