"""Config of a tiny model for tests that run verbs: as a mapping, and as the `model` section of a YAML file."""

from __future__ import annotations

import json

TINY_MODEL = {
    "variant": "Ti/16",
    "image_size": 16,
    "patch_size": 8,
    "width": 32,
    "depth": 1,
    "num_heads": 2,
    "mlp_dim": 64,
    "num_classes": 10,
}


def tiny_model(**changed: object) -> str:
    """Return the section as one line of YAML, with the changed keys."""
    return f"model: {json.dumps({**TINY_MODEL, **changed})}\n"
