"""From a model to a compiled training step."""
